r"""Quality focal loss: cross entropy with a score, modulated by the distance to it.

.. math:: QFL(p, s) = -|s - p|^\beta (s \log p + (1 - s) \log(1 - p))

Li, Wang, Wu, Chen, Hu, Li, Tang, Yang: *Generalized Focal Loss*, 2020 (arXiv:2006.04388). A negative has the score 0. Formula
and derivative in C++: csrc/losses/quality_focal.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from collections.abc import Sequence
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.focal import cross_entropy, modulating_factor
from fastfocal.losses.loss import Loss, ScoredModule
from fastfocal.options import ModuleOptions, Reduced, Reduction, ScoredOptions, checked, option, with_signature

__all__ = ["FastQualityFocalLoss", "quality_focal_loss"]


@checked
class QualityFocalLoss(Loss):
    kind = 3  # QualityFocalLoss::kKind in csrc/losses/quality_focal.h
    name = "quality_focal_loss"
    takes_scores = True

    beta: float = option(2.0, checks.at_least_0)
    activated: bool = option(False, checks.flag)

    def parameters(self) -> list[float]:
        return [self.beta, float(self.activated)]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        target = torch.where(y > 0, score, 0.0)
        if self.activated:
            p = x.clamp(0, 1)
            is_nan = x.isnan()
            # torch's refuses NaN; its derivative is finite at 0 and 1, where that of a logarithm is not.
            ce = nn.functional.binary_cross_entropy(torch.where(is_nan, 0.5, p), target, reduction="none")
            return power_of_distance(p - target, self.beta) * torch.where(is_nan, x * x, ce)
        # p - s without the digits that sigmoid(x) loses next to 1
        distance = torch.sigmoid(x) * (1 - target) - torch.sigmoid(-x) * target
        factor = power_of_distance(distance, self.beta)
        # At a huge or infinite logit the factor is flat, but the product rule would give 0 * inf.
        factor = torch.where(x.abs() > 1e30, factor.detach(), factor)
        positive = factor * cross_entropy(x, target)
        zero = torch.zeros_like(y)
        return torch.where(target > 0, positive, modulating_factor(x, zero, self.beta) * cross_entropy(x, zero))


def power_of_distance(distance: Tensor, beta: float) -> Tensor:
    """|distance|^beta, with derivatives 0 where it is 0: there the first one of a power less than 1, and the second one of a
    power less than 2, is infinite."""
    if beta == 0:
        return torch.ones_like(distance)
    if beta == 2:  # its second derivative is not 0 there, but torch's of |distance| is
        return distance.square()
    met = distance == 0
    return torch.where(met, 0.0, torch.where(met, 1.0, distance).abs().pow(beta))


class QualityFocalLossParameters(TypedDict, total=False):
    beta: float
    activated: bool


class QualityFocalLossOptions(QualityFocalLossParameters, ScoredOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastQualityFocalLossOptions(QualityFocalLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def quality_focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[QualityFocalLossOptions]
) -> Tensor: ...
@overload
def quality_focal_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[QualityFocalLossOptions]
) -> Tensor: ...
@overload
def quality_focal_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[QualityFocalLossOptions]
) -> list[Tensor]: ...


@with_signature(QualityFocalLoss, QualityFocalLossOptions)
def quality_focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[QualityFocalLossOptions]
) -> Tensor | list[Tensor]:
    r"""Quality focal loss over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: QFL(p, s) = -|s - p|^\beta (s \log p + (1 - s) \log(1 - p))

    Li et al., *Generalized Focal Loss*, 2020 (arXiv:2006.04388), for a positive of score s; a negative's score is 0. What GFL,
    RTMDet and DDQ train with, and with ``activated=True`` TOOD.

    Args:
        logits, num_classes, labels, background_index, ignore_index, class_weight, class_mask, weight, level_weights,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        targets, scores, normalizer: as :func:`fastfocal.varifocal_loss` takes them. A positive of score 0 is a negative, but
            for the weights of classes.
        beta: exponent of the distance, a finite number >= 0. Below 1 the gradient grows without bound as p nears s, below 2
            (but for 0 and 1) its derivative does; where p and s are equal both are 0.
        activated: True: `logits` are probabilities in [0, 1] (any number beyond counts as the nearer end), and the gradient is
            by them. Their cross entropy is torch's ``binary_cross_entropy``, whose logarithms are no less than -100.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; scores beside soft targets.
    """
    return pyramid.call(QualityFocalLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastQualityFocalLoss(ScoredModule):
    """Quality focal loss over every level of a feature pyramid; see :func:`fastfocal.quality_focal_loss` for the arguments.

    >>> criterion = FastQualityFocalLoss(num_classes=80)
    >>> loss = criterion(cls_logits, labels, scores=ious)  # shaped alike: one IoU for each anchor, read where it is a positive
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        beta, activated, labels, background_index, ignore_index, class_weight, level_weights, normalizer, reduction,
            grad_mode, loss_weight: as :func:`fastfocal.quality_focal_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.quality_focal_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = QualityFocalLoss

    @with_signature(QualityFocalLoss, FastQualityFocalLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastQualityFocalLossOptions]) -> None:
        super().__init__(num_classes, **options)
