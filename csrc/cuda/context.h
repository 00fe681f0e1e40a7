// Where a call runs: the tensor's device, torch's current stream there, and what the device is like. And what CUDA said.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace torch::stable {
class Tensor;
}

namespace fastfocal::cuda {

// One sentence: what went wrong and, where it is the installation, what to do about it.
inline std::string words_of(cudaError_t error) {
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  int driver = 0;
  cudaDriverGetVersion(&driver);  // the newest CUDA that it supports; does not fail with an old one
  const std::string known = "the NVIDIA driver supports CUDA " + version(driver);
  const std::string built = "fastfocal was built with CUDA " + version(CUDART_VERSION);
  const std::string rebuild = "; update the driver, or build fastfocal with a CUDA toolkit that it supports (CUDA_HOME)";
  switch (error) {
    case cudaErrorInsufficientDriver:
      return known + " at most, but " + built + rebuild;
    case cudaErrorUnsupportedPtxVersion:
      return known + " at most, and cannot compile the PTX of CUDA " + version(CUDART_VERSION) +
             " that fastfocal has for this GPU; update the driver, or build fastfocal for this GPU (TORCH_CUDA_ARCH_LIST)";
    case cudaErrorInvalidDeviceFunction:  // what questions about a kernel are answered with
    case cudaErrorNoKernelImageForDevice: {
      int device = 0, major = 0, minor = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      return "fastfocal was not compiled for this GPU, compute capability " + std::to_string(major) + "." +
             std::to_string(minor) + ", but for those in fastfocal.build_info()[\"cuda_archs\"]; build it for this GPU " +
             "(TORCH_CUDA_ARCH_LIST)";
    }
    default:
      return cudaGetErrorString(error);
  }
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("fastfocal: CUDA: " + words_of(error));
}

// Makes the tensor's device current for as long as it lives.
struct Context {
  explicit Context(const torch::stable::Tensor& like);

  int device = 0;
  int multiprocessors = 0;
  cudaStream_t stream = nullptr;

 private:
  std::unique_ptr<void, void (*)(void*)> guard_;  // released when the constructor throws, too
};

constexpr int kMaxDevices = 64;  // whose attributes are remembered

}  // namespace fastfocal::cuda
