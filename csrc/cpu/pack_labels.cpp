// The operator pack_labels on the CPU: every label is checked before any is used.
#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "device.h"
#include "isa.h"

namespace fastfocal {
namespace {

// Names the first invalid label of a chunk that has one.
[[noreturn]] void reject(const PackLabelsParams& params, const Chunk& chunk) {
  const LabelLevel& level = params.level[chunk.level];
  int64_t m = chunk.begin, label;
  while (packed_label(params.rule, label = label_at(level, params.type, chunk.image, m)) != kInvalid) ++m;
  const LabelRule& rule = params.rule;
  std::ostringstream message;
  message << "targets[" << params.first_level + chunk.level << "]: label " << label << " at image " << chunk.image
          << ", anchor " << m << "; expected one of the classes " << rule.first << ".." << rule.classes - 1 + rule.first;
  if (rule.background != rule.ignore) message << ", background_index " << rule.background;
  message << " or ignore_index " << rule.ignore;
  throw std::invalid_argument(message.str());  // reaches Python as a ValueError
}

}  // namespace

void Cpu::pack_labels(const PackLabelsParams& params, const Tensor&) { pack_labels_with(chunk_packer(), params); }

// Labels that take longer than it does to wake a thread (about 6 microseconds).
constexpr int64_t kLabelsPerThread = 4 * kChunkAnchors;

void pack_labels_with(PackChunk pack_chunk, const PackLabelsParams& params) {
  std::vector<ChunkCount> counts(static_cast<size_t>(params.chunks));
  int64_t labels = 0;
  for (int l = 0; l < params.count; ++l) labels += params.images * params.level[l].anchors;
  const int64_t shares = labels < 2 * kLabelsPerThread ? 1 : labels / kLabelsPerThread;
  torch::stable::parallel_for(0, params.chunks, (params.chunks + shares - 1) / shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) counts[static_cast<size_t>(i)] = pack_chunk(params, chunk_at(params, i));
  });
  for (int64_t i = 0; i < params.chunks; ++i) {
    const Chunk chunk = chunk_at(params, i);
    const ChunkCount& count = counts[static_cast<size_t>(i)];
    if (count.invalid > 0) reject(params, chunk);
    params.counts[2 * chunk.image] += count.positives;
    params.counts[2 * chunk.image + 1] += count.ignored;
  }
}

void Cpu::count(const CountParams& params, const Tensor&) {
  if (params.count == Count::kScores) {
    double sum = 0;
    for (int64_t i = 0; i < params.chunks; ++i) sum += params.score_sums[i];
    *params.divisor = at_least(params.minimum, sum);
    return;
  }
  const int64_t divisors = is_per_image(params.count) ? params.images : 1;
  for (int64_t i = 0; i < divisors; ++i) params.divisor[i] = divisor_of(params, i);
}

}  // namespace fastfocal
