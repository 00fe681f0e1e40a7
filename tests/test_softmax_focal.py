"""Softmax focal loss: every layout, dtype, reduction and gradient mode against float64; gamma 0 against cross_entropy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    FORMS,
    FOUR_D,
    IGNORED,
    SIXTEEN_BIT,
    THREE_D,
    TWO_D,
    Backend,
    Size,
    arrange,
    assert_close,
    assert_names,
    draw_levels,
    lay_out,
    leaves,
    move,
    same_bits,
    to_numpy,
    tolerance,
)
from oracle import Array
from oracle_softmax import softmax_focal
from torch import Tensor, nn

import fastfocal
from fastfocal import FastSoftmaxFocalLoss, reference, softmax_focal_loss

IGNORE = -7
SMALL = Size(2, 2, 5, ((5, 3), (1, 1), (4, 4)))
# Longer than a vector, a block of rows and a block of cells; a row beyond a vector's end.
WIDE = Size(2, 1, 21, ((17, 23), (3, 5)))
DETECTOR = Size(2, 3, 80, ((9, 12), (5, 6)))


def draw_labels(levels: list[Tensor], size: Size, generator: torch.Generator, ignored: float = 0.1) -> list[Tensor]:
    """(N, M) a level: half of them the class that the logits favour, some ignored."""
    labels = []
    for x, m in zip(levels, size.level_anchors(), strict=True):
        label = torch.randint(size.classes, (size.images, m), generator=generator)
        favoured = torch.rand(label.shape, generator=generator) < 0.5
        label[favoured] = torch.from_numpy(rows_of(x, size).argmax(-1))[favoured]
        label[torch.rand(label.shape, generator=generator) < ignored] = IGNORED
        labels.append(label)
    return labels


def rows_of(x: Tensor, size: Size) -> Array:
    """Logits, or what is shaped as they are, as (N, M, K) in float64."""
    values = to_numpy(x)
    if values.ndim == 4:
        n, c, h, w = values.shape
        values = values.reshape(n, c // size.classes, size.classes, h, w).transpose(0, 3, 4, 1, 2)
    return np.asarray(values, dtype=np.float64).reshape(size.images, -1, size.classes)


def expected(levels: list[Tensor], labels: list[Tensor], size: Size, factors: list[Array], **options: Any) -> Any:
    """(losses (N, M), gradients (N, M, K), magnitudes) a level; factors: (N, M), what each anchor's loss is multiplied by."""
    found = []
    for x, label, factor in zip(levels, labels, factors, strict=True):
        rows = rows_of(x, size)
        parts = softmax_focal(rows.reshape(-1, size.classes), label.numpy().reshape(-1), **options)
        loss, gradient, magnitude = (part.reshape(*label.shape, *part.shape[1:]) for part in parts)
        column = factor[..., None]
        found.append((factor * loss, column * gradient, np.abs(column) * magnitude))
    return found


def check(
    backend: Backend,
    size: Size,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    form: str = "nm",
    gamma: float = 2.0,
    detached: bool = False,
    weighted: bool = False,
    reduction: str = "sum",
    mode: str = "auto",
    background: int | None = None,
    normalizer: Any = None,
    shift: float = 0.0,
) -> None:
    levels = [x + shift for x in draw_levels(size, generator, dtype=dtype)]
    rank = {"2": 2, "3": 3}.get(layout[0], 4)
    levels = [lay_out(x, size, hw, layout) for x, hw in zip(levels, size.cells, strict=True)]
    labels = draw_labels(levels, size, generator)
    given = [torch.where(label == IGNORED, IGNORE, label) for label in labels]
    level_weights = [0.5 + i for i in range(len(levels))]
    class_weight = [0.5 + k / size.classes for k in range(size.classes)] if weighted else None
    weight = [torch.rand(label.shape, generator=generator) + 0.5 for label in labels] if weighted else None
    options: dict[str, Any] = {"gamma": gamma, "detach_modulating_factor": detached, "ignore_index": IGNORE}
    options |= {"num_classes": size.classes, "class_weight": class_weight, "level_weights": level_weights}
    options |= {"background_index": background, "reduction": reduction, "normalizer": normalizer, "grad_mode": mode}

    inputs = leaves(move(levels, backend.device))
    targets = move(arrange(given, size, form, rank=rank), backend.device)
    weights = None if weight is None else move(arrange(weight, size, form, rank=rank), backend.device)
    used = [x * 1 for x in inputs] if mode == "inplace" else inputs
    losses = softmax_focal_loss(used, targets, weight=weights, **options)
    parts = losses if isinstance(losses, list) else [losses]
    incoming = [torch.rand(part.shape, generator=generator, dtype=torch.float64) + 0.5 for part in parts]
    gradients = torch.autograd.grad(parts, inputs, [g.to(p) for g, p in zip(incoming, parts, strict=True)])

    counted = [(label != IGNORED).numpy() for label in labels]
    positive = [kept & (label.numpy() != background) for kept, label in zip(counted, labels, strict=True)]
    divisor = np.ones(size.images)
    if reduction == "mean":
        divisor *= max(1, sum(int(kept.sum()) for kept in counted))
    elif normalizer == "positives":
        divisor *= max(1, sum(int(p.sum()) for p in positive))
    elif normalizer == "positives_per_image":
        divisor = size.images * np.maximum(1, sum(p.sum(1) for p in positive)).astype(float)
    factors = []
    for i, label in enumerate(labels):
        factor = np.full(label.shape, level_weights[i]) / divisor[:, None]
        factors.append(factor if weight is None else factor * weight[i].double().numpy())
    right = expected(
        levels,
        [torch.where(label == IGNORED, -1, label) for label in labels],
        size,
        factors,
        gamma=gamma,
        detached=detached,
        class_weight=None if class_weight is None else np.asarray(class_weight),
    )

    relative = tolerance(dtype, gamma)
    if reduction == "none":
        for i, (part, (loss, _, _)) in enumerate(zip(parts, right, strict=True)):
            assert part.dtype == dtype
            h, w = size.cells[i]
            of_cells = (size.images, h, w, size.anchors) if size.anchors > 1 else (size.images, h, w)
            assert part.shape == (of_cells if rank == 4 else loss.shape if rank == 3 else loss.shape[1:])
            assert_close(part.detach().reshape(loss.shape), loss, relative, what=f"losses of level {i}")
    else:
        sums = {
            "level": lambda: np.array([loss.sum() for loss, _, _ in right]),
            "image": lambda: sum(loss.sum(1) for loss, _, _ in right),
        }.get(reduction, lambda: np.array(sum(loss.sum() for loss, _, _ in right)))()
        assert parts[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(parts[0].detach(), sums, relative, what="loss")
    for i, (g, (_, gradient, magnitude)) in enumerate(zip(gradients, right, strict=True)):
        assert g.dtype == dtype
        if reduction == "none":
            came = incoming[i].to(dtype).double().numpy().reshape(gradient.shape[:2])[..., None]
        else:
            number = incoming[0].numpy()
            came = number[i] if reduction == "level" else number[:, None, None] if reduction == "image" else number
        # A saved 16-bit gradient is rounded once more when it meets the incoming one: half a unit of its own, times that, is up
        # to a whole one of the result.
        roundings = 3.0 if dtype in SIXTEEN_BIT else 1.0
        got = torch.from_numpy(rows_of(g, size)).to(dtype)
        assert_close(
            got, came * gradient, relative, magnitude=np.abs(came) * magnitude, roundings=roundings, what=f"level {i}"
        )


# --- the kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*FOUR_D, *THREE_D])
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(backend, SMALL, generator, dtype=dtype, layout=layout)


@pytest.mark.parametrize("layout", TWO_D)
def test_rows_alone(backend: Backend, layout: str, generator: torch.Generator) -> None:
    check(backend, Size(1, 1, 13, ((9, 7), (1, 2))), generator, layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("detached", [False, True])
def test_gamma(backend: Backend, layout: str, gamma: float, detached: bool, generator: torch.Generator) -> None:
    size = backend.sized(WIDE, Size(1, 1, 21, ((5, 9),)))
    check(backend, size, generator, layout=layout, gamma=gamma, detached=detached)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "level", "image", "none"])
def test_reductions(backend: Backend, layout: str, mode: str, reduction: str, generator: torch.Generator) -> None:
    check(backend, SMALL, generator, layout=layout, mode=mode, reduction=reduction, weighted=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_each_anchors_loss(backend: Backend, mode: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    for layout, size in product(("contiguous", "channels_last", "3d"), (SMALL, Size(2, 1, 3, ((4, 5),)))):
        check(backend, size, generator, dtype=dtype, layout=layout, mode=mode, reduction="none")


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels_and_weights(backend: Backend, form: str, generator: torch.Generator) -> None:
    for layout in ("contiguous", "channels_last"):
        check(backend, SMALL, generator, layout=layout, form=form, weighted=True)


# Classes: one; fewer than any vector has lanes; around those of each; a block's; beyond a block, in parts.
CLASSES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 91, 161, 330, 700, 1203)


@pytest.mark.parametrize("layout", ["contiguous", "3d"])
@pytest.mark.parametrize("classes", CLASSES)
def test_numbers_of_classes(backend: Backend, layout: str, classes: int, generator: torch.Generator) -> None:
    cells = backend.sized((9, 11), (3, 2))
    check(backend, Size(1, 1, classes, (cells, (1, 1))), generator, layout=layout, weighted=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
def test_a_vocabulary(backend: Backend, layout: str, mode: str, generator: torch.Generator) -> None:
    """More than the buffers hold, and more than int16 does."""
    for classes, cells in ((13_204, backend.sized((5, 14), (1, 3))), (40_000, (1, 2))):
        check(backend, Size(1, 1, classes, (cells,)), generator, layout=layout, mode=mode, reduction="image")


@pytest.mark.parametrize("layout", ["contiguous", "3d"])
def test_a_detectors_pyramid(backend: Backend, layout: str, generator: torch.Generator) -> None:
    size = backend.sized(DETECTOR, Size(2, 3, 80, ((3, 4), (1, 2))))
    check(backend, size, generator, layout=layout, weighted=True, normalizer="positives_per_image", background=79)


@pytest.mark.parametrize("layout", ["contiguous", "3d"])
@pytest.mark.parametrize("shift", [-5000.0, -95.0, -30.0, 40.0, 70.0, 90.0, 5000.0])
def test_logits_far_from_0(backend: Backend, layout: str, shift: float, generator: torch.Generator) -> None:
    """The differences are what they were; as float32 has them, which the oracle reads. In parts of classes too."""
    for size in (Size(1, 1, 21, ((6, 7),)), Size(1, 1, 1203, ((1, 3),))):
        check(backend, size, generator, layout=layout, shift=shift)


def test_more_levels_than_a_launch_takes(backend: Backend, generator: torch.Generator) -> None:
    check(backend, Size(2, 1, 4, ((2, 2),) * 19), generator, reduction="level", normalizer="positives")


def test_empty_levels_and_no_images(backend: Backend) -> None:
    for shape in ((0, 6, 2, 2), (2, 6, 0, 3)):
        x = torch.zeros(shape, device=backend.device, requires_grad=True)
        labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.long, device=backend.device)
        for reduction in ("sum", "mean", "none"):
            loss = softmax_focal_loss(x, labels, num_classes=6, reduction=reduction)
            (g,) = torch.autograd.grad(loss.sum(), x)
            assert float(loss.detach().sum()) == 0 and g.shape == x.shape


# --- what it has to equal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weighted", [False, True])
def test_gamma_0_is_cross_entropy(
    backend: Backend, memory_format: torch.memory_format, weighted: bool, generator: torch.Generator
) -> None:
    x = 4 * torch.randn(2, 19, 9, 7, generator=generator, dtype=torch.float64)
    x = x.to(backend.device).contiguous(memory_format=memory_format).requires_grad_()
    y = torch.randint(19, (2, 9, 7), generator=generator).to(backend.device)
    y[0, :2] = 255
    weight = torch.rand(19, generator=generator, dtype=torch.float64).to(backend.device) if weighted else None
    for reduction in ("sum", "none", "mean"):
        theirs = nn.functional.cross_entropy(x, y, weight=weight, ignore_index=255, reduction=reduction)
        # torch's weighted mean divides by the weights, as the docstring says.
        normalizer = weight[y[y != 255]].sum() if weighted and reduction == "mean" else None
        ours = softmax_focal_loss(
            x,
            y,
            num_classes=19,
            gamma=0.0,
            ignore_index=255,
            class_weight=weight,
            normalizer=normalizer,
            reduction="sum" if normalizer is not None else reduction,
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)  # a dozen roundings of 1e-16
        g = torch.autograd.grad(ours.sum(), x)[0]
        torch.testing.assert_close(g, torch.autograd.grad(theirs.sum(), x)[0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"gamma": 0.0}, {"detach_modulating_factor": True}])
def test_the_reference_says_the_same(options: dict[str, Any], generator: torch.Generator) -> None:
    levels = draw_levels(SMALL, generator, dtype=torch.float64)
    labels = [label.clamp(min=0) for label in draw_labels(levels, SMALL, generator)]
    labels[0][0, :3] = IGNORE
    for reduction, normalizer, background in (
        ("sum", "positives", 2),
        ("sum", "positives", None),
        ("image", "positives_per_image", 0),
        ("mean", "positives", None),
        ("level", None, None),
        ("none", None, 4),
    ):
        more: dict[str, Any] = {"reduction": reduction, "normalizer": normalizer, "background_index": background}
        more |= {"class_weight": [1.0, 2.0, 0.0, 0.5, 3.0], "ignore_index": IGNORE, "num_classes": 5, **options}
        found = []
        for function in (softmax_focal_loss, reference.softmax_focal_loss):
            inputs = leaves(levels)
            loss = function(inputs, labels, **more)
            parts = loss if isinstance(loss, list) else [loss]
            found.append([*parts, *torch.autograd.grad([part.sum() for part in parts], inputs)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma: float, generator: torch.Generator) -> None:
    x = torch.randn(2, 6, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (2, 2, 2, 2), generator=generator)
    for reduction in ("sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x: softmax_focal_loss(x, y, num_classes=3, gamma=gamma, reduction=reduction),  # noqa: B023
            x,
            check_forward_ad=True,
            check_batched_grad=False,
        )


def test_the_gradient_of_an_anchor_adds_up_to_0(backend: Backend, generator: torch.Generator) -> None:
    x = draw_levels(WIDE, generator)[1].to(backend.device).requires_grad_()
    y = torch.randint(21, (2, 3, 5), generator=generator).to(backend.device)
    (g,) = torch.autograd.grad(softmax_focal_loss(x, y, num_classes=21), x)
    # 21 roundings of the greatest.
    assert float((g.sum(1).abs() / g.abs().amax(1)).max()) < 21 * 6e-8


# --- the edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "cells"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [5, 21, 1203])
def test_infinite_logits(backend: Backend, layout: str, gamma: float, classes: int) -> None:
    """(logits of classes 1 and 2 beside zeros, label) -> p of the label, which is the limit; the gradient is finite."""
    inf = float("inf")
    k = classes - 2
    share = 1 / (k + 1)
    cases = [
        ((-inf, 0.0), 0, share),  # as if it were not there
        ((-inf, 0.0), 1, 0.0),
        ((inf, 0.0), 0, 0.0),
        ((inf, 0.0), 1, 1.0),
        ((inf, inf), 1, 0.5),  # each has its share
        ((-inf, -inf), 0, 1 / k),
    ]
    x = torch.zeros(len(cases) + 2, classes)
    for row, ((first, second), _, _) in enumerate(cases):
        x[row, 1], x[row, 2] = first, second
    x[-2], x[-1] = -inf, inf
    labels = torch.tensor([label for _, label, _ in cases] + [0, 0])
    p = np.array([p for _, _, p in cases] + [1 / classes] * 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.where(p == 1, 0.0, -((1 - p) ** gamma) * np.log(p))
    if layout == "cells":
        given, targets = x.t().reshape(1, classes, 1, -1).contiguous(), labels.reshape(1, 1, -1)
    else:
        given, targets = x, labels
    given = given.to(backend.device).requires_grad_()
    loss = softmax_focal_loss(
        given,
        targets.to(backend.device),
        num_classes=classes,
        gamma=gamma,
        ignore_index=IGNORE,
        normalizer=None,
        reduction="none",
    )
    assert_close(loss.detach().reshape(-1), want, 1e-5)  # 1 - p is 1e-3 here and rounded in p
    (g,) = torch.autograd.grad(
        softmax_focal_loss(given, targets.to(backend.device), num_classes=classes, gamma=gamma), given
    )
    assert bool(g.isfinite().all())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("classes", [5, 33, 700])
def test_nan_stays_with_its_anchor(backend: Backend, layout: str, classes: int, generator: torch.Generator) -> None:
    size = Size(1, 1, classes, ((4, 5),))
    (clean,) = draw_levels(size, generator)
    x = clean.clone()
    x[0, 3, 1, 1] = float("nan")
    y = torch.randint(classes, (1, 20), generator=generator)
    found = []
    for logits in (clean, x):
        logits = lay_out(logits, size, (4, 5), layout).to(backend.device).requires_grad_()
        loss = softmax_focal_loss(logits, y.to(backend.device), num_classes=classes, reduction="none")
        (g,) = torch.autograd.grad(loss.sum(), logits)
        found.append((to_numpy(loss).reshape(20), rows_of(g, size)[0]))
    others = np.arange(20) != 6
    for fine, spoilt in zip(*found, strict=True):
        assert np.isnan(spoilt[6]).all() and np.array_equal(fine[others], spoilt[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("classes", [5, 33, 700, 11_000])
def test_ignored_anchors_leave_no_trace(
    backend: Backend, mode: str, classes: int, value: float, generator: torch.Generator
) -> None:
    for shape, targets in (((1, classes, 2, 3), (1, 2, 3)), ((6, classes), (6,))):
        x = torch.randn(shape, generator=generator)
        y = torch.randint(classes, targets, generator=generator)
        y.view(-1)[[1, 4]] = IGNORE
        results = []
        for fill in (0.0, value):
            filled = x.clone()
            (filled[0, :, 0, 1] if len(shape) == 4 else filled[1]).fill_(fill)
            (filled[0, :, 1, 1] if len(shape) == 4 else filled[4]).fill_(fill)
            leaf = filled.to(backend.device).requires_grad_()
            loss = softmax_focal_loss(
                leaf * 1 if mode == "inplace" else leaf,
                y.to(backend.device),
                num_classes=classes,
                ignore_index=IGNORE,
                grad_mode=mode,
            )
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])
        g = results[1][1]
        assert not (g[0, :, 0, 1] if len(shape) == 4 else g[1]).any()


@pytest.mark.parametrize("incoming", [float("inf"), float("nan"), 1e38])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_zero_stays_zero_beside_any_incoming_gradient(backend: Backend, incoming: float, reduction: str) -> None:
    """An ignored anchor, and one that is certain; as it is where the gradient was saved."""
    x = torch.zeros(1, 3, 1, 3)
    x[0, 0, 0, 1] = 500.0
    y = torch.tensor([[[IGNORE, 0, 1]]])
    found = []
    for mode in ("save", "recompute"):
        leaf = x.clone().to(backend.device).requires_grad_()
        loss = softmax_focal_loss(
            leaf,
            y.to(backend.device),
            num_classes=3,
            ignore_index=IGNORE,
            normalizer=None,
            reduction=reduction,
            grad_mode=mode,
        )
        (g,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))
        assert not g[..., :2].any()
        found.append(g)
    assert torch.equal(found[0].isfinite(), found[1].isfinite())
    assert incoming == 1e38 or not found[0][..., 2].isfinite().any()


def test_the_same_bits_from_any_number_of_threads(backend: Backend, generator: torch.Generator) -> None:
    size = backend.sized(Size(2, 2, 21, ((40, 50), (20, 25))), SMALL)
    levels = leaves(move(draw_levels(size, generator), backend.device))
    labels = move(draw_labels([x.detach().cpu() for x in levels], size, generator, ignored=0), backend.device)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = softmax_focal_loss(levels, labels, num_classes=size.classes)
            found.append([loss.detach(), *torch.autograd.grad(loss, levels)])
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# --- labels and background ----------------------------------------------------------------------------------------------


def test_background_is_a_class_that_does_not_count(backend: Backend, generator: torch.Generator) -> None:
    for normalizer in ("positives", "positives_per_image"):
        for background in (None, 0, 2, 4):
            check(backend, SMALL, generator, background=background, normalizer=normalizer)


def test_labels_of_other_integers(backend: Backend, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 3, 3, generator=generator).to(backend.device)
    y = torch.randint(5, (2, 3, 3), generator=generator)
    losses = [
        softmax_focal_loss(x, y.to(backend.device, kind), num_classes=5, background_index=0, ignore_index=100)
        for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ]
    assert len({float(loss) for loss in losses}) == 1


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_that_is_no_class(label: int) -> None:
    """With a background too: it is one of the classes, and K is none."""
    y = torch.zeros(2, 3, 3, dtype=torch.long)
    y[1, 2, 0] = label
    for background in (None, 0, 3):
        with pytest.raises(ValueError) as caught:
            softmax_focal_loss(torch.zeros(2, 5, 3, 3), y, num_classes=5, background_index=background, ignore_index=255)
        assert_names(str(caught.value), "targets", label, "[1, 2, 0]", "0..4", "ignore_index 255")
        assert "background" not in str(caught.value)


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "facts"),
    [
        ({"background_index": 5}, ValueError, ["background_index", "0..4", 5]),
        ({"background_index": -1, "ignore_index": 255}, ValueError, ["background_index", "0..4"]),
        ({"background_index": 2, "ignore_index": 2}, ValueError, ["ignore_index", 2]),
        ({"gamma": -1.0}, ValueError, ["gamma", "-1.0"]),
        ({"gamma": float("nan")}, ValueError, ["gamma"]),
        ({"class_weight": [1.0] * 4}, ValueError, ["class_weight", 5, 4]),
        ({"class_weight": [[1.0] * 5] * 2}, ValueError, ["class_weight", 5, "two rows"]),
        ({"class_weight": torch.ones(2, 5)}, ValueError, ["class_weight", 5, "two rows"]),
        ({"class_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, ["class_mask", "None"]),
        ({"label_smoothing": 0.1}, TypeError, ["label_smoothing"]),
        ({"alpha": 0.25}, TypeError, ["alpha"]),
        ({"scores": torch.ones(2, 9)}, ValueError, ["scores"]),
        ({"normalizer": "scores"}, ValueError, ["normalizer"]),
    ],
)
def test_arguments_it_refuses(options: dict[str, Any], error: type[Exception], facts: list[object]) -> None:
    x, y = torch.zeros(2, 5, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long)
    for function in (softmax_focal_loss, reference.softmax_focal_loss):
        with pytest.raises(error) as caught:
            function(x, y, **{"num_classes": 5, **options})
        if function is softmax_focal_loss:
            assert_names(str(caught.value), *facts)


def test_soft_targets_are_refused() -> None:
    x = torch.zeros(2, 5, 3, 3)
    for function in (softmax_focal_loss, reference.softmax_focal_loss):
        with pytest.raises(TypeError, match=r"targets: softmax_focal_loss expects integer labels"):
            function(x, x, num_classes=5)


def operator_options(x: Tensor, packed: Tensor, **changes: Any) -> tuple[Any, ...]:
    options = fastfocal.ops.OperatorOptions(
        packed_labels=packed,
        soft_targets=None,
        scores=None,
        anchor_weight=None,
        class_weights=None,
        class_mask=None,
        divisor=None,
        level_scales=[1.0],
        positive_weight=1.0,
        negative_weight=1.0,
        loss=9,
        loss_parameters=[2.0, 0.0],
        first_class=0,
        num_classes=5,
        reduction=0,
    )
    return options.changed(**changes).arguments([1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_parameters": [2.0]}, "loss_parameters: expected 2 numbers"),
        ({"loss_parameters": [-1.0, 0.0]}, "gamma"),
        ({"loss_parameters": [2.0, 0.5]}, "detach_modulating_factor"),
        ({"packed_labels": None, "soft_targets": [torch.zeros(2, 5, 3, 3)]}, "soft_targets"),
        ({"class_mask": torch.ones(2, 5, dtype=torch.bool)}, "class_mask"),
        ({"scores": torch.ones(18)}, "scores"),
    ],
)
def test_the_operator_refuses(changes: dict[str, Any], message: str) -> None:
    x, packed = torch.zeros(2, 5, 3, 3), torch.zeros(18, dtype=torch.int16)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastfocal.pyramid_loss([x], *operator_options(x, packed, **changes))


def test_the_operator_reads_no_class_that_is_not_there(backend: Backend) -> None:
    """Packed labels that pack_labels never makes count as ignored."""
    x = torch.randn(2, 5, 3, 3, device=backend.device)
    packed = torch.tensor([-3, -1, 5, 32767, -32768, 0] * 3, dtype=torch.int16, device=backend.device)
    (loss,), (g,) = fastfocal.ops.operators.pyramid_loss([x], *operator_options(x, packed, reduction=3))
    assert loss.shape == (2, 3, 3) and int(loss.count_nonzero()) == 3
    assert int(g.ne(0).any(1).sum()) == 3


@pytest.mark.parametrize("wrong", [(2, 3, 2), (2, 5, 3, 3)])
def test_the_operator_wants_one_incoming_gradient_per_anchor(wrong: tuple[int, ...]) -> None:
    x, packed = torch.zeros(2, 5, 3, 3), torch.zeros(18, dtype=torch.int16)
    with pytest.raises(RuntimeError, match=r"grad_outputs\[0\]: expected 18 numbers"):
        torch.ops.fastfocal.pyramid_loss_backward([torch.ones(wrong)], [x], *operator_options(x, packed, reduction=3))


# --- the ways in --------------------------------------------------------------------------------------------------------


def test_the_module(generator: torch.Generator) -> None:
    levels = draw_levels(SMALL, generator)
    labels = [label.clamp(min=0) for label in draw_labels(levels, SMALL, generator)]
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    module = FastSoftmaxFocalLoss(5, gamma=1.5, class_weight=weights, background_index=4, detach_modulating_factor=True)
    options: dict[str, Any] = {"num_classes": 5, "gamma": 1.5, "class_weight": weights, "background_index": 4}
    want = softmax_focal_loss(levels, labels, **options, detach_modulating_factor=True)
    assert same_bits(module(levels, labels), want)
    assert "background_index=4" in repr(module) and not list(module.parameters())
    slow = reference.FastSoftmaxFocalLoss(5, gamma=1.5, class_weight=weights, background_index=4)
    torch.testing.assert_close(slow(levels, labels), want)
    with pytest.raises(ValueError, match="background_index"):
        FastSoftmaxFocalLoss(5, background_index=5)


def test_torch_func(generator: torch.Generator) -> None:
    x = torch.randn(2, 6, 3, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (2, 3, 2, 2), generator=generator)

    def mine(x: Tensor) -> Tensor:
        return softmax_focal_loss(x, y, num_classes=3, reduction="none")

    def slow(x: Tensor) -> Tensor:
        return reference.softmax_focal_loss(x, y, num_classes=3, reduction="none")

    tangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.vjp(f, x)[1](torch.ones(2, 3, 2, 2, dtype=torch.float64))[0],
        lambda f: torch.func.jacrev(f)(x),
    ):
        torch.testing.assert_close(transform(mine), transform(slow), rtol=1e-10, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_compile(reduction: str, mode: str, generator: torch.Generator) -> None:
    x = torch.randn(2, 6, 3, 2, generator=generator)
    y = torch.randint(3, (2, 3, 2, 2), generator=generator)

    def call(x: Tensor) -> Tensor:
        return (
            softmax_focal_loss(x, y, num_classes=3, reduction=reduction, grad_mode=mode, background_index=0)
            .square()
            .sum()
        )

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = []
    for function in (call, compiled):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(found[0], found[1])


# --- each instruction set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_each_instruction_set(isa: str, use_operators: Callable[[str], None], generator: torch.Generator) -> None:
    build = importlib.import_module("cpu_isas.build")
    if isa == "avx2" and build.capability() == "default":
        pytest.skip("no AVX2 on this processor")
    build.load()
    use_operators(f"fastfocal_{isa}")
    backend = Backend(isa, torch.device("cpu"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layout, size in product(("contiguous", "3d"), (SMALL, WIDE)):
            check(backend, size, generator, dtype=dtype, layout=layout, weighted=True)
            check(backend, size, generator, dtype=dtype, layout=layout, gamma=1.5, reduction="none")
    for layout in ("contiguous", "3d"):
        for classes in (*CLASSES, 11_000):
            check(backend, Size(1, 1, classes, ((3, 3), (1, 1))), generator, layout=layout)
        for shift in (-95.0, 90.0):
            test_logits_far_from_0(backend, layout, shift, generator)
