// The operators, over a Device: their functions, in operators/, given to PyTorch. Their schemas are in schema.h.
//
// A device is a struct with
//   static void run(const KernelParams&, const Tensor& like);                          every tile of one call
//   static void reduce(const KernelParams&, void* loss, int64_t size, bool add, const Tensor& like);
//                                                                                      KernelParams::partial -> the reduced loss
//   static void fresh(void* memory, size_t bytes);                                     about to be written for the first time
//   static void pack_labels(const PackLabelsParams&, const Tensor& like);              and adds to the counts
//   static void count(const CountParams&, const Tensor& like);                         counts -> divisor
//   static void scale(const ScaleParams&, const Tensor& like);                         finished gradients by the incoming one
//   struct Scratch(const Tensor& like, int64_t n, bool zero), .data()                  n numbers of 8 bytes for one call; zero: all 0
//
// Only PyTorch's stable ABI is used, so one binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operators/pack_labels.h"
#include "operators/pyramid_loss.h"
#include "operators/scale_gradients.h"

namespace fastfocal {

template <class Device>
struct Operators {
  static auto pyramid_loss(Tensors logits FASTFOCAL_OPTIONS_PARAMETERS) {
    return PyramidLoss<Device>::forward(logits, FASTFOCAL_GIVEN_OPTIONS);
  }
  static void pyramid_loss_(Tensors logits, Tensors losses FASTFOCAL_OPTIONS_PARAMETERS) {
    PyramidLoss<Device>::forward_(logits, losses, FASTFOCAL_GIVEN_OPTIONS);
  }
  static auto pyramid_loss_backward(Tensors grad_outputs, Tensors logits FASTFOCAL_OPTIONS_PARAMETERS) {
    return PyramidLoss<Device>::backward(grad_outputs, logits, FASTFOCAL_GIVEN_OPTIONS);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("pack_labels", TORCH_BOX(&PackLabels<Device>::pack_labels));
    m.impl("pyramid_loss", TORCH_BOX(&pyramid_loss));
    m.impl("pyramid_loss_", TORCH_BOX(&pyramid_loss_));
    m.impl("pyramid_loss_backward", TORCH_BOX(&pyramid_loss_backward));
    m.impl("scale_gradients", TORCH_BOX(&ScaleGradients<Device>::scale_gradients));
    m.impl("scale_gradients_", TORCH_BOX(&ScaleGradients<Device>::scale_gradients_));
  }
};

}  // namespace fastfocal
