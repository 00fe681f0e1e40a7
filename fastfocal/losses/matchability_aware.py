r"""Matchability-aware loss: the score's power is the positives' target.

.. math:: MAL(p, s) = -s^\gamma \log p - (1 - s^\gamma) \log(1 - p), \quad MAL(p, 0) = -p^\gamma \log(1 - p)

Huang, Lu, Cun, Yu, Zhou, Shen: *DEIM: DETR with Improved Matching for Fast Convergence*, 2025 (arXiv:2412.04234). Formula and
derivative in C++: csrc/losses/matchability_aware.h.
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
from fastfocal.losses.loss import Loss, ScoredModule, Weight
from fastfocal.options import ModuleOptions, Reduced, Reduction, ScoredOptions, checked, option, with_signature

__all__ = ["FastMatchabilityAwareLoss", "matchability_aware_loss"]


def at_least_0_or_none(name: str, value: object) -> float | None:
    return None if value is None else checks.at_least_0(name, value)


@checked
class MatchabilityAwareLoss(Loss):
    kind = 4  # MatchabilityAwareLoss::kKind in csrc/losses/matchability_aware.h
    name = "matchability_aware_loss"
    takes_scores = True

    gamma: float = option(1.5, checks.at_least_0)
    alpha: float | None = option(None, at_least_0_or_none)

    def weights(self, num_classes: int, device: torch.device) -> tuple[Weight, Weight]:
        return 1.0, 1.0 if self.alpha is None else self.alpha

    def parameters(self) -> list[float]:
        return [self.gamma]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        zero = torch.zeros_like(y)
        negative = modulating_factor(x.detach(), zero, self.gamma) * cross_entropy(x, zero)
        return torch.where(y > 0, cross_entropy(x, score.pow(self.gamma)), negative)


class MatchabilityAwareLossParameters(TypedDict, total=False):
    gamma: float
    alpha: float | None


class MatchabilityAwareLossOptions(MatchabilityAwareLossParameters, ScoredOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastMatchabilityAwareLossOptions(MatchabilityAwareLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def matchability_aware_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[MatchabilityAwareLossOptions]
) -> Tensor: ...
@overload
def matchability_aware_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[MatchabilityAwareLossOptions]
) -> Tensor: ...
@overload
def matchability_aware_loss(
    logits: Sequence[Tensor],
    targets: Levels,
    *,
    reduction: Literal["none"],
    **options: Unpack[MatchabilityAwareLossOptions],
) -> list[Tensor]: ...


@with_signature(MatchabilityAwareLoss, MatchabilityAwareLossOptions)
def matchability_aware_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[MatchabilityAwareLossOptions]
) -> Tensor | list[Tensor]:
    r"""Matchability-aware loss over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: MAL(p, s) = -s^\gamma \log p - (1 - s^\gamma) \log(1 - p), \quad MAL(p, 0) = -p^\gamma \log(1 - p)

    Huang et al., *DEIM*, 2025 (arXiv:2412.04234), for a positive of score s and a negative, whose ``p^gamma`` is a constant
    weight for the gradient. What DEIM and DEIMv2 train with.

    Args:
        logits, num_classes, labels, background_index, ignore_index, class_weight, class_mask, weight, level_weights,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        targets, scores, normalizer: as :func:`fastfocal.varifocal_loss` takes them. A positive of score 0 among labels has the
            target 0 and the weight 1; among soft targets it is a negative.
        gamma: exponent of the score, and of a negative's modulating factor; a finite number >= 0.
        alpha: weight of negatives (DEIM's ``mal_alpha``), a finite number >= 0; None: 1. That of positives is 1.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; scores beside soft targets.
    """
    return pyramid.call(MatchabilityAwareLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastMatchabilityAwareLoss(ScoredModule):
    """Matchability-aware loss over every level of a feature pyramid; see :func:`fastfocal.matchability_aware_loss` for the
    arguments.

    >>> criterion = FastMatchabilityAwareLoss(num_classes=80)
    >>> loss = criterion(logits, labels, scores=ious)  # (N, queries, 80); (N, queries): background where nothing is matched
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        gamma, alpha, labels, background_index, ignore_index, class_weight, level_weights, normalizer, reduction, grad_mode,
            loss_weight: as :func:`fastfocal.matchability_aware_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.matchability_aware_loss`; what can be checked without tensors is checked
            here.
    """

    parameters_of_loss = MatchabilityAwareLoss

    @with_signature(MatchabilityAwareLoss, FastMatchabilityAwareLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastMatchabilityAwareLossOptions]) -> None:
        super().__init__(num_classes, **options)
