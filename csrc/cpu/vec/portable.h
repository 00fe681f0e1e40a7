// A vector of 4 floats: GCC's and clang's vector extension (SSE2, NEON, whatever the target has). vec.h includes it.
#pragma once

#include <cstring>

#include "../../elementary.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

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
inline Vec clamp_min(Vec x, Vec c) { return Vec(blend(x.v < c.v, c.v, x.v)); }
inline Vec clamp_max(Vec x, Vec c) { return Vec(blend(x.v > c.v, c.v, x.v)); }
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

using Labels = Ints;
using LabelMask = Ints;
inline Labels load_labels(const int16_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
inline LabelMask equal(Labels labels, int16_t c) { return labels == int32_t(c); }
inline bool any(LabelMask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
inline Mask either(LabelMask a, LabelMask b) { return {a | b}; }
inline Mask either(Mask a, Mask b) { return {a.m | b.m}; }
inline Mask lanes_from(int n) { return {Ints{0, 1, 2, 3} >= n}; }
inline Vec zero_where(Mask m, Vec x) { return Vec(Floats(~m.m & Ints(x.v))); }

// The sum of each vector's lanes, in the lane of that number.
inline Vec lane_sums(const Vec (&vectors)[kLanes]) {
  const auto sum = [&](int i) { return (vectors[i].v[0] + vectors[i].v[2]) + (vectors[i].v[1] + vectors[i].v[3]); };
  return Vec(Floats{sum(0), sum(1), sum(2), sum(3)});
}

struct Sum {
  double sum[4] = {0, 0, 0, 0};
  void add(Vec x) {
    for (int i = 0; i < kLanes; ++i) sum[i] += double(x.v[i]);
  }
  void lanes(double* out) const { memcpy(out, sum, sizeof(sum)); }
};

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
