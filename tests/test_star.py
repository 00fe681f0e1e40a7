"""Focal loss star: its oracle, the accuracy of every backend, and the kernels' other paths once each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    FOUR_D,
    SIXTEEN_BIT,
    Backend,
    Size,
    assert_close,
    check,
    draw_classes,
    draw_levels,
    encode,
    expect,
    move,
    tolerance,
)
from oracle import star_gradient, star_loss
from test_formula import LAYOUTS, as_levels, grid, hard_problem, losses_and_gradients
from torch.nn.functional import logsigmoid

import fastfocal

# kuangliu's, fvcore's, one that underflows float32, and one whose shift is far larger than most logits.
PARAMETERS = [(2.0, 1.0), (1.0, 0.0), (5.0, 1.0), (0.5, -30.0)]
SIZE = Size(2, 3, 5, ((7, 5), (3, 3), (1, 1)))


# --- the oracle itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, beta", PARAMETERS)
@pytest.mark.parametrize("y", [0.0, 0.3, 0.5, 1.0])
def test_oracle_gradient_is_the_derivative_of_its_loss(y: float, gamma: float, beta: float) -> None:
    x = np.linspace(-28, 28, 1025).astype(np.longdouble)
    options = {"gamma": gamma, "beta": beta}
    # As in test_formula.py; the fifth derivative is below gamma^5 = 3e3 times the loss.
    h = np.longdouble(1e-3)
    at = [star_loss(x + i * h, y, **options) for i in (-2, -1, 1, 2)]
    difference = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    gradient, magnitude = star_gradient(x, y, **options)
    assert np.all(np.abs(gradient - difference) <= 1e-8 * (magnitude + star_loss(x, y, **options)))


def test_oracle_gives_the_papers_limit() -> None:
    """Appendix B: at gamma 1, beta 0 it is the cross entropy; x_t far below 0 costs -x_t - beta / gamma."""
    x = np.linspace(-5, 5, 11)
    assert star_loss(x, 1.0, alpha=None, gamma=1.0, beta=0.0) == pytest.approx(np.log1p(np.exp(-x)), rel=1e-14)
    assert star_loss(np.array([-400.0]), 1.0, alpha=None)[0] == pytest.approx(400 - 0.5, rel=1e-14)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gamma, beta", PARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_labels(backend: Backend, dtype: torch.dtype, gamma: float, beta: float, layout: str) -> None:
    levels, labels = hard_problem(grid(backend.sized(8191, 499), dtype, backend.device), layout)
    losses_and_gradients(levels, labels, gamma=gamma, beta=beta)


@pytest.mark.parametrize("gamma, beta", PARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_soft_targets(backend: Backend, dtype: torch.dtype, gamma: float, beta: float) -> None:
    x = grid(backend.sized(2047, 199), dtype, backend.device)
    targets = torch.tensor([0.0, 2.0**-20, 0.125, 0.5, 0.75, 1 - 2.0**-7, 1.0, 0.3], dtype=dtype)
    targets = targets.to(backend.device).repeat_interleave(x.numel())
    level = as_levels(x.repeat(8), "planes")
    losses_and_gradients(level, [targets.expand(level[0].shape).contiguous()], gamma=gamma, beta=beta)


@pytest.mark.parametrize("gamma, beta", PARAMETERS)
@pytest.mark.parametrize("dtype", list(SIXTEEN_BIT), ids=str)
def test_accuracy_of_16_bit_logits_before_rounding(
    backend: Backend, dtype: torch.dtype, gamma: float, beta: float
) -> None:
    values = grid(backend.sized(4096, 500), dtype, backend.device).unique()
    level = values.view(-1, 1, 1, 1).expand(-1, 8, 1, 1).contiguous()
    label = (torch.arange(len(values), device=backend.device) % 2 * 8).view(-1, 1)  # positive, background
    options = {"num_classes": 8, "gamma": gamma, "beta": beta, "normalizer": None, "reduction": "image"}
    loss = fastfocal.focal_loss_star([level], label, **options)
    assert_close(loss, expect([level], label, **options).loss, tolerance(dtype, gamma))


@pytest.mark.parametrize("target", [0.3, 0.125, 0.9])
def test_a_large_shift_that_soft_targets_cancel(backend: Backend, target: float) -> None:
    """gamma x_t + beta is small where both of them are not: what 1 - 2 y is rounded by counts for the exponential of it."""
    beta, slope = 1e6, 1 - 2 * float(np.float32(target))
    x = torch.from_numpy(((beta - np.linspace(0.5, 20, 513)) / slope).astype(np.float32)).to(backend.device)
    level = as_levels(x, "planes")
    losses_and_gradients(level, [torch.full_like(level[0], target)], gamma=1.0, beta=beta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_logits(backend: Backend, dtype: torch.dtype) -> None:
    """Infinite ones give the limit of the loss and a finite gradient; NaN stays where it is."""
    x = torch.tensor([1e4, -1e4, float("inf"), -float("inf"), float("nan"), 0.0], dtype=dtype, device=backend.device)
    levels, labels = hard_problem(x, "planes")
    losses_and_gradients(levels, labels, beta=1.0)
    for y in (0.0, 0.25, 0.5, 1.0):
        level = as_levels(x, "planes")
        losses_and_gradients(level, [torch.full_like(level[0], y)], beta=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_logits_beyond_all_reason(backend: Backend, gamma: float, dtype: torch.dtype) -> None:
    """What rounding gamma x - beta loses is then more than an exponential can bear, and must not make one of nothing."""
    values = [1e8, 4e8, 883070081.0, 7577340779.0, 1e12, 1e15, 1e20, 1e30]
    x = torch.tensor([*values, *(-v for v in values)], dtype=dtype, device=backend.device)
    levels, labels = hard_problem(x, "planes")
    losses_and_gradients(levels, labels, gamma=gamma, beta=1.0)
    for y in (0.0, 0.25, 0.7, 1.0):
        level = as_levels(x, "planes")
        losses_and_gradients(level, [torch.full_like(level[0], y)], gamma=gamma, beta=1.0)


# --- every path -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*FOUR_D, "3d"])
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator, dtype=dtype, layout=layout)
    labels = encode(draw_classes(SIZE, generator), SIZE.classes)
    check(move(levels, backend.device), move(labels, backend.device), num_classes=SIZE.classes, beta=1.0)


OPTIONS = {
    "alpha per class": {"alpha": [0.1, 0.3, 0.5, 0.7, 1.0]},
    "no alpha": {"alpha": None},
    "per image": {"normalizer": "positives_per_image", "reduction": "image"},
    "level weights": {"level_weights": [1.0, 0.5, 0.0], "reduction": "level"},
    "unreduced": {"reduction": "none", "normalizer": None},
    "mean": {"reduction": "mean", "loss_weight": 3.0},
    "recompute": {"grad_mode": "recompute"},
    "in place": {"grad_mode": "inplace"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: Backend, name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator, dtype=dtype, layout="contiguous")
    labels = encode(draw_classes(SIZE, generator), SIZE.classes)
    levels, labels = move(levels, backend.device), move(labels, backend.device)
    check(levels, labels, num_classes=SIZE.classes, gamma=1.5, beta=-0.5, **OPTIONS[name])


def test_anchor_weights(backend: Backend, generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator)
    labels = encode(draw_classes(SIZE, generator), SIZE.classes)
    weight = [torch.rand(y.shape, generator=generator) for y in labels]
    levels, labels, weight = (move(t, backend.device) for t in (levels, labels, weight))
    check(levels, labels, num_classes=SIZE.classes, beta=1.0, weight=weight)


def test_is_fvcores_function(backend: Backend, generator: torch.Generator) -> None:
    """beta 0 and no alpha: `-logsigmoid(gamma * inputs * (2 * targets - 1)) / gamma`, reduction "none"."""
    inputs = torch.randn(40, 7, generator=generator, dtype=torch.float64).to(backend.device)
    targets = (torch.rand(40, 7, generator=generator) < 0.3).double().to(backend.device)
    theirs = -logsigmoid(3.0 * (inputs * (2 * targets - 1))) / 3.0
    options = {"alpha": None, "gamma": 3.0, "beta": 0.0, "normalizer": None, "reduction": "none"}
    torch.testing.assert_close(fastfocal.focal_loss_star(inputs, targets, **options), theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_is_what_fvcore_computes(gamma: float, generator: torch.Generator) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    inputs = torch.randn(40, 7, generator=generator).requires_grad_()
    targets = (torch.rand(40, 7, generator=generator) < 0.3).float()
    theirs = fvcore.sigmoid_focal_loss_star(inputs, targets, alpha=-1, gamma=gamma, reduction="sum")
    ours = fastfocal.focal_loss_star(inputs, targets, alpha=None, gamma=gamma, beta=0.0, normalizer=None)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # float32 sums of 280 terms
    (mine,), (expected,) = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=2e-6, atol=0)


# --- what users call --------------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    levels = draw_levels(SIZE, generator, dtype=dtype)
    return levels, torch.cat(encode(draw_classes(SIZE, generator), SIZE.classes), dim=1)


@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none", "mean"])
def test_module_function_and_reference_agree(reduction: str) -> None:
    levels, labels = small()
    options = {"gamma": 3.0, "beta": 0.5, "alpha": 0.4, "reduction": reduction}
    modules = (fastfocal.FastFocalLossStar(5, **options), fastfocal.reference.FastFocalLossStar(5, **options))
    functions = (fastfocal.focal_loss_star, fastfocal.reference.focal_loss_star)
    found = [module(levels, labels) for module in modules]
    found += [function(levels, labels, num_classes=5, **options) for function in functions]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-12, atol=0)


def test_reference_gradient() -> None:
    levels, labels = small()
    leaves = [x.clone().requires_grad_() for x in levels]
    fastfocal.reference.focal_loss_star(leaves, labels, num_classes=5).backward()
    _, grads = check(levels, labels, num_classes=5, beta=1.0)
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-12, atol=1e-300)


def test_compiled_whole() -> None:
    levels, labels = small(torch.float32)
    criterion = fastfocal.FastFocalLossStar(5)
    leaves = [x.clone().requires_grad_() for x in levels]
    torch.compile(criterion, fullgraph=True, backend="aot_eager")(leaves, labels).backward()
    _, grads = check(levels, labels, num_classes=5, beta=1.0)
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"gamma": 0.0}, ValueError, "gamma: expected a finite number > 0"),
        ({"gamma": "2"}, TypeError, "gamma: expected a number, got str"),
        ({"beta": float("inf")}, ValueError, "beta: expected a finite number, got inf"),
        ({"loss_weight": float("nan")}, ValueError, "loss_weight: expected a finite number"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], words: str) -> None:
    levels, labels = small()
    with pytest.raises(error, match=words):
        fastfocal.focal_loss_star(levels, labels, num_classes=5, **options)
    with pytest.raises(error, match=words):
        fastfocal.FastFocalLossStar(5, **options)


def test_label_smoothing_is_no_argument() -> None:
    levels, labels = small()
    with pytest.raises(TypeError, match="label_smoothing"):
        fastfocal.focal_loss_star(levels, labels, num_classes=5, label_smoothing=0.1)


@pytest.mark.parametrize("gamma", [1e-39, 1e-45, 1e-310])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tiny_gamma_makes_no_nan(backend: Backend, dtype: torch.dtype, gamma: float) -> None:
    """1 / gamma is beyond the dtype; a loss that is 0 stays 0."""
    x = torch.tensor([-30.0, -1.0, 0.0, 1.0, 30.0], dtype=dtype, device=backend.device)[:, None].requires_grad_()
    loss = fastfocal.focal_loss_star(
        x, torch.zeros(5, dtype=torch.int64, device=x.device), gamma=gamma, beta=800.0, normalizer=None
    )
    loss.backward()
    assert loss.item() == 0 and x.grad is not None and x.grad.isfinite().all()
