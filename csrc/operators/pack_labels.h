// The operator pack_labels over a Device: labels as the caller has them -> packed labels and what the loss is divided by.
#pragma once

#include <optional>
#include <tuple>

#include "../checks.h"

namespace fastfocal {

template <class Device>
struct PackLabels {
  static std::tuple<Tensor, Tensor> pack_labels(Tensors labels, Tensors logits, std::optional<Tensor> scores,
                                                int64_t num_classes, int64_t background_index, int64_t ignore_index,
                                                int64_t count, double minimum, bool background_is_class, bool one_channel) {
    // one_channel: the logits are not there yet; these have an anchor's shape, with one channel instead of its classes
    const CheckedLogits checked(logits, one_channel ? 1 : num_classes);
    const int64_t images = checked.images;
    const bool one = labels.size() == 1;  // for all levels
    FASTFOCAL_CHECK(one || labels.size() == logits.size(), "labels: expected 1 or ", logits.size(), " tensors, got ",
                    labels.size());
    FASTFOCAL_CHECK(count >= 0 && count <= static_cast<int64_t>(Count::kAnchorsPerImage), "count: expected 0 to ",
                    static_cast<int64_t>(Count::kAnchorsPerImage), ", got ", count);
    FASTFOCAL_CHECK(minimum >= 0, "minimum: expected a number >= 0, got ", minimum);
    const Count what = static_cast<Count>(count);
    FASTFOCAL_CHECK(scores || what != Count::kScores, "scores: expected a tensor, as their sum is wanted");
    if (scores) check_scores(*scores, checked);
    std::vector<Facts> labelled;
    labelled.reserve(labels.size());
    for (size_t l = 0; l < labels.size(); ++l) {
      const Argument name = {"labels", static_cast<int64_t>(l)};
      labelled.emplace_back(labels[l]);
      const Facts& t = labelled.back();
      const int64_t expected = one ? checked.columns : checked.levels[l].anchors;
      check_dtype(name, t, labelled[0].dtype);
      FASTFOCAL_EXPECT(t.dim == 2 && t.sizes[0] == images && t.sizes[1] == expected, name, "shape (", images, ", ", expected,
                       "), got ", t.shape());
      check_memory(name, t, checked.facts[0]);
    }

    const bool wide = num_classes > INT16_MAX;
    PackLabelsParams params = {};
    params.type = label_type(labelled[0].dtype);
    const int64_t divisors = is_per_image(what) ? images : what == Count::kNothing ? 0 : kNoDimension;
    const Tensor out = new_numbers(logits[0], checked.anchors, wide ? ScalarType::Int : ScalarType::Short);
    const Tensor divisor = new_numbers(logits[0], divisors, ScalarType::Double);
    const typename Device::Scratch counts(logits[0], images * 2, true);
    int64_t chunks = 0;  // whose scores are added up
    for (const Level& level : checked.levels)
      if (what == Count::kScores) chunks += images * chunks_of(level.anchors);
    const typename Device::Scratch score_sums(logits[0], chunks, false);
    double* next_score_sums = static_cast<double*>(score_sums.data());

    params.wide_labels = wide;
    params.images = images;
    params.rule = label_rule(num_classes, background_index, ignore_index, background_is_class);
    params.packed_labels = out.mutable_data_ptr();
    params.counts = static_cast<int64_t*>(counts.data());
    params.wide_scores = checked.accumulation == ScalarType::Double;
    if (scores) {
      params.scores = scores->const_data_ptr();
      params.scores_are_rows = are_rows(*scores);
      params.score_image_stride = params.scores_are_rows ? scores->stride(0) : 0;
    }
    int64_t column = 0;
    for (size_t start = 0; start < logits.size(); start += kMaxLevels) {
      params.first_level = static_cast<int32_t>(start);
      params.count = 0;
      params.chunks = 0;
      for (size_t l = start; l < logits.size() && l < start + kMaxLevels; ++l) {
        const Level& level = checked.levels[l];
        const Facts& t = labelled[one ? 0 : l];
        if (!one) column = 0;
        const uint64_t cells = level.cells.divisor, anchors = static_cast<uint64_t>(level.anchors);
        LabelLevel& part = params.level[params.count++];
        part.labels = static_cast<const char*>(t.tensor.const_data_ptr()) +
                      column * t.strides[1] * static_cast<int64_t>(t.tensor.element_size());
        part.image_stride = t.strides[0];
        part.anchor_stride = t.strides[1];
        part.first_anchor = level.first_anchor;
        part.first_score = level.first_score;
        part.anchors = level.anchors;
        part.cells = static_cast<int64_t>(cells);
        // Class first, the packed labels of a cell's anchors lie apart: [a][cell].
        const uint64_t a = level.layout == Layout::kClassFirst && anchors > cells ? anchors / cells : 1;
        part.per_cell = Divisor(static_cast<uint32_t>(a), anchors);
        part.chunks = {params.chunks, chunks_of(level.anchors)};
        params.chunks += images * part.chunks.per_image;
        column += level.anchors;
      }
      params.score_sums = what == Count::kScores ? next_score_sums : nullptr;
      next_score_sums += params.chunks;
      if (params.chunks > 0) Device::pack_labels(params, logits[0]);
    }
    if (divisor.numel() > 0) {
      double* const to = static_cast<double*>(divisor.mutable_data_ptr());
      const double* const sums = static_cast<const double*>(score_sums.data());
      Device::count({params.counts, to, images, num_classes, checked.anchors, what, minimum, sums, chunks}, logits[0]);
    }
    return {out, divisor};
  }
};

}  // namespace fastfocal
