// Varifocal loss, Zhang et al. 2021, arXiv:2008.13367, equation 2: the focal loss's negatives, positives by their score s.
//
//   negative: p^gamma softplus(x)             focal.h has its derivation; alpha is a weight and stays outside
//   positive: s B(x, s),  d/dx = s (p - s)    or, not weighted by the IoU, B(x, s) and p - s (scored.h)
//     d2/dx2 = s p (1 - p)                    or p (1 - p)
//
// The negative's p^gamma has a derivative in VarifocalNet's code, mmdetection's and ultralytics'; RT-DETR and D-FINE, in
// transformers too, take it for a constant (detach_modulating_factor). A positive's score is data.
#pragma once

#include "focal.h"
#include "scored.h"

namespace fastfocal {

template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct Varifocal : Focal<S, kGamma, false, kAccuracy> {
  using Negative = Focal<S, kGamma, false, kAccuracy>;
  bool iou_weighted;

  static constexpr bool kScores = true;

  Varifocal() = default;
  FASTFOCAL_HD explicit Varifocal(const LossParams& params)
      : Negative(params.value[0], 0, params.value[2] != 0), iou_weighted(params.value[1] != 0) {}

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score) const {
    return positive(x, score, this->exponential(x));
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return scored_weight(y, positive, negative);
  }
  static constexpr bool kSoftInSteps = true;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    return soft(x, y, this->exponential(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y, V e) const {
    return select_term(is_negative_target(y), this->negative(x, e, this->logarithm(e)), positive(x, y, e));
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V score) const {
    const V e = this->exponential(x);
    const Derivatives<V> d = with_variance(soft_cross_entropy(x, score, V(S(1)) - score, e).grad, e);
    if (!iou_weighted) return d;
    return {d.grad * score, d.second * score};
  }

 private:
  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V score, V e) const {
    const Term<V> t = soft_cross_entropy(x, score, V(S(1)) - score, e);
    if (!iou_weighted) return t;
    return {weigh(t.loss, score), t.grad * score};
  }
};

struct VarifocalLoss : RegisteredScoredFocal {
  static constexpr LossKind kKind{2};
  static constexpr const char* kName = "varifocal_loss";
  static constexpr LossParameter kParameters[] = {{"gamma", ParameterRange::kNonnegative},
                                                  {"iou_weighted", ParameterRange::kFlag},
                                                  {"detach_modulating_factor", ParameterRange::kFlag}};
};

}  // namespace fastfocal
