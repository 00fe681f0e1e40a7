// Registers the kernels' operators for CPU tensors as torch.ops.fastfocal_on_host, and takes the place of
// csrc/cuda/context.cpp, which asks torch for the device and the stream of a CUDA tensor.
#include "cuda/device.h"
#include "schema.h"

namespace fastfocal::cuda {

Context::Context(const torch::stable::Tensor&) : stream(nullptr), guard_(nullptr, [](void*) {}) {
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
}

}  // namespace fastfocal::cuda

STABLE_TORCH_LIBRARY(fastfocal_on_host, m) { fastfocal::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfocal_on_host, CPU, m) { fastfocal::cuda::implement_operators(m); }
