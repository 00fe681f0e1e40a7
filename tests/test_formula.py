"""The formula: the oracle against known values and finite differences, every backend against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES, SIXTEEN_BIT, SMALLEST, Backend, assert_close, compare, expect, loss_function, run, tolerance
from oracle import element_gradient, element_loss
from torch import Tensor

import fastfocal

# 0 and 1 are special cases, 2 is the usual one, below 1 the textbook form has a pole, 3.3 and 5 underflow float32.
GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.3, 4.00000023, 5.0)  # the next to last is rounded by float32 as no other is
# Both vector families: neighbours in w share the class, or neighbours in k share the anchor.
LAYOUTS = {"planes": torch.contiguous_format, "classes": torch.channels_last}

# --- the oracle itself ------------------------------------------------------------------------------------------------

# x, y, gamma, smoothing -> loss and gradient at alpha 0.25, from 60-digit arithmetic and differentiation.
KNOWN = [
    (28.0, 1.0, 2.0, 0.0, 8.2642515668875501607e-38, -2.4792754700648364896e-37),
    (-28.0, 0.0, 2.0, 0.0, 2.4792754700662650482e-37, 7.4378264101945094689e-37),
    (28.0, 0.0, 2.0, 0.0, 20.9999999999714781, 0.75000000002748474043),
    (-28.0, 1.0, 3.3, 0.0, 6.9999999999842005958, -0.25000000001522896624),
    (0.0, 1.0, 2.0, 0.0, 0.043321698784996581839, -0.074571698784996581839),
    (0.0, 0.0, 0.5, 0.0, 0.36759680380070519689, 0.35706424389513162087),
    (1.5, 0.3, 1.5, 0.0, 0.3728071829189901677, 0.2073960139838793119),
    (-7.25, 0.75, 5.0, 0.0, 0.48279854921000491508, -0.067663028784985417549),
    (12.0, 1.0, 0.5, 0.0, 3.80747154225848317e-9, -5.7111839196057981677e-9),
    (2.0, 0.0, 2.0, 0.1, 1.1793733726229784564, 0.7645709603803478895),
    (-9.0, 0.0, 3.3, 0.125, 5.3279002698688363964e-14, 1.6989210797738484812e-13),
    (5.0, 0.25, 1.0, 0.125, 1.6801877015306831608, 0.33976754029475298705),
]


@pytest.mark.parametrize("x, y, gamma, smoothing, loss, gradient", KNOWN)
def test_oracle_gives_known_values(
    x: float, y: float, gamma: float, smoothing: float, loss: float, gradient: float
) -> None:
    options = {"gamma": gamma, "label_smoothing": smoothing}
    # 1e-14: a few roundings of 1.1e-16, times gamma * |x| = 92 in the exponent.
    assert element_loss(np.array([x]), y, **options)[0] == pytest.approx(loss, rel=1e-14)
    assert element_gradient(np.array([x]), y, **options)[0][0] == pytest.approx(gradient, rel=2e-14)


def test_oracle_gives_the_papers_example() -> None:
    """Section 3.2: at gamma 2, p_t = 0.9 loses a factor of 100 against cross entropy, and p_t = 0.968 about 1000."""
    logits = np.log(np.array([0.9, 0.968]) / np.array([0.1, 0.032]))
    ratio = element_loss(logits, 1.0, alpha=None, gamma=0.0) / element_loss(logits, 1.0, alpha=None, gamma=2.0)
    assert ratio == pytest.approx([100, 1000], rel=0.03)
    assert ratio[0] == pytest.approx(100, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("y", [0.0, 2.0**-10, 0.3, 0.5, 0.875, 1.0])
def test_oracle_gradient_is_the_derivative_of_its_loss(y: float, gamma: float, smoothing: float) -> None:
    x = np.linspace(-28, 28, 1025).astype(np.longdouble)
    options = {"gamma": gamma, "label_smoothing": smoothing}
    # Fourth-order central differences in extended precision: the step's error is h^4 = 1e-12 times the fifth
    # derivative (below (gamma + 2)^5 = 2e4 times the loss), the rounding error 1e-19 / h of the loss.
    h = np.longdouble(1e-3)
    at = [element_loss(x + i * h, y, **options) for i in (-2, -1, 1, 2)]
    difference = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    gradient, magnitude = element_gradient(x, y, **options)
    scale = magnitude + element_loss(x, y, **options)
    assert np.all(np.abs(gradient - difference) <= 1e-8 * scale)
    assert np.all(np.abs(gradient) <= magnitude * (1 + 1e-15))


def test_oracle_limits() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 1e4, -1e4])
    assert element_loss(x, 0.0)[[0, 1, 3, 4]].tolist() == [np.inf, 0, 7500, 0]
    assert element_loss(x, 1.0)[[0, 1, 3, 4]].tolist() == [0, np.inf, 0, 2500]
    assert element_gradient(x, 0.0)[0][[0, 1, 3, 4]].tolist() == [0.75, 0, 0.75, 0]
    assert element_gradient(x, 1.0)[0][[0, 1, 3, 4]].tolist() == [0, -0.25, 0, -0.25]
    assert np.isnan(element_loss(x, 0.0)[2]) and np.isnan(element_gradient(x, 1.0)[0][2])


# --- accuracy of the backends -----------------------------------------------------------------------------------------

CLASSES = 4


def as_levels(x: Tensor, layout: str) -> list[Tensor]:
    """Every logit in all of CLASSES classes: (1, K, 1, W)."""
    level = x.expand(1, CLASSES, 1, x.numel())
    return [level.contiguous(memory_format=LAYOUTS[layout])]


def hard_problem(values: Tensor, layout: str) -> tuple[list[Tensor], Tensor]:
    """Every value as a negative of each class, then as a positive of one class among negatives."""
    background = torch.full((1, values.numel()), CLASSES, dtype=torch.int64, device=values.device)
    foreground = torch.arange(values.numel(), device=values.device)[None] % CLASSES
    return as_levels(torch.cat([values, values]), layout), torch.cat([background, foreground], dim=1)


def grid(points: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """|x| <= 28, densely, and the neighbourhood of 0; steps that no power of two divides fill the mantissa."""
    tiny = torch.tensor([0.0, -0.0, 1e-3, -1e-3, 1e-7, -1e-7, 1e-30, -1e-30, 1e-42, -1e-42], dtype=torch.float64)
    return torch.cat([torch.linspace(-28, 28, points, dtype=torch.float64), tiny]).to(device=device, dtype=dtype)


def losses_and_gradients(levels: list[Tensor], targets: Tensor | list[Tensor], **options: object) -> None:
    """Element by element: the loss unreduced, the gradient of the plain sum."""
    options = {"num_classes": CLASSES, "normalizer": None, **options}
    relative = tolerance(levels[0].dtype, float(options.get("gamma", 2.0)), options=False)  # type: ignore[arg-type]
    with torch.no_grad():
        losses = loss_function(options)(levels, targets, reduction="none", **options)
    _, grads = run(levels, targets, reduction="sum", **options)
    # A smoothed target's cross entropy, and gamma times it in the gradient, multiply a (1 - p_t)^gamma that may have
    # been flushed: by at most gamma * |x| = 140. Hard targets never meet a factor above 1 there.
    flushed = 140.0 if options.get("label_smoothing") else 1.0
    compare(losses, grads, expect(levels, targets, reduction="none", **options), relative, flushed=flushed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_labels(backend: Backend, dtype: torch.dtype, gamma: float, layout: str) -> None:
    levels, labels = hard_problem(grid(backend.sized(8191, 499), dtype, backend.device), layout)
    losses_and_gradients(levels, labels, gamma=gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_soft_targets(backend: Backend, dtype: torch.dtype, gamma: float) -> None:
    """Targets at both ends, next to them (where p + y - 2py would cancel) and between."""
    x = grid(backend.sized(2047, 199), dtype, backend.device)
    targets = torch.tensor([0.0, 2.0**-20, 0.125, 0.5, 0.75, 1 - 2.0**-7, 1.0, 0.3], dtype=dtype)
    targets = targets.to(backend.device).repeat_interleave(x.numel())
    level = as_levels(x.repeat(8), "planes")
    losses_and_gradients(level, [targets.expand(level[0].shape).contiguous()], gamma=gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", list(SIXTEEN_BIT), ids=str)
def test_accuracy_of_16_bit_logits_before_rounding(backend: Backend, dtype: torch.dtype, gamma: float) -> None:
    """A loss is float32 whatever the logits are: an image for each value shows what a stored gradient rounds away."""
    values = grid(backend.sized(4096, 500), dtype, backend.device).unique()
    level = values.view(-1, 1, 1, 1).expand(-1, 8, 1, 1).contiguous()
    label = (torch.arange(len(values), device=backend.device) % 2 * 8).view(-1, 1)  # positive, background
    options = {"num_classes": 8, "gamma": gamma, "normalizer": None, "reduction": "image"}
    loss = fastfocal.focal_loss([level], label, **options)
    assert_close(loss, expect([level], label, **options).loss, tolerance(dtype, gamma))


@pytest.mark.parametrize("gamma", (0.0, 2.0, 3.3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_accuracy_with_label_smoothing(backend: Backend, dtype: torch.dtype, gamma: float) -> None:
    levels, labels = hard_problem(grid(backend.sized(4095, 199), dtype, backend.device), "planes")
    losses_and_gradients(levels, labels, gamma=gamma, label_smoothing=0.125)


@pytest.mark.parametrize("form", ["hard", "soft", "hard_smoothed", "soft_smoothed", "star"])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 2.7, 4.4, 7.0, 10.0])
def test_accuracy_at_any_gamma(backend: Backend, gamma: float, form: str, generator: torch.Generator) -> None:
    """Half of the logits where (1 - p_t)^gamma is near float32's least number: there its exponent's rounding weighs most."""
    points = backend.sized(1 << 18, 1 << 11)
    x = 56 * torch.rand(points, generator=generator) - 28
    far = (87 - 30 * torch.rand(points, generator=generator)) / gamma
    x = torch.cat([x, torch.where(x < 0, -far, far).clamp(-28, 28)]).to(backend.device)
    drawn = torch.rand(4, len(x), generator=generator)
    # At an end, at it but for what a logit of 28 sees, next to the other end, and anywhere.
    near = torch.stack([drawn[0].round(), torch.exp(-28 * drawn[1]), 1 - torch.exp(-16 * drawn[2]), drawn[3]])
    y = near.gather(0, torch.randint(4, (1, len(x)), generator=generator))[0].to(backend.device)
    level = x.view(1, 1, 1, -1)
    options = {"num_classes": 1, "gamma": gamma, "normalizer": None}
    targets = [y.view(level.shape)] if form.startswith("soft") else [(y < 0.5).long()[None]]
    if form == "star":
        options["beta"] = 1.0
    if form.endswith("smoothed"):
        options["label_smoothing"] = 0.1
    losses_and_gradients([level], targets, **options)


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("gamma", [1e-30, 1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_far_logits_keep_what_smoothing_leaves_them(
    backend: Backend, dtype: torch.dtype, gamma: float, form: str
) -> None:
    """e^(-gamma |x|) |x| is far from 0 where e^-|x| is 0: beyond 87.3 in float32, beyond 708 in float64."""
    x = torch.logspace(np.log10(60), np.log10(min(80 / gamma, 8e29)), 1025, dtype=torch.float64).to(dtype)
    x = torch.cat([x, -x]).to(backend.device)
    y = torch.tensor([0.0, 1.0, 0.5, 0.125], dtype=dtype, device=backend.device).repeat_interleave(len(x))
    level = x.repeat(4).view(1, 1, 1, -1)
    soft = [y.view(level.shape)]
    hard = [(1 - y.round()).long()[None]]  # label 1 is background
    losses_and_gradients([level], soft if form == "soft" else hard, num_classes=1, gamma=gamma, label_smoothing=0.1)


@pytest.mark.parametrize("form", ["labels", "smoothed", "soft", "star"])
@pytest.mark.parametrize("gamma", [2.0, 3.3, 5.0, 20.0])
def test_what_becomes_zero(backend: Backend, gamma: float, form: str) -> None:
    """A factor below 1.2e-38, the least normal number: (1 - p_t)^gamma, e^z of the star. What multiplies it is no matter.

    gamma 5, smoothing 0.3, x -17.5: the factor is 1e-38, the loss 2.6 times that and the gradient 13 times, before the weight.
    """
    weight = 1e6
    level = torch.linspace(-28, 28, backend.sized(8192, 1024), device=backend.device).view(1, 1, 1, -1)
    y = torch.zeros_like(level)
    targets = [y] if form == "soft" else [torch.ones(1, level.numel(), dtype=torch.int64, device=backend.device)]
    options = {"num_classes": 1, "gamma": gamma, "alpha": None, "normalizer": None, "loss_weight": weight}
    x = level.double().cpu().numpy()
    factor = np.exp(-gamma * np.logaddexp(0, -x))
    if form == "smoothed":
        options["label_smoothing"] = 0.3
    if form == "star":
        options["beta"] = 1.0
        factor = np.exp(np.minimum(gamma * x - 1, 0))
    with torch.no_grad():
        (loss,) = loss_function(options)([level], targets, reduction="none", **options)
    _, (grad,) = run([level], targets, reduction="sum", **options)
    expected = expect([level], targets, reduction="none", **options)
    for found, want, size in ((loss, *2 * (expected.loss[0],)), (grad, expected.grads[0], expected.magnitudes[0])):
        found = found.double().cpu().numpy()
        multiplied = size / factor  # what is left out of a factor of 1.2e-38 is that times this
        # 5e-7: a rounding of the weight, of the product, and of what comes before.
        bound = (tolerance(torch.float32, gamma) + 5e-7) * size + SMALLEST[torch.float32] * (1 + multiplied)
        assert (np.abs(found - want) <= bound).all()
        assert gamma == 2 or (found == 0).any()


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, [0.0, 0.125, 0.5, 1.0]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_at_the_ends_of_alpha(backend: Backend, layout: str, alpha: float | list[float] | None) -> None:
    levels, labels = hard_problem(grid(backend.sized(1023, 199), torch.float32, backend.device), layout)
    losses_and_gradients(levels, labels, alpha=alpha)


# --- limits -----------------------------------------------------------------------------------------------------------

# exp overflows float32 beyond 88.7 and underflows beyond -87.3 (-103.97 with subnormals), float64 at 709.8 and -745.2;
# 1e4 is far beyond every threshold and still finite in float16; mmcv's kernel fails from 17, float16's exp at 11.1.
FAR = [11.0, 17.0, 29.0, 60.0, 87.5, 88.8, 104.0, 150.0, 708.0, 710.0, 746.0, 1e4]


def limit_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    far = [*FAR, float(torch.finfo(dtype).max), float("inf")]
    values = [sign * value for value in far for sign in (1.0, -1.0)]
    # One NaN amid ordinary neighbours, so that a NaN that spreads within a vector shows.
    return torch.tensor([*values, 0.5, float("nan"), -0.5, 1.0, 2.0, -3.0], dtype=dtype, device=device)


@pytest.mark.parametrize("smoothing", [0.0, 0.125])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_labels(backend: Backend, dtype: torch.dtype, layout: str, gamma: float, smoothing: float) -> None:
    """The oracle gives the loss's limit and a finite gradient for every logit but NaN, and NaN for NaN alone."""
    levels, labels = hard_problem(limit_values(dtype, backend.device), layout)
    options = {"gamma": gamma, "label_smoothing": smoothing, "num_classes": CLASSES}
    losses_and_gradients(levels, labels, **options)
    expected = expect(levels, labels, **options)
    nan = np.isnan(levels[0].double().cpu().numpy())
    assert np.array_equal(np.isfinite(expected.grads[0]), ~nan)
    assert fastfocal.focal_loss(levels, labels, **options).isnan()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_soft_targets(backend: Backend, dtype: torch.dtype, gamma: float) -> None:
    x = limit_values(dtype, backend.device)
    targets = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype, device=backend.device).repeat_interleave(x.numel())
    level = as_levels(x.repeat(4), "planes")
    losses_and_gradients(level, [targets.expand(level[0].shape).contiguous()], gamma=gamma)


@pytest.mark.parametrize("form", ["labels", "soft"])
@pytest.mark.parametrize("gamma", [1e15, 1e20, 1e39])  # the last is infinite in float32
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_huge_gamma_makes_no_nan(backend: Backend, dtype: torch.dtype, gamma: float, form: str) -> None:
    x = torch.linspace(-28, 28, 8192, dtype=torch.float64).to(device=backend.device, dtype=dtype).view(1, -1, 1)
    index = torch.arange(8192, device=backend.device).view(1, -1)
    labels, soft = index % 3 - 1, [(index.view(x.shape) % 5 / 4).to(dtype)]  # labels: ignored, class 0, background
    targets = labels if form == "labels" else soft
    loss, (grad,) = run([x], targets, num_classes=1, gamma=gamma, normalizer=None, reduction="sum")
    assert not loss.isnan() and not grad.isnan().any()
    if form == "labels":
        assert not grad[index % 3 == 0].any()


@pytest.mark.parametrize("gamma", [1e3, 1e10, 1e20])
def test_accuracy_where_a_large_gamma_leaves_something(backend: Backend, gamma: float) -> None:
    """(1 - p_t)^gamma is neither 0 nor 1 for logits around log(gamma), where the oracle rounds 1 - p_t to 1."""
    x = (np.log(gamma) + torch.linspace(-1, 3, 257, dtype=torch.float64)).float()
    level = x.to(backend.device).view(1, 1, 1, -1)
    labels = torch.ones(1, 257, dtype=torch.int64, device=backend.device)  # background
    options = {"num_classes": 1, "gamma": gamma, "alpha": None, "normalizer": None}
    with torch.no_grad():
        (loss,) = fastfocal.focal_loss([level], labels, reduction="none", **options)
    _, (grad,) = run([level], labels, reduction="sum", **options)
    e = torch.exp(-x.double())
    power, cross_entropy = torch.exp(-gamma * torch.log1p(e)), x.double() + torch.log1p(e)
    slope = power * (gamma * e / (1 + e) * cross_entropy + 1 / (1 + e))
    for found, expected in ((loss, power * cross_entropy), (grad, slope)):
        torch.testing.assert_close(
            found.cpu().double().flatten(), expected, rtol=tolerance(torch.float32, gamma), atol=0
        )


@pytest.mark.parametrize("gamma", [1e-38, 3e-31, 1e-30, 1e-23])
def test_accuracy_of_a_tiny_gamma_with_far_logits(backend: Backend, gamma: float) -> None:
    """Smoothing leaves far logits a loss, so that gamma times a logit is not nothing. Up to 80: float32 has e^-80."""
    x = torch.logspace(18, min(29.9, np.log10(80 / gamma)), 257, dtype=torch.float64)
    levels, labels = hard_problem(torch.cat([x, -x]).to(device=backend.device, dtype=torch.float32), "planes")
    losses_and_gradients(levels, labels, gamma=gamma, label_smoothing=0.125)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_zero_alpha_beats_an_infinite_logit(backend: Backend, alpha: float) -> None:
    """alpha_t = 0 makes the loss 0 for every finite logit, so its limit is 0 and not 0 * inf."""
    values = torch.tensor([float("inf"), -float("inf"), 1e4, -1e4, 1.0], device=backend.device)
    levels, labels = hard_problem(values, "planes")
    losses_and_gradients(levels, labels, alpha=alpha)
    loss = fastfocal.focal_loss(levels, labels, alpha=alpha, num_classes=CLASSES, reduction="level")
    assert not loss.isnan().any()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e4])
def test_a_sum_with_an_infinite_loss_is_infinite(backend: Backend, value: float) -> None:
    """Compensated sums turn inf into NaN unless they take care."""
    x = torch.full((1, 1, 3, 5), 0.5, device=backend.device)
    x[0, 0, 1, 2] = value
    labels = torch.ones(1, 15, dtype=torch.int64, device=backend.device)
    labels[0, 7] = 0 if value < 0 else 1
    for reduction in ("sum", "level", "image", "mean"):
        loss = fastfocal.focal_loss(x, labels, num_classes=1, reduction=reduction)
        assert_close(loss, expect(x, labels, num_classes=1, reduction=reduction).loss, tolerance(x.dtype, 2.0))


@pytest.mark.parametrize("dtype", list(SIXTEEN_BIT), ids=str)
def test_sixteen_bit_sums_are_float32(backend: Backend, dtype: torch.dtype) -> None:
    """A float16 sum would overflow: 40000 logits of 20 lose 15 each, 6e5 together."""
    x = torch.full((1, 1, 200, backend.sized(200, 30)), 20.0, dtype=dtype, device=backend.device)
    labels = torch.ones(1, x.numel(), dtype=torch.int64, device=backend.device)
    loss = fastfocal.focal_loss(x, labels, num_classes=1, normalizer=None)
    assert loss.dtype == torch.float32
    assert_close(loss, expect(x, labels, num_classes=1, normalizer=None).loss, tolerance(dtype, 2.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_losses_survive_large_sums(backend: Backend, layout: str) -> None:
    """A positive's own loss is exact even where it is a billionth of what it would lose as a negative."""
    x = torch.full((1, CLASSES, 1, 64), 20.0).contiguous(memory_format=LAYOUTS[layout]).to(backend.device)
    labels = torch.full((1, 64), 2, device=backend.device)
    # Only class 2 counts: alpha 1 leaves positives alone.
    loss = fastfocal.focal_loss([x], labels, num_classes=CLASSES, alpha=1.0)
    assert_close(loss, expect([x], labels, num_classes=CLASSES, alpha=1.0).loss, tolerance(x.dtype, 2.0))
    assert 0 < loss.item() < 1e-24


@pytest.mark.parametrize("gamma", [1e8, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("target", ["labels", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_at_any_gamma_and_smoothing(
    backend: Backend, dtype: torch.dtype, target: str, gamma: float
) -> None:
    """Smoothing leaves far logits a cross entropy of any size; q^gamma is 0 there, and gamma times the other is no infinity."""
    values = [s * v for s in (1, -1) for v in (0, 1, 1e3, 1e10, 1e20, 1e30, 3e38, float("inf"))]
    x = torch.tensor(values, dtype=dtype, device=backend.device)[:, None]
    for y in (0, 1):
        targets = torch.full((len(x),), 1 - y, device=backend.device) if target == "labels" else torch.full_like(x, y)
        leaf = x.clone().requires_grad_()
        options = {"label_smoothing": 0.1, "gamma": gamma, "normalizer": None, "num_classes": 1}
        fastfocal.focal_loss(leaf, targets, **options).backward()  # type: ignore[call-overload]
        assert leaf.grad is not None and leaf.grad.isfinite().all(), leaf.grad.flatten()
