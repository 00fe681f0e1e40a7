// Asymmetric loss of multi-label classification, Ridnik et al. 2021, arXiv:2009.14119: each of the two classes has a focusing
// exponent of its own, and a negative that is less likely than `clip` costs nothing.
//
//   positive: (1 - p)^gamma_pos softplus(-x)                              the focal loss's (focal.h)
//   negative: m^gamma_neg L,   m = max(p - clip, 0),   L = -log(1 - m)
//     d/dx  = m^gamma_neg (gamma_neg L / m + 1 / v) p (1 - p) where m > 0, 0 elsewhere;   v = 1 - m
//           = m^(gamma_neg - 1) (gamma_neg L v + m) p (1 - p) / v
//
// v = (1 - p) + clip has no difference in it. m, a difference, is exact to a rounding of p, and so is L: what rounding v has
// lost, (1 - v) - m, is exact for v >= 1/2 and is added, log(1 - m) = log(v) + ((1 - v) - m) / v. Without a clip m is p, and L
// softplus(x).
//
// The second derivative of a negative, with R = p (1 - p) / m, Q = p (1 - p) / v = dL/dx, and Q' = Q (1 - 2 p + Q):
//
//     d2/dx2 = m^gamma_neg [Q' + gamma_neg R (2 Q + ((gamma_neg - 1) R + 1 - 2 p) L)] where m > 0, 0 elsewhere
//
// Terms have either sign, as has 1 - 2 p, the difference of 1 - p and p. Where m is 0, at the clip too, it is 0 as the first one is,
// and as autograd has it of a maximum, whatever its limit from above: that is not 0 for gamma_neg = 1, and infinite below.
//
// With detach_modulating_factor the powers are constants for the gradient: the terms with gamma in front are left out of it.
// A soft target y mixes the two losses, y positive + (1 - y) negative.
#pragma once

#include "focal.h"

namespace fastfocal {

// kTwo is for the usual exponents, gamma_pos = 1 and gamma_neg = 4; kClip for a clip that is not 0.
template <class S, bool kClip, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct Asymmetric {
  Focal<S, Gamma::kAny, false, kAccuracy> of_positive, of_negative;  // with kAny, the latter without a clip
  Multiple<S> multiple;                                              // of log(m), with both
  S gamma_pos, gamma_neg;  // of the gradient: 0 where the powers count as constants
  S clip;

  static constexpr bool kScores = false;

  Asymmetric() = default;
  FASTFOCAL_HD explicit Asymmetric(const LossParams& params)
      : of_positive(params.value[0], 0, params.value[3] != 0),
        of_negative(params.value[1], 0, params.value[3] != 0),
        multiple(params.value[1]),
        gamma_pos(params.value[3] != 0 ? S(0) : S(clamp_max(params.value[0], 1e30))),
        gamma_neg(params.value[3] != 0 ? S(0) : S(clamp_max(params.value[1], 1e30))),
        clip(S(clamp_min(params.value[2], FLT_MIN))) {}

  template <class V>
  FASTFOCAL_HD Term<V> negative(V x) const {
    const V e = exponential(x);
    return negative(x, e, logarithm(e));
  }
  // Without a clip the logarithm is wanted by positives too. With one it is another logarithm, which is not known before x is
  // looked at; then what comes early is 1 / (1 + e), with which the rest of a long chain begins.
  static constexpr bool kLogarithm = true;
  template <class V>
  FASTFOCAL_HD V exponential(V x) const {
    return exp_nonpositive(minus_absolute(x));
  }
  template <class V>
  FASTFOCAL_HD V logarithm(V e) const {
    if constexpr (kClip) return reciprocal(V(S(1)) + e);
    return log1p_unit(e);
  }
  template <class V>
  FASTFOCAL_HD Term<V> negative(V x, V e, V log) const {
    if constexpr (!kClip && kGamma == Gamma::kAny) return of_negative.negative(x, e, log);
    const V zero = V(S(0)), one = V(S(1));
    const V r = kClip ? log : reciprocal(one + e), er = e * r;
    const auto left = is_negative(x);
    const V p = select(left, er, r), q = select(left, r, er);
    V m, v, minus_log, ratio;  // ratio: p (1 - p) / v
    if constexpr (kClip) {
      m = clamp_min(p - V(clip), zero);
      v = clamp_max(q + V(clip), one);
      const V inverse = reciprocal(v);
      minus_log = minus_log_of(v, m, inverse);
      ratio = (er * r) * inverse;
    } else {
      m = p;
      v = q;
      minus_log = log + clamp_min(x, zero);
      ratio = p;
    }
    const V few = kClip ? minus_log : clamp_max(minus_log, V(S(kLarge)));  // of a finite one, -log(clip) at the most
    if constexpr (kGamma == Gamma::kTwo) {
      const V square = m * m, cube = square * m;
      return {(square * square) * minus_log, cube * (fused_multiply_add(V(gamma_neg) * few, v, m) * ratio)};
    } else {
      const V m_normal = clamp_min(m, smallest_normal<V>());
      V low;
      const V high = log_positive(m_normal, &low);
      const V power = exp_of_multiple(multiple, high, zero - low);
      const V bend = V(gamma_neg) * ((few * v) * reciprocal(m_normal));
      return {power * minus_log, power * select(m < smallest_normal<V>(), zero, (bend + one) * ratio)};
    }
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V) const {
    const V e = exponential(x);
    return positive_in_steps(x, e, log1p_unit(e));
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return fastfocal::soft_weight(y, positive, negative);
  }
  static constexpr bool kSoftInSteps = true;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    return soft(x, y, exponential(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y, V e) const {
    const V log = log1p_unit(e), rest = V(S(1)) - y;
    const Term<V> yes = positive_in_steps(x, e, log), no = negative(x, e, kClip ? logarithm(e) : log);
    return {weigh(yes.loss, y) + weigh(no.loss, rest), fused_multiply_add(yes.grad, y, no.grad * rest)};
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_negative(V x) const {
    if constexpr (!kClip) return of_negative.second_negative(x);
    const V zero = V(S(0)), one = V(S(1));
    const V e = exponential(x), r = reciprocal(one + e), er = e * r;
    const auto left = is_negative(x);
    const V p = select(left, er, r), q = select(left, r, er);
    const V m = clamp_min(p - V(clip), zero), v = clamp_max(q + V(clip), one), inverse = reciprocal(v);
    const V log = minus_log_of(v, m, inverse);
    const V variance = er * r, turn = q - p;  // 1 - 2 p
    const V slope = variance * inverse, curve = slope * (turn + slope);
    const V grad = negative(x, e, logarithm(e)).grad;
    if constexpr (kGamma == Gamma::kTwo) {
      const V square = m * m, steep = V(gamma_neg) * variance;
      const V bent =
          fused_multiply_add((V(gamma_neg) - one) * variance, log, m * fused_multiply_add(turn, log, slope + slope));
      return {grad, square * fused_multiply_add(square, curve, steep * bent)};
    } else {
      const V m_normal = clamp_min(m, smallest_normal<V>());
      V low;
      const V high = log_positive(m_normal, &low);
      const V power = exp_of_multiple(multiple, high, zero - low);
      const V ratio = variance * reciprocal(m_normal);
      // Where it is more than this, the power is 0.
      const V steep = clamp_max(V(gamma_neg) * ratio, V(S(sizeof(S) == sizeof(float) ? 1e10 : 1e20)));
      const V bent = fused_multiply_add((steep - ratio) + turn, log, slope + slope);
      return {grad, power * select(m < smallest_normal<V>(), zero, fused_multiply_add(steep, bent, curve))};
    }
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V score) const {
    return of_positive.second_positive(x, score);
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V x, V y) const {
    const V rest = V(S(1)) - y;
    const Derivatives<V> yes = second_positive(x, y), no = second_negative(x);
    return {fused_multiply_add(yes.grad, y, no.grad * rest), fused_multiply_add(yes.second, y, no.second * rest)};
  }

 private:
  // L, of m and of v and its inverse
  template <class V>
  FASTFOCAL_HD V minus_log_of(V v, V m, V inverse) const {
    const V zero = V(S(0)), lost = select(v < V(S(0.5)), zero, (V(S(1)) - v) - m);
    return zero - fused_multiply_add(lost, inverse, log_positive(v));
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive_in_steps(V x, V e, V log) const {
    const V zero = V(S(0));
    if constexpr (kGamma == Gamma::kTwo) {
      const V z = zero - x, r = reciprocal(V(S(1)) + e), er = e * r;
      const auto right = is_negative(z);
      const V q = select(right, er, r), p = select(right, r, er), ce = log + clamp_min(z, zero);
      const V grad = q * fused_multiply_add(V(gamma_pos) * p, clamp_max(ce, V(S(kLarge))), q);
      return {q * ce, zero - grad};
    } else {
      const Term<V> t = of_positive.negative(zero - x, e, log);
      return {t.loss, zero - t.grad};
    }
  }
};

template <class S, bool kClip, Gamma kGamma, Accuracy kAccuracy>
constexpr bool kHasSecond<Asymmetric<S, kClip, kGamma, kAccuracy>> = true;

// Fast kernels for the usual exponents, with a clip and without: on the CPU the generic loop takes twice as long
// (docs/notes/cpu_loop.md). Other exponents have generic kernels alone; and of those the usual ones their own with a clip alone.
struct AsymmetricLoss : RegisteredLoss {
  static constexpr LossKind kKind{8};
  static constexpr const char* kName = "asymmetric_loss";
  static constexpr LossParameter kParameters[] = {{"gamma_pos", ParameterRange::kNonnegative},
                                                  {"gamma_neg", ParameterRange::kNonnegative},
                                                  {"clip", ParameterRange::kUnit},
                                                  {"detach_modulating_factor", ParameterRange::kFlag}};

  // 1 for positives and 4 for negatives, as in the paper and in every project that trains with it.
  FASTFOCAL_HD static bool has_usual_exponents(const LossParams& params) {
    return params.value[0] == 1 && params.value[1] == 4;
  }
  FASTFOCAL_HD static bool has_fast_kernel(const LossParams& params) { return has_usual_exponents(params); }

  template <class S, Path kPath, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams& params, const Use& use) {
    const bool clip = params.value[2] != 0;
    if constexpr (kPath == Path::kFast) {
      if (clip) return use(Type<Asymmetric<S, true, Gamma::kTwo, kAccuracy>>());
      use(Type<Asymmetric<S, false, Gamma::kTwo, kAccuracy>>());
    } else {
      if (!clip) return use(Type<Asymmetric<S, false, Gamma::kAny, kAccuracy>>());
      with_exponents<kPath, Asymmetric<S, true, Gamma::kTwo, kAccuracy>, Asymmetric<S, true, Gamma::kAny, kAccuracy>>(
          has_usual_exponents(params), use);
    }
  }
};

}  // namespace fastfocal
