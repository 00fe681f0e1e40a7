// Where a call runs: torch's current device and stream, and what the device is like.
#pragma once

#include <cuda_runtime.h>

#include <memory>

namespace torch::stable {
class Tensor;
}

namespace fastfocal::cuda {

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
