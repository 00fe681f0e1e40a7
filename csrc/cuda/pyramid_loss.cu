// The operator pyramid_loss on CUDA: which kernel runs a call, and the last step of its sums.
#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

// One block a number of the loss: it adds the partial sums that belong to it, in an order fixed by their numbers.
template <class S>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ KernelParams params, S* loss, bool add) {
  const int64_t at = blockIdx.x;
  double sum = 0;
  for (int l = 0; l < params.levels.count; ++l) {
    if (params.reduction == Reduction::kLevel && params.first_level + l != at) continue;
    const Span tiles = params.levels.level[l].tiles;
    const bool one_image = params.reduction == Reduction::kImage;
    const int64_t begin = tiles.first + (one_image ? at * tiles.per_image : 0);
    const int64_t end = begin + (one_image ? 1 : params.levels.images) * tiles.per_image;
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) sum += params.partial[t];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) loss[at] = S(sum + (add ? double(loss[at]) : 0.0));
}

}  // namespace

void run(const KernelParams& params, const Context& context) {
  with_dtype(params.dtype, [&](auto logit) {
    using T = type_of<decltype(logit)>;
    if (takes_anchors(params.loss.kind)) return run_softmax<T>(params, context);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (is_fast(params)) return run_fast<T>(params, context);
    }
    run_generic<T>(params, context);
  });
}

void reduce(const KernelParams& params, void* loss, int64_t size, bool add, const Context& context) {
  if (size == 0) return;
  with_dtype(params.dtype, [&](auto logit) {
    using S = Accumulation<type_of<decltype(logit)>>;
    launch(reduce_kernel<S>, size, context, params, static_cast<S*>(loss), add);
  });
}

}  // namespace fastfocal::cuda
