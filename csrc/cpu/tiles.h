// The CPU kernel for one instruction set: from a call's parameters to the loop for each of its tiles.
// isa_{avx512,avx2,portable}.cpp each compile this file with their own flags and their own namespace.
#pragma once

#include "tile_dense.h"
#include "tile_fast.h"
#include "tile_generic.h"
#include "tile_second.h"
#include "tile_softmax.h"

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

// The loops of one loss that are the same for every dtype in memory, for calls without fast kernels. Behind virtual functions, a call
// for hundreds of elements, so that they are compiled once for each loss and not for each dtype as well.
template <class S>
struct BlockLoss {
  virtual void generic(const KernelParams& params, Block<S>* block, int n, S least, typename Lanes<S>::Total* sum) const = 0;
  virtual void second(const KernelParams& params, const SecondBlock<S>& block, int n,
                      typename Lanes<S>::Total* sum) const = 0;
  virtual Vec dense(const float* x, const float* target, float* grad, int n, const DenseWeights& weights, Ahead ahead_x,
                    Ahead ahead_target) const = 0;
};
template <class S, class Loss>
struct BlockLossOf final : BlockLoss<S> {
  const Loss loss_fn;
  explicit BlockLossOf(const LossParams& params) : loss_fn(params) {}
  void generic(const KernelParams& params, Block<S>* block, int n, S least, typename Lanes<S>::Total* sum) const override {
    generic_block(loss_fn, params, block, n, least, sum);
  }
  void second(const KernelParams& params, const SecondBlock<S>& block, int n, typename Lanes<S>::Total* sum) const override {
    if constexpr (kHasSecond<Loss>) second_block(loss_fn, params, block, n, sum);  // else the operator has refused it
  }
  Vec dense(const float* x, const float* target, float* grad, int n, const DenseWeights& weights, Ahead ahead_x,
            Ahead ahead_target) const override {
    if constexpr (sizeof(S) == sizeof(float)) {
      return dense_group(loss_fn, x, target, grad, n, weights, ahead_x, ahead_target);
    } else {
      return Vec(0.0f);  // never called: no vectors of doubles
    }
  }
};

template <class T>
void run_generic(const KernelParams& params, const BlockLoss<Accumulation<T>>& loss, int64_t begin, int64_t end) {
  const auto generic = [&](auto... arguments) { loss.generic(arguments...); };
  const auto dense = [&](auto... arguments) { return loss.dense(arguments...); };
  const auto second = [&](const auto&... arguments) { loss.second(arguments...); };
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tile_at(params.levels, t);
    if (params.output == Output::kSecond) {
      second_tile<T>(params, tile, second, params.partial == nullptr ? nullptr : params.partial + t);
      continue;
    }
    const bool sums = params.output == Output::kLoss || params.output == Output::kLossAndGradient;
    double* partial = sums ? params.partial + t : nullptr;
    if (!sums && params.levels.level[tile.level].out == nullptr) continue;
    bool done = false;
    if constexpr (sizeof(T) < sizeof(double)) {
      if (params.soft && has_constant_weights(params)) {
        params.wide_soft_targets ? dense_tile<T, float>(params, tile, dense, partial)
                                 : dense_tile<T, T>(params, tile, dense, partial);
        done = true;
      }
    }
    if (!done) generic_tile<T>(params, tile, generic, partial);
    if (params.output == Output::kGradient) multiply_finished<T>(params, tile);
  }
}

// Logits of 16 or 32 bits.
void run_generic_floats(const KernelParams& params, const BlockLoss<float>& loss, int64_t begin, int64_t end) {
  with_dtype(params.dtype, [&](auto logit) {
    using T = type_of<decltype(logit)>;
    if constexpr (sizeof(T) < sizeof(double)) run_generic<T>(params, loss, begin, end);
  });
}

void run_tiles(const KernelParams& params, int64_t begin, int64_t end) {
  if (takes_anchors(params.loss.kind)) {
    return with_dtype(params.dtype, [&](auto logit) {
      using T = type_of<decltype(logit)>;
      with_anchor_loss<Accumulation<T>>(params.loss, [&](auto loss) {
        using Loss = type_of<decltype(loss)>;
        params.class_mask == nullptr ? softmax_tiles<T, Loss, false>(params, begin, end)
                                     : softmax_tiles<T, Loss, true>(params, begin, end);
      });
    });
  }
  if (is_fast(params)) {
    return with_loss<float, Path::kFast>(params.loss, [&](auto loss) {
      with_dtype(params.dtype, [&](auto logit) {
        using T = type_of<decltype(logit)>;
        if constexpr (sizeof(T) < sizeof(double)) run_fast<T, type_of<decltype(loss)>>(params, begin, end);
      });
    });
  }
  if (params.dtype == DType::kFloat64) {
    return with_loss<double, Path::kGeneric>(params.loss, [&](auto loss) {
      run_generic<double>(params, BlockLossOf<double, type_of<decltype(loss)>>(params.loss), begin, end);
    });
  }
  with_loss<float, Path::kGeneric>(params.loss, [&](auto loss) {
    run_generic_floats(params, BlockLossOf<float, type_of<decltype(loss)>>(params.loss), begin, end);
  });
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
