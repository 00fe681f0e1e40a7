// The one place where a LossKind becomes the struct of its loss. A new loss is a header beside this one, its number in LossKind
// and its case here.
#pragma once

#include "../dispatch.h"
#include "focal.h"
#include "focal_star.h"
#include "softmax_focal.h"

namespace fastfocal {

FASTFOCAL_HD bool is_loss(int64_t number) {
  return number == int64_t(LossKind::kFocal) || number == int64_t(LossKind::kFocalStar) ||
         number == int64_t(LossKind::kSoftmaxFocal);
}

// Whether it takes an anchor's classes together: one loss for each anchor, tiles of whole anchors, labels alone as targets.
FASTFOCAL_HD bool takes_anchors(LossKind kind) { return kind == LossKind::kSoftmaxFocal; }

// Which kernels a loss is wanted for.
enum class Path {
  kFast,            // labels, constant weights: losses that has_fast_kernel()
  kGeneric,         // everything
  kGenericAnyGamma  // everything, but a gamma of 2 is one like others: fewer kernels where none is faster
};

FASTFOCAL_HD bool has_fast_kernel(const LossParams& params) {
  return params.kind != LossKind::kFocal || params.value[1] == 0;  // without label smoothing
}

// Calls use(Type<Loss>()) with the struct of a loss that takes_anchors().
template <class S, class Use>
FASTFOCAL_HOST auto with_anchor_loss(const LossParams& params, const Use& use) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (params.value[0] == 2.0) return use(Type<SoftmaxFocal<S, Gamma::kTwo>>());
  }
  return use(Type<SoftmaxFocal<S, Gamma::kAny>>());
}

// Calls use(Type<Loss>()) with the struct of any other loss. Each call of this is one more set of kernels to compile.
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
