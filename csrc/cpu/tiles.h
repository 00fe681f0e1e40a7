// The CPU kernel for one instruction set: from a call's parameters to the loop for each of its tiles.
// isa_{avx512,avx2,portable}.cpp each compile this file with their own flags and their own namespace.
#pragma once

#include "tile_dense.h"
#include "tile_fast.h"
#include "tile_generic.h"
#include "tile_second.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// Where the incoming gradient is no part of the tile's scale.
template <class T>
void multiply_finished(const KernelParams& params, const Tile& tile) {
  using S = Accumulation<T>;
  const double scale = scale_of<S>(params, tile.level, tile.image);
  const S factor = S(factor_of_finished<S>(params, tile.level, tile.image, scale));
  if (factor == S(1)) return;
  const Level& level = params.levels.level[tile.level];
  T* const g = static_cast<T*>(level.out) + tile.image * level.image_logits;
  for (int64_t i = tile.begin; i < tile.end; ++i) g[i] = rounded<T>(times_incoming<S>(to_float(g[i]), factor));
}

template <class T, class Loss, Output kOutput>
void fast_tiles(const KernelParams& params, const Loss& loss_fn, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tile_at(params.levels, t);
    const bool wanted = params.levels.level[tile.level].out != nullptr;
    double* partial = kOutput == Output::kGradient ? nullptr : params.partial + t;
    if (kOutput == Output::kGradient && !wanted) continue;
    if (kOutput == Output::kLossAndGradient && !wanted) {
      fast_tile<T, Loss, Output::kLoss>(params, tile, loss_fn, partial);
    } else {
      fast_tile<T, Loss, kOutput>(params, tile, loss_fn, partial);
    }
    if constexpr (kOutput == Output::kGradient) multiply_finished<T>(params, tile);
  }
}

template <class T, class Loss>
void run_fast(const KernelParams& params, int64_t begin, int64_t end) {
  const Loss loss_fn(params.loss);
  switch (params.output) {
    case Output::kLoss:
      return fast_tiles<T, Loss, Output::kLoss>(params, loss_fn, begin, end);
    case Output::kLossAndGradient:
      return fast_tiles<T, Loss, Output::kLossAndGradient>(params, loss_fn, begin, end);
    default:
      return fast_tiles<T, Loss, Output::kGradient>(params, loss_fn, begin, end);
  }
}

template <class T, class Loss>
void run_generic(const KernelParams& params, int64_t begin, int64_t end) {
  using S = Accumulation<T>;
  const Loss loss_fn(params.loss);
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tile_at(params.levels, t);
    const bool sums = params.output == Output::kLoss || params.output == Output::kLossAndGradient;
    double* partial = sums ? params.partial + t : nullptr;
    if (!sums && params.levels.level[tile.level].out == nullptr) continue;
    bool done = false;
    if constexpr (sizeof(S) == sizeof(float)) {
      if (params.soft && has_constant_weights(params)) {
        params.wide_soft_targets ? dense_tile<T, float>(params, tile, loss_fn, partial)
                                 : dense_tile<T, T>(params, tile, loss_fn, partial);
        done = true;
      }
    }
    if (!done) generic_tile<T, S>(params, tile, loss_fn, partial);
    if (params.output == Output::kGradient) multiply_finished<T>(params, tile);
  }
}

template <class T, class Loss>
void run_second(const KernelParams& params, int64_t begin, int64_t end) {
  if constexpr (Loss::kSecond) {  // else the operator has refused it
    const Loss loss_fn(params.loss);
    for (int64_t t = begin; t < end; ++t)
      second_tile<T, Accumulation<T>>(params, tile_at(params.levels, t), loss_fn,
                                      params.partial == nullptr ? nullptr : params.partial + t);
  }
}

void run_tiles(const KernelParams& params, int64_t begin, int64_t end) {
  with_dtype(params.dtype, [&](auto logit) {
    using T = type_of<decltype(logit)>;
    using S = Accumulation<T>;
    if (params.output == Output::kSecond)
      return with_loss<S, Path::kGeneric>(params.loss,
                                          [&](auto loss) { run_second<T, type_of<decltype(loss)>>(params, begin, end); });
    if constexpr (sizeof(S) == sizeof(float)) {
      if (is_fast(params)) {
        return with_loss<S, Path::kFast>(params.loss,
                                         [&](auto loss) { run_fast<T, type_of<decltype(loss)>>(params, begin, end); });
      }
    }
    with_loss<S, Path::kGeneric>(params.loss,
                                 [&](auto loss) { run_generic<T, type_of<decltype(loss)>>(params, begin, end); });
  });
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
