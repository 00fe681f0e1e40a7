"""detach_modulating_factor: the same loss, and a gradient that takes (1 - p_t)^gamma for a constant weight."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Backend, Size, check, draw_classes, draw_levels, encode, move, same_bits
from test_formula import GAMMAS, LAYOUTS, as_levels, grid, hard_problem, limit_values, losses_and_gradients
from torch import nn

import fastfocal

SIZE = Size(2, 3, 5, ((7, 5), (3, 3), (1, 1)))
DETACHED = {"detach_modulating_factor": True}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_labels(backend: Backend, dtype: torch.dtype, gamma: float, layout: str) -> None:
    levels, labels = hard_problem(grid(backend.sized(4095, 299), dtype, backend.device), layout)
    losses_and_gradients(levels, labels, gamma=gamma, **DETACHED)


@pytest.mark.parametrize("smoothing", [0.0, 0.125])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accuracy_of_soft_and_smoothed_targets(
    backend: Backend, dtype: torch.dtype, gamma: float, smoothing: float
) -> None:
    x = grid(backend.sized(1023, 99), dtype, backend.device)
    targets = torch.tensor([0.0, 2.0**-20, 0.125, 0.5, 1 - 2.0**-7, 1.0], dtype=dtype)
    targets = targets.to(backend.device).repeat_interleave(x.numel())
    level = as_levels(x.repeat(6), "planes")
    options = {"gamma": gamma, "label_smoothing": smoothing, **DETACHED}
    losses_and_gradients(level, [targets.expand(level[0].shape).contiguous()], **options)
    losses_and_gradients(*hard_problem(x, "planes"), **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.125])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(backend: Backend, dtype: torch.dtype, gamma: float, smoothing: float) -> None:
    levels, labels = hard_problem(limit_values(dtype, backend.device), "planes")
    losses_and_gradients(levels, labels, gamma=gamma, label_smoothing=smoothing, **DETACHED)


@pytest.mark.parametrize("grad_mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_mode(backend: Backend, layout: str, grad_mode: str, generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator, layout=layout)
    labels = encode(draw_classes(SIZE, generator), SIZE.classes)
    levels, labels = move(levels, backend.device), move(labels, backend.device)
    check(levels, labels, num_classes=SIZE.classes, grad_mode=grad_mode, **DETACHED)


@pytest.mark.parametrize("option", ["alpha", "weight", "reduction"])
def test_the_general_path(backend: Backend, option: str, generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator)
    labels = encode(draw_classes(SIZE, generator), SIZE.classes)
    value = {
        "alpha": [0.1, 0.3, 0.5, 0.7, 1.0],
        "weight": [torch.rand(y.shape, generator=generator) for y in labels],
        "reduction": "none",
    }[option]
    levels, labels, value = (move(t, backend.device) for t in (levels, labels, value))
    check(levels, labels, num_classes=SIZE.classes, gamma=1.5, **{option: value}, **DETACHED)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_is_autograds_gradient_of_a_detached_weight(gamma: float) -> None:
    """Written out as RT-DETR does: a weight from detached scores times the cross entropy."""
    x = torch.randn(64, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.arange(64) % 8
    y = nn.functional.one_hot(labels, 8)[:, :-1].double()
    p = x.detach().sigmoid()
    weight = (1 - 0.25) * p**gamma * (1 - y) + 0.25 * (1 - p) ** gamma * y
    expected = nn.functional.binary_cross_entropy_with_logits(x, y, weight=weight, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, x)
    # float64: a few roundings of 1.1e-16, times gamma |x| in the exponent; the sum has 448 terms in another order.
    for module in (fastfocal, fastfocal.reference):
        loss = module.focal_loss(x, labels, gamma=gamma, normalizer=None, **DETACHED)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient, rtol=1e-12, atol=1e-16)


def test_the_loss_is_the_same_and_the_gradient_is_not(generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator)
    labels = torch.cat(encode(draw_classes(SIZE, generator), SIZE.classes), dim=1)
    found = []
    for detach in (False, True):
        inputs = [x.clone().requires_grad_() for x in levels]
        loss = fastfocal.focal_loss(inputs, labels, num_classes=5, detach_modulating_factor=detach)
        found.append((loss, torch.autograd.grad(loss, inputs)[0]))
    assert same_bits(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_compiled_whole(generator: torch.Generator) -> None:
    levels = draw_levels(SIZE, generator)
    labels = torch.cat(encode(draw_classes(SIZE, generator), SIZE.classes), dim=1)
    criterion = fastfocal.FastFocalLoss(5, **DETACHED)
    inputs = [x.clone().requires_grad_() for x in levels]
    torch.compile(criterion, fullgraph=True, backend="aot_eager")(inputs, labels).backward()
    _, grads = check(levels, labels, num_classes=5, **DETACHED)
    for x, grad in zip(inputs, grads, strict=True):  # both float32, each within 2e-6 of float64; here the same kernel
        torch.testing.assert_close(x.grad, grad, rtol=1e-6, atol=0)
