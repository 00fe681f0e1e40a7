// The operators scale_gradients and scale_gradients_ over a Device: finished gradients times the incoming one.
#pragma once

#include "../checks.h"
#include "tensors.h"

namespace fastfocal {

template <class Device>
struct ScaleGradients : private NewTensors<Device> {
  static Tensors scale_gradients(Tensors gradients, Tensor grad_output, int64_t reduction) {
    const CheckedScale checked(gradients, grad_output, reduction);
    Tensors scaled = like_all(gradients);
    scale(gradients, scaled, grad_output, checked);
    return scaled;
  }

  static void scale_gradients_(Tensors gradients, Tensor grad_output, int64_t reduction) {
    const CheckedScale checked(gradients, grad_output, reduction);
    Apart apart;
    for (size_t l = 0; l < gradients.size(); ++l)
      apart.add({"gradients", static_cast<int64_t>(l)}, gradients[l], "is scaled in place");
    apart.add({"grad_output"}, grad_output, nullptr);
    apart.check();
    scale(gradients, gradients, grad_output, checked);
  }

 private:
  using NewTensors<Device>::like_all;

  struct CheckedScale {
    std::vector<int64_t> logits;  // of an image of each level
    int64_t images = 0;           // 0: no level has any
    Reduction reduction;
    DType dtype = DType::kFloat32;

    CheckedScale(const Tensors& gradients, const Tensor& grad_output, int64_t reduction_)
        : reduction(checked_reduction(reduction_, Reduction::kImage)) {
      if (gradients.empty()) return;
      const Facts first(gradients[0]);
      dtype = dtype_of(first.dtype);
      logits.reserve(gradients.size());
      for (size_t l = 0; l < gradients.size(); ++l) {
        const Argument name = {"gradients", static_cast<int64_t>(l)};
        const Facts t(gradients[l]);
        check_dtype(name, t, first.dtype);
        check_memory(name, t, first);
        logits.push_back(0);
        if (t.numel == 0) continue;  // a level that needs no gradient, or has no logits
        FASTFOCAL_EXPECT(t.dim >= 2 && t.dim <= 4, name, "2, 3 or 4 dimensions, got shape ", t.shape());
        FASTFOCAL_EXPECT(is_contiguous(t) || (t.dim == 4 && is_class_last(t)), name, "contiguous or channels_last memory");
        FASTFOCAL_EXPECT(images == 0 || t.images() == images, name, images, " images as the levels before have, got shape ",
                         t.shape());
        images = t.images();
        logits.back() = t.numel / images;
      }
      const int64_t levels = static_cast<int64_t>(gradients.size()), numbers = grad_output.numel();
      const int64_t expected = reduction == Reduction::kLevel   ? levels
                               : reduction == Reduction::kImage ? (images == 0 ? numbers : images)
                                                                : 1;
      check_incoming({"grad_output"}, Facts(grad_output), first, accumulation_type(first.dtype), expected);
    }
  };

  static void scale(const Tensors& source, const Tensors& target, const Tensor& grad_output, const CheckedScale& checked) {
    if (checked.images == 0) return;
    ScaleParams params = {};
    params.reduction = checked.reduction;
    params.dtype = checked.dtype;
    params.images = checked.images;
    params.incoming = grad_output.const_data_ptr();
    params.incoming_stride = grad_output.dim() == 0 ? 0 : grad_output.stride(0);
    for (size_t start = 0; start < source.size(); start += kMaxLevels) {
      params.first_level = static_cast<int32_t>(start);
      params.count = 0;
      params.pieces = 0;
      for (size_t l = start; l < source.size() && l < start + kMaxLevels; ++l) {
        const int64_t image_logits = checked.logits[l];
        const Span pieces = {params.pieces, (image_logits + kTileLogits - 1) / kTileLogits};
        params.level[params.count++] = {source[l].const_data_ptr(), target[l].mutable_data_ptr(), image_logits, pieces};
        params.pieces += params.images * pieces.per_image;
      }
      if (params.pieces > 0) Device::scale(params, source[0]);
    }
  }
};

}  // namespace fastfocal
