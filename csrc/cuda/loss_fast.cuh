// The fast kernel (is_fast in kernel_params.h): labels, a constant weight for each of the two classes.
//
// Bytes: each logit read once, each gradient written once, two bytes of label per anchor. A thread takes two vectors of 16 bytes
// of logits at a time and computes them all as negatives. Where no thread of the warp has met a positive or ignored logit, that
// is all. Elsewhere such a logit is -inf, whose loss and gradient are exactly 0; a positive's own are computed in a divergent
// branch.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // logits in 16 bytes

// Two floats rounded to two 16-bit numbers, in one instruction where there is one.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t y;
  if constexpr (sizeof(T) == 2 && T::kIsBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
#else
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[kVector<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bit_cast<float>(word[i]);
    } else if constexpr (T::kIsBFloat16) {  // the bits of a float already
      x[2 * i] = bit_cast<float>(word[i] << 16);
      x[2 * i + 1] = bit_cast<float>(word[i] & 0xffff0000u);
    } else {
      x[2 * i] = to_float(T{uint16_t(word[i])});
      x[2 * i + 1] = to_float(T{uint16_t(word[i] >> 16)});
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 packed(const float (&x)[kVector<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = bit_cast<uint32_t>(x[i]);
    } else {
      word[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Which of a vector's logits are positive and which ignored, as bits. There are three ways to look, from the offset of the
// vector in its tile; which one serves is decided once for the tile. Two of them have a quick look first: common(), the bits that the
// labels of the vector's anchors have in common, is kBackground only where all of them are.

struct Special {
  uint32_t positive = 0, ignored = 0;
};

// A pointer that is computed here, once: of a sum the compiler knows, it would add the parts anew for every vector.
__device__ __forceinline__ const int16_t* materialized(const int16_t* labels) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(labels));
#endif
  return labels;
}

// Class last: most vectors lie within one anchor, and most anchors are background.
template <int kCount>
struct AnchorLook {
  const int16_t* labels;  // from the tile's first anchor on
  uint32_t k;             // class of the tile's first logit
  int first_class;        // the label of the logits' class 0
  Divisor classes;        // by a multiplication: there are fewer than 2^15, as labels are 16-bit

  static __device__ bool serves(const TileMap& map) {
    return map.layout == Layout::kClassLast && map.classes.divisor >= uint32_t(kCount);
  }
  __device__ AnchorLook(const int16_t* labels_, const TileMap& map, int first_class_)
      : labels(materialized(labels_ + map.anchor)), k(map.k), first_class(first_class_), classes(map.classes) {}

  __device__ __forceinline__ int common(uint32_t offset) const {
    const uint32_t n = k + offset;
    const uint32_t anchor = __umulhi(n, classes.magic);
    int all = __ldg(labels + anchor);
    if ((anchor + 1) * classes.divisor - n < uint32_t(kCount)) all &= __ldg(labels + anchor + 1);
    return all;
  }

  __device__ __forceinline__ Special at(uint32_t offset) const {
    const uint32_t n = k + offset;
    const uint32_t anchor = __umulhi(n, classes.magic);
    const uint32_t rest = (anchor + 1) * classes.divisor - n;  // logits up to the next anchor
    Special found;
    mark(__ldg(labels + anchor), classes.divisor - rest, 0, rest < uint32_t(kCount) ? rest : kCount, &found);
    if (rest < uint32_t(kCount)) mark(__ldg(labels + anchor + 1), 0, rest, kCount, &found);
    return found;
  }

 private:
  // Logits [begin, end) of the vector are the classes from `first` on of an anchor with this label.
  __device__ __forceinline__ void mark(int label, uint32_t first, uint32_t begin, uint32_t end, Special* found) const {
    const uint32_t at = uint32_t(label - first_class) - first;  // of a lower label it wraps beyond them all
    if (label >= 0 && at < end - begin) found->positive |= 1u << (begin + at);
    if (label == kIgnored) found->ignored |= (1u << end) - (1u << begin);
  }
};

// Class first: the labels of a plane lie as its logits do, and are read as vectors.
template <int kCount>
struct PlaneLook {
  const int16_t* labels;  // of the first cell of the tile's anchor shape
  uint32_t label, cell;   // of the tile's first logit
  Divisor cells;

  // Not where a tile goes on to the next anchor shape, or labels do not lie on the grid of 8 bytes.
  static __device__ bool serves(const int16_t* labels, const TileMap& map) {
    const uint32_t last = map.cell + kTileLogits - 1;
    const bool divides = map.cells.magic != 0 || last < map.cells.divisor;
    return map.layout == Layout::kClassFirst && divides && map.k + last / map.cells.divisor < map.classes.divisor &&
           ((map.cells.divisor | map.cell) & 3) == 0 && (reinterpret_cast<uintptr_t>(labels + map.anchor) & 7) == 0;
  }
  __device__ PlaneLook(const int16_t* labels_, const TileMap& map, int first_class)
      : labels(materialized(labels_ + map.anchor)), label(map.k + uint32_t(first_class)), cell(map.cell), cells(map.cells) {}

  __device__ __forceinline__ int common(uint32_t offset) const {
    uint32_t word[kCount / 2];
    read(offset, word);
    uint32_t all = word[0];
#pragma unroll
    for (int i = 1; i < kCount / 2; ++i) all &= word[i];
    return int(all);
  }

  __device__ __forceinline__ Special at(uint32_t offset) const {
    uint32_t word[kCount / 2];
    const uint32_t plane = read(offset, word);
    const uint32_t c = cell + offset - plane * cells.divisor;
    Special found;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {  // kIgnored is the one label with a sign and an even number
      const uint32_t ignored = (word[i] >> 15) & ~word[i] & 0x00010001u;
      found.ignored |= (ignored | ignored >> 15) << (2 * i) & (3u << (2 * i));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t of_cell = label + plane + (uint32_t(i) >= 4 && c + uint32_t(i) >= cells.divisor ? 1 : 0);
      found.positive |= uint32_t((word[i / 2] >> (i % 2 * 16) & 0xffffu) == of_cell) << i;
    }
    return found;
  }

 private:
  // The labels of the vector, two in a word; returns how many planes after the tile's first one it begins.
  __device__ __forceinline__ uint32_t read(uint32_t offset, uint32_t (&word)[kCount / 2]) const {
    const uint32_t n = cell + offset;
    const uint32_t plane = __umulhi(n, cells.magic);
    const uint32_t c = n - plane * cells.divisor;
#pragma unroll
    for (uint32_t i = 0; i < kCount / 4; ++i) {  // groups of four cells never leave a plane
      const uint32_t at = i == 0 || c + 4 * i < cells.divisor ? c + 4 * i : c + 4 * i - cells.divisor;
      const uint2 four = __ldg(reinterpret_cast<const uint2*>(labels + at));
      word[2 * i] = four.x, word[2 * i + 1] = four.y;
    }
    return plane;
  }
};

// Anything else, logit by logit; those outside the tile count as ignored.
template <int kCount>
struct AnyLook {
  const int16_t* labels;
  TileMap map;
  int first_class;
  uint32_t length;  // of the tile

  __device__ AnyLook(const int16_t* labels_, const TileMap& map_, int first_class_, const Tile& tile)
      : labels(labels_),
        map(map_),
        first_class(first_class_),
        length(tile.end > tile.begin ? uint32_t(tile.end - tile.begin) : 0) {}

  __device__ __forceinline__ Special at(int offset) const {
    Special found;
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const uint32_t n = uint32_t(offset + i);  // below 0 it wraps beyond every length
      if (n >= length) {
        found.ignored |= 1u << i;
        continue;
      }
      const Place place = map.at(n);
      const int label = labels[place.anchor];
      found.positive |= uint32_t(label == place.k + first_class) << i;
      found.ignored |= uint32_t(label == kIgnored) << i;
    }
    return found;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// A thread's share of a tile

template <class T, class Loss, Output kOutput>
struct FastThread {
  static constexpr int kCount = kVector<T>;
  static constexpr int kSteps = kTileLogits / kCount / kThreads;
  static_assert(kTileAlignment % kCount == 0 && kTileLogits % (2 * kCount * kThreads) == 0, "tiles are pairs of vectors");

  Loss loss_fn;
  float negative;         // weight times scale, for the gradient
  const float* positive;  // the same in shared memory, as it is rarely read
  // Where a positive's score is found, which is rare too; not looked at where losses read none.
  const KernelParams* params;
  const TileWork* work;
  // Sums of the bare losses. A tile gives a thread 32 logits: two float sums of 16, rounded by 6e-8 of them 15 times.
  float negatives[2];
  double positives;

  __device__ __forceinline__ void begin(const KernelParams& params_, const TileWork& work_) {
    params = &params_, work = &work_;
    negative = work_.negative, positive = &work_.positive;
    negatives[0] = negatives[1] = 0.0f;
    positives = 0;
  }

  static __device__ __forceinline__ uint4 read(const T* p) { return *reinterpret_cast<const uint4*>(p); }

  // Of the positive at this offset in the tile.
  __device__ __forceinline__ float score_at(uint32_t offset) const {
    if constexpr (!Loss::kScores) return 1.0f;
    const Level& level = params->levels.level[work->tile.level];
    return score_of<float>(*params, level, work->tile.image, work->map.at(offset).anchor);
  }

  // Adds the losses of kCount logits x, which come from p, at `offset` in the tile, and makes their gradient of them. Every tile's logits go through
  // here in the same order, wherever they lie in memory, so that the sums have the same bits.
  template <bool kClear>
  __device__ __forceinline__ void compute(float (&x)[kCount], const T* p, int offset, const Special special) {
    if constexpr (!kClear) {
      const uint32_t apart = special.positive | special.ignored;
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = (apart >> i & 1) != 0 ? -INFINITY : x[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Term<float> t = loss_fn.negative(x[i]);
      if (kOutput != Output::kGradient) negatives[i % 2] += t.loss;
      x[i] = t.grad * negative;
    }
    if constexpr (!kClear) {
      // A loop, so that it stays a branch: predicated, it would be issued for every vector.
      for (uint32_t rest = special.positive; rest != 0; rest &= rest - 1) {
        const int at = __ffs(int(rest)) - 1;
        const Term<float> t = loss_fn.positive(to_float(p[at]), score_at(uint32_t(offset + at)));
        positives += double(t.loss);
#pragma unroll
        for (int i = 0; i < kCount; ++i)  // an array indexed at run time would leave registers
          x[i] = i == at ? t.grad * *positive : x[i];
      }
    }
  }

  // 16 bytes of logits, from p; their gradient goes to g.
  template <bool kClear>
  __device__ __forceinline__ void vector(uint4 logits, const T* p, T* g, uint32_t offset, const Special special) {
    float x[kCount];
    unpack<T>(logits, x);
    compute<kClear>(x, p, int(offset), special);
    if (kOutput != Output::kLoss) *reinterpret_cast<uint4*>(g) = packed<T>(x);
  }

  // A tile that is whole vectors, all of them inside its image. Two at a time: their loads are in flight together.
  template <class Look>
  __device__ __forceinline__ void whole_tile(const T* p, T* g, const Look& look) {
    constexpr uint32_t kStep = kThreads * kCount;
    uint32_t offset = threadIdx.x * kCount;
    p += offset;
    if (kOutput != Output::kLoss) g += offset;
#pragma unroll 1
    for (int step = 0; step < kSteps; step += 2) {
      const uint4 first = read(p), second = read(p + kStep);
      if (__all_sync(0xffffffffu, (look.common(offset) & look.common(offset + kStep)) == kBackground)) {
        vector<true>(first, p, g, offset, {});
        vector<true>(second, p + kStep, g + kStep, offset + kStep, {});
      } else {  // read again: kept, they would take registers from both ways
        vector<false>(read(p), p, g, offset, look.at(offset));
        vector<false>(read(p + kStep), p + kStep, g + kStep, offset + kStep, look.at(offset + kStep));
      }
      offset += 2 * kStep;
      p += 2 * kStep;
      if (kOutput != Output::kLoss) g += 2 * kStep;
    }
  }

  // Any other tile: the same with the ends of an image, and where vectors do not serve (`vectors`: memory and weights allow
  // them), read and written logit by logit. x, g: the image's.
  __device__ __forceinline__ void ragged_tile(const T* x, T* g, const Tile& tile, bool vectors,
                                              const AnyLook<kCount>& look) {
    x += tile.begin;
    if (kOutput != Output::kLoss && g != nullptr) g += tile.begin;
    const int first = int(tile.aligned - tile.begin) + int(threadIdx.x) * kCount;
#pragma unroll 1
    for (int offset = first; offset < int(look.length); offset += kThreads * kCount) {
      if (offset + kCount <= 0) continue;
      const Special special = look.at(offset);
      const bool as_vector = vectors && offset >= 0 && offset + kCount <= int(look.length);
      float y[kCount];
      if (as_vector) {
        unpack<T>(read(x + offset), y);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) y[i] = (special.ignored >> i & 1) != 0 ? 0.0f : to_float(x[offset + i]);
      }
      compute<false>(y, x + offset, offset, special);
      if (kOutput == Output::kLoss || g == nullptr) continue;
      if (as_vector) {
        *reinterpret_cast<uint4*>(g + offset) = packed<T>(y);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (uint32_t(offset + i) < look.length)
            g[offset + i] = from_float<T>((special.ignored >> i & 1) != 0 ? 0.0f : y[i]);
        }
      }
    }
  }
};

template <class T, class Loss, Output kOutput>
__global__ void __launch_bounds__(kThreads, 4) fast_kernel(const __grid_constant__ KernelParams params) {
  constexpr int kCount = kVector<T>;

  FastThread<T, Loss, kOutput> thread;
  thread.loss_fn = Loss(params.loss);

  const int64_t last = first_item(params.levels.tiles, blockIdx.x + 1);
  for (int64_t index = first_item(params.levels.tiles, blockIdx.x); index < last; ++index) {
    const TileWork& work = begin_tile<float>(params, index);
    const Tile& tile = work.tile;
    const Level& level = params.levels.level[tile.level];
    const int64_t base = tile.image * level.image_logits;
    const T* x = static_cast<const T*>(level.logits) + base;
    T* g = kOutput == Output::kLoss || level.out == nullptr ? nullptr : static_cast<T*>(level.out) + base;
    if (kOutput == Output::kGradient && g == nullptr) continue;
    const int16_t* labels =
        static_cast<const int16_t*>(params.packed_labels) + level.first_anchor + tile.image * level.anchors;

    thread.begin(params, work);
    // Vectors give an ignored logit gradient 0, and 0 times a weight that is not finite would be NaN.
    const bool vectors = ((reinterpret_cast<uintptr_t>(level.logits) | reinterpret_cast<uintptr_t>(level.out)) & 15) == 0 &&
                         fabsf(thread.negative) < INFINITY;
    const bool writes = kOutput == Output::kLoss || g != nullptr;
    const bool whole = writes && vectors && tile.end - tile.begin == kTileLogits;
    if (whole && AnchorLook<kCount>::serves(work.map)) {
      thread.whole_tile(x + tile.begin, g + tile.begin, AnchorLook<kCount>(labels, work.map, params.first_class));
    } else if (whole && PlaneLook<kCount>::serves(labels, work.map)) {
      thread.whole_tile(x + tile.begin, g + tile.begin, PlaneLook<kCount>(labels, work.map, params.first_class));
    } else {
      thread.ragged_tile(x, g, tile, vectors, AnyLook<kCount>(labels, work.map, params.first_class, tile));
    }
    if constexpr (kOutput != Output::kGradient) {
      const double sum = block_sum(weigh(double(thread.negatives[0]) + double(thread.negatives[1]), params.negative_weight) +
                                   weigh(thread.positives, params.positive_weight));
      if (threadIdx.x == 0) params.partial[index] = weigh(sum, work.scale);
    } else {
      const float finished = float(factor_of_finished<float>(params, tile.level, tile.image, work.scale));
      if (finished != 1.0f) {
        __syncthreads();  // the tile has been written
        for (int64_t i = tile.begin + threadIdx.x; i < tile.end; i += kThreads)
          g[i] = from_float<T>(times_incoming(to_float(g[i]), finished));
      }
    }
  }
}

template <class T, class Loss, Output kOutput>
void launch_fast(const KernelParams& params, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(fast_kernel<T, Loss, kOutput>, known, context);
  launch(fast_kernel<T, Loss, kOutput>, params.levels.tiles < resident ? params.levels.tiles : resident, context, params);
}

template <class T, class Loss>
void run_fast_loss(const KernelParams& params, const Context& context) {
  switch (params.output) {
    case Output::kLoss:
      return launch_fast<T, Loss, Output::kLoss>(params, context);
    case Output::kLossAndGradient:
      return launch_fast<T, Loss, Output::kLossAndGradient>(params, context);
    default:
      return launch_fast<T, Loss, Output::kGradient>(params, context);
  }
}

}  // namespace

template <class T>
void run_fast(const KernelParams& params, const Context& context) {
  constexpr Accuracy kAccuracy = sizeof(T) == 2 ? Accuracy::kSixteenBits : Accuracy::kFloat;
  with_loss<float, Path::kFast, kAccuracy>(params.loss,
                                           [&](auto loss) { run_fast_loss<T, type_of<decltype(loss)>>(params, context); });
}

}  // namespace fastfocal::cuda
