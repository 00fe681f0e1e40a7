// A tile of soft targets with constant weights: two streams in, one out.
#pragma once

#include "tile_fast.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// Memory as floats: as it is, or expanded to them in a buffer.
template <class T>
inline const float* as_floats(const T* p, int n, float* buffer) {
  if constexpr (sizeof(T) == sizeof(float)) {
    (void)n, (void)buffer;
    return p;
  } else {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(buffer + i, load(p + i));
    if (i < n) store(buffer + i, load_first(p + i, n - i));
    return buffer;
  }
}

// The weights of the two classes, for the losses' sum, and the scale of the gradients beside.
struct DenseWeights {
  float negative, positive, scale;
};

// What is to be prefetched beside a block: this far ahead of it in memory, and the bytes of an element there.
struct Ahead {
  const char* memory;
  int bytes;
  void prefetch(int i) const { __builtin_prefetch(memory + i * bytes); }
  void prefetch_to_write(int i) const { __builtin_prefetch(memory + i * bytes, 1); }
};

// Elements [0, n) of a group, n <= kGroup; grad: null where none is wanted. Returns the weighted losses.
template <class Loss>
Vec dense_group(const Loss& loss_fn, const float* x, const float* target, float* grad, int n, const DenseWeights& weights,
                Ahead ahead_x, Ahead ahead_target) {
  // The sum takes the bare weights, the gradient the scaled ones: a zero scale must not make an infinite loss NaN.
  const Vec negative(weights.negative), positive(weights.positive), scaled(weights.scale);
  alignas(64) float exponential[kGroup];
  if constexpr (Loss::kSoftInSteps) {
    for (int i = 0; i + kLanes <= n; i += kLanes) store(exponential + i, loss_fn.exponential(load(x + i)));
  }
  Vec sum(0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    ahead_x.prefetch(i);
    ahead_target.prefetch(i);
    const Vec y = load(target + i);
    Term<Vec> t;
    if constexpr (Loss::kSoftInSteps) {
      t = loss_fn.soft(load(x + i), y, load(exponential + i));
    } else {
      t = loss_fn.soft(load(x + i), y);
    }
    const Vec w = Loss::soft_weight(y, positive, negative);
    sum = sum + weigh(t.loss, w);
    if (grad != nullptr) store(grad + i, t.grad * (w * scaled));
  }
  if (i < n) {
    const int rest = n - i;
    const Vec y = load_first(target + i, rest);
    const Term<Vec> t = loss_fn.soft(load_first(x + i, rest), y);
    const Vec w = Loss::soft_weight(y, positive, negative);
    sum = sum + zero_where(lanes_from(rest), weigh(t.loss, w));
    if (grad != nullptr) store_first(grad + i, t.grad * (w * scaled), rest);
  }
  return sum;
}

// Y is T, or float beside 16-bit logits. group: dense_group() for the loss.
template <class T, class Y, class Group>
void dense_tile(const KernelParams& params, const Tile& tile, const Group& group, double* partial) {
  const Level& level = params.levels.level[tile.level];
  const int64_t base = tile.image * level.image_logits;
  const T* const x = static_cast<const T*>(level.logits) + base;
  const Y* const target = static_cast<const Y*>(level.soft_targets) + base;
  T* const g = level.out == nullptr ? nullptr : static_cast<T*>(level.out) + base;
  const double scale = scale_of<float>(params, tile.level, tile.image);
  const DenseWeights weights = {float(params.negative_weight), float(params.positive_weight), float(scale)};
  constexpr bool kCopies = sizeof(T) < sizeof(float);
  alignas(64) float logit[kGroup], of_target[kGroup], grad[kGroup];
  Sum sum;
  for (int64_t i = tile.begin; i < tile.end; i += kGroup) {
    const int n = tile.end - i < kGroup ? int(tile.end - i) : kGroup;
    const Ahead ahead_x = {reinterpret_cast<const char*>(x + i) + kPrefetch, sizeof(T)};
    const Ahead ahead_target = {reinterpret_cast<const char*>(target + i) + kPrefetch, sizeof(Y)};
    float* const to = g == nullptr ? nullptr : kCopies ? grad : reinterpret_cast<float*>(g + i);
    sum.add(group(as_floats(x + i, n, logit), as_floats(target + i, n, of_target), to, n, weights, ahead_x, ahead_target));
    if constexpr (kCopies) {
      if (g == nullptr) continue;
      int at = 0;
      for (; at + kLanes <= n; at += kLanes) store(g + i + at, load(grad + at));
      if (at < n) store_first(g + i + at, load(grad + at), n - at);
    }
  }
  if (partial != nullptr) *partial = weigh(total(sum), scale);
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
