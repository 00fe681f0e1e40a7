// A CUDA device as a Device of the operators. The kernels' files (*.cu) see only kernels.h, no torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../allocation.h"
#include "../operators.h"
#include "context.h"
#include "kernels.h"

namespace fastfocal::cuda {

struct Cuda {
  struct Scratch {  // from torch's allocator, which knows the stream
    Scratch(const Tensor& like, int64_t n, bool zero) : memory_(new_numbers(like, n, ScalarType::Long)) {
      if (zero) torch::stable::zero_(memory_);
    }
    void* data() const { return memory_.mutable_data_ptr(); }

   private:
    Tensor memory_;
  };

  static void run(const KernelParams& params, const Tensor& like) { cuda::run(params, Context(like)); }
  static void reduce(const KernelParams& params, void* loss, int64_t size, bool add, const Tensor& like) {
    cuda::reduce(params, loss, size, add, Context(like));
  }
  static void fresh(void*, size_t) {}
  static void pack_labels(const PackLabelsParams& params, const Tensor& like) { cuda::pack_labels(params, Context(like)); }
  static void count(const CountParams& params, const Tensor& like) { cuda::count(params, Context(like)); }
  static void scale(const ScaleParams& params, const Tensor& like) { cuda::scale(params, Context(like)); }
};

inline void implement_operators(torch::stable::detail::StableLibrary& m) { Operators<Cuda>::implement(m); }

}  // namespace fastfocal::cuda
