// A tile of soft targets with constant weights: two streams in, one out.
#pragma once

#include "tile_fast.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// Y is T, or float beside 16-bit logits.
template <class T, class Y, class Loss>
void dense_tile(const KernelParams& params, const Tile& tile, const Loss& loss_fn, double* partial) {
  const Level& level = params.levels.level[tile.level];
  const int64_t base = tile.image * level.image_logits;
  const T* x = static_cast<const T*>(level.logits) + base;
  const Y* target = static_cast<const Y*>(level.soft_targets) + base;
  T* g = level.out == nullptr ? nullptr : static_cast<T*>(level.out) + base;
  const double scale = scale_of<float>(params, tile.level, tile.image);
  // The sum takes the bare weights, the gradient the scaled ones: a zero scale must not make an infinite loss NaN.
  const Vec negative(float(params.negative_weight)), positive(float(params.positive_weight));
  const Vec scaled{float(scale)};
  Sum sum;
  alignas(64) float exponential[kGroup];
  int64_t i = tile.begin;
  while (i < tile.end) {
    const int64_t first = i, stop = tile.end - i < kGroup ? tile.end : i + kGroup;
    if constexpr (Loss::kSoftInSteps) {
      for (int64_t at = first; at + kLanes <= stop; at += kLanes)
        store(exponential + (at - first), loss_fn.exponential(load(x + at)));
    }
    Vec part(0.0f);
    for (; i + kLanes <= stop; i += kLanes) {
      __builtin_prefetch(x + i + kPrefetch / int(sizeof(T)));
      __builtin_prefetch(target + i + kPrefetch / int(sizeof(Y)));
      const Vec y = load(target + i);
      Term<Vec> t;
      if constexpr (Loss::kSoftInSteps) {
        t = loss_fn.soft(load(x + i), y, load(exponential + (i - first)));
      } else {
        t = loss_fn.soft(load(x + i), y);
      }
      const Vec w = Loss::soft_weight(y, positive, negative);
      part = part + weigh(t.loss, w);
      if (g != nullptr) store(g + i, t.grad * (w * scaled));
    }
    if (i < stop) {
      const int n = int(stop - i);
      const Vec y = load_first(target + i, n);
      const Term<Vec> t = loss_fn.soft(load_first(x + i, n), y);
      const Vec w = Loss::soft_weight(y, positive, negative);
      float loss[kLanes];
      store(loss, weigh(t.loss, w));
      for (int lane = n; lane < kLanes; ++lane) loss[lane] = 0;
      part = part + load(loss);
      if (g != nullptr) store_first(g + i, t.grad * (w * scaled), n);
      i = stop;
    }
    sum.add(part);
  }
  if (partial != nullptr) *partial = weigh(total(sum), scale);
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
