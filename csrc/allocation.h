// New tensors. Where memory runs out the error has torch's words: the stable ABI's own error says only which of its functions
// failed.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

namespace fastfocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the running thread failed to allocate last, for guards.py: torch's own exception may be of a type that only torch can throw.
struct FailedAllocation {
  int64_t bytes = 0;  // 0: none
  std::string device, error;
};
inline FailedAllocation& failed_allocation() {
  static thread_local FailedAllocation failed;
  return failed;
}

// What the call into torch that failed last said; null before torch 2.13.
inline const char* last_words_of_torch() {
  using Words = const char* (*)();
  const Words words = reinterpret_cast<Words>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return words == nullptr ? nullptr : words();
}

inline std::string device_name(int32_t type, int32_t index) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_meta()) return "meta";
  if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(index);
  return "device type " + std::to_string(type) + ", index " + std::to_string(index);
}

[[noreturn]] inline void out_of_memory(int64_t bytes, int32_t device_type, int32_t device_index, const char* words) {
  const std::string amount = std::to_string(bytes) + " bytes.";
  const std::string error =
      words != nullptr && *words != '\0' ? words
      : device_type == aoti_torch_device_type_cpu()
          ? "DefaultCPUAllocator: can't allocate memory: you tried to allocate " + amount +
                " Error code 12 (Cannot allocate memory)"
          : "CUDA could not allocate " + amount + " It is out of memory, or an error before has ended its context.";
  failed_allocation() = {bytes, device_name(device_type, device_index), error};
  throw std::runtime_error(error);
}

// A new tensor on the device of `like`; on the CPU past the dispatcher, which costs a microsecond or two each time.
inline Tensor new_tensor(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  const int32_t index = like.get_device_index();
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  if (aoti_torch_empty_strided(dim, sizes, strides, type, device_type, index, &handle) != AOTI_TORCH_SUCCESS) {
    int64_t last = 0;  // offset of the last element
    for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
    out_of_memory((last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(type)), device_type, index,
                  last_words_of_torch());
  }
  return Tensor(handle);
}

// n numbers, or a single one of no dimension.
constexpr int64_t kNoDimension = -1;
inline Tensor new_numbers(const Tensor& like, int64_t n, ScalarType dtype) {
  constexpr int64_t kStride = 1;
  return new_tensor(like, n == kNoDimension ? 0 : 1, &n, &kStride, dtype);
}

}  // namespace fastfocal
