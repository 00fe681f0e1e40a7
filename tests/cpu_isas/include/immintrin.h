// The AVX-512 intrinsics that csrc/cpu/vec/avx512.h uses, lane by lane, for processors that lack them. Written from Intel's
// intrinsics guide and instruction set reference; whatever is not here is a compile error, and so is an immediate operand
// other than those that it passes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __m512 {
  float lane[16];
};
struct __m512i {
  int32_t lane[16];
};
struct __m512d {
  double lane[8];
};
struct __m256 {
  float lane[8];
};
struct __m256i {
  int16_t lane[16];
};
using __mmask16 = uint16_t;

namespace fastfocal_stand_in {

template <class To, class From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// V of f(lane 0), f(lane 1), ...
template <class V, class F>
inline V each(F f) {
  V out;
  for (int i = 0; i < int(sizeof(out.lane) / sizeof(out.lane[0])); ++i) out.lane[i] = f(i);
  return out;
}

// Bit i is f(i).
template <class F>
inline __mmask16 mask(F f) {
  unsigned out = 0;
  for (int i = 0; i < 16; ++i) out |= unsigned(bool(f(i))) << i;
  return __mmask16(out);
}

inline bool in(__mmask16 m, int i) { return (m >> i & 1) != 0; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, mantissa = h & 0x3ff;
  const int exponent = h >> 10 & 31;
  if (exponent == 31) {  // NaN keeps its payload and is made quiet
    return cast<float>(sign | 0x7f800000u | mantissa << 13 | (mantissa == 0 ? 0u : 0x400000u));
  }
  const int significand = int(exponent == 0 ? mantissa : mantissa | 0x400);
  return std::copysign(std::ldexp(float(significand), (exponent == 0 ? 1 : exponent) - 25), cast<float>(sign));
}

// To nearest, ties to even, as std::nearbyint does while nobody has changed the rounding mode.
inline uint16_t float_to_half(float x) {
  const uint32_t bits = cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (std::fabs(x) >= 65536) return uint16_t(sign | 0x7c00);
  if (x == 0) return uint16_t(sign);
  const int exponent = std::ilogb(x) < -14 ? -14 : std::ilogb(x);  // a subnormal has the smallest normal's
  const uint32_t significand = uint32_t(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)));
  // The leading bit, 1024, adds 1 to the exponent field; 2048, after rounding up, adds 2 (up to infinity).
  return uint16_t(sign | ((uint32_t(exponent + 14) << 10) + significand));
}

}  // namespace fastfocal_stand_in

// ---------------------------------------------------------------------------------------------------------------------
// float

inline __m512 _mm512_set1_ps(float a) {
  return fastfocal_stand_in::each<__m512>([&](int) { return a; });
}
inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
// Memory of lanes outside the mask is not touched, as it may be none.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) {
  return fastfocal_stand_in::each<__m512>([&](int i) {
    float x = 0.0f;
    if (fastfocal_stand_in::in(k, i)) std::memcpy(&x, static_cast<const char*>(p) + i * sizeof(x), sizeof(x));
    return x;
  });
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 a) {
  for (int i = 0; i < 16; ++i) {
    if (fastfocal_stand_in::in(k, i)) std::memcpy(static_cast<char*>(p) + i * sizeof(float), &a.lane[i], sizeof(float));
  }
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return std::fma(a.lane[i], b.lane[i], -c.lane[i]); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return std::fma(-a.lane[i], b.lane[i], c.lane[i]); });
}
// The second operand where either is NaN, and where both are zeros.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// Promised is a relative error below 2^-14, and powers of two exactly. Here the reciprocal's bits past the 14th are cut off:
// an error as large as it may be, so that code which needs more shows.
inline __m512 _mm512_rcp14_ps(__m512 a) {
  return fastfocal_stand_in::each<__m512>([&](int i) {
    const float exact = 1.0f / a.lane[i];
    return std::isnan(exact) ? exact : fastfocal_stand_in::cast<float>(fastfocal_stand_in::cast<uint32_t>(exact) & ~0x1ffu);
  });
}

enum FastfocalComparison { _CMP_UNORD_Q = 3, _CMP_LT_OQ = 17, _CMP_NLT_UQ = 21 };
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, FastfocalComparison how) {
  return fastfocal_stand_in::mask([&](int i) {
    if (how == _CMP_UNORD_Q) return std::isnan(a.lane[i]) || std::isnan(b.lane[i]);
    return (a.lane[i] < b.lane[i]) == (how == _CMP_LT_OQ);
  });
}
// b where the mask is set
inline __m512 _mm512_mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return fastfocal_stand_in::in(k, i) ? b.lane[i] : a.lane[i]; });
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 k, __m512 a) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return fastfocal_stand_in::in(k, i) ? a.lane[i] : 0.0f; });
}
inline __m512 _mm512_mask_add_ps(__m512 other, __mmask16 k, __m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>(
      [&](int i) { return fastfocal_stand_in::in(k, i) ? a.lane[i] + b.lane[i] : other.lane[i]; });
}
inline __m512 _mm512_maskz_mul_ps(__mmask16 k, __m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>(
      [&](int i) { return fastfocal_stand_in::in(k, i) ? a.lane[i] * b.lane[i] : 0.0f; });
}

// ---------------------------------------------------------------------------------------------------------------------
// int32; sums wrap around

inline __m512i _mm512_castps_si512(__m512 a) { return fastfocal_stand_in::cast<__m512i>(a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return fastfocal_stand_in::cast<__m512>(a); }
inline __m512i _mm512_set1_epi32(int32_t a) {
  return fastfocal_stand_in::each<__m512i>([&](int) { return a; });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return int32_t(uint32_t(a.lane[i]) + uint32_t(b.lane[i])); });
}
inline __m512i _mm512_min_epi32(__m512i a, __m512i b) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return int32_t(uint32_t(a.lane[i]) - uint32_t(b.lane[i])); });
}
inline __m512i _mm512_setr_epi32(int32_t a0, int32_t a1, int32_t a2, int32_t a3, int32_t a4, int32_t a5, int32_t a6,
                                 int32_t a7, int32_t a8, int32_t a9, int32_t a10, int32_t a11, int32_t a12, int32_t a13,
                                 int32_t a14, int32_t a15) {
  return {{a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15}};
}
// A lane of a and b, 32 of them in all, for each lane of `which`, of which the lowest five bits count.
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i which, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) {
    const int j = which.lane[i] & 31;
    return j < 16 ? a.lane[j] : b.lane[j - 16];
  });
}
// Within each quarter of four lanes: the lower two of a and b in turn, or the upper two.
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return (i % 2 ? b : a).lane[i / 4 * 4 + i % 4 / 2]; });
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return (i % 2 ? b : a).lane[i / 4 * 4 + 2 + i % 4 / 2]; });
}
// Likewise two lanes of a, then two of b, each by two bits of `which`; and the same of whole quarters.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int which) {
  return fastfocal_stand_in::each<__m512>(
      [&](int i) { return (i % 4 < 2 ? a : b).lane[i / 4 * 4 + (which >> 2 * (i % 4) & 3)]; });
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int which) {
  return fastfocal_stand_in::each<__m512>(
      [&](int i) { return (i < 8 ? a : b).lane[4 * (which >> 2 * (i / 4) & 3) + i % 4]; });
}
inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }
inline __m512i _mm512_mask_add_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  const __m512i sum = _mm512_add_epi32(a, b);
  return fastfocal_stand_in::each<__m512i>(
      [&](int i) { return fastfocal_stand_in::in(k, i) ? sum.lane[i] : other.lane[i]; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline __m512 _mm512_or_ps(__m512 a, __m512 b) {
  const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
  return _mm512_castsi512_ps(fastfocal_stand_in::each<__m512i>([&](int i) { return x.lane[i] | y.lane[i]; }));
}
inline __m512i _mm512_mask_or_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  return fastfocal_stand_in::each<__m512i>(
      [&](int i) { return fastfocal_stand_in::in(k, i) ? a.lane[i] | b.lane[i] : other.lane[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return n > 31 ? 0 : int32_t(uint32_t(a.lane[i]) << n); });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return n > 31 ? 0 : int32_t(uint32_t(a.lane[i]) >> n); });
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return a.lane[i] >> (n > 31 ? 31 : n); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return float(a.lane[i]); });
}
inline __mmask16 _mm512_movepi32_mask(__m512i a) {
  return fastfocal_stand_in::mask([&](int i) { return a.lane[i] < 0; });
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  return fastfocal_stand_in::mask([&](int i) { return (a.lane[i] & b.lane[i]) != 0; });
}

// ---------------------------------------------------------------------------------------------------------------------
// int16 and float16, 256 bits of them

inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i out;
  std::memcpy(&out, static_cast<const void*>(p), sizeof(out));
  return out;
}
inline void _mm256_storeu_si256(__m256i* p, __m256i a) { std::memcpy(static_cast<void*>(p), &a, sizeof(a)); }
inline __m256i _mm256_set1_epi16(int16_t a) {
  return fastfocal_stand_in::each<__m256i>([&](int) { return a; });
}
// Memory of lanes outside the mask is not touched.
inline __m256i _mm256_mask_loadu_epi16(__m256i other, __mmask16 k, const void* p) {
  return fastfocal_stand_in::each<__m256i>([&](int i) {
    int16_t x = other.lane[i];
    if (fastfocal_stand_in::in(k, i)) std::memcpy(&x, static_cast<const char*>(p) + i * sizeof(x), sizeof(x));
    return x;
  });
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
  return _mm256_mask_loadu_epi16(_mm256_set1_epi16(0), k, p);
}
inline __m256i _mm256_cmpeq_epi16(__m256i a, __m256i b) {
  return fastfocal_stand_in::each<__m256i>([&](int i) { return int16_t(a.lane[i] == b.lane[i] ? -1 : 0); });
}
inline __mmask16 _mm256_cmpeq_epi16_mask(__m256i a, __m256i b) {
  return fastfocal_stand_in::mask([&](int i) { return a.lane[i] == b.lane[i]; });
}
inline __mmask16 _mm256_cmpneq_epi16_mask(__m256i a, __m256i b) {
  return fastfocal_stand_in::mask([&](int i) { return a.lane[i] != b.lane[i]; });
}
// Sixteen bits of a and b, 64 of them in all, for each sixteen bits of `which`, of which the lowest six count.
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i which, __m512i b) {
  uint16_t from[64], index[32], out[32];
  std::memcpy(from, &a, sizeof(a));
  std::memcpy(from + 32, &b, sizeof(b));
  std::memcpy(index, &which, sizeof(which));
  for (int i = 0; i < 32; ++i) out[i] = from[index[i] & 63];
  __m512i y;
  std::memcpy(&y, out, sizeof(y));
  return y;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return fastfocal_stand_in::each<__m512i>([&](int i) { return int32_t(uint16_t(a.lane[i])); });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {  // the low bits, without saturation
  return fastfocal_stand_in::each<__m256i>([&](int i) { return int16_t(uint16_t(uint32_t(a.lane[i]))); });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return fastfocal_stand_in::each<__m512>([&](int i) { return fastfocal_stand_in::half_to_float(uint16_t(a.lane[i])); });
}

enum FastfocalRounding { _MM_FROUND_TO_NEAREST_INT = 0 };
enum FastfocalExceptions { _MM_FROUND_NO_EXC = 8 };
constexpr FastfocalRounding operator|(FastfocalRounding rounding, FastfocalExceptions) { return rounding; }
inline __m256i _mm512_cvtps_ph(__m512 a, FastfocalRounding) {
  return fastfocal_stand_in::each<__m256i>([&](int i) { return int16_t(fastfocal_stand_in::float_to_half(a.lane[i])); });
}

// ---------------------------------------------------------------------------------------------------------------------
// double

inline __m512d _mm512_setzero_pd() {
  return fastfocal_stand_in::each<__m512d>([](int) { return 0.0; });
}
inline void _mm512_storeu_pd(void* p, __m512d a) { std::memcpy(p, &a, sizeof(a)); }
inline __m512d _mm512_add_pd(__m512d a, __m512d b) {
  return fastfocal_stand_in::each<__m512d>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline __m512d _mm512_cvtps_pd(__m256 a) {
  return fastfocal_stand_in::each<__m512d>([&](int i) { return double(a.lane[i]); });
}
inline __m256 _mm512_castps512_ps256(__m512 a) {
  return fastfocal_stand_in::each<__m256>([&](int i) { return a.lane[i]; });
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
  return fastfocal_stand_in::each<__m256>([&](int i) { return a.lane[8 * (half & 1) + i]; });
}
