r"""Asymmetric loss of multi-label classification: a focusing exponent for each of the two classes, easy negatives cost nothing.

.. math:: -(1 - p)^{\gamma_+} \log p, \quad -m^{\gamma_-} \log(1 - m), \quad m = \max(p - clip, 0)

Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter, Zelnik-Manor: *Asymmetric Loss for Multi-Label Classification*, 2021
(arXiv:2009.14119). Formula and derivative in C++: csrc/losses/asymmetric.h.
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
from fastfocal.losses.loss import Loss, Module
from fastfocal.options import CommonOptions, ModuleOptions, Reduced, Reduction, checked, option, with_signature

__all__ = ["FastAsymmetricLoss", "asymmetric_loss"]


def share_or_none(name: str, value: object) -> float | None:
    return None if value is None else checks.share(name, value)


@checked
class AsymmetricLoss(Loss):
    kind = 8  # AsymmetricLoss::kKind in csrc/losses/asymmetric.h
    name = "asymmetric_loss"
    defaults = {"normalizer": None}  # noqa: RUF012  soft targets, which have no positives to count

    gamma_pos: float = option(1.0, checks.at_least_0)
    gamma_neg: float = option(4.0, checks.at_least_0)
    clip: float | None = option(0.05, share_or_none)
    detach_modulating_factor: bool = option(False, checks.flag)

    def parameters(self) -> list[float]:
        return [self.gamma_pos, self.gamma_neg, self.clip or 0.0, float(self.detach_modulating_factor)]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        of_factor = x.detach() if self.detach_modulating_factor else x
        zero, one = torch.zeros_like(y), torch.ones_like(y)
        positive = modulating_factor(of_factor, one, self.gamma_pos) * cross_entropy(x, one)
        if self.clip:
            factor = power_beyond(torch.sigmoid(of_factor), self.clip, self.gamma_neg)
            negative = factor * -torch.log((torch.sigmoid(-x) + self.clip).clamp(max=1))
        else:
            negative = modulating_factor(of_factor, zero, self.gamma_neg) * cross_entropy(x, zero)
        return share_of(y, positive) + share_of(1 - y, negative)


def power_beyond(p: Tensor, clip: float, exponent: float) -> Tensor:
    """max(p - clip, 0)^exponent, with derivative 0 where it is 0: there that of a power less than 1 is infinite."""
    if exponent == 0:
        return torch.ones_like(p)
    below = p <= clip
    return torch.where(below, 0.0, torch.where(below, 1.0, p - clip).pow(exponent))


class AsymmetricLossParameters(TypedDict, total=False):
    gamma_pos: float
    gamma_neg: float
    clip: float | None
    detach_modulating_factor: bool


class AsymmetricLossOptions(AsymmetricLossParameters, CommonOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastAsymmetricLossOptions(AsymmetricLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def asymmetric_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[AsymmetricLossOptions]
) -> Tensor: ...
@overload
def asymmetric_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[AsymmetricLossOptions]
) -> Tensor: ...
@overload
def asymmetric_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[AsymmetricLossOptions]
) -> list[Tensor]: ...


@with_signature(AsymmetricLoss, AsymmetricLossOptions)
def asymmetric_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[AsymmetricLossOptions]
) -> Tensor | list[Tensor]:
    r"""Asymmetric loss over every level of a feature pyramid, or of a multi-label head, with its gradient, in one pass.

    .. math:: -(1 - p)^{\gamma_+} \log p, \quad -m^{\gamma_-} \log(1 - m), \quad m = \max(p - clip, 0)

    Ridnik et al., *Asymmetric Loss for Multi-Label Classification*, 2021 (arXiv:2009.14119). What multi-label classifiers train
    with; timm's ``AsymmetricLossMultiLabel`` but for its ``eps``, which keeps its logarithms above log(1e-8), and its label
    smoothing.

    Args:
        logits, num_classes, labels, background_index, ignore_index, class_weight, class_mask, weight, level_weights,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them. A multi-label head's are (N, K).
        targets: soft targets of the logits' shapes, 1 for every class that is there and 0 for the others; or integer labels. A
            target in between mixes the two losses, y of the one and 1 - y of the other.
        gamma_pos: exponent of a positive's ``1 - p``, a finite number >= 0.
        gamma_neg: exponent of a negative's m, a finite number >= 0.
        clip: the probability up to which a negative costs nothing, in [0, 1]; None or 0: there is none.
        detach_modulating_factor: True: the gradient takes both powers for constant weights (timm's
            ``disable_torch_grad_focal_loss``).
        normalizer: as :func:`fastfocal.focal_loss` takes it, but None, 1, unless given: timm's "batchmean" divides by N.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`.
    """
    return pyramid.call(AsymmetricLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastAsymmetricLoss(Module):
    """Asymmetric loss over every level, or of a multi-label head; see :func:`fastfocal.asymmetric_loss` for the arguments.

    >>> criterion = FastAsymmetricLoss(num_classes=80, reduction="mean")
    >>> loss = criterion(logits, targets)  # (N, 80), both: 1 for every class that is there
    >>> loss.backward()

    Args:
        num_classes: K, the classes.
        gamma_pos, gamma_neg, clip, detach_modulating_factor, labels, background_index, ignore_index, class_weight,
            level_weights, normalizer, reduction, grad_mode, loss_weight: as :func:`fastfocal.asymmetric_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.asymmetric_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = AsymmetricLoss

    @with_signature(AsymmetricLoss, FastAsymmetricLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastAsymmetricLossOptions]) -> None:
        super().__init__(num_classes, **options)
