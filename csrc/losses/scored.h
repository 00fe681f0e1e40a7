// What the losses share that read an anchor's score s in [0, 1] (an IoU, a quality), which is their positives' target.
//
// Binary cross entropy with a target t in [0, 1], B(x, t) = -t log p - (1 - t) log(1 - p) = softplus(x) - t x. With
//
//   e = exp(-|x|),   r = 1 / (1 + e),   u = x < 0 ? t : 1 - t      the target's distance from the side the logit takes
//
//   B(x, t) = log(1 + e) + |x| u
//   dB/dx   = p - t = x < 0 ? e r - t : (1 - t) - e r = x < 0 ? -(u - e r) : u - e r
//
// Both terms of B are positive: its relative error is that of u, so of t for one half of the logits and of 1 - t for the other.
// A target that is made of a score (its power, say) comes with its own 1 - t for that reason. p - t is 0 where p = t; it is
// exact to a rounding of e r and u, neither of which is more than p (1 - t) + (1 - p) t.
//
// The second derivative is that of the gradient p - t, for which t is a constant, one that is made of p too (IoU-aware BCE):
//
//   d2B/dx2 = p (1 - p) = e r^2
#pragma once

#include "loss.h"

namespace fastfocal {

// What B and its derivative are made of, for the target t and rest = 1 - t.
template <class V>
struct SoftCrossEntropy {
  V ce;        // B(x, t)
  V distance;  // u - e r: p - t, or minus that on the left
  V variance;  // p (1 - p)
  V x;

  FASTFOCAL_HD SoftCrossEntropy(V x_, V t, V rest, V e) : x(x_) {
    const V zero = V(0), r = reciprocal(V(1) + e), er = e * r;
    const V u = select(is_negative(x), t, rest);
    // Not 0 * inf: a target that is met leaves nothing of an infinite logit.
    ce = log1p_unit(e) + select(u < smallest_normal<V>(), zero, zero - minus_absolute(x) * u);
    distance = u - er;
    variance = er * r;
  }

  // `grad` is a derivative for x on the right of 0; on the left it has the other sign.
  FASTFOCAL_HD V signed_by_side(V grad) const { return select(is_negative(x), V(0) - grad, grad); }
};

// B(x, t) and its derivative.
template <class V>
FASTFOCAL_HD Term<V> soft_cross_entropy(V x, V t, V rest, V e) {
  const SoftCrossEntropy<V> parts(x, t, rest, e);
  return {parts.ce, parts.signed_by_side(parts.distance)};
}

// Both derivatives of B(x, t), of which `grad` is the first, and e = exp(-|x|). A target that is NaN leaves its trace in both.
template <class V>
FASTFOCAL_HD Derivatives<V> with_variance(V grad, V e) {
  const V r = reciprocal(V(1) + e);
  return {grad, fused_multiply_add(e * r, r, grad - grad)};
}

// A soft target of 0, or less than any normal number, is a negative's; any other (NaN too) is a positive's score. There is no
// mixture of the two classes: the weight is one or the other's.
template <class V>
FASTFOCAL_HD auto is_negative_target(V y) {
  return y < smallest_normal<V>();
}
template <class V>
FASTFOCAL_HD V scored_weight(V y, V positive, V negative) {
  return select(is_negative_target(y), negative, positive);
}
template <class V, class Mask>
FASTFOCAL_HD Term<V> select_term(Mask mask, Term<V> a, Term<V> b) {
  return {select(mask, a.loss, b.loss), select(mask, a.grad, b.grad)};
}
template <class V, class Mask>
FASTFOCAL_HD Derivatives<V> select_derivatives(Mask mask, Derivatives<V> a, Derivatives<V> b) {
  return {select(mask, a.grad, b.grad), select(mask, a.second, b.second)};
}

// What an infinite product is clamped to that something multiplies which vanishes.
template <class V>
FASTFOCAL_HD V largest_finite() {
  return V(FLT_MAX);
}
template <>
FASTFOCAL_HD double largest_finite<double>() {
  return DBL_MAX;
}

// 1 - exp(y) for y <= 0 (or a rounding above it), to the relative accuracy of y where it is near 0.
FASTFOCAL_HD double one_minus_exp(double y) { return -expm1(y); }
template <class V>
FASTFOCAL_HD V one_minus_exp(V y) {
  // (exp(y) - 1) / y to 2e-9 for y in [-0.36, 0], and exactly 1 for 0
  constexpr float c[] = {1.0f, 0.499999998f, 0.166666375f, 0.0416601609f, 0.0082821965f, 0.001222702f};
  const V near = (V(0) - y) * horner(y, c);
  return select(V(-0.35f) < y, near, V(1) - exp_nonpositive(y));
}

// A power of a score, and one minus that.
template <class V>
struct Target {
  V t, rest;
};
// exp(y) for y = gamma log(s) is taken for t where it is far from 1; near 1 it is 1 - rest, as rest is the more accurate.
template <class V>
FASTFOCAL_HD Target<V> target_of(V exp_of_y, V y) {
  const V rest = one_minus_exp(y);
  return {select(V(-0.35f) < y, V(1) - rest, exp_of_y), rest};
}

// A loss with the focal loss's negative, for registry.h: such losses share their kernels, those of scored_focal.h, where a new one
// has its positive, and the second derivative of that, in a switch.
template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct ScoredFocal;

struct RegisteredScoredFocal : RegisteredLoss {
  static constexpr bool kScores = true;

  template <class S, Path kPath, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams& params, const Use& use) {
    with_exponents<kPath, ScoredFocal<S, Gamma::kTwo, kAccuracy>, ScoredFocal<S, Gamma::kAny, kAccuracy>>(
        ScoredFocal<S, Gamma::kAny>::exponent_of(params) == 2, use);
  }
};

}  // namespace fastfocal
