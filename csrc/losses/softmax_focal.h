// Softmax focal loss: of an anchor with the logits x_1..x_K and the label y, p = softmax(x),
//
//   L = -(1 - p_y)^gamma log(p_y)             Lin et al. 2017, arXiv:1708.02002, equation 4, for K classes instead of two
//
// With t_j = exp(x_j - b) for any base b, o = the sum of t_j over the classes j other than y ("the others"), t = t_y + o:
//
//   q  = o / t                                1 - p_y
//   p  = t_y / t                              p_y
//   ce = log(1 + o / t_y)                     -log(p_y); also (log(o) + b - x_y) + log(1 + t_y / o)
//   L  = q^gamma ce
//   dL/dx_j = (p_j - [j = y]) D,   D = q^gamma + gamma p q^(gamma - 1) ce
//
// Two things make this exact and free of singularities. The others are summed without y's own exponential, so neither q nor ce is
// made by a subtraction that cancels where p_y is nearly 1. And as p_j = q (t_j / o) for j other than y, and p_y - 1 = -q, each
// derivative has a factor q, which takes the power gamma - 1 away:
//
//   G = q D = q^gamma (q + gamma p ce)        dL/dx_y = -G,   dL/dx_j = G (t_j / o)
//
// The gradient of an anchor thus adds up to 0. It is the binary focal loss of a positive with the logit x_y - log(sum of exp(x_j)
// over the others), whose gradient the others share as their own softmax says.
//
// The base b is 0 for an anchor whose sum of exponentials is in kLeastSum..kMostSum: nothing has to be known before the
// exponentials are made, each is as exact as its own logit lets it be, and none that counts has come to 0. Elsewhere b is the
// greatest logit. Infinite logits then are the greatest or least numbers: several that are equal and infinite share p equally.
//
// A class that a mask says is absent has t_j = 0 whatever its logit is, so it is in no sum, and is not looked at for the base. It
// is the kernels that put the 0 there: a logit of -inf would have a share where all logits are -inf.
#pragma once

#include "loss.h"

namespace fastfocal {

template <class V>
struct AnchorTerm {
  V loss;
  V grad;     // G
  V inverse;  // 1 / o; 0 where o is, as G then is too
};

template <class S, Gamma kGamma>
struct SoftmaxFocal {
  // exp(-20): logits down to -87 still count for what they are. exp(60): no sum of 10^10 such exponentials overflows.
  static constexpr float kLeastSum = 2.0611536e-9f, kMostSum = 1.1420074e26f;

  S gamma;               // of the gradient alone: 0 where q^gamma counts as a constant, whose derivative is left out
  Multiple<S> multiple;  // of the power, with Gamma::kAny

  static constexpr bool kScores = false;

  SoftmaxFocal() = default;
  FASTFOCAL_HD explicit SoftmaxFocal(const LossParams& params)
      : gamma(params.value[1] != 0 ? S(0) : S(clamp_max(params.value[0], 1e30))),  // finite in float too
        multiple(params.value[0]) {}

  // With base 0. Of 88 and more it is that of 88, whose sum is beyond kMostSum.
  template <class V>
  FASTFOCAL_HD static V exponential(V x) {
    return exp_nonpositive(clamp_max(x, V(S(88))));
  }

  // With the greatest logit as base, finite as finite_logit() gives it.
  template <class V>
  FASTFOCAL_HD static V exponential(V x, V greatest) {
    const V zero = V(S(0));
    x = finite_logit(x);
    const V hi = x - greatest;
    // What hi is off by: times the exponential it is a relative error, of 2^-24 of the logits' distance.
    const V back = hi - x, lo = (x - (hi - back)) - (greatest + back);
    return exp_of_sum(hi, select(hi < V(S(-1000)), zero, lo));  // where hi is -inf, lo is no number
  }
  template <class V>
  FASTFOCAL_HD static V finite_logit(V x) {
    constexpr S kMost = sizeof(S) == sizeof(float) ? S(FLT_MAX) : S(DBL_MAX);
    return clamp_min(clamp_max(x, V(kMost)), V(-kMost));
  }

  // x_y - b; 0 where both are the same infinity.
  template <class V>
  FASTFOCAL_HD static V distance(V x, V greatest) {
    return select(x < greatest, x - greatest, V(S(0)));
  }

  // distance: x_y - b. own: t_y. others: o. Not both 0.
  template <class V>
  FASTFOCAL_HD AnchorTerm<V> anchor(V distance, V own, V others) const {
    const V zero = V(S(0)), one = V(S(1)), least = smallest_normal<V>();
    const auto right = others < own;  // p_y > 1/2
    const V greater = select(right, own, others), lesser = select(right, others, own);
    const V e = lesser * reciprocal(greater);
    const V r = reciprocal(one + e);
    const V er = e * r;
    const V q = select(right, er, r), p = select(right, r, er);
    const V log = log1p_unit(e);
    V low;
    const V high = log_positive(clamp_min(others, least), &low);
    const V ce = log + select(right, zero, clamp_min((high - distance) + low, zero));

    V power;
    if constexpr (kGamma == Gamma::kTwo) {
      power = q * q;
    } else {
      // ln q is -log(1 + e) where q is the greater part; where it is the lesser, its own logarithm.
      V q_low;
      const V q_high = log_positive(clamp_min(q, least), &q_low);
      power = exp_of_multiple(multiple, select(right, q_high, zero), select(right, zero - q_low, log));
    }
    const V grad = power * fused_multiply_add(V(gamma) * p, clamp_max(ce, V(S(kLarge))), q);
    return {power * ce, grad, select(others < least, zero, reciprocal(others))};
  }
};

struct SoftmaxFocalLoss : RegisteredLoss {
  static constexpr LossKind kKind{9};
  static constexpr const char* kName = "softmax_focal_loss";
  static constexpr LossParameter kParameters[] = {{"gamma", ParameterRange::kNonnegative},
                                                  {"detach_modulating_factor", ParameterRange::kFlag}};
  static constexpr bool kTakesAnchors = true;

  template <class S, Path kPath, Accuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams& params, const Use& use) {
    with_exponents<kPath, SoftmaxFocal<S, Gamma::kTwo>, SoftmaxFocal<S, Gamma::kAny>>(params.value[0] == 2, use);
  }
};

}  // namespace fastfocal
