"""fastfocal.compat.apex against the formula in apex's kernel; apex itself needs a GPU and was not run."""

from __future__ import annotations

import pytest
import torch
from precision import Precision, check, every_precision
from torch import Tensor

from fastfocal.compat import apex


def documented(x: Tensor, y: Tensor, positives: Tensor, real: int, alpha: float, gamma: float, s: float) -> Tensor:
    """Element by element, as focal_loss_cuda_kernel.cu has it: base, off_a and coeff_f."""
    total = x.new_zeros(())
    classes = torch.arange(x.shape[-1])
    positive = y.unsqueeze(-1) == classes
    off_a = torch.clamp(-x, min=0) + torch.log1p(torch.exp(-x.abs()))
    base = torch.where(positive, (s - s / 2) * x, (1 - s / 2) * x)
    sigma = torch.sigmoid(x)
    factor = torch.where(positive, alpha * (1 - sigma) ** gamma, (1 - alpha) * sigma**gamma)
    counted = (y != -2).unsqueeze(-1) & (classes < real)
    return total + (factor * (base + off_a) * counted).sum() / positives


def problem(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 5, 9, classes, generator=generator, dtype=torch.float64) * 3
    return x.requires_grad_(), torch.randint(-2, 6, (2, 4, 5, 9), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("padded", [6, 8])
def test_the_documented_formula(padded: int, smoothing: float) -> None:
    x, y = problem(padded)
    positives = torch.tensor([17.0])
    ours = apex.focal_loss(x, y, positives, 6, 0.24, 2.0, smoothing)
    theirs = documented(x, y, positives[0], 6, 0.24, 2.0, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (mine,), (expected,) = (torch.autograd.grad(loss, x, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-14)
    assert (mine[..., 6:] == 0).all() and (mine[y == -2] == 0).all()
    (again,) = torch.autograd.grad(ours, x)  # apex scales its saved gradient in place: a second one is wrong there
    assert torch.equal(again, mine)


def test_all_levels_in_one_call() -> None:
    (a, y), (b, z) = problem(6), problem(6)
    positives = torch.tensor(5.0)
    together = apex.focal_loss([a, b[:, :2]], [y, z[:, :2]], positives, 6, 0.25, 1.5)
    apart = apex.focal_loss(a, y, positives, 6, 0.25, 1.5) + apex.focal_loss(
        b[:, :2], z[:, :2], positives, 6, 0.25, 1.5
    )
    torch.testing.assert_close(together, apart, rtol=1e-13, atol=0)


def test_16_bits_and_few_classes() -> None:
    x, y = problem(3)
    y = y.clamp(max=2)
    loss = apex.focal_loss(x.bfloat16(), y, torch.tensor(1.0), 3, 0.25, 2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), documented(x.bfloat16().double(), y, torch.tensor(1.0), 3, 0.25, 2.0, 0.0), rtol=1e-5, atol=0
    )


@every_precision
def test_precision(precision: Precision) -> None:
    """apex gives float32 for logits of 16 bits; so it is here under autocast and without."""
    generator = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(1, 60, 50, 9, 8, generator=generator, dtype=torch.float64) + 1
    y = torch.randint(-2, 6, (1, 60, 50, 9), generator=generator)
    positives = torch.tensor([1.0])
    loss = check(
        lambda x: apex.focal_loss(x, y, positives, 6, 0.25, 2.0),
        torch.float32,
        lambda x: documented(x, y, positives[0], 6, 0.25, 2.0, 0.0),
        x,
        precision,
    )
    assert loss > 65504


@pytest.mark.parametrize("label", [6, 7, 8, -3, 100])
def test_a_label_that_is_no_class(label: int) -> None:
    """Padded classes are none."""
    x, y = problem(8)
    y[1, 2, 3, 4] = label
    with pytest.raises(ValueError, match=rf"label {label} at \[301\] .*; expected one of the classes 0\.\.5"):
        apex.focal_loss(x, y, torch.tensor(1.0), 6, 0.25, 2.0)


def test_one_class_labelled_1() -> None:
    x, y = problem(1)
    with pytest.raises(ValueError, match=r"label 1 at \[\d+\] .*; expected one of the classes 0\.\.0"):
        apex.focal_loss(x, y.clamp(0, 1), torch.tensor(1.0), 1, 0.25, 2.0)


def test_more_real_classes_than_there_are() -> None:
    x, y = problem(6)
    with pytest.raises(ValueError, match=r"num_real_classes: expected at most 6, .* got 7"):
        apex.focal_loss(x, y, torch.tensor(1.0), 7, 0.25, 2.0)
