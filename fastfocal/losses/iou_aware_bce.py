r"""IoU-aware BCE: the positives' target lies between the prediction and the score.

.. math:: -t \log p - (1 - t) \log(1 - p), \quad t = \max(0.01, p^\alpha s^{1 - \alpha}); \quad -p^\gamma \log(1 - p)

Cai, Liu, Wang, Ge, Zhang, Huang: *Align-DETR*, 2023 (arXiv:2304.07527). Formula and derivative in C++:
csrc/losses/iou_aware_bce.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from collections.abc import Sequence
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.focal import cross_entropy, modulating_factor
from fastfocal.losses.loss import Loss, ScoredModule
from fastfocal.options import ModuleOptions, Reduced, Reduction, ScoredOptions, checked, option, with_signature

__all__ = ["FastIoUAwareBCELoss", "iou_aware_bce_loss"]


@checked
class IoUAwareBCELoss(Loss):
    kind = 5  # IouAwareBceLoss::kKind in csrc/losses/iou_aware_bce.h
    name = "iou_aware_bce_loss"
    takes_scores = True

    alpha: float = option(0.25, checks.share)
    gamma: float = option(2.0, checks.at_least_0)

    def parameters(self) -> list[float]:
        return [self.alpha, self.gamma]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        zero = torch.zeros_like(y)
        target = (torch.sigmoid(x.detach()).pow(self.alpha) * score.pow(1 - self.alpha)).clamp(min=0.01)
        negative = modulating_factor(x, zero, self.gamma) * cross_entropy(x, zero)
        return torch.where(y > 0, cross_entropy(x, target), negative)


class IoUAwareBCELossParameters(TypedDict, total=False):
    alpha: float
    gamma: float


class IoUAwareBCELossOptions(IoUAwareBCELossParameters, ScoredOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastIoUAwareBCELossOptions(IoUAwareBCELossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def iou_aware_bce_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[IoUAwareBCELossOptions]
) -> Tensor: ...
@overload
def iou_aware_bce_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[IoUAwareBCELossOptions]
) -> Tensor: ...
@overload
def iou_aware_bce_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[IoUAwareBCELossOptions]
) -> list[Tensor]: ...


@with_signature(IoUAwareBCELoss, IoUAwareBCELossOptions)
def iou_aware_bce_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[IoUAwareBCELossOptions]
) -> Tensor | list[Tensor]:
    r"""IoU-aware BCE over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: -t \log p - (1 - t) \log(1 - p), \quad t = \max(0.01, p^\alpha s^{1 - \alpha}); \quad -p^\gamma \log(1 - p)

    The first of a positive of score s, with t a constant for the gradient, the second of a negative. Cai et al., *Align-DETR*,
    2023 (arXiv:2304.07527); what LW-DETR (arXiv:2406.03459), RF-DETR and SAM 3's detector train with.

    Args:
        logits, num_classes, labels, background_index, ignore_index, class_weight, class_mask, weight, level_weights,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        targets, scores, normalizer: as :func:`fastfocal.varifocal_loss` takes them. A positive of score 0 among labels has the
            target 0.01; among soft targets it is a negative.
        alpha: the prediction's share in the target, in [0, 1].
        gamma: exponent of a negative's modulating factor, a finite number >= 0.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; scores beside soft targets.
    """
    return pyramid.call(IoUAwareBCELoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastIoUAwareBCELoss(ScoredModule):
    """IoU-aware BCE over every level of a feature pyramid; see :func:`fastfocal.iou_aware_bce_loss` for the arguments.

    >>> criterion = FastIoUAwareBCELoss(num_classes=80)
    >>> loss = criterion(logits, labels, scores=ious)  # (N, queries, 80); (N, queries): background where nothing is matched
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        alpha, gamma, labels, background_index, ignore_index, class_weight, level_weights, normalizer, reduction, grad_mode,
            loss_weight: as :func:`fastfocal.iou_aware_bce_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.iou_aware_bce_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = IoUAwareBCELoss

    @with_signature(IoUAwareBCELoss, FastIoUAwareBCELossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastIoUAwareBCELossOptions]) -> None:
        super().__init__(num_classes, **options)
