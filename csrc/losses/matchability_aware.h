// Matchability-aware loss, Huang et al. 2025 (DEIM), arXiv:2412.04234: the score's power is the positives' target.
//
//   negative: p^gamma softplus(x), its p^gamma a constant for the gradient (focal.h); a weight of negatives stays outside
//   positive: B(x, s^gamma),  d/dx = p - s^gamma                           (scored.h)
//     d2/dx2 = p (1 - p)
//
// s^gamma = exp(gamma log s). For a score near 1 it is 1 less little, and B of a large logit is |x| times that little:
// 1 - s^gamma = 1 - exp(gamma log s) is computed as such. 0^gamma is 0, for gamma = 0 it is 1.
#pragma once

#include "focal.h"
#include "scored.h"

namespace fastfocal {

template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct MatchabilityAware : Focal<S, kGamma, false, kAccuracy> {
  using Negative = Focal<S, kGamma, false, kAccuracy>;
  S exponent;  // gamma

  static constexpr bool kScores = true;

  MatchabilityAware() = default;
  FASTFOCAL_HD explicit MatchabilityAware(const LossParams& params)
      : Negative(params.value[0], 0, true), exponent(S(clamp_max(params.value[0], 1e30))) {}

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
  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score, V e) const {
    const V one = V(S(1));
    if constexpr (kGamma == Gamma::kTwo) {
      return soft_cross_entropy(x, score * score, (one - score) * (one + score), e);
    } else {
      V low;
      const V high = log_positive(clamp_min(score, smallest_normal<V>()), &low);
      low = low + (score - score);  // 0, or the NaN that a logarithm loses
      const auto is_zero = score < smallest_normal<V>();
      const V y = V(exponent) * (high + low);
      const Target<V> target = target_of(exp_of_multiple(this->multiple, high, V(S(0)) - low), y);
      const V of_zero = V(S(exponent > S(0) ? 0 : 1));
      return soft_cross_entropy(x, select(is_zero, of_zero, target.t), select(is_zero, one - of_zero, target.rest), e);
    }
  }
};

struct MatchabilityAwareLoss : RegisteredScoredFocal {
  static constexpr LossKind kKind{4};
  static constexpr const char* kName = "matchability_aware_loss";
  static constexpr LossParameter kParameters[] = {{"gamma", ParameterRange::kNonnegative}};
};

}  // namespace fastfocal
