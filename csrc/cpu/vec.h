// A vector of floats under one interface, and what the instruction sets share of it: vec/avx512.h, vec/avx2.h, or vec/portable.h.
//
// Each instruction set has its own translation unit, which defines FASTFOCAL_ISA before including this file; all is inside that
// namespace, so that no code of one instruction set is ever linked into another's. No torch or standard library templates in
// here, for the same reason.
#pragma once

#ifndef FASTFOCAL_ISA
#error "define FASTFOCAL_ISA, the namespace of this translation unit, first"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "vec/avx512.h"
#elif defined(__AVX2__)
#include "vec/avx2.h"
#else
#include "vec/portable.h"
#endif

namespace fastfocal {
namespace FASTFOCAL_ISA {

#if !defined(__AVX512F__)
inline Vec zero_below(Vec x, Vec least, Vec y) { return zero_where(x < least, y); }
inline Vec add_except(Mask m, Vec sum, Vec x) { return sum + zero_where(m, x); }
inline Vec multiply_except(Mask m, Vec x, Vec y) { return zero_where(m, x * y); }
template <class T>
inline Vec load_first(const T* p, int n) {  // the first n lanes, the rest 0
  T lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
inline Labels load_first_labels(const int16_t* p, int n, int16_t rest) {
  int16_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : rest;
  return load_labels(lanes);
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
