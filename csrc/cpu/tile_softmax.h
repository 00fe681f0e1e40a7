// A tile of the softmax focal loss: whole anchors, whose logits are read once from memory.
//
// Block by block, as many anchors as the buffer has room for: the exponentials of all their logits, by a branch-free loop, into
// the buffer; each label's own taken out of it; the others summed; the formula, a vector of anchors at a time; and the gradient,
// the buffer times two numbers of each anchor. Where an anchor has more classes than the buffer has room for, they go through it in
// parts, and the gradient makes the exponentials again, from logits that are in cache.
//
// Beside a class mask (kMasked), the exponentials of absent classes are 0, and so is their gradient, whatever is multiplied; of
// planes, the absent ones are not read at all. A class of its own: in one that asks whether there is a mask, the compiler no longer
// keeps a tile's numbers in registers, and rows of few classes take a quarter longer.
#pragma once

#include "../losses/softmax_focal.h"
#include "tile_generic.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

using fastfocal::clamp_min;  // beside Vec's, for double
inline double lane_sums(const double (&vectors)[1]) { return vectors[0]; }
inline double lane_sum(double x) { return x; }
inline double lane_sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += double(lanes[i]);
  return sum;
}

// An image's class mask, where there is one.
template <class S, int kRoom, bool kMasked>
struct TileMask {};
template <class S, int kRoom>
struct TileMask<S, kRoom, true> {
  const uint8_t* mask_ = nullptr;
  int64_t first_present_ = 0;     // the first class that is there
  alignas(64) S present_[kRoom];  // 0 or 1, of classes side by side, as rows read them
};

constexpr int kSoftmaxBuffer = 10240;  // logits

template <class T, class Loss, bool kMasked>
class SoftmaxTile : TileMask<Accumulation<T>, kSoftmaxBuffer + Lanes<Accumulation<T>>::kCount, kMasked> {
  using S = Accumulation<T>;

 public:
  explicit SoftmaxTile(const KernelParams& params)
      : params_(params), loss_(params.loss), classes_(params.levels.classes.divisor) {
    fill(exponential_ + kBuffer, 1, L::kCount, S(0));
  }

  void operator()(const AnchorTile& tile, double* partial) {
    level_ = &params_.levels.level[tile.level];
    const double scale = scale_of<S>(params_, tile.level, tile.image);
    const Output output = params_.output;
    const bool gradient = output == Output::kLossAndGradient || output == Output::kGradient;
    const int64_t base = tile.image * level_->image_logits, anchors = tile.image * level_->anchors;
    x_ = static_cast<const T*>(level_->logits) + base;
    T* const out = static_cast<T*>(level_->out);
    g_ = gradient && out != nullptr ? out + base : nullptr;
    losses_ = output == Output::kElementLoss ? out + anchors : nullptr;
    incoming_ = params_.incoming_elements ? static_cast<const T*>(level_->incoming) + anchors : nullptr;
    first_ = level_->first_anchor + anchors;
    if constexpr (kMasked) look_at_mask(tile.image);
    scale_ = S(scale);
    after_scale_ = output == Output::kGradient ? S(factor_of_finished<S>(params_, tile.level, tile.image, scale)) : S(1);
    sum_ = {};
    level_->layout == Layout::kClassLast ? rows(tile.begin, tile.end) : planes(tile.begin, tile.end);
    if (partial != nullptr) *partial = sum_.value();
  }

 private:
  using L = Lanes<S>;
  using V = typename L::V;
  static constexpr int kBuffer = kSoftmaxBuffer;
  // Rows of a block: what is in flight, read, written and in the buffer, is to stay in the first cache.
  static constexpr int kRowLogits = 1280, kRows = 16;
  // Cells of a block: at least this much of each plane, whose lines are asked for two blocks before, as no hardware prefetches from
  // as many planes at once.
  static constexpr int kPlaneLogits = 5120, kAhead = 2 * kLeastCells;
  static constexpr int kBlock = kMostAnchors;
  static constexpr int kSummed = 16;  // numbers added in a row before their sum meets the sums before it

  // --- class last: an anchor is a row of logits -------------------------------------------------------------------------

  void rows(int64_t begin, int64_t end) {
    if (classes_ > kBuffer) {
      for (int64_t m = begin; m < end; ++m) long_row(m);
      return;
    }
    const int64_t wish = kRowLogits / classes_ / kRows * kRows, fit = kBuffer / classes_;
    const int64_t least = fit < kRows ? fit : kRows, most = wish < least ? least : wish < kBlock ? wish : kBlock;
    for (int64_t m = begin; m < end; m += most) block_of_rows(m, int(m + most < end ? most : end - m));
  }

  void block_of_rows(int64_t m, int count) {
    const int classes = int(classes_);
    const T* const x = x_ + m * classes_;
    exponentials(x, count * classes, exponential_);
    begin_block(m, count);
    for (int i = 0; i < count; ++i) take_own(i, x + i * classes, 1, 0, classes, exponential_ + i * classes, 1);
    for (int i = 0; i < count; i += L::kCount) {
      V sums[L::kCount];
      for (int lane = 0; lane < L::kCount; ++lane)
        sums[lane] = i + lane < count ? row_sum(exponential_ + (i + lane) * classes, classes) : V(S(0));
      L::store(others_ + i, lane_sums(sums), L::kCount);
    }
    const bool any_far = look_for_far(count);
    for (int i = 0; any_far && i < count; ++i) {
      if (far_[i] == S(0)) continue;
      greatest_[i] = row_greatest(x + i * classes);
      far_exponentials(x + i * classes, classes, greatest_[i], exponential_ + i * classes);
      take_own(i, x + i * classes, 1, 0, classes, exponential_ + i * classes, 1);
      others_[i] = S(lane_sum(row_sum(exponential_ + i * classes, classes)));
    }
    finish_block(m, count);
    if (g_ == nullptr) return;
    T* const g = g_ + m * classes_;
    const int end = count * classes;
    for (int i = 0; i < count; ++i) {
      const V inverse(inverse_[i]), grad(grad_[i]);
      const int stop = (i + 1) * classes;
      int at = i * classes;
      // What a vector writes beyond its row, the next rows write over.
      for (; at < stop && at + L::kCount <= end; at += L::kCount)
        L::store(g + at, if_present(at, (L::load(exponential_ + at) * inverse) * grad), L::kCount);
      if (at < stop) L::store(g + at, if_present(at, (L::load(exponential_ + at) * inverse) * grad), end - at);
      if (label_[i] >= 0) put(g + i * classes + label_[i], S(0) - grad_[i]);
    }
    for (int i = 0; i < count; ++i) correct(i, g + i * classes, 1);
  }

  // More classes than the buffer has room for.
  void long_row(int64_t m) {
    const T* const x = x_ + m * classes_;
    begin_block(m, 1);
    const auto pass = [&](const auto& exponentials_of) {
      double others = 0;
      for (int64_t k = 0; k < classes_; k += kBuffer) {
        const int n = int(classes_ - k < kBuffer ? classes_ - k : kBuffer);
        if constexpr (kMasked) gather_mask(k, n);
        exponentials_of(x + k, n);
        take_own(0, x, 1, k, n, exponential_, 1);
        others += lane_sum(row_sum(exponential_, n));
      }
      others_[0] = S(others);
    };
    pass([&](const T* from, int n) { exponentials(from, n, exponential_); });
    const bool is_far = look_for_far(1);
    if (is_far) {
      greatest_[0] = row_greatest(x);
      pass([&](const T* from, int n) { far_exponentials(from, n, greatest_[0], exponential_); });
    }
    finish_block(m, 1);
    if (g_ == nullptr) return;
    T* const g = g_ + m * classes_;
    const V inverse(inverse_[0]), grad(grad_[0]), base = Loss::finite_logit(V(greatest_[0]));
    for (int64_t k = 0; k < classes_; k += L::kCount) {
      const int n = classes_ - k < L::kCount ? int(classes_ - k) : L::kCount;
      const V logit = L::load(x + k, n), e = is_far ? Loss::exponential(logit, base) : Loss::exponential(logit);
      L::store(g + k, (e * inverse) * grad, n);
    }
    if (label_[0] >= 0) put(g + label_[0], S(0) - grad_[0]);
    for (int64_t k = 0; kMasked && k < classes_; ++k)
      if (!is_present(k)) put(g + k, S(0));
    correct(0, g, 1);
  }

  // The exponentials of n logits side by side, the first of which is of the class that the gathered mask begins with.
  void exponentials(const T* x, int n, S* e) const {
    int i = 0;
    for (; i + L::kCount <= n; i += L::kCount) {
      __builtin_prefetch(x + i + kPrefetch / int(sizeof(T)));
      L::store(e + i, if_present(i, Loss::exponential(L::load(x + i))), L::kCount);
    }
    if (i < n) L::store(e + i, if_present(i, Loss::exponential(L::load(x + i, n - i))), n - i);
  }
  void far_exponentials(const T* x, int n, S greatest, S* e) const {
    const V base = Loss::finite_logit(V(greatest));
    for (int i = 0; i < n; i += L::kCount) {
      const int count = n - i < L::kCount ? n - i : L::kCount;
      L::store(e + i, if_present(i, Loss::exponential(L::load(x + i, count), base)), count);
    }
  }
  S row_greatest(const T* x) const {
    S greatest = to_float(x[first_present()]);
    for (int64_t k = first_present() + 1; k < classes_; ++k)
      if (is_present(k)) greatest = greatest < S(to_float(x[k])) ? S(to_float(x[k])) : greatest;
    return greatest;
  }

  // Lanes that add up to the sum of n numbers. What follows these in the buffer is read too.
  static V row_sum(const S* e, int n) {
    V sum(S(0));
    int i = 0;
    while (i + L::kCount <= n) {
      const int stop = n - i < kSummed * L::kCount ? n : i + kSummed * L::kCount;
      V part(S(0));
      for (; i + L::kCount <= stop; i += L::kCount) part = part + L::load(e + i);
      sum = sum + part;
    }
    return i < n ? sum + first_lanes(L::load(e + i), n - i) : sum;
  }
  static double first_lanes(double x, int) { return x; }
  static Vec first_lanes(Vec x, int n) { return zero_where(lanes_from(n), x); }

  // --- class first: anchors are the cells of K planes -------------------------------------------------------------------

  void planes(int64_t begin, int64_t end) {
    const int64_t cells = level_->cells.divisor, a = begin / cells;
    const int64_t wish = kPlaneLogits / classes_ / kLeastCells * kLeastCells, fit = kBuffer / classes_ / 16 * 16;
    const int64_t least = fit == 0 || fit > kLeastCells ? kLeastCells : fit;  // 0: in parts
    const int64_t most = wish < least ? least : wish < kBlock ? wish : kBlock;
    for (int64_t m = begin; m < end; m += most)
      block_of_cells(m, a * classes_ * cells + (m - a * cells), int(m + most < end ? most : end - m));
  }

  // at: of the first cell's first logit
  void block_of_cells(int64_t m, int64_t at, int count) {
    const int64_t cells = level_->cells.divisor;
    const int width = (count + L::kCount - 1) / L::kCount * L::kCount;
    const int64_t fit = kBuffer / width;
    const bool kept = classes_ <= fit;
    const T* const x = x_ + at;
    begin_block(m, count);
    fill(sum_low_, 1, width, S(0));
    for (int64_t k = 0; k < classes_; k += fit) {
      const int n = int(classes_ - k < fit ? classes_ - k : fit);
      plane_exponentials(x + k * cells, k, n, cells, count, width);
      for (int i = 0; i < count; ++i) take_own(i, x + i, cells, k, n, exponential_ + i, width);
      for (int i = 0; i < width; i += L::kCount) add_column_sum(i, n, width);
    }
    const bool any_far = look_for_far(count);
    for (int i = 0; any_far && i < count; i += L::kCount) far_cells(i, x + i, cells, count, width, kept);
    finish_block(m, count);
    if (g_ == nullptr) return;
    T* const g = g_ + at;
    for (int64_t k = 0; k < classes_; ++k) {
      if (!is_present(k)) {
        fill(g + k * cells, 1, count, T());
        continue;
      }
      for (int i = 0; i < count; i += L::kCount) {
        const int lanes = count - i < L::kCount ? count - i : L::kCount;
        V e;
        if (kept) {
          e = L::load(exponential_ + k * width + i);
        } else {
          const V logit = L::load(x + k * cells + i, lanes);
          e = Loss::exponential(logit);
          if (any_far) e = select(is_far(i), Loss::exponential(logit, finite_greatest(i)), e);
        }
        L::store(g + k * cells + i, (e * L::load(inverse_ + i)) * L::load(grad_ + i), lanes);
      }
    }
    for (int i = 0; i < count; ++i)
      if (label_[i] >= 0) put(g + label_[i] * cells + i, S(0) - grad_[i]);
    for (int i = 0; i < count; ++i) correct(i, g + i, cells);
  }

  // x: of plane `first`
  void plane_exponentials(const T* x, int64_t first, int planes, int64_t cells, int count, int width) {
    for (int k = 0; k < planes; ++k) {
      const T* const from = x + k * cells;
      T* const to = g_ == nullptr ? nullptr : g_ + (from - x_);
      S* const e = exponential_ + k * width;
      if (!is_present(first + k)) {
        fill(e, 1, width, S(0));
        continue;
      }
      int i = 0;
      for (; i + L::kCount <= count; i += L::kCount) {
        __builtin_prefetch(from + i + kAhead);
        if (to != nullptr) __builtin_prefetch(to + i, 1);
        L::store(e + i, Loss::exponential(L::load(from + i)), L::kCount);
      }
      if (i < count) L::store(e + i, Loss::exponential(L::load(from + i, count - i)), L::kCount);
    }
  }

  // Adds what is in the buffer of a vector of cells. Of thousands of classes too, the sum is rounded as if they were few: what is
  // lost when a part is added is kept.
  void add_column_sum(int i, int planes, int width) {
    V sum = L::load(others_ + i), low = L::load(sum_low_ + i);
    for (int k = 0; k < planes;) {
      const int stop = planes - k < kSummed ? planes : k + kSummed;
      V part(S(0)), other(S(0));
      for (; k + 2 <= stop; k += 2) {
        part = part + L::load(exponential_ + k * width + i);
        other = other + L::load(exponential_ + (k + 1) * width + i);
      }
      if (k < stop) part = part + L::load(exponential_ + k++ * width + i);
      part = part + other;
      const V more = sum + (part + low), back = more - sum;
      low = (part + low) - back;
      sum = more;
    }
    L::store(others_ + i, sum, L::kCount);
    L::store(sum_low_ + i, low, L::kCount);
  }

  auto is_far(int i) const { return V(S(0.5)) < L::load(far_ + i); }
  V finite_greatest(int i) const { return Loss::finite_logit(L::load(greatest_ + i)); }

  // A vector of cells, some of whose logits are far from 0. The others stay as they are.
  void far_cells(int i, const T* x, int64_t cells, int count, int width, bool kept) {
    const int lanes = count - i < L::kCount ? count - i : L::kCount;
    bool any = false;
    for (int lane = 0; lane < lanes; ++lane) any |= far_[i + lane] != S(0);
    if (!any) return;
    V greatest = L::load(x + first_present() * cells, lanes);
    for (int64_t k = first_present() + 1; k < classes_; ++k)
      if (is_present(k)) greatest = clamp_min(L::load(x + k * cells, lanes), greatest);
    L::store(greatest_ + i, greatest, L::kCount);
    const V base = Loss::finite_logit(greatest);
    S own[L::kCount] = {}, e[L::kCount];
    V sum(S(0)), low(S(0));
    for (int64_t k = first_present(); k < classes_; ++k) {
      if (!is_present(k)) continue;
      L::store(e, Loss::exponential(L::load(x + k * cells, lanes), base), L::kCount);
      for (int lane = 0; lane < lanes; ++lane) {
        if (label_[i + lane] == k) own[lane] = taken(e + lane);
        if (kept && far_[i + lane] != S(0)) exponential_[k * width + i + lane] = e[lane];
      }
      const V more = sum + (L::load(e) + low), back = more - sum;
      low = (L::load(e) + low) - back;
      sum = more;
    }
    S others[L::kCount];
    L::store(others, sum, L::kCount);
    for (int lane = 0; lane < lanes; ++lane) {
      if (far_[i + lane] == S(0)) continue;
      own_[i + lane] = own[lane];
      others_[i + lane] = others[lane];
      distance_[i + lane] = Loss::distance(S(to_float(x[lane + label_[i + lane] * cells])), greatest_[i + lane]);
    }
  }
  static S taken(S* p) {
    const S before = *p;
    *p = S(0);
    return before;
  }

  // --- what both share --------------------------------------------------------------------------------------------------

  // Of rows that the buffer has room for, the mask is gathered one after the other as their exponentials are; others gather parts.
  void look_at_mask(int64_t image) {
    const uint8_t* const before = this->mask_;
    this->mask_ = class_mask_of(params_, image);
    if (this->mask_ == before) return;
    this->first_present_ = 0;
    while (this->first_present_ < classes_ && !is_present(this->first_present_)) ++this->first_present_;
    if (classes_ > kBuffer) return;
    const int classes = int(classes_);
    gather_mask(0, classes);
    for (int i = classes; i < kBuffer; ++i) this->present_[i] = this->present_[i - classes];
  }
  void gather_mask(int64_t k, int n) {
    for (int i = 0; i < n; ++i) this->present_[i] = S(is_present(k + i));
  }
  bool is_present(int64_t k) const {
    if constexpr (kMasked) return this->mask_[k * params_.mask_class_stride] != 0;
    return true;
  }
  int64_t first_present() const {
    if constexpr (kMasked) return this->first_present_;
    return 0;
  }
  // x, but 0 in the lanes of absent classes; at: of the first lane, among what is gathered.
  V if_present(int at, V x) const {
    if constexpr (kMasked) x = select(V(S(0.5)) < L::load(this->present_ + at), x, V(S(0)));
    return x;
  }

  // Labels and weights of the block's anchors; the numbers of the lanes after them cost nothing.
  void begin_block(int64_t m, int count) {
    const S* const class_weights = static_cast<const S*>(params_.class_weights);
    const S* const anchor_weight = static_cast<const S*>(params_.anchor_weight);
    const S constant = scale_ * S(params_.positive_weight);
    any_ignored_ = any_after_ = false;
    for (int i = 0; i < count; ++i) {
      const int label = packed_label_at(params_, first_ + m + i);
      const bool counts = uint32_t(label) < uint32_t(classes_);
      label_[i] = counts ? label : -1;
      any_ignored_ |= !counts;
      S weight = constant;
      if (class_weights != nullptr) weight = scale_ * class_weights[counts ? label : 0];
      if (anchor_weight != nullptr) weight *= anchor_weight[first_ + m + i];
      weight_[i] = counts ? weight : S(0);
      after_[i] = after_scale_;
      if (incoming_ != nullptr) take_incoming(m, i);
    }
    if constexpr (kMasked) ignore_absent(count);
    any_after_ |= after_scale_ != S(1);
    for (int i = 0; i < count + L::kCount; ++i) others_[i] = distance_[i] = far_[i] = S(0), own_[i] = S(1);
    for (int i = count; i < count + L::kCount; ++i) weight_[i] = S(0);
  }

  void ignore_absent(int count) {
    for (int i = 0; i < count; ++i) {
      if (label_[i] < 0 || is_present(label_[i])) continue;
      label_[i] = -1;
      weight_[i] = S(0);
      any_ignored_ = true;
    }
  }

  // The gradient that comes in for an anchor is a factor of its weight, unless it is no number or nearly none: then 0 times it has
  // to be 0, and the finished gradient is multiplied by it.
  void take_incoming(int64_t m, int i) {
    const S incoming = to_float(incoming_[anchor_position(*level_, m + i)]);
    if (is_one_factor(double(weight_[i]), double(incoming))) {
      weight_[i] *= incoming;
    } else {
      after_[i] = incoming;
      any_after_ = true;
    }
  }

  // The exponential of the label's class, where that is one of n classes from k on; 0 takes its place. step, width: from a class to
  // the next in x and in e.
  void take_own(int i, const T* x, int64_t step, int64_t k, int n, S* e, int width) {
    const int64_t at = label_[i] - k;
    if (label_[i] < 0 || at < 0 || at >= n) return;
    own_[i] = taken(e + at * width);
    const S logit = to_float(x[label_[i] * step]);
    distance_[i] = far_[i] != S(0) ? Loss::distance(logit, greatest_[i]) : logit;
  }

  // Anchors whose sum is beyond what exponentials of the logits themselves may add up to. Not ignored ones, which look like any
  // other from here on; but a NaN of theirs is remembered.
  bool look_for_far(int count) {
    for (int i = 0; any_ignored_ && i < count; ++i) {
      if (label_[i] >= 0) continue;
      is_nan_[i] = !(others_[i] <= S(FLT_MAX));
      own_[i] = others_[i] = S(1);
    }
    const V zero(S(0)), one(S(1)), least(Loss::kLeastSum), most(Loss::kMostSum);
    V any = zero;
    for (int i = 0; i < count; i += L::kCount) {
      const V sum = L::load(own_ + i) + L::load(others_ + i);
      const V far = select(sum < most, select(least < sum, zero, one), one);
      L::store(far_ + i, far, L::kCount);
      any = any + far;
    }
    return lane_sum(any) != 0;
  }

  void finish_block(int64_t m, int count) {
    for (int i = 0; i < count; i += L::kCount) {
      const AnchorTerm<V> t = loss_.anchor(L::load(distance_ + i), L::load(own_ + i), L::load(others_ + i));
      const V weight = L::load(weight_ + i), loss = weigh(t.loss, weight);
      sum_.add(loss);
      L::store(grad_ + i, t.grad * weight, L::kCount);
      L::store(inverse_ + i, t.inverse, L::kCount);
      if (losses_ == nullptr) continue;
      S each[L::kCount];
      L::store(each, loss, L::kCount);
      for (int lane = 0; lane < L::kCount && i + lane < count; ++lane)
        put(losses_ + anchor_position(*level_, m + i + lane), each[lane]);
    }
  }

  // What vectors left wrong of an anchor's gradient.
  void correct(int i, T* g, int64_t step) {
    if (any_ignored_ && label_[i] < 0 && is_nan_[i]) fill(g, step, classes_, T());
    if (!any_after_ || after_[i] == S(1)) return;
    for (int64_t k = 0; k < classes_; ++k) put(g + k * step, times_incoming<S>(to_float(g[k * step]), after_[i]));
  }

  static void put(T* p, S x) { *p = rounded<T>(x); }
  template <class X>
  static void fill(X* p, int64_t step, int64_t n, X x) {
    for (int64_t i = 0; i < n; ++i) p[i * step] = x;
  }

  const KernelParams& params_;
  const Loss loss_;
  const int64_t classes_;
  const Level* level_;
  const T *x_, *incoming_;  // incoming, losses: one of each anchor, or null
  T *g_, *losses_;
  int64_t first_;  // of the image's anchors among all
  S scale_, after_scale_;
  typename L::Total sum_;

  alignas(64) S exponential_[kBuffer + L::kCount];
  // Of each anchor of the block. far: 0 or 1; greatest, the base: where it is 1. after: what the finished gradient is multiplied by.
  static constexpr int kRoom = kBlock + L::kCount;
  alignas(64) S own_[kRoom], others_[kRoom], distance_[kRoom], weight_[kRoom], far_[kRoom], greatest_[kRoom];
  alignas(64) S grad_[kRoom], inverse_[kRoom], sum_low_[kRoom], after_[kRoom];
  int32_t label_[kBlock];
  bool is_nan_[kBlock];
  bool any_ignored_, any_after_;
};

template <class T, class Loss, bool kMasked>
void softmax_tiles(const KernelParams& params, int64_t begin, int64_t end) {
  const bool sums = params.output == Output::kLoss || params.output == Output::kLossAndGradient;
  SoftmaxTile<T, Loss, kMasked> run(params);
  for (int64_t t = begin; t < end; ++t) {
    const AnchorTile tile = anchor_tile_at(params.levels, t);
    if (sums || params.levels.level[tile.level].out != nullptr) run(tile, sums ? params.partial + t : nullptr);
  }
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
