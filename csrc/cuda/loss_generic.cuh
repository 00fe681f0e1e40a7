// The generic kernel: soft targets, weights for each anchor or class, class masks, label smoothing, elementwise losses and
// incoming gradients, float64, and losses without a fast kernel. A thread takes one logit at a time.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class T, class Loss, bool kSoft>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    generic_kernel(const __grid_constant__ KernelParams params) {
  using S = Accumulation<T>;
  const Loss loss_fn(params.loss);
  const bool sums = params.output == Output::kLoss || params.output == Output::kLossAndGradient;
  const int64_t last = first_item(params.levels.tiles, blockIdx.x + 1);
  for (int64_t index = first_item(params.levels.tiles, blockIdx.x); index < last; ++index) {
    const TileWork& work = begin_tile<S>(params, index);
    const Tile tile = work.tile;
    const TileMap map = work.map;
    const Level& level = params.levels.level[tile.level];
    if (!sums && level.out == nullptr) continue;
    const int64_t base = tile.image * level.image_logits;
    const int64_t anchor_base = level.first_anchor + tile.image * level.anchors;
    const S scale = S(work.scale);
    const uint8_t* const mask = class_mask_of(params, tile.image);
    const bool gradient = params.output == Output::kGradient;
    const S finished = gradient ? S(factor_of_finished<S>(params, tile.level, tile.image, work.scale)) : S(1);

    double sum = 0;
    for (int64_t j = tile.begin + threadIdx.x; j < tile.end; j += kThreads) {
      const Place place = map.at(uint32_t(j - tile.begin));
      const int64_t anchor = anchor_base + place.anchor;
      const S x = to_float(static_cast<const T*>(level.logits)[base + j]);
      const S positive = positive_weight<S>(params, place.k), negative = negative_weight<S>(params, place.k);
      S weight = scale;
      if (params.anchor_weight != nullptr) weight *= static_cast<const S*>(params.anchor_weight)[anchor];
      Term<S> t;
      bool ignored = mask != nullptr && mask[place.k * params.mask_class_stride] == 0;
      if constexpr (kSoft) {
        const S y = params.wide_soft_targets ? S(static_cast<const float*>(level.soft_targets)[base + j])
                                             : S(to_float(static_cast<const T*>(level.soft_targets)[base + j]));
        t = loss_fn.soft(x, y);
        weight *= Loss::soft_weight(y, positive, negative);
      } else {
        const int label = packed_label_at(params, anchor);
        ignored |= label == kIgnored;
        t = label == place.k
                ? loss_fn.positive(x, Loss::kScores ? score_of<S>(params, level, tile.image, place.anchor) : S(1))
                : loss_fn.negative(x);
        weight *= label == place.k ? positive : negative;
      }
      const S loss = ignored ? S(0) : weigh(t.loss, weight);
      sum += double(loss);
      if (level.out != nullptr) {
        S grad = t.grad * weight;
        if (ignored) grad = S(0);  // whatever it was multiplied by
        if (params.incoming_elements) {
          const S incoming = to_float(static_cast<const T*>(level.incoming)[base + j]);
          const bool is_finite = fabs(incoming) < S(INFINITY);
          if (!(fabs(grad) <= (is_finite ? S(0) : S(rounds_to_zero<T>())))) grad *= incoming;
        }

        const S y = params.output == Output::kElementLoss ? loss : grad;
        T* const out = static_cast<T*>(level.out) + base + j;
        if constexpr (sizeof(T) == sizeof(double)) {
          *out = finished == S(1) ? y : times_incoming<S>(y, finished);
        } else {
          *out = from_float<T>(y);
          if (finished != S(1)) *out = from_float<T>(times_incoming<S>(to_float(*out), finished));
        }
      }
    }
    if (sums) {
      const double total = block_sum(sum);
      if (threadIdx.x == 0) params.partial[index] = total;
    }
  }
}

template <class T, class Loss, bool kSoft>
void launch_generic(const KernelParams& params, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(generic_kernel<T, Loss, kSoft>, known, context);
  launch(generic_kernel<T, Loss, kSoft>, params.levels.tiles < resident ? params.levels.tiles : resident, context, params);
}

}  // namespace

template <class T>
void run_generic(const KernelParams& params, const Context& context) {
  using S = Accumulation<T>;
  constexpr Path kPath = sizeof(S) == sizeof(float) ? Path::kGeneric : Path::kGenericAnyGamma;
  with_loss<S, kPath>(params.loss, [&](auto loss) {
    using Loss = type_of<decltype(loss)>;
    params.soft ? launch_generic<T, Loss, true>(params, context) : launch_generic<T, Loss, false>(params, context);
  });
}

}  // namespace fastfocal::cuda
