"""mmcv.ops.sigmoid_focal_loss and softmax_focal_loss on any device and in any dtype.

    from fastfocal.compat.mmcv import sigmoid_focal_loss, softmax_focal_loss

Equivalent to mmcv's functions (a8073c7), which need CUDA: "mean" divides by the rows; a label that is no class is background
for the sigmoid, a negative one costs nothing for the softmax. Two things differ, on purpose: mmcv reads `weight[K]`, which is
not there, for background (here: 1), and loses logits of 17 and more to `log(1 - p)`. Written from mmcv's kernels; mmcv itself
was not run.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastfocal
from fastfocal.ops import accumulation_dtype

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
        target: labels (n,), 0..K-1; anything else is background.
        gamma, alpha: as in the paper.
        weight: (K,), a factor for each row by its label; 1 for background.
        reduction: "none", (n, K); "mean", over the rows; "sum".

    Raises:
        ValueError: another reduction, or a weight of another shape.
    """
    _check(input, weight, reduction)
    classes = input.shape[1]
    labels = torch.where((target >= 0) & (target < classes), target, classes)
    rows = None
    if weight is not None:
        weight = weight.to(accumulation_dtype(input.dtype))
        rows = torch.cat([weight, weight.new_ones(1)])[labels]
    loss = fastfocal.focal_loss(
        input,
        labels,
        alpha=alpha,
        gamma=gamma,
        weight=rows,
        normalizer=float(max(1, len(input))) if reduction == "mean" else None,
        reduction="none" if reduction == "none" else "sum",
    )
    assert isinstance(loss, Tensor)
    return loss.to(input.dtype)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax focal loss, `-alpha (1 - p)^gamma log(p)` of each row's label, in plain PyTorch: no kernel here has a softmax.

    Args:
        input: logits (n, K).
        target: labels (n,), 0..K-1; a negative one costs nothing.
        gamma, alpha: exponent and factor.
        weight: (K,), a factor for each row by its label.
        reduction: "none", (n,); "mean", over the rows; "sum".

    Raises:
        ValueError: another reduction, or a weight of another shape.
    """
    _check(input, weight, reduction)
    label = target.clamp(min=0)
    log_p = torch.log_softmax(input, dim=1).gather(1, label.unsqueeze(1)).squeeze(1)
    missing = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)  # 1 - p, with a slope where gamma < 1
    loss = -alpha * missing.pow(gamma) * log_p
    if weight is not None:
        loss = loss * weight[label]
    loss = torch.where(target >= 0, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / len(input) if reduction == "mean" else loss.sum()


def _check(input: Tensor, weight: Tensor | None, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if weight is not None and tuple(weight.shape) != (input.shape[1],):
        raise ValueError(f"weight: expected shape ({input.shape[1]},), one a class, got {tuple(weight.shape)}")
