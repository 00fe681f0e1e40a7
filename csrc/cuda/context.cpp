#include "context.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>

namespace fastfocal::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;
using GetStream = AOTITorchError (*)(int32_t, void**);

// Looked up in the libtorch_cuda that is already loaded, not linked, so that the same module loads where torch has no CUDA.
GetStream find_get_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* symbol = dlsym(RTLD_DEFAULT, kName);
  if (symbol == nullptr) {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (library != nullptr) symbol = dlsym(library, kName);
  }
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

Context::Context(const torch::stable::Tensor& like)
    : device(like.get_device_index()), guard_(nullptr, [](void* guard) { delete static_cast<DeviceGuard*>(guard); }) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr, "fastfocal: this torch has no CUDA");
  guard_.reset(new DeviceGuard(device));
  // That is torch's CUDA runtime. The one linked into this module has a current device of its own, for each thread; nobody
  // else uses it, so it needs no restoring. What both share, the driver's current context, has to end as torch left it, and
  // does: the guard goes last. Restoring ours would make another device's context current beneath torch, or create one there.
  check(cudaSetDevice(device));
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &current));
  stream = static_cast<cudaStream_t>(current);
  static std::atomic<int> known[kMaxDevices];
  multiprocessors = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (multiprocessors == 0) {
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    if (device < kMaxDevices) known[device].store(multiprocessors, std::memory_order_relaxed);
  }
}

}  // namespace fastfocal::cuda
