// The plain kernel (is_plain in call.h): labels, a constant weight for each of the two classes.
//
// Bytes: each logit read once, each gradient written once, two bytes of code per anchor. A thread takes 16 bytes of logits
// at a time, computes them all as negatives, and repairs the rare positive in a divergent branch; a positive or ignored
// logit does not enter the sum before it is repaired.
#pragma once

#include "../focal_math.h"
#include "../levels.h"
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
__device__ __forceinline__ void load_vector(const T* p, float (&x)[kVector<T>]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bit_cast<float>(word[i]);
    } else {
      x[2 * i] = to_float(T{uint16_t(word[i])});
      x[2 * i + 1] = to_float(T{uint16_t(word[i] >> 16)});
    }
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[kVector<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = bit_cast<uint32_t>(x[i]);
    } else {
      word[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
}

// Which of a vector's logits are positive and which ignored, as bits.
struct Special {
  uint32_t positive = 0, ignored = 0;
};

// All logits of the vector are inside the image. place: of the first.
template <int kCount>
__device__ __forceinline__ Special special_logits(const int16_t* codes, const TileMap& map, uint32_t offset) {
  const Place place = map.at(offset);
  const uint32_t classes = map.classes.divisor;
  Special found;
  if (map.layout == Layout::kClassLast && uint32_t(place.k) + kCount <= classes) {  // one anchor
    const int code = codes[place.anchor];
    const uint32_t at = uint32_t(code - place.k);
    if (code == kIgnored) found.ignored = (1u << kCount) - 1;
    if (code >= 0 && at < uint32_t(kCount)) found.positive = 1u << at;
    return found;
  }
  if (map.layout == Layout::kClassFirst && uint32_t(place.cell) + kCount <= map.cells.divisor) {  // one plane
    const int16_t* p = codes + place.anchor;
    uint32_t word[kCount / 2];
    if ((reinterpret_cast<uintptr_t>(p) & (kCount * sizeof(int16_t) - 1)) == 0) {
      if constexpr (kCount == 8) {
        const uint4 raw = *reinterpret_cast<const uint4*>(p);
        word[0] = raw.x, word[1] = raw.y, word[2] = raw.z, word[3] = raw.w;
      } else {
        const uint2 raw = *reinterpret_cast<const uint2*>(p);
        word[0] = raw.x, word[1] = raw.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) word[i] = uint32_t(uint16_t(p[2 * i])) | uint32_t(uint16_t(p[2 * i + 1])) << 16;
    }
    uint32_t all = word[0];
#pragma unroll
    for (int i = 1; i < kCount / 2; ++i) all &= word[i];
    if (all == 0xffffffffu) return found;  // kBackground everywhere
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int code = int16_t(word[i / 2] >> (i % 2 * 16));
      found.positive |= uint32_t(code == place.k) << i;
      found.ignored |= uint32_t(code == kIgnored) << i;
    }
    return found;
  }
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {  // the vector goes over the end of an anchor or a plane
    const Place p = map.at(offset + uint32_t(i));
    const int code = codes[p.anchor];
    found.positive |= uint32_t(code == p.k) << i;
    found.ignored |= uint32_t(code == kIgnored) << i;
  }
  return found;
}

template <class T, class Formula, Output kOutput>
struct PlainThread {
  static constexpr int kCount = kVector<T>;
  Formula formula;
  float negative, positive;             // weight times scale, for the gradient
  double negatives = 0, positives = 0;  // sums of the bare losses

  // A whole vector: x becomes its gradient.
  __device__ __forceinline__ void vector(float (&x)[kCount], const Special special) {
    float loss[kCount], slope[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Term<float> t = formula.negative(x[i]);
      loss[i] = t.loss;
      slope[i] = t.slope * negative;
    }
    if ((special.positive | special.ignored) != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if ((special.positive | special.ignored) >> i & 1u) loss[i] = slope[i] = 0.0f;
      for (uint32_t rest = special.positive; rest != 0; rest &= rest - 1) {
        const int at = __ffs(int(rest)) - 1;
        float logit = 0.0f;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          logit = i == at ? x[i] : logit;  // an array indexed at run time would leave registers
        const Term<float> t = formula.positive(logit);
        positives += double(t.loss);
#pragma unroll
        for (int i = 0; i < kCount; ++i) slope[i] = i == at ? t.slope * positive : slope[i];
      }
    }
    if constexpr (kOutput != Output::kGradient) {
#pragma unroll
      for (int width = kCount / 2; width > 0; width /= 2)
#pragma unroll
        for (int i = 0; i < width; ++i) loss[i] += loss[i + width];
      negatives += double(loss[0]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = slope[i];
  }

  // One logit, at the edges.
  __device__ __forceinline__ float one(float x, bool is_positive, bool is_ignored) {
    if (is_ignored) return 0.0f;
    const Term<float> t = is_positive ? formula.positive(x) : formula.negative(x);
    (is_positive ? positives : negatives) += double(t.loss);
    return t.slope * (is_positive ? positive : negative);
  }
};

template <class T, Gamma kGamma, Output kOutput>
__global__ void __launch_bounds__(kThreads, 4) plain_kernel(const __grid_constant__ Call call) {
  using Formula = FocalLoss<float, kGamma, false>;
  constexpr int kCount = kVector<T>;
  constexpr int kPerThread = kTileLogits / kCount / kThreads;
  constexpr bool kGradient = kOutput != Output::kLoss;
  static_assert(kTileAlignment % kCount == 0 && kTileLogits % (kCount * kThreads) == 0, "tiles are whole vectors");

  __shared__ Tile shared_tile;
  __shared__ TileMap shared_map;

  const int64_t last = first_item(call.levels.tiles, blockIdx.x + 1);
  for (int64_t index = first_item(call.levels.tiles, blockIdx.x); index < last; ++index) {
    __syncthreads();  // the last tile is done
    if (threadIdx.x == 0) {
      shared_tile = tile_at(call.levels, index);
      shared_map = TileMap(call.levels, shared_tile);
    }
    __syncthreads();
    const Tile tile = shared_tile;
    const TileMap map = shared_map;
    const Level& level = call.levels.level[tile.level];
    const int64_t base = tile.image * level.image_logits;
    const T* x = static_cast<const T*>(level.logits) + base;
    T* g = static_cast<T*>(level.out);
    const bool write = kGradient && g != nullptr;
    if (write) g += base;
    if (kOutput == Output::kGradient && !write) continue;
    const int16_t* codes = static_cast<const int16_t*>(call.codes) + level.first_anchor + tile.image * level.anchors;
    const double scale = scale_of<float>(call, tile.level, tile.image);

    PlainThread<T, Formula, kOutput> thread;
    thread.formula = Formula(float(call.gamma), 0.0f);
    thread.negative = float(call.negative_weight * scale);
    thread.positive = float(call.positive_weight * scale);
    // Storage that starts off the 16-byte grid is read logit by logit, in the same order.
    const bool aligned = ((reinterpret_cast<uintptr_t>(level.logits) | reinterpret_cast<uintptr_t>(level.out)) & 15) == 0;

#pragma unroll 2
    for (int step = 0; step < kPerThread; ++step) {
      const int64_t at = tile.aligned + (int64_t(step) * kThreads + threadIdx.x) * kCount;
      if (aligned && at >= tile.begin && at + kCount <= tile.end) {
        float v[kCount];
        load_vector(x + at, v);
        thread.vector(v, special_logits<kCount>(codes, map, uint32_t(at - tile.begin)));
        if (write) store_vector(g + at, v);
      } else {
#pragma unroll 1
        for (int i = 0; i < kCount; ++i) {
          const int64_t j = at + i;
          if (j < tile.begin || j >= tile.end) continue;
          const Place place = map.at(uint32_t(j - tile.begin));
          const int code = codes[place.anchor];
          const float slope = thread.one(to_float(x[j]), code == place.k, code == kIgnored);
          if (write) g[j] = from_float<T>(slope);
        }
      }
    }
    if constexpr (kOutput != Output::kGradient) {
      const double sum =
          block_sum(weigh(thread.negatives, call.negative_weight) + weigh(thread.positives, call.positive_weight));
      if (threadIdx.x == 0) call.partial[index] = weigh(sum, scale);
    }
  }
}

template <class T, Gamma kGamma, Output kOutput>
void launch_plain(const Call& call, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(plain_kernel<T, kGamma, kOutput>, known, context);
  launch(plain_kernel<T, kGamma, kOutput>, call.levels.tiles < resident ? call.levels.tiles : resident, context, call);
}

template <class T, Gamma kGamma>
void run_plain_gamma(const Call& call, const Context& context) {
  switch (call.output) {
    case Output::kLoss:
      return launch_plain<T, kGamma, Output::kLoss>(call, context);
    case Output::kLossAndGradient:
      return launch_plain<T, kGamma, Output::kLossAndGradient>(call, context);
    default:
      return launch_plain<T, kGamma, Output::kGradient>(call, context);
  }
}

template <class T>
void run_plain(const Call& call, const Context& context) {
  if (call.gamma == 2.0) return run_plain_gamma<T, Gamma::kTwo>(call, context);
  run_plain_gamma<T, Gamma::kAny>(call, context);
}

}  // namespace
}  // namespace fastfocal::cuda
