// The operators: their schemas, and the host side that the CPU and CUDA versions share (checks, allocation, Levels). A
// device gives `struct Device` with
//   static void run(const Call&, const Tensor& like);                          every tile of one Call
//   static void reduce(const Call&, void* loss, bool add, const Tensor& like); Call::partial -> the reduced loss
//   static void fresh(void* memory, size_t bytes);                             about to be written for the first time
//   static void encode(const LabelCall&, const Tensor& like);                  labels -> codes, and adds to the counts
//   static void count(const CountCall&, const Tensor& like);                   counts -> divisor
//   static void scale(const ScaleCall&, const Tensor& like);                   finished gradients by the incoming one
//   struct Scratch(const Tensor& like, int64_t n, bool zero), .data()          n numbers of 8 bytes for one call; zero: all 0
//
// Only PyTorch's stable ABI is used, so one binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "call.h"

namespace fastfocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// ---------------------------------------------------------------------------------------------------------------------
// Schemas

// The arguments that say what is computed, the same in three operators; Options mirrors them.
#define FASTFOCAL_OPTIONS_SCHEMA                                                                             \
  "Tensor? codes, Tensor[]? soft_targets, Tensor? anchor_weight, Tensor? class_weights, Tensor? divisor, "   \
  "float[] level_scales, float positive_weight, float negative_weight, float gamma, float label_smoothing, " \
  "bool detach_modulating_factor, int family, float beta, int num_classes, int reduction, int[] needs_grad"

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "label_codes(Tensor[] labels, Tensor[] logits, int num_classes, int background_index, int ignore_index, int count, "
      "float minimum) -> (Tensor codes, Tensor divisor)");
  m.def("focal_loss(Tensor[] logits, " FASTFOCAL_OPTIONS_SCHEMA ") -> (Tensor[] losses, Tensor[] gradients)");
  m.def("focal_loss_(Tensor(a!)[] logits, Tensor(b!)[] losses, " FASTFOCAL_OPTIONS_SCHEMA ") -> ()");
  m.def("focal_loss_backward(Tensor[] grad_outputs, Tensor[] logits, " FASTFOCAL_OPTIONS_SCHEMA ") -> Tensor[]");
  m.def("scale_gradients(Tensor[] gradients, Tensor grad_output, int reduction) -> Tensor[]");
  m.def("scale_gradients_(Tensor(a!)[] gradients, Tensor grad_output, int reduction) -> ()");
}

struct Options {
  std::optional<Tensor> codes;
  Tensors soft_targets;
  std::optional<Tensor> anchor_weight, class_weights, divisor;
  std::vector<double> level_scales;
  double positive_weight, negative_weight;
  Family family;
  Parameters parameters;
  int64_t num_classes;
  Reduction reduction;
  std::vector<int64_t> needs_grad;  // a flag a level; empty: no level

  bool needs(size_t level) const { return level < needs_grad.size() && needs_grad[level] != 0; }
  bool needs_any() const {
    for (const int64_t flag : needs_grad)
      if (flag) return true;
    return false;
  }
};

#define FASTFOCAL_OPTIONS_PARAMETERS                                                                                       \
  std::optional<Tensor> codes, std::optional<Tensors> soft_targets, std::optional<Tensor> anchor_weight,                   \
      std::optional<Tensor> class_weights, std::optional<Tensor> divisor, std::vector<double> level_scales,                \
      double positive_weight, double negative_weight, double gamma, double label_smoothing, bool detach_modulating_factor, \
      int64_t family, double beta, int64_t num_classes, int64_t reduction, std::vector<int64_t> needs_grad
#define FASTFOCAL_OPTIONS                                                                                          \
  Options {                                                                                                        \
    codes, soft_targets.value_or(Tensors()), anchor_weight, class_weights, divisor, level_scales, positive_weight, \
        negative_weight, static_cast<Family>(family), {gamma, label_smoothing, beta, detach_modulating_factor},    \
        num_classes, static_cast<Reduction>(reduction), needs_grad                                                 \
  }

// ---------------------------------------------------------------------------------------------------------------------
// Checks and Levels. Python has checked what users pass and words the errors for them (arguments.py); these guard the
// kernels against a direct call with shapes that would read out of bounds.

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, float16, bfloat16 or float64");
  }
}

inline LabelType label_type(ScalarType type) {
  switch (type) {
    case ScalarType::Long:
      return LabelType::kInt64;
    case ScalarType::Int:
      return LabelType::kInt32;
    case ScalarType::Short:
      return LabelType::kInt16;
    case ScalarType::Char:
      return LabelType::kInt8;
    case ScalarType::Byte:
      return LabelType::kUInt8;
    default:
      STD_TORCH_CHECK(false, "labels: expected int64, int32, int16, int8 or uint8");
  }
}

inline ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_class_last(const Tensor& t) {  // (N, C, H, W) in channels_last order
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  return (c == 1 || t.stride(1) == 1) && (w == 1 || t.stride(3) == c) && (h == 1 || t.stride(2) == w * c) &&
         (t.size(0) == 1 || t.stride(0) == h * w * c);
}

// The sizes of one level; its pointers are the caller's to fill.
inline Level level_of(const Tensor& logits, int64_t classes, int index) {
  Level level = {};
  STD_TORCH_CHECK(classes > 0 && classes <= INT32_MAX, "num_classes: expected a positive number, got ", classes);
  STD_TORCH_CHECK(logits.dim() >= 2 && logits.dim() <= 4, "logits[", index, "]: expected 2, 3 or 4 dimensions");
  if (logits.dim() == 4) {
    const int64_t channels = logits.size(1), cells = logits.size(2) * logits.size(3);
    STD_TORCH_CHECK(cells <= INT32_MAX, "logits[", index, "]: expected less than 2^31 cells, got ", cells);
    level.cells = Divisor(static_cast<uint32_t>(cells > 0 ? cells : 1), static_cast<uint64_t>(cells + kTileLogits));
    STD_TORCH_CHECK(channels % classes == 0, "logits[", index, "]: ", channels, " channels are no multiple of num_classes ",
                    classes);
    level.anchors = channels / classes * cells;
    level.layout = is_class_last(logits) ? Layout::kClassLast : Layout::kClassFirst;
    STD_TORCH_CHECK(level.layout == Layout::kClassLast || logits.is_contiguous(), "logits[", index,
                    "]: expected contiguous or channels_last memory");
  } else {
    STD_TORCH_CHECK(logits.size(logits.dim() - 1) == classes && logits.is_contiguous(), "logits[", index,
                    "]: expected contiguous memory with ", classes, " classes last");
    level.anchors = logits.size(logits.dim() - 2);
    level.layout = Layout::kClassLast;
  }
  STD_TORCH_CHECK(level.anchors <= INT32_MAX, "logits[", index, "]: expected less than 2^31 anchors, got ", level.anchors);
  if (classes == 1 && level.layout == Layout::kClassLast) {  // then it is one plane just as well, and kernels divide by it
    const uint64_t plane = level.anchors > 0 ? static_cast<uint64_t>(level.anchors) : 1;
    level.layout = Layout::kClassFirst;
    level.cells = Divisor(static_cast<uint32_t>(plane), plane + kTileLogits);
  }
  level.image_logits = level.anchors * classes;
  return level;
}

// A new tensor on the device of `like`; on the CPU past the dispatcher, which costs a microsecond or two each time.
inline Tensor new_tensor(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// n numbers, or a single one of no dimension.
constexpr int64_t kNoDimension = -1;
inline Tensor new_numbers(const Tensor& like, int64_t n, ScalarType dtype) {
  constexpr int64_t kStride = 1;
  return new_tensor(like, n == kNoDimension ? 0 : 1, &n, &kStride, dtype);
}

inline int64_t images_of(const Tensor& logits) { return logits.dim() == 2 ? 1 : logits.size(0); }

inline void check_like(const char* name, const Tensor& t, const Tensor& logits, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.get_device_index() == logits.get_device_index(), name,
                  ": expected contiguous memory of the kernel's dtype on the logits' device");
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators over a Device

template <class Device>
struct Operators {
  static std::tuple<Tensors, Tensors> focal_loss(Tensors logits, FASTFOCAL_OPTIONS_PARAMETERS) {
    const Options options = FASTFOCAL_OPTIONS;
    check(logits, options);
    if (options.reduction == Reduction::kNone) {
      // The elementwise loss and the gradient are two passes: nobody asks for both but to keep the gradient for later.
      Tensors losses = like_all(logits), gradients;
      run_groups(logits, options, Output::kElementLoss, losses, {}, nullptr);
      if (options.needs_any()) {
        gradients = like_needed(logits, options);
        run_groups(logits, options, Output::kGradient, gradients, {}, nullptr);
      }
      return {losses, gradients};
    }
    Tensors gradients;
    if (options.needs_any()) gradients = like_needed(logits, options);
    const Tensor loss = new_loss(logits, options);
    run_groups(logits, options, gradients.empty() ? Output::kLoss : Output::kLossAndGradient, gradients, {}, &loss);
    return {Tensors{loss}, gradients};
  }

  // losses: what focal_loss gives, allocated by the caller (torch.compile wants no lists from an operator that mutates).
  static void focal_loss_(Tensors logits, Tensors losses, FASTFOCAL_OPTIONS_PARAMETERS) {
    const Options options = FASTFOCAL_OPTIONS;
    check(logits, options);
    check_apart(logits, options);
    Tensors over;  // levels that need no gradient keep their logits
    for (size_t l = 0; l < logits.size(); ++l) over.push_back(options.needs(l) ? logits[l] : none_like(logits[l]));
    if (options.reduction == Reduction::kNone) {
      STD_TORCH_CHECK(losses.size() == logits.size(), "losses: expected one a level");
      for (size_t l = 0; l < logits.size(); ++l) {
        STD_TORCH_CHECK(losses[l].scalar_type() == logits[l].scalar_type(), "losses[", l, "]: expected the logits' dtype");
        check_order("losses", losses[l], logits[l]);
      }
      run_groups(logits, options, Output::kElementLoss, losses, {}, nullptr);
      run_groups(logits, options, Output::kGradient, over, {}, nullptr);
      return;
    }
    STD_TORCH_CHECK(losses.size() == 1, "losses: expected one tensor");
    check_like("losses", losses[0], logits[0], accumulation_type(logits[0]));
    STD_TORCH_CHECK(losses[0].numel() == loss_size(logits, options), "losses: expected ", loss_size(logits, options),
                    " numbers");
    run_groups(logits, options, Output::kLossAndGradient, over, {}, &losses[0]);
  }

  static Tensors focal_loss_backward(Tensors grad_outputs, Tensors logits, FASTFOCAL_OPTIONS_PARAMETERS) {
    const Options options = FASTFOCAL_OPTIONS;
    check(logits, options);
    Tensors gradients = like_needed(logits, options);
    run_groups(logits, options, Output::kGradient, gradients, grad_outputs, nullptr);
    return gradients;
  }

  static std::tuple<Tensor, Tensor> label_codes(Tensors labels, Tensors logits, int64_t num_classes,
                                                int64_t background_index, int64_t ignore_index, int64_t count,
                                                double minimum) {
    STD_TORCH_CHECK(!logits.empty(), "logits: expected at least one level");
    STD_TORCH_CHECK(labels.size() == 1 || labels.size() == logits.size(), "labels: expected 1 or ", logits.size(),
                    " tensors, got ", labels.size());
    const ScalarType type = labels[0].scalar_type();
    const bool wide = num_classes > INT16_MAX;
    const int64_t images = images_of(logits[0]);
    int64_t codes = 0, columns = 0;
    for (size_t l = 0; l < logits.size(); ++l) {
      const int64_t anchors = level_of(logits[l], num_classes, static_cast<int>(l)).anchors;
      codes += images_of(logits[l]) * anchors;
      columns += anchors;
      if (labels.size() == 1 && l + 1 < logits.size()) continue;
      const Tensor& t = labels.size() == 1 ? labels[0] : labels[l];
      const int64_t expected = labels.size() == 1 ? columns : anchors;
      STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == images && images_of(logits[l]) == images && t.size(1) == expected &&
                          t.scalar_type() == type && t.get_device_index() == logits[0].get_device_index(),
                      "labels[", l, "]: expected (", images, ", ", expected, ") of one dtype on the logits' device");
    }

    const Count what = static_cast<Count>(count);
    const bool per_image = what == Count::kPositivesPerImage;
    const Tensor out = new_numbers(logits[0], codes, wide ? ScalarType::Int : ScalarType::Short);
    const int64_t divisors = per_image ? images : what == Count::kNothing ? 0 : kNoDimension;
    const Tensor divisor = new_numbers(logits[0], divisors, ScalarType::Double);
    const typename Device::Scratch counts(logits[0], images * 2, true);

    LabelCall call = {};
    call.type = label_type(type);
    call.wide_codes = wide;
    call.images = images;
    call.rule = {num_classes, background_index, ignore_index};
    call.codes = out.mutable_data_ptr();
    call.counts = static_cast<int64_t*>(counts.data());
    int64_t first_anchor = 0, column = 0;
    for (size_t start = 0; start < logits.size(); start += kMaxLevels) {
      call.first_level = static_cast<int32_t>(start);
      call.count = 0;
      call.chunks = 0;
      for (size_t l = start; l < logits.size() && l < start + kMaxLevels; ++l) {
        const Level level = level_of(logits[l], num_classes, static_cast<int>(l));
        const Tensor& t = labels.size() == 1 ? labels[0] : labels[l];
        if (labels.size() > 1) column = 0;
        const uint64_t cells = level.cells.divisor, anchors = static_cast<uint64_t>(level.anchors);
        LabelLevel& labelled = call.level[call.count++];
        labelled.labels =
            static_cast<const char*>(t.const_data_ptr()) + column * t.stride(1) * static_cast<int64_t>(t.element_size());
        labelled.image_stride = t.stride(0);
        labelled.anchor_stride = t.stride(1);
        labelled.first_anchor = first_anchor;
        labelled.anchors = level.anchors;
        labelled.cells = static_cast<int64_t>(cells);
        // Class first, the codes of a cell's anchors lie apart: [a][cell].
        const uint64_t a = level.layout == Layout::kClassFirst && anchors > cells ? anchors / cells : 1;
        labelled.per_cell = Divisor(static_cast<uint32_t>(a), anchors);
        labelled.chunks = {call.chunks, (level.anchors + kChunkAnchors - 1) / kChunkAnchors};
        call.chunks += images * labelled.chunks.per_image;
        first_anchor += images * level.anchors;
        column += level.anchors;
      }
      if (call.chunks > 0) Device::encode(call, logits[0]);
    }
    if (divisor.numel() > 0) {
      Device::count(
          {call.counts, static_cast<double*>(divisor.mutable_data_ptr()), images, num_classes, codes, what, minimum},
          logits[0]);
    }
    return {out, divisor};
  }

  static Tensors scale_gradients(Tensors gradients, Tensor grad_output, int64_t reduction) {
    Tensors scaled = like_all(gradients);
    scale(gradients, scaled, grad_output, reduction);
    return scaled;
  }

  static void scale_gradients_(Tensors gradients, Tensor grad_output, int64_t reduction) {
    scale(gradients, gradients, grad_output, reduction);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("label_codes", TORCH_BOX(&label_codes));
    m.impl("focal_loss", TORCH_BOX(&focal_loss));
    m.impl("focal_loss_", TORCH_BOX(&focal_loss_));
    m.impl("focal_loss_backward", TORCH_BOX(&focal_loss_backward));
    m.impl("scale_gradients", TORCH_BOX(&scale_gradients));
    m.impl("scale_gradients_", TORCH_BOX(&scale_gradients_));
  }

 private:
  static Tensor none_like(const Tensor& t) { return new_numbers(t, 0, t.scalar_type()); }

  static Tensor fresh_like(const Tensor& t) {
    const Tensor out = new_tensor(t, t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type());
    Device::fresh(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
    return out;
  }

  static Tensors like_all(const Tensors& tensors) {  // the same dtypes and strides
    Tensors out;
    for (const Tensor& t : tensors) out.push_back(fresh_like(t));
    return out;
  }

  static Tensors like_needed(const Tensors& logits, const Options& options) {
    Tensors out;
    for (size_t l = 0; l < logits.size(); ++l)
      out.push_back(options.needs(l) ? fresh_like(logits[l]) : none_like(logits[l]));
    return out;
  }

  static int64_t loss_size(const Tensors& logits, const Options& options) {
    return options.reduction == Reduction::kLevel   ? static_cast<int64_t>(logits.size())
           : options.reduction == Reduction::kImage ? images_of(logits[0])
                                                    : 1;
  }

  static Tensor new_loss(const Tensors& logits, const Options& options) {
    const int64_t size = options.reduction == Reduction::kSum ? kNoDimension : loss_size(logits, options);
    return new_numbers(logits[0], size, accumulation_type(logits[0]));
  }

  static void check(const Tensors& logits, const Options& options) {
    STD_TORCH_CHECK(!logits.empty(), "logits: expected at least one level");
    const size_t levels = logits.size();
    STD_TORCH_CHECK(options.level_scales.size() == levels, "level_scales: expected one a level");
    const bool soft = !options.soft_targets.empty();
    STD_TORCH_CHECK(soft != options.codes.has_value(), "expected either codes or soft_targets");
    int64_t anchors = 0;
    for (size_t l = 0; l < levels; ++l) {
      const Tensor& t = logits[l];
      STD_TORCH_CHECK(t.scalar_type() == logits[0].scalar_type() && t.dim() == logits[0].dim() &&
                          images_of(t) == images_of(logits[0]) && t.get_device_index() == logits[0].get_device_index(),
                      "logits[", l, "]: dtype, rank, batch size or device differs from level 0's");
      anchors += images_of(t) * level_of(t, options.num_classes, static_cast<int>(l)).anchors;
    }
    const ScalarType s = accumulation_type(logits[0]);
    if (soft) {
      STD_TORCH_CHECK(options.soft_targets.size() == levels, "soft_targets: expected one a level");
      for (size_t l = 0; l < levels; ++l) {
        const Tensor& t = options.soft_targets[l];
        STD_TORCH_CHECK(t.scalar_type() == options.soft_targets[0].scalar_type() &&
                            (t.scalar_type() == s || t.scalar_type() == logits[0].scalar_type()) &&
                            t.numel() == logits[l].numel() && t.get_device_index() == logits[0].get_device_index(),
                        "soft_targets[", l, "]: expected the logits' shape and dtype, or float32");
      }
    } else {
      const ScalarType code = options.num_classes > INT16_MAX ? ScalarType::Int : ScalarType::Short;
      check_like("codes", *options.codes, logits[0], code);
      STD_TORCH_CHECK(options.codes->numel() == anchors, "codes: expected ", anchors, " of them");
    }
    if (options.anchor_weight) {
      check_like("anchor_weight", *options.anchor_weight, logits[0], s);
      STD_TORCH_CHECK(options.anchor_weight->numel() == anchors, "anchor_weight: expected ", anchors, " of them");
    }
    if (options.class_weights) {
      check_like("class_weights", *options.class_weights, logits[0], s);
      STD_TORCH_CHECK(options.class_weights->numel() == 2 * options.num_classes, "class_weights: expected two a class");
    }
    if (options.divisor) {
      check_like("divisor", *options.divisor, logits[0], ScalarType::Double);
      STD_TORCH_CHECK(options.divisor->numel() == 1 || options.divisor->numel() == images_of(logits[0]),
                      "divisor: expected 1 or one an image");
    }
  }

  static void check_order(const char* name, const Tensor& t, const Tensor& logits) {
    STD_TORCH_CHECK(t.dim() == logits.dim(), name, ": expected the logits' shape and strides");
    for (int64_t d = 0; d < t.dim(); ++d) {
      STD_TORCH_CHECK(t.size(d) == logits.size(d) && (t.size(d) <= 1 || t.stride(d) == logits.stride(d)), name,
                      ": expected the logits' shape and strides");
    }
  }

  // In place: no level may lie where another one's gradient goes.
  static void check_apart(const Tensors& logits, const Options& options) {
    for (size_t l = 0; l < logits.size(); ++l) {
      const char* const begin = static_cast<const char*>(logits[l].const_data_ptr());
      const char* const end = begin + logits[l].numel() * static_cast<int64_t>(logits[l].element_size());
      for (size_t m = 0; m < logits.size() && options.needs(l); ++m) {
        const char* const other = static_cast<const char*>(logits[m].const_data_ptr());
        const char* const other_end = other + logits[m].numel() * static_cast<int64_t>(logits[m].element_size());
        STD_TORCH_CHECK(m == l || other >= end || other_end <= begin, "logits[", m, "]: shares memory with logits[", l,
                        "], which grad_mode=\"inplace\" overwrites");
      }
    }
  }

  static void check_incoming(const Tensor& g, Reduction reduction, size_t levels, int64_t images) {
    const int64_t expected = reduction == Reduction::kLevel   ? static_cast<int64_t>(levels)
                             : reduction == Reduction::kImage ? images
                                                              : 1;
    STD_TORCH_CHECK(g.numel() == expected && g.dim() <= 1, "grad_output: expected ", expected, " numbers");
  }

  static void scale(const Tensors& source, const Tensors& target, const Tensor& grad_output, int64_t reduction) {
    if (source.empty()) return;
    ScaleCall call = {};
    call.reduction = static_cast<Reduction>(reduction);
    call.dtype = dtype_of(source[0]);
    for (const Tensor& t : source)  // a level that needs no gradient has an empty one
      if (t.numel() != 0) call.images = images_of(t);
    if (call.images == 0) return;
    STD_TORCH_CHECK(grad_output.scalar_type() == accumulation_type(source[0]) &&
                        grad_output.get_device_index() == source[0].get_device_index(),
                    "grad_output: expected the loss' dtype and device");
    check_incoming(grad_output, call.reduction, source.size(), call.images);
    call.incoming = grad_output.const_data_ptr();
    call.incoming_stride = grad_output.dim() == 0 ? 0 : grad_output.stride(0);
    for (size_t start = 0; start < source.size(); start += kMaxLevels) {
      call.first_level = static_cast<int32_t>(start);
      call.count = 0;
      call.pieces = 0;
      for (size_t l = start; l < source.size() && l < start + kMaxLevels; ++l) {
        const int64_t image_logits = source[l].numel() / call.images;
        const Span pieces = {call.pieces, (image_logits + kTileLogits - 1) / kTileLogits};
        call.level[call.count++] = {source[l].const_data_ptr(), target[l].mutable_data_ptr(), image_logits, pieces};
        call.pieces += call.images * pieces.per_image;
      }
      if (call.pieces > 0) Device::scale(call, source[0]);
    }
  }

  // Fills a Call for each group of kMaxLevels levels, runs its tiles and, where a loss is wanted, reduces their sums.
  // outs: none, or one tensor a level, an empty one where nothing is wanted.
  static void run_groups(const Tensors& logits, const Options& o, Output output, const Tensors& outs,
                         const Tensors& grad_outputs, const Tensor* loss) {
    const bool elementwise_incoming = !grad_outputs.empty() && o.reduction == Reduction::kNone;
    Call call = {};
    call.soft = !o.soft_targets.empty();
    call.incoming_elements = elementwise_incoming;
    call.output = output;
    call.dtype = dtype_of(logits[0]);
    call.reduction = o.reduction;
    call.codes = o.codes ? o.codes->const_data_ptr() : nullptr;
    call.wide_codes = o.num_classes > INT16_MAX;
    call.wide_soft_targets = !o.soft_targets.empty() && o.soft_targets[0].scalar_type() != logits[0].scalar_type();
    call.anchor_weight = o.anchor_weight ? o.anchor_weight->const_data_ptr() : nullptr;
    call.class_weights = o.class_weights ? o.class_weights->const_data_ptr() : nullptr;
    call.positive_weight = o.positive_weight;
    call.negative_weight = o.negative_weight;
    STD_TORCH_CHECK(o.family == Family::kFocalLoss || o.family == Family::kFocalLossStar, "family: expected 0 or 1, got ",
                    static_cast<int64_t>(o.family));
    call.family = o.family;
    call.parameters = o.parameters;
    call.divisor = o.divisor ? static_cast<const double*>(o.divisor->const_data_ptr()) : nullptr;
    call.divisors = o.divisor ? o.divisor->numel() : 0;
    if (!grad_outputs.empty() && !elementwise_incoming) {
      const Tensor& g = grad_outputs[0];
      STD_TORCH_CHECK(grad_outputs.size() == 1 && g.scalar_type() == accumulation_type(logits[0]),
                      "grad_outputs: expected one tensor of the loss' dtype");
      check_incoming(g, o.reduction, logits.size(), images_of(logits[0]));
      call.incoming = g.const_data_ptr();
      call.incoming_stride = g.dim() == 0 ? 0 : g.stride(0);
    }

    int64_t anchors = 0;
    bool first = true;
    for (size_t start = 0; start < logits.size(); start += kMaxLevels) {
      Levels& levels = call.levels;
      levels = {};
      levels.classes = Divisor(static_cast<uint32_t>(o.num_classes), static_cast<uint64_t>(o.num_classes + kTileLogits));
      levels.images = images_of(logits[0]);
      call.first_level = static_cast<int32_t>(start);
      for (size_t l = start; l < logits.size() && l < start + kMaxLevels; ++l) {
        Level& level = levels.level[levels.count];
        level = level_of(logits[l], o.num_classes, static_cast<int>(l));
        level.logits = logits[l].const_data_ptr();
        level.out = outs.empty() || outs[l].numel() == 0 ? nullptr : outs[l].mutable_data_ptr();
        level.soft_targets = o.soft_targets.empty() ? nullptr : o.soft_targets[l].const_data_ptr();
        if (elementwise_incoming) {
          STD_TORCH_CHECK(grad_outputs.size() == logits.size() && grad_outputs[l].scalar_type() == logits[0].scalar_type(),
                          "grad_outputs: expected one a level, of the logits' dtype");
          check_order("grad_outputs", grad_outputs[l], logits[l]);
          level.incoming = grad_outputs[l].const_data_ptr();
        }
        if (!o.soft_targets.empty()) check_order("soft_targets", o.soft_targets[l], logits[l]);
        level.first_anchor = anchors;
        level.scale = o.level_scales[l];
        anchors += levels.images * level.anchors;
        level.tiles = {levels.tiles, tiles_per_image(level.image_logits)};
        levels.tiles += levels.images * level.tiles.per_image;
        ++levels.count;
      }
      const typename Device::Scratch partial(logits[0], loss ? levels.tiles : 0, false);
      call.partial = static_cast<double*>(partial.data());
      if (levels.tiles > 0) Device::run(call, logits[0]);
      if (loss) Device::reduce(call, loss->mutable_data_ptr(), loss->numel(), !first, logits[0]);
      first = false;
    }
  }
};

}  // namespace fastfocal
