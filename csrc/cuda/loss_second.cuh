// The second derivative (Output::kSecond). A thread takes one logit at a time.
#pragma once

#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

template <class T, class Loss, bool kSoft>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    second_kernel(const __grid_constant__ KernelParams params) {
  using S = Accumulation<T>;
  const Loss loss_fn(params.loss);
  const int64_t last = first_item(params.levels.tiles, blockIdx.x + 1);
  for (int64_t index = first_item(params.levels.tiles, blockIdx.x); index < last; ++index) {
    const TileWork& work = begin_tile<S>(params, index);
    const Tile tile = work.tile;
    const TileMap map = work.map;
    const Level& level = params.levels.level[tile.level];
    const int64_t base = tile.image * level.image_logits;
    const int64_t anchor_base = level.first_anchor + tile.image * level.anchors;
    const uint8_t* const mask = class_mask_of(params, tile.image);
    const double own = own_scale(params, tile.level, tile.image);
    const S scale = S(work.scale);
    const S finished = S(factor_of_finished<S>(params, tile.level, tile.image, work.scale));

    double sum = 0;
    for (int64_t j = tile.begin + threadIdx.x; j < tile.end; j += kThreads) {
      S along = S(0), element = S(0), second = S(0);
      const Place place = map.at(uint32_t(j - tile.begin));
      const int64_t anchor = anchor_base + place.anchor;
      const int label = kSoft ? kBackground : packed_label_at(params, anchor);
      if (level.direction != nullptr && label != kIgnored &&
          (mask == nullptr || mask[place.k * params.mask_class_stride] != 0)) {
        const S x = to_float(static_cast<const T*>(level.logits)[base + j]);
        const S direction = to_float(static_cast<const T*>(level.direction)[base + j]);
        const S positive = positive_weight<S>(params, place.k), negative = negative_weight<S>(params, place.k);
        S weight = params.anchor_weight != nullptr ? static_cast<const S*>(params.anchor_weight)[anchor] : S(1);
        Derivatives<S> d;
        if constexpr (kSoft) {
          const S y = params.wide_soft_targets ? S(static_cast<const float*>(level.soft_targets)[base + j])
                                               : S(to_float(static_cast<const T*>(level.soft_targets)[base + j]));
          d = loss_fn.second_soft(x, y);
          weight *= Loss::soft_weight(y, positive, negative);
        } else {
          d = label == place.k ? loss_fn.second_positive(x, score_of<S>(params, level, tile.image, place.anchor))
                               : loss_fn.second_negative(x);
          weight *= label == place.k ? positive : negative;
        }
        const S grad = d.grad * weight;
        along = times_incoming(grad, direction);
        element = times_incoming(S(grad * S(own)), direction);
        second = times_incoming(S(d.second * weight * scale), finished);
        if (params.incoming_elements)
          second = times_incoming(second, S(to_float(static_cast<const T*>(level.incoming)[base + j])));
        second = times_incoming(second, direction);
      }
      sum += double(along);
      if (level.out != nullptr) static_cast<T*>(level.out)[base + j] = rounded<T>(second);
      if (level.along != nullptr) static_cast<T*>(level.along)[base + j] = rounded<T>(element);
    }
    if (params.partial != nullptr) {
      const double total = block_sum(sum);
      if (threadIdx.x == 0) params.partial[index] = weigh(total, own);
    }
  }
}

template <class T, class Loss, bool kSoft>
void launch_second(const KernelParams& params, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(second_kernel<T, Loss, kSoft>, known, context);
  launch(second_kernel<T, Loss, kSoft>, params.levels.tiles < resident ? params.levels.tiles : resident, context, params);
}

}  // namespace

template <class T>
void run_second(const KernelParams& params, const Context& context) {
  using S = Accumulation<T>;
  constexpr Path kPath = sizeof(S) == sizeof(float) ? Path::kGeneric : Path::kGenericAnyGamma;
  with_loss<S, kPath>(params.loss, [&](auto loss) {
    using Loss = type_of<decltype(loss)>;
    if constexpr (kHasSecond<Loss>)  // else the operator has refused it
      params.soft ? launch_second<T, Loss, true>(params, context) : launch_second<T, Loss, false>(params, context);
  });
}

}  // namespace fastfocal::cuda
