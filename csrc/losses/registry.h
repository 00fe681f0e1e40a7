// The one place where a LossKind becomes the struct of its loss. A new loss is a header beside this one, its number in LossKind
// and its row in each of the two functions here.
//
// What is compiled. The kernels of a loss, all of them, take a compiler 1 to 3 s for each instruction set of the CPU and each
// architecture of GPUs, so not every loss has every kernel:
//   * fast kernels (labels, constant weights) for focal loss and star; and one set for each kind of exponent that serves the
//     four losses with the focal loss's negative and a positive of their own (scored_focal.h): on a GPU its loop issues as many
//     instructions as the focal loss's (sm_90: 25.0 for bfloat16, 31 for float32), as the choice is made in the branch of
//     positives; and for BCE, whose negative is cheaper; and for asymmetric loss with its usual exponents, with a clip and
//     without (on the CPU the generic loop takes twice as long: docs/notes/cpu_loop.md);
//   * not for Gaussian focal loss, whose targets are dense in the heads that train with it, nor for asymmetric loss with other
//     exponents or quality focal loss of probabilities: they take the generic kernels;
//   * generic kernels for all. On the CPU they are compiled once for 16 and 32 bits together (cpu/tiles.h).
// With the seven losses beside focal loss and star the CPU's files take 85 s of one core instead of 56, and the CUDA files, for
// one architecture, 51 instead of 22; that was before asymmetric loss had two of the eight sets of fast kernels.
#pragma once

#include "../dispatch.h"
#include "asymmetric.h"
#include "bce.h"
#include "focal.h"
#include "focal_star.h"
#include "gaussian_focal.h"
#include "scored_focal.h"
#include "softmax_focal.h"

namespace fastfocal {

constexpr LossKind kLastLoss = LossKind::kSoftmaxFocal;

// Whether it takes an anchor's classes together: one loss for each anchor, tiles of whole anchors, labels alone as targets.
FASTFOCAL_HD bool takes_anchors(LossKind kind) { return kind == LossKind::kSoftmaxFocal; }

// What is known of a loss without its numbers.
struct LossFacts {
  const LossParameter* parameters;
  size_t count;  // of these
  bool reads_scores;

  template <class Loss>
  static LossFacts of() {
    constexpr size_t kCount = sizeof(Loss::kParameters) / sizeof(LossParameter);
    static_assert(kCount <= kMaxLossParameters, "LossParams holds them");
    return {Loss::kParameters, kCount, Loss::kScores};
  }
};

inline LossFacts facts_of(LossKind kind) {
  switch (kind) {
    case LossKind::kFocalStar:
      return LossFacts::of<FocalStar<float>>();
    case LossKind::kVarifocal:
      return LossFacts::of<Varifocal<float, Gamma::kAny>>();
    case LossKind::kQualityFocal:
      return LossFacts::of<QualityFocal<float, Gamma::kAny>>();
    case LossKind::kMatchabilityAware:
      return LossFacts::of<MatchabilityAware<float, Gamma::kAny>>();
    case LossKind::kIouAwareBce:
      return LossFacts::of<IouAwareBce<float, Gamma::kAny>>();
    case LossKind::kBce:
      return LossFacts::of<Bce<float>>();
    case LossKind::kGaussianFocal:
      return LossFacts::of<GaussianFocal<float, Gamma::kAny>>();
    case LossKind::kAsymmetric:
      return LossFacts::of<Asymmetric<float, true, Gamma::kAny>>();
    case LossKind::kSoftmaxFocal:
      return LossFacts::of<SoftmaxFocal<float, Gamma::kAny>>();
    case LossKind::kFocal:
    default:  // the operators have checked it
      return LossFacts::of<Focal<float, Gamma::kAny, false>>();
  }
}

// Which kernels a loss is wanted for.
enum class Path {
  kFast,            // labels, constant weights: losses that has_fast_kernel()
  kGeneric,         // everything
  kGenericAnyGamma  // everything, but a usual exponent is one like others: fewer kernels where none is faster
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
  constexpr bool kFast = kPath == Path::kFast;
  // Either the struct for the exponents that people use, or the one for any.
  const auto with_exponents = [&](bool usual, auto two, auto any) {
    if constexpr (kPath != Path::kGenericAnyGamma) {
      if (usual) return use(two);
    }
    return use(any);
  };
  const double* const value = params.value;
  switch (params.kind) {
    case LossKind::kFocal:
      if constexpr (!kFast) {
        if (value[1] != 0) return use(Type<Focal<S, Gamma::kAny, true, kAccuracy>>());
      }
      return with_exponents(value[0] == 2, Type<Focal<S, Gamma::kTwo, false, kAccuracy>>(),
                            Type<Focal<S, Gamma::kAny, false, kAccuracy>>());
    case LossKind::kFocalStar:
      return use(Type<FocalStar<S, kAccuracy>>());
    case LossKind::kQualityFocal:
      if constexpr (!kFast) {
        if (value[1] != 0) return use(Type<QualityFocalActivated<S, Gamma::kAny, kAccuracy>>());
      }
      [[fallthrough]];
    case LossKind::kVarifocal:
    case LossKind::kMatchabilityAware:
    case LossKind::kIouAwareBce:
      return with_exponents(ScoredFocal<S, Gamma::kAny>::exponent_of(params) == 2,
                            Type<ScoredFocal<S, Gamma::kTwo, kAccuracy>>(), Type<ScoredFocal<S, Gamma::kAny, kAccuracy>>());
    case LossKind::kBce:
      return use(Type<Bce<S, kAccuracy>>());
    case LossKind::kGaussianFocal:
      if constexpr (!kFast)
        return with_exponents(value[0] == 2 && value[1] == 4, Type<GaussianFocal<S, Gamma::kTwo, kAccuracy>>(),
                              Type<GaussianFocal<S, Gamma::kAny, kAccuracy>>());
      break;
    case LossKind::kAsymmetric:
      if constexpr (kFast) {
        if (value[2] != 0) return use(Type<Asymmetric<S, true, Gamma::kTwo, kAccuracy>>());
        return use(Type<Asymmetric<S, false, Gamma::kTwo, kAccuracy>>());
      } else {
        if (value[2] == 0) return use(Type<Asymmetric<S, false, Gamma::kAny, kAccuracy>>());
        return with_exponents(has_usual_exponents(params), Type<Asymmetric<S, true, Gamma::kTwo, kAccuracy>>(),
                              Type<Asymmetric<S, true, Gamma::kAny, kAccuracy>>());
      }
    case LossKind::kSoftmaxFocal:  // with_anchor_loss()
      break;
  }
  return use(Type<Focal<S, Gamma::kAny, false, kAccuracy>>());  // never: kinds and has_fast_kernel() have been checked
}

}  // namespace fastfocal
