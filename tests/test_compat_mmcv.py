"""fastfocal.compat.mmcv against the formulas in mmcv's kernels; mmcv's own need CUDA and were not run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from precision import Precision, check, every_precision
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


@pytest.mark.parametrize("weighted", [False, True])
def test_two_labels_are_background(weighted: bool) -> None:
    x, _, weight = problem()
    one, other = (
        mmcv.sigmoid_focal_loss(x, torch.full((ROWS,), label), weight=weight if weighted else None)
        for label in (-1, CLASSES)
    )
    assert torch.equal(one, other) and one > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", [CLASSES + 1, -2, 100])
def test_a_label_that_is_neither_class_nor_background(label: int, weighted: bool) -> None:
    x, t, weight = problem()
    t[3] = label
    with pytest.raises(ValueError, match=rf"label {label} at \[3\] .*; expected one of the classes 0\.\.{CLASSES - 1}"):
        mmcv.sigmoid_focal_loss(x, t, weight=weight if weighted else None)


@pytest.mark.parametrize("label", [CLASSES, CLASSES + 1, 100])
def test_a_label_that_is_no_class_of_the_softmax(label: int) -> None:
    x, t, weight = problem()
    t = t - 1
    t[3] = label
    for given in (None, weight):
        with pytest.raises(
            ValueError, match=rf"target: row 3 has label {label}; expected one of the classes 0\.\.{CLASSES - 1} "
        ):
            mmcv.softmax_focal_loss(x, t, weight=given)


@pytest.mark.parametrize("function", [mmcv.sigmoid_focal_loss, mmcv.softmax_focal_loss])
def test_no_rows(function: Callable[..., Tensor]) -> None:
    """The mean of nothing is no number, as mmcv's division by 0."""
    x, t = torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.int64)
    assert function(x, t).isnan() and function(x, t, reduction="sum") == 0
    assert function(x, t, reduction="none").numel() == 0


@pytest.mark.parametrize("reduction", mmcv.REDUCTIONS)
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@every_precision
def test_precision(precision: Precision, kind: str, reduction: str) -> None:
    """That of the logits, but float32 for a sum under autocast, as torch sums on CUDA."""
    generator = torch.Generator().manual_seed(1)
    rows = 20000
    x = 4 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64) + (2 if kind == "sigmoid" else 0)
    t = torch.randint(CLASSES, (rows,), generator=generator)
    documented, function = {
        "sigmoid": (documented_sigmoid, mmcv.sigmoid_focal_loss),
        "softmax": (documented_softmax, mmcv.softmax_focal_loss),
    }[kind]
    reduce = {"none": lambda loss: loss, "mean": lambda loss: loss.sum() / rows, "sum": Tensor.sum}[reduction]
    dtype = precision.logits if precision.autocast is None or reduction == "none" else torch.float32
    alpha = 0.3 if kind == "sigmoid" else 1.0
    loss = check(
        lambda x: function(x, t, 2.0, alpha, None, reduction),
        dtype,
        lambda x: reduce(documented(x, t, 2.0, alpha, None)),
        x,
        precision,
    )
    if reduction == "sum":
        assert loss.isinf() == (loss.dtype == torch.float16) and loss > 65504


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
    with pytest.raises(ValueError, match=r"weight: expected shape \(6,\), one per class, got \(5,\)"):
        function(x, t, weight=weight[:5])  # type: ignore[operator]
