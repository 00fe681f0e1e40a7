// Binary cross entropy with logits against an anchor's score: YOLOX, ultralytics' YOLO from v8 on, and torch's own.
//
//   negative: softplus(x) = max(x, 0) + log(1 + e),  d/dx = p = x < 0 ? e r : r
//   positive: B(x, s),  d/dx = p - s                                       (scored.h)
//   d2/dx2   = p (1 - p) = e r^2 for both
//
// It is the focal loss with gamma = 0, without the power that is 1 then.
#pragma once

#include "scored.h"

namespace fastfocal {

template <class S, Accuracy kAccuracy = Accuracy::kFloat>
struct Bce {
  static constexpr bool kScores = true;

  Bce() = default;
  FASTFOCAL_HD explicit Bce(const LossParams&) {}

  template <class V>
  FASTFOCAL_HD Term<V> negative(V x) const {
    return negative(x, exponential(x), x);
  }
  static constexpr bool kLogarithm = false;
  template <class V>
  FASTFOCAL_HD V exponential(V x) const {
    return exp_nonpositive(minus_absolute(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> negative(V x, V e, V) const {
    const V r = reciprocal(V(S(1)) + e);
    return {add_log1p_unit(e, clamp_min(x, V(S(0)))), select(is_negative(x), e * r, r)};
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score) const {
    return soft(x, score, exponential(x));
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return scored_weight(y, positive, negative);
  }
  static constexpr bool kSoftInSteps = true;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    return soft(x, y, exponential(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y, V e) const {  // B(x, 0) is the negative's
    return soft_cross_entropy(x, y, V(S(1)) - y, e);
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_negative(V x) const {
    const V e = exponential(x);
    return with_variance(negative(x, e, x).grad, e);
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V score) const {
    return second_soft(x, score);
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V x, V y) const {
    const V e = exponential(x);
    return with_variance(soft(x, y, e).grad, e);
  }
};

template <class S, Accuracy kAccuracy>
constexpr bool kHasSecond<Bce<S, kAccuracy>> = true;

// It has kernels of its own, not scored_focal.h's: its negative is cheaper.
struct BceLoss : RegisteredLoss {
  static constexpr LossKind kKind{6};
  static constexpr const char* kName = "bce_loss";
  static constexpr LossParameter kParameters[] = {
      {"unused", ParameterRange::kFinite}};  // a list of no numbers is none to torch
  static constexpr bool kScores = true;

  template <class S, Path, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams&, const Use& use) {
    use(Type<Bce<S, kAccuracy>>());
  }
};

}  // namespace fastfocal
