// Focal loss star, Lin et al. 2017, appendix B (arXiv:1708.02002): a softplus, shifted and scaled.
//
//   FL*(x_t) = -log sigmoid(gamma x_t + beta) / gamma,   x_t = x (2 y - 1),   gamma > 0
//            = log(1 + e^z) / gamma,                     z = -(gamma x_t + beta)
//   d/dx     = (1 - 2 y) sigmoid(z)
//   d2/dx2   = (1 - 2 y)^2 gamma sigmoid(z) (1 - sigmoid(z))
#pragma once

#include "loss.h"

namespace fastfocal {

template <class S, Accuracy kAccuracy = Accuracy::kFloat>
struct FocalStar {
  S gamma, beta;
  S share;  // 1 / gamma; finite, as 0 times it has to be 0

  static constexpr bool kScores = false;

  FocalStar() = default;
  FASTFOCAL_HD explicit FocalStar(const LossParams& params)
      // Not 0, even where it rounds to it: kernels fill up with -inf.
      : gamma(S(clamp_min(params.value[0], sizeof(S) == sizeof(float) ? 1.5e-45 : 5e-324))),
        beta(S(params.value[1])),
        share(S(clamp_max(1 / params.value[0], sizeof(S) == sizeof(float) ? 3e38 : 1e308))) {}

  template <class V>
  FASTFOCAL_HD Term<V> negative(V x) const {
    return term(of_negative(x), exponential(x));
  }
  static constexpr bool kLogarithm = false;
  template <class V>
  FASTFOCAL_HD V exponential(V x) const {
    const V z = of_negative(x);
    return exponential(z, rest_of(V(gamma), x, z));
  }
  template <class V>
  FASTFOCAL_HD Term<V> negative(V x, V e, V) const {
    return term(of_negative(x), e);
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V) const {
    const Term<V> t = negative(V(S(0)) - x);
    return {t.loss, V(S(0)) - t.grad};
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return fastfocal::soft_weight(y, positive, negative);
  }
  static constexpr bool kSoftInSteps = false;  // the exponential is of x and y
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    const Softly<V> t = softly(x, y);
    const Term<V> of_z = term(t.z, exponential(t.z, t.rest));
    return {of_z.loss, t.s * of_z.grad};
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_negative(V x) const {
    const V z = of_negative(x);
    return derivatives(z, rest_of(V(gamma), x, z));
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V) const {
    const Derivatives<V> t = second_negative(V(S(0)) - x);
    return {V(S(0)) - t.grad, t.second};
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V x, V y) const {
    const Softly<V> t = softly(x, y);
    const Derivatives<V> of_z = derivatives(t.z, t.rest);
    return {t.s * of_z.grad, (t.s * t.s) * of_z.second};
  }

 private:
  // A soft target's 1 - 2 y and z, and what z lost to rounding.
  template <class V>
  struct Softly {
    V s, z, rest;
  };
  template <class V>
  FASTFOCAL_HD Softly<V> softly(V x, V y) const {
    const V zero = V(S(0)), one = V(S(1)), twice = y + y;
    const V s = one - twice, s_rest = (one - s) - twice;
    // s x, where 0 times infinity is 0 and NaN stays NaN
    const V far = clamp_min(clamp_max(x, V(S(kLarge))), V(S(-kLarge)));
    const V sx = select(minus_absolute(s) < zero - smallest_normal<V>(), s * x, s * far);
    const V z = of_negative(sx);
    const V rest = rest_of(V(gamma), sx, z);
    const V more = V(gamma) * fused_multiply_add(far, s_rest, product_error(s, far, s * far));
    return {s, z, select(is_far(z), zero, rest + more)};
  }

  template <class V>
  FASTFOCAL_HD V of_negative(V x) const {
    return fused_multiply_add(x, V(gamma), V(S(0) - beta));
  }
  // Where e^-|z| is 0, and what rounding z lost may be any number.
  template <class V>
  FASTFOCAL_HD static auto is_far(V z) {
    return minus_absolute(z) < V(S(sizeof(S) == sizeof(double) ? -750.0 : kExpLeast));
  }

  // gamma x - beta - z, by which z was rounded: times e^z it is a relative error that grows with |z|.
  template <class V>
  FASTFOCAL_HD V rest_of(V gamma_, V x, V z) const {
    if constexpr (kAccuracy == Accuracy::kSixteenBits) return V(S(0));
    const V product = z + V(beta);
    const V rest = product_error(gamma_, x, product) + ((product - z) - V(beta));
    return select(is_far(z), V(S(0)), rest);
  }

  // e^-|z|
  template <class V>
  FASTFOCAL_HD V exponential(V z, V rest) const {
    if constexpr (kAccuracy == Accuracy::kSixteenBits) return exp_approximate(minus_absolute(z), 1.0f, 1.44269504f);
    return exp_of_sum(minus_absolute(z), rest);  // of the wrong sign for z > 0, where 1 + e^-z hides a rounding
  }

  template <class V>
  FASTFOCAL_HD Term<V> term(V z, V e) const {
    const V r = reciprocal(V(S(1)) + e);
    const V loss = add_log1p_unit(e, clamp_min(z, V(S(0))));
    return {loss * V(share), select(is_negative(z), e * r, r)};
  }

  // Here e^-|z| is a factor on both sides, so what rounding z lost has to have z's sign.
  template <class V>
  FASTFOCAL_HD Derivatives<V> derivatives(V z, V rest) const {
    const V zero = V(S(0));
    const V e = exponential(z, select(is_negative(z), rest, zero - rest));
    const V r = reciprocal(V(S(1)) + e), er = e * r;
    const V steepness = V(S(clamp_max(gamma, S(sizeof(S) == sizeof(float) ? 3e38 : 1e308))));  // finite, as 0 times it is 0
    return {select(is_negative(z), er, r), steepness * (er * r)};
  }
};

template <class S, Accuracy kAccuracy>
constexpr bool kHasSecond<FocalStar<S, kAccuracy>> = true;

struct FocalLossStar : RegisteredLoss {
  static constexpr LossKind kKind{1};
  static constexpr const char* kName = "focal_loss_star";
  static constexpr LossParameter kParameters[] = {{"gamma", ParameterRange::kPositive}, {"beta", ParameterRange::kFinite}};

  template <class S, Path, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams&, const Use& use) {
    use(Type<FocalStar<S, kAccuracy>>());
  }
};

}  // namespace fastfocal
