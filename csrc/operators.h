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
// An operator first checks all that it was given, then takes all the memory it needs, and only then writes: whatever fails, what
// came is as it was.
//
// Only PyTorch's stable ABI is used, so one binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "allocation.h"
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

// An error in the words given, with no word of where in the sources it arose.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
#define FASTFOCAL_CHECK(condition, ...)  \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

inline Reduction checked_reduction(int64_t reduction, Reduction last) {
  FASTFOCAL_CHECK(reduction >= 0 && reduction <= static_cast<int64_t>(last), "reduction: expected 0 to ",
                  static_cast<int64_t>(last), ", got ", reduction);
  return static_cast<Reduction>(reduction);
}

inline Family checked_family(int64_t family) {
  FASTFOCAL_CHECK(family == 0 || family == 1, "family: expected 0 or 1, got ", family);
  return static_cast<Family>(family);
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
  std::vector<int64_t> needs_grad;  // a flag per level; empty: no level

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
#define FASTFOCAL_OPTIONS                                                                                              \
  Options {                                                                                                            \
    std::move(codes), std::move(soft_targets).value_or(Tensors()), std::move(anchor_weight), std::move(class_weights), \
        std::move(divisor), std::move(level_scales), positive_weight, negative_weight, checked_family(family),         \
        {gamma, label_smoothing, beta, detach_modulating_factor}, num_classes,                                         \
        checked_reduction(reduction, Reduction::kNone), std::move(needs_grad)                                          \
  }

// ---------------------------------------------------------------------------------------------------------------------
// Checks and Levels. Python has checked what users pass and words the errors for them (arguments.py); these guard the
// kernels against a direct call: nothing is read or written out of bounds, whatever tensors come.

// What the checks ask of a tensor, each thing once: every question is a call into torch.
struct Facts {
  const Tensor& tensor;
  ScalarType dtype;
  int32_t device_type = 0, device_index;
  int64_t dim, numel;
  const int64_t *sizes, *strides;

  explicit Facts(const Tensor& t)
      : tensor(t),
        dtype(t.scalar_type()),
        device_index(t.get_device_index()),
        dim(t.dim()),
        numel(t.numel()),
        sizes(t.sizes().data()),
        strides(t.strides().data()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  }

  int64_t images() const { return dim == 2 ? 1 : sizes[0]; }  // of logits
  int64_t last() const {                                      // offset of the last element from the first
    int64_t offset = 0;
    for (int64_t d = 0; d < dim; ++d) offset += (sizes[d] - 1) * strides[d];
    return offset;
  }

  std::string shape() const {
    std::string text = "(";
    for (int64_t d = 0; d < dim; ++d) text += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
    return text + (dim == 1 ? ",)" : ")");
  }
  std::string device() const { return device_name(device_type, device_index); }
};

// The name of an argument in a message.
struct Argument {
  const char* name;
  int64_t level = -1;  // of a list

  std::string text() const { return level < 0 ? std::string(name) : std::string(name) + "[" + std::to_string(level) + "]"; }
};

#define FASTFOCAL_EXPECT(condition, argument, ...) FASTFOCAL_CHECK(condition, (argument).text(), ": expected ", __VA_ARGS__)

inline void check_dtype(const Argument& name, const Facts& t, ScalarType dtype) {
  FASTFOCAL_EXPECT(t.dtype == dtype, name, torch::headeronly::toString(dtype), ", got ",
                   torch::headeronly::toString(t.dtype));
}

// On the logits' device, every element of it within its storage (which may have been resized since).
inline void check_memory(const Argument& name, const Facts& t, const Facts& logits) {
  FASTFOCAL_EXPECT(t.device_type == logits.device_type && t.device_index == logits.device_index, name,
                   "the device of logits[0], ", logits.device(), ", got ", t.device());
  if (t.numel == 0) return;
  int64_t offset = 0, bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.tensor.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.tensor.get(), &bytes));
  const int64_t needed = (offset + t.last() + 1) * static_cast<int64_t>(t.tensor.element_size());
  FASTFOCAL_EXPECT(bytes >= needed, name, "a storage of at least ", needed, " bytes, got ", bytes);
}

inline bool is_contiguous(const Facts& t) {
  int64_t stride = 1;
  for (int64_t d = t.dim - 1; d >= 0; --d) {
    if (t.sizes[d] != 1 && t.strides[d] != stride) return t.numel == 0;
    stride *= t.sizes[d];
  }
  return true;
}
inline bool is_class_last(const Facts& t) {  // (N, C, H, W) in channels_last order
  const int64_t c = t.sizes[1], h = t.sizes[2], w = t.sizes[3];
  return (c == 1 || t.strides[1] == 1) && (w == 1 || t.strides[3] == c) && (h == 1 || t.strides[2] == w * c) &&
         (t.sizes[0] == 1 || t.strides[0] == h * w * c);
}

inline void check_contiguous(const Argument& name, const Facts& t) {
  FASTFOCAL_EXPECT(is_contiguous(t), name, "contiguous memory");
}

// Shape and memory order of the logits.
inline void check_order(const Argument& name, const Facts& t, const Facts& logits) {
  bool same = t.dim == logits.dim;
  for (int64_t d = 0; same && d < t.dim; ++d)
    same = t.sizes[d] == logits.sizes[d] && (t.sizes[d] <= 1 || t.numel == 0 || t.strides[d] == logits.strides[d]);
  FASTFOCAL_EXPECT(same, name, "the shape ", logits.shape(), " and the strides of its logits, got ",
                   t.shape() == logits.shape() ? "other strides" : t.shape());
}

// Contiguous, of one dtype, on the logits' device.
inline void check_operand(const Argument& name, const Tensor& tensor, const Facts& logits, ScalarType dtype, int64_t count) {
  const Facts t(tensor);
  check_dtype(name, t, dtype);
  check_memory(name, t, logits);
  check_contiguous(name, t);
  FASTFOCAL_EXPECT(t.numel == count, name, count, " numbers, got shape ", t.shape());
}

// The incoming gradient of a reduced loss: `count` numbers at any stride.
inline void check_incoming(const Argument& name, const Facts& t, const Facts& logits, ScalarType dtype, int64_t count) {
  check_dtype(name, t, dtype);
  check_memory(name, t, logits);
  FASTFOCAL_EXPECT(t.numel == count && t.dim <= 1, name, count, " numbers in one dimension or none, got shape ", t.shape());
}

// No two of the call's tensors share memory, where one of the two is written.
class Apart {
 public:
  // why: what writes it, or null
  void add(const Argument& name, const Tensor& tensor, const char* why) {
    const Facts t(tensor);
    if (t.numel == 0) return;
    const char* const begin = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t bytes = (t.last() + 1) * static_cast<int64_t>(tensor.element_size());
    memory_.push_back({name, begin, begin + bytes, why});
  }
  void check() const {
    for (const Memory& written : memory_) {
      if (written.why == nullptr) continue;
      for (const Memory& other : memory_)
        FASTFOCAL_CHECK(&other == &written || other.begin >= written.end || other.end <= written.begin, other.name.text(),
                        ": shares memory with ", written.name.text(), ", which ", written.why);
    }
  }

 private:
  struct Memory {
    Argument name;
    const char *begin, *end;
    const char* why;
  };
  std::vector<Memory> memory_;
};

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail("logits: expected float32, float16, bfloat16 or float64, got ", torch::headeronly::toString(type));
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
      fail("labels: expected int64, int32, int16, int8 or uint8, got ", torch::headeronly::toString(type));
  }
}

inline ScalarType accumulation_type(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The sizes of one level; its pointers are the caller's to fill.
inline Level level_of(const Facts& logits, int64_t classes, int64_t index) {
  Level level = {};
  const Argument name = {"logits", index};
  FASTFOCAL_CHECK(classes > 0 && classes <= INT32_MAX, "num_classes: expected 1 to 2^31 - 1, got ", classes);
  FASTFOCAL_EXPECT(logits.dim >= 2 && logits.dim <= 4, name, "2, 3 or 4 dimensions, got shape ", logits.shape());
  if (logits.dim == 4) {
    const int64_t channels = logits.sizes[1], h = logits.sizes[2], w = logits.sizes[3];
    FASTFOCAL_EXPECT(std::max(h, w) <= INT32_MAX && h * w <= INT32_MAX, name, "less than 2^31 cells, got shape ",
                     logits.shape());
    const int64_t cells = h * w;
    level.cells = Divisor(static_cast<uint32_t>(cells > 0 ? cells : 1), static_cast<uint64_t>(cells + kTileLogits));
    FASTFOCAL_EXPECT(channels % classes == 0, name, "channels that are a multiple of num_classes ", classes, ", got ",
                     channels);
    FASTFOCAL_EXPECT(channels / classes <= INT32_MAX, name, "less than 2^31 anchors, got shape ", logits.shape());
    level.anchors = channels / classes * cells;
    level.layout = is_class_last(logits) ? Layout::kClassLast : Layout::kClassFirst;
    FASTFOCAL_EXPECT(level.layout == Layout::kClassLast || is_contiguous(logits), name,
                     "contiguous or channels_last memory");
  } else {
    FASTFOCAL_EXPECT(logits.sizes[logits.dim - 1] == classes, name, classes, " classes in the last dimension, got shape ",
                     logits.shape());
    check_contiguous(name, logits);
    level.anchors = logits.sizes[logits.dim - 2];
    level.layout = Layout::kClassLast;
  }
  FASTFOCAL_EXPECT(level.anchors <= INT32_MAX, name, "less than 2^31 anchors, got ", level.anchors);
  if (classes == 1 && level.layout == Layout::kClassLast) {  // then it is one plane just as well, and kernels divide by it
    const uint64_t plane = level.anchors > 0 ? static_cast<uint64_t>(level.anchors) : 1;
    level.layout = Layout::kClassFirst;
    level.cells = Divisor(static_cast<uint32_t>(plane), plane + kTileLogits);
  }
  level.image_logits = level.anchors * classes;
  return level;
}

// Every level checked, and what the kernels need to know of it.
struct CheckedLogits {
  std::vector<Facts> facts;
  std::vector<Level> levels;
  int64_t images, anchors = 0;  // anchors of all levels and images
  ScalarType dtype, accumulation;

  CheckedLogits(const Tensors& logits, int64_t classes) {
    FASTFOCAL_CHECK(!logits.empty(), "logits: expected at least one level");
    facts.reserve(logits.size());
    levels.reserve(logits.size());
    for (const Tensor& t : logits) {
      const int64_t l = static_cast<int64_t>(levels.size());
      const Argument name = {"logits", l};
      facts.emplace_back(t);
      const Facts &first = facts[0], &level = facts.back();
      check_dtype(name, level, first.dtype);
      levels.push_back(level_of(level, classes, l));
      FASTFOCAL_EXPECT(level.dim == first.dim && level.images() == first.images(), name, first.dim, " dimensions and ",
                       first.images(), " images as level 0 has, got shape ", level.shape());
      FASTFOCAL_EXPECT(level.images() <= INT32_MAX, name, "less than 2^31 images, got shape ", level.shape());
      check_memory(name, level, first);
      levels.back().first_anchor = anchors;
      anchors += level.images() * levels.back().anchors;
    }
    images = facts[0].images();
    dtype = facts[0].dtype;
    accumulation = accumulation_type(dtype);
    dtype_of(dtype);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The operators over a Device

template <class Device>
struct Operators {
  static std::tuple<Tensors, Tensors> focal_loss(Tensors logits, FASTFOCAL_OPTIONS_PARAMETERS) {
    const Options options = FASTFOCAL_OPTIONS;
    const CheckedLogits checked(logits, num_classes);
    check(checked, options);
    Tensors gradients;
    if (options.needs_any()) gradients = like_needed(logits, options);
    if (options.reduction == Reduction::kNone) {
      // The elementwise loss and the gradient are two passes: nobody asks for both but to keep the gradient for later.
      const Tensors losses = like_all(logits);
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

  // losses: what focal_loss gives, allocated by the caller (torch.compile wants no lists from an operator that mutates).
  static void focal_loss_(Tensors logits, Tensors losses, FASTFOCAL_OPTIONS_PARAMETERS) {
    const Options options = FASTFOCAL_OPTIONS;
    const CheckedLogits checked(logits, num_classes);
    check(checked, options);
    const bool elementwise = options.reduction == Reduction::kNone;
    const size_t expected = elementwise ? logits.size() : 1;
    FASTFOCAL_CHECK(losses.size() == expected, "losses: expected ", expected, " tensors, got ", losses.size());
    for (size_t l = 0; l < losses.size(); ++l) {
      const Argument name = {"losses", static_cast<int64_t>(l)};
      if (elementwise) {
        check_elementwise(name, Facts(losses[l]), checked.facts[l], checked.facts[0]);
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

  static Tensors focal_loss_backward(Tensors grad_outputs, Tensors logits, FASTFOCAL_OPTIONS_PARAMETERS) {
    const Options options = FASTFOCAL_OPTIONS;
    const CheckedLogits checked(logits, num_classes);
    check(checked, options);
    const bool elementwise = options.reduction == Reduction::kNone;
    const size_t expected = elementwise ? logits.size() : 1;
    FASTFOCAL_CHECK(grad_outputs.size() == expected, "grad_outputs: expected ", expected, " tensors, got ",
                    grad_outputs.size());
    for (size_t l = 0; l < grad_outputs.size(); ++l) {
      const Argument name = {"grad_outputs", static_cast<int64_t>(l)};
      const Facts g(grad_outputs[l]);
      if (elementwise) {
        check_elementwise(name, g, checked.facts[l], checked.facts[0]);
      } else {
        check_incoming(name, g, checked.facts[0], checked.accumulation, loss_size(checked, options));
      }
    }
    Tensors gradients = like_needed(logits, options);
    run_groups(logits, checked, options, Output::kGradient, gradients, grad_outputs, nullptr);
    return gradients;
  }

  static std::tuple<Tensor, Tensor> label_codes(Tensors labels, Tensors logits, int64_t num_classes,
                                                int64_t background_index, int64_t ignore_index, int64_t count,
                                                double minimum) {
    const CheckedLogits checked(logits, num_classes);
    const int64_t images = checked.images;
    const bool one = labels.size() == 1;  // for all levels
    FASTFOCAL_CHECK(one || labels.size() == logits.size(), "labels: expected 1 or ", logits.size(), " tensors, got ",
                    labels.size());
    FASTFOCAL_CHECK(count >= 0 && count <= static_cast<int64_t>(Count::kLogits), "count: expected 0 to ",
                    static_cast<int64_t>(Count::kLogits), ", got ", count);
    FASTFOCAL_CHECK(minimum >= 0, "minimum: expected a number >= 0, got ", minimum);
    int64_t columns = 0;
    for (const Level& level : checked.levels) columns += level.anchors;
    std::vector<Facts> labelled;
    labelled.reserve(labels.size());
    for (size_t l = 0; l < labels.size(); ++l) {
      const Argument name = {"labels", static_cast<int64_t>(l)};
      labelled.emplace_back(labels[l]);
      const Facts& t = labelled.back();
      const int64_t expected = one ? columns : checked.levels[l].anchors;
      check_dtype(name, t, labelled[0].dtype);
      FASTFOCAL_EXPECT(t.dim == 2 && t.sizes[0] == images && t.sizes[1] == expected, name, "shape (", images, ", ", expected,
                       "), got ", t.shape());
      check_memory(name, t, checked.facts[0]);
    }

    const bool wide = num_classes > INT16_MAX;
    LabelCall call = {};
    call.type = label_type(labelled[0].dtype);
    const Count what = static_cast<Count>(count);
    const int64_t divisors = what == Count::kPositivesPerImage ? images : what == Count::kNothing ? 0 : kNoDimension;
    const Tensor out = new_numbers(logits[0], checked.anchors, wide ? ScalarType::Int : ScalarType::Short);
    const Tensor divisor = new_numbers(logits[0], divisors, ScalarType::Double);
    const typename Device::Scratch counts(logits[0], images * 2, true);

    call.wide_codes = wide;
    call.images = images;
    call.rule = {num_classes, background_index, ignore_index};
    call.codes = out.mutable_data_ptr();
    call.counts = static_cast<int64_t*>(counts.data());
    int64_t column = 0;
    for (size_t start = 0; start < logits.size(); start += kMaxLevels) {
      call.first_level = static_cast<int32_t>(start);
      call.count = 0;
      call.chunks = 0;
      for (size_t l = start; l < logits.size() && l < start + kMaxLevels; ++l) {
        const Level& level = checked.levels[l];
        const Facts& t = labelled[one ? 0 : l];
        if (!one) column = 0;
        const uint64_t cells = level.cells.divisor, anchors = static_cast<uint64_t>(level.anchors);
        LabelLevel& part = call.level[call.count++];
        part.labels = static_cast<const char*>(t.tensor.const_data_ptr()) +
                      column * t.strides[1] * static_cast<int64_t>(t.tensor.element_size());
        part.image_stride = t.strides[0];
        part.anchor_stride = t.strides[1];
        part.first_anchor = level.first_anchor;
        part.anchors = level.anchors;
        part.cells = static_cast<int64_t>(cells);
        // Class first, the codes of a cell's anchors lie apart: [a][cell].
        const uint64_t a = level.layout == Layout::kClassFirst && anchors > cells ? anchors / cells : 1;
        part.per_cell = Divisor(static_cast<uint32_t>(a), anchors);
        part.chunks = {call.chunks, (level.anchors + kChunkAnchors - 1) / kChunkAnchors};
        call.chunks += images * part.chunks.per_image;
        column += level.anchors;
      }
      if (call.chunks > 0) Device::encode(call, logits[0]);
    }
    if (divisor.numel() > 0) {
      double* const to = static_cast<double*>(divisor.mutable_data_ptr());
      Device::count({call.counts, to, images, num_classes, checked.anchors, what, minimum}, logits[0]);
    }
    return {out, divisor};
  }

  static Tensors scale_gradients(Tensors gradients, Tensor grad_output, int64_t reduction) {
    const CheckedScale checked(gradients, grad_output, reduction);
    Tensors scaled = like_all(gradients);
    scale(gradients, scaled, grad_output, checked);
    return scaled;
  }

  static void scale_gradients_(Tensors gradients, Tensor grad_output, int64_t reduction) {
    const CheckedScale checked(gradients, grad_output, reduction);
    Apart apart;
    for (size_t l = 0; l < gradients.size(); ++l)
      apart.add({"gradients", static_cast<int64_t>(l)}, gradients[l], "is scaled in place");
    apart.add({"grad_output"}, grad_output, nullptr);
    apart.check();
    scale(gradients, gradients, grad_output, checked);
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
    out.reserve(tensors.size());
    for (const Tensor& t : tensors) out.push_back(fresh_like(t));
    return out;
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

  static void check_number(const char* name, double value, double least, double most) {
    FASTFOCAL_CHECK(value >= least && value <= most, name, ": expected a finite number", least == 0 ? " >= 0" : "",
                    most == 1 ? " and <= 1" : "", ", got ", value);
  }

  // Everything beside the logits.
  static void check(const CheckedLogits& logits, const Options& options) {
    const size_t levels = logits.levels.size();
    const Facts& first = logits.facts[0];
    const bool star = options.family == Family::kFocalLossStar;
    check_number("gamma", options.parameters.gamma, 0, DBL_MAX);
    FASTFOCAL_CHECK(!star || options.parameters.gamma > 0,
                    "gamma: expected a number > 0, by which focal loss star is divided");
    check_number("label_smoothing", options.parameters.label_smoothing, 0, 1);
    check_number("beta", options.parameters.beta, -DBL_MAX, DBL_MAX);
    check_number("positive_weight", options.positive_weight, -DBL_MAX, DBL_MAX);
    check_number("negative_weight", options.negative_weight, -DBL_MAX, DBL_MAX);
    FASTFOCAL_CHECK(options.level_scales.size() == levels, "level_scales: expected ", levels,
                    " numbers, one per level, got ", options.level_scales.size());
    FASTFOCAL_CHECK(options.needs_grad.empty() || options.needs_grad.size() == levels, "needs_grad: expected none or ",
                    levels, " flags, one per level, got ", options.needs_grad.size());
    const bool soft = !options.soft_targets.empty();
    FASTFOCAL_CHECK(soft != options.codes.has_value(), "codes: expected either these or soft_targets");
    if (soft) {
      FASTFOCAL_CHECK(options.soft_targets.size() == levels, "soft_targets: expected ", levels, " levels, got ",
                      options.soft_targets.size());
      const ScalarType dtype = options.soft_targets[0].scalar_type();
      FASTFOCAL_EXPECT(dtype == logits.dtype || dtype == logits.accumulation, (Argument{"soft_targets", 0}),
                       "the logits' dtype, ", torch::headeronly::toString(logits.dtype), ", or ",
                       torch::headeronly::toString(logits.accumulation), ", got ", torch::headeronly::toString(dtype));
      for (size_t l = 0; l < levels; ++l) {
        const Argument name = {"soft_targets", static_cast<int64_t>(l)};
        const Facts t(options.soft_targets[l]);
        check_dtype(name, t, dtype);
        check_order(name, t, logits.facts[l]);
        check_memory(name, t, first);
      }
    } else {
      const ScalarType code = options.num_classes > INT16_MAX ? ScalarType::Int : ScalarType::Short;
      check_operand({"codes"}, *options.codes, first, code, logits.anchors);
    }
    const ScalarType s = logits.accumulation;
    if (options.anchor_weight) check_operand({"anchor_weight"}, *options.anchor_weight, first, s, logits.anchors);
    if (options.class_weights) check_operand({"class_weights"}, *options.class_weights, first, s, 2 * options.num_classes);
    if (options.divisor) {
      const int64_t count = options.divisor->numel();
      check_operand({"divisor"}, *options.divisor, first, ScalarType::Double, count == 1 ? 1 : logits.images);
    }
  }

  // The loss of each logit of a level, or its incoming gradient.
  static void check_elementwise(const Argument& name, const Facts& t, const Facts& level, const Facts& first) {
    check_dtype(name, t, level.dtype);
    check_order(name, t, level);
    check_memory(name, t, first);
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
    if (options.codes) apart.add({"codes"}, *options.codes, nullptr);
    if (options.anchor_weight) apart.add({"anchor_weight"}, *options.anchor_weight, nullptr);
    if (options.class_weights) apart.add({"class_weights"}, *options.class_weights, nullptr);
    if (options.divisor) apart.add({"divisor"}, *options.divisor, nullptr);
    apart.check();
  }

  struct CheckedScale {
    std::vector<int64_t> logits;  // of an image of each level
    int64_t images = 0;           // 0: no level has any
    Reduction reduction;
    DType dtype = DType::kFloat32;

    CheckedScale(const Tensors& gradients, const Tensor& grad_output, int64_t reduction_)
        : reduction(checked_reduction(reduction_, Reduction::kImage)) {
      if (gradients.empty()) return;
      const Facts first(gradients[0]);
      dtype = dtype_of(first.dtype);
      logits.reserve(gradients.size());
      for (size_t l = 0; l < gradients.size(); ++l) {
        const Argument name = {"gradients", static_cast<int64_t>(l)};
        const Facts t(gradients[l]);
        check_dtype(name, t, first.dtype);
        check_memory(name, t, first);
        logits.push_back(0);
        if (t.numel == 0) continue;  // a level that needs no gradient, or has no logits
        FASTFOCAL_EXPECT(t.dim >= 2 && t.dim <= 4, name, "2, 3 or 4 dimensions, got shape ", t.shape());
        FASTFOCAL_EXPECT(is_contiguous(t) || (t.dim == 4 && is_class_last(t)), name, "contiguous or channels_last memory");
        FASTFOCAL_EXPECT(images == 0 || t.images() == images, name, images, " images as the levels before have, got shape ",
                         t.shape());
        images = t.images();
        logits.back() = t.numel / images;
      }
      const int64_t levels = static_cast<int64_t>(gradients.size()), numbers = grad_output.numel();
      const int64_t expected = reduction == Reduction::kLevel   ? levels
                               : reduction == Reduction::kImage ? (images == 0 ? numbers : images)
                                                                : 1;
      check_incoming({"grad_output"}, Facts(grad_output), first, accumulation_type(first.dtype), expected);
    }
  };

  static void scale(const Tensors& source, const Tensors& target, const Tensor& grad_output, const CheckedScale& checked) {
    if (checked.images == 0) return;
    ScaleCall call = {};
    call.reduction = checked.reduction;
    call.dtype = checked.dtype;
    call.images = checked.images;
    call.incoming = grad_output.const_data_ptr();
    call.incoming_stride = grad_output.dim() == 0 ? 0 : grad_output.stride(0);
    for (size_t start = 0; start < source.size(); start += kMaxLevels) {
      call.first_level = static_cast<int32_t>(start);
      call.count = 0;
      call.pieces = 0;
      for (size_t l = start; l < source.size() && l < start + kMaxLevels; ++l) {
        const int64_t image_logits = checked.logits[l];
        const Span pieces = {call.pieces, (image_logits + kTileLogits - 1) / kTileLogits};
        call.level[call.count++] = {source[l].const_data_ptr(), target[l].mutable_data_ptr(), image_logits, pieces};
        call.pieces += call.images * pieces.per_image;
      }
      if (call.pieces > 0) Device::scale(call, source[0]);
    }
  }

  // Fills a Call for each group of kMaxLevels levels, runs its tiles and, where a loss is wanted, reduces their sums.
  // outs: none, or one tensor per level, an empty one where nothing is wanted. Everything has been checked.
  static void run_groups(const Tensors& logits, const CheckedLogits& checked, const Options& o, Output output,
                         const Tensors& outs, const Tensors& grad_outputs, const Tensor* loss) {
    const bool elementwise_incoming = !grad_outputs.empty() && o.reduction == Reduction::kNone;
    Call call = {};
    call.soft = !o.soft_targets.empty();
    call.incoming_elements = elementwise_incoming;
    call.output = output;
    call.dtype = dtype_of(checked.dtype);
    call.reduction = o.reduction;
    call.codes = o.codes ? o.codes->const_data_ptr() : nullptr;
    call.wide_codes = o.num_classes > INT16_MAX;
    call.wide_soft_targets = !o.soft_targets.empty() && o.soft_targets[0].scalar_type() != checked.dtype;
    call.anchor_weight = o.anchor_weight ? o.anchor_weight->const_data_ptr() : nullptr;
    call.class_weights = o.class_weights ? o.class_weights->const_data_ptr() : nullptr;
    call.positive_weight = o.positive_weight;
    call.negative_weight = o.negative_weight;
    call.family = o.family;
    call.parameters = o.parameters;
    call.divisor = o.divisor ? static_cast<const double*>(o.divisor->const_data_ptr()) : nullptr;
    call.divisors = o.divisor ? o.divisor->numel() : 0;
    if (!grad_outputs.empty() && !elementwise_incoming) {
      const Tensor& g = grad_outputs[0];
      call.incoming = g.const_data_ptr();
      call.incoming_stride = g.dim() == 0 ? 0 : g.stride(0);
    }

    std::vector<int64_t> tiles;  // of each group; memory for all sums is taken before the first kernel writes
    for (size_t l = 0; l < logits.size(); ++l) {
      if (l % kMaxLevels == 0) tiles.push_back(0);
      tiles.back() += checked.images * tiles_per_image(checked.levels[l].image_logits);
    }
    const typename Device::Scratch partial(logits[0], loss ? *std::max_element(tiles.begin(), tiles.end()) : 0, false);
    call.partial = static_cast<double*>(partial.data());

    for (size_t start = 0; start < logits.size(); start += kMaxLevels) {
      Levels& levels = call.levels;
      levels = {};
      levels.classes = Divisor(static_cast<uint32_t>(o.num_classes), static_cast<uint64_t>(o.num_classes + kTileLogits));
      levels.images = checked.images;
      call.first_level = static_cast<int32_t>(start);
      for (size_t l = start; l < logits.size() && l < start + kMaxLevels; ++l) {
        Level& level = levels.level[levels.count];
        level = checked.levels[l];
        level.logits = logits[l].const_data_ptr();
        level.out = outs.empty() || outs[l].numel() == 0 ? nullptr : outs[l].mutable_data_ptr();
        level.soft_targets = o.soft_targets.empty() ? nullptr : o.soft_targets[l].const_data_ptr();
        if (elementwise_incoming) level.incoming = grad_outputs[l].const_data_ptr();
        level.scale = o.level_scales[l];
        level.tiles = {levels.tiles, tiles_per_image(level.image_logits)};
        levels.tiles += levels.images * level.tiles.per_image;
        ++levels.count;
      }
      if (levels.tiles > 0) Device::run(call, logits[0]);
      if (loss) Device::reduce(call, loss->mutable_data_ptr(), loss->numel(), start > 0, logits[0]);
    }
  }
};

}  // namespace fastfocal
