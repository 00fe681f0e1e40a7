// The elementary functions that losses are made of: exp, log and reciprocal to the accuracy that they promise, clamps, selects;
// for float, double and a vector of floats, on host and device.
//
// V is float, double or a vector of floats (cpu/vec.h); S is its scalar. A type needs these, found by overload:
//   fused_multiply_add, minus_absolute (-|x|), reciprocal, select(mask, a, b), +, -, *, <, is_negative(x) (a mask; either way
//   for a zero or NaN), and
//   clamp_min(x, c), clamp_max(x, c)   clamps that let NaN through,
//   exp_nonpositive(x)              exp(x) for x <= 0, 0 for -inf,
//   exp_of_sum(hi, lo)              exp(hi + lo) for hi <= 0 and |lo| tiny,
//   exp_of_multiple(c, a, b)        exp(gamma (a - b)) for c = Multiple(gamma), kExpLeast <= a <= 0, |b| <= log(2), a <= b,
//   log1p_unit(e)                   log(1 + e) for e in [0, 1],      add_log1p_unit(e, x)   x + that,
//   log_positive(w, &low)           log(w) for w > 0, less its low part,
//   log_positive(w)                 log(w) for w > 0, exactly 0 for 1,
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
FASTFOCAL_HD double clamp_min(double x, double c) { return x < c ? c : x; }
FASTFOCAL_HD double clamp_max(double x, double c) { return x > c ? c : x; }
FASTFOCAL_HD double exp_nonpositive(double x) { return exp(x); }
FASTFOCAL_HD double exp_of_sum(double hi, double lo) { return exp(hi + lo); }
FASTFOCAL_HD double log1p_unit(double e) { return log1p(e); }
FASTFOCAL_HD double add_log1p_unit(double e, double x) { return x + log1p(e); }
FASTFOCAL_HD double log_positive(double w, double* low) {
  *low = 0;
  return log(w);
}
FASTFOCAL_HD double log_positive(double w) { return log(w); }
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
__device__ __forceinline__ float clamp_min(float x, float c) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(c));
  return y;
#else
  return x < c ? c : x;
#endif
}
__device__ __forceinline__ float clamp_max(float x, float c) {
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
  hi = clamp_min(hi, float(kExpLeast));
  const float t = hi * 1.44269504f;
  const float rest = fmaf(t, -0.693147181f, hi) + lo;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return fmaf(y, rest, y);
}
__device__ __forceinline__ float exp_nonpositive(float x) {
  x = clamp_min(x, float(kExpLeast));
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
FASTFOCAL_HD float clamp_min(float x, float c) { return x < c ? c : x; }
FASTFOCAL_HD float clamp_max(float x, float c) { return x > c ? c : x; }
FASTFOCAL_HD float reciprocal(float x) { return 1.0f / x; }
FASTFOCAL_HD float zero_below(float x, float least, float y) { return x < least ? 0.0f : y; }
FASTFOCAL_HD float shifted_up(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) << 23); }
// Adding 1.5 * 2^23 + 127 leaves no bit for fractions, and n + 127 in the low bits: an exponent, once shifted up.
FASTFOCAL_HD void split_ln2(float& x, float* n, float* power) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  x = clamp_min(x, float(kExpLeast));
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
template <class V>
FASTFOCAL_HD V log_by_polynomial(V w) {
  V low;
  const V high = log_by_polynomial(w, &low);
  return high + low;
}
FASTFOCAL_HD float log_positive(float w, float* low) { return log_by_polynomial(w, low); }
FASTFOCAL_HD float log_positive(float w) { return log_by_polynomial(w); }
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
    gamma_ = clamp_max(gamma_, 1e30);  // any more, and products overflow; the powers are 0 or 1 long before
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
    return exp_of_sum(hi, clamp_min(clamp_max(rest, V(S(1))), V(S(-1))));
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
// Limits

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

}  // namespace fastfocal
