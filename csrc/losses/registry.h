// The one place where a LossKind becomes the struct of its loss. A new loss is a header beside this one, its number in LossKind
// and its case here.
#pragma once

#include "../dispatch.h"
#include "focal.h"
#include "focal_star.h"

namespace fastfocal {

constexpr LossKind kLastLoss = LossKind::kFocalStar;

// Which kernels a loss is wanted for.
enum class Path {
  kFast,            // labels, constant weights: losses that has_fast_kernel()
  kGeneric,         // everything
  kGenericAnyGamma  // everything, but a gamma of 2 is one like others: fewer kernels where none is faster
};

FASTFOCAL_HD bool has_fast_kernel(const LossParams& params) {
  return params.kind != LossKind::kFocal || params.value[1] == 0;  // without label smoothing
}

// Calls use(Type<Loss>()) with the struct of the loss. Each call of this is one more set of kernels to compile.
template <class S, Path kPath, Accuracy kAccuracy = Accuracy::kFloat, class Use>
FASTFOCAL_HOST auto with_loss(const LossParams& params, const Use& use) {
  switch (params.kind) {
    case LossKind::kFocalStar:
      return use(Type<FocalStar<S, kAccuracy>>());
    case LossKind::kFocal:
    default:  // the operators have checked it
      if constexpr (kPath != Path::kFast) {
        if (params.value[1] != 0) return use(Type<Focal<S, Gamma::kAny, true, kAccuracy>>());
      }
      if constexpr (kPath != Path::kGenericAnyGamma) {
        if (params.value[0] == 2.0) return use(Type<Focal<S, Gamma::kTwo, false, kAccuracy>>());
      }
      return use(Type<Focal<S, Gamma::kAny, false, kAccuracy>>());
  }
}

}  // namespace fastfocal
