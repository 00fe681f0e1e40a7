// The memory that the operators give back: new tensors in the memory order of those they were given.
#pragma once

#include "../checks.h"

namespace fastfocal {

template <class Device>
struct NewTensors {
  static Tensor none_like(const Tensor& t) { return new_numbers(t, 0, t.scalar_type()); }

  static Tensor fresh_like(const Tensor& t) {
    const Tensor out = new_tensor(t, t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type());
    Device::fresh(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
    return out;
  }

  static Tensors like_all(const Tensors& tensors) {  // the same dtypes and strides
    Tensors out;
    out.reserve(tensors.size());
    for (const Tensor& t : tensors) out.push_back(fresh_like(t));
    return out;
  }
};

}  // namespace fastfocal
