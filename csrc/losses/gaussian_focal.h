// The penalty-reduced focal loss of heatmaps, Law and Deng 2018 (CornerNet), arXiv:1808.01244, equation 1: targets are
// Gaussians around objects' centers, and only their peaks, y = 1, are positives. CenterNet, CenterPoint, mmdet3d, OpenPCDet.
//
//   y = 1:  (1 - p)^alpha softplus(-x)                  the focal loss's positive, its negative of z = -x
//   else:   (1 - y)^gamma p^alpha softplus(x)           a multiple of its negative, z = x                (focal.h)
//
// Heads clamp p to [eps, 1 - eps], beyond which the loss is constant and the gradient 0. That is z clamped to [-l, l] with
// l = log((1 - eps) / eps). The loss at l, rounded, would be off by that rounding times (alpha + 1), so the derivative there
// times what was rounded off is added. (1 - y)^gamma = exp(gamma log(1 - y)).
//
// The second derivative is the focal loss's (focal.h), times (1 - y)^gamma too; as the first one, 0 beyond l and not at it.
#pragma once

#include "focal.h"
#include "scored.h"

namespace fastfocal {

// kTwo is for the usual exponents, alpha = 2 and gamma = 4.
template <class S, Gamma kGamma, Accuracy kAccuracy = Accuracy::kFloat>
struct GaussianFocal : Focal<S, kGamma, false, kAccuracy> {
  using Peak = Focal<S, kGamma, false, kAccuracy>;
  S limit, limit_rest;          // l; infinite for eps = 0
  Multiple<S> multiple_target;  // of log(1 - y)

  static constexpr bool kScores = false;

  GaussianFocal() = default;
  FASTFOCAL_HD explicit GaussianFocal(const LossParams& params)
      : Peak(params.value[0], 0, false), multiple_target(params.value[1]) {
    const double eps = params.value[2];
    limit = S(HUGE_VAL);
    limit_rest = 0;
    if (eps > 0) {
      const double l = clamp_min(log((1 - eps) / eps), 0.0);
      limit = S(l);
      limit_rest = S(l - double(limit));
    }
  }

  // Of a target of 0, whether a peak is near or not.
  template <class V>
  FASTFOCAL_HD Term<V> negative(V x) const {
    const V e = exponential(x);
    return negative(x, e, this->logarithm(e));
  }
  template <class V>
  FASTFOCAL_HD V exponential(V x) const {
    return exp_nonpositive(clamp_min(minus_absolute(x), V(S(0) - limit)));
  }
  template <class V>
  FASTFOCAL_HD Term<V> negative(V x, V e, V log) const {
    // Not the loss of eps, which is not quite 0: nothing is to be counted there.
    const auto nowhere = x < V(-largest_finite<S>());
    const Term<V> t = clamped(x, e, log);
    return {select(nowhere, V(S(0)), t.loss), t.grad};
  }

  template <class V>
  FASTFOCAL_HD Term<V> positive(V x, V) const {
    const V e = exponential(x);
    const Term<V> t = clamped(V(S(0)) - x, e, this->logarithm(e));
    return {t.loss, V(S(0)) - t.grad};
  }

  template <class V>
  FASTFOCAL_HD static V soft_weight(V y, V positive, V negative) {
    return select(y < V(S(1)), negative, positive);
  }
  static constexpr bool kSoftInSteps = true;
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y) const {
    return soft(x, y, exponential(x));
  }
  template <class V>
  FASTFOCAL_HD Term<V> soft(V x, V y, V e) const {
    const V zero = V(S(0)), rest = V(S(1)) - y;
    const auto below = zero < rest;
    const Term<V> t = clamped(select(below, x, zero - x), e, this->logarithm(e));
    const V factor = select(below, power_of_rest(rest), y);  // 1, or NaN
    return {weigh(t.loss, factor), factor * select(below, t.grad, zero - t.grad)};
  }

  template <class V>
  FASTFOCAL_HD Derivatives<V> second_negative(V x) const {
    const V zero = V(S(0)), bound = V(limit);
    const Derivatives<V> d = Peak::second_negative(clamp_max(clamp_min(x, zero - bound), bound));
    const auto outside = minus_absolute(x) < zero - bound;
    return {select(outside, zero, d.grad), select(outside, zero, d.second)};
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_positive(V x, V) const {
    const Derivatives<V> d = second_negative(V(S(0)) - x);
    return {V(S(0)) - d.grad, d.second};
  }
  template <class V>
  FASTFOCAL_HD Derivatives<V> second_soft(V x, V y) const {
    const V zero = V(S(0)), rest = V(S(1)) - y;
    const auto below = zero < rest;
    const Derivatives<V> d = second_negative(select(below, x, zero - x));
    const V factor = select(below, power_of_rest(rest), y);  // 1, or NaN
    return {factor * select(below, d.grad, zero - d.grad), factor * d.second};
  }

 private:
  // (1 - y)^gamma
  template <class V>
  FASTFOCAL_HD V power_of_rest(V rest) const {
    if constexpr (kGamma == Gamma::kTwo) return (rest * rest) * (rest * rest);
    V low;
    const V high = log_positive(clamp_min(rest, smallest_normal<V>()), &low);
    return exp_of_multiple(multiple_target, high, V(S(0)) - low);
  }

  // The focal loss's negative at z, clamped, where e = exponential(z).
  template <class V>
  FASTFOCAL_HD Term<V> clamped(V z, V e, V log) const {
    const V zero = V(S(0)), bound = V(limit);
    const Term<V> t = Peak::negative(clamp_max(clamp_min(z, zero - bound), bound), e, log);
    const auto outside = minus_absolute(z) < zero - bound;
    const V rest = V(limit_rest), more = t.grad * select(is_negative(z), zero - rest, rest);
    return {t.loss + select(outside, more, zero), select(outside, zero, t.grad)};
  }
};

template <class S, Gamma kGamma, Accuracy kAccuracy>
constexpr bool kHasSecond<GaussianFocal<S, kGamma, kAccuracy>> = true;

// No fast kernels: its targets are dense in the heads that train with it.
struct GaussianFocalLoss : RegisteredLoss {
  static constexpr LossKind kKind{7};
  static constexpr const char* kName = "gaussian_focal_loss";
  static constexpr LossParameter kParameters[] = {
      {"alpha", ParameterRange::kNonnegative}, {"gamma", ParameterRange::kNonnegative}, {"eps", ParameterRange::kUnit}};

  FASTFOCAL_HD static bool has_fast_kernel(const LossParams&) { return false; }

  template <class S, Path kPath, Accuracy kAccuracy, class Use>
  FASTFOCAL_HOST static void with_formula(const LossParams& params, const Use& use) {
    if constexpr (kPath != Path::kFast)
      with_exponents<kPath, GaussianFocal<S, Gamma::kTwo, kAccuracy>, GaussianFocal<S, Gamma::kAny, kAccuracy>>(
          params.value[0] == 2 && params.value[1] == 4, use);
  }
};

}  // namespace fastfocal
