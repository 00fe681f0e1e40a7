// What kernels are given, as plain structs: everything that the tiles (chunks, pieces) of one call share. Filled by operators/,
// read by cpu/ and cuda/; a CUDA kernel takes it by value.
#pragma once

#include "dispatch.h"
#include "losses/registry.h"
#include "packed_labels.h"

namespace fastfocal {

enum class Reduction : int32_t { kSum = 0, kLevel = 1, kImage = 2, kNone = 3 };

enum class Output : int32_t {
  kLoss,             // partial sums of the loss
  kLossAndGradient,  // these, and the gradient into Level::out
  kGradient,         // the gradient alone
  kElementLoss,      // the loss of each logit into Level::out
  kSecond,           // partial sums of the gradient times Level::direction, and the gradient of these into Level::out
};

struct KernelParams {
  Levels levels;
  Output output;
  DType dtype;
  Reduction reduction;
  int32_t first_level;  // of the call's levels, when there are more than one launch takes

  bool soft;                  // targets: Level::soft_targets, else the packed labels
  bool incoming_elements;     // Level::incoming holds an incoming gradient for each logit
  const void* packed_labels;  // [level][image][anchor], numbered as Place::anchor is; int16, or int32 when wide_labels
  bool wide_labels;
  int32_t first_class;     // the packed label of the logits' class 0: they may be some of an anchor's classes
  bool wide_soft_targets;  // float targets beside 16-bit logits
  // Accumulation type: float, or double for float64 logits.
  const void* scores;         // of positives; null: 1
  const void* anchor_weight;  // as the packed labels; null: 1
  const void* class_weights;  // [2][K], of positives and of negatives; null: the two numbers below
  double positive_weight, negative_weight;
  bool scores_are_rows;  // of each image, of all levels in the caller's order; else as the packed labels
  int64_t score_image_stride;
  const uint8_t* class_mask;  // [image][class]: 0 where the class counts as ignored, or has no share; null: nowhere
  int64_t mask_image_stride, mask_class_stride;
  LossParams loss;

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
FASTFOCAL_HD double own_scale(const KernelParams& params, int level, int64_t image) {
  const double divisor = params.divisor == nullptr ? 1.0 : params.divisor[params.divisors == 1 ? 0 : image];
  return params.levels.level[level].scale / divisor;
}
template <class S>
FASTFOCAL_HD double incoming_of(const KernelParams& params, int level, int64_t image) {
  return incoming_scale<S>(params.incoming, params.incoming_stride, params.reduction, params.first_level + level, image);
}

// Usually both are one factor of the terms. But where that is no number, or so large that weights might make it none, 0 times it
// would be NaN: then the finished gradient is multiplied by the incoming one, as it is when it was saved.
FASTFOCAL_HD bool is_one_factor(double scale, double incoming) {
  return fabs(incoming) < 0x1p50 && fabs(scale * incoming) < 0x1p100;
}

// What every term of one image of one level is multiplied by,
template <class S>
FASTFOCAL_HD double scale_of(const KernelParams& params, int level, int64_t image) {
  const double scale = own_scale(params, level, image), incoming = incoming_of<S>(params, level, image);
  return is_one_factor(scale, incoming) ? scale * incoming : scale;
}

// and what its finished gradient is, given that scale.
template <class S>
FASTFOCAL_HD double factor_of_finished(const KernelParams& params, int level, int64_t image, double scale) {
  if (params.incoming == nullptr) return 1.0;
  const double incoming = incoming_of<S>(params, level, image);
  if (fabs(incoming) < 0x1p50 && fabs(scale) < 0x1p50) return 1.0;  // alone, the scale would have been 2^50 or more
  return is_one_factor(own_scale(params, level, image), incoming) ? 1.0 : incoming;
}

// The classes' weights.
template <class S>
FASTFOCAL_HD S positive_weight(const KernelParams& params, int k) {
  return params.class_weights == nullptr ? S(params.positive_weight) : static_cast<const S*>(params.class_weights)[k];
}
template <class S>
FASTFOCAL_HD S negative_weight(const KernelParams& params, int k) {
  return params.class_weights == nullptr
             ? S(params.negative_weight)
             : static_cast<const S*>(params.class_weights)[int64_t(params.levels.classes.divisor) + k];
}

// Which of the logits' classes an anchor has; that of others is background here.
FASTFOCAL_HD int packed_label_at(const KernelParams& params, int64_t anchor) {
  const int label = params.wide_labels ? static_cast<const int32_t*>(params.packed_labels)[anchor]
                                       : int(static_cast<const int16_t*>(params.packed_labels)[anchor]);
  return label_within(label, params.first_class, params.levels.classes.divisor);
}

// The score of an image's anchor, read where it is positive: few are, so that finding it may take some instructions.
template <class S>
FASTFOCAL_HD S score_of(const KernelParams& params, const Level& level, int64_t image, int64_t anchor) {
  if (params.scores == nullptr) return S(1);
  const int64_t at = params.scores_are_rows
                         ? image * params.score_image_stride + level.first_score + anchor_position(level, anchor)
                         : level.first_anchor + image * level.anchors + anchor;
  return static_cast<const S*>(params.scores)[at];
}

// The mask of an image's classes, or null.
FASTFOCAL_HD const uint8_t* class_mask_of(const KernelParams& params, int64_t image) {
  return params.class_mask == nullptr ? nullptr : params.class_mask + image * params.mask_image_stride;
}

// Two class weights, nothing per anchor, per element or per image and class.
FASTFOCAL_HD bool has_constant_weights(const KernelParams& params) {
  return params.anchor_weight == nullptr && params.class_weights == nullptr && params.class_mask == nullptr &&
         !params.incoming_elements && params.output != Output::kElementLoss && params.output != Output::kSecond;
}

// The common case has fast kernels: labels, constant weights, and a loss that has one.
FASTFOCAL_HD bool is_fast(const KernelParams& params) {
  return has_constant_weights(params) && !params.soft && !params.wide_labels && has_fast_kernel(params.loss) &&
         params.dtype != DType::kFloat64;
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing labels, and counting on the way

struct PackLabelsParams {
  int32_t count;  // levels
  int32_t first_level;
  LabelType type;
  bool wide_labels;
  int64_t images;
  LabelRule rule;
  int64_t chunks;
  void* packed_labels;
  int64_t* counts;  // [image][2]: positives, ignored; added to
  bool wide_scores, scores_are_rows;
  int64_t score_image_stride;
  const void* scores;  // double when wide_scores, else float; laid out as for KernelParams
  double* score_sums;  // [chunks], of positives; null: not wanted
  LabelLevel level[kMaxLevels];
};

// The score of the m-th label of an image, which is packed at `packed`.
FASTFOCAL_HD double score_of_label(const PackLabelsParams& params, const LabelLevel& level, int64_t image, int64_t m,
                                   int64_t packed) {
  const int64_t at = params.scores_are_rows ? image * params.score_image_stride + level.first_score + m : packed;
  return params.wide_scores ? static_cast<const double*>(params.scores)[at]
                            : double(static_cast<const float*>(params.scores)[at]);
}

struct Chunk {
  int64_t index;
  int32_t level;
  int64_t image, begin, end;  // anchors of the image, in the labels' order
};

FASTFOCAL_HD Chunk chunk_at(const PackLabelsParams& params, int64_t index) {
  const Piece piece = piece_at(params.count, [&](int l) { return params.level[l].chunks; }, index);
  const int64_t begin = piece.index * kChunkAnchors, end = begin + kChunkAnchors;
  const int64_t anchors = params.level[piece.level].anchors;
  return {index, piece.level, piece.image, begin, end < anchors ? end : anchors};
}

// What pack_labels counts; the operator's `count` argument.
enum class Count : int64_t {
  kNothing = 0,
  kPositives = 1,
  kPositivesPerImage = 2,
  kLogits = 3,          // of anchors not ignored
  kScores = 4,          // their sum, of positives
  kAnchorsPerImage = 5  // not ignored
};
FASTFOCAL_HD bool is_per_image(Count count) {
  return count == Count::kPositivesPerImage || count == Count::kAnchorsPerImage;
}

struct CountParams {
  const int64_t* counts;  // [image][2]
  double* divisor;        // 1, or one per image
  int64_t images, classes;
  int64_t anchors;  // of all levels and images
  Count count;
  double minimum;
  const double* score_sums;  // of all chunks
  int64_t chunks;
};

// A count that is no number stays so.
FASTFOCAL_HD double at_least(double minimum, double count) { return count <= minimum ? minimum : count; }

// The i-th divisor, max(minimum, the count), of anything but scores.
FASTFOCAL_HD double divisor_of(const CountParams& params, int64_t i) {
  const bool per_image = is_per_image(params.count);
  int64_t positives = 0, ignored = 0;
  for (int64_t n = per_image ? i : 0; n < (per_image ? i + 1 : params.images); ++n) {
    positives += params.counts[2 * n];
    ignored += params.counts[2 * n + 1];
  }
  const double count = params.count == Count::kLogits            ? double(params.anchors - ignored) * double(params.classes)
                       : params.count == Count::kAnchorsPerImage ? double(params.anchors / params.images - ignored)
                                                                 : double(positives);
  return at_least(params.minimum, count);
}

// ---------------------------------------------------------------------------------------------------------------------
// Finished gradients times the incoming one

struct ScaleLevel {
  const void* source;
  void* target;
  int64_t image_logits;
  Span pieces;  // of kTileLogits
};

struct ScaleParams {
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

FASTFOCAL_HD ScalePiece scale_piece_at(const ScaleParams& params, int64_t index) {
  const Piece piece = piece_at(params.count, [&](int l) { return params.level[l].pieces; }, index);
  const int64_t image_logits = params.level[piece.level].image_logits;
  const int64_t begin = piece.index * kTileLogits, end = begin + kTileLogits;
  const int64_t base = piece.image * image_logits;
  return {piece.level, piece.image, base + begin, base + (end < image_logits ? end : image_logits)};
}

}  // namespace fastfocal
