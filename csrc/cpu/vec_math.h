// exp and log for Vec, as elementary.h wants them.
//
// AVX-512 looks up a vector of numbers in a table of 32, which two registers hold, with one instruction. What is left for a
// polynomial is then so near to 0 that few terms do: exp(-|x|) and log(1 + e) take 9 multiplications and multiply-adds where
// the polynomials of elementary.h take 19, and those are what the loop waits for. The other instruction sets have no such
// tables, or gain little by them (AVX2, of 8: docs/notes/cpu_loop.md).
#pragma once

#include "vec.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

#if defined(__AVX512F__)

// 2^(j / 32), as bits less those of j in the place that exp_from() adds them to
alignas(64) constexpr int32_t kRoots[kEntries] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
struct Inverses {
  float entry[kEntries];
  constexpr Inverses() : entry() {
    for (int j = 0; j < kEntries; ++j) entry[j] = 1.0f / (1.0f + float(j) / float(kEntries));
  }
};
alignas(64) constexpr Inverses kInverses;
// Minus the logarithms of these, as they are rounded
alignas(64) constexpr float kLogarithms[kEntries] = {
    0.0f,         0.030771628f, 0.0606246181f, 0.0896121562f, 0.117783025f, 0.145181984f, 0.171850249f, 0.19782573f,
    0.223143533f, 0.247836202f, 0.271933705f,  0.295464218f,  0.318453699f, 0.340926558f, 0.362905473f, 0.384411722f,
    0.405465066f, 0.426084429f, 0.446287125f,  0.466089696f,  0.485507786f, 0.504556f,    0.523248136f, 0.541597307f,
    0.559615731f, 0.577315331f, 0.594707131f,  0.611801565f,  0.628608584f, 0.645138025f, 0.66139853f,  0.677398741f};

// Adding this leaves no bit for fractions: the low bits are a whole number, and the lowest five the entry to look up.
constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23

// exp(f + n ln(2) / 32) for n = shifted - kWhole >= -127 * 32 and |f| <= ln(2) / 64: 6e-8 down to the smallest normal number, and
// exactly 0 for n = -127 * 32 and f = 0. With n = 32 i + j, shifting up by 18 brings i to the exponent and j, which the table has
// been spared, into the bits below it.
inline Vec exp_from(Vec f, Vec shifted) {
  const Vec power = sum_of_bits(look_up(kRoots, shifted), shifted_up<18>(shifted));
  return fused_multiply_add(f * fused_multiply_add(f, Vec(0.49999998f), Vec(1.00001466f)), power, power);
}

inline Vec exp_nonpositive(Vec x) {
  const Vec whole(kWhole), hi = clamp_min(x, Vec(float(kExpLeast)));
  const Vec shifted = fused_multiply_add(hi, Vec(32 * 1.44269504f), whole);
  return exp_from(fused_multiply_add(shifted - whole, Vec(-0.693147181f / 32), hi), shifted);
}
inline Vec exp_of_sum(Vec x, Vec lo) {
  const Vec whole(kWhole), least{float(kExpLeast)}, hi = clamp_min(x, least);
  const Vec shifted = fused_multiply_add(clamp_min(hi + lo, least), Vec(32 * 1.44269504f), whole);
  return exp_from(fused_multiply_add(shifted - whole, Vec(-0.693147181f / 32), hi) + lo, shifted);
}
// As multiple_by_polynomial() has it.
inline Vec exp_of_multiple(const Multiple<float>& c, Vec a, Vec b) {
  const Vec whole(kWhole), shifted = fused_multiply_add(a - b, Vec(32 * c.binary), whole);
  const Vec n = shifted - whole;
  const Vec rest = fused_multiply_add(n, Vec(-c.step_rest / 32), fused_multiply_add(n, Vec(-c.step / 32), a)) - b;
  return zero_below(shifted, Vec(kWhole - 127 * 32), exp_from(rest * Vec(c.gamma), shifted));
}

// log(1 + e) = log(1 + c) + log(1 + t) for the entry c that is nearest to e (the last one serves all above it) and
// t = (1 + e) / (1 + c) - 1, |t| <= 1/63. log(1 + t) / t: 2.4e-7, and exactly 1 for 0.
struct Log1p {
  Vec t, ratio, entry;
  explicit Log1p(Vec e) {
    constexpr float kParts = kWhole / 32;  // adding this leaves bits for 32nds
    const Vec nearest = lesser_bits(e + Vec(kParts), Vec(kParts + 31.0f / 32));
    const Vec inverse = look_up(kInverses.entry, nearest);
    t = fused_multiply_add(e, inverse, inverse - Vec(1.0f));  // the difference is exact
    ratio = fused_multiply_add(t, fused_multiply_add(t, Vec(0.3333746f), Vec(-0.50004584f)), Vec(1.0f));
    entry = look_up(kLogarithms, nearest);
  }
};
inline Vec log1p_unit(Vec e) {
  const Log1p log(e);
  return fused_multiply_add(log.t, log.ratio, log.entry);
}
inline Vec add_log1p_unit(Vec e, Vec x) {
  const Log1p log(e);
  return fused_multiply_add(log.t, log.ratio, log.entry + x);
}

// log(w) = n ln(2) + log(c) + log(1 + t) for w = 2^n m with m in [3/4, 3/2), the multiple c of 1/32 that is nearest to m, and
// t = m / c - 1, |t| <= 1/48. Near 1, n is 0 and c is 1: nothing cancels. log(1 + t) / t: 2.4e-7, and exactly 1 for 0.
struct NearOne {
  float entry[kEntries];
  // The multiple of 1/32 in [3/4, 3/2] whose numerator ends in these five bits
  constexpr explicit NearOne() : entry() {
    for (int j = 0; j < kEntries; ++j) entry[j] = j <= 16 ? 32.0f / float(32 + j) : 32.0f / float(j);
  }
};
alignas(64) constexpr NearOne kNearOne;  // their inverses
// Minus the logarithms of these, as they are rounded. The seven that no m is nearest to are there as well.
alignas(64) constexpr float kLogarithmsNearOne[kEntries] = {
    0.0f,          0.030771628f,  0.0606246181f,  0.0896121562f, 0.117783025f,  0.145181984f,  0.171850249f,
    0.19782573f,   0.223143533f,  0.247836202f,   0.271933705f,  0.295464218f,  0.318453699f,  0.340926558f,
    0.362905473f,  0.384411722f,  0.405465066f,   -0.632522583f, -0.575364172f, -0.521296918f, -0.470003635f,
    -0.421213478f, -0.374693483f, -0.33024171f,   -0.287682116f, -0.246860057f, -0.207639396f, -0.169899046f,
    -0.133531436f, -0.098440066f, -0.0645385757f, -0.0317486674f};
inline Vec log_positive(Vec w) {
  constexpr float kParts = kWhole / 32;
  Vec n, m;
  split_exponent<0x3f400000>(w, &n, &m);
  const Vec nearest = m + Vec(kParts);
  const Vec t = fused_multiply_add(m, look_up(kNearOne.entry, nearest), Vec(-1.0f));
  const Vec ratio = fused_multiply_add(t, fused_multiply_add(t, Vec(0.3333746f), Vec(-0.50004584f)), Vec(1.0f));
  return fused_multiply_add(t, ratio, fused_multiply_add(n, Vec(0.693147181f), look_up(kLogarithmsNearOne, nearest)));
}

#else

inline Vec log_positive(Vec w) { return log_by_polynomial(w); }

// The steps of exp_by_polynomial() in elementary.h. Adding 1.5 * 2^23 + 127 leaves no bit for fractions, and n + 127 in the low
// bits: an exponent, once shifted up.
inline void split_ln2(Vec& x, Vec* n, Vec* power) {
  const Vec magic(12582912.0f + 127.0f);
  x = clamp_min(x, Vec(float(kExpLeast)));
  const Vec shifted = fused_multiply_add(x, Vec(1.44269504f), magic);
  *n = shifted - magic;
  *power = shifted_up(shifted);
}
inline Vec less_multiple_of_ln2(Vec x, Vec n) {
#ifdef __FMA__
  return fused_multiply_add(n, Vec(-0.693147181f), x);
#else  // ln 2's leading part has few bits, so that n times it is exact
  return fused_multiply_add(n, Vec(-1.42860677e-6f), fused_multiply_add(n, Vec(-0.693145752f), x));
#endif
}

inline Vec exp_of_sum(Vec hi, Vec lo) { return exp_by_polynomial(hi, lo); }
inline Vec exp_nonpositive(Vec x) { return exp_by_polynomial(x); }
inline Vec log1p_unit(Vec e) { return e * log1p_ratio_polynomial(e); }
inline Vec add_log1p_unit(Vec e, Vec x) { return fused_multiply_add(e, log1p_ratio_polynomial(e), x); }
inline Vec exp_of_multiple(const Multiple<float>& c, Vec a, Vec b) {
#ifdef __FMA__
  return multiple_by_polynomial(c, a, b);
#else
  return multiple_by_sum(c, a, b);
#endif
}

#endif

inline Vec log_positive(Vec w, Vec* low) { return log_by_polynomial(w, low); }

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
