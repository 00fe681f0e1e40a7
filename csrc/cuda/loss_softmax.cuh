// The kernel of the softmax focal loss: whole anchors, whose logits are read once from memory.
//
// A block takes a tile in parts that its shared memory has room for: the exponentials of all their logits go there; a warp sums a
// row, or each of its threads a column of cells' classes; a thread computes the formula for an anchor; and all write the gradient,
// an exponential times two numbers of its anchor. Of anchors with more classes than there is room for, the logits are read twice
// more or less: for the sum, and for the gradient, from a cache if it holds them. Beside a class mask, which has a kernel of its
// own, the logits of absent classes are not read.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class S>
constexpr int kRoom =
    sizeof(S) == sizeof(float) ? 6144 : 2048;  // exponentials; more blocks are resident than with twice as many
constexpr int kPart = kThreads;                // anchors of a part: a thread for each

// What the threads of a block share of a part.
template <class S>
struct SoftmaxPart {
  AnchorTile tile;
  double scale;
  S after_scale;  // what the finished gradient is multiplied by
  S exponential[kRoom<S>];
  S sum[kPart];  // [share][anchor]
  // Of each anchor. far: its base is the greatest logit, not 0.
  S others[kPart], greatest[kPart], grad[kPart], inverse[kPart], after[kPart];
  int32_t label[kPart];  // -1: ignored
  bool far[kPart];
};

// Adds numbers a few at a time: of thousands, the sum is rounded as if they were few, as what is lost when their sums are added is
// kept.
template <class S>
struct LongSum {
  S sum = S(0), low = S(0), part = S(0);
  int count = 0;
  __device__ __forceinline__ void add(S x) {
    part += x;
    if (++count == 16) fold();
  }
  __device__ __forceinline__ S value() {
    fold();
    return sum;
  }

 private:
  __device__ __forceinline__ void fold() {
    const S more = sum + (part + low), back = more - sum;
    low = (part + low) - back;
    sum = more;
    part = S(0);
    count = 0;
  }
};

template <class T, class Loss, bool kMasked>
struct SoftmaxWork {
  using S = Accumulation<T>;

  const KernelParams& params;
  const Loss& loss_fn;
  SoftmaxPart<S>& shared;
  const Level& level;
  const T* x;  // of the part's first anchor
  T* g;        // null: not wanted
  const int count, classes;
  const int64_t class_step, anchor_step;    // from a class, and from an anchor, to the next in memory
  const int class_room, anchor_room;        // and among the exponentials
  const bool kept;                          // all exponentials are
  const int64_t first;                      // the first anchor among all
  const int64_t image_anchor, image_first;  // and of the image; the image's first among all
  const uint8_t* const mask;                // the image's, where kMasked
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

  __device__ __forceinline__ bool rows() const { return level.layout == Layout::kClassLast; }
  __device__ __forceinline__ S logit(int i, int k) const { return to_float(x[i * anchor_step + k * class_step]); }
  __device__ __forceinline__ S& room(int i, int k) const { return shared.exponential[i * anchor_room + k * class_room]; }
  __device__ __forceinline__ bool is_present(int k) const { return !kMasked || mask[k * params.mask_class_stride] != 0; }
  __device__ __forceinline__ S exponential(int i, int k) const {
    return is_present(k) ? Loss::exponential(logit(i, k)) : S(0);
  }
  __device__ __forceinline__ S exponential(int i, int k, S base) const {
    return is_present(k) ? Loss::exponential(logit(i, k), base) : S(0);
  }
  __device__ __forceinline__ S finite_greatest(int i) const { return Loss::finite_logit(shared.greatest[i]); }

  // Calls use(anchor, class) for each logit of the part once; the threads of a warp meet neighbours in memory.
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
    if (rows()) {
      if (kept) {
        const Divisor by = params.levels.classes;
        for (uint32_t at = threadIdx.x; at < uint32_t(count * classes); at += kThreads) {
          const uint32_t i = by.of(at);
          use(int(i), int(at - i * uint32_t(classes)));
        }
      } else {
        for (int i = 0; i < count; ++i)
          for (int64_t k = threadIdx.x; k < classes; k += kThreads) use(i, int(k));
      }
    } else {
      const int columns = (count + 31) / 32;
      for (int64_t item = warp; item < int64_t(columns) * classes; item += kWarps) {
        const int k = int(item / columns), i = int(item - int64_t(k) * columns) * 32 + lane;
        if (i < count) use(i, k);
      }
    }
  }

  // The sum over the others of each anchor, in shares that the warps take.
  __device__ __forceinline__ void add_up() const {
    if (rows()) {
      const int shares = count < kWarps ? kWarps / count : 1;
      if (classes < 16) {
        if (int(threadIdx.x) < count) {
          LongSum<S> sum;
          for (int k = 0; k < classes; ++k)
            if (k != shared.label[threadIdx.x]) sum.add(near(int(threadIdx.x), k));
          shared.others[threadIdx.x] = sum.value();
        }
        return;
      }
      for (int item = warp; item < count * shares; item += kWarps) {
        const int i = item / shares, share = item - i * shares, label = shared.label[i];
        LongSum<S> sum;
        for (int64_t k = share * 32 + lane; k < classes; k += shares * 32)
          if (k != label) sum.add(near(i, int(k)));
        const S total = warp_sum(sum.value());
        if (lane == 0) shared.sum[share * count + i] = total;
      }
      add_shares(shares);
    } else {
      const int columns = (count + 31) / 32, shares = kWarps / columns;
      for (int item = warp; item < columns * shares; item += kWarps) {
        const int share = item / columns, i = (item - share * columns) * 32 + lane;
        if (i >= count) continue;
        const int label = shared.label[i];
        LongSum<S> sum;
        for (int64_t k = share; k < classes; k += shares)
          if (k != label) sum.add(near(i, int(k)));
        shared.sum[share * count + i] = sum.value();
      }
      add_shares(shares);
    }
  }

  // Anchors whose sum is beyond what exponentials of the logits themselves may add up to.
  __device__ __forceinline__ void add_up_far() const {
    if (rows()) {
      for (int i = warp; i < count; i += kWarps) {
        if (!shared.far[i]) continue;
        S greatest = first_logit(i);
        for (int64_t k = lane; k < classes; k += 32)
          if (is_present(int(k))) greatest = greater(greatest, logit(i, int(k)));
        for (int offset = 16; offset > 0; offset /= 2)
          greatest = greater(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
        const S base = Loss::finite_logit(greatest);
        LongSum<S> sum;
        for (int64_t k = lane; k < classes; k += 32) {
          const S e = exponential(i, int(k), base);
          if (kept) room(i, int(k)) = e;
          if (k != shared.label[i]) sum.add(e);
        }
        const S total = warp_sum(sum.value());
        if (lane == 0) shared.others[i] = total, shared.greatest[i] = greatest;
      }
    } else if (int(threadIdx.x) < count && shared.far[threadIdx.x]) {
      const int i = int(threadIdx.x);
      S greatest = first_logit(i);
      for (int k = 0; k < classes; ++k)
        if (is_present(k)) greatest = greater(greatest, logit(i, k));
      const S base = Loss::finite_logit(greatest);
      LongSum<S> sum;
      for (int k = 0; k < classes; ++k) {
        const S e = exponential(i, k, base);
        if (kept) room(i, k) = e;
        if (k != shared.label[i]) sum.add(e);
      }
      shared.others[i] = sum.value();
      shared.greatest[i] = greatest;
    }
  }

  // Label and weight of the thread's anchor; an ignored one looks like any other.
  __device__ __forceinline__ S begin_anchor(int i) const {
    const int label = packed_label_at(params, first + i);
    const bool counts = uint32_t(label) < uint32_t(classes) && is_present(label);
    shared.label[i] = counts ? label : -1;
    shared.after[i] = shared.after_scale;
    if (!counts) return S(0);
    S weight = S(shared.scale) * positive_weight<S>(params, label);
    if (params.anchor_weight != nullptr) weight *= static_cast<const S*>(params.anchor_weight)[first + i];
    if (params.incoming_elements) {
      const S incoming =
          to_float(static_cast<const T*>(level.incoming)[image_first + anchor_position(level, image_anchor + i)]);
      if (is_one_factor(double(weight), double(incoming))) {
        weight *= incoming;
      } else {
        shared.after[i] = incoming;
      }
    }
    return weight;
  }

  // What the anchor's own exponential and the others' sum say. Returns whether they say nothing yet.
  __device__ __forceinline__ bool own_of(int i, S* own, S* distance) const {
    *own = S(1), *distance = S(0);
    if (shared.label[i] < 0) {
      shared.others[i] = S(1);
      return false;
    }
    const S logit_ = logit(i, shared.label[i]);
    *own = shared.far[i] ? Loss::exponential(logit_, finite_greatest(i)) : Loss::exponential(logit_);
    *distance = shared.far[i] ? Loss::distance(logit_, shared.greatest[i]) : logit_;
    const S sum = *own + shared.others[i];
    return !shared.far[i] && !(S(Loss::kLeastSum) < sum && sum < S(Loss::kMostSum));
  }

  __device__ __forceinline__ void write_gradient() const {
    each([&](int i, int k) {
      const int label = shared.label[i];
      const S e = kept ? room(i, k) : shared.far[i] ? exponential(i, k, finite_greatest(i)) : exponential(i, k);
      S grad = k == label ? -shared.grad[i] : e * shared.inverse[i] * shared.grad[i];
      if (label < 0 || !is_present(k)) grad = S(0);  // whatever its logits are
      T y = rounded<T>(grad);
      if (shared.after[i] != S(1)) y = rounded<T>(times_incoming<S>(to_float(y), shared.after[i]));
      g[i * anchor_step + k * class_step] = y;
    });
  }

 private:
  __device__ __forceinline__ S near(int i, int k) const { return kept ? room(i, k) : exponential(i, k); }
  // Of a class that is there; its own is.
  __device__ __forceinline__ S first_logit(int i) const { return logit(i, kMasked ? shared.label[i] : 0); }
  __device__ __forceinline__ static S greater(S a, S b) { return a < b ? b : a; }
  __device__ __forceinline__ static S warp_sum(S x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
  __device__ __forceinline__ void add_shares(int shares) const {
    __syncthreads();
    if (int(threadIdx.x) >= count) return;
    S sum = S(0);
    for (int share = 0; share < shares; ++share) sum += shared.sum[share * count + int(threadIdx.x)];
    shared.others[threadIdx.x] = sum;
  }
};

template <class T, class Loss, bool kMasked>
__global__ void __launch_bounds__(kThreads, 3) softmax_kernel(const __grid_constant__ KernelParams params) {
  using S = Accumulation<T>;
  __shared__ SoftmaxPart<S> shared;
  const Loss loss_fn(params.loss);
  const Output output = params.output;
  const bool sums = output == Output::kLoss || output == Output::kLossAndGradient;
  const int classes = int(params.levels.classes.divisor);
  const int64_t last = first_item(params.levels.tiles, blockIdx.x + 1);
  for (int64_t index = first_item(params.levels.tiles, blockIdx.x); index < last; ++index) {
    __syncthreads();  // the last tile is done
    if (threadIdx.x == 0) {
      shared.tile = anchor_tile_at(params.levels, index);
      shared.scale = scale_of<S>(params, shared.tile.level, shared.tile.image);
      shared.after_scale = output == Output::kGradient
                               ? S(factor_of_finished<S>(params, shared.tile.level, shared.tile.image, shared.scale))
                               : S(1);
    }
    __syncthreads();
    const AnchorTile tile = shared.tile;
    const Level& level = params.levels.level[tile.level];
    if (!sums && level.out == nullptr) continue;
    const bool rows = level.layout == Layout::kClassLast;
    const int64_t base = tile.image * level.image_logits, image_first = tile.image * level.anchors;
    const int64_t cells = level.cells.divisor;
    const int fit = rows ? kRoom<S> / classes : kRoom<S> / classes / 32 * 32;
    const int most = fit == 0 ? (rows ? 1 : 32) : fit < kPart ? fit : kPart;

    double sum = 0;
    for (int64_t m = tile.begin; m < tile.end; m += most) {
      const int count = int(tile.end - m < most ? tile.end - m : most);
      const int64_t a = rows ? 0 : m / cells, at = rows ? m * classes : a * classes * cells + (m - a * cells);
      T* const out = static_cast<T*>(level.out);
      const bool gradient = out != nullptr && (output == Output::kLossAndGradient || output == Output::kGradient);
      const SoftmaxWork<T, Loss, kMasked> work = {params,
                                                  loss_fn,
                                                  shared,
                                                  level,
                                                  static_cast<const T*>(level.logits) + base + at,
                                                  gradient ? out + base + at : nullptr,
                                                  count,
                                                  classes,
                                                  rows ? 1 : cells,
                                                  rows ? classes : 1,
                                                  rows ? 1 : count,
                                                  rows ? classes : 1,
                                                  fit > 0,
                                                  level.first_anchor + image_first + m,
                                                  m,
                                                  image_first,
                                                  kMasked ? class_mask_of(params, tile.image) : nullptr};
      const int i = int(threadIdx.x);
      __syncthreads();  // the last part is done
      S weight = S(0);
      if (i < count) {
        weight = work.begin_anchor(i);
        shared.far[i] = false;
      }
      if (work.kept) work.each([&](int j, int k) { work.room(j, k) = work.exponential(j, k); });
      __syncthreads();
      work.add_up();
      __syncthreads();

      S own = S(1), distance = S(0);
      const bool is_far = i < count && work.own_of(i, &own, &distance);
      if (is_far) shared.far[i] = true;
      if (__syncthreads_or(is_far)) {
        work.add_up_far();
        __syncthreads();
        if (is_far) work.own_of(i, &own, &distance);
      }
      if (i < count) {
        const AnchorTerm<S> t = loss_fn.anchor(distance, own, shared.others[i]);
        const S loss = weigh(t.loss, weight);
        sum += double(loss);
        shared.grad[i] = t.grad * weight;
        shared.inverse[i] = t.inverse;
        if (output == Output::kElementLoss) out[image_first + anchor_position(level, m + i)] = rounded<T>(loss);
      }
      __syncthreads();
      if (work.g != nullptr) work.write_gradient();
    }
    if (sums) {
      const double total = block_sum(sum);
      if (threadIdx.x == 0) params.partial[index] = total;
    }
  }
}

template <class T, class Loss, bool kMasked>
void launch_softmax(const KernelParams& params, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(softmax_kernel<T, Loss, kMasked>, known, context);
  launch(softmax_kernel<T, Loss, kMasked>, params.levels.tiles < resident ? params.levels.tiles : resident, context, params);
}

}  // namespace

template <class T>
void run_softmax(const KernelParams& params, const Context& context) {
  with_anchor_loss<Accumulation<T>>(params.loss, [&](auto loss) {
    using Loss = type_of<decltype(loss)>;
    params.class_mask == nullptr ? launch_softmax<T, Loss, false>(params, context)
                                 : launch_softmax<T, Loss, true>(params, context);
  });
}

}  // namespace fastfocal::cuda
