// IoU-aware BCE, Cai et al. 2023 (Align-DETR), arXiv:2304.07527, as LW-DETR (arXiv:2406.03459), RF-DETR and SAM 3's detector
// train with it: the positives' target t lies between the prediction and the score.
//
//   negative: p^gamma softplus(x)                                          (focal.h)
//   positive: B(x, t),  t = max(0.01, p^alpha s^(1 - alpha)) a constant for the gradient:  d/dx = p - t     (scored.h)
//     d2/dx2 = p (1 - p), as the derivative of that gradient
//
// log t = alpha log p + (1 - alpha) log s with log p = min(x, 0) - log(1 + e): two terms of one sign, of which no more than
// log(100) is ever taken. Where t is near 1, 1 - t = 1 - exp(log t) is computed as such. 0^0 is 1.
#pragma once

#include "focal.h"
#include "scored.h"

namespace fastfocal {

template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct IouAwareBce : Focal<S, kGamma, false, kAccuracy> {
  using Negative = Focal<S, kGamma, false, kAccuracy>;
  S of_prediction, of_score;  // alpha, 1 - alpha
  S log_of_zero;              // where alpha is 1, a score of 0 is 1 to the power of 0

  static constexpr bool kScores = true;

  IouAwareBce() = default;
  FASTFOCAL_HD explicit IouAwareBce(const LossParams& params)
      : Negative(params.value[1], 0, false),
        of_prediction(S(params.value[0])),
        of_score(S(1 - params.value[0])),
        log_of_zero(params.value[0] < 1 ? S(-kLarge) : S(0)) {}

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score) const {
    return positive(x, score, this->exponential(x));
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return scored_weight(y, positive, negative);
  }
  static constexpr bool kSoftInSteps = true;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    return soft(x, y, this->exponential(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y, V e) const {
    return select_term(is_negative_target(y), this->negative(x, e, this->logarithm(e)), positive(x, y, e));
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V score) const {
    const V e = this->exponential(x);
    return with_variance(positive(x, score, e).grad, e);
  }

 private:
  static constexpr double kLeast = 0.01;  // of t

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score, V e) const {
    const V zero = V(S(0));
    // Not 0 * inf, with alpha 0.
    const V log_p = clamp_min(clamp_max(x, zero), V(S(-kLarge))) - log1p_unit(e);
    V low;
    const V high = log_positive(clamp_min(score, smallest_normal<V>()), &low);
    low = low + (score - score);  // 0, or the NaN that a logarithm loses
    const V log_s = select(score < smallest_normal<V>(), V(log_of_zero), high + low);
    const V y = fused_multiply_add(V(of_prediction), log_p, V(of_score) * log_s);
    const Target<V> target = target_of(exp_nonpositive(clamp_max(y, zero)), y);
    const auto clamped = target.t < V(S(kLeast));
    return soft_cross_entropy(x, select(clamped, V(S(kLeast)), target.t), select(clamped, V(S(1 - kLeast)), target.rest), e);
  }
};

struct IouAwareBceLoss : RegisteredScoredFocal {
  static constexpr LossKind kKind{5};
  static constexpr const char* kName = "iou_aware_bce_loss";
  static constexpr LossParameter kParameters[] = {{"alpha", ParameterRange::kUnit}, {"gamma", ParameterRange::kNonnegative}};
};

}  // namespace fastfocal
