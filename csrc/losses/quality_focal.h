// Quality focal loss, Li et al. 2020 (GFL), arXiv:2006.04388: cross entropy with a score, modulated by the distance to it.
// GFL, GFLv2, RTMDet, DDQ.
//
//   negative: p^beta softplus(x)                                           (focal.h)
//   positive: w^beta B(x, s),  w = |p - s|                                 (scored.h)
//     d/dx  = w^beta [(p - s) + beta sign(p - s) p (1 - p) B / w]
//
// A score of 0 makes the positive a negative. p - s is the d of scored.h, 0 where p = s, and so is w: for beta = 2,
// w^2 = d^2 and d/dx = d (d^2 + 2 p (1 - p) B); for any other, w^beta = exp(beta log w). Where w is less than any normal number
// the derivative is 0, as at the least of |d|^beta; for beta < 1 it grows without bound on both sides of that.
//
// QualityFocalActivated takes p itself, which a head that multiplies two sigmoids has (TOOD, arXiv:2108.07755). With
// L(v) = -max(log v, -100), as torch's binary_cross_entropy has it:
//
//   B(p, s) = s L(p) + (1 - s) L(1 - p)       dB/dp = (p - s) / max(p (1 - p), 1e-12)
//   d/dp    = w^beta [dB/dp + beta sign(p - s) B / w]
//
// 1 - p, rounded to v, has lost (1 - v) - p, which is exact: log(1 - p) = log(v) + ((1 - v) - p) / v, in which log(v) is exact
// to a rounding of itself. p outside of [0, 1] counts as the nearer end.
#pragma once

#include "focal.h"
#include "scored.h"

namespace fastfocal {

// w^beta f and its derivative, where w is the distance but for its sign: `slope` is the derivative of f, and `variance`, 1 or
// p (1 - p), that of the distance.
template <Gamma kGamma, class S, class V>
FASTFOCAL_HD Term<V> modulated(const Multiple<S>& beta, V distance, V f, V slope, V variance) {
  const V zero = V(S(0)), least = smallest_normal<V>();
  const V bend = variance * clamp_max(f, V(S(kLarge)));
  if constexpr (kGamma == Gamma::kTwo) {
    const V power = distance * distance;
    const V loss = power * select(power < least, clamp_max(f, V(S(kLarge))), f);
    return {loss, distance * fused_multiply_add(distance, slope, bend + bend)};
  } else {
    const V w = zero - minus_absolute(distance), w_normal = clamp_min(w, least);
    V low;
    const V high = log_positive(w_normal, &low);
    const V power_of_zero = V(S(beta.gamma > S(0) ? 0 : 1));
    const V power = select(w < least, power_of_zero, exp_of_multiple(beta, high, zero - low));
    const V loss = power * select(power < least, clamp_max(f, V(S(kLarge))), f);
    const V steep = clamp_max(V(beta.gamma) * (bend * reciprocal(w_normal)), largest_finite<V>());
    const V signed_steep = select(is_negative(distance), zero - steep, steep);
    return {loss, power * select(w < least, zero, slope + signed_steep)};
  }
}

template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct QualityFocal : Focal<S, kGamma, false, kAccuracy> {
  using Negative = Focal<S, kGamma, false, kAccuracy>;
  Multiple<S> of_distance;  // its power, with kAny

  static constexpr bool kScores = true;

  QualityFocal() = default;
  FASTFOCAL_HD explicit QualityFocal(const LossParams& params)
      : Negative(params.value[0], 0, false), of_distance(params.value[0]) {}

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score) const {
    return soft(x, score, this->exponential(x));
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
    const SoftCrossEntropy<V> parts(x, y, V(S(1)) - y, e);
    const Term<V> t = modulated<kGamma>(of_distance, parts.distance, parts.ce, parts.distance, parts.variance);
    return {t.loss, parts.signed_by_side(t.grad)};
  }
};

template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct QualityFocalActivated {
  Multiple<S> multiple;

  static constexpr bool kScores = true;

  QualityFocalActivated() = default;
  FASTFOCAL_HD explicit QualityFocalActivated(const LossParams& params) : multiple(params.value[0]) {}

  template <class V>
  FASTFOCAL_HD Term<V> negative(V p) const {
    return negative(p, exponential(p), p);
  }
  // The step that takes longest: -log(1 - p).
  static constexpr bool kLogarithm = false;
  template <class V>
  FASTFOCAL_HD V exponential(V p) const {
    return minus_log_of_rest(unit(p));
  }
  template <class V>
  FASTFOCAL_HD Term<V> negative(V p_, V minus_log, V) const {
    const V p = unit(p_);
    return modulated<kGamma>(multiple, p, minus_log, p * inverse_variance(p), V(S(1)));
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V p_, V score) const {
    const V p = unit(p_), one = V(S(1)), distance = p - score;
    const V f = fused_multiply_add(score, minus_log_of(p), (one - score) * minus_log_of_rest(p));
    return modulated<kGamma>(multiple, distance, f, distance * inverse_variance(p), one);
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return scored_weight(y, positive, negative);
  }
  static constexpr bool kSoftInSteps = false;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V p, V y) const {  // a positive with score 0 is the negative
    return positive(p, y);
  }

 private:
  template <class V>
  FASTFOCAL_HD static V unit(V p) {
    return clamp_max(clamp_min(p, V(S(0))), V(S(1)));
  }
  template <class V>
  FASTFOCAL_HD static V inverse_variance(V p) {
    return reciprocal(clamp_min(p * (V(S(1)) - p), V(S(1e-12))));
  }
  // -max(log w, -100); a w below the least normal number counts as 0.
  template <class V>
  FASTFOCAL_HD static V minus_log_of(V w) {
    V low;
    const V high = log_positive(clamp_min(w, smallest_normal<V>()), &low);
    return select(w < smallest_normal<V>(), V(S(100)), clamp_max(V(S(0)) - (high + low), V(S(100))));
  }
  template <class V>
  FASTFOCAL_HD static V minus_log_of_rest(V p) {
    const V one = V(S(1)), rest = one - p, lost = (one - rest) - p;
    return minus_log_of(rest) - lost * reciprocal(clamp_min(rest, smallest_normal<V>()));
  }
};

// Of probabilities it has generic kernels alone, and none for the usual exponent.
struct QualityFocalLoss : RegisteredScoredFocal {
  static constexpr LossKind kKind{3};
  static constexpr const char* kName = "quality_focal_loss";
  static constexpr LossParameter kParameters[] = {{"beta", ParameterRange::kNonnegative},
                                                  {"activated", ParameterRange::kFlag}};

  FASTFOCAL_HD static bool has_fast_kernel(const LossParams& params) { return params.value[1] == 0; }

  template <class S, Path kPath, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams& params, const Use& use) {
    if constexpr (kPath != Path::kFast) {
      if (params.value[1] != 0) return use(Type<QualityFocalActivated<S, Gamma::kAny, kAccuracy>>());
    }
    RegisteredScoredFocal::with_formula<S, kPath, kAccuracy>(params, use);
  }
};

}  // namespace fastfocal
