"""mmcv.ops.sigmoid_focal_loss and softmax_focal_loss on any device and in any dtype.

    from fastfocal.compat.mmcv import sigmoid_focal_loss, softmax_focal_loss

Equivalent to mmcv's functions (a8073c7), which need CUDA: "mean" divides by the rows; for the sigmoid the labels K and -1 are
background, for the softmax a negative one costs nothing. Three things differ, on purpose: mmcv reads `weight[K]`, which is not
there, for background (here: 1), loses logits of 17 and more to `log(1 - p)`, and takes other labels for background (sigmoid) or
reads beyond its memory (softmax), where they are an error here. Written from mmcv's kernels; mmcv itself was not run.

Losses have the logits' dtype, but a sum or mean is float32 under autocast: so torch sums 16 bits on CUDA, and mmcv's functions
run there alone. Sums are computed in float32 or float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastfocal
from fastfocal.compat.conventions import check_rows
from fastfocal.labels import NOTHING_IGNORED
from fastfocal.ops import accumulation_dtype
from fastfocal.sigmoid import entropy_dtype

REDUCTIONS = ("none", "mean", "sum")


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid focal loss, by fastfocal's kernels.

    Args:
        input: logits (n, K).
        target: labels (n,), 0..K-1; K and -1 are background.
        gamma, alpha: as in the paper.
        weight: (K,), a factor for each row by its label; 1 for background.
        reduction: "none", (n, K); "mean", over the rows; "sum".

    Raises:
        ValueError: another reduction, a weight of another shape, or a label that is neither class nor background (on CUDA: a
            device-side assertion).
    """
    _check(input, weight, reduction)
    classes = input.shape[1]
    labels = torch.where(target == -1, classes, target)
    rows = None
    if weight is not None:
        weight = weight.to(accumulation_dtype(input.dtype))
        # Labels out of range find a weight here, and their error in the kernel.
        rows = torch.cat([weight, weight.new_ones(1)])[labels.clamp(0, classes)]
    loss = fastfocal.focal_loss(
        input,
        labels,
        alpha=alpha,
        gamma=gamma,
        ignore_index=NOTHING_IGNORED,
        weight=rows,
        normalizer=float(len(input)) if reduction == "mean" and len(input) else None,
        reduction="none" if reduction == "none" else "sum",
    )
    assert isinstance(loss, Tensor)
    if reduction == "mean" and len(input) == 0:
        loss = loss * float("nan")  # the mean of nothing
    return loss.to(_dtype(input, reduction))


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax focal loss, `-alpha (1 - p)^gamma log(p)` of each row's label, by fastfocal's kernels.

    As in mmcv, alpha is a factor of every row, background too, not a weight of classes. Where the probability of the
    label is below 1.2e-38, mmcv clamps it, and so gives 87 at most for `-log(p)`.

    Args:
        input: logits (n, K).
        target: labels (n,), 0..K-1; a negative one costs nothing.
        gamma, alpha: exponent and factor.
        weight: (K,), a factor for each row by its label.
        reduction: "none", (n,); "mean", over the rows; "sum".

    Raises:
        ValueError: another reduction, a weight of another shape, or a label of K and more (on CUDA: a device-side assertion).
    """
    _check(input, weight, reduction)
    check_rows("target", target, input.shape[1])
    loss = fastfocal.softmax_focal_loss(
        input,
        target.clamp(min=-1),
        gamma=gamma,
        ignore_index=-1,
        class_weight=weight,
        normalizer=float(len(input)) if reduction == "mean" and len(input) else None,
        reduction="none" if reduction == "none" else "sum",
        loss_weight=alpha,
    )
    assert isinstance(loss, Tensor)
    if reduction == "mean" and len(input) == 0:
        loss = loss * float("nan")  # the mean of nothing
    return loss.to(_dtype(input, reduction))


def _dtype(input: Tensor, reduction: str) -> torch.dtype:
    """That of mmcv's losses."""
    return input.dtype if reduction == "none" else entropy_dtype(input, input)


def _check(input: Tensor, weight: Tensor | None, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if weight is not None and tuple(weight.shape) != (input.shape[1],):
        raise ValueError(f"weight: expected shape ({input.shape[1]},), one per class, got {tuple(weight.shape)}")
