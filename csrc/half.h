// The 16-bit floating point formats, as plain bits, and their conversions; host and device.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined on the host too: a shared function compiled for AVX-512 in one translation unit must not be the copy that
// the linker keeps for all of them.
#define FASTFOCAL_HOST inline __attribute__((always_inline))
#ifdef __CUDACC__
#define FASTFOCAL_HD __host__ __device__ __forceinline__
#else
#define FASTFOCAL_HD FASTFOCAL_HOST
#endif

namespace fastfocal {

struct Half {
  static constexpr bool kIsBFloat16 = false;
  uint16_t bits;
};

struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  uint16_t bits;
};

template <class To, class From>
FASTFOCAL_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTFOCAL_HD float to_float(float x) { return x; }
FASTFOCAL_HD double to_float(double x) { return x; }
FASTFOCAL_HD float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FASTFOCAL_HD float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Placing the bits 13 to the left leaves the exponent 112 too small; the multiplication corrects it, subnormals too.
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
#endif
}

// Rounds to the nearest value, ties to even.
template <class T>
FASTFOCAL_HD T from_float(float x);

template <>
FASTFOCAL_HD float from_float<float>(float x) {
  return x;
}

template <>
FASTFOCAL_HD BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t b = bit_cast<uint32_t>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return BFloat16{uint16_t((b >> 16) | 0x40u)};  // keep NaN a NaN
  return BFloat16{uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
#endif
}

template <>
FASTFOCAL_HD Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t b = bit_cast<uint32_t>(x);
  const uint32_t sign = (b >> 16) & 0x8000u;
  const uint32_t magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Half{uint16_t(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return Half{uint16_t(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 aligns the last kept bit with the last bit of the float, so the adder rounds.
    return Half{uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return Half{uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
#endif
}

}  // namespace fastfocal
