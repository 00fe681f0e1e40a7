// The operator label_codes on the CPU: every label is checked before any is used.
#include <sstream>
#include <stdexcept>

#include "device.h"
#include "focal_loss.h"

namespace fastfocal {
namespace {

int64_t label_at(const LabelCall& call, const Chunk& chunk, int64_t m) {
  const LabelLevel& level = call.level[chunk.level];
  const int64_t at = chunk.image * level.image_stride + m * level.anchor_stride;
  switch (call.type) {
    case LabelType::kInt64:
      return static_cast<const int64_t*>(level.labels)[at];
    case LabelType::kInt32:
      return static_cast<const int32_t*>(level.labels)[at];
    case LabelType::kInt16:
      return static_cast<const int16_t*>(level.labels)[at];
    case LabelType::kInt8:
      return static_cast<const int8_t*>(level.labels)[at];
    default:
      return static_cast<const uint8_t*>(level.labels)[at];
  }
}

// Names the first invalid label of a chunk that has one.
[[noreturn]] void reject(const LabelCall& call, const Chunk& chunk) {
  int64_t m = chunk.begin;
  while (code_of(call.rule, label_at(call, chunk, m)) != kInvalid) ++m;
  const int64_t first = call.rule.background == 0 ? 1 : 0;
  std::ostringstream message;
  message << "targets[" << call.first_level + chunk.level << "]: label " << label_at(call, chunk, m) << " at image "
          << chunk.image << ", anchor " << m << "; expected one of the classes " << first << ".."
          << call.rule.classes - 1 + first << ", background_index " << call.rule.background << " or ignore_index "
          << call.rule.ignore;
  throw std::invalid_argument(message.str());  // reaches Python as a ValueError
}

}  // namespace

void Cpu::encode(const LabelCall& call, const Tensor&) { encode_labels(call, chunk_encoder()); }

// Labels that take longer than it does to wake a thread (about 6 microseconds).
constexpr int64_t kLabelsPerThread = 4 * kChunkAnchors;

void encode_labels(const LabelCall& call, EncodeChunk encode_chunk) {
  std::vector<ChunkCount> counts(static_cast<size_t>(call.chunks));
  int64_t labels = 0;
  for (int l = 0; l < call.count; ++l) labels += call.images * call.level[l].anchors;
  const int64_t shares = labels < 2 * kLabelsPerThread ? 1 : labels / kLabelsPerThread;
  torch::stable::parallel_for(0, call.chunks, (call.chunks + shares - 1) / shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) counts[static_cast<size_t>(i)] = encode_chunk(call, chunk_at(call, i));
  });
  for (int64_t i = 0; i < call.chunks; ++i) {
    const Chunk chunk = chunk_at(call, i);
    const ChunkCount& count = counts[static_cast<size_t>(i)];
    if (count.invalid > 0) reject(call, chunk);
    call.counts[2 * chunk.image] += count.positives;
    call.counts[2 * chunk.image + 1] += count.ignored;
  }
}

void Cpu::count(const CountCall& call, const Tensor&) {
  const int64_t divisors = call.count == Count::kPositivesPerImage ? call.images : 1;
  for (int64_t i = 0; i < divisors; ++i) call.divisor[i] = divisor_of(call, i);
}

}  // namespace fastfocal
