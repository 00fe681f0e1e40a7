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
// The second derivative, with v = p (1 - p), as (w^beta)' = beta w^beta v / d and d' = v, v' = v (1 - 2 p):
//
//     d2/dx2 = w^beta [(1 + 2 beta) v + beta (v / w) B ((beta - 1) v / w + sign(p - s) (1 - 2 p))]
//            = 5 d^2 v + 2 v B (v + d (1 - 2 p))                                            for beta = 2, p = s included
//
// Terms have either sign, 1 - 2 p as well, which is the difference of 1 - p and p. Where w is less than any normal number and beta
// is neither 0 nor 2, all of it counts as 0: that is the limit for beta > 2; for beta = 1 the two sides' limits differ, and for
// others below 2 they are infinite.
//
// QualityFocalActivated takes p itself, which a head that multiplies two sigmoids has (TOOD, arXiv:2108.07755). With
// L(v) = -max(log v, -100), as torch's binary_cross_entropy has it, and its derivatives:
//
//   B(p, s) = s L(p) + (1 - s) L(1 - p)       dB/dp = (p - s) / max(p (1 - p), 1e-12)
//   d/dp    = w^beta [dB/dp + beta sign(p - s) B / w]
//   d2B/dp2 = (s (1 - p)^2 + (1 - s) p^2) J^2,   J = 1 / ((p + 1e-12) (1 - p + 1e-12))
//   d2/dp2  = w^beta [d2B/dp2 + beta (J + 1 / max(p (1 - p), 1e-12)) + beta (beta - 1) B / w^2]
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

// The second derivative of the same, for slope = distance * steepness, where `curve` is the derivative of the slope, and `turn` the
// variance's logarithm's: 1 - 2 p with the sign that `distance` has, or 0. Both forms of the comment above, whatever kGamma is.
template <class S, class V>
FASTFOCAL_HD V second_modulated(const Multiple<S>& beta, V distance, V f, V steepness, V curve, V variance, V turn) {
  const V zero = V(S(0)), least = smallest_normal<V>();
  // Where a cross entropy is more than this, its variance is 0.
  f = clamp_max(f, V(S(1e3)));
  if (beta.gamma == S(2)) {
    const V rest = variance * f;
    const V bent = rest * fused_multiply_add(distance, turn, variance);
    return fused_multiply_add(distance * distance, fused_multiply_add(V(S(4)) * variance, steepness, curve), bent + bent);
  }
  const V minus_w = minus_absolute(distance), w = clamp_min(zero - minus_w, least);
  V low;
  const V high = log_positive(w, &low);
  const auto met = zero - least < minus_w;
  const V power = select(met, V(S(beta.gamma > S(0) ? 0 : 1)), exp_of_multiple(beta, high, zero - low));
  // Each product in an order in which neither the power nor what it multiplies makes a NaN of the other: of a beta that is huge,
  // and of a distance near 0.
  const V ratio = variance * reciprocal(w), f_ratio = f * ratio;
  const V growth = (power * ratio) * V(beta.gamma);
  const V turned = f * select(is_negative(distance), zero - turn, turn);
  const V bent = clamp_max(fused_multiply_add(f_ratio, V(beta.gamma - S(1)), turned), largest_finite<V>());
  const V flat = fused_multiply_add(power * V(beta.gamma + beta.gamma), variance * steepness, power * curve);
  return clamp_min(clamp_max(fused_multiply_add(growth, bent, flat), largest_finite<V>()), zero - largest_finite<V>());
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

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V score) const {
    const V one = V(S(1)), e = this->exponential(x), r = reciprocal(one + e);
    const SoftCrossEntropy<V> parts(x, score, one - score, e);
    const V turn = e * r - r;  // on the left the distance has the other sign, and so has 1 - 2 p
    return {soft(x, score, e).grad,
            second_modulated(of_distance, parts.distance, parts.ce, one, parts.variance, parts.variance, turn)};
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

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_negative(V p) const {
    return second_positive(p, V(S(0)));
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V p_, V score) const {
    const V p = unit(p_), one = V(S(1)), rest = one - p, eps = V(S(1e-12));
    const V inverse = reciprocal(p + eps) * reciprocal(rest + eps);
    const V a = rest * inverse, b = p * inverse;
    const V curve = fused_multiply_add(score * a, a, ((one - score) * b) * b);
    const V f = fused_multiply_add(score, minus_log_of(p), (one - score) * minus_log_of_rest(p));
    const V steepness = V(S(0.5)) * (inverse + inverse_variance(p));
    return {positive(p_, score).grad, second_modulated(multiple, p - score, f, steepness, curve, one, V(S(0)))};
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V p, V y) const {
    return second_positive(p, y);
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

template <class S, Gamma kGamma, Accuracy kAccuracy>
constexpr bool kHasSecond<QualityFocalActivated<S, kGamma, kAccuracy>> = true;

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
