// What all losses share: what a kernel gets of them, what registry.h is told of them, and the weights beside them.
//
// A loss is a header of its own, and a place in the list of registry.h. It has one struct or more with its formula, and at its end
// a RegisteredLoss. Kernels take the former as a template parameter and ask of it:
//
//   static constexpr bool kScores;          positive() reads the anchor's score
//   explicit Loss(const LossParams&);
//   Term<V> negative(V x);                  of a logit whose target is 0
//   V exponential(V x); V logarithm(V e); Term<V> negative(V x, V e, V log);
//                                           the same in steps, for a kernel that wants them apart; log is looked at, and made,
//                                           only where static constexpr bool kLogarithm
//   Term<V> positive(V x, V score);         of the logit of an anchor's class; score: looked at only where kScores
//   Term<V> soft(V x, V y);                 of a soft target y; where static constexpr bool kSoftInSteps also
//   Term<V> soft(V x, V y, V e);            with e = exponential(x)
//   static V soft_weight(V y, V positive, V negative);   the weight of a soft target, of those of the two classes
//   Derivatives<V> second_negative(V x), second_positive(V x, V score), second_soft(V x, V y);
//                                           where kHasSecond<Loss>, which no loss inherits, and never for Accuracy::kSixteenBits;
//                                           without them create_graph=True is an error that names the loss
//
// A loss that takes an anchor's classes together (RegisteredLoss::kTakesAnchors) has kernels of its own instead, which ask for
//
//   static V exponential(V x), exponential(V x, V greatest); V distance(V x, V greatest);
//   AnchorTerm<V> anchor(V distance, V own, V others);      see softmax_focal.h
//
// A negative logit of -inf costs exactly 0 and has gradient 0: kernels put it where nothing is to be counted. The weights of the
// two classes (alpha), of anchors and of levels stay outside: kernels multiply them in.
#pragma once

#include <cstddef>

#include "../dispatch.h"
#include "../elementary.h"

namespace fastfocal {

// A loss's number: the operators' argument `loss`. Each loss states its own.
enum class LossKind : int32_t {};

// The loss and the numbers of its own, in the order of its kParameters.
constexpr size_t kMaxLossParameters = 4;
struct LossParams {
  LossKind kind;
  double value[kMaxLossParameters];
};

// The name of such a number, and what it may be.
enum class ParameterRange { kFinite, kNonnegative, kPositive, kUnit, kFlag };
struct LossParameter {
  const char* name;
  ParameterRange range;
};

template <class V>
struct Term {
  V loss;
  V grad;  // its derivative by the logit
};

// Whether a loss has second derivatives.
template <class Loss>
constexpr bool kHasSecond = false;

// Both derivatives by the logit.
template <class V>
struct Derivatives {
  V grad;
  V second;
};

enum class Gamma { kTwo, kAny };

// What a result is rounded to. For 16 bits a GPU's kernel saves instructions: off by at most 1e-5 before that one rounding,
// which is off by 5e-4 itself.
enum class Accuracy { kFloat, kSixteenBits };

// Which kernels a loss is wanted for.
enum class Path {
  kFast,            // labels, constant weights: where has_fast_kernel()
  kGeneric,         // everything
  kGenericAnyGamma  // everything, but a usual exponent is one like others: fewer kernels where none is faster
};

// What the operators are told of a loss. Each has a struct derived from this, with
//
//   static constexpr LossKind kKind;                its number: `kind` in its Python file
//   static constexpr const char* kName;             of its function in Python
//   static constexpr LossParameter kParameters[];   its numbers, in the order of LossParams::value; at least one
//   template <class S, Path kPath, Accuracy kAccuracy, class Use>
//   static void with_formula(const LossParams&, const Use& use);
//                                                   calls use(Type<Formula>()) for what these parameters are computed with.
//                                                   Each Formula in a call of use is one more set of kernels to compile
//
// and, where they differ, of what is here.
struct RegisteredLoss {
  // Whether it reads scores, as its formulas say.
  static constexpr bool kScores = false;
  // Whether it takes an anchor's classes together: one loss for each anchor, tiles of whole anchors, labels alone as targets.
  static constexpr bool kTakesAnchors = false;
  // Whether with_formula has one for Path::kFast.
  FASTFOCAL_HD static bool has_fast_kernel(const LossParams&) { return true; }
};

// For with_formula: either the formula for the exponents that people use, or the one for any.
template <Path kPath, class Usual, class Any, class Use>
FASTFOCAL_HOST void with_exponents(bool usual, const Use& use) {
  if constexpr (kPath != Path::kGenericAnyGamma) {
    if (usual) return use(Type<Usual>());
  }
  use(Type<Any>());
}

// A loss times a weight; a weight of 0 beats an infinite loss (but not NaN).
template <class V, class W>
FASTFOCAL_HD V weigh(V loss, W weight) {
  return select(V(0) - smallest_normal<V>() < minus_absolute(V(weight)), clamp_max(loss, V(kLarge)), loss) * V(weight);
}

// The weight of a soft target y between those of the two classes. Their difference, rounded, would be too coarse for the smaller.
template <class V>
FASTFOCAL_HD V soft_weight(V y, V positive, V negative) {
  return fused_multiply_add(y, positive, (V(1) - y) * negative);
}

}  // namespace fastfocal
