"""Focal loss over all levels of a feature pyramid in pure PyTorch: slow, readable, what the kernels are held against.

    FL(p_t) = -alpha_t * (1 - p_t)^gamma * log(p_t)

Lin, Goyal, Girshick, He, Dollar: "Focal Loss for Dense Object Detection", 2017, arXiv:1708.02002, equation 5;
p_t = p for a positive and 1 - p for a negative, with p = sigmoid(logit), and alpha_t alike.

Each level is permuted to (N, M, K), gets a dense one-hot target, and is weighted and summed by itself; then the levels
are added. Gradients, also second ones, are plain autograd's.

N images, K classes (no background channel), A anchors per cell, M = H*W*A anchors of a level in the order h, w, a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfocal import labels as label_conventions

__all__ = ["FastFocalLoss", "FastFocalLossStar", "focal_loss", "focal_loss_star", "sigmoid_focal_loss"]

_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def focal_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    labels: str | None = None,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Tensor | Sequence[Tensor] | None = None,
    level_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
    detach_modulating_factor: bool = False,
    normalizer: str | float | Tensor | None = "positives",
    reduction: str = "sum",
    grad_mode: str = "auto",
    loss_weight: float = 1.0,
) -> Tensor | list[Tensor]:
    """Focal loss of every level, added over levels.

    The term of level l, image n, anchor m and class k is

        loss_weight * level_weights[l] * weight[n, m] * alpha_t * (1 - p_t)^gamma * cross_entropy / divisor

    Args:
        logits: one Tensor or a sequence of them, one per level, of one floating dtype: (N, A*K, H, W) with channel
            a*K + k, (N, M, K), or (M, K), which is one image. 16-bit logits are computed in float32.
        targets: labels (uint8, int8, int16, int32, int64), per level (N, H, W, A) or (N, M) for 4-D logits, also
            (N, H, W) where A = 1; (N, M) for 3-D; (M,) for 2-D; or one tensor (N, sum of M) over all levels
            ((sum of M,) for 2-D). Or soft targets: floating, in [0, 1], shaped as their logits.
        num_classes: K. Needed for 4-D logits with labels. Else it is the last dimension of the logits
            (4-D logits with soft targets: all channels, that is A = 1).
        alpha: weight of the positive class, 1 - alpha of the negative; one number, or K of them. None or a negative
            number: both weights are 1.
        gamma: exponent of the modulating factor, >= 0.
        background_index: the label that means background; None is K. With 0 the classes are the labels 1..K, with any
            other 0..K-1.
        ignore_index: anchors with this label give zero loss and zero gradient, whatever their logits are (also NaN),
            and are not counted. Tested before anything else.
        weight: a factor per anchor, floating, shaped as labels may be (with soft targets too).
        level_weights: L factors, one per level.
        label_smoothing: s; the target of the cross entropy, and only that, becomes y * (1 - s) + s / 2, as in apex
            and effdet: alpha_t and the modulating factor keep y.
        detach_modulating_factor: the modulating factor is computed from the detached logits, as RT-DETR computes its weights.
        normalizer: "positives": max(1, positives of all levels and images). "positives_per_image": each image by its
            own max(1, positives), then the mean over images, as torchvision's RetinaNet. None: 1. A number > 0, a 0-d
            tensor, or an (N,) tensor with a divisor for each image; tensors are used as they are. The strings need
            labels.
        reduction: "sum"; "level": (L,); "image": (N,); "none": shaped as the logits, a list for a sequence; "mean":
            the weighted sum over the number of logits of anchors that are not ignored, and no normalizer.
        grad_mode: "auto", "save", "recompute" or "inplace": accepted so that the signatures agree, and without effect
            here. Autograd saves what it saves, and the logits are never overwritten.
        loss_weight: a factor of everything.

    Returns:
        float32, or float64 for float64 logits; with "none" in the logits' dtype.
    """
    if not gamma >= 0:  # so that NaN fails
        raise ValueError(f"gamma: expected a number >= 0, got {gamma}")
    return _pyramid_loss(
        lambda x, y: (
            _modulating_factor(x.detach() if detach_modulating_factor else x, y, gamma)
            * _cross_entropy(x, y, label_smoothing)
        ),
        logits,
        targets,
        num_classes=num_classes,
        alpha=alpha,
        labels=labels,
        background_index=background_index,
        ignore_index=ignore_index,
        weight=weight,
        level_weights=level_weights,
        normalizer=normalizer,
        reduction=reduction,
        grad_mode=grad_mode,
        loss_weight=loss_weight,
    )


def focal_loss_star(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
    labels: str | None = None,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Tensor | Sequence[Tensor] | None = None,
    level_weights: Sequence[float] | Tensor | None = None,
    normalizer: str | float | Tensor | None = "positives",
    reduction: str = "sum",
    grad_mode: str = "auto",
    loss_weight: float = 1.0,
) -> Tensor | list[Tensor]:
    """Focal loss star of every level, added over levels: appendix B of the paper above.

        FL*(x_t) = -alpha_t * log(sigmoid(gamma * x_t + beta)) / gamma        x_t = x * (2 * y - 1)

    Args:
        gamma, beta: slope, > 0, and shift of the logit.
        The others, and what is returned: as for `focal_loss`.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: expected a number > 0, got {gamma}")
    return _pyramid_loss(
        lambda x, y: _star(x, y, gamma, beta),
        logits,
        targets,
        num_classes=num_classes,
        alpha=alpha,
        labels=labels,
        background_index=background_index,
        ignore_index=ignore_index,
        weight=weight,
        level_weights=level_weights,
        normalizer=normalizer,
        reduction=reduction,
        grad_mode=grad_mode,
        loss_weight=loss_weight,
    )


def _pyramid_loss(
    term: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    num_classes: int | None,
    alpha: float | Sequence[float] | Tensor | None,
    labels: str | None,
    background_index: int | None,
    ignore_index: int,
    weight: Tensor | Sequence[Tensor] | None,
    level_weights: Sequence[float] | Tensor | None,
    normalizer: str | float | Tensor | None,
    reduction: str,
    grad_mode: str,
    loss_weight: float,
) -> Tensor | list[Tensor]:
    """term(logits, dense targets), weighted, over all levels; arguments as above."""
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    target_list = [targets] if isinstance(targets, Tensor) else list(targets)
    background_index, ignore_index = label_conventions.resolve(labels, background_index, ignore_index, num_classes)
    _check_levels(levels)
    _check_options(len(levels), level_weights, reduction, grad_mode)
    _check_no_grad(targets=targets, weight=weight, normalizer=normalizer, alpha=alpha)
    soft = any(target.is_floating_point() for target in target_list)
    num_classes = _resolve_num_classes(levels, num_classes, soft)
    dtype = _compute_dtype(levels[0].dtype)

    # The dense target of every level, (N, M, K), and which of its anchors are ignored, (N, M).
    dense: list[Tensor] = []
    ignored: list[Tensor] = []
    if soft:
        for target in _split_soft_targets(target_list, levels):
            dense.append(_flatten(target, num_classes))
            ignored.append(torch.zeros_like(dense[-1][..., 0], dtype=torch.bool))
    else:
        for index, label in enumerate(_split_per_level("targets", targets, levels, num_classes)):
            one_hot, ignore = _one_hot(label, num_classes, background_index, ignore_index, index)
            dense.append(one_hot)
            ignored.append(ignore)

    if reduction == "mean":
        divisor: float | Tensor = _count_logits(ignored, num_classes).clamp(min=1)
    else:
        divisor = _resolve_divisor(normalizer, None if soft else dense, _num_images(levels[0]), dtype)

    weights = None if weight is None else _split_per_level("weight", weight, levels, num_classes)
    losses: list[Tensor] = []
    for index, (level, y, ignore) in enumerate(zip(levels, dense, ignored, strict=True)):
        ignore = ignore.unsqueeze(-1)
        # Before anything is computed: the derivative at a NaN is NaN, and stays so when masked afterwards.
        x = torch.where(ignore, 0.0, _flatten(level, num_classes).to(dtype))
        loss = _alpha_t(y.to(dtype), alpha) * term(x, y.to(dtype))
        if weights is not None:
            loss = loss * weights[index].to(dtype).unsqueeze(-1)
        if level_weights is not None:
            loss = loss * level_weights[index]
        loss = loss_weight * loss / divisor
        losses.append(torch.where(ignore, 0.0, loss))

    if reduction == "none":
        shaped = [
            _unflatten(loss, level, num_classes).to(level.dtype) for loss, level in zip(losses, levels, strict=True)
        ]
        return shaped[0] if isinstance(logits, Tensor) else shaped
    if reduction == "image":
        return torch.stack([loss.sum(dim=(1, 2)) for loss in losses]).sum(dim=0)
    per_level = torch.stack([loss.sum() for loss in losses])
    return per_level if reduction == "level" else per_level.sum()


class FastFocalLoss(nn.Module):
    """`focal_loss` as a module: the same arguments, given once.

    `grad_mode` has no effect here. `sync_normalizer` and `ema_momentum` are not implemented: a value other than the
    default raises NotImplementedError.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        labels: str | None = None,
        background_index: int | None = None,
        ignore_index: int = -1,
        level_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        detach_modulating_factor: bool = False,
        normalizer: str | float | Tensor | None = "positives",
        reduction: str = "sum",
        grad_mode: str = "auto",
        loss_weight: float = 1.0,
        sync_normalizer: bool = False,
        ema_momentum: float | None = None,
    ) -> None:
        super().__init__()
        # As in fastfocal.FastFocalLoss: kept so that nothing moves when they come; to ignore them would train wrongly.
        if sync_normalizer:
            raise NotImplementedError(f"sync_normalizer: got {sync_normalizer}, only False is implemented")
        if ema_momentum is not None:
            raise NotImplementedError(f"ema_momentum: got {ema_momentum}, only None is implemented")
        self.num_classes = num_classes
        self.alpha = alpha
        self.gamma = gamma
        self.background_index, self.ignore_index = label_conventions.resolve(
            labels, background_index, ignore_index, num_classes
        )
        self.level_weights = level_weights
        self.label_smoothing = label_smoothing
        self.detach_modulating_factor = detach_modulating_factor
        self.normalizer = normalizer
        self.reduction = reduction
        self.grad_mode = grad_mode
        self.loss_weight = loss_weight

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        weight: Tensor | Sequence[Tensor] | None = None,
        normalizer: str | float | Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """See `focal_loss`; `normalizer=None` is the constructor's."""
        return self._loss(
            logits,
            targets,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            background_index=self.background_index,
            ignore_index=self.ignore_index,
            weight=weight,
            level_weights=self.level_weights,
            normalizer=self.normalizer if normalizer is None else normalizer,
            reduction=self.reduction,
            grad_mode=self.grad_mode,
            loss_weight=self.loss_weight,
        )

    def _loss(
        self, logits: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], **options: Any
    ) -> Tensor | list[Tensor]:
        return focal_loss(
            logits,
            targets,
            label_smoothing=self.label_smoothing,
            detach_modulating_factor=self.detach_modulating_factor,
            **options,
        )


class FastFocalLossStar(FastFocalLoss):
    """`focal_loss_star` as a module: the same arguments, given once."""

    def __init__(self, num_classes: int, *, gamma: float = 2.0, beta: float = 1.0, **options: Any) -> None:
        super().__init__(num_classes, gamma=gamma, **options)
        self.beta = beta

    def _loss(
        self, logits: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], **options: Any
    ) -> Tensor | list[Tensor]:
        return focal_loss_star(logits, targets, beta=self.beta, **options)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """`torchvision.ops.sigmoid_focal_loss`: the same arguments, results and errors.

    Args:
        inputs: logits of any shape. 16-bit inputs are computed in float32 and the result is rounded once.
        targets: of the same shape, in [0, 1]; not differentiable.
        alpha: in [0, 1], or -1 for no weighting.
        gamma: exponent of the modulating factor.
        reduction: "none", "mean" or "sum", over all elements.
    """
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: 'none', 'mean', 'sum'"
        )
    if targets.shape != inputs.shape:
        raise ValueError(f"Target size ({targets.shape}) must be the same as input size ({inputs.shape})")
    _check_no_grad(targets=targets)
    result_dtype = torch.promote_types(inputs.dtype, targets.dtype)
    dtype = _compute_dtype(result_dtype)
    x, y = inputs.to(dtype), targets.to(dtype)
    loss = _alpha_t(y, alpha) * _modulating_factor(x, y, gamma) * _cross_entropy(x, y, 0.0)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(result_dtype)


# The loss of one logit


def _star(x: Tensor, y: Tensor, gamma: float, beta: float) -> Tensor:
    """-log(sigmoid(gamma * x_t + beta)) / gamma of logits x and targets y in [0, 1], shaped as x."""
    side = 2 * y - 1
    x_t = side * torch.where(side == 0, x.clamp(-1e30, 1e30), x)  # 0 of an infinite logit
    return -nn.functional.logsigmoid(gamma * x_t + beta) / gamma


def _alpha_t(y: Tensor, alpha: float | Sequence[float] | Tensor | None) -> Tensor:
    """alpha for a positive, 1 - alpha for a negative, in between for a soft target."""
    if alpha is None or (isinstance(alpha, (int, float)) and alpha < 0):
        return torch.ones_like(y)
    alpha = torch.as_tensor(alpha, dtype=torch.float64)  # so that 1 - alpha is rounded once
    if alpha.ndim > 0 and alpha.shape != y.shape[-1:]:
        raise ValueError(f"alpha: expected one number or {y.shape[-1]}, one per class, got shape {tuple(alpha.shape)}")
    return alpha.to(y) * y + (1 - alpha).to(y) * (1 - y)


def _modulating_factor(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma as exp(gamma * log(1 - p_t)).

    The derivative of the power itself holds (1 - p_t)^(gamma - 1), which is infinite at p_t = 1 where gamma < 1.
    """
    if gamma == 0:
        return torch.ones_like(x)
    factor = torch.exp(gamma * _log_one_minus_p_t(x, y))
    # At a huge or infinite logit the factor is flat, but the product rule would give 0 * inf.
    return torch.where(x.abs() > 1e30, factor.detach(), factor)


def _log_one_minus_p_t(x: Tensor, y: Tensor) -> Tensor:
    """log(1 - p_t): that of sigmoid(x) for a negative, of sigmoid(-x) for a positive, of their mixture in between."""
    between = (y > 0) & (y < 1)
    mixture = (1 - y) * torch.sigmoid(x) + y * torch.sigmoid(-x)
    # 1 where the mixture is not used and may be 0: log(0) has no derivative.
    return torch.where(
        between, torch.log(torch.where(between, mixture, 1.0)), nn.functional.logsigmoid(torch.where(y == 1, -x, x))
    )


def _cross_entropy(x: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    """-(y * log(p) + (1 - y) * log(1 - p)) with p = sigmoid(x) and smoothed y.

    A sum of two terms >= 0. `binary_cross_entropy_with_logits` subtracts, so a well classified negative loses its
    digits, and an infinite logit becomes NaN.
    """
    positive = y * (1 - label_smoothing) + label_smoothing / 2
    negative = (1 - y) * (1 - label_smoothing) + label_smoothing / 2
    return _share(positive, -nn.functional.logsigmoid(x)) + _share(negative, -nn.functional.logsigmoid(-x))


def _share(share: Tensor, term: Tensor) -> Tensor:
    """share * term, and 0 for no share of an infinite term."""
    return torch.where(share == 0, 0.0, share * term)


# Targets


def _one_hot(
    labels: Tensor, num_classes: int, background_index: int | None, ignore_index: int, level: int
) -> tuple[Tensor, Tensor]:
    """Labels (N, M) to a one-hot target (N, M, K), all zero for background and ignored, and the ignored (N, M)."""
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"targets[{level}]: expected an integer or a floating dtype, got {labels.dtype}")
    background_index = num_classes if background_index is None else background_index
    if background_index == ignore_index:
        raise ValueError(f"background_index and ignore_index: expected different labels, got {ignore_index} for both")
    if 0 < background_index < num_classes:
        raise ValueError(f"background_index: got {background_index}, which is a class of {num_classes} too")

    labels = labels.long()
    ignored = labels == ignore_index
    classes = labels - 1 if background_index == 0 else labels
    foreground = (classes >= 0) & (classes < num_classes) & ~ignored
    known = foreground | ignored | (labels == background_index)
    # Read by the host, so on the CPU only; and a compiled graph could not branch on it.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not known.all():
        image, anchor = (~known).nonzero()[0].tolist()
        raise ValueError(
            f"targets[{level}]: label {labels[image, anchor].item()} of image {image}, anchor {anchor} is none of "
            f"foreground ({num_classes} classes), background ({background_index}) and ignored ({ignore_index})"
        )
    # Column K is background or ignored. Column K + 1 does not exist: a CUDA device asserts there.
    columns = torch.where(foreground, classes, torch.where(known, num_classes, num_classes + 1))
    return nn.functional.one_hot(columns, num_classes + 1)[..., :num_classes].bool(), ignored


def _split_per_level(
    name: str, values: Tensor | Sequence[Tensor], levels: list[Tensor], num_classes: int
) -> list[Tensor]:
    """Labels or weights in any of their forms to one (N, M) a level."""
    num_images = _num_images(levels[0])
    shapes = [_label_shapes(level, num_classes) for level in levels]
    sizes = [_num_anchors(level, num_classes) for level in levels]
    if isinstance(values, Tensor) and len(levels) > 1:
        expected = (sum(sizes),) if levels[0].ndim == 2 else (num_images, sum(sizes))
        if values.shape != expected:
            raise ValueError(f"{name}: expected shape {expected} over all levels, got {tuple(values.shape)}")
        return list(torch.split(values.reshape(num_images, sum(sizes)), sizes, dim=1))

    values = [values] if isinstance(values, Tensor) else list(values)
    if len(values) != len(levels):
        raise ValueError(f"{name}: expected {len(levels)} levels, got {len(values)}")
    for index, value in enumerate(values):
        if tuple(value.shape) not in shapes[index]:
            expected_text = " or ".join(map(str, shapes[index]))
            raise ValueError(f"{name}[{index}]: expected shape {expected_text}, got {tuple(value.shape)}")
    return [value.reshape(num_images, size) for value, size in zip(values, sizes, strict=True)]


def _split_soft_targets(targets: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
    """Soft targets have no form over all levels: one per level, shaped as its logits."""
    if len(targets) != len(levels):
        raise ValueError(f"targets: expected soft targets for {len(levels)} levels, got {len(targets)}")
    for index, (target, level) in enumerate(zip(targets, levels, strict=True)):
        if not target.is_floating_point():
            raise TypeError(f"targets[{index}]: expected a floating dtype as the other levels have, got {target.dtype}")
        if target.shape != level.shape:
            raise ValueError(f"targets[{index}]: expected shape {tuple(level.shape)}, got {tuple(target.shape)}")
    return targets


# The divisor


def _resolve_divisor(
    normalizer: str | float | Tensor | None, one_hot: list[Tensor] | None, num_images: int, dtype: torch.dtype
) -> float | Tensor:
    """What the loss is divided by: a number, a 0-d tensor, or (N, 1, 1). `one_hot` is None for soft targets."""
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, str):
        if normalizer not in ("positives", "positives_per_image"):
            raise ValueError(f"normalizer: expected 'positives' or 'positives_per_image', got {normalizer!r}")
        if one_hot is None:
            raise ValueError(f"normalizer: {normalizer!r} needs labels to count; pass a number with soft targets")
        positives = torch.stack([target.sum(dim=(1, 2)) for target in one_hot]).sum(dim=0)  # (N,)
        if normalizer == "positives":
            return positives.sum().clamp(min=1)
        return (num_images * positives.clamp(min=1)).reshape(num_images, 1, 1)
    if isinstance(normalizer, Tensor):
        if normalizer.ndim == 0:
            return normalizer.to(dtype)
        if normalizer.shape != (num_images,):
            raise ValueError(f"normalizer: expected shape () or ({num_images},), got {tuple(normalizer.shape)}")
        return normalizer.to(dtype).reshape(num_images, 1, 1)
    if not normalizer > 0:
        raise ValueError(f"normalizer: expected a number > 0, got {normalizer}")
    return normalizer


def _count_logits(ignored: list[Tensor], num_classes: int) -> Tensor:
    """The number of logits of anchors that are not ignored, over all levels and images."""
    return num_classes * torch.stack([(~ignore).sum() for ignore in ignored]).sum()


# Shapes and dtypes


def _flatten(level: Tensor, num_classes: int) -> Tensor:
    """Logits of any form to (N, M, K)."""
    if level.ndim == 4:
        n, channels, h, w = level.shape
        a = channels // num_classes
        return level.reshape(n, a, num_classes, h, w).permute(0, 3, 4, 1, 2).reshape(n, h * w * a, num_classes)
    return level.unsqueeze(0) if level.ndim == 2 else level


def _unflatten(loss: Tensor, level: Tensor, num_classes: int) -> Tensor:
    """(N, M, K) back to the shape of the level's logits."""
    if level.ndim == 4:
        n, channels, h, w = level.shape
        loss = loss.reshape(n, h, w, channels // num_classes, num_classes).permute(0, 3, 4, 1, 2)
    return loss.reshape(level.shape)


def _num_images(level: Tensor) -> int:
    return 1 if level.ndim == 2 else level.shape[0]


def _num_anchors(level: Tensor, num_classes: int) -> int:
    """M of a level."""
    if level.ndim == 4:
        _, channels, h, w = level.shape
        return h * w * (channels // num_classes)
    return level.shape[-2]


def _label_shapes(level: Tensor, num_classes: int) -> list[tuple[int, ...]]:
    """The shapes that the labels of one level may have."""
    m = _num_anchors(level, num_classes)
    if level.ndim == 2:
        return [(m,)]
    if level.ndim == 3:
        return [(level.shape[0], m)]
    n, channels, h, w = level.shape
    a = channels // num_classes
    return [(n, h, w, a), (n, m)] + ([(n, h, w)] if a == 1 else [])


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _resolve_num_classes(levels: list[Tensor], num_classes: int | None, soft: bool) -> int:
    if num_classes is None:
        if levels[0].ndim == 4 and not soft:
            raise ValueError("num_classes: needed with 4-D logits and labels")
        num_classes = levels[0].shape[1 if levels[0].ndim == 4 else -1]
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    for index, level in enumerate(levels):
        if level.ndim == 4 and level.shape[1] % num_classes != 0:
            raise ValueError(f"logits[{index}]: expected A * {num_classes} channels, got {level.shape[1]}")
        if level.ndim != 4 and level.shape[-1] != num_classes:
            raise ValueError(f"logits[{index}]: expected {num_classes} classes last, got shape {tuple(level.shape)}")
    return num_classes


# Checks


def _check_levels(levels: list[Tensor]) -> None:
    if not levels:
        raise ValueError("logits: expected at least one level, got an empty sequence")
    first = levels[0]
    for index, level in enumerate(levels):
        if not level.is_floating_point():
            raise TypeError(f"logits[{index}]: expected a floating dtype, got {level.dtype}")
        if level.ndim not in (2, 3, 4):
            raise ValueError(f"logits[{index}]: expected 2, 3 or 4 dimensions, got shape {tuple(level.shape)}")
        if (level.ndim, level.dtype, _num_images(level)) != (first.ndim, first.dtype, _num_images(first)):
            raise ValueError(
                f"logits[{index}]: expected dimensions, dtype and images as in logits[0], {tuple(first.shape)} of "
                f"{first.dtype}, got {tuple(level.shape)} of {level.dtype}"
            )


def _check_options(
    num_levels: int, level_weights: Sequence[float] | Tensor | None, reduction: str, grad_mode: str
) -> None:
    if level_weights is not None and len(level_weights) != num_levels:
        raise ValueError(f"level_weights: expected {num_levels}, one per level, got {len(level_weights)}")
    if reduction not in ("sum", "level", "image", "none", "mean"):
        raise ValueError(f"reduction: expected 'sum', 'level', 'image', 'none' or 'mean', got {reduction!r}")
    if grad_mode not in ("auto", "save", "recompute", "inplace"):
        raise ValueError(f"grad_mode: expected 'auto', 'save', 'recompute' or 'inplace', got {grad_mode!r}")


def _check_no_grad(**arguments: object) -> None:
    """The contract gives derivatives for the logits alone."""
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise ValueError(f"{name}: is not differentiable, got a tensor that requires grad; detach it")
