// The mathematics of the focal loss: one copy, for the host, the device and every vector width.
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
// Where the modulating factor q^gamma is a constant for the gradient (detach_modulating_factor), the terms with gamma in front are
// left out of it.
//
// alpha is a weight of the two classes and stays outside: kernels multiply it in with the other weights.
//
// V is float, double or a vector of floats (cpu/vec.h); S is its scalar. A type needs these, found by overload:
//   fused_multiply_add, minus_absolute (-|x|), reciprocal, select(mask, a, b), +, -, *, <, is_negative(x) (a mask; either way
//   for a zero or NaN), and
//   at_least(x, c), at_most(x, c)   clamps that let NaN through,
//   exp_nonpositive(x)              exp(x) for x <= 0, 0 for -inf,
//   exp_of_sum(hi, lo)              exp(hi + lo) for hi <= 0 and |lo| tiny,
//   exp_of_multiple(c, a, b)        exp(gamma (a - b)) for c = Multiple(gamma), kExpLeast <= a <= 0, |b| <= log(2), a <= b,
//   log1p_unit(e)                   log(1 + e) for e in [0, 1],      add_log1p_unit(e, x)   x + that,
//   log_positive(w, &low)           log(w) for w > 0, less its low part,
//   product_error(a, b, ab)         a b - ab exactly, where ab is a b rounded.
#pragma once

#include <cfloat>
#include <cmath>

#include "half.h"

namespace fastfocal {

constexpr double kExpLeast = -88.0297;  // 127 ln 2: exp() of this or less is 0 in float

// ---------------------------------------------------------------------------------------------------------------------
// float and double

FASTFOCAL_HD double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }
FASTFOCAL_HD double minus_absolute(double x) { return -fabs(x); }
FASTFOCAL_HD bool is_negative(double x) { return x < 0; }
FASTFOCAL_HD double reciprocal(double x) { return 1.0 / x; }
FASTFOCAL_HD double select(bool mask, double a, double b) { return mask ? a : b; }
FASTFOCAL_HD double at_least(double x, double c) { return x < c ? c : x; }
FASTFOCAL_HD double at_most(double x, double c) { return x > c ? c : x; }
FASTFOCAL_HD double exp_nonpositive(double x) { return exp(x); }
FASTFOCAL_HD double exp_of_sum(double hi, double lo) { return exp(hi + lo); }
FASTFOCAL_HD double log1p_unit(double e) { return log1p(e); }
FASTFOCAL_HD double add_log1p_unit(double e, double x) { return x + log1p(e); }
FASTFOCAL_HD double log_positive(double w, double* low) {
  *low = 0;
  return log(w);
}
FASTFOCAL_HD double product_error(double a, double b, double ab) { return fma(a, b, -ab); }

FASTFOCAL_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTFOCAL_HD float minus_absolute(float x) { return -fabsf(x); }
FASTFOCAL_HD bool is_negative(float x) { return x < 0; }
FASTFOCAL_HD float select(bool mask, float a, float b) { return mask ? a : b; }
FASTFOCAL_HD float product_error(float a, float b, float ab) { return fmaf(a, b, -ab); }
// w = 2^n m with m in [sqrt(1/2), sqrt(2))
FASTFOCAL_HD void split_exponent(float w, float* n, float* m) {
  const int32_t bits = bit_cast<int32_t>(w), k = (bits - 0x3f3504f3) >> 23;
  *n = float(k);
  *m = bit_cast<float>(bits - k * (1 << 23));
}

#ifdef __CUDA_ARCH__
// max.NaN is one instruction where it exists; a comparison and a select elsewhere.
__device__ __forceinline__ float at_least(float x, float c) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(c));
  return y;
#else
  return x < c ? c : x;
#endif
}
__device__ __forceinline__ float at_most(float x, float c) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(c));
  return y;
#else
  return x > c ? c : x;
#endif
}
__device__ __forceinline__ float reciprocal(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// ex2 is accurate to 2e-7, but its argument x log2(e), rounded to t, is not for large |x|: what t is off by is carried.
__device__ __forceinline__ float exp_of_sum(float hi, float lo) {
  hi = at_least(hi, float(kExpLeast));
  const float t = hi * 1.44269504f;
  const float rest = fmaf(t, -0.693147181f, hi) + lo;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return fmaf(y, rest, y);
}
__device__ __forceinline__ float exp_nonpositive(float x) {
  x = at_least(x, float(kExpLeast));
  const float t = x * 1.44269504f;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return fmaf(y, fmaf(t, -0.693147181f, x), y);
}
// exp(scale x), binary = scale log2(e), without the carrying: off by 2^-24 of the exponent
__device__ __forceinline__ float exp_approximate(float x, float, float binary) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * binary));
  return y;
}
#else
FASTFOCAL_HD float at_least(float x, float c) { return x < c ? c : x; }
FASTFOCAL_HD float at_most(float x, float c) { return x > c ? c : x; }
FASTFOCAL_HD float reciprocal(float x) { return 1.0f / x; }
FASTFOCAL_HD float zero_below(float x, float least, float y) { return x < least ? 0.0f : y; }
FASTFOCAL_HD float shifted_up(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) << 23); }
// Adding 1.5 * 2^23 + 127 leaves no bit for fractions, and n + 127 in the low bits: an exponent, once shifted up.
FASTFOCAL_HD void split_ln2(float& x, float* n, float* power) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  x = at_least(x, float(kExpLeast));
  const float shifted = fmaf(x, 1.44269504f, kMagic);
  *n = shifted - kMagic;
  *power = shifted_up(shifted);
}
FASTFOCAL_HD float less_multiple_of_ln2(float x, float n) { return fmaf(n, -0.693147181f, x); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Polynomials, for any width of float. Minimax fits (Remez); each says its relative error; coefficients from the lowest
// power.

template <class V, int kTerms>
FASTFOCAL_HD V horner(V x, const float (&c)[kTerms]) {
  V y = V(c[kTerms - 1]);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = kTerms - 2; i >= 0; --i) y = fused_multiply_add(y, x, V(c[i]));
  return y;
}

// Horner's rule takes the fewest instructions, which is what a GPU waits for. A CPU waits for the chain of dependent ones,
// as its schedulers hold no more than four or five vectors' instructions: there it is Estrin's scheme, in pairs.
template <class V>
FASTFOCAL_HD V polynomial(V x, const float (&c)[6]) {
#ifdef __CUDA_ARCH__
  return horner(x, c);
#else
  const V x2 = x * x;
  const V low = fused_multiply_add(x, V(c[1]), V(c[0])), middle = fused_multiply_add(x, V(c[3]), V(c[2]));
  const V high = fused_multiply_add(x, V(c[5]), V(c[4]));
  return fused_multiply_add(fused_multiply_add(high, x2, middle), x2, low);
#endif
}
template <class V>
FASTFOCAL_HD V polynomial(V x, const float (&c)[8]) {
#ifdef __CUDA_ARCH__
  return horner(x, c);
#else
  const V x2 = x * x;
  const V low = fused_multiply_add(fused_multiply_add(x, V(c[3]), V(c[2])), x2, fused_multiply_add(x, V(c[1]), V(c[0])));
  const V high = fused_multiply_add(fused_multiply_add(x, V(c[7]), V(c[6])), x2, fused_multiply_add(x, V(c[5]), V(c[4])));
  return fused_multiply_add(high, x2 * x2, low);
#endif
}

// exp(f), |f| <= ln(2) / 2: 1.1e-7, and exactly 1 for 0
template <class V>
FASTFOCAL_HD V exp_polynomial(V f) {
  constexpr float c[] = {1.0f, 0.999999778052f, 0.499992296037f, 0.166675453028f, 0.0418901110966f, 0.00829186243821f};
  return polynomial(f, c);
}

// log(1 + e) / e, e in [0, 1]: 2.2e-7, and exactly 1 for 0
template <class V>
FASTFOCAL_HD V log1p_ratio_polynomial(V e) {
  constexpr float c[] = {1.0f,
                         -0.499981802756f,
                         0.332840627493f,
                         -0.245368605399f,
                         0.178471938007f,
                         -0.109022717576f,
                         0.0449865121096f,
                         -0.00877892075108f};
  return polynomial(e, c);
}

// The same to 1.4e-6, for what is rounded to 16 bits
template <class V>
FASTFOCAL_HD V log1p_ratio_short_polynomial(V e) {
  constexpr float c[] = {1.0f, -0.499907464f, 0.331404179f, -0.236112982f, 0.151026681f, -0.0678502023f, 0.0145879583f};
  return horner(e, c);
}

// log(1 + f) / f, 1 + f in [sqrt(1/2), sqrt(2)]: 4e-9
template <class V>
FASTFOCAL_HD V log_polynomial(V f) {
  constexpr float c[] = {1.00000000067f,   -0.499999883243f, 0.333333023963f,  -0.25001570957f, 0.200032066928f,
                         -0.166103423602f, 0.141607208363f,  -0.132122602684f, 0.130191541452f, -0.078308253961f};
  return horner(f, c);
}

// exp(hi + lo) for hi <= 0: hi = n ln 2 + f. split_ln2() clamps hi to
// -127 ln 2 and gives n and 2^n, 0 for n = -127; less_multiple_of_ln2() gives f, to 2^-24 however large n is.
template <class V>
FASTFOCAL_HD V exp_by_polynomial(V hi, V lo) {
  V n, power;
  split_ln2(hi, &n, &power);
  return exp_polynomial(less_multiple_of_ln2(hi, n) + lo) * power;
}
template <class V>
FASTFOCAL_HD V exp_by_polynomial(V hi) {
  V n, power;
  split_ln2(hi, &n, &power);
  return exp_polynomial(less_multiple_of_ln2(hi, n)) * power;
}

// log(w) for w > 0, in two parts, the low one less than 0.35: their sum, rounded, would be off by 2^-24 of up to 87, and a power by
// gamma times that.
template <class V>
FASTFOCAL_HD V log_by_polynomial(V w, V* low) {
  V n, m;
  split_exponent(w, &n, &m);
  const V f = m - V(1.0f);
  *low = fused_multiply_add(f, log_polynomial(f), n * V(1.42860677e-6f));
  return n * V(0.693145752f);  // exact: ln 2's leading part has few bits
}
FASTFOCAL_HD float log_positive(float w, float* low) { return log_by_polynomial(w, low); }
FASTFOCAL_HD float log1p_unit(float e) { return e * log1p_ratio_polynomial(e); }
FASTFOCAL_HD float add_log1p_unit(float e, float x) { return fmaf(e, log1p_ratio_polynomial(e), x); }
#ifndef __CUDA_ARCH__
FASTFOCAL_HD float exp_of_sum(float hi, float lo) { return exp_by_polynomial(hi, lo); }
FASTFOCAL_HD float exp_nonpositive(float x) { return exp_by_polynomial(x); }
FASTFOCAL_HD float exp_approximate(float x, float, float binary) { return exp_by_polynomial(0.693147181f * (x * binary)); }
#endif

// exp(gamma (a - b)). gamma times a rounded difference would be off by 2^-24 of up to 87, and the exponential by as much:
// so the multiple of ln 2 nearest to it is taken from a, and b from the small rest, before gamma multiplies that.
template <class S>
struct Multiple {
  // All but `binary` to twice the precision: gamma in float may be off by 3e-8 of itself, and the power by 87 times that.
  S gamma, gamma_rest;
  S binary;           // gamma log2(e)
  S step, step_rest;  // ln(2) / gamma; 0 for a gamma so small that nothing is ever taken

  Multiple() = default;
  FASTFOCAL_HD explicit Multiple(double gamma_) {
    gamma_ = at_most(gamma_, 1e30);  // any more, and products overflow; the powers are 0 or 1 long before
    gamma = S(gamma_);
    gamma_rest = S(gamma_ - double(gamma));
    binary = gamma * S(1.4426950408889634);
    constexpr float kLn2 = 0.693147181f;  // 1.9e-9 above ln 2
    const bool takes = gamma > S(1e-36);
    step = takes ? kLn2 / gamma : S(0);
    const S rest = fused_multiply_add(-step, gamma, S(kLn2)) - S(1.90465421e-9);
    step_rest = takes ? (rest - step * gamma_rest) / gamma : S(0);
  }

  // exp(gamma (x + x_rest)) for x <= 0
  template <class V>
  FASTFOCAL_HD V exp_of(V x, V x_rest) const {
    const V hi = V(gamma) * x;
    const V lo = fused_multiply_add(V(gamma_rest), x, product_error(V(gamma), x, hi));
    const V rest = fused_multiply_add(V(gamma), x_rest, lo);
    // Far below 1 wherever exp(hi) is not 0; elsewhere it might make an infinity to multiply that 0 with.
    return exp_of_sum(hi, at_least(at_most(rest, V(S(1))), V(S(-1))));
  }
};

template <class V, class S>
FASTFOCAL_HD V multiple_by_polynomial(const Multiple<S>& c, V a, V b) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // as in split_ln2()
  const V shifted = fused_multiply_add(a - b, V(c.binary), V(kMagic));
  const V n = shifted - V(kMagic);
  const V rest = fused_multiply_add(n, V(-c.step_rest), fused_multiply_add(n, V(-c.step), a)) - b;
  return zero_below(shifted, V(12582912.0f), exp_polynomial(rest * V(c.gamma)) * shifted_up(shifted));
}
// The same in two roundings more, for a type without exact fused_multiply_add, and for double.
template <class V, class S>
FASTFOCAL_HD V multiple_by_sum(const Multiple<S>& c, V a, V b) {
  const V x = a - b;
  return c.exp_of(x, (a - x) - b);
}

FASTFOCAL_HD double exp_of_multiple(const Multiple<double>& c, double a, double b) { return multiple_by_sum(c, a, b); }
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float exp_of_multiple(const Multiple<float>& c, float a, float b) {
  const float t = (a - b) * c.binary;
  const float rest = fmaf(t, -c.step_rest, fmaf(t, -c.step, a)) - b;  // what t log(2) / gamma is off by
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return fmaf(y, rest * c.gamma, y);
}
#else
FASTFOCAL_HD float exp_of_multiple(const Multiple<float>& c, float a, float b) { return multiple_by_polynomial(c, a, b); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The formula

template <class V>
struct Term {
  V loss;
  V slope;  // its derivative by the logit
};

template <class V>
FASTFOCAL_HD V smallest_normal() {
  return V(FLT_MIN);
}
template <>
FASTFOCAL_HD double smallest_normal<double>() {
  return DBL_MIN;
}

// exp() of this or less is 0 and so is log(1 + that): where a logit is clamped to it, its loss stays the same.
template <class V>
FASTFOCAL_HD V exp_least() {
  return V(float(kExpLeast));
}
template <>
FASTFOCAL_HD double exp_least<double>() {
  return -1000;
}

// A cross entropy is clamped to this where something that vanishes multiplies it: 0 * inf would be NaN.
constexpr double kLarge = 1e30;

// A loss times a weight; a weight of 0 beats an infinite loss (but not NaN).
template <class V, class W>
FASTFOCAL_HD V weigh(V loss, W weight) {
  return select(V(0) - smallest_normal<V>() < minus_absolute(V(weight)), at_most(loss, V(kLarge)), loss) * V(weight);
}

// The weight of a soft target y between those of the two classes. Their difference, rounded, would be too coarse for the smaller.
template <class V>
FASTFOCAL_HD V soft_weight(V y, V positive, V negative) {
  return fused_multiply_add(y, positive, (V(1) - y) * negative);
}

// What a member of the family is told besides logits and targets.
struct Parameters {
  double gamma, label_smoothing, beta;
  bool detach_modulating_factor;
};

enum class Gamma { kTwo, kAny };

// What a result is rounded to. For 16 bits a GPU's kernel saves instructions: off by at most 1e-5 before that one rounding,
// which is off by 5e-4 itself.
enum class Accuracy { kFloat, kSixteenBits };

// The policy the kernels take: a member of the family gives a struct with negative(x), the same in the steps exponential(x),
// logarithm(e) where kLogarithm, and negative(x, e, log), positive(x) and soft(x, y), in steps soft(x, y, e) where
// kSoftInSteps. Further members (quality, varifocal, asymmetric) are further structs; the kernels stay as they are. A negative
// logit of -inf costs exactly 0 and has slope 0: kernels put it where nothing is to be counted.
template <class S, Gamma kGamma, bool kSmoothing, Accuracy kAccuracy = Accuracy::kFloat>
struct FocalLoss {
  S gamma;               // of the slope alone: 0 where q^gamma counts as a constant, whose derivative is left out
  Multiple<S> multiple;  // of the power, with kAny
  S half_smoothing;      // h; read only with kSmoothing

  FocalLoss() = default;
  // In short_term() the multiple is one of a logarithm that may be infinite: 0 times that would be NaN.
  FASTFOCAL_HD explicit FocalLoss(const Parameters& parameters)
      : gamma(parameters.detach_modulating_factor ? S(0) : S(at_most(parameters.gamma, 1e30))),  // finite in float too
        multiple(kAccuracy == Accuracy::kSixteenBits ? at_least(parameters.gamma, 1e-30) : parameters.gamma),
        half_smoothing(S(parameters.label_smoothing) / 2) {}

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
  FASTFOCAL_HD Term<V> positive(V x) const {
    const Term<V> t = term(V(S(0)) - x);
    return {t.loss, V(S(0)) - t.slope};
  }

  static constexpr bool kSoftInSteps = true;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    return soft(x, y, exponential(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y, V e) const {
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
      V high = log_positive(at_least(w, smallest_normal<V>()), &low);
      if constexpr (kSmoothing) {
        high = select(vanishes, at_least(minus, V(least_of_power())), high);
        low = select(vanishes, zero, low);
      }
      power = exp_of_multiple(multiple, high, zero - low);
    }
    V ratio = er * reciprocal(at_least(sum, smallest_normal<V>()));  // p (1 - p) / w
    if constexpr (kSmoothing) ratio = select(vanishes, one, ratio);
    const V bend = (V(gamma) * ratio) * at_most(ce, V(most_beside_gamma()));
    const V slope = power * fused_multiply_add(bend, u + u - one, v - er);
    const V loss = power * at_most_where_zero(ce, power);
    return {loss, select(left, zero - slope, slope)};
  }

 private:
  // What a cross entropy is clamped to where gamma multiplies it: smoothing leaves one of any size on the target's side, and
  // q^gamma, 0 there, must not meet an infinite product.
  FASTFOCAL_HD S most_beside_gamma() const { return S(kLarge) / (kSmoothing ? at_least(gamma, S(1)) : S(1)); }

  template <class V>
  FASTFOCAL_HD static V at_most_where_zero(V ce, V power) {
    return select(power < smallest_normal<V>(), at_most(ce, V(S(kLarge))), ce);
  }

  // q^gamma takes a logit on its target's side for no less than this, where q^gamma is 0. Without smoothing the loss is 0 there
  // whatever gamma is, as q is a factor of the cross entropy too.
  FASTFOCAL_HD S least_of_power() const {
    return exp_least<S>() / (kSmoothing ? at_least(at_most(multiple.gamma, S(1)), S(1e-28)) : S(1));
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
    const float ce = fused_multiply_add(e, ratio, at_least(z, 0.0f));
    float power = q * q;
    if constexpr (kGamma == Gamma::kAny)
      power = exp_approximate(fused_multiply_add(-e, ratio, at_most(z, 0.0f)), multiple.gamma, multiple.binary);
    const float gamma_p = fused_multiply_add(-gamma, q, gamma);
    return {power * ce, power * fused_multiply_add(gamma_p, at_most(ce, 100.0f), q)};
  }

  template <class V>
  FASTFOCAL_HD static V add_logarithm(V e, V log, V x) {
    return kLogarithm ? log + x : add_log1p_unit(e, x);
  }

  template <class V>
  FASTFOCAL_HD Term<V> full_term(V z, V e, V log) const {
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
      const V below = select(right, at_least(minus_absolute(z), V(least_of_power())), zero);
      power = exp_of_multiple(multiple, below, log);
    }

    if constexpr (kSmoothing) {
      const V u = select(right, V(half_smoothing), V(S(1) - half_smoothing));
      const V ce = add_logarithm(e, log, zero - minus_absolute(z) * u);
      const V slope = power * fused_multiply_add(V(gamma) * p, at_most(ce, V(most_beside_gamma())), q - V(half_smoothing));
      return {power * at_most_where_zero(ce, power), slope};
    } else {
      const V ce = add_logarithm(e, log, at_least(z, zero));
      const V slope = power * fused_multiply_add(V(gamma) * p, at_most(ce, V(S(kLarge))), q);
      return {power * ce, slope};
    }
  }
};

// Focal loss star, Lin et al. 2017, appendix B: FL*(x_t) = -log sigmoid(gamma x_t + beta) / gamma, x_t = x (2 y - 1), gamma > 0.
// That is log(1 + e^z) / gamma with z = -(gamma x_t + beta), and its derivative by x is (1 - 2 y) sigmoid(z).
template <class S, Accuracy kAccuracy = Accuracy::kFloat>
struct FocalLossStar {
  S gamma, beta;
  S share;  // 1 / gamma; finite, as 0 times it has to be 0

  FocalLossStar() = default;
  FASTFOCAL_HD explicit FocalLossStar(const Parameters& parameters)
      // Not 0, even where it rounds to it: kernels fill up with -inf.
      : gamma(S(at_least(parameters.gamma, sizeof(S) == sizeof(float) ? 1.5e-45 : 5e-324))),
        beta(S(parameters.beta)),
        share(S(at_most(1 / parameters.gamma, sizeof(S) == sizeof(float) ? 3e38 : 1e308))) {}

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
  FASTFOCAL_HD Term<V> positive(V x) const {
    const Term<V> t = negative(V(S(0)) - x);
    return {t.loss, V(S(0)) - t.slope};
  }

  static constexpr bool kSoftInSteps = false;  // the exponential is of x and y
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    const V zero = V(S(0)), one = V(S(1)), twice = y + y;
    const V s = one - twice, s_rest = (one - s) - twice;
    // s x, where 0 times infinity is 0 and NaN stays NaN
    const V far = at_least(at_most(x, V(S(kLarge))), V(S(-kLarge)));
    const V sx = select(minus_absolute(s) < zero - smallest_normal<V>(), s * x, s * far);
    const V z = of_negative(sx);
    const V rest = rest_of(V(gamma), sx, z);
    const V more = V(gamma) * fused_multiply_add(far, s_rest, product_error(s, far, s * far));
    const Term<V> t = term(z, exponential(z, select(is_far(z), zero, rest + more)));
    return {t.loss, s * t.slope};
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
    const V loss = add_log1p_unit(e, at_least(z, V(S(0))));
    return {loss * V(share), select(is_negative(z), e * r, r)};
  }
};

}  // namespace fastfocal
