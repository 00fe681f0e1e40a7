// The one place where a LossKind becomes the struct of its loss. A new loss is a header beside this one, its number in LossKind
// and its case here.
#pragma once

#include "../dispatch.h"
#include "asymmetric.h"
#include "bce.h"
#include "focal.h"
#include "focal_star.h"
#include "gaussian_focal.h"
#include "scored_focal.h"

namespace fastfocal {

constexpr LossKind kLastLoss = LossKind::kAsymmetric;

// Which kernels a loss is wanted for.
enum class Path {
  kFast,             // labels, constant weights: losses that has_fast_kernel()
  kGeneric,          // everything
  kGenericAnyGamma,  // everything, but a usual exponent is one like others: fewer kernels where none is faster
  kParameters        // none: the numbers of its own that a loss has
};

// 1 for positives and 4 for negatives, as in the paper and in every project that trains with it.
FASTFOCAL_HD bool has_usual_exponents(const LossParams& asymmetric) {
  return asymmetric.value[0] == 1 && asymmetric.value[1] == 4;
}

FASTFOCAL_HD bool has_fast_kernel(const LossParams& params) {
  switch (params.kind) {
    case LossKind::kFocal:
      return params.value[1] == 0;  // without label smoothing
    case LossKind::kQualityFocal:
      return params.value[1] == 0;  // of logits
    case LossKind::kAsymmetric:
      return has_usual_exponents(params);
    case LossKind::kGaussianFocal:  // of heatmaps
      return false;
    default:
      return true;
  }
}

// Calls use(Type<Loss>()) with the struct of the loss. Each call of this is one more set of kernels to compile.
template <class S, Path kPath, Accuracy kAccuracy = Accuracy::kFloat, class Use>
FASTFOCAL_HOST auto with_loss(const LossParams& params, const Use& use) {
  constexpr bool kFast = kPath == Path::kFast, kAnyGamma = kPath == Path::kGenericAnyGamma;
  // Calls one of the two with Loss<S, kGamma, kAccuracy>.
  const auto with_gamma = [&](bool usual, auto two, auto any) {
    if constexpr (!kAnyGamma) {
      if (usual) return use(two);
    }
    return use(any);
  };
  const double* const value = params.value;
  if constexpr (kPath == Path::kParameters) {  // each under its own name
    switch (params.kind) {
      case LossKind::kVarifocal:
        return use(Type<Varifocal<S, Gamma::kAny>>());
      case LossKind::kQualityFocal:
        return use(Type<QualityFocal<S, Gamma::kAny>>());
      case LossKind::kMatchabilityAware:
        return use(Type<MatchabilityAware<S, Gamma::kAny>>());
      case LossKind::kIouAwareBce:
        return use(Type<IouAwareBce<S, Gamma::kAny>>());
      default:
        break;
    }
  }
  switch (params.kind) {
    case LossKind::kFocalStar:
      return use(Type<FocalStar<S, kAccuracy>>());
    case LossKind::kQualityFocal:
      if constexpr (!kFast) {
        if (value[1] != 0) return use(Type<QualityFocalActivated<S, Gamma::kAny, kAccuracy>>());
      }
      [[fallthrough]];
    case LossKind::kVarifocal:
    case LossKind::kMatchabilityAware:
    case LossKind::kIouAwareBce: {
      using Any = ScoredFocal<S, Gamma::kAny, kAccuracy>;
      return with_gamma(Any::exponent_of(params) == 2, Type<ScoredFocal<S, Gamma::kTwo, kAccuracy>>(), Type<Any>());
    }
    case LossKind::kBce:
      return use(Type<Bce<S, kAccuracy>>());
    case LossKind::kGaussianFocal:
      if constexpr (!kFast)
        return with_gamma(value[0] == 2 && value[1] == 4, Type<GaussianFocal<S, Gamma::kTwo, kAccuracy>>(),
                          Type<GaussianFocal<S, Gamma::kAny, kAccuracy>>());
      [[fallthrough]];
    case LossKind::kAsymmetric:
      if constexpr (kFast) {
        if (value[2] != 0) return use(Type<Asymmetric<S, true, Gamma::kTwo, kAccuracy>>());
        return use(Type<Asymmetric<S, false, Gamma::kTwo, kAccuracy>>());
      } else {
        if (value[2] != 0)
          return with_gamma(has_usual_exponents(params), Type<Asymmetric<S, true, Gamma::kTwo, kAccuracy>>(),
                            Type<Asymmetric<S, true, Gamma::kAny, kAccuracy>>());
        return use(Type<Asymmetric<S, false, Gamma::kAny, kAccuracy>>());
      }
    case LossKind::kFocal:
    default:  // the operators have checked it
      if constexpr (!kFast) {
        if (value[1] != 0) return use(Type<Focal<S, Gamma::kAny, true, kAccuracy>>());
      }
      return with_gamma(value[0] == 2, Type<Focal<S, Gamma::kTwo, false, kAccuracy>>(),
                        Type<Focal<S, Gamma::kAny, false, kAccuracy>>());
  }
}

// Whether its positives read the scores of their anchors.
inline bool reads_scores(const LossParams& params) {
  return with_loss<float, Path::kParameters>(params, [](auto loss) { return type_of<decltype(loss)>::kScores; });
}

}  // namespace fastfocal
