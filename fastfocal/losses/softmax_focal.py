r"""Softmax focal loss.

.. math:: L = -(1 - p_y)^\gamma \log p_y, \quad p = \mathrm{softmax}(x)

The focal loss of Lin et al., 2017 (arXiv:1708.02002, equation 4) for K classes, of which an anchor has one. Formula and
derivative in C++: csrc/losses/softmax_focal.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from collections.abc import Sequence
from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.loss import Loss, Module
from fastfocal.options import (
    CommonOptions,
    ModuleOptions,
    OptionsOfClasses,
    Reduced,
    Reduction,
    checked,
    option,
    with_signature,
)

__all__ = ["FastSoftmaxFocalLoss", "softmax_focal_loss"]


@checked
class SoftmaxFocalLoss(Loss):
    kind = 9  # SoftmaxFocalLoss::kKind in csrc/losses/softmax_focal.h
    name = "softmax_focal_loss"
    targets = "labels"
    takes_anchors = True
    options = OptionsOfClasses

    gamma: float = option(2.0, checks.at_least_0)
    detach_modulating_factor: bool = option(False, checks.flag)

    def parameters(self) -> list[float]:
        return [self.gamma, float(self.detach_modulating_factor)]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        """The anchor's loss at its own class, 0 at the others."""
        own = y == 1
        log_p = torch.log_softmax(x, dim=-1)
        # 1 - p_y as the others' share: nothing is lost where p_y is nearly 1.
        others = torch.logsumexp(x.masked_fill(own, torch.finfo(x.dtype).min), dim=-1, keepdim=True)
        log_q = others - torch.logsumexp(x, dim=-1, keepdim=True)
        if self.detach_modulating_factor:
            log_q = log_q.detach()
        # exp(gamma log(1 - p)): the derivative of the power itself is infinite at 1 - p = 0 where gamma < 1.
        factor = torch.exp(self.gamma * log_q) if self.gamma else torch.ones_like(log_q)
        # Twice: the logarithm at a logit of -inf is infinite, and would make the factor's derivative NaN.
        return torch.where(own, -factor * torch.where(own, log_p, 0.0), 0.0)


class SoftmaxFocalLossParameters(TypedDict, total=False):
    gamma: float
    detach_modulating_factor: bool


class SoftmaxFocalLossOptions(SoftmaxFocalLossParameters, CommonOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastSoftmaxFocalLossOptions(SoftmaxFocalLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


@overload
def softmax_focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[SoftmaxFocalLossOptions]
) -> Tensor: ...
@overload
def softmax_focal_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[SoftmaxFocalLossOptions]
) -> Tensor: ...
@overload
def softmax_focal_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[SoftmaxFocalLossOptions]
) -> list[Tensor]: ...


@with_signature(SoftmaxFocalLoss, SoftmaxFocalLossOptions)
def softmax_focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[SoftmaxFocalLossOptions]
) -> Tensor | list[Tensor]:
    r"""Softmax focal loss over every level of a feature pyramid, or of a segmentation, with its gradient, in one pass.

    .. math:: L = -w_y (1 - p_y)^\gamma \log p_y, \quad p = \mathrm{softmax}(x)

    An anchor has one of the K classes, its label y. With ``gamma=0`` it is the cross entropy. The logits are read once: neither
    probabilities nor logarithms of them are kept. Equals mmcv's ``softmax_focal_loss``, whose alpha is a factor of every
    anchor's loss: ``loss_weight`` here.

    Args:
        logits: as :func:`fastfocal.focal_loss` takes them: ``(N, A*K, H, W)``, contiguous or channels_last, ``(N, M, K)`` or
            ``(M, K)``; all K channels of an anchor are classes, background too if there is one.
        targets: integer labels 0..K-1, shaped as :func:`fastfocal.focal_loss` takes them; ``(N, H, W)`` for a segmentation.
        num_classes: K; needed with 4-D logits, else the last dimension.
        gamma: focusing parameter, any finite number >= 0.
        detach_modulating_factor: True: the gradient takes ``(1 - p_y)^gamma`` for a constant weight. The loss is the same.
        labels: the convention of a project, as :func:`fastfocal.focal_loss` takes it; "segmentation" ignores 255.
        background_index: the class that is background, 0..K-1: an anchor with that label costs what any other does, but does
            not count as positive. None: every anchor that is not ignored is positive.
        ignore_index: anchors with this label have zero loss and zero gradient whatever their logits are, NaN too, and do not
            count.
        class_weight: K numbers or a tensor ``(K,)``: the weight of the anchors with that label, as torch's cross_entropy has.
        class_mask: bool ``(N, K)`` (``(K,)`` for 2-D logits), read in place. False: that class of that image, which may be the
            background, is absent: it takes no part in the softmax, as if its logit were -inf, and has zero gradient whatever
            its logits are, NaN too. An anchor with that label has zero loss and zero gradient, and "mean" does not count it;
            normalizers count anchors all the same.
        weight, level_weights, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        normalizer: as :func:`fastfocal.focal_loss` takes it. The default without a background is the number of anchors that are
            not ignored (at least 1).
        reduction: ``"sum"``; ``"level"``, ``(L,)``; ``"image"``, ``(N,)``; ``"none"``: one loss for each **anchor**, shaped as
            labels, ``(N, H, W, A)`` (``(N, H, W)`` if A is 1), ``(N, M)`` or ``(M,)``. ``"mean"``: the sum over the number of
            anchors not ignored (and of classes not absent), without the normalizer. Weights do not count there: torch's
            cross_entropy divides by the sum of its class weights, which is ``normalizer=class_weight[labels].sum()``.

    Returns:
        As :func:`fastfocal.focal_loss`. Infinite logits count as the limit: of several equal ones, each has its share of p.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; soft targets, label smoothing, an alpha, scores and two rows of
            class_weight are not taken.
    """
    return pyramid.call(SoftmaxFocalLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastSoftmaxFocalLoss(Module):
    """Softmax focal loss over every level of a pyramid; see :func:`fastfocal.softmax_focal_loss` for the arguments.

    >>> criterion = FastSoftmaxFocalLoss(num_classes=21, ignore_index=255)  # segmentation
    >>> loss = criterion(logits, labels)  # (N, 21, H, W); (N, H, W)
    >>> loss.backward()

    Args:
        num_classes: K, the channels of an anchor, background's too if there is one.
        gamma, detach_modulating_factor, labels, background_index, ignore_index, class_weight, level_weights, normalizer,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.softmax_focal_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.softmax_focal_loss`; what can be checked without tensors is checked here.
    """

    parameters_of_loss = SoftmaxFocalLoss

    @with_signature(SoftmaxFocalLoss, FastSoftmaxFocalLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastSoftmaxFocalLossOptions]) -> None:
        super().__init__(num_classes, **options)
