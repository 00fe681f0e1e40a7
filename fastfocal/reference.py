"""Every loss over all levels of a feature pyramid in pure PyTorch: slow, readable, what the kernels are held against.

Each level is permuted to (N, M, K), gets a dense target, and is weighted and summed by itself; then the levels are added. The
loss of one logit is `term` of the loss's file (fastfocal/losses/). Gradients, also second ones, are plain autograd's.

Functions and classes have the names that they have in `fastfocal`, the classes without "Fast": `reference.focal_loss`,
`reference.FocalLoss`.

N images, K classes (no background channel), A anchors per cell, M = H*W*A anchors of a level in the order h, w, a.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastfocal import labels as label_conventions
from fastfocal.distributed import MODULE_DEFAULTS, KeptNormalizer, Ranks, Running
from fastfocal.losses import LOSSES
from fastfocal.losses.focal import FocalLoss as _FocalLoss
from fastfocal.losses.focal import cross_entropy, modulating_factor
from fastfocal.losses.loss import Loss
from fastfocal.ops import anchor_shape
from fastfocal.options import Inputs, Options, defaults_of
from fastfocal.prepare import (
    check_class_mask,
    check_normalizer,
    check_scores,
    check_targets_of_loss,
    class_factors,
)
from fastfocal.pyramid import sort_keywords

_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def pyramid_loss(
    loss: Loss, options: Options, inputs: Inputs, ranks: Ranks | None = None, running: Running | None = None
) -> Tensor | list[Tensor]:
    """The loss of every level, added over levels.

    The term of level l, image n, anchor m and class k is

        loss_weight * level_weights[l] * weight[n, m] * (positive or negative weight)[k] * term / divisor

    where ignored anchors and absent classes have none. Arguments as :func:`fastfocal.focal_loss` takes them, with two
    differences: 16-bit logits are computed in float32, and `grad_mode` is without effect: autograd saves what it saves, and the
    logits are never overwritten.

    Returns:
        float32, or float64 for float64 logits; with "none" in the logits' dtype.
    """
    levels = [inputs.logits] if isinstance(inputs.logits, Tensor) else list(inputs.logits)
    target_list = [inputs.targets] if isinstance(inputs.targets, Tensor) else list(inputs.targets)
    _check_levels(levels)
    _check_level_weights(options, len(levels))
    _check_no_grad(targets=inputs.targets, weight=inputs.weight, normalizer=inputs.normalizer, scores=inputs.scores)
    soft = any(target.is_floating_point() for target in target_list)
    check_targets_of_loss(loss, soft)
    num_classes = _resolve_num_classes(levels, options.num_classes, soft)
    options = options.of(num_classes)
    assert options.background_index is not None
    dtype = _compute_dtype(levels[0].dtype)

    # The dense target of every level, (N, M, K), and which of its anchors are ignored, (N, M).
    dense: list[Tensor] = []
    ignored: list[Tensor] = []
    if soft:
        for target in _split_soft_targets(target_list, levels):
            dense.append(_flatten(target, num_classes))
            ignored.append(torch.zeros_like(dense[-1][..., 0], dtype=torch.bool))
    else:
        for index, label in enumerate(_split_per_level("targets", inputs.targets, levels, num_classes)):
            one_hot, ignore = _one_hot(label, num_classes, options, index)
            dense.append(one_hot)
            ignored.append(ignore)

    present = None  # (N, K): which classes an image has
    if inputs.class_mask is not None:
        present = check_class_mask(inputs.class_mask, levels[0], num_classes).reshape(-1, num_classes)
    absent = None  # (N, 1, K): those that have no share of a softmax; an anchor that is labelled so has no loss
    if present is not None and loss.takes_anchors:
        absent, present = ~present.unsqueeze(1), None
        ignored = [ignore | (target & absent).any(-1) for ignore, target in zip(ignored, dense, strict=True)]
    scores = None
    if inputs.scores is not None:
        check_scores(loss, soft)
        scores = _split_per_level("scores", inputs.scores, levels, num_classes)

    if options.reduction == "mean":
        counted = 1 if loss.takes_anchors else num_classes
        divisor: float | Tensor = _count_for_rank(_count_logits(ignored, counted, present), ranks)
    else:
        check_normalizer(loss, inputs.normalizer, levels[0], soft, scores is not None)
        positives = dense
        if soft:  # the check has let no string through where nothing counts
            positives = [] if loss.positive_target is None else [torch.eq(t, loss.positive_target) for t in dense]
        elif options.background_is_class and options.background_index >= 0:
            without = torch.arange(num_classes, device=levels[0].device) != options.background_index
            positives = [one_hot & without for one_hot in dense]
        divisor = _resolve_divisor(inputs.normalizer, positives, scores, _num_images(levels[0]), dtype, ranks)
    if running is not None:
        divisor = running.next(torch.as_tensor(divisor, dtype=torch.float64)).to(dtype)

    positive, negative = _weights(loss, inputs, num_classes, levels[0].device)
    weights = None if inputs.weight is None else _split_per_level("weight", inputs.weight, levels, num_classes)
    losses: list[Tensor] = []
    for index, (level, target, ignore) in enumerate(zip(levels, dense, ignored, strict=True)):
        left_out = ignore.unsqueeze(-1)
        if present is not None:
            left_out = left_out | ~present.unsqueeze(1)
        # Before anything is computed: the derivative at a NaN is NaN, and stays so when masked afterwards.
        x = _flatten(level, num_classes).to(dtype)
        x = torch.where(left_out, 0.0, x if absent is None else x.masked_fill(absent, -torch.inf))
        y = target.to(dtype)
        score = y if soft else torch.ones_like(y)
        if scores is not None:
            score = scores[index].to(dtype).unsqueeze(-1).expand_as(y)
        term = _weight(type(loss), y, positive, negative) * loss.term(x, y, score)
        if weights is not None:
            term = term * weights[index].to(dtype).unsqueeze(-1)
        if options.level_weights is not None:
            term = term * options.level_weights[index]
        term = options.loss_weight * term / divisor
        losses.append(torch.where(left_out, 0.0, term))

    if options.reduction == "none":
        unflatten = _of_anchors if loss.takes_anchors else _unflatten
        shaped = [
            unflatten(term, level, num_classes).to(level.dtype) for term, level in zip(losses, levels, strict=True)
        ]
        return shaped[0] if isinstance(inputs.logits, Tensor) else shaped
    if options.reduction == "image":
        return torch.stack([term.sum(dim=(1, 2)) for term in losses]).sum(dim=0)
    per_level = torch.stack([term.sum() for term in losses])
    return per_level if options.reduction == "level" else per_level.sum()


class Module(KeptNormalizer):
    """A loss as a module: the function's arguments, given once. `grad_mode` has no effect here."""

    parameters_of_loss: ClassVar[type[Loss]]

    def __init__(self, num_classes: int, **options: Any):
        super().__init__()
        known = self._defaults()
        if unknown := options.keys() - known.keys():
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {min(unknown)!r}")
        options = {**known, **options, "num_classes": num_classes}
        options["background_index"], options["ignore_index"] = label_conventions.resolve(
            options.pop("labels"), options["background_index"], options["ignore_index"], num_classes
        )
        self._keep_normalizer(options)
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        per_call = ("num_classes", "weight", "scores", "class_mask")
        return {n: v for n, v in defaults_of(cls.parameters_of_loss).items() if n not in per_call}

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        weight: Tensor | Sequence[Tensor] | None = None,
        normalizer: str | float | Tensor | None = None,
        **others: Any,
    ) -> Tensor | list[Tensor]:
        """`normalizer=None` is the constructor's; `others`: scores and class_mask, as the function takes them."""
        # getattr: one that was saved by an earlier version has fewer.
        kept = self._defaults().items()
        options = {n: getattr(self, n, v) for n, v in kept if n != "labels" and n not in MODULE_DEFAULTS}
        options |= {"num_classes": self.num_classes, "weight": weight, **others}
        if normalizer is not None:
            options["normalizer"] = normalizer
        reduction = options.pop("reduction")
        options["normalizer"], ranks, running = self._kept_normalizer(logits, options["normalizer"], reduction)
        arguments = sort_keywords(self.parameters_of_loss, logits, targets, reduction, options)
        return pyramid_loss(*arguments, ranks, running)


def _function_of(parameters: type[Loss], function: Callable[..., Any]) -> Callable[..., Any]:
    def reference(logits: Any, targets: Any, *, reduction: str = "sum", **options: Any) -> Tensor | list[Tensor]:
        return pyramid_loss(*sort_keywords(parameters, logits, targets, reduction, options))

    reference.__name__ = reference.__qualname__ = function.__name__
    reference.__doc__ = (
        f":func:`fastfocal.{function.__name__}` in pure PyTorch: the same arguments; see `pyramid_loss`."
    )
    reference.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return reference


def _module_of(parameters: type[Loss], name: str) -> type[Module]:
    doc = f":class:`fastfocal.Fast{name}` in pure PyTorch: the same arguments. `grad_mode` has no effect here."
    return type(name, (Module,), {"parameters_of_loss": parameters, "__doc__": doc, "__module__": __name__})


__all__ = ["pyramid_loss", "sigmoid_focal_loss"]
for _member in LOSSES:
    _name = _member.module.__name__
    globals()[_member.function.__name__] = _function_of(_member.parameters, _member.function)
    # Under both names; whole modules that were saved have the one with "Fast".
    globals()[_name] = globals()[_name.removeprefix("Fast")] = _module_of(
        _member.parameters, _name.removeprefix("Fast")
    )
    __all__ += [_member.function.__name__, _name, _name.removeprefix("Fast")]


def __getattr__(name: str) -> Any:  # for type checkers: what the loop above made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    positive, negative = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    loss = _weight(_FocalLoss, y, positive, negative) * modulating_factor(x, y, gamma) * cross_entropy(x, y)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(result_dtype)


# Weights


def _weights(loss: Loss, inputs: Inputs, num_classes: int, device: torch.device) -> tuple[Any, Any]:
    """Of positives and of negatives, numbers or (K,), in float64, so that 1 - alpha is rounded once."""
    positive, negative = loss.weights(num_classes, device)
    if inputs.class_weight is None:
        return positive, negative
    rows = class_factors(loss, inputs.class_weight, num_classes).rows(device)
    of_positives, of_negatives = [_float64(row, device) for row in rows]
    return _float64(positive, device) * of_positives, _float64(negative, device) * of_negatives


def _float64(value: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device)


def _weight(loss: type[Loss], y: Tensor, positive: Any, negative: Any) -> Tensor:
    """What the target's weight is: that of a positive, of a negative, or of a soft target."""
    if isinstance(positive, float) and positive == negative:
        return torch.full_like(y, positive)
    return loss.soft_weight(y, _float64(positive, y.device).to(y), _float64(negative, y.device).to(y))


# Targets


def _one_hot(labels: Tensor, num_classes: int, options: Options, level: int) -> tuple[Tensor, Tensor]:
    """Labels (N, M) to a one-hot target (N, M, K), all zero for ignored and for a background that is no class, and the ignored
    (N, M)."""
    background_index, ignore_index = options.background_index, options.ignore_index
    if options.background_is_class:
        background_index = ignore_index  # nothing else is no class
    assert background_index is not None
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"targets[{level}]: expected an integer or a floating dtype, got {labels.dtype}")
    labels = labels.long()
    ignored = labels == ignore_index
    classes = labels - 1 if background_index == 0 and not options.background_is_class else labels
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
    normalizer: str | float | Tensor | None,
    positive: list[Tensor],
    scores: list[Tensor] | None,
    num_images: int,
    dtype: torch.dtype,
    ranks: Ranks | None,
) -> float | Tensor:
    """What the loss is divided by: a number, a 0-d tensor, or (N, 1, 1). `positive`: of each level, (N, M, K)."""
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, str):
        if normalizer == "scores":
            assert scores is not None
            of_positives = [
                (score.double() * target.any(-1)).sum() for score, target in zip(scores, positive, strict=True)
            ]
            return _count_for_rank(torch.stack(of_positives).sum(), ranks).to(dtype)
        positives = torch.stack([target.sum(dim=(1, 2)) for target in positive]).sum(dim=0)  # (N,)
        if normalizer == "positives":
            return _count_for_rank(positives.sum(), ranks).to(dtype)
        images = _count_for_rank(torch.as_tensor(num_images, device=positives.device), ranks)
        return (images * positives.clamp(min=1)).to(dtype).reshape(num_images, 1, 1)
    if isinstance(normalizer, Tensor):
        if ranks is not None:  # this rank's count, used as it is
            normalizer = ranks.start_sum(normalizer.double().clone())() / ranks.size
        return normalizer.to(dtype) if normalizer.ndim == 0 else normalizer.to(dtype).reshape(num_images, 1, 1)
    return normalizer


def _count_for_rank(count: Tensor, ranks: Ranks | None) -> Tensor:
    """max(1, count), float64; over ranks, that of all of them, in equal parts."""
    count = count.double()
    if ranks is None:
        return count.clamp(min=1)
    return ranks.start_sum(count)().clamp(min=1) / ranks.size


def _count_logits(ignored: list[Tensor], num_classes: int, present: Tensor | None) -> Tensor:
    """The number of logits of anchors that are not ignored and of classes that are there, over all levels and images."""
    anchors = torch.stack([(~ignore).sum(dim=1) for ignore in ignored]).sum(dim=0)  # (N,)
    return (anchors * (num_classes if present is None else present.sum(dim=1))).sum()


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


def _of_anchors(loss: Tensor, level: Tensor, num_classes: int) -> Tensor:
    """(N, M, K), of which one class of an anchor has its loss, to a number for each anchor, shaped as labels are."""
    return loss.sum(-1).reshape(anchor_shape(level, num_classes))


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


def _check_level_weights(options: Options, num_levels: int) -> None:
    if options.level_weights is not None and len(options.level_weights) != num_levels:
        raise ValueError(f"level_weights: expected {num_levels}, one per level, got {len(options.level_weights)}")


def _check_no_grad(**arguments: object) -> None:
    """The contract gives derivatives for the logits alone."""
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise ValueError(f"{name}: is not differentiable, got a tensor that requires grad; detach it")
