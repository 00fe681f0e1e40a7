"""fastfocal.sigmoid_focal_loss: torchvision's signature, results and errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, Backend, assert_close, half_ulp, tolerance
from oracle import element_gradient, element_loss
from precision import Precision, check, every_precision
from torch import Tensor

from fastfocal import reference, sigmoid, sigmoid_focal_loss

SHAPES = [(), (1,), (7,), (3, 5), (2, 4, 5), (2, 3, 5, 7), (2, 1, 3, 2, 2), (0,), (3, 0, 2), (1031,)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits up to 6, where torchvision's own float64 result keeps twelve digits; hard and soft targets mixed."""
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-6, 6)
    y = torch.rand(shape, generator=generator, dtype=torch.float64)
    y = torch.where(y < 0.4, torch.zeros_like(y), torch.where(y > 0.6, torch.ones_like(y), y))
    return x.to(dtype), y.to(dtype)


# --- against the oracle, always ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend: Backend, shape: tuple[int, ...], reduction: str) -> None:
    x, y = draw(shape)
    for alpha, gamma in ((0.25, 2), (-1, 0), (0.7, 1.5), (0.0, 2.0), (1, 0.5)):
        x = x.detach().to(backend.device).requires_grad_()
        loss = sigmoid_focal_loss(x, y.to(backend.device), alpha, gamma, reduction)
        options: dict[str, Any] = {"alpha": None if alpha < 0 else alpha, "gamma": gamma}
        numbers, targets = x.detach().cpu().numpy(), y.numpy()
        want = element_loss(numbers, targets, **options)
        gradient, magnitude = element_gradient(numbers, targets, **options)
        share = 1.0
        if reduction != "none":
            share = 1.0 if reduction == "sum" or not want.size else 1 / want.size
            want = want.sum() * share if want.size or reduction == "sum" else float("nan")  # as torch's mean of nothing
        assert_close(loss, want, 1e-12, what="loss")
        (got,) = torch.autograd.grad(loss.sum(), x)
        assert_close(got, gradient * share, 1e-12, magnitude=magnitude * share, what="gradient")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: Backend, dtype: torch.dtype, reduction: str) -> None:
    """The result has the inputs' dtype, reduced or not, and so has the gradient."""
    x, y = (value.to(backend.device) for value in draw((3, 37), dtype))
    x.requires_grad_()
    loss = sigmoid_focal_loss(x, y, reduction=reduction)
    assert loss.dtype == dtype and loss.shape == (x.shape if reduction == "none" else ())
    want = element_loss(x.detach().double().cpu().numpy(), y.double().cpu().numpy())
    want = {"none": want, "sum": want.sum(), "mean": want.mean()}[reduction]
    assert_close(loss, want, tolerance(dtype, 2.0))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str
)
@pytest.mark.parametrize("size", [0, 7])
def test_dtypes_promote(size: int, dtypes: tuple[torch.dtype, torch.dtype], reduction: str) -> None:
    x, y = torch.randn(size).to(dtypes[0]).requires_grad_(), torch.rand(size).to(dtypes[1])
    loss = sigmoid_focal_loss(x, y, reduction=reduction)
    assert loss.dtype == torch.promote_types(*dtypes)
    expected = reference.sigmoid_focal_loss(x.double(), y.double(), reduction=reduction)
    torch.testing.assert_close(
        loss.double(), expected, rtol=1e-5 if loss.dtype != torch.float16 else 2e-3, atol=1e-7, equal_nan=True
    )
    loss.sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype


def large(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits whose losses sum up to more than float16 has."""
    generator = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, (torch.rand(shape, generator=generator) < 0.1).double()


def of_targets(
    function: Callable[..., Tensor], targets: Tensor, reduction: str, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """A function of the logits, with targets of their dtype or of `dtype`."""
    return lambda x: function(x, targets.to(dtype or x.dtype), reduction=reduction)


PRECISION_SHAPES = [(300, 400), (2, 3, 110, 200)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", PRECISION_SHAPES, ids=str)
@every_precision
def test_precision(precision: Precision, shape: tuple[int, ...], reduction: str) -> None:
    """Under autocast it is float32, as torch's cross entropy is there."""
    x, y = large(shape)
    dtype = precision.logits if precision.autocast is None else torch.float32
    exact = of_targets(reference.sigmoid_focal_loss, y, reduction)
    loss = check(of_targets(sigmoid_focal_loss, y, reduction), dtype, exact, x, precision)
    if reduction == "sum":
        assert loss.isinf() == (loss.dtype == torch.float16) and (loss > 65504).all()


def test_reduced_losses_do_not_copy_16_bit_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither under autocast nor for float32 targets: the kernels read them as they are."""
    seen = []
    original = sigmoid.focal_loss
    monkeypatch.setattr(
        sigmoid, "focal_loss", lambda x, *rest, **options: (seen.append(x), original(x, *rest, **options))[1]
    )
    x, y = large((3, 2, 8, 9))
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            for reduction in ("mean", "sum"):
                assert sigmoid_focal_loss(x, y.to(dtype), reduction=reduction).dtype == torch.float32
    assert len(seen) == 4 and all(t.data_ptr() == x.data_ptr() for t in seen)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiled_under_autocast(reduction: str, autocast: bool) -> None:
    """The dtype is decided without a break of the graph, and anew where autocast begins or ends."""
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_focal_loss, backend="eager", fullgraph=True)
    x, y = (t.bfloat16() for t in large((5, 7)))
    for enabled in (autocast, not autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = compiled(x, y, reduction=reduction)
            want = sigmoid_focal_loss(x, y, reduction=reduction)
        assert got.dtype == (torch.float32 if enabled else torch.bfloat16) and torch.equal(got, want)
    torch._dynamo.reset()


def test_any_strides(backend: Backend) -> None:
    x, y = (value.to(backend.device) for value in draw((4, 6, 5)))
    want = sigmoid_focal_loss(x, y)
    for view in (lambda t: t.transpose(0, 2), lambda t: t[:, ::2], lambda t: t[1:, :, 1:].permute(2, 0, 1)):
        got = sigmoid_focal_loss(view(x), view(y))
        torch.testing.assert_close(got, view(want), rtol=1e-13, atol=0)
    got = sigmoid_focal_loss(x.transpose(0, 1), y.transpose(0, 1).contiguous())
    torch.testing.assert_close(got, want.transpose(0, 1), rtol=1e-13, atol=0)


def test_signature() -> None:
    parameters = inspect.signature(sigmoid_focal_loss).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {"inputs": empty, "targets": empty, "alpha": 0.25, "gamma": 2, "reduction": "none"}


@pytest.mark.parametrize("alpha", [1.5, -0.5, -2, float("nan")])
def test_alpha_that_is_neither_a_share_nor_minus_one(alpha: float) -> None:
    """Here -1 alone switches alpha off, unlike in focal_loss, because torchvision says so."""
    x, y = draw((3,))
    with pytest.raises(ValueError, match=rf"Invalid alpha value: {alpha}\."):
        sigmoid_focal_loss(x, y, alpha=alpha)


def test_unknown_reduction() -> None:
    x, y = draw((3,))
    with pytest.raises(ValueError, match="Invalid Value for arg 'reduction': 'median"):
        sigmoid_focal_loss(x, y, reduction="median")


def test_shapes_that_differ() -> None:
    x, y = draw((3, 4))
    with pytest.raises(ValueError, match=r"Target size .*\[3\].* must be the same as input size .*\[3, 4\]"):
        sigmoid_focal_loss(x, y[:, 0])


# --- against torchvision itself ---------------------------------------------------------------------------------------


@pytest.fixture
def torchvision_loss() -> Any:
    pytest.importorskip("torchvision", exc_type=Exception)  # it does not load beside a CPU build of torch
    return pytest.importorskip("torchvision.ops").sigmoid_focal_loss


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_results_as_torchvision(torchvision_loss: Any, shape: tuple[int, ...], reduction: str) -> None:
    x, y = draw(shape, seed=1)
    for alpha, gamma in ((0.25, 2), (-1, 0), (0.7, 1.5), (0.0, 2.0), (1, 3.3)):
        results = []
        for function in (torchvision_loss, sigmoid_focal_loss):
            leaf = x.clone().requires_grad_()
            loss = function(leaf, y, alpha=alpha, gamma=gamma, reduction=reduction)
            results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
        # float64, |x| <= 6: subtracting p from 1 leaves torchvision 1e-16 / 2.5e-3, times gamma + 1.
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_dtypes_and_shapes_as_torchvision(torchvision_loss: Any, dtype: torch.dtype, reduction: str) -> None:
    x, y = draw((5, 3), dtype)
    theirs, ours = (function(x, y, reduction=reduction) for function in (torchvision_loss, sigmoid_focal_loss))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    # Theirs rounds after each of a dozen operations.
    close = 32 * half_ulp(theirs.double().numpy(), dtype) if dtype in (torch.float16, torch.bfloat16) else 1e-5
    assert (abs((ours - theirs).double().numpy()) <= close).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("targets", ["alike", "float32", "float16"])
@every_precision
def test_same_precision_as_torchvision(
    torchvision_loss: Any, precision: Precision, targets: str, reduction: str
) -> None:
    """A large sum, and a gradient scaled as a GradScaler scales it, under autocast and without."""
    x, y = large((300, 400))
    dtype = None if targets == "alike" else getattr(torch, targets)
    ours, theirs = (of_targets(function, y, reduction, dtype) for function in (sigmoid_focal_loss, torchvision_loss))
    # Exact in float64 within 4e-10: 1 - p_t of logits up to 13 has lost six digits.
    exact = of_targets(reference.sigmoid_focal_loss, y, reduction)
    check(ours, theirs, exact, x, precision)


@pytest.mark.parametrize(
    "change",
    [{"alpha": 1.5}, {"alpha": -0.5}, {"alpha": float("nan")}, {"reduction": "median"}, {"targets": torch.zeros(2)}],
    ids=str,
)
def test_same_errors_as_torchvision(torchvision_loss: Any, change: dict[str, Any]) -> None:
    x, y = draw((3, 4))
    caught = []
    for function in (torchvision_loss, sigmoid_focal_loss):
        with pytest.raises(Exception) as error:
            function(**{"inputs": x, "targets": y, **change})
        caught.append((type(error.value), str(error.value)))
    assert caught[0] == caught[1]
