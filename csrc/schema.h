// The table of options: one declaration of the arguments that say what is computed, the same in four operators. The schemas, the
// struct Options and the operators' parameter lists are all made of it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>

#include "checks.h"

namespace fastfocal {

// X(type in the schema, type of the argument, type in Options, name)
#define FASTFOCAL_OPTIONS(X)                                                \
  X("Tensor?", std::optional<Tensor>, std::optional<Tensor>, packed_labels) \
  X("Tensor[]?", std::optional<Tensors>, Tensors, soft_targets)             \
  X("Tensor?", std::optional<Tensor>, std::optional<Tensor>, scores)        \
  X("Tensor?", std::optional<Tensor>, std::optional<Tensor>, anchor_weight) \
  X("Tensor?", std::optional<Tensor>, std::optional<Tensor>, class_weights) \
  X("Tensor?", std::optional<Tensor>, std::optional<Tensor>, class_mask)    \
  X("Tensor?", std::optional<Tensor>, std::optional<Tensor>, divisor)       \
  X("float[]", std::vector<double>, std::vector<double>, level_scales)      \
  X("float", double, double, positive_weight)                               \
  X("float", double, double, negative_weight)                               \
  X("int", int64_t, LossKind, loss)                                         \
  X("float[]", std::vector<double>, std::vector<double>, loss_parameters)   \
  X("int", int64_t, int64_t, num_classes)                                   \
  X("int", int64_t, int64_t, first_class)                                   \
  X("int", int64_t, Reduction, reduction)                                   \
  X("int[]", std::vector<int64_t>, std::vector<int64_t>, needs_grad)

// As the schemas have them, each after a comma: options never come first.
#define FASTFOCAL_OPTION_SCHEMA(schema, argument, kept, name) ", " schema " " #name
#define FASTFOCAL_OPTIONS_SCHEMA FASTFOCAL_OPTIONS(FASTFOCAL_OPTION_SCHEMA)

// As an operator's function has them, likewise.
#define FASTFOCAL_OPTION_PARAMETER(schema, argument, kept, name) , argument name
#define FASTFOCAL_OPTIONS_PARAMETERS FASTFOCAL_OPTIONS(FASTFOCAL_OPTION_PARAMETER)

struct Options {
#define FASTFOCAL_OPTION_MEMBER(schema, argument, kept, name) kept name;
  FASTFOCAL_OPTIONS(FASTFOCAL_OPTION_MEMBER)
#undef FASTFOCAL_OPTION_MEMBER

  // needs_grad: a flag per level; none: no level
  bool needs(size_t level) const { return level < needs_grad.size() && needs_grad[level] != 0; }
  bool needs_any() const {
    return std::any_of(needs_grad.begin(), needs_grad.end(), [](int64_t flag) { return flag != 0; });
  }
};

// An argument as Options keeps it.
template <class Kept, class Argument>
Kept kept(Argument& value) {
  if constexpr (std::is_same_v<Kept, LossKind>) {
    return checked_loss(value);
  } else if constexpr (std::is_same_v<Kept, Reduction>) {
    return checked_reduction(value);
  } else if constexpr (std::is_same_v<Kept, Tensors>) {
    return std::move(value).value_or(Tensors());
  } else {
    return std::move(value);
  }
}

// Of the parameters of that function.
#define FASTFOCAL_OPTION_VALUE(schema, argument, type, name) kept<type>(name),
#define FASTFOCAL_GIVEN_OPTIONS \
  Options { FASTFOCAL_OPTIONS(FASTFOCAL_OPTION_VALUE) }

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "pack_labels(Tensor[] labels, Tensor[] logits, Tensor? scores, int num_classes, int background_index, int "
      "ignore_index, "
      "int count, float minimum, bool background_is_class=False, bool one_channel=False) -> (Tensor packed_labels, Tensor "
      "divisor)");
  m.def("pyramid_loss(Tensor[] logits" FASTFOCAL_OPTIONS_SCHEMA ") -> (Tensor[] losses, Tensor[] gradients)");
  m.def("pyramid_loss_(Tensor(a!)[] logits, Tensor(b!)[] losses" FASTFOCAL_OPTIONS_SCHEMA ") -> ()");
  m.def("pyramid_loss_backward(Tensor[] grad_outputs, Tensor[] logits" FASTFOCAL_OPTIONS_SCHEMA ") -> Tensor[]");
  m.def(
      "pyramid_loss_double_backward(Tensor[] grad_gradients, Tensor[] grad_outputs, Tensor[] logits" FASTFOCAL_OPTIONS_SCHEMA
      ") -> (Tensor[] grad_grad_outputs, Tensor[] grad_logits)");
  m.def("scale_gradients(Tensor[] gradients, Tensor grad_output, int reduction) -> Tensor[]");
  m.def("scale_gradients_(Tensor(a!)[] gradients, Tensor grad_output, int reduction) -> ()");
}

}  // namespace fastfocal
