// One call of a kernel: everything its tiles share. Filled by operators.h, read by cpu/ and cuda/; a CUDA kernel takes it by
// value.
#pragma once

#include "focal_math.h"
#include "levels.h"

namespace fastfocal {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

enum class Reduction : int32_t { kSum = 0, kLevel = 1, kImage = 2, kNone = 3 };

enum class Output : int32_t {
  kLoss,             // partial sums of the loss
  kLossAndGradient,  // these, and the gradient into Level::out
  kGradient,         // the gradient alone
  kElementLoss,      // the loss of each logit into Level::out
};

// Which member of the family.
enum class Family : int32_t { kFocalLoss = 0, kFocalLossStar = 1 };

struct Call {
  Levels levels;
  Output output;
  DType dtype;
  Reduction reduction;
  int32_t first_level;  // of the call's levels, when there are more than one launch takes

  bool soft;               // targets: Level::soft_targets, else the codes
  bool incoming_elements;  // Level::incoming holds an incoming gradient for each logit
  const void* codes;       // [level][image][anchor], numbered as Place::anchor is; int16, or int32 when wide_codes
  bool wide_codes;
  bool wide_soft_targets;  // float targets beside 16-bit logits
  // Accumulation type: float, or double for float64 logits.
  const void* anchor_weight;  // as the codes; null: 1
  const void* class_weights;  // [2][K], of positives and of negatives; null: the two numbers below
  double positive_weight, negative_weight;
  Family family;
  Parameters parameters;

  const double* divisor;  // 1 or N of them; null: 1
  int64_t divisors;
  const void* incoming;  // accumulation type; the gradient of a reduced loss; null: 1
  int64_t incoming_stride;

  double* partial;  // [tiles], weighted and scaled
};

template <class S>
FASTFOCAL_HD double incoming_scale(const void* incoming, int64_t stride, Reduction reduction, int level, int64_t image) {
  const int64_t at = reduction == Reduction::kLevel ? level : reduction == Reduction::kImage ? image : 0;
  return incoming == nullptr ? 1.0 : double(static_cast<const S*>(incoming)[at * stride]);
}

// A gradient of exactly 0 stays so, whatever number comes in: infinity and NaN too.
template <class S>
FASTFOCAL_HD S times_incoming(S gradient, S incoming) {
  return gradient == S(0) ? gradient : gradient * incoming;
}

// Beside an incoming gradient that is no number, what rounds to 0 in the logits' dtype counts as 0, as it does where the gradient
// was saved: half the least number of that dtype.
template <class T>
FASTFOCAL_HD float rounds_to_zero() {
  return T::kIsBFloat16 ? 0x1p-134f : 0x1p-25f;
}
template <>
FASTFOCAL_HD float rounds_to_zero<float>() {
  return 0.0f;
}
template <>
FASTFOCAL_HD float rounds_to_zero<double>() {
  return 0.0f;
}

// The loss' scale alone, and the incoming gradient that a recomputed one is to be multiplied by.
FASTFOCAL_HD double own_scale(const Call& call, int level, int64_t image) {
  const double divisor = call.divisor == nullptr ? 1.0 : call.divisor[call.divisors == 1 ? 0 : image];
  return call.levels.level[level].scale / divisor;
}
template <class S>
FASTFOCAL_HD double incoming_of(const Call& call, int level, int64_t image) {
  return incoming_scale<S>(call.incoming, call.incoming_stride, call.reduction, call.first_level + level, image);
}

// Usually both are one factor of the terms. But where that is no number, or so large that weights might make it none, 0 times it
// would be NaN: then the finished gradient is multiplied by the incoming one, as it is when it was saved.
FASTFOCAL_HD bool is_one_factor(double scale, double incoming) {
  return fabs(incoming) < 0x1p50 && fabs(scale * incoming) < 0x1p100;
}

// What every term of one image of one level is multiplied by,
template <class S>
FASTFOCAL_HD double scale_of(const Call& call, int level, int64_t image) {
  const double scale = own_scale(call, level, image), incoming = incoming_of<S>(call, level, image);
  return is_one_factor(scale, incoming) ? scale * incoming : scale;
}

// and what its finished gradient is, given that scale.
template <class S>
FASTFOCAL_HD double factor_of_finished(const Call& call, int level, int64_t image, double scale) {
  if (call.incoming == nullptr) return 1.0;
  const double incoming = incoming_of<S>(call, level, image);
  if (fabs(incoming) < 0x1p50 && fabs(scale) < 0x1p50) return 1.0;  // alone, the scale would have been 2^50 or more
  return is_one_factor(own_scale(call, level, image), incoming) ? 1.0 : incoming;
}

// The classes' weights.
template <class S>
FASTFOCAL_HD S positive_weight(const Call& call, int k) {
  return call.class_weights == nullptr ? S(call.positive_weight) : static_cast<const S*>(call.class_weights)[k];
}
template <class S>
FASTFOCAL_HD S negative_weight(const Call& call, int k) {
  return call.class_weights == nullptr ? S(call.negative_weight)
                                       : static_cast<const S*>(call.class_weights)[int64_t(call.levels.classes.divisor) + k];
}

FASTFOCAL_HD int code_at(const Call& call, int64_t anchor) {
  return call.wide_codes ? static_cast<const int32_t*>(call.codes)[anchor]
                         : int(static_cast<const int16_t*>(call.codes)[anchor]);
}

// Two class weights, nothing per anchor or per element.
FASTFOCAL_HD bool has_constant_weights(const Call& call) {
  return call.anchor_weight == nullptr && call.class_weights == nullptr && !call.incoming_elements &&
         call.output != Output::kElementLoss;
}

// The common case has kernels of its own: labels, constant weights, no smoothing.
FASTFOCAL_HD bool is_plain(const Call& call) {
  return has_constant_weights(call) && !call.soft && !call.wide_codes && call.parameters.label_smoothing == 0 &&
         call.dtype != DType::kFloat64;
}

// ---------------------------------------------------------------------------------------------------------------------
// Labels -> codes

enum class LabelType : int32_t { kInt64, kInt32, kInt16, kInt8, kUInt8 };

constexpr int kChunkAnchors = 4096;

struct LabelLevel {
  const void* labels;
  int64_t image_stride, anchor_stride;  // in elements
  int64_t first_anchor, anchors;
  Divisor per_cell;  // anchors of a cell where the codes are written [a][cell] and the labels are read [cell][a]; else 1
  int64_t cells;     // that many cells; all anchors where the order is kept
  Span chunks;
};

// The caller's label convention: with background 0 the classes are the labels 1..K, else 0..K-1.
struct LabelRule {
  int64_t classes, background, ignore;
};

// The code of a label, in its one place; kInvalid for a label that is none of the three kinds.
constexpr int64_t kInvalid = -3;
FASTFOCAL_HD int64_t code_of(const LabelRule& rule, int64_t label) {
  const uint64_t k = uint64_t(label) - (rule.background == 0 ? 1 : 0);  // below 0 it wraps beyond every class
  int64_t code = k < uint64_t(rule.classes) ? int64_t(k) : kInvalid;
  code = label == rule.background ? kBackground : code;
  return label == rule.ignore ? kIgnored : code;
}

struct LabelCall {
  int32_t count;  // levels
  int32_t first_level;
  LabelType type;
  bool wide_codes;
  int64_t images;
  LabelRule rule;
  int64_t chunks;
  void* codes;
  int64_t* counts;  // [image][2]: positives, ignored; added to
  LabelLevel level[kMaxLevels];
};

struct Chunk {
  int32_t level;
  int64_t image, begin, end;  // anchors of the image, in the labels' order
};

FASTFOCAL_HD Chunk chunk_at(const LabelCall& call, int64_t index) {
  const Piece piece = piece_at(call.count, [&](int l) { return call.level[l].chunks; }, index);
  const int64_t begin = piece.index * kChunkAnchors, end = begin + kChunkAnchors;
  const int64_t anchors = call.level[piece.level].anchors;
  return {piece.level, piece.image, begin, end < anchors ? end : anchors};
}

// Where the code of the m-th label of an image goes.
FASTFOCAL_HD int64_t code_position(const LabelLevel& level, int64_t m) {
  if (level.per_cell.divisor == 1) return m;
  const int64_t cell = level.per_cell.of(uint32_t(m));
  return (m - cell * level.per_cell.divisor) * level.cells + cell;
}

// What label_codes counts; the operator's `count` argument.
enum class Count : int64_t { kNothing = 0, kPositives = 1, kPositivesPerImage = 2, kLogits = 3 };

struct CountCall {
  const int64_t* counts;  // [image][2]
  double* divisor;        // 1, or one per image
  int64_t images, classes;
  int64_t anchors;  // of all levels and images
  Count count;
  double minimum;
};

// The i-th divisor: max(minimum, the count).
FASTFOCAL_HD double divisor_of(const CountCall& call, int64_t i) {
  const bool per_image = call.count == Count::kPositivesPerImage;
  int64_t positives = 0, ignored = 0;
  for (int64_t n = per_image ? i : 0; n < (per_image ? i + 1 : call.images); ++n) {
    positives += call.counts[2 * n];
    ignored += call.counts[2 * n + 1];
  }
  const double count =
      call.count == Count::kLogits ? double(call.anchors - ignored) * double(call.classes) : double(positives);
  return count > call.minimum ? count : call.minimum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Finished gradients times the incoming one

struct ScaleLevel {
  const void* source;
  void* target;
  int64_t image_logits;
  Span pieces;  // of kTileLogits
};

struct ScaleCall {
  int32_t count;  // levels
  int32_t first_level;
  DType dtype;
  Reduction reduction;
  int64_t images;
  int64_t pieces;
  const void* incoming;
  int64_t incoming_stride;
  ScaleLevel level[kMaxLevels];
};

struct ScalePiece {
  int32_t level;
  int64_t image, begin, end;  // logits of the level
};

FASTFOCAL_HD ScalePiece scale_piece_at(const ScaleCall& call, int64_t index) {
  const Piece piece = piece_at(call.count, [&](int l) { return call.level[l].pieces; }, index);
  const int64_t image_logits = call.level[piece.level].image_logits;
  const int64_t begin = piece.index * kTileLogits, end = begin + kTileLogits;
  const int64_t base = piece.image * image_logits;
  return {piece.level, piece.image, base + begin, base + (end < image_logits ? end : image_logits)};
}

}  // namespace fastfocal
