// What all losses share: which there are, their numbers, what a kernel gets of them, and the weights beside them.
//
// A loss is a struct in a header of its own; registry.h names it. Kernels take it as a template parameter and ask of it:
//
//   static constexpr bool kScores;          positive() reads the anchor's score
//   static constexpr LossParameter kParameters[];   its numbers, in the order of LossParams::value
//   explicit Loss(const LossParams&);
//   Term<V> negative(V x);                  of a logit whose target is 0
//   V exponential(V x); V logarithm(V e); Term<V> negative(V x, V e, V log);
//                                           the same in steps, for a kernel that wants them apart; log is looked at, and made,
//                                           only where static constexpr bool kLogarithm
//   Term<V> positive(V x, V score);         of the logit of an anchor's class; score: looked at only where kScores
//   Term<V> soft(V x, V y);                 of a soft target y; where static constexpr bool kSoftInSteps also
//   Term<V> soft(V x, V y, V e);            with e = exponential(x)
//   static V soft_weight(V y, V positive, V negative);   the weight of a soft target, of those of the two classes
//
// A loss that takes an anchor's classes together (takes_anchors() in registry.h) has kernels of its own instead, which ask for
//
//   static V exponential(V x), exponential(V x, V greatest); V distance(V x, V greatest);
//   AnchorTerm<V> anchor(V distance, V own, V others);      see softmax_focal.h
//
// A negative logit of -inf costs exactly 0 and has gradient 0: kernels put it where nothing is to be counted. The weights of the
// two classes (alpha), of anchors and of levels stay outside: kernels multiply them in.
#pragma once

#include <cstddef>

#include "../elementary.h"

namespace fastfocal {

enum class LossKind : int32_t {
  kFocal = 0,
  kFocalStar = 1,
  kVarifocal = 2,
  kQualityFocal = 3,
  kMatchabilityAware = 4,
  kIouAwareBce = 5,
  kBce = 6,
  kGaussianFocal = 7,
  kAsymmetric = 8,
  kSoftmaxFocal = 9
};

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

enum class Gamma { kTwo, kAny };

// What a result is rounded to. For 16 bits a GPU's kernel saves instructions: off by at most 1e-5 before that one rounding,
// which is off by 5e-4 itself.
enum class Accuracy { kFloat, kSixteenBits };

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
