"""fastfocal.compat.timm against the real timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from precision import Precision, check, every_precision
from torch import Tensor, nn

pytest.importorskip("timm", exc_type=Exception)  # it needs torchvision

from timm.loss import AsymmetricLossMultiLabel

from fastfocal.compat import timm as compat

N, CLASSES = 12, 9
REDUCTIONS = ("batchmean", "sum", "mean", "none")
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "without clip": {"clip": None},
    "clip 0": {"clip": 0.0},
    "other exponents": {"gamma_neg": 2.5, "gamma_pos": 0.5, "clip": 0.1},
    "no exponents": {"gamma_neg": 0, "gamma_pos": 0},
    "detached": {"disable_torch_grad_focal_loss": True},
    "weight": {"weight": torch.linspace(0.5, 2, CLASSES)},
    "pos_weight": {"pos_weight": 3.0},
    "pos_weight of classes": {"pos_weight": torch.linspace(1, 3, CLASSES)},
    "both": {"weight": torch.linspace(0.5, 2, CLASSES), "pos_weight": torch.linspace(1, 3, CLASSES)},
}
every_form = pytest.mark.parametrize("form", FORMS)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), (torch.rand(N, CLASSES, generator=generator) < 0.3).float()


class InDouble(AsymmetricLossMultiLabel):  # type: ignore[misc]
    """timm's, without its casts to float32."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        class Kept(torch.Tensor):
            def float(self) -> Any:  # type: ignore[override]
                return self

        loss: Tensor = AsymmetricLossMultiLabel.forward(self, x.as_subclass(Kept), y.double().as_subclass(Kept))
        return loss.as_subclass(Tensor)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_form
def test_the_loss(form: str, reduction: str) -> None:
    """Against timm in float64; timm's own float32 is off by what its 1 - p and its power lose."""
    x, y = problem(torch.float64)
    exact = InDouble(reduction=reduction, **FORMS[form])(x, y)
    (slope,) = torch.autograd.grad(exact.sum(), x)
    stock = AsymmetricLossMultiLabel(reduction=reduction, **FORMS[form])(x.float(), y)
    single, _ = problem()
    ours = compat.FastAsymmetricLossMultiLabel(reduction=reduction, **FORMS[form])(single, y)
    (gradient,) = torch.autograd.grad(ours.sum(), single)
    assert ours.dtype == stock.dtype == torch.float32 and ours.shape == stock.shape
    torch.testing.assert_close(stock.double(), exact, rtol=1e-4, atol=1e-7)
    # float32: the logits rounded, and what the kernels promise; a negative near the clip has next to no loss.
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-7 * float(slope.abs().max()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_precision
def test_precision(precision: Precision, reduction: str) -> None:
    """float32, whatever the logits are."""
    x, y = problem(torch.float64)

    def of(kind: type[nn.Module]) -> Any:
        return lambda x: kind(reduction=reduction)(x, y)

    loss = check(
        of(compat.FastAsymmetricLossMultiLabel),
        of(AsymmetricLossMultiLabel),
        of(InDouble),
        x.detach(),
        precision,
        relative=5e-6,
        absolute=1e-7,
    )
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16], ids=str)
def test_the_dtype_of_targets(dtype: torch.dtype) -> None:
    x, y = problem()
    loss = compat.FastAsymmetricLossMultiLabel()
    assert torch.equal(loss(x, y.to(dtype)), loss(x, y))


def test_what_timm_clamps() -> None:
    """A positive that is next to impossible: a constant and next to no gradient there, its own loss and gradient here."""
    x = torch.tensor([[-19.0, -30.0]], requires_grad=True)
    y = torch.ones(1, 2)
    stock, ours = (
        kind(reduction="sum")(x, y) for kind in (AsymmetricLossMultiLabel, compat.FastAsymmetricLossMultiLabel)
    )
    assert torch.autograd.grad(stock, x)[0].abs().max() < 1e-6 and stock < 37
    (gradient,) = torch.autograd.grad(ours, x)
    torch.testing.assert_close(ours, torch.tensor(49.0))
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, -1.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smoothing_is_left_to_timm(reduction: str) -> None:
    x, y = problem()
    kinds = (AsymmetricLossMultiLabel, compat.FastAsymmetricLossMultiLabel)
    stock, ours = (kind(smoothing=0.1, reduction=reduction)(x, y) for kind in kinds)
    assert torch.equal(ours, stock)


def test_a_target_between() -> None:
    x, y = problem()
    y[3, 2] = 0.5
    with pytest.raises(ValueError, match="y: expected targets 0 or 1"):
        compat.FastAsymmetricLossMultiLabel()(x, y)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing(reduction: str) -> None:
    x, y = torch.zeros(0, CLASSES), torch.zeros(0, CLASSES)
    kinds = (AsymmetricLossMultiLabel, compat.FastAsymmetricLossMultiLabel)
    stock, ours = (kind(reduction=reduction)(x, y) for kind in kinds)
    torch.testing.assert_close(ours, stock, equal_nan=True)


def test_accelerate_and_restore() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asymmetric = AsymmetricLossMultiLabel(**FORMS["both"])

    criterion = Criterion()
    x, y = problem()
    stock = criterion.asymmetric(x, y)
    assert compat.accelerate(criterion) is criterion
    assert type(criterion.asymmetric) is compat.FastAsymmetricLossMultiLabel
    torch.testing.assert_close(criterion.asymmetric(x, y), stock, rtol=1e-5, atol=0)
    assert type(compat.restore(criterion).asymmetric) is AsymmetricLossMultiLabel
    assert torch.equal(criterion.asymmetric(x, y), stock)
    with pytest.raises(ValueError, match="module: expected one with timm's AsymmetricLossMultiLabel, found none"):
        compat.accelerate(nn.Linear(1, 1))
