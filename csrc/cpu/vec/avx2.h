// A vector of 8 floats: AVX2, FMA and F16C. vec.h includes it.
#pragma once

#include <immintrin.h>

#include "../../elementary.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

constexpr int kLanes = 8;

struct Mask {
  __m256 m;
};
struct Vec {
  __m256 v;
  Vec() = default;
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  explicit Vec(__m256 x) : v(x) {}
};

inline Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.v, b.v)); }
inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
inline Vec product_error(Vec a, Vec b, Vec ab) { return Vec(_mm256_fmsub_ps(a.v, b.v, ab.v)); }
inline Vec minus_absolute(Vec a) { return Vec(_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))); }
inline Mask is_negative(Vec a) { return {a.v}; }  // a blend looks at the sign alone
inline Vec select(Mask m, Vec a, Vec b) { return Vec(_mm256_blendv_ps(b.v, a.v, m.m)); }
// The second operand comes back when either is NaN.
inline Vec clamp_min(Vec x, Vec c) { return Vec(_mm256_max_ps(c.v, x.v)); }
inline Vec clamp_max(Vec x, Vec c) { return Vec(_mm256_min_ps(c.v, x.v)); }
inline Vec shifted_up(Vec x) { return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))); }
// The table's 12 bits, doubled by a Newton step.
inline Vec reciprocal(Vec d) {
  const __m256 r = _mm256_rcp_ps(d.v);
  return Vec(_mm256_fmadd_ps(_mm256_fnmadd_ps(d.v, r, _mm256_set1_ps(1.0f)), r, r));
}
// w = 2^n m with m in [sqrt(1/2), sqrt(2))
inline void split_exponent(Vec w, Vec* n, Vec* m) {
  const __m256i bits = _mm256_castps_si256(w.v);
  const __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  *n = Vec(_mm256_cvtepi32_ps(k));
  *m = Vec(_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(k, 23))));
}

inline Vec load(const float* p) { return Vec(_mm256_loadu_ps(p)); }
inline Vec load(const BFloat16* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)));
}
inline Vec load(const Half* p) { return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(BFloat16* p, Vec x) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i y = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rounded to nearest, ties to even. A NaN has to be canonical: its last 16 bits are not looked at.
inline __m256i rounded_from_high_half(Vec x) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
inline void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m256i packed = _mm256_packus_epi32(rounded_from_high_half(a), rounded_from_high_half(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// As many 16-bit labels, and which of them equal one.
using Labels = __m128i;
using LabelMask = __m128i;
inline Labels load_labels(const int16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline LabelMask equal(Labels labels, int16_t c) { return _mm_cmpeq_epi16(labels, _mm_set1_epi16(c)); }
inline bool any(LabelMask m) { return _mm_testz_si128(m, m) == 0; }
inline Mask either(LabelMask a, LabelMask b) { return {_mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm_or_si128(a, b)))}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask lanes_from(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(n - 1)))};
}
// Where the mask is set: 0, whatever x is there, NaN included.
inline Vec zero_where(Mask m, Vec x) { return Vec(_mm256_andnot_ps(m.m, x.v)); }

// The sum of each vector's lanes, in the lane of that number.
inline Vec lane_sums(const Vec (&vectors)[kLanes]) {
  __m256 pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = vectors[2 * i].v, b = vectors[2 * i + 1].v;
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return Vec(
      _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31)));
}

struct Sum {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  void add(Vec x) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
  }
  void lanes(double* out) const {
    _mm256_storeu_pd(out, low);
    _mm256_storeu_pd(out + 4, high);
  }
};

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
