"""The last layer and the focal loss as functions."""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fastfocal.checks import Levels
from fastfocal.heads.head import Head, conv, parameters_of
from fastfocal.heads.layers import Linear
from fastfocal.heads.loss import head_loss
from fastfocal.losses.focal import FocalLoss, FocalLossParameters
from fastfocal.losses.focal_star import FocalLossStar, FocalLossStarParameters
from fastfocal.losses.loss import Loss
from fastfocal.options import KeptOptions, Reduced, with_signature
from fastfocal.pyramid import sort_keywords


class OfHead(KeptOptions, total=False):
    """The keywords that do not depend on the loss, beside `reduction` and those of the layer."""

    anchor_weight: Levels | None
    class_mask: Tensor | None


class FocalLossOfHead(FocalLossParameters, OfHead, total=False):
    """Those of focal loss."""


class FocalLossStarOfHead(FocalLossStarParameters, OfHead, total=False):
    """Those of focal loss star."""


IntOrTwo = int | tuple[int, int]


@with_signature(FocalLoss, FocalLossOfHead)
def conv_focal_loss(
    features: Levels,
    weight: Levels,
    bias: Levels | None,
    targets: Levels,
    *,
    num_classes: int,
    stride: IntOrTwo = 1,
    padding: IntOrTwo | str = 0,
    dilation: IntOrTwo = 1,
    groups: int = 1,
    chunk_bytes: int | str = "auto",
    reduction: Reduced = "sum",
    **options: Unpack[FocalLossOfHead],
) -> Tensor:
    """The focal loss of a convolution's outputs, which are made in tiles and never there as a whole; with all gradients.

    The same number as `focal_loss([conv2d(x, weight, bias, ...) for x in features], targets, ...)`, and the same gradients
    of features, weight and bias. Each tile of the logits is made, its loss and gradient computed over its own memory, the
    convolution's backward run, and what comes of it added up: the work is the same, the memory that of a tile. Worth it from
    some hundred classes on (docs/many_classes.md).

    Args:
        features: ``(N, C, H, W)`` a level; a tensor, or a sequence with one per level.
        weight: ``(A*K, C / groups, kH, kW)`` with output channel ``a*K + k``; one for all levels, or a sequence with one for
            each.
        bias: ``(A*K,)``, likewise, or None.
        targets: as :func:`fastfocal.focal_loss` takes them beside the logits ``(N, A*K, H', W')``.
        num_classes: K.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d` takes them; `padding` also "same" and "valid".
        chunk_bytes: how many bytes of the logits may be there at a time (one channel of an image always is); "auto": what was
            measured to be fast.
        reduction: "sum", "level", "image" or "mean", as there. With "level" and "image", where each loss may get another
            gradient, and with `grad_mode="recompute"`, backward makes the logits a second time.
        anchor_weight: what `weight` is there: a weight for each anchor.
        grad_mode: "auto", "save" and "inplace" are one: the gradients of features, weight and bias are made in forward.
            "recompute": in backward.
        Others: as there.

    Returns:
        float32 (float64 for float64 features). Gradients have the dtypes of what they belong to; they are added up in float32
        for 16-bit ones. Under autocast the convolution computes in its dtype.

    Raises:
        ValueError, TypeError: bad arguments, before anything is computed; the message names the argument and the level.
        RuntimeError: under torch.func; for a second derivative.
    """
    layer = conv("", weight_size(weight, padding), stride, padding, dilation, groups)
    head = Head(layer, parameters_of("weight", weight), biases_of(bias), chunk_bytes)
    return call(FocalLoss, head, features, targets, num_classes, reduction, options)


@with_signature(FocalLossStar, FocalLossStarOfHead)
def conv_focal_loss_star(
    features: Levels,
    weight: Levels,
    bias: Levels | None,
    targets: Levels,
    *,
    num_classes: int,
    stride: IntOrTwo = 1,
    padding: IntOrTwo | str = 0,
    dilation: IntOrTwo = 1,
    groups: int = 1,
    chunk_bytes: int | str = "auto",
    reduction: Reduced = "sum",
    **options: Unpack[FocalLossStarOfHead],
) -> Tensor:
    """The focal loss star of a convolution's outputs: as :func:`conv_focal_loss`, with the options of `focal_loss_star`."""
    layer = conv("", weight_size(weight, padding), stride, padding, dilation, groups)
    head = Head(layer, parameters_of("weight", weight), biases_of(bias), chunk_bytes)
    return call(FocalLossStar, head, features, targets, num_classes, reduction, options)


@with_signature(FocalLoss, FocalLossOfHead)
def linear_focal_loss(
    features: Levels,
    weight: Levels,
    bias: Levels | None,
    targets: Levels,
    *,
    num_classes: int | None = None,
    chunk_bytes: int | str = "auto",
    reduction: Reduced = "sum",
    **options: Unpack[FocalLossOfHead],
) -> Tensor:
    """The focal loss of a linear layer's outputs, which are made in tiles and never there as a whole; with all gradients.

    As :func:`conv_focal_loss`: the number of `focal_loss([linear(x, weight, bias) for x in features], targets, ...)`.

    Args:
        features: ``(N, M, C)`` or ``(M, C)`` a level; a tensor, or a sequence with one per level; a tensor ``(L, N, M, C)`` is
            L levels, as a DETR's decoder hands on the queries of all its layers.
        weight: ``(K, C)``; one for all levels, or a sequence with one for each.
        bias: ``(K,)``, likewise, or None.
        targets: as :func:`fastfocal.focal_loss` takes them beside the logits ``(N, M, K)`` or ``(M, K)``.
        num_classes: K; None: as many as the weight has rows.
        Others: as :func:`conv_focal_loss`.
    """
    head = Head(Linear(), parameters_of("weight", weight), biases_of(bias), chunk_bytes)
    return call(FocalLoss, head, features, targets, num_classes, reduction, options)


@with_signature(FocalLossStar, FocalLossStarOfHead)
def linear_focal_loss_star(
    features: Levels,
    weight: Levels,
    bias: Levels | None,
    targets: Levels,
    *,
    num_classes: int | None = None,
    chunk_bytes: int | str = "auto",
    reduction: Reduced = "sum",
    **options: Unpack[FocalLossStarOfHead],
) -> Tensor:
    """The focal loss star of a linear layer's outputs: as :func:`linear_focal_loss`, with the options of `focal_loss_star`."""
    head = Head(Linear(), parameters_of("weight", weight), biases_of(bias), chunk_bytes)
    return call(FocalLossStar, head, features, targets, num_classes, reduction, options)


def call(
    parameters: type[Loss],
    head: Head,
    features: Levels,
    targets: Levels,
    num_classes: int | None,
    reduction: str,
    options: Any,
) -> Tensor:
    keywords = dict(options)
    if "anchor_weight" in keywords:
        keywords["weight"] = keywords.pop("anchor_weight")
    loss, known, inputs = sort_keywords(
        parameters, features, targets, reduction, {**keywords, "num_classes": num_classes}
    )
    inputs.name_of_weight = "anchor_weight"
    return head_loss(loss, known, inputs, head)


def biases_of(bias: Levels | None) -> list[Tensor]:
    return [] if bias is None else parameters_of("bias", bias)


def weight_size(weight: Levels, padding: object) -> tuple[int, ...]:
    """(kH, kW), where the weight is one; what else is wrong with it is said later."""
    weights = parameters_of("weight", weight)
    if any(t.dim() != 4 for t in weights[:1]) or not weights:
        return 1, 1
    size = tuple(weights[0].shape[2:])
    for i, t in enumerate(weights):
        if padding == "same" and tuple(t.shape[2:]) != size:
            raise ValueError(
                f'weight[{i}]: expected a kernel of {size} as level 0 has, with padding "same"; got shape {tuple(t.shape)}'
            )
    return size
