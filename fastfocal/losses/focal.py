r"""Sigmoid focal loss.

.. math:: FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t

Lin, Goyal, Girshick, He, Dollar: *Focal Loss for Dense Object Detection*, 2017 (arXiv:1708.02002), equation 5. Formula and
derivative in C++: csrc/losses/focal.h.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastfocal import checks, pyramid
from fastfocal.checks import Levels
from fastfocal.losses.loss import Alpha, Loss, Module, PerClass, Weight, alpha_weights
from fastfocal.options import CommonOptions, ModuleOptions, Reduced, Reduction, checked, option, with_signature

__all__ = ["FastFocalLoss", "focal_loss"]


@checked
class FocalLoss(Loss):
    kind = 0  # FocalLoss::kKind in csrc/losses/focal.h
    name = "focal_loss"

    alpha: Any = option(0.25, checks.alpha)
    gamma: float = option(2.0, checks.at_least_0)
    label_smoothing: float = option(0.0, checks.share)
    detach_modulating_factor: bool = option(False, checks.flag)

    def weights(self, num_classes: int, device: torch.device) -> tuple[Weight, Weight]:
        return alpha_weights(self.alpha, num_classes, device)

    def parameters(self) -> list[float]:
        return [self.gamma, self.label_smoothing, float(self.detach_modulating_factor)]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        of_factor = x.detach() if self.detach_modulating_factor else x
        return modulating_factor(of_factor, y, self.gamma) * cross_entropy(x, y, self.label_smoothing)


class FocalLossParameters(TypedDict, total=False):
    alpha: Alpha
    gamma: float
    label_smoothing: float
    detach_modulating_factor: bool


class FocalLossOptions(FocalLossParameters, CommonOptions, total=False):
    """The keywords of the function, beside `reduction`."""


class FastFocalLossOptions(FocalLossParameters, ModuleOptions, total=False):
    """The keywords of the module."""


# Only `reduction` says what comes back.
@overload
def focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduced = "sum", **options: Unpack[FocalLossOptions]
) -> Tensor: ...
@overload
def focal_loss(
    logits: Tensor, targets: Levels, *, reduction: Literal["none"], **options: Unpack[FocalLossOptions]
) -> Tensor: ...
@overload
def focal_loss(
    logits: Sequence[Tensor], targets: Levels, *, reduction: Literal["none"], **options: Unpack[FocalLossOptions]
) -> list[Tensor]: ...


@with_signature(FocalLoss, FocalLossOptions)
def focal_loss(
    logits: Levels, targets: Levels, *, reduction: Reduction = "sum", **options: Unpack[FocalLossOptions]
) -> Tensor | list[Tensor]:
    r"""Sigmoid focal loss over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t

    Lin et al., *Focal Loss for Dense Object Detection*, 2017 (arXiv:1708.02002), equation 5. In the shapes below: N images, K
    classes, A anchors per cell, M = H*W*A anchors of a level in the order h, w, a, L levels.

    Args:
        logits: a tensor, or a sequence with one per level: ``(N, A*K, H, W)`` with channel ``a*K + k``, as a convolution gives
            it (contiguous and channels_last memory are read in place, other strides are copied once), ``(N, M, K)`` or
            ``(M, K)``. float32, float16, bfloat16 or float64; one dtype, device, K and N for all levels.
        targets: integer labels, or soft targets.
            Labels, a level: ``(N, H, W, A)`` or ``(N, M)`` (for 4-D logits; ``(N, H, W)`` too when A is 1), ``(N, M)`` (3-D)
            or ``(M,)`` (2-D); or one tensor ``(N, sum M)`` over all levels. uint8, int8, int16, int32 or int64, any strides.
            Soft targets: floating, of the logits' shapes, values in [0, 1] (not checked). ``1 - p_t = p + y - 2 p y``, as
            torchvision has it.
        num_classes: K; needed with 4-D logits and labels, else the last dimension (the channels of 4-D soft targets).
        alpha: weight of a positive, ``1 - alpha`` of a negative; None or a negative number: neither is weighted; K numbers or
            a tensor ``(K,)``: one alpha per class. Numbers are copied to the logits' device once, a tensor in each call if it
            is not there.
        gamma: focusing parameter, any finite number >= 0.
        labels: the convention of a project: "torchvision" or "effdet" (background -1, ignored -2), "detectron2" or "mmdet"
            (background K, ignored -1: the default), "kuangliu" (background 0, ignored -1), "segmentation" (ignored 255; K
            would be background). It stands for the next two.
        background_index: the label that means background; None means K. With 0 the classes are the labels 1..K, with
            anything else 0..K-1.
        ignore_index: anchors with this label have zero loss and zero gradient whatever their logits are, and do not count.
        class_weight: a factor for each class: K numbers or a tensor ``(K,)``; or two rows of them, ``(2, K)``: of positives
            and of negatives. It multiplies what alpha gives.
        class_mask: bool ``(N, K)`` (``(K,)`` for 2-D logits). False: that class of that image is absent, with zero loss and
            zero gradient whatever its logits are, and "mean" does not count it; normalizers count anchors all the same.
        weight: a weight for each anchor, shaped as labels may be.
        level_weights: L numbers, one for each level.
        label_smoothing: s in [0, 1]; the target inside the cross entropy becomes ``y (1 - s) + s / 2``, alpha and the
            modulating factor keep y (as in apex and effdet).
        detach_modulating_factor: True: the gradient takes ``(1 - p_t)^gamma`` for a constant weight, as where a detector
            computes it from detached logits (RT-DETR's varifocal loss). The loss is the same.
        normalizer: what the sum is divided by. ``"positives"``: max(1, positives over all levels and images);
            ``"positives_per_image"``: each image by its own max(1, count), then the mean over images (torchvision's
            RetinaNet); None: 1; a number > 0; a 0-d tensor; a tensor ``(N,)``, a divisor for each image. Tensors stay on their
            device and are used as they are.
        reduction: ``"sum"``; ``"level"``, ``(L,)``; ``"image"``, ``(N,)``; ``"none"``, a tensor or a list shaped as the logits;
            all of these add up to the first. ``"mean"``: the sum over the number of logits of anchors not ignored (and
            of classes not absent), without the normalizer.
        grad_mode: ``"save"``: forward writes the finished gradient, backward hands it on; ``"recompute"``: forward only
            reads, backward computes the gradient from the logits, so these must stay unchanged until then; ``"inplace"``: as
            save, over the logits' own memory (which is theirs no more; not for leaves that require grad; computed as save
            under torch.compile and torch.func); ``"auto"``: save, but recompute for float16, where a small gradient stored
            before the loss scale meets it would round to zero, and for reduction "none".
        loss_weight: a factor of the whole loss.

    Returns:
        float32 (float64 for float64 logits), or the logits' dtype with reduction "none". Gradients have the dtype and the
        strides of their (dense) logits. A gradient of 0 (in the logits' dtype) stays 0 whatever incoming gradient it is
        multiplied by, infinity and NaN too, in every `grad_mode`; any other gives what a multiplication gives. No operation
        here synchronises with the host.

    Raises:
        ValueError, TypeError: bad arguments, before anything is computed; the message names the argument and the level. A
            label that is neither class, background nor ignored is a ValueError on the CPU and a device-side assertion on CUDA.
    """
    return pyramid.call(FocalLoss, logits, targets, reduction, options)  # type: ignore[arg-type]


class FastFocalLoss(Module):
    """Sigmoid focal loss over every level of a feature pyramid; see :func:`fastfocal.focal_loss` for the arguments.

    >>> criterion = FastFocalLoss(num_classes=80)
    >>> loss = criterion(cls_logits, labels)  # list of (N, A*80, H, W); (N, sum of H*W*A) labels
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        alpha, gamma, label_smoothing, detach_modulating_factor, labels, background_index, ignore_index, class_weight,
            level_weights, normalizer, reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        sync_normalizer, process_group: divide by what all ranks of a process group count, so that a step of
            DistributedDataParallel or FSDP is that of one process with the whole batch.
        ema_momentum, ema_start: divide by a running mean of the normalizer, as detectron2 does.
            `help(fastfocal.distributed.KeptNormalizer)` has more about these four.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; what can be checked without tensors is checked here.
        RuntimeError: sync_normalizer without an initialised process group, in a call.
    """

    parameters_of_loss = FocalLoss
    alpha = PerClass(checks.alpha, "class_alpha")

    @with_signature(FocalLoss, FastFocalLossOptions)
    def __init__(self, num_classes: int, **options: Unpack[FastFocalLossOptions]) -> None:
        super().__init__(num_classes, **options)


# --- the loss of one logit, in pure PyTorch ---------------------------------------------------------------------------


def modulating_factor(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma as exp(gamma * log(1 - p_t)).

    The derivative of the power itself holds (1 - p_t)^(gamma - 1), which is infinite at p_t = 1 where gamma < 1.
    """
    if gamma == 0:
        return torch.ones_like(x)
    factor = torch.exp(gamma * log_one_minus_p_t(x, y))
    # At a huge or infinite logit the factor is flat, but the product rule would give 0 * inf.
    return torch.where(x.abs() > 1e30, factor.detach(), factor)


def log_one_minus_p_t(x: Tensor, y: Tensor) -> Tensor:
    """log(1 - p_t): that of sigmoid(x) for a negative, of sigmoid(-x) for a positive, of their mixture in between."""
    between = (y > 0) & (y < 1)
    mixture = (1 - y) * torch.sigmoid(x) + y * torch.sigmoid(-x)
    # 1 where the mixture is not used and may be 0: log(0) has no derivative.
    return torch.where(
        between, torch.log(torch.where(between, mixture, 1.0)), nn.functional.logsigmoid(torch.where(y == 1, -x, x))
    )


def cross_entropy(x: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(y * log(p) + (1 - y) * log(1 - p)) with p = sigmoid(x) and smoothed y.

    A sum of two terms >= 0. `binary_cross_entropy_with_logits` subtracts, so a well classified negative loses its
    digits, and an infinite logit becomes NaN.
    """
    positive = y * (1 - label_smoothing) + label_smoothing / 2
    negative = (1 - y) * (1 - label_smoothing) + label_smoothing / 2
    return share_of(positive, -nn.functional.logsigmoid(x)) + share_of(negative, -nn.functional.logsigmoid(-x))


def share_of(share: Tensor, term: Tensor) -> Tensor:
    """share * term, and 0 for no share of an infinite term."""
    return torch.where(share == 0, 0.0, share * term)
