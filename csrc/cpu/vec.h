// A vector of floats under one interface: AVX-512, AVX2 + FMA, or whatever the compiler makes of its portable vectors
// (SSE2, NEON). Each instruction set has its own translation unit, which defines FASTFOCAL_ISA before including this file;
// all is inside that namespace, so that no code of one instruction set is ever linked into another's.
// No torch or standard library templates in here, for the same reason.
#pragma once

#ifndef FASTFOCAL_ISA
#error "define FASTFOCAL_ISA, the namespace of this translation unit, first"
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../focal_math.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)

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
inline Vec at_least(Vec x, Vec c) { return Vec(_mm512_max_ps(c.v, x.v)); }
inline Vec at_most(Vec x, Vec c) { return Vec(_mm512_min_ps(c.v, x.v)); }
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
// w = 2^n m with m in [sqrt(1/2), sqrt(2))
inline void split_exponent(Vec w, Vec* n, Vec* m) {
  const __m512i bits = _mm512_castps_si512(w.v);
  const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
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

// As many 16-bit codes, and which of them equal one.
using Codes = __m256i;
using CodeMask = __mmask16;
inline Codes load_codes(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Codes load_first_codes(const int16_t* p, int n, int16_t rest) {
  return _mm256_mask_loadu_epi16(_mm256_set1_epi16(rest), first(n), p);
}
// Asked the other way round: of two such masks, what is wanted is where neither is set, and that is one comparison under the
// other's mask. From the masks of where they are equal it would be two more instructions, which cost a tenth of the loop.
inline CodeMask equal(Codes codes, int16_t c) {
  return static_cast<CodeMask>(~_mm256_cmpneq_epi16_mask(codes, _mm256_set1_epi16(c)));
}
inline bool any(CodeMask m) { return m != 0; }
inline Mask either(CodeMask a, CodeMask b) { return {static_cast<__mmask16>(a | b)}; }
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

#elif defined(__AVX2__)

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
inline Vec at_least(Vec x, Vec c) { return Vec(_mm256_max_ps(c.v, x.v)); }
inline Vec at_most(Vec x, Vec c) { return Vec(_mm256_min_ps(c.v, x.v)); }
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

// As many 16-bit codes, and which of them equal one.
using Codes = __m128i;
using CodeMask = __m128i;
inline Codes load_codes(const int16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline CodeMask equal(Codes codes, int16_t c) { return _mm_cmpeq_epi16(codes, _mm_set1_epi16(c)); }
inline bool any(CodeMask m) { return _mm_testz_si128(m, m) == 0; }
inline Mask either(CodeMask a, CodeMask b) { return {_mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm_or_si128(a, b)))}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask lanes_from(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(n - 1)))};
}
// Where the mask is set: 0, whatever x is there, NaN included.
inline Vec zero_where(Mask m, Vec x) { return Vec(_mm256_andnot_ps(m.m, x.v)); }

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

#else  // portable: GCC's and clang's vector extension

constexpr int kLanes = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Unsigned __attribute__((vector_size(16)));

struct Mask {
  Ints m;
};
struct Vec {
  Floats v;
  Vec() = default;
  explicit Vec(float x) : v(Floats{x, x, x, x}) {}
  explicit Vec(Floats x) : v(x) {}
};

inline Floats blend(Ints m, Floats a, Floats b) { return Floats((m & Ints(a)) | (~m & Ints(b))); }
inline Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
inline Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
inline Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) { return Vec(a.v * b.v + c.v); }  // fused where the target can
// Dekker's product: without a fused multiply-add, the halves of a and b multiply exactly.
inline Vec product_error(Vec a, Vec b, Vec ab) {
  const Ints top = Ints{-4096, -4096, -4096, -4096};
  const Floats ah = Floats(Ints(a.v) & top), al = a.v - ah;
  const Floats bh = Floats(Ints(b.v) & top), bl = b.v - bh;
  return Vec(((ah * bh - ab.v) + ah * bl + al * bh) + al * bl);
}
inline Vec select(Mask m, Vec a, Vec b) { return Vec(blend(m.m, a.v, b.v)); }
inline Vec minus_absolute(Vec a) { return Vec(Floats(Unsigned(a.v) | 0x80000000u)); }
inline Mask is_negative(Vec a) { return {Ints(a.v) >> 31}; }
inline Vec at_least(Vec x, Vec c) { return Vec(blend(x.v < c.v, c.v, x.v)); }
inline Vec at_most(Vec x, Vec c) { return Vec(blend(x.v > c.v, c.v, x.v)); }
inline Vec shifted_up(Vec x) { return Vec(Floats(Unsigned(x.v) << 23)); }
inline Vec reciprocal(Vec d) { return Vec(Vec(1.0f).v / d.v); }
inline void split_exponent(Vec w, Vec* n, Vec* m) {
  const Ints bits = Ints(w.v);
  const Ints k = (bits - 0x3f3504f3) >> 23;
  *n = Vec(__builtin_convertvector(k, Floats));
  *m = Vec(Floats(bits - (k << 23)));
}

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x.v, p, sizeof(x.v));
  return x;
}
template <class T>
inline Vec load(const T* p) {
  return Vec(Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])});
}
inline void store(float* p, Vec x) { memcpy(p, &x.v, sizeof(x.v)); }
template <class T>
inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(x.v[i]);
}

inline void store_pair(BFloat16* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

using Codes = Ints;
using CodeMask = Ints;
inline Codes load_codes(const int16_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
inline CodeMask equal(Codes codes, int16_t c) { return codes == int32_t(c); }
inline bool any(CodeMask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
inline Mask either(CodeMask a, CodeMask b) { return {a | b}; }
inline Mask either(Mask a, Mask b) { return {a.m | b.m}; }
inline Mask lanes_from(int n) { return {Ints{0, 1, 2, 3} >= n}; }
inline Vec zero_where(Mask m, Vec x) { return Vec(Floats(~m.m & Ints(x.v))); }

struct Sum {
  double sum[4] = {0, 0, 0, 0};
  void add(Vec x) {
    for (int i = 0; i < kLanes; ++i) sum[i] += double(x.v[i]);
  }
  void lanes(double* out) const { memcpy(out, sum, sizeof(sum)); }
};

#endif

#if !defined(__AVX512F__)
inline Vec zero_below(Vec x, Vec least, Vec y) { return zero_where(x < least, y); }
inline Vec add_except(Mask m, Vec sum, Vec x) { return sum + zero_where(m, x); }
inline Vec multiply_except(Mask m, Vec x, Vec y) { return zero_where(m, x * y); }
#endif

#if !defined(__AVX512F__)
template <class T>
inline Vec load_first(const T* p, int n) {  // the first n lanes, the rest 0
  T lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
inline Codes load_first_codes(const int16_t* p, int n, int16_t rest) {
  int16_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : rest;
  return load_codes(lanes);
}
#endif
template <class T>
inline void store_first(T* p, Vec x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// The lanes added in a fixed order.
inline double total(const Sum& sum) {
  double lanes[kLanes];
  sum.lanes(lanes);
  double t = 0;
  for (int i = 0; i < kLanes; ++i) t += lanes[i];
  return t;
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
