// Focal loss star, Lin et al. 2017, appendix B (arXiv:1708.02002): a softplus, shifted and scaled.
//
//   FL*(x_t) = -log sigmoid(gamma x_t + beta) / gamma,   x_t = x (2 y - 1),   gamma > 0
//            = log(1 + e^z) / gamma,                     z = -(gamma x_t + beta)
//   d/dx     = (1 - 2 y) sigmoid(z)
#pragma once

#include "loss.h"

namespace fastfocal {

template <class S, Accuracy kAccuracy = Accuracy::kFloat>
struct FocalStar {
  S gamma, beta;
  S share;  // 1 / gamma; finite, as 0 times it has to be 0

  static constexpr LossParameter kParameters[] = {{"gamma", ParameterRange::kPositive}, {"beta", ParameterRange::kFinite}};
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
    const V zero = V(S(0)), one = V(S(1)), twice = y + y;
    const V s = one - twice, s_rest = (one - s) - twice;
    // s x, where 0 times infinity is 0 and NaN stays NaN
    const V far = clamp_min(clamp_max(x, V(S(kLarge))), V(S(-kLarge)));
    const V sx = select(minus_absolute(s) < zero - smallest_normal<V>(), s * x, s * far);
    const V z = of_negative(sx);
    const V rest = rest_of(V(gamma), sx, z);
    const V more = V(gamma) * fused_multiply_add(far, s_rest, product_error(s, far, s * far));
    const Term<V> t = term(z, exponential(z, select(is_far(z), zero, rest + more)));
    return {t.loss, s * t.grad};
  }

 private:
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
};

}  // namespace fastfocal
