// The focal loss, its gradient, and their derivation: one copy, for the host, the device and every vector width.
//
// For a binary term with logit x and target y in {0, 1} let z = y ? -x : x, the logit of being wrong. Then
//
//   e  = exp(-|z|)                     r = 1 / (1 + e)
//   q  = z < 0 ? e r : r               sigmoid(z) = 1 - p_t
//   p  = z < 0 ? r : e r               1 - q      = p_t
//   ce = max(z, 0) + log(1 + e)        softplus(z) = -log p_t
//   loss     = q^gamma ce                               Lin et al. 2017, arXiv:1708.02002, equation 5, less its alpha
//   d/dz     = q^gamma (gamma p ce + q)                 since dq/dz = p q and dce/dz = q
//   d/dx     = y ? -d/dz : d/dz
//
// Every term of every sum above is positive, so nothing cancels, and no q^(gamma - 1) appears, so gamma in [0, 1) has no
// singularity. ln q = min(z, 0) - log(1 + e), so q^gamma is one more exp and never a pow.
//
// Label smoothing s replaces the target inside the cross entropy by y (1 - s) + s / 2. With h = s / 2:
//   ce = softplus(z) - h z = log(1 + e) + |z| u,   u = z < 0 ? h : 1 - h;   d ce / dz = q - h.
//
// A soft target y in [0, 1] (torchvision's rule: 1 - p_t = w = p + y - 2 p y with p = sigmoid(x)). With
// u = x < 0 ? y : 1 - y, the target's distance from the side the logit takes, and s = x < 0 ? -1 : 1:
//   w     = r (u + e (1 - u))
//   ce    = log(1 + e) + |x| u
//   p - y = s (u - e r)                 1 - 2 y = s (2 u - 1)            p (1 - p) / w = e r / (u + e (1 - u))
//   d/dx  = s w^gamma [(u - e r) + gamma ce (2 u - 1) e r / (u + e (1 - u))]
//
// The second derivatives, by the product rule from dp/dz = -p q and, for a soft target, with g = q^gamma or w^gamma,
// R = s (2 u - 1) p (1 - p) / w = d ln w / dx and dR/dx = R (1 - 2 p - R). k is h or 0, and y' the target within the cross entropy:
//   d2/dz2 = g [gamma p (gamma p ce + 2 (q - k) - q ce) + p q]
//   d2/dx2 = g [gamma R (gamma R ce + 2 (p - y') + (1 - 2 p - R) ce) + p (1 - p)]        1 - 2 p = -s (r - e r)
// Here terms have either sign, so a result is as exact as the sum of their magnitudes lets it be; again nothing has a singularity,
// as p (1 - p) / w is 1 at the most.
//
// Where the modulating factor q^gamma is a constant for the gradient (detach_modulating_factor), the terms with gamma in front are
// left out of it.
#pragma once

#include "loss.h"

namespace fastfocal {

template <class S, Gamma kGamma, bool kSmoothing, Accuracy kAccuracy = Accuracy::kFloat>
struct Focal {
  S gamma;               // of the gradient alone: 0 where q^gamma counts as a constant, whose derivative is left out
  Multiple<S> multiple;  // of the power, with kAny
  S half_smoothing;      // h; read only with kSmoothing

  static constexpr bool kScores = false;

  Focal() = default;
  // In short_term() the multiple is one of a logarithm that may be infinite: 0 times that would be NaN.
  FASTFOCAL_HD Focal(double gamma_, double label_smoothing, bool detach_modulating_factor)
      : gamma(detach_modulating_factor ? S(0) : S(clamp_max(gamma_, 1e30))),  // finite in float too
        multiple(kAccuracy == Accuracy::kSixteenBits ? clamp_min(gamma_, 1e-30) : gamma_),
        half_smoothing(S(label_smoothing) / 2) {}
  FASTFOCAL_HD explicit Focal(const LossParams& params) : Focal(params.value[0], params.value[1], params.value[2] != 0) {}

  template <class V>
  FASTFOCAL_HD Term<V> negative(V x) const {
    return term(x);
  }
  // The same in steps, for a kernel that wants them apart. With gamma = 2 a multiply-add adds the logarithm where it is wanted,
  // and log is not looked at; else it is wanted twice.
  static constexpr bool kLogarithm = kGamma == Gamma::kAny;
  template <class V>
  FASTFOCAL_HD V exponential(V x) const {
    return exp_nonpositive(minus_absolute(x));
  }
  template <class V>
  FASTFOCAL_HD V logarithm(V e) const {
    return kLogarithm ? log1p_unit(e) : V(S(0));
  }
  template <class V>
  FASTFOCAL_HD Term<V> negative(V x, V e, V log) const {
    return full_term(x, e, log);
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V) const {
    const Term<V> t = term(V(S(0)) - x);
    return {t.loss, V(S(0)) - t.grad};
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
    const auto f = soft_factors(x, y, e);
    const V bend = (V(gamma) * f.ratio) * clamp_max(f.ce, V(most_beside_gamma()));
    const V grad = f.power * fused_multiply_add(bend, f.u + f.u - V(S(1)), f.v - f.er);
    const V loss = f.power * clamp_where_zero(f.ce, f.power);
    return {loss, select(is_negative(x), V(S(0)) - grad, grad)};
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_negative(V z) const {
    const V e = exponential(z);
    const auto f = factors(z, e, logarithm(e));
    const V ce = clamp_max(f.ce, V(most_beside_gamma()));
    const V gamma_p = clamp_max(V(gamma) * f.p, V(S(kMostOfGamma)));
    const V rate = kSmoothing ? f.q - V(half_smoothing) : f.q;  // dce/dz
    const V slope = fused_multiply_add(gamma_p, ce, rate);
    const V change = fused_multiply_add(V(S(0)) - f.q, ce, slope + rate);
    return {f.power * slope, f.power * fused_multiply_add(gamma_p, change, f.p * f.q)};
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V) const {
    const Derivatives<V> t = second_negative(V(S(0)) - x);
    return {V(S(0)) - t.grad, t.second};
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V x, V y) const {
    const auto f = soft_factors(x, y, exponential(x));
    const V ce = clamp_max(f.ce, V(most_beside_gamma()));
    // s (1 - 2 y), not 2 u - 1: near y = 1/2 what rounding u lost would show, as far from 0 all terms but p (1 - p) have this factor.
    const V one = V(S(1)), distance = select(is_negative(x), y + y - one, one - (y + y)), own = f.ratio * distance;  // s R
    const V bend = clamp_max(V(gamma) * f.ratio, V(S(kMostOfGamma))) * distance;
    const V rate = f.v - f.er;  // s dce/dx
    const V slope = fused_multiply_add(bend, ce, rate);
    const V change = fused_multiply_add(V(S(0)) - (own + (f.r - f.er)), ce, slope + rate);
    const V grad = f.power * slope;
    return {select(is_negative(x), V(S(0)) - grad, grad), f.power * fused_multiply_add(bend, change, f.er * f.r)};
  }

 private:
  // Where gamma p is more than this, q^gamma is 0 (less than e^(-gamma p)), and so is w^gamma where gamma p (1 - p) / w is (less than
  // e to minus a quarter of it): an infinite product must not meet that 0.
  static constexpr double kMostOfGamma = 4000;

  // What loss and derivatives of a soft target are made of; the comment above names them. v: u within the cross entropy.
  template <class V>
  struct SoftFactors {
    V u, v, r, er, ratio, ce, power;  // ratio: p (1 - p) / w
  };
  template <class V>
  FASTFOCAL_HD SoftFactors<V> soft_factors(V x, V y, V e) const {
    const V zero = V(S(0)), one = V(S(1));
    const V minus = minus_absolute(x);
    const V r = reciprocal(one + e);
    const V er = e * r;
    const auto left = is_negative(x);
    const V u = select(left, y, one - y);
    const V sum = fused_multiply_add(e, one - u, u);  // u + e (1 - u)
    const V w = r * sum;
    // Less than any number: u is 0, or as little, and w is e^-|x|. Smoothing leaves a loss of e^(-gamma |x|) times |x|; without it
    // there is no more than e^-|x|.
    [[maybe_unused]] const auto vanishes = w < smallest_normal<V>();
    const V v = kSmoothing ? fused_multiply_add(u, V(S(1) - 2 * half_smoothing), V(half_smoothing)) : u;
    const V ce = log1p_unit(e) + select(v < smallest_normal<V>(), zero, zero - minus * v);  // not 0 * inf
    V power;
    if constexpr (kGamma == Gamma::kTwo) {
      power = w * w;
    } else {
      V low;
      V high = log_positive(clamp_min(w, smallest_normal<V>()), &low);
      if constexpr (kSmoothing) {
        high = select(vanishes, clamp_min(minus, V(least_of_power())), high);
        low = select(vanishes, zero, low);
      }
      power = exp_of_multiple(multiple, high, zero - low);
    }
    V ratio = er * reciprocal(clamp_min(sum, smallest_normal<V>()));  // p (1 - p) / w
    if constexpr (kSmoothing) ratio = select(vanishes, one, ratio);
    return {u, v, r, er, ratio, ce, power};
  }

  // What a cross entropy is clamped to where gamma multiplies it: smoothing leaves one of any size on the target's side, and
  // q^gamma, 0 there, must not meet an infinite product.
  FASTFOCAL_HD S most_beside_gamma() const { return S(kLarge) / (kSmoothing ? clamp_min(gamma, S(1)) : S(1)); }

  template <class V>
  FASTFOCAL_HD static V clamp_where_zero(V ce, V power) {
    return select(power < smallest_normal<V>(), clamp_max(ce, V(S(kLarge))), ce);
  }

  // q^gamma takes a logit on its target's side for no less than this, where q^gamma is 0. Without smoothing the loss is 0 there
  // whatever gamma is, as q is a factor of the cross entropy too.
  FASTFOCAL_HD S least_of_power() const {
    return exp_least<S>() / (kSmoothing ? clamp_min(clamp_max(multiple.gamma, S(1)), S(1e-28)) : S(1));
  }

  template <class V>
  FASTFOCAL_HD Term<V> term(V z) const {
    if constexpr (kAccuracy == Accuracy::kSixteenBits) {
      return short_term(z);
    } else {
      const V e = exponential(z);
      return full_term(z, e, logarithm(e));
    }
  }

  // 1 - q for p: what it loses where q is nearly 1 is lost beside that q.
  FASTFOCAL_HD Term<float> short_term(float z) const {
    const float e = exp_approximate(minus_absolute(z), 1.0f, 1.44269504f);
    const float r = reciprocal(1.0f + e);
    const float q = is_negative(z) ? e * r : r;
    const float ratio = log1p_ratio_short_polynomial(e);
    const float ce = fused_multiply_add(e, ratio, clamp_min(z, 0.0f));
    float power = q * q;
    if constexpr (kGamma == Gamma::kAny)
      power = exp_approximate(fused_multiply_add(-e, ratio, clamp_max(z, 0.0f)), multiple.gamma, multiple.binary);
    const float gamma_p = fused_multiply_add(-gamma, q, gamma);
    return {power * ce, power * fused_multiply_add(gamma_p, clamp_max(ce, 100.0f), q)};
  }

  template <class V>
  FASTFOCAL_HD static V add_logarithm(V e, V log, V x) {
    return kLogarithm ? log + x : add_log1p_unit(e, x);
  }

  // The same of a target of 0 or 1, with e = exponential(z) and log = logarithm(e).
  template <class V>
  struct Factors {
    V q, p, ce, power;
  };
  template <class V>
  FASTFOCAL_HD Factors<V> factors(V z, V e, V log) const {
    const V zero = V(S(0)), one = V(S(1));
    const V r = reciprocal(one + e);
    const V er = e * r;
    const auto right = is_negative(z);  // the logit is on the side of its target
    const V q = select(right, er, r);
    const V p = select(right, r, er);

    V power;
    if constexpr (kGamma == Gamma::kTwo) {
      power = q * q;
    } else {
      const V below = select(right, clamp_min(minus_absolute(z), V(least_of_power())), zero);
      power = exp_of_multiple(multiple, below, log);
    }

    if constexpr (kSmoothing) {
      const V u = select(right, V(half_smoothing), V(S(1) - half_smoothing));
      return {q, p, add_logarithm(e, log, zero - minus_absolute(z) * u), power};
    } else {
      return {q, p, add_logarithm(e, log, clamp_min(z, zero)), power};
    }
  }

  template <class V>
  FASTFOCAL_HD Term<V> full_term(V z, V e, V log) const {
    const auto f = factors(z, e, log);
    const V ce = clamp_max(f.ce, V(most_beside_gamma()));
    if constexpr (kSmoothing) {
      const V grad = f.power * fused_multiply_add(V(gamma) * f.p, ce, f.q - V(half_smoothing));
      return {f.power * clamp_where_zero(f.ce, f.power), grad};
    } else {
      return {f.power * f.ce, f.power * fused_multiply_add(V(gamma) * f.p, ce, f.q)};
    }
  }
};

template <class S, Gamma kGamma, bool kSmoothing, Accuracy kAccuracy>
constexpr bool kHasSecond<Focal<S, kGamma, kSmoothing, kAccuracy>> = true;

// Label smoothing has generic kernels alone, and none for the usual exponent.
struct FocalLoss : RegisteredLoss {
  static constexpr LossKind kKind{0};
  static constexpr const char* kName = "focal_loss";
  static constexpr LossParameter kParameters[] = {{"gamma", ParameterRange::kNonnegative},
                                                  {"label_smoothing", ParameterRange::kUnit},
                                                  {"detach_modulating_factor", ParameterRange::kFlag}};

  FASTFOCAL_HD static bool has_fast_kernel(const LossParams& params) { return params.value[1] == 0; }

  template <class S, Path kPath, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams& params, const Use& use) {
    if constexpr (kPath != Path::kFast) {
      if (params.value[1] != 0) return use(Type<Focal<S, Gamma::kAny, true, kAccuracy>>());
    }
    with_exponents<kPath, Focal<S, Gamma::kTwo, false, kAccuracy>, Focal<S, Gamma::kAny, false, kAccuracy>>(
        params.value[0] == 2, use);
  }
};

}  // namespace fastfocal
