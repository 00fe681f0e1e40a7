// The CPU kernel for one instruction set: from a Call to the loop for each of its tiles.
// cpu/focal_loss_{avx512,avx2,portable}.cpp each compile this file with their own flags and their own namespace.
#pragma once

#include "focal_tile_general.h"
#include "focal_tile_plain.h"
#include "focal_tile_soft.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// Where the incoming gradient is no part of the tile's scale.
template <class T, class S>
void multiply_finished(const Call& call, const Tile& tile) {
  const double scale = scale_of<S>(call, tile.level, tile.image);
  const S factor = S(factor_of_finished<S>(call, tile.level, tile.image, scale));
  if (factor == S(1)) return;
  const Level& level = call.levels.level[tile.level];
  T* const g = static_cast<T*>(level.out) + tile.image * level.image_logits;
  for (int64_t i = tile.begin; i < tile.end; ++i) {
    const S product = times_incoming<S>(to_float(g[i]), factor);
    if constexpr (sizeof(T) == sizeof(double)) {
      g[i] = product;
    } else {
      g[i] = from_float<T>(product);
    }
  }
}

template <class T, class Formula, Output kOutput>
void plain_tiles(const Call& call, const Formula& formula, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tile_at(call.levels, t);
    const bool wanted = call.levels.level[tile.level].out != nullptr;
    double* partial = kOutput == Output::kGradient ? nullptr : call.partial + t;
    if (kOutput == Output::kGradient && !wanted) continue;
    if (kOutput == Output::kLossAndGradient && !wanted) {
      plain_tile<T, Formula, Output::kLoss>(call, tile, formula, partial);
    } else {
      plain_tile<T, Formula, kOutput>(call, tile, formula, partial);
    }
    if constexpr (kOutput == Output::kGradient) multiply_finished<T, float>(call, tile);
  }
}

template <class T, class Formula>
void plain(const Call& call, int64_t begin, int64_t end) {
  const Formula formula(call.parameters);
  switch (call.output) {
    case Output::kLoss:
      return plain_tiles<T, Formula, Output::kLoss>(call, formula, begin, end);
    case Output::kLossAndGradient:
      return plain_tiles<T, Formula, Output::kLossAndGradient>(call, formula, begin, end);
    default:
      return plain_tiles<T, Formula, Output::kGradient>(call, formula, begin, end);
  }
}

template <class T, class S, class Formula>
void general(const Call& call, int64_t begin, int64_t end) {
  const Formula formula(call.parameters);
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tile_at(call.levels, t);
    const bool sums = call.output == Output::kLoss || call.output == Output::kLossAndGradient;
    double* partial = sums ? call.partial + t : nullptr;
    if (!sums && call.levels.level[tile.level].out == nullptr) continue;
    bool done = false;
    if constexpr (sizeof(S) == sizeof(float)) {
      if (call.soft && has_constant_weights(call)) {
        call.wide_soft_targets ? soft_tile<T, float>(call, tile, formula, partial)
                               : soft_tile<T, T>(call, tile, formula, partial);
        done = true;
      }
    }
    if (!done) general_tile<T, S>(call, tile, formula, partial);
    if (call.output == Output::kGradient) multiply_finished<T, S>(call, tile);
  }
}

template <class T, class S>
void tiles_of(const Call& call, int64_t begin, int64_t end) {
  using Two = FocalLoss<S, Gamma::kTwo, false>;
  using Any = FocalLoss<S, Gamma::kAny, false>;
  using Smooth = FocalLoss<S, Gamma::kAny, true>;
  using Star = FocalLossStar<S>;
  const bool star = call.family == Family::kFocalLossStar, two = call.parameters.gamma == 2.0;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (is_plain(call)) {
      if (star) return plain<T, Star>(call, begin, end);
      return two ? plain<T, Two>(call, begin, end) : plain<T, Any>(call, begin, end);
    }
  }
  if (star) return general<T, S, Star>(call, begin, end);
  if (call.parameters.label_smoothing != 0) return general<T, S, Smooth>(call, begin, end);
  return two ? general<T, S, Two>(call, begin, end) : general<T, S, Any>(call, begin, end);
}

void run_tiles(const Call& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::kFloat32:
      return tiles_of<float, float>(call, begin, end);
    case DType::kFloat16:
      return tiles_of<Half, float>(call, begin, end);
    case DType::kBFloat16:
      return tiles_of<BFloat16, float>(call, begin, end);
    case DType::kFloat64:
      return tiles_of<double, double>(call, begin, end);
  }
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
