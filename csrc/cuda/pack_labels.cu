// The operator pack_labels on CUDA: resolves the caller's convention and counts, in one pass. A label that is none of the three
// kinds is a device-side assertion.
#include <cassert>

#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) pack_labels_kernel(const __grid_constant__ PackLabelsParams params) {
  const int64_t last = first_item(params.chunks, blockIdx.x + 1);
  for (int64_t index = first_item(params.chunks, blockIdx.x); index < last; ++index) {
    const Chunk chunk = chunk_at(params, index);
    const LabelLevel& level = params.level[chunk.level];
    const int64_t base = level.first_anchor + chunk.image * level.anchors;
    int positives = 0, ignored = 0;
    double scores = 0;
    for (int64_t m = chunk.begin + threadIdx.x; m < chunk.end; m += kThreads) {
      const int64_t packed = packed_label(params.rule, label_at(level, params.type, chunk.image, m));
      assert(packed != kInvalid && "targets: a label is neither a class, nor background_index, nor ignore_index");
      positives += is_positive(params.rule, packed);
      ignored += packed == kIgnored;
      const int64_t at = base + packed_position(level, m);
      if (params.score_sums != nullptr && packed >= 0) scores += score_of_label(params, level, chunk.image, m, at);
      if (params.wide_labels) {
        static_cast<int32_t*>(params.packed_labels)[at] = int32_t(packed);
      } else {
        static_cast<int16_t*>(params.packed_labels)[at] = int16_t(packed);
      }
    }
    positives = block_sum(positives);
    ignored = block_sum(ignored);
    if (params.score_sums != nullptr) {  // no float atomics: their order is another one each time
      scores = block_sum(scores);
      if (threadIdx.x == 0) params.score_sums[index] = scores;
    }
    if (threadIdx.x == 0) {  // integers: the order of these additions does not matter
      auto* counts = reinterpret_cast<unsigned long long*>(params.counts) + 2 * chunk.image;
      if (positives != 0) atomicAdd(counts, static_cast<unsigned long long>(positives));
      if (ignored != 0) atomicAdd(counts + 1, static_cast<unsigned long long>(ignored));
    }
  }
}

__global__ void __launch_bounds__(kThreads) count_kernel(const CountParams params, int64_t divisors) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < divisors) params.divisor[i] = divisor_of(params, i);
}

// One block: the chunks' sums in an order fixed by their numbers.
__global__ void __launch_bounds__(kThreads) sum_scores_kernel(const CountParams params) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < params.chunks; i += kThreads) sum += params.score_sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *params.divisor = at_least(params.minimum, sum);
}

}  // namespace

void pack_labels(const PackLabelsParams& params, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(pack_labels_kernel, known, context);
  launch(pack_labels_kernel, params.chunks < resident ? params.chunks : resident, context, params);
}

void count(const CountParams& params, const Context& context) {
  if (params.count == Count::kScores) return launch(sum_scores_kernel, 1, context, params);
  const int64_t divisors = is_per_image(params.count) ? params.images : 1;
  if (divisors > 0) launch(count_kernel, (divisors + kThreads - 1) / kThreads, context, params, divisors);
}

}  // namespace fastfocal::cuda
