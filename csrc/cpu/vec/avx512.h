// A vector of 16 floats: AVX-512 (F, DQ, BW, VL). vec.h includes it.
#pragma once

#include <immintrin.h>

#include "../../elementary.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

constexpr int kLanes = 16;

struct Mask {
  __mmask16 m;
};
struct Vec {
  __m512 v;
  Vec() = default;
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  explicit Vec(__m512 x) : v(x) {}
};

inline Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.v, b.v)); }
inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }
inline Vec product_error(Vec a, Vec b, Vec ab) { return Vec(_mm512_fmsub_ps(a.v, b.v, ab.v)); }
inline Vec minus_absolute(Vec a) { return Vec(_mm512_or_ps(a.v, _mm512_set1_ps(-0.0f))); }
inline Mask is_negative(Vec a) { return {_mm512_movepi32_mask(_mm512_castps_si512(a.v))}; }
inline Vec select(Mask m, Vec a, Vec b) { return Vec(_mm512_mask_blend_ps(m.m, b.v, a.v)); }
// The second operand comes back when either is NaN.
inline Vec clamp_min(Vec x, Vec c) { return Vec(_mm512_max_ps(c.v, x.v)); }
inline Vec clamp_max(Vec x, Vec c) { return Vec(_mm512_min_ps(c.v, x.v)); }
template <int kBits>
inline Vec shifted_up(Vec x) {
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), kBits)));
}
inline Vec sum_of_bits(Vec a, Vec b) {
  return Vec(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v))));
}
inline Vec lesser_bits(Vec a, Vec b) {  // as whole numbers
  return Vec(_mm512_castsi512_ps(_mm512_min_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v))));
}
constexpr int kEntries = 32;
inline Vec look_up(const void* table, Vec at) {  // each lane by its lowest five bits
  const float* t = static_cast<const float*>(table);
  return Vec(_mm512_permutex2var_ps(_mm512_loadu_ps(t), _mm512_castps_si512(at.v), _mm512_loadu_ps(t + 16)));
}
// The table's 14 bits, doubled by a Newton step.
inline Vec reciprocal(Vec d) {
  const __m512 r = _mm512_rcp14_ps(d.v);
  return Vec(_mm512_fmadd_ps(_mm512_fnmadd_ps(d.v, r, _mm512_set1_ps(1.0f)), r, r));
}
// w = 2^n m with m in [least, 2 least), where kLeast is the bits of least, 1 or less: [sqrt(1/2), sqrt(2))
template <int32_t kLeast = 0x3f3504f3>
inline void split_exponent(Vec w, Vec* n, Vec* m) {
  const __m512i bits = _mm512_castps_si512(w.v);
  const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kLeast)), 23);
  *n = Vec(_mm512_cvtepi32_ps(k));
  *m = Vec(_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(k, 23))));
}

inline Vec load(const float* p) { return Vec(_mm512_loadu_ps(p)); }
inline Vec load(const BFloat16* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
}
inline Vec load(const Half* p) { return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(BFloat16* p, Vec x) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, b, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The first n lanes; when loaded, the others are 0.
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load_first(const float* p, int n) { return Vec(_mm512_maskz_loadu_ps(first(n), p)); }
inline Vec load_first(const BFloat16* p, int n) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
}
inline Vec load_first(const Half* p, int n) { return Vec(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))); }
inline void store_first(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline Mask lanes_from(int n) { return {static_cast<__mmask16>(~first(n))}; }

// Rounded to nearest, ties to even. A NaN has to be canonical: its last 16 bits are not looked at.
inline __m512i rounded_in_high_half(Vec x) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i up = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
}
inline void store_pair(BFloat16* p, Vec a, Vec b) {
  constexpr auto high = [](int i) { return (2 * i + 1) | (2 * i + 3) << 16; };  // two of the 64 halves
  const __m512i which = _mm512_setr_epi32(high(0), high(2), high(4), high(6), high(8), high(10), high(12), high(14),
                                          high(16), high(18), high(20), high(22), high(24), high(26), high(28), high(30));
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(rounded_in_high_half(a), which, rounded_in_high_half(b)));
}

// As many 16-bit labels, and which of them equal one.
using Labels = __m256i;
using LabelMask = __mmask16;
inline Labels load_labels(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Labels load_first_labels(const int16_t* p, int n, int16_t rest) {
  return _mm256_mask_loadu_epi16(_mm256_set1_epi16(rest), first(n), p);
}
// Asked the other way round: of two such masks, what is wanted is where neither is set, and that is one comparison under the
// other's mask. From the masks of where they are equal it would be two more instructions, which cost a tenth of the loop.
inline LabelMask equal(Labels labels, int16_t c) {
  return static_cast<LabelMask>(~_mm256_cmpneq_epi16_mask(labels, _mm256_set1_epi16(c)));
}
inline bool any(LabelMask m) { return m != 0; }
inline Mask either(LabelMask a, LabelMask b) { return {static_cast<__mmask16>(a | b)}; }
inline Mask either(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
// Where the mask is set: 0, whatever x is there, NaN included.
inline Vec zero_where(Mask m, Vec x) { return Vec(_mm512_maskz_mov_ps(static_cast<__mmask16>(~m.m), x.v)); }
inline Vec zero_below(Vec x, Vec least, Vec y) {
  return Vec(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, least.v, _CMP_NLT_UQ), y.v));
}
inline Vec add_except(Mask m, Vec sum, Vec x) {
  return Vec(_mm512_mask_add_ps(sum.v, static_cast<__mmask16>(~m.m), sum.v, x.v));
}
inline Vec multiply_except(Mask m, Vec x, Vec y) { return Vec(_mm512_maskz_mul_ps(static_cast<__mmask16>(~m.m), x.v, y.v)); }

// The sum of each vector's lanes, in the lane of that number.
inline Vec lane_sums(const Vec (&vectors)[kLanes]) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = vectors[2 * i].v, b = vectors[2 * i + 1].v;
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const auto add_quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return Vec(add_quarters(add_quarters(fours[0], fours[1]), add_quarters(fours[2], fours[3])));
}

struct Sum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(Vec x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
  void lanes(double* out) const {
    _mm512_storeu_pd(out, low);
    _mm512_storeu_pd(out + 8, high);
  }
};

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
