r"""Focal loss star.

.. math:: FL^*(x_t) = -\alpha_t \log \sigma(\gamma x_t + \beta) / \gamma, \quad x_t = x (2 y - 1)

Lin et al., *Focal Loss for Dense Object Detection*, 2017 (arXiv:1708.02002), appendix B. Formula and derivative in C++:
csrc/losses/focal_star.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.loss import Alpha, Loss, Module, PerClass, Weight, alpha_weights
from fastfocal.options import CommonOptions, ModuleOptions, Reduced, Reduction, checked, option, with_signature

__all__ = ["FastFocalLossStar", "focal_loss_star"]


def above_0(name: str, value: object) -> float:
    value = checks.number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, by which focal loss star is divided, got {value}")
    return value


@checked
class FocalLossStar(Loss):
    kind = 1  # FocalLossStar::kKind in csrc/losses/focal_star.h
    name = "focal_loss_star"

    alpha: Any = option(0.25, checks.alpha)
    gamma: float = option(2.0, above_0)
    beta: float = option(1.0, checks.finite)

    def weights(self, num_classes: int, device: torch.device) -> tuple[Weight, Weight]:
        return alpha_weights(self.alpha, num_classes, device)

    def parameters(self) -> list[float]:
        return [self.gamma, self.beta]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        side = 2 * y - 1
        x_t = side * torch.where(side == 0, x.clamp(-1e30, 1e30), x)  # 0 of an infinite logit
        return -nn.functional.logsigmoid(self.gamma * x_t + self.beta) / self.gamma


class FocalLossStarParameters(TypedDict, total=False):
    alpha: Alpha
    gamma: float
    beta: float


class FocalLossStarOptions(FocalLossStarParameters, CommonOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastFocalLossStarOptions(FocalLossStarParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def focal_loss_star(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[FocalLossStarOptions]
) -> Tensor: ...
@overload
def focal_loss_star(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[FocalLossStarOptions]
) -> Tensor: ...
@overload
def focal_loss_star(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[FocalLossStarOptions]
) -> list[Tensor]: ...


@with_signature(FocalLossStar, FocalLossStarOptions)
def focal_loss_star(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[FocalLossStarOptions]
) -> Tensor | list[Tensor]:
    r"""Focal loss star over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: FL^*(x_t) = -\alpha_t \log \sigma(\gamma x_t + \beta) / \gamma, \quad x_t = x (2 y - 1)

    Lin et al., *Focal Loss for Dense Object Detection*, 2017 (arXiv:1708.02002), appendix B: a cross entropy that, like the
    focal loss, gives well classified anchors little. ``beta=0, alpha=None`` is fvcore's ``sigmoid_focal_loss_star``;
    ``gamma=2, beta=1`` is what kuangliu/pytorch-retinanet trains with.

    Args:
        gamma: slope of the logit, a finite number > 0.
        beta: shift of the logit, a finite number.
        logits, targets, num_classes, alpha, labels, background_index, ignore_index, class_weight, class_mask, weight,
            level_weights, normalizer, reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them. Soft
            targets: ``x_t`` as above, in between.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`.
    """
    return pyramid.call(FocalLossStar, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastFocalLossStar(Module):
    """Focal loss star over every level of a feature pyramid; see :func:`fastfocal.focal_loss_star` for the arguments.

    >>> criterion = FastFocalLossStar(num_classes=20, background_index=0)  # as kuangliu/pytorch-retinanet trains
    >>> loss = criterion(cls_logits, labels)
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        gamma, beta: slope and shift of the logit.
        alpha, labels, background_index, ignore_index, class_weight, level_weights, normalizer, reduction, grad_mode,
            loss_weight: as :func:`fastfocal.focal_loss` takes them.
        sync_normalizer, process_group, ema_momentum, ema_start: as :class:`fastfocal.FastFocalLoss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss_star`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = FocalLossStar
    alpha = PerClass(checks.alpha, "class_alpha")

    @with_signature(FocalLossStar, FastFocalLossStarOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastFocalLossStarOptions]) -> None:
        super().__init__(num_classes, **options)
