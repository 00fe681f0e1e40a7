// A CUDA device as a Device of operators.h. The kernels' files (*.cu) see only call.h and context.h, no torch.
#pragma once

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

  static void run(const Call& call, const Tensor& like) { cuda::run(call, Context(like)); }
  static void reduce(const Call& call, void* loss, int64_t size, bool add, const Tensor& like) {
    cuda::reduce(call, loss, size, add, Context(like));
  }
  static void fresh(void*, size_t) {}
  static void encode(const LabelCall& call, const Tensor& like) { cuda::encode(call, Context(like)); }
  static void count(const CountCall& call, const Tensor& like) { cuda::count(call, Context(like)); }
  static void scale(const ScaleCall& call, const Tensor& like) { cuda::scale(call, Context(like)); }
};

inline void implement_operators(torch::stable::detail::StableLibrary& m) { Operators<Cuda>::implement(m); }

}  // namespace fastfocal::cuda
