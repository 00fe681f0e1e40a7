"""A rival on GPUs: focal loss and its gradient in one pass, as one would write it in Triton. One launch per level.

The positives are counted by PyTorch operations beforehand. The gradient that comes in is taken to be 1, which spares this
rival a pass over the gradients. Contiguous (N, A*K, H, W) and K-contiguous logits are read in place.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SMALLEST_BLOCK = 1024


@triton.jit
def _focal_loss(
    logits,
    labels,  # (N, sum of M), int64, contiguous
    gradient,
    partial,  # one sum for each program
    divisor,  # one number
    size,
    images_stride,  # logits of an image
    labels_stride,  # anchors of all levels
    first_anchor,  # of this level
    cells,  # H * W
    anchors,  # A
    classes,
    alpha,
    gamma,
    GAMMA_IS_TWO: tl.constexpr,  # noqa: N803
    NCHW: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    image = offsets // images_stride
    rest = offsets % images_stride
    if NCHW:
        plane = rest // cells
        k = plane % classes
        anchor = rest % cells * anchors + plane // classes
    else:
        k = rest % classes
        anchor = rest // classes
    label = tl.load(labels + image * labels_stride + first_anchor + anchor, mask=inside, other=-1)
    x = tl.load(logits + offsets, mask=inside, other=0.0).to(tl.float32)

    positive = label == k
    z = tl.where(positive, -x, x)
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    q = tl.where(z < 0, e * r, r)  # 1 - p_t
    p = tl.where(z < 0, r, e * r)  # p_t
    s = tl.maximum(z, 0.0) + tl.log(1.0 + e)
    factor = q * q if GAMMA_IS_TWO else tl.exp(gamma * (z - s))
    weight = tl.where(label < 0, 0.0, tl.where(positive, alpha, 1.0 - alpha)) / tl.load(divisor)
    loss = weight * factor * s
    slope = weight * factor * (gamma * p * s + q)
    tl.store(gradient + offsets, tl.where(positive, -slope, slope).to(gradient.dtype.element_ty), mask=inside)
    tl.store(partial + program, tl.sum(loss))


if os.environ.get("TRITON_INTERPRET") == "1":  # to be tried out without a GPU

    def _launch(grid: Any, *args: Any, **options: Any) -> None:
        _focal_loss[grid](*args, **options, BLOCK=_SMALLEST_BLOCK)
else:
    _tuned = triton.autotune(
        [
            triton.Config({"BLOCK": block}, num_warps=warps)
            for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
        ],
        key=["size", "NCHW"],
    )(_focal_loss)

    def _launch(grid: Any, *args: Any, **options: Any) -> None:
        _tuned[grid](*args, **options)


def _grid(size: int, meta: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(size, meta["BLOCK"]),)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, labels: Tensor, classes: int, alpha: float, gamma: float, *levels: Tensor) -> Tensor:
        divisor = ((labels >= 0) & (labels < classes)).sum().clamp(min=1).to(torch.float32)
        gradients, partials = [], []
        first_anchor = 0
        for x in levels:
            gradient = torch.empty_like(x)
            nchw = x.ndim == 4 and x.is_contiguous()
            cells = x.shape[2] * x.shape[3] if x.ndim == 4 else 1
            anchors = x.shape[1] // classes if x.ndim == 4 else x.shape[1]
            partial = x.new_zeros(triton.cdiv(x.numel(), _SMALLEST_BLOCK), dtype=torch.float32)
            _launch(
                functools.partial(_grid, x.numel()),
                *(x, labels, gradient, partial, divisor),
                *(x.numel(), x.numel() // x.shape[0], labels.shape[1], first_anchor, cells, anchors, classes),
                *(alpha, gamma),
                GAMMA_IS_TWO=gamma == 2,
                NCHW=nchw,
            )
            first_anchor += cells * anchors
            gradients.append(gradient)
            partials.append(partial)
        ctx.save_for_backward(*gradients)
        return torch.cat(partials).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *ctx.saved_tensors


def focal_loss(levels: list[Tensor], labels: Tensor, classes: int, alpha: float, gamma: float) -> Tensor:
    """Sum over all levels divided by max(1, positives); ignored is -1."""
    return _FocalLoss.apply(labels, classes, alpha, gamma, *levels)
