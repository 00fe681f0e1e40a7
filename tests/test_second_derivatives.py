"""Second derivatives: the formulas against the oracle, every kernel, and all the ways in which autograd asks for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import test_formula
import test_losses
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
)
from oracle import (
    Expected,
    element_gradient,
    element_loss,
    element_second_derivative,
    star_gradient,
    star_second_derivative,
)
from test_losses import ACTIVATED, DENSE, OF_LABELS, SCORED, Problem, is_activated, move_all
from torch import Tensor, nn

import fastfocal
from fastfocal import FastFocalLoss, focal_loss, ops
from fastfocal.losses.softmax_focal import SoftmaxFocalLoss

OTHERS = [*SCORED, *ACTIVATED, *DENSE]  # beside focal loss and focal loss star
every_other = pytest.mark.parametrize("problem", OTHERS, ids=str)

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
        name: str | None = None,
        **options: Any,
    ) -> None:
        self.inputs = leaves(levels)
        function = loss_function(options) if name is None else getattr(fastfocal, name)
        loss = function(self.inputs, targets, **options)
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
    for level, (result, want, size) in enumerate(zip(got, expected.seconds, expected.second_magnitudes, strict=True)):
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
    labels = torch.full((1, x.numel()), 0 if isinstance(y, float) and y else 1, device=x.device)
    targets = y.view(1, -1, 1) if isinstance(y, Tensor) else labels
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


def seconds_of(problem: Problem, level: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The gradient and the second derivative of each logit's loss."""
    options = {"num_classes": test_losses.CLASSES, "normalizer": None, **problem.numbers, **options}
    got = Second([level], targets, name=problem.name, **options)
    return got.grads[0].detach(), got.by_logits[0]


@pytest.mark.parametrize("dtype", ACCURATE, ids=str)
@pytest.mark.parametrize(
    "problem, targets",
    [*[(problem, "labels") for problem in OF_LABELS], *[(problem, "soft") for problem in OTHERS]],
    ids=str,
)
def test_accuracy_of_the_other_losses(backend: Backend, problem: Problem, targets: str, dtype: torch.dtype) -> None:
    """At every score, 0 and 1 too, and where a difference of rounded numbers is 0 somewhere, as the oracle says."""
    make = test_losses.labels_and_scores if targets == "labels" else test_losses.dense_targets
    case = make(backend, problem, dtype, "planes")
    grad, second = seconds_of(problem, case.level, case.targets, **case.options)
    want, weight = case.want, case.weight
    exponents = [v for v in problem.numbers.values() if v is not None and not isinstance(v, bool)]
    # The derivatives of binary_cross_entropy, which multiply what is flushed.
    first, twice = (1e12, 1e24) if is_activated(problem) else (lost(max([4.0, *exponents])),) * 2
    assert_close(
        grad, want.gradient * weight, 1.0, magnitude=want.gradient_bound * weight, flushed=first, what="gradient"
    )
    assert_close(second, want.second * weight, 1.0, magnitude=want.second_bound * weight, flushed=twice, what="second")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_other
def test_limits_of_the_other_losses(backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    """Finite for every logit but NaN; flat or straight at infinity, and exactly 0 for a negative of -inf."""
    level, calls = test_losses.limits(backend, problem, dtype)
    for targets, options in calls:
        _, second = seconds_of(problem, level, targets, **options)
        nan = level.isnan()
        if is_activated(problem):
            assert torch.equal(second.isfinite(), ~nan) and torch.equal(second.isnan(), nan)
            continue
        assert second[nan].isnan().all()
        assert (second[level.abs() >= 800].abs() <= 1e-300).all() and not second[level == -float("inf")].any()
        assert second[~nan].isfinite().all() and second[level == 2].any()


def test_a_distance_of_zero(backend: Backend) -> None:
    """Quality focal loss where p is s: a parabola for beta = 2, flat for more, and 0 by convention for less."""
    x = torch.zeros(1, 1, 1, dtype=torch.float64, device=backend.device)
    y = torch.full_like(x, 0.5)
    for beta, want in ((0.0, 0.25), (0.5, 0.0), (1.5, 0.0), (2.0, 2 * np.log(2) / 16), (3.3, 0.0)):
        for dtype in (torch.float64, torch.float32):
            level, target = x.to(dtype), y.to(dtype)
            problem = Problem("quality_focal_loss", {"beta": beta}, test_losses.SCORED[0].oracle)
            options = {"num_classes": 1, "normalizer": None, "beta": beta}
            got = Second([level], [target], name=problem.name, **options).by_logits[0].item()
            # On AVX-512 and AVX2 the reciprocal of 2 is not quite 1/2, and p not quite s.
            exact = dtype == torch.float64 or backend.name == "cuda_on_host"
            if exact or beta in (0.0, 2.0):
                assert got == pytest.approx(want, rel=2e-6 if dtype == torch.float32 else 1e-12, abs=0)
        leaf = x.clone().requires_grad_()
        loss = fastfocal.reference.quality_focal_loss([leaf], [y], **options)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad, leaf)
        assert second.item() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["labels", "soft", "smoothed", "star"])
@pytest.mark.parametrize("gamma", [0.5, 2.0, 1e4])
def test_limits(backend: Backend, gamma: float, form: str, dtype: torch.dtype) -> None:
    """Infinite logits, and those whose exponentials are 0: the loss is straight or flat there. NaN stays NaN."""
    x = torch.tensor([float("inf"), -float("inf"), 1e4, -1e4, float("nan"), 2e3, -2e3], device=backend.device)
    options: dict[str, Any] = (
        {"label_smoothing": 0.25} if form == "smoothed" else {"beta": 1.0} if form == "star" else {}
    )
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
        if layout in ("contiguous", "channels_last", "offset", "channels_last_offset", "3d", "3d_offset", "2d"):
            assert g.stride() == x.stride()  # where logits are read in their place


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


def incoming_gradients(
    reduction: str, levels: list[Tensor], generator: torch.Generator
) -> tuple[list[Tensor], list[Any]]:
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
    along = [vi.double().cpu().numpy() * g for vi, g in zip(v, expected.grads, strict=True)]
    sizes = [np.abs(vi.double().cpu().numpy()) * m for vi, m in zip(v, expected.magnitudes, strict=True)]
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


MORE: dict[str, Any] = {
    "class_weight": [[0.5, 1.0, 2.0], [3.0, 0.25, 1.0]],
    "class_mask": torch.tensor([[True, False, True], [True, True, True]]),
    "weight": [torch.linspace(0, 2, 8, dtype=torch.float64).view(2, 4), torch.ones(2, 2, dtype=torch.float64)],
    "level_weights": [0.5, -2.0],
    "loss_weight": 1.5,
}


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_other
def test_options_of_the_other_losses(
    backend: Backend, problem: Problem, reduction: str, mode: str, generator: torch.Generator
) -> None:
    """With all that they share, and every normalizer, against the reference."""
    normalizers: list[Any] = [2.5, torch.tensor([2.0, 5.0])]
    if problem.name != "asymmetric_loss":
        normalizers += ["positives", "positives_per_image"]
    if problem not in DENSE:
        normalizers.append("scores")
    for normalizer in normalizers[:1] if reduction == "mean" else normalizers:
        levels, given, options = tiny_problem(backend, problem, generator)
        more = {name: move_all(value, backend.device) for name, value in {**MORE, "normalizer": normalizer}.items()}
        options |= {"reduction": reduction, "grad_mode": mode, **more}
        compare_with_reference(levels, given, options, generator, problem.name)


# --- edges ------------------------------------------------------------------------------------------------------------


NAMES = ("focal_loss", "quality_focal_loss", "bce_loss", "asymmetric_loss")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_ignored_anchors_leave_no_trace(
    backend: Backend, name: str, bad: float, layout: str, generator: torch.Generator
) -> None:
    """Whatever their logits, their weights, the incoming gradient, the direction and the scores of all but positives are."""
    size = Size(2, 2, 3, ((4, 3), (1, 1)))
    levels, targets, v, _ = problem(backend, generator, layout=layout, size=size)
    ignored = [(t == -1)[..., None].expand(*t.shape, size.classes) for t in targets]

    def set_ignored(tensors: list[Tensor]) -> list[Tensor]:
        # Not torch.where, which gives the mask's order of memory: sums are of another order then.
        return [x.clone().masked_fill_(in_order(mask, x, size), bad) for mask, x in zip(ignored, tensors, strict=True)]

    weight = [torch.where(t == -1, bad, 1.0) for t in targets]
    options: dict[str, Any] = {"num_classes": 3, "weight": weight, "name": name}
    plain: dict[str, Any] = {**options, "weight": [torch.ones_like(w) for w in weight]}
    if name in ("quality_focal_loss", "bce_loss"):
        scores = [torch.rand(t.shape, generator=generator).to(t.device) for t in targets]
        is_positive = [(t >= 0) & (t < 3) for t in targets]
        plain["scores"] = scores
        options["scores"] = [torch.where(yes, s, bad) for yes, s in zip(is_positive, scores, strict=True)]
    clean = Second(levels, targets, v, **plain)
    got = Second(set_ignored(levels), targets, set_ignored(v), **options)
    for mask, a, b in zip(ignored, got.by_logits, clean.by_logits, strict=True):
        assert not a[in_order(mask, a, size)].any()
        assert same_bits(a, b)
    assert same_bits(got.by_incoming[0], clean.by_incoming[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("targets", ["labels", "soft"])
@pytest.mark.parametrize("name", NAMES)
def test_class_masks(backend: Backend, name: str, targets: str, layout: str, generator: torch.Generator) -> None:
    """What the mask leaves out is exactly 0, whatever is there; all else as if its logits were not there."""
    levels, given, v, size = problem(backend, generator, layout=layout, targets=targets)
    mask = torch.rand(size.images, size.classes, generator=generator) < 0.6
    mask = mask.to(backend.device)
    options: dict[str, Any] = {"num_classes": size.classes, "normalizer": 3.0, "name": name}
    plain = Second(levels, given, v, **options)
    for_logits = [
        mask[:, None, :, None, None].expand(-1, size.anchors, -1, h, w).reshape(x.shape)
        for x, (h, w) in zip(levels, size.cells, strict=True)
    ]
    bad = [torch.where(kept, x, float("nan")) for kept, x in zip(for_logits, levels, strict=True)]
    bad = [b.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else b for b in bad]
    got = Second(bad, given, v, class_mask=mask, **options)
    along = 0.0
    for kept, a, b, g, t in zip(for_logits, got.by_logits, plain.by_logits, plain.grads, v, strict=True):
        assert not a[~kept].any()
        assert torch.equal(a[kept], b[kept])
        along += float((g.detach().double() * t * kept).sum())
    assert got.by_incoming[0].item() == pytest.approx(along, rel=1e-5)  # sums in float32, sixteen at a time


def test_a_loss_without_second_derivatives_says_so(backend: Backend) -> None:
    """One that takes an anchor's classes together; CONTRIBUTING's new loss, without a formula for them, is tested there."""
    x = torch.randn(1, 4, 3).to(backend.device).requires_grad_()
    labels = torch.zeros(4, dtype=torch.int16, device=backend.device)
    kind, parameters = SoftmaxFocalLoss.kind, [2.0, 0.0]
    options = (labels, None, None, None, None, None, None, [1.0], 1.0, 1.0, kind, parameters, 3, 0, ops.SUM)
    (loss,), _ = ops.operators.pyramid_loss([x], *options, [0])
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^fastfocal: softmax_focal_loss has no second derivative"):
        grad.sum().backward()


def in_order(mask: Tensor, x: Tensor, size: Size) -> Tensor:
    """(N, M, K) in the logits' shape."""
    if x.dim() != 4:
        return mask.reshape(x.shape)
    n, _, h, w = x.shape
    return mask.reshape(n, h, w, size.anchors, size.classes).permute(0, 3, 4, 1, 2).reshape(x.shape)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 2.0**120])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_zero_stays_zero(backend: Backend, reduction: str, bad: float, generator: torch.Generator) -> None:
    """Beside an incoming gradient or a direction that is no number, or too large a one; all else is what it gives."""
    size = Size(2, 2, 3, ((3, 2), (1, 1)))
    levels, targets, v, _ = problem(backend, generator, size=size)
    options: dict[str, Any] = {"num_classes": 3, "reduction": reduction, "level_weights": [1.0, 0.0]}
    plain = Second(levels, targets, v, **options)
    incoming = [torch.full_like(g, bad) for g in plain.losses]
    got = Second(levels, targets, v, incoming, **options)
    for a, b in zip(got.by_logits, plain.by_logits, strict=True):
        zero = b == 0
        assert zero.any() and not a[zero].any()
        torch.testing.assert_close(a[~zero], b[~zero] * bad, rtol=1e-6, atol=0, equal_nan=True)
    along = Second(levels, targets, [torch.full_like(g, bad) for g in v], **options)
    for a, b in zip(along.by_logits, plain.by_logits, strict=True):
        assert not a[b == 0].any()
    assert not along.by_logits[1].any()


def test_many_levels(backend: Backend, generator: torch.Generator) -> None:
    """More than one launch takes, empty ones among them."""
    size = Size(2, 1, 2, tuple((1 + i % 3, 2 if i % 5 else 0) for i in range(37)))
    levels, targets, v, _ = problem(backend, generator, size=size)
    for reduction in ("sum", "level", "image"):
        options: dict[str, Any] = {"num_classes": 2, "reduction": reduction}
        got = Second(levels, targets, v, **options)
        expected = expect(levels, targets, **options)
        compare(got.by_logits, expected, v, [1.0] * len(levels), 2.0)
        want = sum((vi.double().cpu().numpy() * g).sum() for vi, g in zip(v, expected.grads, strict=True))
        most = sum((vi.abs().double().cpu().numpy() * m).sum() for vi, m in zip(v, expected.magnitudes, strict=True))
        assert abs(float(got.by_incoming[0].double().sum()) - want) <= 1e-5 * most


def test_no_logits(backend: Backend) -> None:
    levels = [torch.zeros(0, 6, 2, 2, device=backend.device), torch.zeros(0, 6, 1, 1, device=backend.device)]
    targets = [
        torch.zeros(0, 8, dtype=torch.int64, device=backend.device),
        torch.zeros(0, 2, dtype=torch.int64, device=backend.device),
    ]
    for reduction in REDUCTIONS:
        got = Second(levels, targets, num_classes=3, reduction=reduction)
        assert [g.shape for g in got.by_logits] == [x.shape for x in levels]
        assert all(not g.any() for g in got.by_incoming)


def test_levels_that_need_no_gradient(backend: Backend, generator: torch.Generator) -> None:
    levels, targets, v, size = problem(backend, generator)
    first = levels[0].clone().requires_grad_()
    last = levels[2].clone().requires_grad_()
    for mode in ("save", "recompute"):
        loss = focal_loss([first, levels[1], last], targets, num_classes=size.classes, grad_mode=mode)
        grads = torch.autograd.grad(loss, [first, last], create_graph=True)
        expected = expect(levels, targets, num_classes=size.classes)
        # Only one of the two gradients is differentiated: the other level's derivative is 0.
        found = torch.autograd.grad(grads[0], [first, last], v[0])
        factor = v[0].double().cpu().numpy()
        assert_close(
            found[0], factor * expected.seconds[0], 5e-6, magnitude=np.abs(factor) * expected.second_magnitudes[0]
        )
        assert not found[1].any()


@pytest.mark.parametrize("dtype", list(SIXTEEN_BIT), ids=str)
@pytest.mark.parametrize("targets", ["labels", "soft"])
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_are_rounded_once(
    backend: Backend, name: str, targets: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The numbers of float32 for the same logits, rounded; soft targets of float32 beside 16-bit logits too."""
    levels, given, v, size = problem(backend, generator, dtype=dtype, targets=targets)
    options: dict[str, Any] = {"num_classes": size.classes, "normalizer": 2.0, "name": name}
    if targets == "labels" and name in ("quality_focal_loss", "bce_loss"):
        options["scores"] = [torch.rand(t.shape, generator=generator).to(t.device) for t in given]
    wide = Second(
        [x.float() for x in levels],
        [t.float() for t in given] if targets == "soft" else given,
        [t.float() for t in v],
        **options,
    )
    narrow = Second(levels, given, v, **options)
    for a, b in zip(narrow.by_logits, wide.by_logits, strict=True):
        assert torch.equal(a, b.to(dtype))
    assert torch.equal(narrow.by_incoming[0], wide.by_incoming[0])
    if targets == "soft":
        mixed = Second(levels, [t.float() for t in given], v, **options)
        assert all(torch.equal(a, b) for a, b in zip(mixed.by_logits, narrow.by_logits, strict=True))


def test_a_loss_scale_is_multiplied_in_before_rounding(backend: Backend, generator: torch.Generator) -> None:
    levels, targets, v, size = problem(backend, generator, dtype=torch.float16)
    options: dict[str, Any] = {"num_classes": size.classes}
    scale = torch.tensor(65536.0, device=backend.device)
    got = Second(levels, targets, [t * 0.01 for t in v], [scale], **options)
    expected = expect(levels, targets, **options)
    compare(got.by_logits, expected, [t * 0.01 for t in v], [65536.0] * len(levels), 2.0)


def test_the_same_bits_for_any_number_of_threads(generator: torch.Generator) -> None:
    levels, targets, v, size = problem(
        Backend("cpu", torch.device("cpu")), generator, size=Size(2, 3, 20, ((40, 41), (20, 21)))
    )
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            got = Second(levels, targets, v, num_classes=size.classes)
            results.append([*got.by_logits, *got.by_incoming])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# --- as autograd asks for it ------------------------------------------------------------------------------------------

TINY = Size(2, 2, 3, ((2, 1), (1, 1)))
CHECKED: dict[str, dict[str, Any]] = {
    "sum": {"normalizer": None, "gamma": 0.5},
    "level": {"normalizer": 2.5, "gamma": 2.0, "label_smoothing": 0.1, "level_weights": [1.0, 0.5]},
    "image": {"normalizer": torch.tensor([3.0, 0.5]), "gamma": 3.3, "alpha": [0.2, 0.5, 0.9]},
    "mean": {"gamma": 1.0, "level_weights": [1.0, 2.0], "loss_weight": 2.0, "normalizer": None},
    "none": {"normalizer": torch.tensor(2.5), "gamma": 2.0, "alpha": None, "label_smoothing": 0.1},
}


def tiny(backend: Backend, generator: torch.Generator, layout: str = "contiguous") -> tuple[list[Tensor], list[Tensor]]:
    levels = draw_levels(TINY, generator, dtype=torch.float64, layout=layout)
    labels = encode(draw_classes(TINY, generator, positive=0.3, ignored=0.2), TINY.classes)
    return move(levels, backend.device), move(labels, backend.device)


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("reduction", CHECKED)
@pytest.mark.parametrize("targets", ["labels", "soft", "star", "star_soft", "detached", "weighted", *OTHERS], ids=str)
def test_gradgradcheck(
    backend: Backend, targets: str | Problem, reduction: str, mode: str, generator: torch.Generator
) -> None:
    """By every logit and every incoming gradient, each alone."""
    if isinstance(targets, Problem):
        return check_other_loss(backend, targets, reduction, mode, generator)
    levels, labels = tiny(backend, generator)
    soft = [torch.rand(x.shape, generator=generator).to(x.device).double() for x in levels]
    given = soft if targets in ("soft", "star_soft") else labels
    options = {"num_classes": 3, "reduction": reduction, "grad_mode": mode, **CHECKED[reduction]}
    if isinstance(options["normalizer"], Tensor):
        options["normalizer"] = options["normalizer"].to(backend.device)
    if targets.startswith("star"):
        options = {name: value for name, value in options.items() if name != "label_smoothing"} | {
            "gamma": 1.5,
            "beta": 1.0,
        }
    if targets == "detached":
        options["label_smoothing"] = 0.0  # the numerical derivative of the whole first derivative is not asked for
    if targets == "weighted":
        options["weight"] = [torch.rand(y.shape, generator=generator).to(y.device) for y in labels]

    def loss(*xs: Tensor) -> Any:
        out = loss_function(options)(list(xs), given, **options)
        return tuple(out) if isinstance(out, list) else out

    if targets != "detached":
        assert torch.autograd.gradgradcheck(loss, leaves(levels))
        return
    # A constant factor has no numerical derivative: the reference, which detaches it, is the judge.
    options["detach_modulating_factor"] = True
    compare_with_reference(levels, given, options, generator)


def tiny_problem(
    backend: Backend, problem: Problem, generator: torch.Generator, layout: str = "contiguous"
) -> tuple[list[Tensor], Any, dict[str, Any]]:
    """As tiny(), with what the loss takes: labels and scores, or soft targets with peaks and zeros."""
    levels, given = tiny(backend, generator, layout)
    options: dict[str, Any] = {"num_classes": TINY.classes, **problem.numbers}
    if problem in DENSE:
        given = [torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in levels]
        for y in given:
            y[y > 0.8] = 1.0
            y[y < 0.2] = 0.0
    else:
        options["scores"] = [torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y.device) for y in given]
    if is_activated(problem):
        levels = [0.05 + 0.9 * x.sigmoid() for x in levels]
    return levels, given, options


def check_other_loss(backend: Backend, problem: Problem, reduction: str, mode: str, generator: torch.Generator) -> None:
    levels, given, own = tiny_problem(backend, problem, generator)
    shared = {k: o for k, o in CHECKED[reduction].items() if k in ("normalizer", "level_weights", "loss_weight")}
    options = {**own, "reduction": reduction, "grad_mode": mode, **shared}
    if isinstance(options.get("normalizer"), Tensor):
        options["normalizer"] = options["normalizer"].to(backend.device)
    compare_with_reference(levels, given, options, generator, problem.name)
    # A factor that is a constant for the gradient has no numerical derivative.
    constant = ("matchability_aware_loss", "iou_aware_bce_loss")
    if problem.numbers.get("detach_modulating_factor") or problem.name in constant:
        return

    def loss(*xs: Tensor) -> Any:
        out = getattr(fastfocal, problem.name)(list(xs), given, **options)
        return tuple(out) if isinstance(out, list) else out

    assert torch.autograd.gradgradcheck(loss, leaves(levels))


def assert_agrees(got: Tensor, want: Tensor, options: dict[str, Any]) -> None:
    """With the reference in float64: a few dozen roundings in sums of some twenty terms, relative to the largest. Of
    probabilities the reference's derivatives are torch's of its binary_cross_entropy, which adds 1e-12 to p and to 1 - p in
    some places and not in others; these are 0.05 at the least."""
    relative = 1e-10 if options.get("activated") else 1e-12
    assert (got - want).abs().max() <= relative * want.abs().max()


def compare_with_reference(
    levels: list[Tensor], given: Any, options: dict[str, Any], generator: torch.Generator, name: str | None = None
) -> None:
    """Both derivatives of a product of all gradients and random numbers, by logits and by incoming gradients, in float64."""
    v = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in levels]
    results = []
    for module in (fastfocal, fastfocal.reference):
        star = name is None and "beta" in options
        function = getattr(module, name or ("focal_loss_star" if star else "focal_loss"))
        inputs = leaves(levels)
        wanted = options if module is fastfocal else {k: o for k, o in options.items() if k != "grad_mode"}
        loss = function(inputs, given, **wanted)
        parts = loss if isinstance(loss, list) else [loss]
        incoming = [
            torch.linspace(1, 2, part.numel(), dtype=part.dtype, device=part.device).view(part.shape).requires_grad_()
            for part in parts
        ]
        grads = torch.autograd.grad(parts, inputs, incoming, create_graph=True)
        results.append(torch.autograd.grad(grads, [*inputs, *incoming], v))
    for got, want in zip(*results, strict=True):
        assert_agrees(got, want, options)


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "width_slice", "expanded", "3d", "3d_transposed"]
)
@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("scored", [False, True])
def test_gradgradcheck_of_layouts(
    backend: Backend, scored: bool, reduction: str, mode: str, layout: str, generator: torch.Generator
) -> None:
    """Logits that are copied to be read are differentiated too; scores are found in every order."""
    if scored:
        levels, labels, options = tiny_problem(backend, SCORED[2], generator, layout)
        options |= {"reduction": reduction, "grad_mode": mode}
        return compare_with_reference(levels, labels, options, generator, SCORED[2].name)
    levels, labels = tiny(backend, generator, layout)
    if layout == "expanded":  # gradcheck refuses memory shared by elements
        options = {"num_classes": 3, "reduction": reduction, "grad_mode": mode}
        return compare_with_reference(levels, labels, options, generator)

    def loss(*xs: Tensor) -> Any:
        out = focal_loss(list(xs), labels, num_classes=3, reduction=reduction, grad_mode=mode)
        return tuple(out) if isinstance(out, list) else out

    assert torch.autograd.gradgradcheck(loss, leaves(levels))


class Head(nn.Module):
    """A shared head over two levels of features."""

    def __init__(self, criterion: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, TINY.anchors * TINY.classes, 1)
        self.criterion = criterion
        self.double()

    def forward(self, features: list[Tensor], labels: list[Tensor]) -> Tensor:
        return self.criterion([self.head(self.stem(x).tanh()) for x in features], labels)  # type: ignore[no-any-return]


def training(backend: Backend, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    features = [torch.randn(2, 2, h, w, generator=generator, dtype=torch.float64) for h, w in TINY.cells]
    return move(features, backend.device), move(encode(draw_classes(TINY, generator, positive=0.3), 3), backend.device)


def judge(**options: Any) -> Callable[..., Any]:
    return lambda x, y: fastfocal.reference.focal_loss(x, y, num_classes=3, **options)


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_with_a_gradient_penalty(
    backend: Backend, smoothing: float, mode: str, generator: torch.Generator
) -> None:
    """Loss plus the squared norm of its gradient by the input (WGAN-GP's way), against the reference in float64."""
    features, labels = training(backend, generator)
    found = []
    for criterion in (
        FastFocalLoss(3, label_smoothing=smoothing, grad_mode=mode),
        judge(label_smoothing=smoothing),
    ):
        model = Head(criterion).to(backend.device)
        inputs = leaves(features)
        loss = model(inputs, labels)
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + 10 * sum(g.square().sum() for g in grads)).backward()
        found.append([p.grad for p in model.parameters()])
    for got, want in zip(*found, strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("other", [None, *SCORED, *DENSE], ids=str)
def test_a_hessian_vector_product(
    backend: Backend, other: Problem | None, mode: str, generator: torch.Generator
) -> None:
    """Of all parameters, by two backwards, as conjugate gradients take it."""
    features, labels = training(backend, generator)
    criteria: list[Callable[..., Any]] = [FastFocalLoss(3, grad_mode=mode), judge()]
    if other is not None:
        _, labels, options = tiny_problem(backend, other, generator)
        of_both = [getattr(module, other.name) for module in (fastfocal, fastfocal.reference)]
        criteria = [partial(of_both[0], grad_mode=mode, **options), partial(of_both[1], **options)]
    found = []
    for criterion in criteria:
        model = Head(criterion).to(backend.device)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(model(features, labels), parameters, create_graph=True)
        draw = torch.Generator().manual_seed(11)
        v = [torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.device) for p in parameters]
        found.append(torch.autograd.grad(grads, parameters, v))
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "hessian": torch.func.hessian,
    "reverse_over_reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "reverse_over_forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "forward_over_forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    "form, reduction",
    [
        *[(form, reduction) for form in ("labels", "soft", "star") for reduction in REDUCTIONS],
        *[(problem, reduction) for problem in OTHERS for reduction in ("sum", "none")],
    ],
    ids=str,
)
def test_hessians_of_torch_func(
    backend: Backend, form: str | Problem, name: str, reduction: str, generator: torch.Generator
) -> None:
    size = backend.sized(TINY, Size(1, 1, 3, ((1, 2), (1, 1))))
    x, beside = move(draw_levels(size, generator, dtype=torch.float64, layout="channels_last"), backend.device)
    labels = move(encode(draw_classes(size, generator, positive=0.3, ignored=0.2), 3), backend.device)
    soft = [torch.rand(t.shape, generator=generator).to(t.device).double() for t in (x, beside)]
    options: dict[str, Any] = {"num_classes": 3, "reduction": reduction, "gamma": 1.5, "normalizer": None}
    given: Any = soft if form == "soft" else labels
    if isinstance(form, Problem):
        (x, beside), given, own = tiny_problem(backend, form, generator, "channels_last")
        options = {**own, "reduction": reduction, "normalizer": None}

    def loss(module: Any) -> Callable[[Tensor], Tensor]:
        other = form.name if isinstance(form, Problem) else "focal_loss"
        function = module.focal_loss_star if form == "star" else getattr(module, other)

        def of(t: Tensor) -> Tensor:
            out = function([t, beside], given, **options)
            return out[0] if isinstance(out, list) else out  # type: ignore[no-any-return]

        return of

    transform = TRANSFORMS[name]
    got, want = transform(loss(fastfocal))(x), transform(loss(fastfocal.reference))(x)
    assert got.shape == want.shape and want.abs().max() > 0
    assert_agrees(got, want, options)


PRODUCTS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp_of_grad": lambda f, x, v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
    "vjp_of_grad": lambda f, x, v: torch.func.vjp(torch.func.grad(f), x)[1](v)[0],
    "grad_of_jvp": lambda f, x, v: torch.func.grad(lambda t: torch.func.jvp(f, (t,), (v,))[1])(x),
    "grad_of_grad": lambda f, x, v: torch.func.grad(lambda t: (torch.func.grad(f)(t) * v).sum())(x),
    "vmap_of_jvp": lambda f, x, v: torch.func.vmap(lambda u: torch.func.jvp(torch.func.grad(f), (x,), (u,))[1])(
        torch.stack([v, 2 * v])
    )[0],
    "vmap_of_vjp": lambda f, x, v: torch.func.vmap(torch.func.vjp(torch.func.grad(f), x)[1])(torch.stack([v, 2 * v]))[
        0
    ][0],
    "dual_numbers": lambda f, x, v: dual_product(f, x, v),
}


def dual_product(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaf, v)
        (grad,) = torch.autograd.grad(f(dual), leaf, create_graph=True)
        return torch.autograd.forward_ad.unpack_dual(grad).tangent  # type: ignore[no-any-return]


def scalar_loss(
    backend: Backend, generator: torch.Generator, other: Problem | None = None
) -> tuple[Tensor, Tensor, Callable[..., Any]]:
    (x, beside), given = tiny(backend, generator)
    name, own = "focal_loss", {"num_classes": 3, "gamma": 1.5}
    if other is not None:
        name = other.name
        (x, beside), given, own = tiny_problem(backend, other, generator)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)

    def loss(module: Any, **options: Any) -> Callable[[Tensor], Tensor]:
        return lambda t: getattr(module, name)([t, beside], given, **own, **options)

    return x, v, loss


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("other", [None, *OTHERS], ids=str)
def test_hessian_vector_products_of_torch_func(
    backend: Backend, other: Problem | None, name: str, generator: torch.Generator
) -> None:
    x, v, loss = scalar_loss(backend, generator, other)
    got, want = PRODUCTS[name](loss(fastfocal), x, v), PRODUCTS[name](loss(fastfocal.reference), x, v)
    assert_agrees(got, want, {} if other is None else other.numbers)


COMPILED = [name for name in PRODUCTS if not name.startswith(("vmap", "dual"))] + ["hessian"]


@pytest.mark.parametrize("mode", ["auto", "recompute"])
@pytest.mark.parametrize(
    "other, name",
    [
        *[(None, name) for name in COMPILED],
        *[(problem, name) for problem in OTHERS for name in ("jvp_of_grad", "hessian")],
    ],
    ids=str,
)
def test_torch_func_within_compiled_code(
    backend: Backend, other: Problem | None, name: str, mode: str, generator: torch.Generator
) -> None:
    x, v, loss = scalar_loss(backend, generator, other)
    torch._dynamo.reset()
    if name == "hessian":
        got = torch.compile(torch.func.hessian(loss(fastfocal, grad_mode=mode)), backend="aot_eager", fullgraph=True)(x)
        want = torch.func.hessian(loss(fastfocal.reference))(x)
    else:
        product = torch.compile(PRODUCTS[name], backend="aot_eager", fullgraph=True)
        got, want = product(loss(fastfocal, grad_mode=mode), x, v), PRODUCTS[name](loss(fastfocal.reference), x, v)
    assert_agrees(got, want, {} if other is None else other.numbers)


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_pytorch_refuses_a_double_backward_through_compiled_code(mode: str, generator: torch.Generator) -> None:
    """AOTAutograd's own limit, for every operator: an error, and not a penalty without a gradient."""
    model = Head(FastFocalLoss(3, grad_mode=mode))
    features, labels = training(Backend("cpu", torch.device("cpu")), generator)
    torch._dynamo.reset()
    loss = torch.compile(model, backend="aot_eager")(features, labels)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        sum(g.square().sum() for g in grads).backward()  # type: ignore[union-attr]


def test_compiled_without_aotautograd_says_what_to_do(generator: torch.Generator) -> None:
    features, labels = training(Backend("cpu", torch.device("cpu")), generator)
    found: list[Any] = []
    for criterion in (FastFocalLoss(3), FastFocalLoss(3, grad_mode="recompute"), judge()):
        torch._dynamo.reset()
        model = Head(criterion)
        loss = torch.compile(model, backend="eager")(features, labels)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        try:
            torch.stack([g.square().sum() for g in grads]).sum().backward()
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append([p.grad for p in model.parameters()])
    assert "gradients that were made in forward" in found[0] and 'grad_mode="recompute"' in found[0]
    for got, want in zip(found[1], found[2], strict=True):
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


# --- the graph, and what is kept for it -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_a_graph_may_be_walked_again(backend: Backend, mode: str, generator: torch.Generator) -> None:
    levels, labels = tiny(backend, generator)
    inputs = leaves(levels)
    loss = focal_loss(inputs, labels, num_classes=3, grad_mode=mode)
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = [
        torch.autograd.grad(first, inputs, [torch.ones_like(g) for g in first], retain_graph=True) for _ in range(2)
    ]
    assert all(same_bits(a, b) for a, b in zip(*second, strict=True))
    again = torch.autograd.grad(loss, inputs, create_graph=True)
    last = torch.autograd.grad(again, inputs, [torch.ones_like(g) for g in again])
    assert all(same_bits(a, b) for a, b in zip(last, second[0], strict=True))
    after = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(plain, first, after, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_backward_with_create_graph(backend: Backend, mode: str, generator: torch.Generator) -> None:
    levels, labels = tiny(backend, generator)
    (x,), (y,) = levels[:1], labels[:1]
    leaf = x.clone().requires_grad_()
    focal_loss([leaf], [y], num_classes=3, grad_mode=mode).backward(create_graph=True)
    grad = leaf.grad
    assert grad is not None and grad.requires_grad
    (got,) = torch.autograd.grad(grad.sum(), leaf)
    assert_close(got, expect([x], [y], num_classes=3).seconds[0], 1e-12)
    leaf.grad = None  # a cycle otherwise


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_a_freed_graph_is_pytorchs_own_error(mode: str, generator: torch.Generator) -> None:
    levels, labels = tiny(Backend("cpu", torch.device("cpu")), generator)
    inputs = leaves(levels)
    loss = focal_loss(inputs, labels, num_classes=3, grad_mode=mode)
    torch.autograd.grad(loss, inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    loss = focal_loss(inputs, labels, num_classes=3, grad_mode=mode)
    grads = torch.autograd.grad(loss, inputs, create_graph=True, retain_graph=False)
    torch.autograd.grad(grads, inputs, [torch.ones_like(g) for g in grads])


@pytest.mark.parametrize("mode", ["auto", "save", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits_are_let_go_with_the_graph(reduction: str, mode: str, generator: torch.Generator) -> None:
    """A loss that lives on, as it does until the next step, keeps no logits once backward is through."""
    levels, labels = tiny(Backend("cpu", torch.device("cpu")), generator)
    leaf = levels[0].clone().requires_grad_()
    logits = leaf * 1
    gone = weakref.ref(logits)
    loss = focal_loss([logits], labels[:1], num_classes=3, grad_mode=mode, reduction=reduction)
    del logits
    assert gone() is not None
    (loss[0].sum() if isinstance(loss, list) else loss).backward()
    assert gone() is None and loss is not None


def test_logits_written_to_after_the_loss(backend: Backend, generator: torch.Generator) -> None:
    """With "save" a first derivative does not read them; a second one would be wrong, and is an error."""
    levels, labels = tiny(backend, generator)
    inputs = leaves(levels)
    given = [x * 1 for x in inputs]
    loss = focal_loss(given, labels, num_classes=3, grad_mode="save")
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.no_grad():
        given[1].mul_(0)
    with pytest.raises(RuntimeError, match="logits modified in place since the loss was computed"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    found = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("what", ["soft", "normalizer"])
def test_what_else_is_written_to_after_the_loss(backend: Backend, what: str, generator: torch.Generator) -> None:
    levels, labels = tiny(backend, generator)
    inputs = leaves(levels)
    soft = [torch.rand_like(x) for x in levels]
    normalizer = torch.tensor(3.0, dtype=torch.float64, device=backend.device)
    given = soft if what == "soft" else labels
    loss = focal_loss(inputs, given, num_classes=3, normalizer=normalizer, grad_mode="save")
    (soft[0] if what == "soft" else normalizer).mul_(2)
    with pytest.raises(RuntimeError, match="targets, scores, mask or normalizer modified in place"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    torch.autograd.grad(loss, inputs)


def test_what_was_made_in_inference_mode(generator: torch.Generator) -> None:
    """Such targets have no version. A first derivative is made beside them; a second one is PyTorch's own error."""
    levels, _ = tiny(Backend("cpu", torch.device("cpu")), generator)
    inputs = leaves(levels)
    with torch.inference_mode():
        soft, normalizer = [torch.rand_like(x) for x in levels], torch.tensor(2.0, dtype=torch.float64)
    loss = focal_loss(inputs, soft, normalizer=normalizer, num_classes=3)
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved for backward"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    expected = expect(levels, soft, normalizer=2.0, num_classes=3)
    for got, want, size in zip(torch.autograd.grad(loss, inputs), expected.grads, expected.magnitudes, strict=True):
        assert_close(got, want, 1e-12, magnitude=size)


@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_inplace_says_what_to_do(backend: Backend, targets: str, generator: torch.Generator) -> None:
    levels, labels = tiny(backend, generator)
    given = labels if targets == "labels" else [x.sigmoid() for x in levels]
    inputs = leaves(levels)
    loss = focal_loss([x * 1 for x in inputs], given, num_classes=3, normalizer=1.0, grad_mode="inplace")
    with pytest.raises(RuntimeError, match=r'"inplace" has written over the logits.*"save" or "recompute"'):
        torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("way", ["hooks", "checkpoint"])
def test_saved_tensor_hooks(backend: Backend, way: str, mode: str, generator: torch.Generator) -> None:
    """What hooks are to keep out of memory is not kept beside them: "save" says so, "recompute" saves logits through them."""
    levels, labels = tiny(backend, generator)
    inputs = leaves(levels)

    def loss_of(*xs: Tensor) -> Any:
        return focal_loss([x.sin() for x in xs], labels, num_classes=3, grad_mode=mode)

    if way == "hooks":
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(*inputs)
    else:
        loss = torch.utils.checkpoint.checkpoint(loss_of, *inputs, use_reentrant=False)
    if mode == "save":
        with pytest.raises(RuntimeError, match=r'no logits are kept under saved-tensor hooks.*grad_mode="recompute"'):
            torch.autograd.grad(loss, inputs, create_graph=True)
        return
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    found = torch.autograd.grad(grads, inputs, [torch.ones_like(g) for g in grads])
    twins = leaves(levels)
    want = fastfocal.reference.focal_loss([x.sin() for x in twins], labels, num_classes=3)
    wanted = torch.autograd.grad(want, twins, create_graph=True)
    for a, b in zip(found, torch.autograd.grad(wanted, twins, [torch.ones_like(g) for g in wanted]), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_a_third_derivative_is_an_error(backend: Backend, generator: torch.Generator) -> None:
    x, v, loss = scalar_loss(backend, generator)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(fastfocal)(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((grad * v).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"third derivative .* fastfocal.reference"):
        torch.autograd.grad((second * v).sum(), leaf)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.func.grad(
            lambda t: (torch.func.grad(lambda u: (torch.func.grad(loss(fastfocal))(u) * v).sum())(t) * v).sum()
        )(x)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.func.jvp(torch.func.hessian(loss(fastfocal)), (x,), (v,))


def test_the_module_and_torchvisions_function(generator: torch.Generator) -> None:
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (5, 4), generator=generator).double()

    def own(t: Tensor) -> Tensor:
        return fastfocal.sigmoid_focal_loss(t, y, reduction="mean")

    def plain(t: Tensor) -> Tensor:
        p = t.sigmoid()
        ce = nn.functional.binary_cross_entropy_with_logits(t, y, reduction="none")
        missed = p * (1 - y) + (1 - p) * y
        return ((0.25 * y + 0.75 * (1 - y)) * missed**2 * ce).mean()

    torch.testing.assert_close(torch.func.hessian(own)(x), torch.func.hessian(plain)(x), rtol=1e-11, atol=1e-16)
    labels = torch.randint(0, 5, (5,), generator=generator)
    assert torch.autograd.gradgradcheck(lambda t: FastFocalLoss(4)(t, labels), (x.clone().requires_grad_(),))
