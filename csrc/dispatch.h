// From what is known at run time to a C++ type: one dispatch for the dtype of logits and one for that of labels.
#pragma once

#include "half.h"

namespace fastfocal {

template <class T>
struct Type {
  using type = T;
};
template <class Tag>
using type_of = typename Tag::type;

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// What is computed and added up in.
template <class T>
struct AccumulationOf : Type<float> {};
template <>
struct AccumulationOf<double> : Type<double> {};
template <class T>
using Accumulation = typename AccumulationOf<T>::type;

// Calls use(Type<T>()) for the type of the logits.
template <class Use>
FASTFOCAL_HOST auto with_dtype(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat16:
      return use(Type<Half>());
    case DType::kBFloat16:
      return use(Type<BFloat16>());
    case DType::kFloat64:
      return use(Type<double>());
    case DType::kFloat32:
    default:
      return use(Type<float>());
  }
}

enum class LabelType : int32_t { kInt64, kInt32, kInt16, kInt8, kUInt8 };

// Calls use(Type<L>()) for the type of the labels.
template <class Use>
FASTFOCAL_HD auto with_label_dtype(LabelType type, const Use& use) {
  switch (type) {
    case LabelType::kInt32:
      return use(Type<int32_t>());
    case LabelType::kInt16:
      return use(Type<int16_t>());
    case LabelType::kInt8:
      return use(Type<int8_t>());
    case LabelType::kUInt8:
      return use(Type<uint8_t>());
    case LabelType::kInt64:
    default:
      return use(Type<int64_t>());
  }
}

// A number of type S as a T is stored.
template <class T, class S>
FASTFOCAL_HD T rounded(S x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

}  // namespace fastfocal
