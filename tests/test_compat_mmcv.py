"""fastfocal.compat.mmcv against the formulas in mmcv's kernels; mmcv's own need CUDA and were not run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfocal.compat import mmcv

ROWS, CLASSES = 40, 6


def documented_sigmoid(x: Tensor, t: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    """sigmoid_focal_loss_cuda_kernel.cuh: term_p where the label is the class, term_n elsewhere, times weight[label]."""
    p = x.sigmoid()
    positive = t.unsqueeze(1) == torch.arange(CLASSES)
    term_p, term_n = (1 - p) ** gamma * p.log(), p**gamma * (1 - p).log()
    loss = torch.where(positive, -alpha * term_p, -(1 - alpha) * term_n)
    return loss if weight is None else loss * torch.cat([weight, weight.new_ones(1)])[t].unsqueeze(1)


def documented_softmax(x: Tensor, t: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    """softmax_focal_loss_cuda_kernel.cuh; a negative label costs nothing."""
    p = torch.softmax(x, 1)[torch.arange(len(t)), t.clamp(min=0)]
    loss = -alpha * (1 - p) ** gamma * p.log()
    loss = loss if weight is None else loss * weight[t.clamp(min=0)]
    return loss * (t >= 0)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64).requires_grad_()
    return (
        x,
        torch.randint(CLASSES + 1, (ROWS,), generator=generator),
        torch.rand(CLASSES, generator=generator).double(),
    )


@pytest.mark.parametrize("reduction", mmcv.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_documented_formula(kind: str, weighted: bool, reduction: str) -> None:
    x, t, weight = problem()
    if kind == "softmax":
        t = t - 1
    given = weight if weighted else None
    documented, function = {
        "sigmoid": (documented_sigmoid, mmcv.sigmoid_focal_loss),
        "softmax": (documented_softmax, mmcv.softmax_focal_loss),
    }[kind]
    ours = function(x, t, 1.5, 0.3, given, reduction)
    theirs = documented(x, t, 1.5, 0.3, given)
    theirs = {"none": theirs, "mean": theirs.sum() / ROWS, "sum": theirs.sum()}[reduction]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (mine,), (expected,) = (torch.autograd.grad(loss.sum(), x) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-15)


def test_labels_that_are_no_class_are_background() -> None:
    x, _, _ = problem()
    one = mmcv.sigmoid_focal_loss(x, torch.full((ROWS,), -1))
    assert torch.equal(one, mmcv.sigmoid_focal_loss(x, torch.full((ROWS,), CLASSES)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_softmax_that_is_certain_has_a_gradient(gamma: float) -> None:
    x = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    mmcv.softmax_focal_loss(x, torch.tensor([0]), gamma=gamma).backward()
    assert x.grad is not None and not x.grad.any()


def test_large_logits_in_float16() -> None:
    """mmcv gives infinity or NaN from about 8 on."""
    x = torch.tensor([[40.0, -40.0]], dtype=torch.float16).requires_grad_()
    loss = mmcv.sigmoid_focal_loss(x, torch.tensor([2]), reduction="sum")
    assert loss.dtype == torch.float16 and float(loss.detach()) == pytest.approx(0.75 * 40, rel=1e-3)
    loss.backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("function", [mmcv.sigmoid_focal_loss, mmcv.softmax_focal_loss])
def test_errors(function: object) -> None:
    x, t, weight = problem()
    with pytest.raises(ValueError, match="reduction: expected one of 'none', 'mean', 'sum', got 'average'"):
        function(x, t, reduction="average")  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"weight: expected shape \(6,\), one a class, got \(5,\)"):
        function(x, t, weight=weight[:5])  # type: ignore[operator]
