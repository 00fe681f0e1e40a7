// The label convention, in its one place: what a label of the caller's means, how it is packed, and where it goes.
#pragma once

#include "dispatch.h"
#include "levels.h"

namespace fastfocal {

// A packed label is what an anchor is once the caller's convention is resolved: a class 0..K-1, or one of these.
constexpr int kBackground = -1;
constexpr int kIgnored = -2;
constexpr int64_t kInvalid = -3;  // of a label that is none of the three kinds; never stored

// The caller's convention: with background 0 the classes are the labels 1..K, else 0..K-1. Where the background is a class, or
// there is none, they are 0..K-1, and what is packed is only not counted as positive.
struct LabelRule {
  int64_t classes;
  int64_t first;       // the label of the first class
  int64_t background;  // the label that is no class; ignore where there is none such
  int64_t ignore;
  int64_t uncounted;  // the class that is not positive; kBackground: each one is
};

inline LabelRule label_rule(int64_t classes, int64_t background, int64_t ignore, bool background_is_class) {
  if (!background_is_class) return {classes, background == 0 ? 1 : 0, background, ignore, kBackground};
  const bool given = background >= 0 && background < classes;
  return {classes, 0, ignore, ignore, given ? background : kBackground};
}

FASTFOCAL_HD int64_t packed_label(const LabelRule& rule, int64_t label) {
  const uint64_t k = uint64_t(label) - uint64_t(rule.first);  // below 0 it wraps beyond every class
  int64_t packed = k < uint64_t(rule.classes) ? int64_t(k) : kInvalid;
  packed = label == rule.background ? kBackground : packed;
  return label == rule.ignore ? kIgnored : packed;
}

// A packed label among `classes` of an anchor's classes, from `first` on: any other class is background to them.
FASTFOCAL_HD int label_within(int packed, int first, uint32_t classes) {
  if (packed < 0) return packed;
  return uint32_t(packed - first) < classes ? packed - first : kBackground;
}

FASTFOCAL_HD bool is_positive(const LabelRule& rule, int64_t packed) { return packed >= 0 && packed != rule.uncounted; }

constexpr int kChunkAnchors = 4096;  // labels are packed in chunks, which never leave an image

inline int64_t chunks_of(int64_t anchors) { return (anchors + kChunkAnchors - 1) / kChunkAnchors; }

// The labels of one level.
struct LabelLevel {
  const void* labels;
  int64_t image_stride, anchor_stride;         // in elements
  int64_t first_anchor, first_score, anchors;  // as in Level
  Divisor per_cell;  // anchors of a cell where packed labels are written [a][cell] and labels are read [cell][a]; else 1
  int64_t cells;     // that many cells; all anchors where the order is kept
  Span chunks;
};

FASTFOCAL_HD int64_t label_at(const LabelLevel& level, LabelType type, int64_t image, int64_t m) {
  const int64_t at = image * level.image_stride + m * level.anchor_stride;
  return with_label_dtype(type, [&](auto label) {
    return static_cast<int64_t>(static_cast<const type_of<decltype(label)>*>(level.labels)[at]);
  });
}

// Where the m-th label of an image goes.
FASTFOCAL_HD int64_t packed_position(const LabelLevel& level, int64_t m) {
  if (level.per_cell.divisor == 1) return m;
  const int64_t cell = level.per_cell.of(uint32_t(m));
  return (m - cell * level.per_cell.divisor) * level.cells + cell;
}

}  // namespace fastfocal
