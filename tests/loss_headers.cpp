// Evaluates the losses of csrc/losses for the tests, logit by logit, without torch: test_loss_headers.py calls it.
#include "cpu/vec_math.h"
#include "dispatch.h"
#include "losses/asymmetric.h"
#include "losses/bce.h"
#include "losses/focal.h"
#include "losses/gaussian_focal.h"
#include "losses/iou_aware_bce.h"
#include "losses/matchability_aware.h"
#include "losses/quality_focal.h"
#include "losses/varifocal.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

enum How { kNegative, kNegativeInSteps, kPositive, kSoft, kSoftInSteps, kSoftWeight };

template <class Loss, class V>
Term<V> evaluate(const Loss& loss, How how, V x, V y) {
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

enum Kind { kVarifocal, kQualityFocal, kMatchabilityAware, kIouAwareBce, kBce, kGaussianFocal, kAsymmetric };

// The struct that the registry would choose, or, not `fast`, the one for any exponent.
template <class V, class S>
bool run(int kind, bool fast, const double* values, How how, long n, const S* x, const S* y, S* loss, S* grad) {
  LossParams params = {};
  for (size_t i = 0; i < kMaxLossParameters; ++i) params.value[i] = values[i];
  const auto with = [&](auto type) {
    evaluate_all<typename decltype(type)::type, V, S>(params, how, n, x, y, loss, grad);
    return true;
  };
  constexpr Gamma kTwo = Gamma::kTwo, kAny = Gamma::kAny;
  switch (kind) {
    case kVarifocal:
      return fast ? with(Type<Varifocal<S, kTwo>>()) : with(Type<Varifocal<S, kAny>>());
    case kQualityFocal:
      if (values[1] != 0)
        return fast ? with(Type<QualityFocalActivated<S, kTwo>>()) : with(Type<QualityFocalActivated<S, kAny>>());
      return fast ? with(Type<QualityFocal<S, kTwo>>()) : with(Type<QualityFocal<S, kAny>>());
    case kMatchabilityAware:
      return fast ? with(Type<MatchabilityAware<S, kTwo>>()) : with(Type<MatchabilityAware<S, kAny>>());
    case kIouAwareBce:
      return fast ? with(Type<IouAwareBce<S, kTwo>>()) : with(Type<IouAwareBce<S, kAny>>());
    case kBce:
      return with(Type<Bce<S>>());
    case kGaussianFocal:
      return fast ? with(Type<GaussianFocal<S, kTwo>>()) : with(Type<GaussianFocal<S, kAny>>());
    case kAsymmetric:
      if (values[2] != 0) return fast ? with(Type<Asymmetric<S, true, kTwo>>()) : with(Type<Asymmetric<S, true, kAny>>());
      return fast ? with(Type<Asymmetric<S, false, kTwo>>()) : with(Type<Asymmetric<S, false, kAny>>());
    default:
      return false;
  }
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal

#define FASTFOCAL_EXPORT extern "C" __attribute__((visibility("default")))

using fastfocal::FASTFOCAL_ISA::How;

FASTFOCAL_EXPORT bool evaluate_double(int kind, bool fast, const double* values, int how, long n, const double* x,
                                      const double* y, double* loss, double* grad) {
  return fastfocal::FASTFOCAL_ISA::run<double, double>(kind, fast, values, How(how), n, x, y, loss, grad);
}
FASTFOCAL_EXPORT bool evaluate_float(int kind, bool fast, const double* values, int how, long n, const float* x,
                                     const float* y, float* loss, float* grad) {
  return fastfocal::FASTFOCAL_ISA::run<float, float>(kind, fast, values, How(how), n, x, y, loss, grad);
}
FASTFOCAL_EXPORT bool evaluate_vector(int kind, bool fast, const double* values, int how, long n, const float* x,
                                      const float* y, float* loss, float* grad) {
  return fastfocal::FASTFOCAL_ISA::run<fastfocal::FASTFOCAL_ISA::Vec, float>(kind, fast, values, How(how), n, x, y, loss,
                                                                             grad);
}
