// What the bits of a result depend on beside the code and the compiler: the reciprocals that a processor estimates, which each
// maker has its own table for, and libm, which has versions of its functions for different processors.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSamples = 1 << 14;

template <class T>
uint64_t add(uint64_t hash, T value) {  // FNV-1a
  unsigned char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3ull;
  return hash;
}

// Numbers of [1, 2), evenly.
template <class Function>
uint64_t fingerprint(const Function& function) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int i = 0; i < kSamples; ++i) hash = add(hash, function(1.0 + double(i) / kSamples));
  return hash;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) uint64_t libm() {
  return fingerprint([](double x) {
    uint64_t hash = 0;
    for (const double value : {std::exp(-7 * x), std::log(x / 3), std::log1p(x - 1), std::exp2(-5 * x)})
      hash = add(hash, value);
    const float y = float(x);
    for (const float value : {std::exp(-7 * y), std::log(y / 3), std::log1p(y - 1), std::exp2(-5 * y), std::log2(y / 3)})
      hash = add(hash, value);
    return hash;
  });
}

#if defined(__x86_64__)
// For a processor with AVX.
extern "C" __attribute__((visibility("default"), target("avx"))) uint64_t rcp_ps() {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int i = 0; i < kSamples; ++i) {
    const __m256 x = _mm256_set1_ps(1.0f + float(i) / kSamples);
    hash = add(hash, _mm256_cvtss_f32(_mm256_rcp_ps(x)));
  }
  return hash;
}

// For a processor with AVX-512.
extern "C" __attribute__((visibility("default"), target("avx512f"))) uint64_t rcp14_ps() {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int i = 0; i < kSamples; ++i) {
    const __m512 x = _mm512_set1_ps(1.0f + float(i) / kSamples);
    hash = add(hash, _mm512_cvtss_f32(_mm512_rcp14_ps(x)));
  }
  return hash;
}
#endif
