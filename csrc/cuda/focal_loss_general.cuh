// The general kernel: soft targets, weights for each anchor or class, label smoothing, elementwise losses and incoming
// gradients, float64. A thread takes one logit at a time.
#pragma once

#include "../focal_math.h"
#include "../levels.h"
#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class T, class S, class Formula, bool kSoft>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 4) general_kernel(const __grid_constant__ Call call) {
  const Formula formula(call.parameters);
  const bool sums = call.output == Output::kLoss || call.output == Output::kLossAndGradient;
  const int64_t last = first_item(call.levels.tiles, blockIdx.x + 1);
  for (int64_t index = first_item(call.levels.tiles, blockIdx.x); index < last; ++index) {
    const TileWork& work = begin_tile<S>(call, index);
    const Tile tile = work.tile;
    const TileMap map = work.map;
    const Level& level = call.levels.level[tile.level];
    if (!sums && level.out == nullptr) continue;
    const int64_t base = tile.image * level.image_logits;
    const int64_t anchor_base = level.first_anchor + tile.image * level.anchors;
    const S scale = S(work.scale);
    const bool gradient = call.output == Output::kGradient;
    const S finished = gradient ? S(factor_of_finished<S>(call, tile.level, tile.image, work.scale)) : S(1);

    double sum = 0;
    for (int64_t j = tile.begin + threadIdx.x; j < tile.end; j += kThreads) {
      const Place place = map.at(uint32_t(j - tile.begin));
      const int64_t anchor = anchor_base + place.anchor;
      const S x = to_float(static_cast<const T*>(level.logits)[base + j]);
      const S positive = positive_weight<S>(call, place.k), negative = negative_weight<S>(call, place.k);
      S weight = scale;
      if (call.anchor_weight != nullptr) weight *= static_cast<const S*>(call.anchor_weight)[anchor];
      Term<S> t;
      bool ignored = false;
      if constexpr (kSoft) {
        const S y = call.wide_soft_targets ? S(static_cast<const float*>(level.soft_targets)[base + j])
                                           : S(to_float(static_cast<const T*>(level.soft_targets)[base + j]));
        t = formula.soft(x, y);
        weight *= soft_weight(y, positive, negative);
      } else {
        const int code = code_at(call, anchor);
        ignored = code == kIgnored;
        t = code == place.k ? formula.positive(x) : formula.negative(x);
        weight *= code == place.k ? positive : negative;
      }
      const S loss = ignored ? S(0) : weigh(t.loss, weight);
      sum += double(loss);
      if (level.out != nullptr) {
        S slope = t.slope * weight;
        if (ignored) slope = S(0);  // whatever it was multiplied by
        if (call.incoming_elements) {
          const S incoming = to_float(static_cast<const T*>(level.incoming)[base + j]);
          const bool is_finite = fabs(incoming) < S(INFINITY);
          if (!(fabs(slope) <= (is_finite ? S(0) : S(rounds_to_zero<T>())))) slope *= incoming;
        }

        const S y = call.output == Output::kElementLoss ? loss : slope;
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
      if (threadIdx.x == 0) call.partial[index] = total;
    }
  }
}

template <class T, class S, class Formula, bool kSoft>
void launch_general(const Call& call, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(general_kernel<T, S, Formula, kSoft>, known, context);
  launch(general_kernel<T, S, Formula, kSoft>, call.levels.tiles < resident ? call.levels.tiles : resident, context, call);
}

template <class T, class S, class Formula>
void run_formula(const Call& call, const Context& context) {
  call.soft ? launch_general<T, S, Formula, true>(call, context) : launch_general<T, S, Formula, false>(call, context);
}

template <class T, class S>
void run_general(const Call& call, const Context& context) {
  if (call.family == Family::kFocalLossStar) return run_formula<T, S, FocalLossStar<S>>(call, context);
  if (call.parameters.label_smoothing != 0) return run_formula<T, S, FocalLoss<S, Gamma::kAny, true>>(call, context);
  if (sizeof(S) == sizeof(float) && call.parameters.gamma == 2.0)
    return run_formula<T, S, FocalLoss<S, Gamma::kTwo, false>>(call, context);
  run_formula<T, S, FocalLoss<S, Gamma::kAny, false>>(call, context);
}

}  // namespace
}  // namespace fastfocal::cuda
