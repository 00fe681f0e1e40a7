"""Focal loss as functions."""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fastfocal import arguments, autograd, ops
from fastfocal import labels as label_conventions

Levels = Tensor | Sequence[Tensor]
Labels = Literal["torchvision", "detectron2", "mmdet", "effdet", "kuangliu", "segmentation"]
Reduced = Literal["sum", "level", "image", "mean"]
Normalizer = Literal["positives", "positives_per_image"] | float | Tensor | None
GradMode = Literal["auto", "save", "recompute", "inplace"]


class Options(TypedDict, total=False):
    """The keywords that both functions take, beside `reduction`."""

    num_classes: int | None
    alpha: float | Sequence[float] | Tensor | None
    gamma: float
    labels: Labels | None
    background_index: int | None
    ignore_index: int
    weight: Levels | None
    level_weights: Sequence[float] | None
    normalizer: Normalizer
    grad_mode: GradMode
    loss_weight: float


class FocalLossOptions(Options, total=False):
    label_smoothing: float
    detach_modulating_factor: bool


class FocalLossStarOptions(Options, total=False):
    beta: float


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


def focal_loss(
    logits: Levels,
    targets: Levels,
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    labels: Labels | None = None,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Levels | None = None,
    level_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    detach_modulating_factor: bool = False,
    normalizer: Normalizer = "positives",
    reduction: Reduced | Literal["none"] = "sum",
    grad_mode: GradMode = "auto",
    loss_weight: float = 1.0,
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
            all of these add up to the first. ``"mean"``: the sum over the number of logits of anchors not ignored, without
            the normalizer.
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
    formula = plain_formula(gamma, label_smoothing, detach_modulating_factor)
    classes = arguments.number_of_classes(logits, targets, num_classes)
    number, per_class = arguments.split_alpha(alpha)
    background_index, ignore_index = label_conventions.resolve(labels, background_index, ignore_index, classes)
    options = (background_index, ignore_index, level_weights, reduction, grad_mode, loss_weight)
    settings = make_settings(formula, classes, number, *options)
    class_alpha = None if per_class is None else arguments.check_class_alpha(per_class, classes)
    return pyramid_loss(settings, logits, targets, weight, normalizer, class_alpha)


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


def focal_loss_star(
    logits: Levels,
    targets: Levels,
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
    labels: Labels | None = None,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Levels | None = None,
    level_weights: Sequence[float] | None = None,
    normalizer: Normalizer = "positives",
    reduction: Reduced | Literal["none"] = "sum",
    grad_mode: GradMode = "auto",
    loss_weight: float = 1.0,
) -> Tensor | list[Tensor]:
    r"""Focal loss star over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: FL^*(x_t) = -\alpha_t \log \sigma(\gamma x_t + \beta) / \gamma, \quad x_t = x (2 y - 1)

    Lin et al., *Focal Loss for Dense Object Detection*, 2017 (arXiv:1708.02002), appendix B: a cross entropy that, like the
    focal loss, gives well classified anchors little. ``beta=0, alpha=None`` is fvcore's ``sigmoid_focal_loss_star``;
    ``gamma=2, beta=1`` is what kuangliu/pytorch-retinanet trains with.

    Args:
        gamma: slope of the logit, a finite number > 0.
        beta: shift of the logit, a finite number.
        logits, targets, num_classes, alpha, labels, background_index, ignore_index, weight, level_weights, normalizer,
            reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them. Soft targets: ``x_t`` as above, in
            between.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`.
    """
    formula = star_formula(gamma, beta)
    classes = arguments.number_of_classes(logits, targets, num_classes)
    number, per_class = arguments.split_alpha(alpha)
    background_index, ignore_index = label_conventions.resolve(labels, background_index, ignore_index, classes)
    options = (background_index, ignore_index, level_weights, reduction, grad_mode, loss_weight)
    settings = make_settings(formula, classes, number, *options)
    class_alpha = None if per_class is None else arguments.check_class_alpha(per_class, classes)
    return pyramid_loss(settings, logits, targets, weight, normalizer, class_alpha)


class Formula(NamedTuple):
    """Which member of the family, and its own parameters."""

    family: int
    gamma: float
    label_smoothing: float = 0.0
    detach_modulating_factor: bool = False
    beta: float = 0.0


def plain_formula(gamma: float, label_smoothing: float, detach_modulating_factor: bool) -> Formula:
    gamma, label_smoothing = arguments.check_formula(gamma, label_smoothing, detach_modulating_factor)
    return Formula(ops.FOCAL_LOSS, gamma, label_smoothing, detach_modulating_factor)


def star_formula(gamma: float, beta: float) -> Formula:
    gamma, beta = arguments.check_star(gamma, beta)
    return Formula(ops.FOCAL_LOSS_STAR, gamma, beta=beta)


class Settings(NamedTuple):
    """What to compute, checked: all that is known before there are tensors, so that a module checks it once."""

    formula: Formula
    num_classes: int
    positive_weight: float
    negative_weight: float
    background: int
    ignore_index: int
    level_weights: list[float] | None
    reduction: str
    grad_mode: str
    loss_weight: float


def make_settings(
    formula: Formula,
    num_classes: int,
    alpha: float | None,
    background_index: int | None,
    ignore_index: int,
    level_weights: Sequence[float] | None,
    reduction: str,
    grad_mode: str,
    loss_weight: float,
) -> Settings:
    """Arguments as :func:`fastfocal.focal_loss` takes them; an alpha for each class comes with the tensors."""
    num_classes = arguments.check_num_classes(num_classes)
    ignore_index = arguments.as_index("ignore_index", ignore_index)
    arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.check_choice("grad_mode", grad_mode, arguments.GRAD_MODES)
    return Settings(
        formula,
        num_classes,
        *arguments.check_alpha(alpha),
        arguments.check_indices(background_index, ignore_index, num_classes),
        ignore_index,
        arguments.check_level_weights(level_weights),
        reduction,
        grad_mode,
        arguments.check_loss_weight(loss_weight),
    )


def pyramid_loss(
    settings: Settings,
    logits: Levels,
    targets: Levels,
    weight: Levels | None,
    normalizer: str | float | Tensor | None,
    class_alpha: Tensor | tuple[float, ...] | None,
) -> Tensor | list[Tensor]:
    """Everything that does not depend on the formula. The tensors as :func:`fastfocal.focal_loss` takes them.

    class_alpha: checked; a tensor is float64.
    """
    reduction = settings.reduction
    transformed = autograd.is_transformed()
    given = arguments.as_levels("targets", targets)
    soft = any([t.is_floating_point() for t in given])
    levels, classes, anchors = arguments.check_logits(logits, settings.num_classes)
    if transformed and not is_compiling():
        arguments.check_transforms(levels, given)
    class_weights: Tensor | None = None
    if class_alpha is not None:
        class_weights = weights_of_classes(class_alpha, classes, levels[0])
    count, number, divisor = resolve_normalizer(normalizer, reduction, levels, soft)
    scales = level_scales(settings, len(levels), number)
    mode = resolve_mode(settings.grad_mode, reduction, levels)
    dense = arguments.dense(levels, differentiably=transformed)
    anchor_weight = None if weight is None else arguments.check_weight(weight, dense, classes, anchors)

    codes: Tensor | None = None
    soft_targets: list[Tensor] | None = None
    if soft:
        soft_targets = arguments.check_soft_targets(given, dense)
    else:
        together = isinstance(targets, Tensor)
        labels = arguments.check_labels(given, together, dense, classes, anchors)
        background, ignored = settings.background, settings.ignore_index
        if background == classes and ignored == -1 and not is_compiling():
            label_conventions.no_background.look(labels, classes)
        try:
            codes, counted = ops.operators.pack_labels(labels, dense, None, classes, background, ignored, count, 1.0)
        except ValueError:
            message = label_conventions.describe_bad_label(given, together, anchors, classes, background, ignored)
            if message is None:
                raise
            raise ValueError(message) from None
        if count != ops.COUNT_NOTHING:
            divisor = counted if divisor is None else counted * divisor

    family, gamma, label_smoothing, detach_modulating_factor, beta = settings.formula
    if family == ops.FOCAL_LOSS_STAR:
        loss_parameters = [gamma, beta]
    else:
        loss_parameters = [gamma, label_smoothing, float(detach_modulating_factor)]
    options = autograd.Options(
        codes,
        soft_targets,
        None,
        anchor_weight,
        class_weights,
        None,
        divisor,
        scales,
        settings.positive_weight,
        settings.negative_weight,
        family,
        loss_parameters,
        classes,
        OPERATOR_REDUCTIONS[reduction],
    )
    losses = autograd.focal_loss(mode, options, levels, dense, transformed)
    if reduction == "none" and not isinstance(logits, Tensor):
        return list(losses)
    return losses[0]


def weights_of_classes(alpha: Tensor | tuple[float, ...], num_classes: int, logits: Tensor) -> Tensor:
    """``(2, K)``, the weights of positives and of negatives, on the logits' device."""
    if len(alpha) != num_classes:
        raise ValueError(f"alpha: expected one number per class, {num_classes} of them, got {len(alpha)}")
    dtype, device = ops.accumulation_dtype(logits.dtype), logits.device
    if isinstance(alpha, Tensor):
        per_class = alpha.to(device)
        return torch.stack((per_class, 1 - per_class)).to(dtype)
    # What is made under a mode or a transform may be no ordinary tensor (fake, traced, wrapped), and must not outlast it.
    if autograd.is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return make_weights_of_classes(alpha, dtype, device)
    return remembered_weights_of_classes(alpha, dtype, device)


def make_weights_of_classes(alpha: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    weights = torch.tensor((alpha, [1.0 - a for a in alpha]), dtype=torch.float64, device="cpu")
    return weights.to(dtype).to(device)


@functools.cache  # for good: a captured graph may read it as long as the process lives
def remembered_weights_of_classes(alpha: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to the device once: a copy from the host waits for it, and a graph that is being captured refuses it."""
    with torch.inference_mode(False), torch.no_grad():
        return make_weights_of_classes(alpha, dtype, device)


# "mean" is a sum over a divisor of its own.
OPERATOR_REDUCTIONS = {"sum": ops.SUM, "mean": ops.SUM, "level": ops.LEVEL, "image": ops.IMAGE, "none": ops.NONE}


def resolve_normalizer(
    normalizer: str | float | Tensor | None, reduction: str, levels: list[Tensor], soft: bool
) -> tuple[int, float, Tensor | None]:
    """What the sum is divided by: what pack_labels is to count, a number, and a tensor on the logits' device."""
    if reduction == "mean":
        if not soft:
            return ops.COUNT_LOGITS, 1.0, None
        return ops.COUNT_NOTHING, *size_as_divisor(max(1, sum(t.numel() for t in levels)), levels[0])
    if isinstance(normalizer, Tensor):
        normalizer = arguments.as_plain("normalizer", normalizer)
    arguments.check_normalizer_for(normalizer, levels[0], soft)
    if isinstance(normalizer, str):
        if normalizer == "positives":
            return ops.COUNT_POSITIVES, 1.0, None
        return ops.COUNT_POSITIVES_PER_IMAGE, *size_as_divisor(max(1, ops.images(levels[0])), levels[0])
    if isinstance(normalizer, Tensor):
        if normalizer.device != levels[0].device and not is_compiling():  # a number on the host: nothing is copied
            return ops.COUNT_NOTHING, normalizer.item(), None
        divisor = normalizer.detach().to(levels[0].device, torch.float64, non_blocking=True)
        return ops.COUNT_NOTHING, 1.0, divisor.contiguous()
    return ops.COUNT_NOTHING, 1.0 if normalizer is None else float(normalizer), None


def size_as_divisor(size: int, like: Tensor) -> tuple[float, Tensor | None]:
    """A size as a number; under a compiler as a tensor, since a number in an operator's list would fix a symbolic size."""
    if is_compiling():
        return 1.0, torch.full((), size, dtype=torch.float64, device=like.device)
    return float(size), None


def level_scales(settings: Settings, levels: int, number: float) -> list[float]:
    """What each level's loss is multiplied by: its weight, the loss' weight, and over the normalizer's number."""
    weights = settings.level_weights
    if weights is None:
        return [quotient(settings.loss_weight, number)] * levels
    arguments.check_number_of_level_weights(weights, levels)
    return [quotient(settings.loss_weight * weight, number) for weight in weights]


def quotient(value: float, divisor: float) -> float:
    """As tensors are divided: by 0 too, which a tensor given as normalizer may hold."""
    return value / divisor if divisor != 0 else value * math.copysign(math.inf, divisor)


def resolve_mode(grad_mode: str, reduction: str, levels: list[Tensor]) -> str:
    """What "auto" means, and whether "inplace" may be."""
    if grad_mode == "auto":
        return "recompute" if levels[0].dtype == torch.float16 or reduction == "none" else "save"
    if grad_mode == "inplace" and torch.is_grad_enabled():
        for i, t in enumerate(levels):
            if t.requires_grad and arguments.dispatches_itself(t):
                raise TypeError(
                    f'grad_mode: "inplace" expects ordinary tensors, got logits[{i}] of type {type(t).__name__}'
                )
            base = t if is_compiling() else t._base  # not None: t is a view of it
            if t.requires_grad and (t.is_leaf or (base is not None and base.is_leaf and base.requires_grad)):
                raise ValueError(
                    f'grad_mode: "inplace" overwrites the logits, but logits[{i}] is a leaf that requires grad, or a view of '
                    "one; expected the output of an operation, such as a convolution"
                )
            if t.requires_grad and not arguments.is_dense(t):
                raise ValueError(
                    f'grad_mode: "inplace" needs contiguous or channels_last memory, got logits[{i}] with strides {t.stride()}'
                )
    return grad_mode


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, computed by the fused kernels.

    Args:
        inputs: logits of any shape, floating.
        targets: of the same shape, values in [0, 1], floating; not differentiated.
        alpha: weight of positives in [0, 1], or -1 for no weighting.
        gamma: exponent of the modulating factor, >= 0.
        reduction: "none", "mean" (over the elements) or "sum".

    Returns:
        A tensor of the dtype that inputs and targets promote to, but float32 for 16 bits under autocast: of their shape for
        "none", 0-d for "mean" and "sum". A sum or mean is computed in float32 or float64 and rounded once, to that dtype: in
        float16, without autocast, one above 65504 is infinite, as torchvision's is.

    Raises:
        ValueError: alpha or reduction is not one of the above, with torchvision's words.
        TypeError: targets are not floating.
    """
    inputs, targets = arguments.as_plain("inputs", inputs), arguments.as_plain("targets", targets)
    alpha = arguments.as_number("alpha", alpha)
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: 'none', 'mean', 'sum'"
        )
    arguments.check_floating("inputs", inputs)
    if not targets.is_floating_point():
        raise TypeError(f"targets: expected floating numbers in [0, 1], got {targets.dtype}")
    if targets.shape != inputs.shape:
        raise ValueError(f"Target size ({targets.size()}) must be the same as input size ({inputs.size()})")
    dtype = entropy_dtype(inputs, targets)
    # 16-bit logits are read as they are where float32 sums come of them; elementwise losses have the dtype of what is read.
    if reduction == "none" or dtype == torch.float64:
        inputs = inputs.to(dtype)
    logits, soft = inputs, targets
    if inputs.dim() != 4:  # 4-D is read in place, channels_last too
        logits, soft = inputs.reshape(-1, 1), targets.reshape(-1, 1)
    loss = focal_loss(  # type: ignore[call-overload]
        logits,
        soft,
        num_classes=1,
        alpha=alpha,
        gamma=gamma,
        normalizer=None,
        reduction=reduction,
    )
    assert isinstance(loss, Tensor)
    if reduction == "none":
        return loss.view(inputs.shape)
    if reduction == "mean" and inputs.numel() == 0:
        loss = loss * float("nan")
    return loss.to(dtype)


def entropy_dtype(inputs: Tensor, targets: Tensor) -> torch.dtype:
    """The dtype of a focal loss built on torch's binary_cross_entropy_with_logits.

    It is what inputs and targets promote to, but float32 for 16 bits under autocast, which computes that function in float32.
    """
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    device = inputs.device.type
    if dtype.itemsize == 2 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.float32
    return dtype
