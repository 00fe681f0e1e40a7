// All losses with the focal loss's negative and a positive that reads a score, as one: which of them is decided at run time.
//
// Their kernels differ in nothing but the rare positives, so they share one for each kind of exponent: four losses compile in the
// time of little more than one. The struct of the positive is made where it is used; that is a dozen operations on a few numbers.
// The structs of the four have no second_soft() of their own: the kernels take this one's.
//
// On a GPU the fast kernels' loop issues as many instructions as the focal loss's (sm_90: 25.0 for bfloat16, 31 for float32), as the
// choice is made in the branch of positives.
#pragma once

#include "iou_aware_bce.h"
#include "matchability_aware.h"
#include "quality_focal.h"
#include "varifocal.h"

namespace fastfocal {

template <class S, Gamma kGamma, Accuracy kAccuracy>
struct ScoredFocal : Focal<S, kGamma, false, kAccuracy> {
  using Negative = Focal<S, kGamma, false, kAccuracy>;
  LossParams params;

  static constexpr bool kScores = true;

  ScoredFocal() = default;
  FASTFOCAL_HD explicit ScoredFocal(const LossParams& params_)
      : Negative(exponent_of(params_), 0, detaches(params_)), params(params_) {}

  // Where the power of the negative is among the numbers of the loss.
  FASTFOCAL_HD static double exponent_of(const LossParams& params) {
    return params.value[params.kind == IouAwareBceLoss::kKind ? 1 : 0];
  }
  FASTFOCAL_HD static bool detaches(const LossParams& params) {
    return params.kind == MatchabilityAwareLoss::kKind || (params.kind == VarifocalLoss::kKind && params.value[2] != 0);
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score) const {
    switch (params.kind) {
      case VarifocalLoss::kKind:
        return Varifocal<S, kGamma, kAccuracy>(params).positive(x, score);
      case QualityFocalLoss::kKind:
        return QualityFocal<S, kGamma, kAccuracy>(params).positive(x, score);
      case MatchabilityAwareLoss::kKind:
        return MatchabilityAware<S, kGamma, kAccuracy>(params).positive(x, score);
      default:
        return IouAwareBce<S, kGamma, kAccuracy>(params).positive(x, score);
    }
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
    return select_term(is_negative_target(y), this->negative(x, e, this->logarithm(e)), positive(x, y));
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V score) const {
    switch (params.kind) {
      case VarifocalLoss::kKind:
        return Varifocal<S, kGamma, kAccuracy>(params).second_positive(x, score);
      case QualityFocalLoss::kKind:
        return QualityFocal<S, kGamma, kAccuracy>(params).second_positive(x, score);
      case MatchabilityAwareLoss::kKind:
        return MatchabilityAware<S, kGamma, kAccuracy>(params).second_positive(x, score);
      default:
        return IouAwareBce<S, kGamma, kAccuracy>(params).second_positive(x, score);
    }
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V x, V y) const {
    return select_derivatives(is_negative_target(y), this->second_negative(x), second_positive(x, y));
  }
};

template <class S, Gamma kGamma, Accuracy kAccuracy>
constexpr bool kHasSecond<ScoredFocal<S, kGamma, kAccuracy>> = true;

}  // namespace fastfocal
