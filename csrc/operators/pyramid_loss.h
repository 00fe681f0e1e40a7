// The operators pyramid_loss, pyramid_loss_, pyramid_loss_backward and pyramid_loss_double_backward over a Device: check, allocate,
// fill KernelParams, run.
//
// First all that was given is checked, then all memory is taken, and only then is anything written: whatever fails, what came is
// as it was.
#pragma once

#include <tuple>

#include "../schema.h"
#include "tensors.h"

namespace fastfocal {

// Everything that a call was given, checked.
struct Checked : CheckedLogits {
  LossParams loss;

  Checked(const Tensors& logits, const Options& options)
      : CheckedLogits(logits, options.num_classes), loss(checked_loss_parameters(options.loss, options.loss_parameters)) {
    const Facts& first = facts[0];
    check_number("positive_weight", options.positive_weight);
    check_number("negative_weight", options.negative_weight);
    const size_t count = levels.size();
    FASTFOCAL_CHECK(options.level_scales.size() == count, "level_scales: expected ", count, " numbers, one per level, got ",
                    options.level_scales.size());
    FASTFOCAL_CHECK(options.needs_grad.empty() || options.needs_grad.size() == count, "needs_grad: expected none or ", count,
                    " flags, one per level, got ", options.needs_grad.size());
    const bool soft = !options.soft_targets.empty();
    FASTFOCAL_CHECK(soft != options.packed_labels.has_value(), "packed_labels: expected either these or soft_targets");
    FASTFOCAL_CHECK(!soft || !takes_anchors(loss.kind), "soft_targets: loss ", static_cast<int64_t>(loss.kind),
                    " takes packed_labels");
    FASTFOCAL_CHECK(options.first_class >= 0 && options.first_class <= INT32_MAX - options.num_classes,
                    "first_class: expected a number >= 0, in all less than 2^31 classes, got ", options.first_class);
    FASTFOCAL_CHECK(
        options.first_class == 0 || (!soft && !takes_anchors(loss.kind)),
        "first_class: expected 0 beside soft_targets, and for a loss that takes an anchor's classes together, got ",
        options.first_class);
    if (soft) {
      FASTFOCAL_CHECK(options.soft_targets.size() == count, "soft_targets: expected ", count, " levels, got ",
                      options.soft_targets.size());
      const ScalarType given = options.soft_targets[0].scalar_type();
      FASTFOCAL_EXPECT(given == dtype || given == accumulation, (Argument{"soft_targets", 0}), "the logits' dtype, ",
                       torch::headeronly::toString(dtype), ", or ", torch::headeronly::toString(accumulation), ", got ",
                       torch::headeronly::toString(given));
      for (size_t l = 0; l < count; ++l) {
        const Argument name = {"soft_targets", static_cast<int64_t>(l)};
        const Facts t(options.soft_targets[l]);
        check_dtype(name, t, given);
        check_order(name, t, facts[l]);
        check_memory(name, t, first);
      }
    } else {
      const bool wide = options.first_class + options.num_classes > INT16_MAX;
      const ScalarType label = wide ? ScalarType::Int : ScalarType::Short;
      check_operand({"packed_labels"}, *options.packed_labels, first, label, anchors);
    }
    if (options.scores) {
      FASTFOCAL_CHECK(facts_of(loss.kind).reads_scores, "scores: expected none, as loss ", static_cast<int64_t>(loss.kind),
                      " does not read them");
      FASTFOCAL_CHECK(!soft, "scores: expected none beside soft_targets");
      check_scores(*options.scores, *this);
    }
    if (options.class_mask) {
      const Argument name = {"class_mask"};
      const Facts t(*options.class_mask);
      check_dtype(name, t, ScalarType::Bool);
      FASTFOCAL_EXPECT(t.dim == 2 && t.sizes[0] == images && t.sizes[1] == options.num_classes, name, "shape (", images,
                       ", ", options.num_classes, "), got ", t.shape());
      check_memory(name, t, first);
    }
    if (options.anchor_weight) check_operand({"anchor_weight"}, *options.anchor_weight, first, accumulation, anchors);
    if (options.class_weights)
      check_operand({"class_weights"}, *options.class_weights, first, accumulation, 2 * options.num_classes);
    if (options.divisor) {
      const int64_t divisors = options.divisor->numel();
      check_operand({"divisor"}, *options.divisor, first, ScalarType::Double, divisors == 1 ? 1 : images);
    }
  }
};

template <class Device>
struct PyramidLoss : private NewTensors<Device> {
  static std::tuple<Tensors, Tensors> forward(const Tensors& logits, const Options& options) {
    const Checked checked(logits, options);
    Tensors gradients;
    if (options.needs_any()) gradients = like_needed(logits, options);
    if (options.reduction == Reduction::kNone) {
      // The elementwise loss and the gradient are two passes: nobody asks for both but to keep the gradient for later.
      const Tensors losses = losses_of(logits, options);
      run_groups(logits, checked, options, Output::kElementLoss, losses, {}, nullptr);
      if (!gradients.empty()) run_groups(logits, checked, options, Output::kGradient, gradients, {}, nullptr);
      return {losses, gradients};
    }
    const int64_t size = options.reduction == Reduction::kSum ? kNoDimension : loss_size(checked, options);
    const Tensor loss = new_numbers(logits[0], size, checked.accumulation);
    const Output output = gradients.empty() ? Output::kLoss : Output::kLossAndGradient;
    run_groups(logits, checked, options, output, gradients, {}, &loss);
    return {Tensors{loss}, gradients};
  }

  // losses: what forward gives, allocated by the caller (torch.compile wants no lists from an operator that mutates).
  static void forward_(const Tensors& logits, const Tensors& losses, const Options& options) {
    const Checked checked(logits, options);
    const bool elementwise = options.reduction == Reduction::kNone;
    const size_t expected = elementwise ? logits.size() : 1;
    FASTFOCAL_CHECK(losses.size() == expected, "losses: expected ", expected, " tensors, got ", losses.size());
    for (size_t l = 0; l < losses.size(); ++l) {
      const Argument name = {"losses", static_cast<int64_t>(l)};
      if (elementwise) {
        check_each(name, losses[l], checked, l);
      } else {
        check_operand(name, losses[l], checked.facts[0], checked.accumulation, loss_size(checked, options));
      }
    }
    check_apart(logits, losses, options);

    Tensors over;  // levels that need no gradient keep their logits
    for (size_t l = 0; l < logits.size(); ++l) over.push_back(options.needs(l) ? logits[l] : none_like(logits[l]));
    if (elementwise) {
      run_groups(logits, checked, options, Output::kElementLoss, losses, {}, nullptr);
      run_groups(logits, checked, options, Output::kGradient, over, {}, nullptr);
    } else {
      run_groups(logits, checked, options, Output::kLossAndGradient, over, {}, &losses[0]);
    }
  }

  static Tensors backward(const Tensors& grad_outputs, const Tensors& logits, const Options& options) {
    const Checked checked(logits, options);
    check_grad_outputs(grad_outputs, checked, options);
    Tensors gradients = like_needed(logits, options);
    run_groups(logits, checked, options, Output::kGradient, gradients, grad_outputs, nullptr);
    return gradients;
  }

  // The derivative of backward(), given that of its results (an empty tensor where it is 0): by grad_outputs, and by the logits.
  static std::tuple<Tensors, Tensors> double_backward(const Tensors& grad_gradients, const Tensors& grad_outputs,
                                                      const Tensors& logits, const Options& options) {
    const Checked checked(logits, options);
    check_second(checked.loss);
    check_grad_outputs(grad_outputs, checked, options);
    FASTFOCAL_CHECK(grad_gradients.size() == logits.size(), "grad_gradients: expected ", logits.size(), " tensors, got ",
                    grad_gradients.size());
    for (size_t l = 0; l < grad_gradients.size(); ++l) {
      const Facts g(grad_gradients[l]);
      const Argument name = {"grad_gradients", static_cast<int64_t>(l)};
      check_dtype(name, g, checked.facts[l].dtype);
      if (g.numel > 0) check_elementwise(name, g, checked.facts[l], checked.facts[0]);
    }
    Second second = {grad_gradients, {}};
    const Tensors grad_logits = like_needed(logits, options);
    if (options.reduction == Reduction::kNone) {
      second.along = like_all(logits);
      run_groups(logits, checked, options, Output::kSecond, grad_logits, grad_outputs, nullptr, second);
      return {second.along, grad_logits};
    }
    const Facts g(grad_outputs[0]);
    const Tensor along = new_numbers(logits[0], g.dim == 0 ? kNoDimension : g.numel, checked.accumulation);
    run_groups(logits, checked, options, Output::kSecond, grad_logits, grad_outputs, &along, second);
    return {{along}, grad_logits};
  }

 private:
  using NewTensors<Device>::fresh_like;
  using NewTensors<Device>::like_all;
  using NewTensors<Device>::none_like;
  using NewTensors<Device>::of_anchors;

  // Of Output::kSecond: Level::direction and Level::along of each level; an empty list: null.
  struct Second {
    Tensors direction, along;
  };

  static void check_second(const LossParams& params) {
    FASTFOCAL_CHECK(!takes_anchors(params.kind), "loss: ", static_cast<int64_t>(params.kind), " has no second derivative");
    with_loss<float, Path::kGeneric>(params, [&](auto loss) {
      FASTFOCAL_CHECK(kHasSecond<type_of<decltype(loss)>>, "loss: ", static_cast<int64_t>(params.kind),
                      " has no second derivative");
    });
  }

  static void check_grad_outputs(const Tensors& grad_outputs, const Checked& checked, const Options& options) {
    const bool elementwise = options.reduction == Reduction::kNone;
    const size_t expected = elementwise ? checked.levels.size() : 1;
    FASTFOCAL_CHECK(grad_outputs.size() == expected, "grad_outputs: expected ", expected, " tensors, got ",
                    grad_outputs.size());
    for (size_t l = 0; l < grad_outputs.size(); ++l) {
      const Argument name = {"grad_outputs", static_cast<int64_t>(l)};
      if (elementwise) {
        check_each(name, grad_outputs[l], checked, l);
      } else {
        check_incoming(name, Facts(grad_outputs[l]), checked.facts[0], checked.accumulation, loss_size(checked, options));
      }
    }
  }

  // What reduction "none" gives: the loss of each logit, or of each anchor.
  static Tensors losses_of(const Tensors& logits, const Options& options) {
    if (!takes_anchors(options.loss)) return like_all(logits);
    Tensors out;
    out.reserve(logits.size());
    for (const Tensor& t : logits) out.push_back(of_anchors(t, options.num_classes));
    return out;
  }

  // These, or their incoming gradients.
  static void check_each(const Argument& name, const Tensor& t, const Checked& checked, size_t l) {
    if (takes_anchors(checked.loss.kind)) {
      check_anchorwise(name, t, checked.facts[l], checked.facts[0], checked.images * checked.levels[l].anchors);
    } else {
      check_elementwise(name, Facts(t), checked.facts[l], checked.facts[0]);
    }
  }

  static int64_t tiles_of(const Level& level, const Options& options) {
    return takes_anchors(options.loss) ? anchor_tiles_per_image(level, options.num_classes)
                                       : tiles_per_image(level.image_logits);
  }

  static Tensors like_needed(const Tensors& logits, const Options& options) {
    Tensors out;
    out.reserve(logits.size());
    for (size_t l = 0; l < logits.size(); ++l)
      out.push_back(options.needs(l) ? fresh_like(logits[l]) : none_like(logits[l]));
    return out;
  }

  static int64_t loss_size(const CheckedLogits& logits, const Options& options) {
    return options.reduction == Reduction::kLevel   ? static_cast<int64_t>(logits.levels.size())
           : options.reduction == Reduction::kImage ? logits.images
                                                    : 1;
  }

  // In place: nothing may lie where a gradient or a loss goes.
  static void check_apart(const Tensors& logits, const Tensors& losses, const Options& options) {
    Apart apart;
    for (size_t l = 0; l < logits.size(); ++l)
      apart.add({"logits", static_cast<int64_t>(l)}, logits[l],
                options.needs(l) ? "grad_mode=\"inplace\" overwrites" : nullptr);
    for (size_t l = 0; l < losses.size(); ++l) apart.add({"losses", static_cast<int64_t>(l)}, losses[l], "is written");
    for (size_t l = 0; l < options.soft_targets.size(); ++l)
      apart.add({"soft_targets", static_cast<int64_t>(l)}, options.soft_targets[l], nullptr);
    if (options.packed_labels) apart.add({"packed_labels"}, *options.packed_labels, nullptr);
    if (options.scores) apart.add({"scores"}, *options.scores, nullptr);
    if (options.class_mask) apart.add({"class_mask"}, *options.class_mask, nullptr);
    if (options.anchor_weight) apart.add({"anchor_weight"}, *options.anchor_weight, nullptr);
    if (options.class_weights) apart.add({"class_weights"}, *options.class_weights, nullptr);
    if (options.divisor) apart.add({"divisor"}, *options.divisor, nullptr);
    apart.check();
  }

  // Fills a KernelParams for each group of kMaxLevels levels, runs its tiles and, where a loss is wanted, reduces their sums.
  // outs: none, or one tensor per level, an empty one where nothing is wanted. loss: what the sums become, or null. Everything has
  // been checked.
  static void run_groups(const Tensors& logits, const Checked& checked, const Options& o, Output output, const Tensors& outs,
                         const Tensors& grad_outputs, const Tensor* loss, const Second& second = {}) {
    const bool elementwise_incoming = !grad_outputs.empty() && o.reduction == Reduction::kNone;
    KernelParams params = {};
    params.soft = !o.soft_targets.empty();
    params.incoming_elements = elementwise_incoming;
    params.output = output;
    params.dtype = dtype_of(checked.dtype);
    params.reduction = o.reduction;
    params.packed_labels = o.packed_labels ? o.packed_labels->const_data_ptr() : nullptr;
    params.wide_labels = o.packed_labels && o.packed_labels->scalar_type() == ScalarType::Int;
    params.first_class = static_cast<int32_t>(o.first_class);
    params.wide_soft_targets = !o.soft_targets.empty() && o.soft_targets[0].scalar_type() != checked.dtype;
    if (o.scores) {
      params.scores = o.scores->const_data_ptr();
      params.scores_are_rows = are_rows(*o.scores);
      params.score_image_stride = params.scores_are_rows ? o.scores->stride(0) : 0;
    }
    if (o.class_mask) {
      params.class_mask = static_cast<const uint8_t*>(o.class_mask->const_data_ptr());
      params.mask_image_stride = o.class_mask->stride(0);
      params.mask_class_stride = o.class_mask->stride(1);
    }
    params.anchor_weight = o.anchor_weight ? o.anchor_weight->const_data_ptr() : nullptr;
    params.class_weights = o.class_weights ? o.class_weights->const_data_ptr() : nullptr;
    params.positive_weight = o.positive_weight;
    params.negative_weight = o.negative_weight;
    params.loss = checked.loss;
    params.divisor = o.divisor ? static_cast<const double*>(o.divisor->const_data_ptr()) : nullptr;
    params.divisors = o.divisor ? o.divisor->numel() : 0;
    if (!grad_outputs.empty() && !elementwise_incoming) {
      const Tensor& g = grad_outputs[0];
      params.incoming = g.const_data_ptr();
      params.incoming_stride = g.dim() == 0 ? 0 : g.stride(0);
    }

    std::vector<int64_t> tiles;  // of each group; memory for all sums is taken before the first kernel writes
    for (size_t l = 0; l < logits.size(); ++l) {
      if (l % kMaxLevels == 0) tiles.push_back(0);
      tiles.back() += checked.images * tiles_of(checked.levels[l], o);
    }
    const typename Device::Scratch partial(logits[0], loss ? *std::max_element(tiles.begin(), tiles.end()) : 0, false);
    params.partial = loss ? static_cast<double*>(partial.data()) : nullptr;

    for (size_t start = 0; start < logits.size(); start += kMaxLevels) {
      Levels& levels = params.levels;
      levels = {};
      levels.classes = Divisor(static_cast<uint32_t>(o.num_classes), static_cast<uint64_t>(o.num_classes + kTileLogits));
      levels.images = checked.images;
      params.first_level = static_cast<int32_t>(start);
      for (size_t l = start; l < logits.size() && l < start + kMaxLevels; ++l) {
        Level& level = levels.level[levels.count];
        level = checked.levels[l];
        level.logits = logits[l].const_data_ptr();
        level.out = outs.empty() || outs[l].numel() == 0 ? nullptr : outs[l].mutable_data_ptr();
        level.soft_targets = o.soft_targets.empty() ? nullptr : o.soft_targets[l].const_data_ptr();
        if (elementwise_incoming) level.incoming = grad_outputs[l].const_data_ptr();
        const auto of_level = [l](const Tensors& tensors) { return l < tensors.size() && tensors[l].numel() > 0; };
        if (of_level(second.direction)) level.direction = second.direction[l].const_data_ptr();
        if (of_level(second.along)) level.along = second.along[l].mutable_data_ptr();
        level.scale = o.level_scales[l];
        level.tiles = {levels.tiles, tiles_of(level, o)};
        levels.tiles += levels.images * level.tiles.per_image;
        ++levels.count;
      }
      if (levels.tiles > 0) Device::run(params, logits[0]);
      if (loss) Device::reduce(params, loss->mutable_data_ptr(), loss->numel(), start > 0, logits[0]);
    }
  }
};

}  // namespace fastfocal
