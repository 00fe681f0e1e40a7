// What a direct call of an operator is checked for. Python has checked what users pass and words the errors for them; these
// checks guard the kernels: nothing is read or written out of bounds, whatever tensors and numbers come.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cfloat>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocation.h"
#include "kernel_params.h"

namespace fastfocal {

using Tensors = std::vector<Tensor>;

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

inline void check_number(const char* name, double value) {
  FASTFOCAL_CHECK(value >= -DBL_MAX && value <= DBL_MAX, name, ": expected a finite number, got ", value);
}

// The loss of each logit of a level, or its incoming gradient.
inline void check_elementwise(const Argument& name, const Facts& t, const Facts& level, const Facts& first) {
  check_dtype(name, t, level.dtype);
  check_order(name, t, level);
  check_memory(name, t, first);
}

// The same of a loss that takes an anchor's classes together: one number for each anchor, in the caller's order.
inline void check_anchorwise(const Argument& name, const Tensor& tensor, const Facts& level, const Facts& first,
                             int64_t anchors) {
  check_operand(name, tensor, first, level.dtype, anchors);
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

inline Reduction checked_reduction(int64_t reduction, Reduction last = Reduction::kNone) {
  FASTFOCAL_CHECK(reduction >= 0 && reduction <= static_cast<int64_t>(last), "reduction: expected 0 to ",
                  static_cast<int64_t>(last), ", got ", reduction);
  return static_cast<Reduction>(reduction);
}

inline LossKind checked_loss(int64_t loss) {
  FASTFOCAL_CHECK(loss >= 0 && loss < Losses::kCount, "loss: expected 0 to ", Losses::kCount - 1, ", got ", loss);
  return static_cast<LossKind>(loss);
}

inline const char* words_of(ParameterRange range) {
  switch (range) {
    case ParameterRange::kNonnegative:
      return "a finite number >= 0";
    case ParameterRange::kPositive:
      return "a finite number > 0";
    case ParameterRange::kUnit:
      return "a number >= 0 and <= 1";
    case ParameterRange::kFlag:
      return "0 or 1";
    case ParameterRange::kFinite:
    default:
      return "a finite number";
  }
}

// The numbers of the loss' own, as many as it has and each in its range.
inline LossParams checked_loss_parameters(LossKind kind, const std::vector<double>& values) {
  LossParams params = {kind, {}};
  const LossFacts& facts = facts_of(kind);
  FASTFOCAL_CHECK(values.size() == facts.count, "loss_parameters: expected ", facts.count, " numbers for loss ",
                  static_cast<int64_t>(kind), ", got ", values.size());
  for (size_t i = 0; i < facts.count; ++i) {
    const double x = params.value[i] = values[i];
    const ParameterRange range = facts.parameters[i].range;
    const bool inside = x >= -DBL_MAX && x <= DBL_MAX && (range == ParameterRange::kFinite || x >= 0) &&
                        (range != ParameterRange::kPositive || x > 0) && (range != ParameterRange::kUnit || x <= 1) &&
                        (range != ParameterRange::kFlag || x == 0 || x == 1);
    FASTFOCAL_CHECK(inside, "loss_parameters[", i, "]: expected ", facts.parameters[i].name, ", ", words_of(range), ", got ",
                    x);
  }
  return params;
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
  int64_t columns = 0;          // of an image
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
      levels.back().first_score = columns;
      anchors += level.images() * levels.back().anchors;
      columns += levels.back().anchors;
    }
    images = facts[0].images();
    dtype = facts[0].dtype;
    accumulation = accumulation_type(dtype);
    dtype_of(dtype);
  }
};

// Scores lie as the packed labels, or they are the caller's rows: of each image those of all levels, in the caller's order.
inline bool are_rows(const Tensor& scores) { return scores.dim() == 2; }
inline void check_scores(const Tensor& scores, const CheckedLogits& logits) {
  const Argument name = {"scores"};
  if (!are_rows(scores)) return check_operand(name, scores, logits.facts[0], logits.accumulation, logits.anchors);
  const Facts t(scores);
  check_dtype(name, t, logits.accumulation);
  FASTFOCAL_EXPECT(t.sizes[0] == logits.images && t.sizes[1] == logits.columns, name, "shape (", logits.images, ", ",
                   logits.columns, "), or as many numbers in one dimension, got ", t.shape());
  FASTFOCAL_EXPECT(t.strides[1] == 1 || t.sizes[1] <= 1, name, "rows side by side, got strides (", t.strides[0], ", ",
                   t.strides[1], ")");
  check_memory(name, t, logits.facts[0]);
}

}  // namespace fastfocal
