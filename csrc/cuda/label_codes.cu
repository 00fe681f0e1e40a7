// Labels -> codes: resolves the caller's conventions and counts, in one pass. A label that is none of the three kinds is a
// device-side assertion.
#include <cassert>

#include "kernels.h"
#include "launch.h"

namespace fastfocal::cuda {
namespace {

__device__ __forceinline__ int64_t label_at(const LabelCall& call, const void* labels, int64_t at) {
  switch (call.type) {
    case LabelType::kInt64:
      return static_cast<const int64_t*>(labels)[at];
    case LabelType::kInt32:
      return static_cast<const int32_t*>(labels)[at];
    case LabelType::kInt16:
      return static_cast<const int16_t*>(labels)[at];
    case LabelType::kInt8:
      return static_cast<const int8_t*>(labels)[at];
    default:
      return static_cast<const uint8_t*>(labels)[at];
  }
}

__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ LabelCall call) {
  const int64_t last = first_item(call.chunks, blockIdx.x + 1);
  for (int64_t index = first_item(call.chunks, blockIdx.x); index < last; ++index) {
    const Chunk chunk = chunk_at(call, index);
    const LabelLevel& level = call.level[chunk.level];
    const int64_t base = level.first_anchor + chunk.image * level.anchors;
    int positives = 0, ignored = 0;
    for (int64_t m = chunk.begin + threadIdx.x; m < chunk.end; m += kThreads) {
      const int64_t label = label_at(call, level.labels, chunk.image * level.image_stride + m * level.anchor_stride);
      const int64_t code = code_of(call.rule, label);
      assert(code != kInvalid && "targets: a label is neither a class, nor background_index, nor ignore_index");
      positives += code >= 0;
      ignored += code == kIgnored;
      const int64_t at = base + code_position(level, m);
      if (call.wide_codes) {
        static_cast<int32_t*>(call.codes)[at] = int32_t(code);
      } else {
        static_cast<int16_t*>(call.codes)[at] = int16_t(code);
      }
    }
    positives = block_sum(positives);
    ignored = block_sum(ignored);
    if (threadIdx.x == 0) {  // integers: the order of these additions does not matter
      auto* counts = reinterpret_cast<unsigned long long*>(call.counts) + 2 * chunk.image;
      if (positives != 0) atomicAdd(counts, static_cast<unsigned long long>(positives));
      if (ignored != 0) atomicAdd(counts + 1, static_cast<unsigned long long>(ignored));
    }
  }
}

__global__ void __launch_bounds__(kThreads) count_kernel(const CountCall call, int64_t divisors) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < divisors) call.divisor[i] = divisor_of(call, i);
}

}  // namespace

void encode(const LabelCall& call, const Context& context) {
  static std::atomic<int> known[kMaxDevices];
  const int64_t resident = resident_blocks(encode_kernel, known, context);
  launch(encode_kernel, call.chunks < resident ? call.chunks : resident, context, call);
}

void count(const CountCall& call, const Context& context) {
  const int64_t divisors = call.count == Count::kPositivesPerImage ? call.images : 1;
  if (divisors > 0) launch(count_kernel, (divisors + kThreads - 1) / kThreads, context, call, divisors);
}

}  // namespace fastfocal::cuda
