r"""Gaussian focal loss: the penalty-reduced focal loss of heatmaps.

.. math:: -(1 - p)^\alpha \log p \text{ where } y = 1, \quad -(1 - y)^\gamma p^\alpha \log(1 - p) \text{ elsewhere}

Law, Deng: *CornerNet: Detecting Objects as Paired Keypoints*, 2018 (arXiv:1808.01244), equation 1. Formula and derivative in
C++: csrc/losses/gaussian_focal.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
import math
from collections.abc import Sequence
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.focal import cross_entropy, modulating_factor, share_of
from fastfocal.losses.loss import Loss, Module
from fastfocal.options import CommonOptions, ModuleOptions, Reduced, Reduction, checked, option, with_signature

__all__ = ["FastGaussianFocalLoss", "gaussian_focal_loss"]


def below_half(name: str, value: object) -> float:
    value = checks.number(name, value)
    if not 0 <= value < 0.5:
        raise ValueError(f"{name}: expected a number >= 0 and < 0.5, got {value}")
    return value


@checked
class GaussianFocalLoss(Loss):
    kind = 7  # GaussianFocalLoss::kKind in csrc/losses/gaussian_focal.h
    name = "gaussian_focal_loss"
    targets = "soft"
    positive_target = 1.0

    alpha: float = option(2.0, checks.at_least_0)
    gamma: float = option(4.0, checks.at_least_0)
    eps: float = option(0.0, below_half)

    def parameters(self) -> list[float]:
        return [self.alpha, self.gamma, self.eps]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        is_peak, zero = y == 1, torch.zeros_like(y)
        z = torch.where(is_peak, -x, x)
        if self.eps > 0:  # p in [eps, 1 - eps]
            limit = math.log((1 - self.eps) / self.eps)
            z = z.clamp(-limit, limit)
        reduced = torch.where(is_peak, 1.0, (1 - y).pow(self.gamma))
        return share_of(reduced, modulating_factor(z, zero, self.alpha) * cross_entropy(z, zero))

    @classmethod
    def soft_weight(cls, y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return torch.where(y == 1, positive, negative)


class GaussianFocalLossParameters(TypedDict, total=False):
    alpha: float
    gamma: float
    eps: float


class GaussianFocalLossOptions(GaussianFocalLossParameters, CommonOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastGaussianFocalLossOptions(GaussianFocalLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def gaussian_focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[GaussianFocalLossOptions]
) -> Tensor: ...
@overload
def gaussian_focal_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[GaussianFocalLossOptions]
) -> Tensor: ...
@overload
def gaussian_focal_loss(
    logits: Sequence[Tensor],
    targets: Levels,
    *,
    reduction: Literal["none"],
    **options: Unpack[GaussianFocalLossOptions],
) -> list[Tensor]: ...


@with_signature(GaussianFocalLoss, GaussianFocalLossOptions)
def gaussian_focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[GaussianFocalLossOptions]
) -> Tensor | list[Tensor]:
    r"""Gaussian focal loss over every heatmap of a feature pyramid, with its gradient, in one pass.

    .. math:: -(1 - p)^\alpha \log p \text{ where } y = 1, \quad -(1 - y)^\gamma p^\alpha \log(1 - p) \text{ elsewhere}

    Law and Deng, *CornerNet*, 2018 (arXiv:1808.01244), equation 1: y is a heatmap with a Gaussian around the center of each
    object, and only its peaks are positives. What CenterNet, CenterPoint, mmdetection's and mmdetection3d's CenterNet heads and
    OpenPCDet train with; it takes logits, not their sigmoids.

    Args:
        logits, num_classes, class_weight, class_mask, weight, level_weights, reduction, grad_mode, loss_weight: as
            :func:`fastfocal.focal_loss` takes them. A heatmap of K classes is 4-D with A = 1. The two rows of `class_weight`
            are mmdetection's `pos_weight` and `neg_weight`.
        targets: soft targets of the logits' shapes, in [0, 1] (not checked); exactly 1 at the peaks.
        labels, background_index, ignore_index: without effect, as there are no labels.
        alpha: exponent of the modulating factor, a finite number >= 0.
        gamma: exponent of a negative's ``1 - y``, a finite number >= 0.
        eps: the sigmoid is clamped to [eps, 1 - eps], beyond which the gradient is 0; in [0, 0.5), 0: it is not. CenterNet,
            CenterPoint, mmdetection3d and OpenPCDet have 1e-4 to keep their logarithms finite, which nothing here needs.
        normalizer: as :func:`fastfocal.focal_loss` takes it; ``"positives"`` and ``"positives_per_image"`` count the peaks.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; integer labels.
    """
    return pyramid.call(GaussianFocalLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastGaussianFocalLoss(Module):
    """Gaussian focal loss over every heatmap of a feature pyramid; see :func:`fastfocal.gaussian_focal_loss` for the arguments.

    >>> criterion = FastGaussianFocalLoss(num_classes=80)
    >>> loss = criterion(heatmap_logits, heatmaps)  # (N, 80, H, W), both
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        alpha, gamma, eps, labels, background_index, ignore_index, class_weight, level_weights, normalizer, reduction,
            grad_mode, loss_weight: as :func:`fastfocal.gaussian_focal_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.gaussian_focal_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = GaussianFocalLoss

    @with_signature(GaussianFocalLoss, FastGaussianFocalLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastGaussianFocalLossOptions]) -> None:
        super().__init__(num_classes, **options)
