"""Second derivatives: the formulas against the oracle, every kernel, and all the ways in which autograd asks for them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import test_formula
import torch
from cases import (
    DTYPES,
    FOUR_D,
    SIXTEEN_BIT,
    THREE_D,
    TWO_D,
    Backend,
    Size,
    arrange,
    assert_close,
    draw_classes,
    draw_levels,
    encode,
    expect,
    leaves,
    loss_function,
    move,
    same_bits,
    tolerance,
    total,
)
from oracle import (
    Expected,
    element_gradient,
    element_loss,
    element_second_derivative,
    star_gradient,
    star_second_derivative,
)
from torch import Tensor, nn

import fastfocal
from fastfocal import FastFocalLoss, focal_loss

# --- the oracle itself ------------------------------------------------------------------------------------------------

# x, y, gamma, smoothing -> second derivative at alpha 0.25, by mpmath in 60 digits.
KNOWN = [
    (28.0, 1.0, 2.0, 0.0, 7.4378264101887952348e-37),
    (-28.0, 0.0, 2.0, 0.0, 2.2313479230566385704e-36),
    (28.0, 0.0, 2.0, 0.0, -2.6447580408933686484e-11),
    (-28.0, 1.0, 3.3, 0.0, -1.4658528226623461146e-11),
    (0.0, 1.0, 2.0, 0.0, 0.099785849392498290919),
    (0.0, 0.0, 0.5, 0.0, 0.24219024270741124684),
    (1.5, 0.3, 1.5, 0.0, 0.057180597413582392857),
    (-7.25, 0.75, 5.0, 0.0, -0.00076043606096892255411),
    (12.0, 1.0, 0.5, 0.0, 8.5667173952293738679e-9),
    (2.0, 0.0, 2.0, 0.1, 0.11096143212810597895),
    (-9.0, 0.0, 3.3, 0.125, 5.4107438377047694305e-13),
    (5.0, 0.25, 1.0, 0.125, -0.0013189103429036299096),
]


@pytest.mark.parametrize("x, y, gamma, smoothing, second", KNOWN)
def test_oracle_gives_known_values(x: float, y: float, gamma: float, smoothing: float, second: float) -> None:
    got, magnitude = element_second_derivative(np.array([x]), y, gamma=gamma, label_smoothing=smoothing)
    # As for the gradient: a few roundings of 1.1e-16, times gamma * |x| = 92 in the exponent.
    assert abs(got[0] - second) <= 3e-14 * magnitude[0]


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", test_formula.GAMMAS)
@pytest.mark.parametrize("y", [0.0, 2.0**-10, 0.3, 0.5, 0.875, 1.0])
def test_oracle_is_the_derivative_of_its_gradient(y: float, gamma: float, smoothing: float, detached: bool) -> None:
    """Detached, of a gradient whose factor w^gamma stays what it is at x."""
    x = np.linspace(-28, 28, 1025).astype(np.longdouble)
    options: dict[str, Any] = {"alpha": None, "gamma": gamma, "label_smoothing": smoothing, "detached": detached}
    # As for the gradient in test_formula.py: fourth-order central differences in extended precision.
    h = np.longdouble(1e-3)

    def gradient(at: Any) -> Any:
        if not detached:
            return element_gradient(at, y, **options)[0]
        factor = element_loss(x, y, alpha=None, gamma=gamma) / element_loss(x, y, alpha=None, gamma=0.0)
        plain = {**options, "gamma": 0.0}
        return factor * element_gradient(at, y, **plain)[0]

    at = [gradient(x + i * h) for i in (-2, -1, 1, 2)]
    difference = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    second, magnitude = element_second_derivative(x, y, **options)
    scale = magnitude + element_gradient(x, y, **options)[1]
    assert np.all(np.abs(second - difference) <= 1e-8 * scale)
    assert np.all(np.abs(second) <= magnitude * (1 + 1e-15))


@pytest.mark.parametrize("y", [0.0, 0.3, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("gamma, beta", [(2.0, 1.0), (0.5, -3.0), (4.0, 0.0)])
def test_star_oracle_is_the_derivative_of_its_gradient(gamma: float, beta: float, y: float) -> None:
    x = np.linspace(-7, 7, 1025).astype(np.longdouble)
    options = {"gamma": gamma, "beta": beta}
    h = np.longdouble(1e-3)
    at = [star_gradient(x + i * h, y, **options)[0] for i in (-2, -1, 1, 2)]
    difference = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    second, _ = star_second_derivative(x, y, **options)
    assert np.all(np.abs(second - difference) <= 1e-8 * (second + star_gradient(x, y, **options)[1]))


# --- what is compared -------------------------------------------------------------------------------------------------

# What a second derivative of less than the least normal number may lose on its way: (1 - p_t)^gamma counts as 0 where it is
# less than that, and gamma^2 |x| multiplies it.
def lost(gamma: float) -> float:
    return 1 + 28 * gamma**2


class Second:
    """A loss, its gradient, and the derivative of <gradient, v> by the logits and by the incoming gradient."""

    def __init__(
        self,
        levels: Sequence[Tensor],
        targets: Any,
        v: Sequence[Tensor] | None = None,
        incoming: Any = None,
        **options: Any,
    ) -> None:
        self.inputs = leaves(levels)
        loss = loss_function(options)(self.inputs, targets, **options)
        self.losses = [loss] if isinstance(loss, Tensor) else list(loss)
        self.incoming = [
            torch.ones_like(part) if g is None else g
            for part, g in zip(self.losses, incoming or [None] * len(self.losses), strict=True)
        ]
        self.incoming = [g.detach().requires_grad_() for g in self.incoming]
        self.grads = torch.autograd.grad(self.losses, self.inputs, self.incoming, create_graph=True)
        self.v = [torch.ones_like(g) for g in self.grads] if v is None else list(v)
        found = torch.autograd.grad(self.grads, [*self.inputs, *self.incoming], self.v, retain_graph=True)
        self.by_logits, self.by_incoming = found[: len(self.inputs)], found[len(self.inputs) :]


def compare(got: Sequence[Tensor], expected: Expected, v: Sequence[Tensor], scale: Sequence[Any], gamma: float) -> None:
    """scale: the incoming gradient of each level."""
    for level, (result, want, size) in enumerate(
        zip(got, expected.seconds, expected.second_magnitudes, strict=True)
    ):
        factor = v[level].detach().cpu().double().numpy() * scale[level]
        assert_close(
            result,
            factor * want,
            tolerance(result.dtype, gamma) + 3e-7 * (result.dtype != torch.float64),  # two factors more
            magnitude=np.abs(factor) * size,
            flushed=lost(gamma) * 1e3,  # the greatest factors
            what=f"second derivative of level {level}",
        )


# --- accuracy ---------------------------------------------------------------------------------------------------------


def sweep(backend: Backend, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-28, 28, backend.sized(20001, 801), dtype=torch.float64).to(dtype).to(backend.device)


def second_of(x: Tensor, y: float | Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The gradient and the second derivative of each number's loss; y: 0 or 1 for labels, else soft targets."""
    leaf = x.detach().view(1, -1, 1).requires_grad_()
    if isinstance(y, Tensor):
        targets = y.view(1, -1, 1)
    else:
        targets = torch.full((1, x.numel()), 1 - int(y), device=x.device)
    loss = loss_function(options)(leaf, targets, normalizer=None, alpha=None, **options)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad, leaf, torch.ones_like(grad))
    return grad.detach().view(-1), second.view(-1)


def assert_accurate(backend: Backend, dtype: torch.dtype, gamma: float, y: float | str, **options: Any) -> None:
    x = sweep(backend, dtype)
    given: float | Tensor = 0.0
    if isinstance(y, str):
        at = np.random.default_rng(5).random(x.numel()) if y == "random" else np.full(x.numel(), float(y))
        given = torch.from_numpy(at).to(dtype).to(backend.device)
    else:
        given = y
    grad, second = second_of(x, given, gamma=gamma, **options)
    numbers = x.double().cpu().numpy()
    target = given.double().cpu().numpy() if isinstance(given, Tensor) else given
    if "beta" in options:
        of_gradient = star_gradient(numbers, target, alpha=None, gamma=gamma, beta=options["beta"])
        of_second = star_second_derivative(numbers, target, alpha=None, gamma=gamma, beta=options["beta"])
    else:
        known = {
            "alpha": None,
            "gamma": gamma,
            "label_smoothing": options.get("label_smoothing", 0.0),
            "detached": options.get("detach_modulating_factor", False),
        }
        of_gradient, of_second = (
            element_gradient(numbers, target, **known),
            element_second_derivative(numbers, target, **known),
        )
    relative = tolerance(dtype, gamma, options=False)
    assert_close(grad, of_gradient[0], relative, magnitude=of_gradient[1], flushed=lost(gamma), what="gradient")
    assert_close(second, of_second[0], relative, magnitude=of_second[1], flushed=lost(gamma), what="second derivative")


ACCURATE = (torch.float32, torch.float64)
SOFT = ("0", "1e-30", "0.0009765625", "0.3", "0.5", "0.875", "1", "random")


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("gamma", (*test_formula.GAMMAS, 10.0))
@pytest.mark.parametrize("dtype", ACCURATE, ids=str)
def test_accuracy_of_labels(backend: Backend, dtype: torch.dtype, gamma: float, detached: bool) -> None:
    for y in (0.0, 1.0):
        assert_accurate(backend, dtype, gamma, y, detach_modulating_factor=detached)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("gamma", (*test_formula.GAMMAS, 10.0))
@pytest.mark.parametrize("dtype", ACCURATE, ids=str)
def test_accuracy_of_soft_targets(backend: Backend, dtype: torch.dtype, gamma: float, detached: bool) -> None:
    """Near 0 and 1 too, where (1 - p_t)^gamma vanishes, and at 1/2, where all terms but one do."""
    for y in SOFT:
        assert_accurate(backend, dtype, gamma, y, detach_modulating_factor=detached)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("gamma", (*test_formula.GAMMAS, 10.0))
@pytest.mark.parametrize("dtype", ACCURATE, ids=str)
def test_accuracy_with_label_smoothing(backend: Backend, dtype: torch.dtype, gamma: float, smoothing: float) -> None:
    for y in (0.0, 1.0, "random", "0", "1"):
        assert_accurate(backend, dtype, gamma, y, label_smoothing=smoothing)


@pytest.mark.parametrize("beta", [-3.0, 0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.25, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", ACCURATE, ids=str)
def test_accuracy_of_star(backend: Backend, dtype: torch.dtype, gamma: float, beta: float) -> None:
    for y in (0.0, 1.0, *SOFT):
        assert_accurate(backend, dtype, gamma, y, beta=beta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["labels", "soft", "smoothed", "star"])
@pytest.mark.parametrize("gamma", [0.5, 2.0, 1e4])
def test_limits(backend: Backend, gamma: float, form: str, dtype: torch.dtype) -> None:
    """Infinite logits, and those whose exponentials are 0: the loss is straight or flat there. NaN stays NaN."""
    x = torch.tensor([float("inf"), -float("inf"), 1e4, -1e4, float("nan"), 700.0, -700.0], device=backend.device)
    options: dict[str, Any] = {"label_smoothing": 0.25} if form == "smoothed" else {"beta": 1.0} if form == "star" else {}
    ys: tuple[Any, ...] = (0.0, 1.0)
    if form == "soft":
        ys = tuple(torch.full_like(x, y).to(dtype) for y in (0.0, 0.25, 1.0))
    for y in ys:
        _, second = second_of(x.to(dtype), y, gamma=gamma, **options)
        flat = ~x.to(dtype).isnan()
        assert second[~flat].isnan().all()
        assert (second[flat].abs() <= 1e-300).all(), (y, second)


# --- every kernel's way through a problem -----------------------------------------------------------------------------


def problem(
    backend: Backend,
    generator: torch.Generator,
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    targets: str = "labels",
    size: Size | None = None,
) -> tuple[list[Tensor], Any, list[Tensor], Size]:
    """Levels, targets, what the derivative is taken along, and the size."""
    if size is None:
        size = backend.sized(Size(2, 3, 5, ((9, 11), (4, 5), (1, 1))), Size(2, 3, 5, ((5, 3), (2, 2), (1, 1))))
    if layout in TWO_D:
        size = Size(1, size.anchors, size.classes, size.cells)
    levels = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    v = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, dtype) for x in levels]
    if targets == "soft":
        given: Any = [torch.rand(x.shape, generator=generator).to(x.device, dtype) for x in levels]
    else:
        given = arrange(encode(draw_classes(size, generator), size.classes), size, "nm", rank=levels[0].dim())
    return levels, move(given, backend.device), v, size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", (*FOUR_D, *THREE_D, *TWO_D))
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels, targets, v, size = problem(backend, generator, layout=layout, dtype=dtype)
    options: dict[str, Any] = {"num_classes": size.classes}
    got = Second(levels, targets, v, **options)
    compare(got.by_logits, expect(levels, targets, **options), v, [1.0] * len(levels), 2.0)
    for g, x in zip(got.by_logits, levels, strict=True):
        assert g.dtype == x.dtype
        if layout not in ("expanded", "width_slice", "channel_slice", "3d_rows"):  # a gradient is dense
            assert g.stride() == x.stride()


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gamma": {"gamma": 1.5},
    "alpha_per_class": {"alpha": [0.2, 0.5, 0.9, 0.25, 0.0], "gamma": 0.5},
    "smoothed": {"label_smoothing": 0.1, "gamma": 3.3},
    "detached": {"detach_modulating_factor": True, "gamma": 3.3},
    "weight": {"weight": True, "level_weights": [1.0, 0.5, -2.0]},
    "image_divisors": {"normalizer": torch.tensor([3.0, 0.5])},
    "positives_per_image": {"normalizer": "positives_per_image", "loss_weight": 3.0},
    "star": {"gamma": 2.0, "beta": 1.0},
}
REDUCTIONS = ("sum", "mean", "level", "image", "none")


def incoming_gradients(reduction: str, levels: list[Tensor], generator: torch.Generator) -> tuple[list[Tensor], list[Any]]:
    """One for each part of the loss, and for each level what it multiplies that level's second derivatives by."""
    dtype, device = levels[0].dtype, levels[0].device
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    if reduction == "none":
        given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype) for x in levels]
        return given, [g.double().cpu().numpy() for g in given]
    shape = {"level": (len(levels),), "image": (levels[0].shape[0],)}.get(reduction, ())
    g = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, accumulation)
    numbers = g.double().cpu().numpy()
    if reduction == "level":
        return [g], list(numbers)
    if reduction == "image":
        return [g], [numbers.reshape(-1, *[1] * (x.dim() - 1)) for x in levels]
    return [g], [float(numbers)] * len(levels)


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_options(
    backend: Backend, targets: str, name: str, reduction: str, mode: str, generator: torch.Generator
) -> None:
    """Both results against the oracle, for every incoming gradient."""
    options = dict(OPTIONS[name])
    layout = "channels_last" if reduction in ("level", "none") else "contiguous"
    levels, given, v, size = problem(backend, generator, targets=targets, layout=layout)
    options |= {"num_classes": size.classes, "reduction": reduction, "grad_mode": mode}
    if reduction == "mean" or (targets == "soft" and isinstance(options.get("normalizer"), str)):
        options.pop("normalizer", None)
    if targets == "soft":
        options.setdefault("normalizer", 7.0)
    if isinstance(options.get("normalizer"), Tensor):
        options["normalizer"] = options["normalizer"].to(backend.device)
    if options.get("weight"):
        anchors = size.level_anchors()
        options["weight"] = [torch.rand((size.images, m), generator=generator).to(backend.device) for m in anchors]
    incoming, scale = incoming_gradients(reduction, levels, generator)
    got = Second(levels, given, v, incoming, **options)
    expected = expect(levels, given, **options)
    gamma = options.get("gamma", 2.0)
    compare(got.by_logits, expected, v, scale, gamma)

    # By the incoming gradient: the sum that it multiplies, of v times the gradient it would be for 1.
    relative = tolerance(torch.float32, gamma) + 1e-6  # v, and sums of sixteen in float32
    along = [
        vi.double().cpu().numpy() * g for vi, g in zip(v, expected.grads, strict=True)
    ]
    sizes = [
        np.abs(vi.double().cpu().numpy()) * m for vi, m in zip(v, expected.magnitudes, strict=True)
    ]
    if reduction == "none":
        for found, want, most in zip(got.by_incoming, along, sizes, strict=True):
            assert_close(found, want, relative, magnitude=most, flushed=1e3, what="by the incoming gradient")
        return
    by_image = [[part.reshape(size.images, -1).sum(1) for part in parts] for parts in (along, sizes)]
    want, most = [
        np.array([part.sum() for part in parts])
        if reduction == "level"
        else sum(parts)
        if reduction == "image"
        else np.array(sum(part.sum() for part in parts))
        for parts in by_image
    ]
    (found,) = got.by_incoming
    assert_close(found, want, relative, magnitude=most, flushed=1e3, what="by the incoming gradient")
