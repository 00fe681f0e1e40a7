// Packing labels on the CPU: one chunk, for one instruction set (compiled as tiles.h is). Checks every label, resolves the caller's
// convention and counts, in one pass.
#pragma once

#include "isa.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// `count` labels `step` apart, to packed ones that lie side by side. Without a branch: for the compiler to make vectors of, and
// because no processor guesses the labels of a segmentation.
template <bool kDense, class L, class P>
ChunkCount pack_run(const LabelRule rule, const L* labels, int64_t step, int64_t count, P* packed) {
  int64_t positives = 0, ignored = 0, invalid = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t label = packed_label(rule, static_cast<int64_t>(labels[kDense ? i : i * step]));
    packed[i] = static_cast<P>(label);
    positives += is_positive(rule, label);
    ignored += label == kIgnored;
    invalid += label == kInvalid;
  }
  return {positives, ignored, invalid};
}

// Beside that, of label m, m + per_cell, ...: few are positive, so they are looked up afterwards.
template <class P>
double sum_of_scores(const PackLabelsParams& params, const Chunk& chunk, int64_t m, const P* packed, int64_t count) {
  const LabelLevel& level = params.level[chunk.level];
  const int64_t first = packed - static_cast<const P*>(params.packed_labels), per_cell = level.per_cell.divisor;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    if (packed[i] >= 0) sum += score_of_label(params, level, chunk.image, m + i * per_cell, first + i);
  return sum;
}

template <class L, class P>
ChunkCount pack_runs(const PackLabelsParams& params, const Chunk& chunk) {
  const LabelLevel& level = params.level[chunk.level];
  const int64_t per_cell = level.per_cell.divisor, step = level.anchor_stride * per_cell;  // from a cell to the next
  const L* const labels = static_cast<const L*>(level.labels) + chunk.image * level.image_stride;
  P* const packed = static_cast<P*>(params.packed_labels) + level.first_anchor + chunk.image * level.anchors;
  ChunkCount sum = {0, 0, 0};
  double scores = 0;
  // One anchor shape after another: its packed labels are one run.
  for (int64_t m = chunk.begin; m < chunk.begin + per_cell && m < chunk.end; ++m) {
    const int64_t count = (chunk.end - m + per_cell - 1) / per_cell;
    const L* const from = labels + m * level.anchor_stride;
    P* const to = packed + packed_position(level, m);
    const ChunkCount run =
        step == 1 ? pack_run<true>(params.rule, from, step, count, to) : pack_run<false>(params.rule, from, step, count, to);
    sum.positives += run.positives;
    sum.ignored += run.ignored;
    sum.invalid += run.invalid;
    if (params.score_sums != nullptr && run.positives > 0) scores += sum_of_scores(params, chunk, m, to, count);
  }
  if (params.score_sums != nullptr) params.score_sums[chunk.index] = scores;
  return sum;
}

ChunkCount pack_chunk(const PackLabelsParams& params, const Chunk& chunk) {
  return with_label_dtype(params.type, [&](auto label) {
    using L = type_of<decltype(label)>;
    return params.wide_labels ? pack_runs<L, int32_t>(params, chunk) : pack_runs<L, int16_t>(params, chunk);
  });
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
