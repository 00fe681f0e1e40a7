// Evaluates the losses of csrc/losses for the tests, logit by logit, without torch: test_loss_headers.py calls it.
#include "cpu/vec_math.h"
#include "dispatch.h"
#include "losses/registry.h"

namespace fastfocal {

// The list's own assertion can fail: the order, a gap, a number twice.
static_assert(LossList<FocalLoss, FocalLossStar>::are_numbered_in_order());
static_assert(!LossList<FocalLossStar, FocalLoss>::are_numbered_in_order());
static_assert(!LossList<FocalLoss, VarifocalLoss>::are_numbered_in_order());
static_assert(!LossList<FocalLoss, FocalLoss>::are_numbered_in_order());

namespace FASTFOCAL_ISA {

enum How {
  kNegative,
  kNegativeInSteps,
  kPositive,
  kSoft,
  kSoftInSteps,
  kSoftWeight,
  kSecondNegative,  // these give the gradient in the place of the loss, and the second derivative in that of the gradient
  kSecondPositive,
  kSecondSoft
};

template <class Loss, class V>
Derivatives<V> evaluate_second(const Loss& loss, How how, V x, V y) {
  if (how == kSecondNegative) return loss.second_negative(x);
  return how == kSecondPositive ? loss.second_positive(x, y) : loss.second_soft(x, y);
}

template <class Loss, class V>
Term<V> evaluate(const Loss& loss, How how, V x, V y) {
  if constexpr (kHasSecond<Loss>) {
    if (how >= kSecondNegative) {
      const Derivatives<V> d = evaluate_second(loss, how, x, y);
      return {d.grad, d.second};
    }
  }
  switch (how) {
    case kNegative:
      return loss.negative(x);
    case kNegativeInSteps: {
      const V e = loss.exponential(x);
      if constexpr (Loss::kLogarithm) return loss.negative(x, e, loss.logarithm(e));
      return loss.negative(x, e, V(0.0f));
    }
    case kPositive:
      return loss.positive(x, y);
    case kSoftInSteps:
      if constexpr (Loss::kSoftInSteps) return loss.soft(x, y, loss.exponential(x));
      return loss.soft(x, y);
    case kSoftWeight: {
      const V weight = Loss::soft_weight(y, V(3.0f), V(5.0f));
      return {weight, weight};
    }
    default:
      return loss.soft(x, y);
  }
}

inline double load_lanes(const double* p, double*) { return *p; }
inline float load_lanes(const float* p, float*) { return *p; }
inline Vec load_lanes(const float* p, Vec*) { return load(p); }
inline void store_lanes(double* p, double x) { *p = x; }
inline void store_lanes(float* p, float x) { *p = x; }
inline void store_lanes(float* p, Vec x) { store(p, x); }

// n is a multiple of kLanes.
template <class Loss, class V, class S>
void evaluate_all(const LossParams& params, How how, long n, const S* x, const S* y, S* loss, S* grad) {
  const Loss formula(params);
  for (long i = 0; i < n; i += long(sizeof(V) / sizeof(S))) {
    const Term<V> t =
        evaluate(formula, how, load_lanes(x + i, static_cast<V*>(nullptr)), load_lanes(y + i, static_cast<V*>(nullptr)));
    store_lanes(loss + i, t.loss);
    store_lanes(grad + i, t.grad);
  }
}

// Which struct: the one for any exponent, for the usual ones, and for four of the losses the two that they share.
enum Which { kAny, kUsual, kSharedAny, kSharedUsual };

template <class V, class S>
bool run(int kind, Which which, const double* values, How how, long n, const S* x, const S* y, S* loss, S* grad) {
  LossParams params = {};
  params.kind = LossKind(kind);
  for (size_t i = 0; i < kMaxLossParameters; ++i) params.value[i] = values[i];
  const auto with = [&](auto type) {
    evaluate_all<typename decltype(type)::type, V, S>(params, how, n, x, y, loss, grad);
    return true;
  };
  const auto either = [&](auto usual, auto any) { return which == kUsual ? with(usual) : with(any); };
  constexpr Gamma kTwo = Gamma::kTwo;
  if (which == kSharedAny) return with(Type<ScoredFocal<S, Gamma::kAny>>());
  if (which == kSharedUsual) return with(Type<ScoredFocal<S, kTwo>>());
  switch (params.kind) {
    case VarifocalLoss::kKind:
      return either(Type<Varifocal<S, kTwo>>(), Type<Varifocal<S, Gamma::kAny>>());
    case QualityFocalLoss::kKind:
      if (values[1] != 0)
        return either(Type<QualityFocalActivated<S, kTwo>>(), Type<QualityFocalActivated<S, Gamma::kAny>>());
      return either(Type<QualityFocal<S, kTwo>>(), Type<QualityFocal<S, Gamma::kAny>>());
    case MatchabilityAwareLoss::kKind:
      return either(Type<MatchabilityAware<S, kTwo>>(), Type<MatchabilityAware<S, Gamma::kAny>>());
    case IouAwareBceLoss::kKind:
      return either(Type<IouAwareBce<S, kTwo>>(), Type<IouAwareBce<S, Gamma::kAny>>());
    case BceLoss::kKind:
      return with(Type<Bce<S>>());
    case GaussianFocalLoss::kKind:
      return either(Type<GaussianFocal<S, kTwo>>(), Type<GaussianFocal<S, Gamma::kAny>>());
    case AsymmetricLoss::kKind:
      if (values[2] != 0) return either(Type<Asymmetric<S, true, kTwo>>(), Type<Asymmetric<S, true, Gamma::kAny>>());
      return either(Type<Asymmetric<S, false, kTwo>>(), Type<Asymmetric<S, false, Gamma::kAny>>());
    default:
      return false;
  }
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal

#define FASTFOCAL_EXPORT extern "C" __attribute__((visibility("default")))

using fastfocal::FASTFOCAL_ISA::How;
using fastfocal::FASTFOCAL_ISA::Which;

FASTFOCAL_EXPORT bool evaluate_double(int kind, int which, const double* values, int how, long n, const double* x,
                                      const double* y, double* loss, double* grad) {
  return fastfocal::FASTFOCAL_ISA::run<double, double>(kind, Which(which), values, How(how), n, x, y, loss, grad);
}
FASTFOCAL_EXPORT bool evaluate_float(int kind, int which, const double* values, int how, long n, const float* x,
                                     const float* y, float* loss, float* grad) {
  return fastfocal::FASTFOCAL_ISA::run<float, float>(kind, Which(which), values, How(how), n, x, y, loss, grad);
}
FASTFOCAL_EXPORT bool evaluate_vector(int kind, int which, const double* values, int how, long n, const float* x,
                                      const float* y, float* loss, float* grad) {
  return fastfocal::FASTFOCAL_ISA::run<fastfocal::FASTFOCAL_ISA::Vec, float>(kind, Which(which), values, How(how), n, x, y,
                                                                             loss, grad);
}
