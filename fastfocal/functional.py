"""Focal loss as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import arguments, autograd, ops

Levels = Tensor | Sequence[Tensor]


def focal_loss(
    logits: Levels,
    targets: Levels,
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Levels | None = None,
    level_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    detach_modulating_factor: bool = False,
    normalizer: str | float | Tensor | None = "positives",
    reduction: str = "sum",
    grad_mode: str = "auto",
    loss_weight: float = 1.0,
) -> Tensor | list[Tensor]:
    r"""Sigmoid focal loss over every level of a feature pyramid, with its gradient, in one pass.

    .. math:: FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t

    Lin et al., *Focal Loss for Dense Object Detection*, 2017 (arXiv:1708.02002), equation 5. In the shapes below: N images, K
    classes, A anchors a cell, M = H*W*A anchors of a level in the order h, w, a, L levels.

    Args:
        logits: a tensor, or a sequence with one a level: ``(N, A*K, H, W)`` with channel ``a*K + k``, as a convolution gives
            it (contiguous and channels_last memory are read in place, other strides are copied once), ``(N, M, K)`` or
            ``(M, K)``. float32, float16, bfloat16 or float64; one dtype, device, K and N for all levels.
        targets: integer labels, or soft targets.
            Labels, a level: ``(N, H, W, A)`` or ``(N, M)`` (for 4-D logits; ``(N, H, W)`` too when A is 1), ``(N, M)`` (3-D)
            or ``(M,)`` (2-D); or one tensor ``(N, sum M)`` over all levels. uint8, int8, int16, int32 or int64, any strides.
            Soft targets: floating, of the logits' shapes, values in [0, 1] (not checked). ``1 - p_t = p + y - 2 p y``, as
            torchvision has it.
        num_classes: K; needed with 4-D logits and labels, else the last dimension (the channels of 4-D soft targets).
        alpha: weight of a positive, ``1 - alpha`` of a negative; None or a negative number: neither is weighted; K numbers or
            a tensor ``(K,)``: one alpha a class (copied to the logits' device in each call, if it is not there).
        gamma: focusing parameter, any finite number >= 0.
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
            save, over the logits' own memory (which is theirs no more; not for leaves that require grad); ``"auto"``: save,
            but recompute for float16, where a small gradient stored before the loss scale meets it would round to zero, and
            for reduction "none".
        loss_weight: a factor of the whole loss.

    Returns:
        float32 (float64 for float64 logits), or the logits' dtype with reduction "none". Gradients have the dtype and the
        strides of their (dense) logits. No operation here synchronises with the host.

    Raises:
        ValueError, TypeError: bad arguments, before anything is computed; the message names the argument and the level. A
            label that is neither class, background nor ignored is a ValueError on the CPU and a device-side assertion on CUDA.
    """
    formula = plain_formula(gamma, label_smoothing, detach_modulating_factor)
    classes = arguments.number_of_classes(logits, targets, num_classes)
    number, per_class = arguments.split_alpha(alpha)
    class_alpha = None if per_class is None else arguments.check_class_alpha(per_class, classes)
    options = (background_index, ignore_index, level_weights, reduction, grad_mode, loss_weight)
    return pyramid_loss(
        make_settings(formula, classes, number, *options), logits, targets, weight, normalizer, class_alpha
    )


def focal_loss_star(
    logits: Levels,
    targets: Levels,
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Levels | None = None,
    level_weights: Sequence[float] | None = None,
    normalizer: str | float | Tensor | None = "positives",
    reduction: str = "sum",
    grad_mode: str = "auto",
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
        logits, targets, num_classes, alpha, background_index, ignore_index, weight, level_weights, normalizer, reduction,
            grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them. Soft targets: ``x_t`` as above, in between.

    Returns:
        As :func:`fastfocal.focal_loss`.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`.
    """
    formula = star_formula(gamma, beta)
    classes = arguments.number_of_classes(logits, targets, num_classes)
    number, per_class = arguments.split_alpha(alpha)
    class_alpha = None if per_class is None else arguments.check_class_alpha(per_class, classes)
    options = (background_index, ignore_index, level_weights, reduction, grad_mode, loss_weight)
    return pyramid_loss(
        make_settings(formula, classes, number, *options), logits, targets, weight, normalizer, class_alpha
    )


class Formula(NamedTuple):
    """Which member of the family, and its own parameters."""

    family: int
    gamma: float
    label_smoothing: float = 0.0
    detach_modulating_factor: bool = False
    beta: float = 0.0


def plain_formula(gamma: float, label_smoothing: float, detach_modulating_factor: bool) -> Formula:
    arguments.check_formula(gamma, label_smoothing, detach_modulating_factor)
    return Formula(ops.FOCAL_LOSS, float(gamma), float(label_smoothing), detach_modulating_factor)


def star_formula(gamma: float, beta: float) -> Formula:
    arguments.check_star(gamma, beta)
    return Formula(ops.FOCAL_LOSS_STAR, float(gamma), beta=float(beta))


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
    arguments.check_num_classes(num_classes)
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
    class_alpha: Tensor | None,
) -> Tensor | list[Tensor]:
    """Everything that does not depend on the formula. The tensors as :func:`fastfocal.focal_loss` takes them.

    class_alpha: checked, in float64.
    """
    reduction = settings.reduction
    given = arguments.as_levels("targets", targets)
    soft = any([t.is_floating_point() for t in given])
    levels, classes, anchors = arguments.check_logits(logits, settings.num_classes)
    class_weights: Tensor | None = None
    if class_alpha is not None:
        if len(class_alpha) != classes:
            raise ValueError(f"alpha: expected one number a class, {classes} of them, got {len(class_alpha)}")
        per_class = class_alpha.to(levels[0].device)
        class_weights = torch.stack((per_class, 1 - per_class)).to(ops.accumulation_dtype(levels[0].dtype))
    count, number, divisor = resolve_normalizer(normalizer, reduction, levels, soft)
    scales = level_scales(settings, len(levels), number)
    mode = resolve_mode(settings.grad_mode, reduction, levels)
    dense = arguments.dense(levels)
    anchor_weight = None if weight is None else arguments.check_weight(weight, dense, classes, anchors)

    codes: Tensor | None = None
    soft_targets: list[Tensor] = []
    if soft:
        soft_targets = arguments.check_soft_targets(given, dense)
    else:
        labels = arguments.check_labels(given, isinstance(targets, Tensor), dense, classes, anchors)
        codes, counted = ops.operators.label_codes(
            labels, dense, classes, settings.background, settings.ignore_index, count, 1.0
        )
        if count != ops.COUNT_NOTHING:
            divisor = counted

    family, gamma, label_smoothing, detach_modulating_factor, beta = settings.formula
    options = autograd.Options(
        codes,
        soft_targets,
        anchor_weight,
        class_weights,
        divisor,
        scales,
        settings.positive_weight,
        settings.negative_weight,
        gamma,
        label_smoothing,
        detach_modulating_factor,
        family,
        beta,
        classes,
        OPERATOR_REDUCTIONS[reduction],
    )
    losses = autograd.focal_loss(mode, options, levels, dense)
    if reduction == "none" and not isinstance(logits, Tensor):
        return list(losses)
    return losses[0]


# "mean" is a sum over a divisor of its own.
OPERATOR_REDUCTIONS = {"sum": ops.SUM, "mean": ops.SUM, "level": ops.LEVEL, "image": ops.IMAGE, "none": ops.NONE}


def resolve_normalizer(
    normalizer: str | float | Tensor | None, reduction: str, levels: list[Tensor], soft: bool
) -> tuple[int, float, Tensor | None]:
    """What the sum is divided by: what label_codes is to count, a number, and a tensor on the logits' device."""
    if reduction == "mean":
        return ops.COUNT_LOGITS, float(max(1, sum(t.numel() for t in levels))) if soft else 1.0, None
    arguments.check_normalizer_for(normalizer, levels[0], soft)
    if isinstance(normalizer, str):
        if normalizer == "positives":
            return ops.COUNT_POSITIVES, 1.0, None
        return ops.COUNT_POSITIVES_PER_IMAGE, float(max(1, ops.images(levels[0]))), None
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach().to(levels[0].device, torch.float64, non_blocking=True)
        return ops.COUNT_NOTHING, 1.0, divisor.contiguous()
    return ops.COUNT_NOTHING, 1.0 if normalizer is None else float(normalizer), None


def level_scales(settings: Settings, levels: int, number: float) -> list[float]:
    """What each level's loss is multiplied by: its weight, the loss' weight, and over the normalizer's number."""
    weights = settings.level_weights
    if weights is None:
        return [settings.loss_weight / number] * levels
    arguments.check_number_of_level_weights(weights, levels)
    return [settings.loss_weight * weight / number for weight in weights]


def resolve_mode(grad_mode: str, reduction: str, levels: list[Tensor]) -> str:
    """What "auto" means, and whether "inplace" may be."""
    if grad_mode == "auto":
        return "recompute" if levels[0].dtype == torch.float16 or reduction == "none" else "save"
    if grad_mode == "inplace" and torch.is_grad_enabled():
        for i, t in enumerate(levels):
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
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: 'none', 'mean', 'sum'"
        )
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
    loss = focal_loss(
        logits,
        soft,
        num_classes=1,
        alpha=alpha,
        gamma=gamma,
        normalizer=float(inputs.numel()) if reduction == "mean" and inputs.numel() else None,
        reduction="none" if reduction == "none" else "sum",
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
