"""What a host's loss is in 16 bits, under autocast and without, and how ours is held to it.

The host decides the dtype of the loss. Its value and gradient come from float64 at the same logits, rounded as few times as
there are roundings: a host that computes in 16 bits is off by hundreds of those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import half_ulp, tolerance
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


class Precision(NamedTuple):
    """The dtype that autocast runs in, None for none, and that of the logits."""

    autocast: torch.dtype | None
    logits: torch.dtype

    def context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)

    def __str__(self) -> str:
        name = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
        return name[self.logits] if self.autocast is None else f"{name[self.logits]} in autocast {name[self.autocast]}"


PRECISIONS = [
    Precision(None, torch.float16),
    Precision(None, torch.bfloat16),
    Precision(None, torch.float32),
    Precision(torch.float16, torch.float16),
    Precision(torch.float16, torch.float32),
    Precision(torch.bfloat16, torch.bfloat16),
    Precision(torch.bfloat16, torch.float32),
]


def large_logits(*shape: int, generator: torch.Generator) -> Tensor:
    """float64; half of them around 0, half around 60: a few thousand negatives add up to more than float16 has."""
    high = torch.rand(shape, generator=generator) < 0.5
    return 4 * torch.randn(shape, generator=generator, dtype=torch.float64) + 60 * high


every_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=str)


def loss_and_gradient(function: Loss, logits: Tensor, precision: Precision, scale: float) -> tuple[Tensor, Tensor]:
    """The scale is the incoming gradient, as a GradScaler's."""
    leaf = logits.detach().requires_grad_()
    with precision.context():
        loss = function(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))
    return loss.detach(), gradient


def check(
    ours: Loss,
    expected: Loss | torch.dtype,
    exact: Loss,
    logits: Tensor,
    precision: Precision,
    *,
    gamma: float = 2.0,
    relative: float | None = None,
    absolute: float = 0.0,
) -> Tensor:
    """Dtype, value and gradient of `ours`; returns the loss.

    Args:
        expected: the host's function, or the dtype that it is known to have.
        exact: the same in float64.
        logits: float64; rounded to the precision's dtype for all three.
        relative: error allowed before the result is rounded; what the kernels promise if it is not given.
        absolute: the same as a share of the largest element.
    """
    logits = logits.to(precision.logits)
    if isinstance(expected, torch.dtype):
        dtype = expected
    else:
        with precision.context():
            dtype = expected(logits.detach().requires_grad_()).dtype
    # 65536, which a GradScaler starts with, is infinite in float16.
    scale = 1024.0 if dtype == torch.float16 else 65536.0
    loss, gradient = loss_and_gradient(ours, logits, precision, scale)
    true_loss, true_gradient = loss_and_gradient(exact, logits.double(), Precision(None, torch.float64), scale)
    if relative is None:
        relative = tolerance(precision.logits, gamma)
    assert loss.dtype == dtype and gradient.dtype == logits.dtype
    # The gradient is stored in the logits' dtype before the incoming one is known, and multiplied with it then; 1 and other
    # powers of 2 do not round again, but what the host divides by afterwards does.
    for got, want, roundings, what in ((loss, true_loss, 1, "loss"), (gradient, true_gradient, 2, "gradient")):
        _assert_close(got, want, relative, absolute, roundings, what)
    return loss


def _assert_close(got: Tensor, want: Tensor, relative: float, absolute: float, roundings: int, what: str) -> None:
    assert got.shape == want.shape, what
    stored = want.to(got.dtype).double()
    bound = relative * want.abs() + absolute * want.abs().max() + torch.finfo(got.dtype).tiny
    if got.dtype.itemsize == 2:
        # A rounding before the last is one of a number of another exponent.
        bound = bound + torch.from_numpy(np.asarray(half_ulp(want.numpy(), got.dtype)))
        bound = bound + (roundings - 1) * torch.finfo(got.dtype).eps / 2 * want.abs()
    error = (got.double() - want).abs()
    wrong = ~((error <= bound) | (stored.isinf() & (got.double() == stored)))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ; {got[wrong][0].item()}, expected "
        f"{want[wrong][0].item()} within {bound[wrong][0].item():.3g}"
    )
