// Labels -> codes on the CPU: one chunk, for one instruction set. Compiled as focal_tile.h is. Checks every label, resolves the
// caller's convention and counts, in one pass.
#pragma once

#include "focal_loss.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

// `count` labels `step` apart, to codes that lie side by side. Without a branch: for the compiler to make vectors of, and because
// no processor guesses the labels of a segmentation.
template <bool kDense, class L, class C>
ChunkCount encode_run(const LabelRule rule, const L* labels, int64_t step, int64_t count, C* codes) {
  int64_t positives = 0, ignored = 0, invalid = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = code_of(rule, static_cast<int64_t>(labels[kDense ? i : i * step]));
    codes[i] = static_cast<C>(code);
    positives += code >= 0;
    ignored += code == kIgnored;
    invalid += code == kInvalid;
  }
  return {positives, ignored, invalid};
}

template <class L, class C>
ChunkCount encode(const LabelCall& call, const Chunk& chunk) {
  const LabelLevel& level = call.level[chunk.level];
  const int64_t per_cell = level.per_cell.divisor, step = level.anchor_stride * per_cell;  // from a cell to the next
  const L* const labels = static_cast<const L*>(level.labels) + chunk.image * level.image_stride;
  C* const codes = static_cast<C*>(call.codes) + level.first_anchor + chunk.image * level.anchors;
  ChunkCount sum = {0, 0, 0};
  // One anchor shape after another: its codes are one run.
  for (int64_t m = chunk.begin; m < chunk.begin + per_cell && m < chunk.end; ++m) {
    const int64_t count = (chunk.end - m + per_cell - 1) / per_cell;
    const L* const from = labels + m * level.anchor_stride;
    C* const to = codes + code_position(level, m);
    const ChunkCount run =
        step == 1 ? encode_run<true>(call.rule, from, step, count, to) : encode_run<false>(call.rule, from, step, count, to);
    sum.positives += run.positives;
    sum.ignored += run.ignored;
    sum.invalid += run.invalid;
  }
  return sum;
}

template <class L>
ChunkCount encode(const LabelCall& call, const Chunk& chunk) {
  return call.wide_codes ? encode<L, int32_t>(call, chunk) : encode<L, int16_t>(call, chunk);
}

ChunkCount encode_chunk(const LabelCall& call, const Chunk& chunk) {
  switch (call.type) {
    case LabelType::kInt64:
      return encode<int64_t>(call, chunk);
    case LabelType::kInt32:
      return encode<int32_t>(call, chunk);
    case LabelType::kInt16:
      return encode<int16_t>(call, chunk);
    case LabelType::kInt8:
      return encode<int8_t>(call, chunk);
    default:
      return encode<uint8_t>(call, chunk);
  }
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
