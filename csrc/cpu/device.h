// The CPU as a Device of the operators.
#pragma once

#include <cstdlib>
#include <memory>

#include "../allocation.h"
#include "../kernel_params.h"

namespace fastfocal {

struct Cpu {
  struct Scratch {  // not a tensor: making one goes through the dispatcher, a microsecond or two
    Scratch(const Tensor&, int64_t n, bool) : memory_(std::calloc(static_cast<size_t>(n > 0 ? n : 1), 8), std::free) {
      if (memory_ == nullptr) out_of_memory(8 * n, aoti_torch_device_type_cpu(), -1, nullptr);
    }
    void* data() const { return memory_.get(); }

   private:
    std::unique_ptr<void, void (*)(void*)> memory_;
  };

  static void run(const KernelParams& params, const Tensor& like);
  static void reduce(const KernelParams& params, void* loss, int64_t size, bool add, const Tensor& like);
  static void fresh(void* memory, size_t bytes);
  static void pack_labels(const PackLabelsParams& params, const Tensor& like);
  static void count(const CountParams& params, const Tensor& like);
  static void scale(const ScaleParams& params, const Tensor& like);
};

}  // namespace fastfocal
