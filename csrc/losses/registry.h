// The list of losses: the one place where a LossKind becomes the struct of its loss. A new loss is a header beside this one,
// included here, and a place in `Losses`.
//
// What is compiled. The kernels of a loss, all of them, take a compiler 1 to 3 s for each instruction set of the CPU and each
// architecture of GPUs, so not every loss has every kernel: each header says which, and why. Generic kernels are for all; on the
// CPU they are compiled once for 16 and 32 bits together (cpu/tiles.h). Fast kernels are for labels and constant weights.
// With the seven losses beside focal loss and star the CPU's files take 85 s of one core instead of 56, and the CUDA files, for
// one architecture, 51 instead of 22; that was before asymmetric loss had two of the eight sets of fast kernels. On a slower
// machine, second derivatives of the others (nine structs, in float and in double) took the CPU's files from 120 to 122 s, and
// those of CUDA for sm_90 from 59 to 67.
#pragma once

#include "../dispatch.h"
#include "asymmetric.h"
#include "bce.h"
#include "focal.h"
#include "focal_star.h"
#include "gaussian_focal.h"
#include "iou_aware_bce.h"
#include "matchability_aware.h"
#include "quality_focal.h"
#include "scored_focal.h"
#include "softmax_focal.h"
#include "varifocal.h"

namespace fastfocal {

template <class... Loss>
struct LossList;

// In the order of their numbers.
using Losses = LossList<FocalLoss, FocalLossStar, VarifocalLoss, QualityFocalLoss, MatchabilityAwareLoss, IouAwareBceLoss,
                        BceLoss, GaussianFocalLoss, AsymmetricLoss, SoftmaxFocalLoss>;

// What is known of a loss without its numbers.
struct LossFacts {
  LossKind kind;
  const char* name;
  const LossParameter* parameters;
  size_t count;  // of these
  bool reads_scores, takes_anchors;

  template <class Loss>
  static constexpr LossFacts of() {
    constexpr size_t kCount = sizeof(Loss::kParameters) / sizeof(LossParameter);
    static_assert(kCount <= kMaxLossParameters, "LossParams holds them");
    return {Loss::kKind, Loss::kName, Loss::kParameters, kCount, Loss::kScores, Loss::kTakesAnchors};
  }
};

template <class... Loss>
struct LossList {
  static constexpr int64_t kCount = sizeof...(Loss);
  static constexpr LossFacts kFacts[] = {LossFacts::of<Loss>()...};

  // Whether the numbers are 0, 1, 2, ...: none is missing, none has two losses.
  static constexpr bool are_numbered_in_order() {
    int64_t next = 0;
    return ((static_cast<int64_t>(Loss::kKind) == next++) && ...);
  }

  FASTFOCAL_HD static bool takes_anchors(LossKind kind) { return ((kind == Loss::kKind && Loss::kTakesAnchors) || ...); }
  FASTFOCAL_HD static bool has_fast_kernel(const LossParams& params) {
    return ((params.kind == Loss::kKind && Loss::has_fast_kernel(params)) || ...);
  }

  // Calls use(Type<Loss>()) with the loss of that number.
  template <class Use>
  FASTFOCAL_HOST static void with_kind(LossKind kind, const Use& use) {
    static_cast<void>(((kind == Loss::kKind && (use(Type<Loss>()), true)) || ...));
  }
};

static_assert(Losses::are_numbered_in_order(), "the list is in the order of the losses' numbers, which are 0, 1, 2, ...");

// These take a number that checked_loss() has let through.
inline const LossFacts& facts_of(LossKind kind) { return Losses::kFacts[static_cast<int64_t>(kind)]; }
FASTFOCAL_HD bool takes_anchors(LossKind kind) { return Losses::takes_anchors(kind); }
FASTFOCAL_HD bool has_fast_kernel(const LossParams& params) { return Losses::has_fast_kernel(params); }

// Calls use(Type<Formula>()) with the struct of a loss that takes anchors, or of one that does not. Each call of this is one more
// set of kernels to compile.
template <bool kTakesAnchors, class S, Path kPath, Accuracy kAccuracy, class Use>
FASTFOCAL_HOST void with_formula(const LossParams& params, const Use& use) {
  Losses::with_kind(params.kind, [&](auto kind) {
    using Loss = type_of<decltype(kind)>;
    if constexpr (Loss::kTakesAnchors == kTakesAnchors) {
      Loss::template with_formula<S, kPath, kAccuracy>(params, [&](auto formula) {
        static_assert(type_of<decltype(formula)>::kScores == Loss::kScores, "a loss reads scores if its formulas do");
        use(formula);
      });
    }
  });
}
template <class S, Path kPath, Accuracy kAccuracy = Accuracy::kFloat, class Use>
FASTFOCAL_HOST void with_loss(const LossParams& params, const Use& use) {
  with_formula<false, S, kPath, kAccuracy>(params, use);
}
template <class S, class Use>
FASTFOCAL_HOST void with_anchor_loss(const LossParams& params, const Use& use) {
  with_formula<true, S, sizeof(S) == sizeof(float) ? Path::kGeneric : Path::kGenericAnyGamma, Accuracy::kFloat>(params, use);
}

}  // namespace fastfocal
