r"""Varifocal loss: the focal loss's negatives, positives by their score.

.. math:: VFL(p, s) = -s (s \log p + (1 - s) \log(1 - p)), \quad VFL(p, 0) = -\alpha p^\gamma \log(1 - p)

Zhang, Wang, Dayoub, Sünderhauf: *VarifocalNet: An IoU-aware Dense Object Detector*, 2021 (arXiv:2008.13367), equation 2.
Formula and derivative in C++: csrc/losses/varifocal.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from collections.abc import Sequence
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.focal import cross_entropy, modulating_factor, share_of
from fastfocal.losses.loss import Loss, ScoredModule, Weight
from fastfocal.options import ModuleOptions, Reduced, Reduction, ScoredOptions, checked, option, with_signature

__all__ = ["FastVarifocalLoss", "varifocal_loss"]


@checked
class VarifocalLoss(Loss):
    kind = 2  # VarifocalLoss::kKind in csrc/losses/varifocal.h
    name = "varifocal_loss"
    takes_scores = True

    alpha: float = option(0.75, checks.at_least_0)
    gamma: float = option(2.0, checks.at_least_0)
    iou_weighted: bool = option(True, checks.flag)
    detach_modulating_factor: bool = option(False, checks.flag)

    def weights(self, num_classes: int, device: torch.device) -> tuple[Weight, Weight]:
        return 1.0, self.alpha

    def parameters(self) -> list[float]:
        return [self.gamma, float(self.iou_weighted), float(self.detach_modulating_factor)]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        zero = torch.zeros_like(y)
        of_factor = x.detach() if self.detach_modulating_factor else x
        negative = modulating_factor(of_factor, zero, self.gamma) * cross_entropy(x, zero)
        positive = cross_entropy(x, score)
        if self.iou_weighted:
            positive = share_of(score, positive)
        return torch.where(y > 0, positive, negative)


class VarifocalLossParameters(TypedDict, total=False):
    alpha: float
    gamma: float
    iou_weighted: bool
    detach_modulating_factor: bool


class VarifocalLossOptions(VarifocalLossParameters, ScoredOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastVarifocalLossOptions(VarifocalLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def varifocal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[VarifocalLossOptions]
) -> Tensor: ...
@overload
def varifocal_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[VarifocalLossOptions]
) -> Tensor: ...
@overload
def varifocal_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[VarifocalLossOptions]
) -> list[Tensor]: ...


@with_signature(VarifocalLoss, VarifocalLossOptions)
def varifocal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[VarifocalLossOptions]
) -> Tensor | list[Tensor]:
    r"""Varifocal loss over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: VFL(p, s) = -s (s \log p + (1 - s) \log(1 - p)), \quad VFL(p, 0) = -\alpha p^\gamma \log(1 - p)

    Zhang et al., *VarifocalNet*, 2021 (arXiv:2008.13367), equation 2, for a positive of score s and a negative. What VFNet and
    PicoDet train with; and with ``detach_modulating_factor=True`` RT-DETR and D-FINE, here and in transformers. ultralytics'
    RT-DETR has ``gamma=1.5, alpha=0.25`` and does not detach.

    Args:
        logits, num_classes, labels, background_index, ignore_index, class_weight, class_mask, weight, level_weights,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        targets: integer labels, as :func:`fastfocal.focal_loss` takes them, beside `scores`; or soft targets: 0 is a negative,
            any other a positive's score. A positive of score 0 among labels costs nothing (as in RT-DETR); among soft targets
            it is a negative (as in mmdetection).
        scores: the score of each anchor that is a positive, its IoU with its object, in [0, 1] (not checked): floating, shaped
            as labels may be; float32 beside 16-bit logits too. Others' are not looked at. None: 1 everywhere. Not
            differentiable.
        alpha: weight of negatives, a finite number >= 0; that of positives is 1.
        gamma: exponent of a negative's modulating factor, a finite number >= 0.
        iou_weighted: False: a positive's cross entropy is not multiplied by its score.
        detach_modulating_factor: True: the gradient takes a negative's ``p^gamma`` for a constant weight.
        normalizer: as :func:`fastfocal.focal_loss` takes it, and ``"scores"``: max(1, sum of positives' scores).

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; scores beside soft targets.
    """
    return pyramid.call(VarifocalLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastVarifocalLoss(ScoredModule):
    """Varifocal loss over every level of a feature pyramid; see :func:`fastfocal.varifocal_loss` for the arguments.

    >>> criterion = FastVarifocalLoss(num_classes=80, normalizer="scores")
    >>> loss = criterion(cls_logits, labels, scores=ious)  # shaped alike: one IoU for each anchor, read where it is a positive
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        alpha, gamma, iou_weighted, detach_modulating_factor, labels, background_index, ignore_index, class_weight,
            level_weights, normalizer, reduction, grad_mode, loss_weight: as :func:`fastfocal.varifocal_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.varifocal_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = VarifocalLoss

    @with_signature(VarifocalLoss, FastVarifocalLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastVarifocalLossOptions]) -> None:
        super().__init__(num_classes, **options)
