// A tile of the second derivative: targets and weights are gathered as tile_generic.h does.
#pragma once

#include "tile_generic.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// times_incoming() in vectors.
template <class V>
inline V multiply_unless_zero(V x, V factor) {
  using fastfocal::minus_absolute;
  return select(minus_absolute(x) < V(0.0f), x * factor, x);
}

template <class T, class S, class Loss>
void second_tile(const KernelParams& params, const Tile& tile, const Loss& loss_fn, double* partial) {
  using L = Lanes<S>;
  using V = typename L::V;
  const Level& level = params.levels.level[tile.level];
  const int64_t base = tile.image * level.image_logits;
  T* const out = level.out == nullptr ? nullptr : static_cast<T*>(level.out) + base;
  T* const along = level.along == nullptr ? nullptr : static_cast<T*>(level.along) + base;
  if (partial != nullptr) *partial = 0;
  if (level.direction == nullptr) {
    const auto zero = [&](T* p) {
      if (p != nullptr) memset(static_cast<void*>(p + tile.begin), 0, size_t(tile.end - tile.begin) * sizeof(T));
    };
    zero(out);
    zero(along);
    return;
  }
  if (out == nullptr && along == nullptr && partial == nullptr) return;
  const T* const x = static_cast<const T*>(level.logits) + base;
  const T* const direction = static_cast<const T*>(level.direction) + base;
  const T* const incoming = params.incoming_elements ? static_cast<const T*>(level.incoming) + base : nullptr;
  const T* const soft = static_cast<const T*>(level.soft_targets) + (params.soft && !params.wide_soft_targets ? base : 0);
  const float* const wide = static_cast<const float*>(level.soft_targets) + (params.wide_soft_targets ? base : 0);

  const double own = own_scale(params, tile.level, tile.image), scale = scale_of<S>(params, tile.level, tile.image);
  const V own_factor = V(S(own)), factor = V(S(scale));
  const V finished = V(S(factor_of_finished<S>(params, tile.level, tile.image, scale)));
  const V half = V(S(0.5)), zero = V(S(0));
  const Gather<S> gather(params, tile, S(1));
  Block<S> block;
  typename L::Total sum;
  for (int64_t start = tile.begin; start < tile.end; start += Block<S>::kMost) {
    const int n = tile.end - start < Block<S>::kMost ? int(tile.end - start) : Block<S>::kMost;
    gather(uint32_t(start - tile.begin), n, &block);
    V part = zero;  // of kTogether at the most
    for (int i = 0; i < n; i += L::kCount) {
      const int count = n - i < L::kCount ? n - i : L::kCount;
      const int64_t at = start + i;
      const V v = L::load(x + at, count), toward = L::load(direction + at, count);
      Derivatives<V> d;
      V weight = L::load(block.negative + i);
      if (params.soft) {
        const V y = params.wide_soft_targets ? L::load(wide + at, count) : L::load(soft + at, count);
        d = loss_fn.second_soft(v, y);
        weight = Loss::soft_weight(y, L::load(block.positive + i), weight);
      } else {
        d = loss_fn.second_negative(v);
        if (block.any_positive) {
          const Derivatives<V> yes = loss_fn.second_positive(v, V(S(1)));
          const auto is_positive = half < L::load(block.target + i);
          d.grad = select(is_positive, yes.grad, d.grad);
          d.second = select(is_positive, yes.second, d.second);
          weight = select(is_positive, L::load(block.positive + i), weight);
        }
      }
      const V grad = d.grad * weight;
      V second = multiply_unless_zero(d.second * weight * factor, finished);
      if (incoming != nullptr) second = multiply_unless_zero(second, L::load(incoming + at, count));
      V sum_term = multiply_unless_zero(grad, toward), element = multiply_unless_zero(grad * own_factor, toward);
      second = multiply_unless_zero(second, toward);
      if (!params.soft && block.any_ignored) {
        const auto is_ignored = half < L::load(block.ignored + i);
        sum_term = select(is_ignored, zero, sum_term);
        element = select(is_ignored, zero, element);
        second = select(is_ignored, zero, second);
      }
      part = part + sum_term;
      if ((i / L::kCount + 1) % kTogether == 0 || i + L::kCount >= n) {
        sum.add(part);
        part = zero;
      }
      if (out != nullptr) L::store(out + at, second, count);
      if (along != nullptr) L::store(along + at, element, count);
    }
  }
  if (partial != nullptr) *partial = weigh(sum.value(), own);
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
