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

  // One number for each anchor of a level, shaped as labels are: (N, H, W, A), without A where that is 1; (N, M); (M,).
  static Tensor of_anchors(const Tensor& logits, int64_t classes) {
    const auto sizes = logits.sizes();
    int64_t shape[4], strides[4], dim = logits.dim() - 1;
    if (logits.dim() == 4) {
      shape[0] = sizes[0], shape[1] = sizes[2], shape[2] = sizes[3], shape[3] = sizes[1] / classes;
      dim = shape[3] == 1 ? 3 : 4;
    } else {
      for (int64_t d = 0; d < dim; ++d) shape[d] = sizes[d];
    }
    for (int64_t d = dim - 1, step = 1; d >= 0; --d) {
      strides[d] = step;
      step *= shape[d] > 0 ? shape[d] : 1;
    }
    return new_tensor(logits, dim, shape, strides, logits.scalar_type());
  }

  static Tensors like_all(const Tensors& tensors) {  // the same dtypes and strides
    Tensors out;
    out.reserve(tensors.size());
    for (const Tensor& t : tensors) out.push_back(fresh_like(t));
    return out;
  }
};

}  // namespace fastfocal
