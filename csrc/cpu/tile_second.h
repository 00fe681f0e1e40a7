// A tile of the second derivative: targets and weights are gathered as for tile_generic.h.
#pragma once

#include "tile_generic.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

template <class S>
struct SecondBlock {
  Block<S> block;  // its `out` is that of the second derivative
  const S* direction;
  S* along;           // null: not wanted
  S scale, finished;  // what second derivatives are multiplied by: see scale_of() and factor_of_finished(),
  S own;              // and gradients
};

// times_incoming() in vectors.
template <class V>
inline V multiply_unless_zero(V x, V factor) {
  using fastfocal::minus_absolute;
  return select(minus_absolute(x) < V(0.0f), x * factor, x);
}

// Elements [0, n) of a block, whatever the dtype in memory is.
template <class S, class Loss>
void second_block(const Loss& loss_fn, const KernelParams& params, const SecondBlock<S>& second, int n,
                  typename Lanes<S>::Total* sum) {
  using L = Lanes<S>;
  using V = typename L::V;
  const Block<S>& block = second.block;
  const V scale = V(second.scale), finished = V(second.finished), own = V(second.own);
  const V half = V(S(0.5)), zero = V(S(0));
  V part = zero;  // of kTogether at the most
  for (int i = 0; i < n; i += L::kCount) {
    const int count = n - i < L::kCount ? n - i : L::kCount;
    const V x = L::load(block.logits + i, count), direction = L::load(second.direction + i, count);
    V weight = L::load(block.negative + i);
    Derivatives<V> d;
    if (params.soft) {
      const V y = L::load(block.soft_targets + i, count);
      d = loss_fn.second_soft(x, y);
      weight = Loss::soft_weight(y, L::load(block.positive + i), weight);
    } else {
      d = loss_fn.second_negative(x);
      if (block.any_positive) {
        const Derivatives<V> yes = loss_fn.second_positive(x, Loss::kScores ? L::load(block.score + i) : V(S(1)));
        const auto is_positive = half < L::load(block.target + i);
        d.grad = select(is_positive, yes.grad, d.grad);
        d.second = select(is_positive, yes.second, d.second);
        weight = select(is_positive, L::load(block.positive + i), weight);
      }
    }
    const V grad = d.grad * weight;
    V added = multiply_unless_zero(grad, direction), along = multiply_unless_zero(grad * own, direction);
    V out = multiply_unless_zero(d.second * weight * scale, finished);
    if (block.incoming != nullptr) out = multiply_unless_zero(out, L::load(block.incoming + i, count));
    out = multiply_unless_zero(out, direction);
    if (block.any_ignored) {
      const auto is_ignored = half < L::load(block.ignored + i);
      added = select(is_ignored, zero, added);
      along = select(is_ignored, zero, along);
      out = select(is_ignored, zero, out);
    }
    part = part + added;
    if ((i / L::kCount + 1) % kTogether == 0 || i + L::kCount >= n) {
      sum->add(part);
      part = zero;
    }
    if (block.out != nullptr) L::store(block.out + i, out, count);
    if (second.along != nullptr) L::store(second.along + i, along, count);
  }
}

// run: second_block() for the loss.
template <class T, class Run>
void second_tile(const KernelParams& params, const Tile& tile, const Run& run, double* partial) {
  using S = Accumulation<T>;
  using L = Lanes<S>;
  constexpr int kMost = Block<S>::kMost;
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
  const S* const wide = static_cast<const S*>(level.soft_targets) + (params.wide_soft_targets ? base : 0);

  const double own = own_scale(params, tile.level, tile.image), scale = scale_of<S>(params, tile.level, tile.image);
  // The sum takes the bare weights: a zero scale must not make an infinite product NaN.
  const Gather<S> gather(params, tile, S(1));
  SecondBlock<S> second;
  second.scale = S(scale);
  second.finished = S(factor_of_finished<S>(params, tile.level, tile.image, scale));
  second.own = S(own);
  Block<S>& block = second.block;
  alignas(64) S copies[6][sizeof(T) == sizeof(S) ? 1 : kMost];
  // Numbers of 16 bits are read and written by way of copies.
  const auto read = [&](const T* p, int n, S* copy) -> const S* {
    if constexpr (sizeof(T) == sizeof(double)) {
      (void)n, (void)copy;
      return p;
    } else {
      return as_floats(p, n, copy);
    }
  };
  const auto to_write = [&](T* p, S* copy) -> S* {
    if constexpr (sizeof(T) == sizeof(S)) {
      (void)copy;
      return p;
    } else {
      return copy;
    }
  };
  const auto written = [&](T* p, const S* copy, int n) {
    if constexpr (sizeof(T) != sizeof(S)) {
      for (int i = 0; i < n; i += L::kCount) L::store(p + i, L::load(copy + i), n - i < L::kCount ? n - i : L::kCount);
    }
  };
  typename L::Total sum;
  for (int64_t start = tile.begin; start < tile.end; start += kMost) {
    const int n = tile.end - start < kMost ? int(tile.end - start) : kMost;
    gather(uint32_t(start - tile.begin), n, &block);
    block.logits = read(x + start, n, copies[0]);
    second.direction = read(direction + start, n, copies[1]);
    block.incoming = incoming == nullptr ? nullptr : read(incoming + start, n, copies[2]);
    if (params.soft) block.soft_targets = params.wide_soft_targets ? wide + start : read(soft + start, n, copies[3]);
    block.out = out == nullptr ? nullptr : to_write(out + start, copies[4]);
    second.along = along == nullptr ? nullptr : to_write(along + start, copies[5]);
    for (int at = 0; at < n * int(sizeof(T)); at += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + start) + kPrefetch + at);
      __builtin_prefetch(reinterpret_cast<const char*>(direction + start) + kPrefetch + at);
    }
    run(params, second, n, &sum);
    if (out != nullptr) written(out + start, copies[4], n);
    if (along != nullptr) written(along + start, copies[5], n);
  }
  if (partial != nullptr) *partial = weigh(sum.value(), own);
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
