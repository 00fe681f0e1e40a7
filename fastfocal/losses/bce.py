r"""Binary cross entropy against an anchor's score.

.. math:: -s \log p - (1 - s) \log(1 - p), \quad -\log(1 - p)

Formula and derivative in C++: csrc/losses/bce.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastfocal import pyramid
from fastfocal.checks import Levels
from fastfocal.losses.focal import cross_entropy
from fastfocal.losses.loss import Loss, ScoredModule
from fastfocal.options import ModuleOptions, Reduced, Reduction, ScoredOptions, checked, with_signature

__all__ = ["FastBCELoss", "bce_loss"]


@checked
class BCELoss(Loss):
    kind = 6  # BceLoss::kKind in csrc/losses/bce.h
    name = "bce_loss"
    takes_scores = True

    def parameters(self) -> list[float]:
        return [0.0]  # AOTInductor takes an empty list for none

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        return cross_entropy(x, torch.where(y > 0, score, 0.0))


class BCELossOptions(ScoredOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastBCELossOptions(ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def bce_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[BCELossOptions]
) -> Tensor: ...
@overload
def bce_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[BCELossOptions]
) -> Tensor: ...
@overload
def bce_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[BCELossOptions]
) -> list[Tensor]: ...


@with_signature(BCELoss, BCELossOptions)
def bce_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[BCELossOptions]
) -> Tensor | list[Tensor]:
    r"""Binary cross entropy over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: -s \log p - (1 - s) \log(1 - p), \quad -\log(1 - p)

    The first of a positive of score s, the second of a negative. What YOLOX and ultralytics' YOLO (v8 and later) train with;
    of soft targets it is ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        logits, num_classes, labels, background_index, ignore_index, class_weight, class_mask, weight, level_weights,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        targets, scores, normalizer: as :func:`fastfocal.varifocal_loss` takes them. A positive of score 0 is a negative, but
            for the weights of classes.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; scores beside soft targets.
    """
    return pyramid.call(BCELoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastBCELoss(ScoredModule):
    """Binary cross entropy over every level of a feature pyramid; see :func:`fastfocal.bce_loss` for the arguments.

    >>> criterion = FastBCELoss(num_classes=80, normalizer="scores")
    >>> loss = criterion(cls_logits, labels, scores=alignment)  # shaped alike, read where an anchor is a positive
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        labels, background_index, ignore_index, class_weight, level_weights, normalizer, reduction, grad_mode, loss_weight:
            as :func:`fastfocal.bce_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.bce_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = BCELoss

    @with_signature(BCELoss, FastBCELossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastBCELossOptions]) -> None:
        super().__init__(num_classes, **options)
