// Which kernel runs a call, and the last step of its sums.
#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

// One block a number of the loss: it adds the partial sums that belong to it, in an order fixed by their numbers.
template <class S>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ Call call, S* loss, bool add) {
  const int64_t at = blockIdx.x;
  double sum = 0;
  for (int l = 0; l < call.levels.count; ++l) {
    if (call.reduction == Reduction::kLevel && call.first_level + l != at) continue;
    const Span tiles = call.levels.level[l].tiles;
    const bool one_image = call.reduction == Reduction::kImage;
    const int64_t begin = tiles.first + (one_image ? at * tiles.per_image : 0);
    const int64_t end = begin + (one_image ? 1 : call.levels.images) * tiles.per_image;
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) sum += call.partial[t];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) loss[at] = S(sum + (add ? double(loss[at]) : 0.0));
}

}  // namespace

void run(const Call& call, const Context& context) {
  const bool plain = is_plain(call);
  switch (call.dtype) {
    case DType::kFloat32:
      return plain ? run_plain_float32(call, context) : run_general_float32(call, context);
    case DType::kFloat16:
      return plain ? run_plain_float16(call, context) : run_general_float16(call, context);
    case DType::kBFloat16:
      return plain ? run_plain_bfloat16(call, context) : run_general_bfloat16(call, context);
    case DType::kFloat64:
      return run_general_float64(call, context);
  }
}

void reduce(const Call& call, void* loss, int64_t size, bool add, const Context& context) {
  if (size == 0) return;
  if (call.dtype == DType::kFloat64) {
    launch(reduce_kernel<double>, size, context, call, static_cast<double*>(loss), add);
  } else {
    launch(reduce_kernel<float>, size, context, call, static_cast<float*>(loss), add);
  }
}

}  // namespace fastfocal::cuda
