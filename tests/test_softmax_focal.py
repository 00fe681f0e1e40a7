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
from fastfocal.losses.softmax_focal import SoftmaxFocalLoss
from fastfocal.pyramid import pyramid_loss, sort_keywords

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


MASKS = ("plain", "transposed", "strided", "expanded")


def draw_mask(size: Size, generator: torch.Generator, form: str = "plain") -> Tensor:
    """(N, K), half of the classes absent, the last ones in a row; in one of the strides that a mask may have."""
    mask = torch.rand(size.images, size.classes, generator=generator) < 0.6
    mask[:, size.classes - size.classes // 4 :] = False
    mask[0, 0], mask[-1, size.classes // 2] = True, True
    if form == "expanded":
        return mask[:1].expand(size.images, size.classes)
    if form == "transposed":
        return mask.t().contiguous().t()
    if form == "strided":
        apart = torch.ones(size.images + 1, 2 * size.classes + 1, dtype=torch.bool)[1:, 1::2]
        return apart.copy_(mask)
    return mask


NEVER_LOOKED_AT = (float("nan"), float("inf"), -float("inf"), 1e4)


def spoil_absent(levels: list[Tensor], mask: Tensor, size: Size) -> list[Tensor]:
    """Logits (N, A*K, H, W) whose absent classes have, one after the other, what no result may show."""
    wrong = torch.tensor([NEVER_LOOKED_AT[k % 4] for k in range(size.classes)], dtype=torch.float64)
    absent = ~mask.repeat(1, size.anchors)[:, :, None, None]
    column = wrong.repeat(size.anchors)[None, :, None, None]
    return [torch.where(absent, column.to(x.dtype), x) for x in levels]


def expected(
    levels: list[Tensor],
    labels: list[Tensor],
    size: Size,
    factors: list[Array],
    mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """(losses (N, M), gradients (N, M, K), magnitudes) a level; factors: (N, M), what each anchor's loss is multiplied by."""
    found = []
    for x, label, factor in zip(levels, labels, factors, strict=True):
        rows = rows_of(x, size)
        present = None if mask is None else mask.numpy()[:, None].repeat(rows.shape[1], 1).reshape(-1, size.classes)
        parts = softmax_focal(rows.reshape(-1, size.classes), label.numpy().reshape(-1), present=present, **options)
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
    masked: str | None = None,
) -> None:
    levels = [x + shift for x in draw_levels(size, generator, dtype=dtype)]
    rank = {"2": 2, "3": 3}.get(layout[0], 4)
    labels = draw_labels(
        [lay_out(x, size, hw, layout) for x, hw in zip(levels, size.cells, strict=True)], size, generator
    )
    mask = None if masked is None else draw_mask(size, generator, "expanded" if layout == "expanded" else masked)
    if mask is not None:
        levels = spoil_absent(levels, mask, size)
    levels = [lay_out(x, size, hw, layout) for x, hw in zip(levels, size.cells, strict=True)]
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
    if mask is not None:
        options["class_mask"] = move(mask if rank > 2 else mask[0], backend.device)
    losses = softmax_focal_loss(used, targets, weight=weights, **options)
    parts = losses if isinstance(losses, list) else [losses]
    incoming = [torch.rand(part.shape, generator=generator, dtype=torch.float64) + 0.5 for part in parts]
    gradients = torch.autograd.grad(parts, inputs, [g.to(p) for g, p in zip(incoming, parts, strict=True)])

    counted = [(label != IGNORED).numpy() for label in labels]
    positive = [kept & (label.numpy() != background) for kept, label in zip(counted, labels, strict=True)]
    divisor = np.ones(size.images)
    if reduction == "mean":
        if mask is not None:  # an anchor whose class is absent costs nothing, and "mean" does not count it
            there = [mask.gather(1, label.clamp(min=0)).numpy() for label in labels]
            counted = [kept & own for kept, own in zip(counted, there, strict=True)]
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
        mask,
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
        if mask is not None:
            assert not got[~mask[:, None].expand(got.shape)].any()


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


# --- absent classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*FOUR_D, *THREE_D])
def test_masks_in_every_layout(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(backend, SMALL, generator, dtype=dtype, layout=layout, masked="plain")


@pytest.mark.parametrize("layout", TWO_D)
def test_a_mask_of_rows_alone(backend: Backend, layout: str, generator: torch.Generator) -> None:
    check(backend, Size(1, 1, 13, ((9, 7), (1, 2))), generator, layout=layout, masked="plain")


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strides_of_masks(backend: Backend, layout: str, masked: str, generator: torch.Generator) -> None:
    """Read where it lies: also where another mask of the same memory would say otherwise."""
    check(backend, backend.sized(WIDE, SMALL), generator, layout=layout, masked=masked, weighted=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "level", "image", "none"])
def test_masks_of_reductions(
    backend: Backend, layout: str, mode: str, reduction: str, generator: torch.Generator
) -> None:
    for normalizer in (None, "positives", "positives_per_image") if reduction == "sum" else (None,):
        more: dict[str, Any] = {"mode": mode, "reduction": reduction, "normalizer": normalizer, "masked": "plain"}
        check(backend, SMALL, generator, layout=layout, weighted=True, **more)


@pytest.mark.parametrize("layout", ["contiguous", "3d"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0, 5.0])
@pytest.mark.parametrize("detached", [False, True])
def test_masks_beside_any_gamma(
    backend: Backend, layout: str, gamma: float, detached: bool, generator: torch.Generator
) -> None:
    size = backend.sized(WIDE, Size(1, 1, 21, ((5, 9),)))
    check(backend, size, generator, layout=layout, gamma=gamma, detached=detached, masked="plain")


@pytest.mark.parametrize("layout", ["contiguous", "3d"])
@pytest.mark.parametrize("classes", CLASSES)
def test_masks_of_any_number_of_classes(
    backend: Backend, layout: str, classes: int, generator: torch.Generator
) -> None:
    cells = backend.sized((9, 11), (3, 2))
    check(backend, Size(1, 1, classes, (cells, (1, 1))), generator, layout=layout, weighted=True, masked="plain")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
def test_masks_of_a_vocabulary(backend: Backend, layout: str, mode: str, generator: torch.Generator) -> None:
    """Beyond what the buffers hold, for the mask too; and far logits there."""
    for classes, cells in ((13_204, backend.sized((3, 7), (1, 2))), (40_000, (1, 2))):
        for shift in (0.0, 90.0):
            check(
                backend,
                Size(2, 1, classes, (cells,)),
                generator,
                layout=layout,
                mode=mode,
                reduction="image",
                masked="transposed" if mode == "save" else "plain",
                shift=shift,
            )


@pytest.mark.parametrize("layout", ["contiguous", "3d"])
@pytest.mark.parametrize("shift", [-5000.0, -95.0, 70.0, 90.0, 5000.0])
def test_masks_beside_logits_far_from_0(
    backend: Backend, layout: str, shift: float, generator: torch.Generator
) -> None:
    for size in (Size(1, 1, 21, ((6, 7),)), Size(1, 1, 1203, ((1, 3),))):
        check(backend, size, generator, layout=layout, shift=shift, masked="plain")


def filled(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K, H, W) with -inf for absent classes; labels of absent classes ignored."""
    absent = ~mask.gather(1, y.clamp(min=0).flatten(1)).view_as(y)
    return x.masked_fill(~mask[:, :, None, None], -float("inf")), torch.where(absent, IGNORE, y)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_mask_is_logits_of_minus_infinity(backend: Backend, gamma: float, generator: torch.Generator) -> None:
    """PyTorch's own softmax and its derivative, with gamma 0 its cross_entropy."""
    x = (4 * torch.randn(2, 19, 5, 7, generator=generator, dtype=torch.float64)).to(backend.device).requires_grad_()
    y = torch.randint(19, (2, 5, 7), generator=generator)
    y[0, 0] = IGNORE
    y = y.to(backend.device)
    mask = draw_mask(Size(2, 1, 19, ()), generator).to(backend.device)
    there, known = filled(x, y, mask)
    log_p = -nn.functional.cross_entropy(there, known, ignore_index=IGNORE, reduction="none")
    factor = torch.ones_like(log_p) if gamma == 0 else (1 - log_p.exp()) ** gamma
    counted = known != IGNORE
    theirs = torch.where(counted, -factor * log_p, 0.0)
    assert counted.any() and int((y != IGNORE).sum()) > int(counted.sum())
    options: dict[str, Any] = {"num_classes": 19, "gamma": gamma, "ignore_index": IGNORE, "class_mask": mask}
    options["normalizer"] = None
    for reduction, want in (("none", theirs), ("mean", theirs.sum() / counted.sum())):
        got = softmax_focal_loss(x, y, reduction=reduction, **options)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)  # 1 - p of nearly certain anchors
        g, right = (torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (got, want))
        torch.testing.assert_close(g, right, rtol=1e-10, atol=1e-13)
        assert not g[~mask].any()


def test_what_normalizers_count_beside_a_mask(backend: Backend) -> None:
    """Labels, as beside a sigmoid: positives of an absent class too. "mean" counts what costs something."""
    x = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(3)).to(backend.device)
    y = torch.tensor([[[0, 1, 2], [3, 0, IGNORE]], [[1, 1, 2], [3, 3, 3]]], device=backend.device)
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]], device=backend.device)
    options: dict[str, Any] = {"num_classes": 4, "ignore_index": IGNORE, "class_mask": mask}
    total = softmax_focal_loss(x, y, normalizer=None, **options)
    for background, positives in ((None, 11), (3, 7)):
        more = {**options, "background_index": background}
        for function in (softmax_focal_loss, reference.softmax_focal_loss):
            torch.testing.assert_close(function(x, y, normalizer="positives", **more), total / positives)
            torch.testing.assert_close(function(x, y, reduction="mean", **more), total / 9)
            nothing = {**more, "class_mask": torch.zeros_like(mask)}
            assert function(x, y, reduction="mean", **nothing) == 0


def test_mean_beside_a_mask_over_two_ranks() -> None:
    """Of all that count on both: this rank's, which may be none, and five of the other's."""

    class TwoRanks:
        size = 2

        def start_sum(self, share: Tensor) -> Callable[[], Tensor]:
            total = share.add_(5)
            return lambda: total

    x = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.tensor([[[0, 1, 2], [3, 0, IGNORE]], [[1, 1, 2], [3, 3, 3]]])
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])
    for there, counted in ((mask, 9), (torch.zeros_like(mask), 0)):
        options: dict[str, Any] = {"num_classes": 4, "ignore_index": IGNORE, "class_mask": there}
        total = softmax_focal_loss(x, y, normalizer=None, **options)
        arguments = sort_keywords(SoftmaxFocalLoss, x, y, "mean", options)
        for call in (pyramid_loss, reference.pyramid_loss):
            torch.testing.assert_close(call(*arguments, ranks=TwoRanks()), 2 * total / (counted + 5))  # type: ignore[arg-type]


def test_background_may_be_absent(backend: Backend, generator: torch.Generator) -> None:
    """It is a class like others: its anchors then cost nothing, and the others' softmax is without it."""
    x = torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64).to(backend.device).requires_grad_()
    y = torch.tensor([[[3, 0, 1], [2, 3, 3], [0, 0, 2]]], device=backend.device)
    mask = torch.tensor([[True, True, True, False]], device=backend.device)
    more: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "none"}
    got = softmax_focal_loss(x, y, num_classes=4, background_index=3, class_mask=mask, **more)
    want = softmax_focal_loss(
        x[:, :3].contiguous(), torch.where(y == 3, IGNORE, y), num_classes=3, normalizer=6, **more
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    g, right = (torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (got, want))
    torch.testing.assert_close(g, right, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("classes", [1, 5, 33, 700, 11_000])
def test_no_class_is_there(backend: Backend, classes: int, mode: str, generator: torch.Generator) -> None:
    """Of one image: nothing there, whatever its logits are, and the other image as if it were alone."""
    mask = torch.tensor([[False], [True]]).expand(2, classes).to(backend.device)
    for layout in ("contiguous", "channels_last"):
        size = Size(2, 1, classes, ((2, 3),))
        (x,) = draw_levels(size, generator)
        x[0, :, 0] = float("nan")
        x[0, :, 1, 0] = float("inf")
        leaf = lay_out(x, size, (2, 3), layout).to(backend.device).requires_grad_()
        y = torch.randint(classes, (2, 2, 3), generator=generator).to(backend.device)
        given = leaf * 1 if mode == "inplace" else leaf
        options: dict[str, Any] = {"num_classes": classes, "normalizer": None, "reduction": "image"}
        loss = softmax_focal_loss(given, y, class_mask=mask, grad_mode=mode, **options)
        (g,) = torch.autograd.grad(loss.sum(), leaf)
        alone = leaf.detach()[1:].requires_grad_()
        want = softmax_focal_loss(alone, y[1:], **options)
        assert loss[0] == 0 and not g[0].any()
        torch.testing.assert_close(loss[1:], want, rtol=1e-6, atol=0)
        torch.testing.assert_close(g[1:], torch.autograd.grad(want.sum(), alone)[0], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("classes", [5, 33, 700, 11_000])
def test_absent_classes_leave_no_trace(
    backend: Backend, mode: str, classes: int, value: float, generator: torch.Generator
) -> None:
    size = Size(2, 1, classes, ((2, 3),))
    mask = draw_mask(size, generator)
    (x,) = draw_levels(size, generator)
    y = torch.randint(classes, (2, 2, 3), generator=generator).to(backend.device)
    y[0, 0, 0], y[1, 1, 1] = 0, IGNORE
    for layout in ("contiguous", "channels_last"):
        results = []
        for fill in (0.0, value):
            given = torch.where(mask[:, :, None, None], x, torch.tensor(fill))
            leaf = lay_out(given, size, (2, 3), layout).to(backend.device).requires_grad_()
            loss = softmax_focal_loss(
                leaf * 1 if mode == "inplace" else leaf,
                y,
                num_classes=classes,
                ignore_index=IGNORE,
                grad_mode=mode,
                class_mask=mask.to(backend.device),
            )
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])
        assert results[1][1].any() and not results[1][1].cpu()[~mask].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [5, 33, 700, 11_000])
def test_nan_of_a_class_that_is_there_does_not_reach_absent_ones(
    backend: Backend, layout: str, classes: int, generator: torch.Generator
) -> None:
    """Nor does an infinite weight or incoming gradient: it is exactly 0 that they have."""
    size = Size(1, 1, classes, ((2, 3),))
    mask = draw_mask(size, generator)
    mask[0, :3] = torch.tensor([True, False, True])
    (x,) = draw_levels(size, generator)
    x[0, 2, 0, 1] = float("nan")
    y = torch.zeros(1, 2, 3, dtype=torch.long, device=backend.device)
    leaf = lay_out(x, size, (2, 3), layout).to(backend.device).requires_grad_()
    for more, incoming in (({}, 1.0), ({"loss_weight": 1e38}, 1e38), ({}, float("inf")), ({}, float("nan"))):
        for reduction, mode in product(("sum", "none"), ("save", "recompute")):
            loss = softmax_focal_loss(
                leaf,
                y,
                num_classes=classes,
                normalizer=None,
                reduction=reduction,
                grad_mode=mode,
                class_mask=mask.to(backend.device),
                **more,
            )
            (g,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))
            assert not g.cpu()[~mask].any()
            assert bool(g.cpu()[0, mask[0], 0, 1].isnan().all())


@pytest.mark.parametrize("layout", ["rows", "cells"])
@pytest.mark.parametrize("classes", [4, 21, 1203])
def test_infinite_logits_beside_absent_classes(backend: Backend, layout: str, classes: int) -> None:
    """An absent class has no share, also where all that are there are -inf, or where its own logit is +inf."""
    inf = float("inf")
    x = torch.full((4, classes), -inf)
    x[1, 2] = inf  # absent
    x[2, :2] = inf
    x[3, 1] = 0.0
    mask = torch.zeros(1, classes, dtype=torch.bool)
    mask[0, :2] = True
    p = np.array([0.5, 0.5, 0.5, 0.0])
    with np.errstate(divide="ignore"):
        want = -((1 - p) ** 2) * np.log(p)
    given, targets = x.to(backend.device), torch.zeros(4, dtype=torch.long, device=backend.device)
    if layout == "cells":
        given, targets = given.t().reshape(1, classes, 1, 4).contiguous(), targets.view(1, 1, 4)
    given.requires_grad_()
    options: dict[str, Any] = {"num_classes": classes, "normalizer": None, "reduction": "none"}
    of_image = mask if layout == "cells" else mask[0]
    loss = softmax_focal_loss(given, targets, class_mask=of_image.to(backend.device), **options)
    assert_close(loss.detach().reshape(-1), want, 1e-6)  # two roundings of the square and one of the logarithm
    (g,) = torch.autograd.grad(loss.sum(), given)
    g = g.reshape(classes, 4).t() if layout == "cells" else g
    assert bool(g.isfinite().all()) and not g[:, 2:].any() and bool(g[:3, :2].all())


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"gamma": 0.0}, {"detach_modulating_factor": True}])
def test_the_reference_says_the_same_of_masks(options: dict[str, Any], generator: torch.Generator) -> None:
    levels = draw_levels(SMALL, generator, dtype=torch.float64)
    labels = [label.clamp(min=0) for label in draw_labels(levels, SMALL, generator)]
    labels[0][0, :3] = IGNORE
    some = draw_mask(SMALL, generator)
    alone = torch.tensor([[True, False, False, False, False], [False, True, False, True, True]])
    for mask, (reduction, normalizer, background) in product(
        (some, alone),
        (
            ("sum", "positives", 2),
            ("image", "positives_per_image", 0),
            ("mean", "positives", None),
            ("level", None, None),
            ("none", None, 4),
        ),
    ):
        more: dict[str, Any] = {"reduction": reduction, "normalizer": normalizer, "background_index": background}
        more |= {"class_weight": [1.0, 2.0, 0.0, 0.5, 3.0], "ignore_index": IGNORE, "num_classes": 5, **options}
        found = []
        for function in (softmax_focal_loss, reference.softmax_focal_loss):
            inputs = leaves(spoil_absent(levels, mask, SMALL))
            loss = function(inputs, labels, class_mask=mask, **more)
            parts = loss if isinstance(loss, list) else [loss]
            found.append([*parts, *torch.autograd.grad([part.sum() for part in parts], inputs)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
            assert bool(mine.isfinite().all())


@pytest.mark.parametrize("reduction", ["sum", "mean", "level", "image"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_masks_of_fused_heads(backend: Backend, kind: str, reduction: str, generator: torch.Generator) -> None:
    """Tiles of whole anchors; each image's own mask, where a tile has several images too."""
    classes, anchors = 5, 2 if kind == "conv" else 1
    head: nn.Module = nn.Conv2d(3, anchors * classes, 3, padding=1) if kind == "conv" else nn.Linear(3, classes)
    head = head.double().to(backend.device)
    shapes = [(3, 3, 4, 3), (3, 3, 2, 1)] if kind == "conv" else [(3, 7, 3), (3, 2, 3)]
    features = [torch.randn(shape, generator=generator, dtype=torch.float64).to(backend.device) for shape in shapes]
    counts = [x.shape[2] * x.shape[3] * anchors if kind == "conv" else x.shape[1] for x in features]
    labels = torch.randint(-1, classes, (3, sum(counts)), generator=generator).to(backend.device)
    mask = draw_mask(Size(3, anchors, classes, ()), generator, "transposed")
    mask[2] = False
    mask = move(mask, backend.device)
    for background, mode in ((None, "save"), (4, "recompute")):
        options: dict[str, Any] = {"reduction": reduction, "background_index": background, "ignore_index": -1}
        results = []
        for chunk in (None, 200, 2**30):
            inputs = leaves(features)
            if chunk is None:
                slow = reference.FastSoftmaxFocalLoss(classes, **options)
                loss = slow([head(x) for x in inputs], labels, class_mask=mask)
            else:
                criterion = FastSoftmaxFocalLoss(classes, grad_mode=mode, **options)
                loss = criterion.fused_with(head, inputs, labels, class_mask=mask, chunk_bytes=chunk)
            results.append([loss.detach(), *torch.autograd.grad(loss.sum(), [*inputs, *head.parameters()])])
        for found in results[1:]:
            for got, want in zip(found, results[0], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)  # sums of a hundred float64 terms


@pytest.mark.parametrize(
    ("mask", "error", "facts"),
    [
        (torch.ones(2, 5), TypeError, ["class_mask", "torch.bool", "torch.float32"]),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, ["class_mask", "(2, 5)", "(2, 4)"]),
        (torch.ones(5, dtype=torch.bool), ValueError, ["class_mask", "(2, 5)", "(5,)"]),
        (torch.ones(2, 5, dtype=torch.bool, device="meta"), ValueError, ["class_mask", "cpu", "meta"]),
    ],
)
def test_masks_that_are_refused(mask: Tensor, error: type[Exception], facts: list[object]) -> None:
    x, y = torch.zeros(2, 5, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long)
    for function in (softmax_focal_loss, reference.softmax_focal_loss):
        with pytest.raises(error) as caught:
            function(x, y, num_classes=5, class_mask=mask)
        assert_names(str(caught.value), *facts)


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
        ({"class_weight": [[1.0] * 5] * 2}, ValueError, ["class_weight", 5, "two rows", "no negatives"]),
        ({"class_weight": torch.ones(2, 5)}, ValueError, ["class_weight", 5, "two rows", "no negatives"]),
        ({"label_smoothing": 0.1}, TypeError, ["label_smoothing"]),
        ({"alpha": 0.25}, TypeError, ["alpha"]),
        ({"scores": torch.ones(2, 9)}, ValueError, ["scores", "its positives have the target 1", "None"]),
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
        ({"class_mask": torch.ones(2, 4, dtype=torch.bool)}, r"class_mask: expected shape \(2, 5\)"),
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


def test_the_operator_looks_up_no_mask_of_a_class_that_is_not_there(backend: Backend) -> None:
    x = torch.randn(2, 5, 3, 3, device=backend.device)
    packed = torch.tensor([-3, -1, 5, 32767, -32768, 0] * 3, dtype=torch.int16, device=backend.device)
    mask = torch.tensor([[True, True, False, False, True]] * 2, device=backend.device)
    for absent, counted in ((None, 3), ([1, 0], 1)):  # of three anchors with label 0, the second image has two
        if absent is not None:
            mask[absent[0], absent[1]] = False
        options = operator_options(x, packed, reduction=3, class_mask=mask)
        (loss,), (g,) = fastfocal.ops.operators.pyramid_loss([x], *options)
        assert int(loss.count_nonzero()) == counted and int(g.ne(0).any(1).sum()) == counted


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
    mask = draw_mask(SMALL, generator)
    want = softmax_focal_loss(levels, labels, **options, detach_modulating_factor=True, class_mask=mask)
    assert same_bits(module(levels, labels, class_mask=mask), want)
    torch.testing.assert_close(slow(levels, labels, class_mask=mask), want)
    with pytest.raises(ValueError, match="background_index"):
        FastSoftmaxFocalLoss(5, background_index=5)


@pytest.mark.parametrize("masked", [False, True])
def test_torch_func(masked: bool, generator: torch.Generator) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    x = torch.randn(2, 6, 3, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (2, 3, 2, 2), generator=generator)

    def mine(x: Tensor) -> Tensor:
        return softmax_focal_loss(x, y, num_classes=3, reduction="none", class_mask=mask)

    def slow(x: Tensor) -> Tensor:
        return reference.softmax_focal_loss(x, y, num_classes=3, reduction="none", class_mask=mask)

    tangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.vjp(f, x)[1](torch.ones(2, 3, 2, 2, dtype=torch.float64))[0],
        lambda f: torch.func.jacrev(f)(x),
    ):
        torch.testing.assert_close(transform(mine), transform(slow), rtol=1e-10, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_compile(reduction: str, mode: str, masked: bool, generator: torch.Generator) -> None:
    x = torch.randn(2, 6, 3, 2, generator=generator)
    y = torch.randint(3, (2, 3, 2, 2), generator=generator)
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    options: dict[str, Any] = {"num_classes": 3, "reduction": reduction, "grad_mode": mode, "background_index": 0}

    def call(x: Tensor) -> Tensor:
        return softmax_focal_loss(x, y, class_mask=mask, **options).square().sum()

    torch.compiler.reset()  # all of these are one function's, and of one function there are eight at most
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
            for masked in ("plain", "transposed"):
                check(backend, Size(2, 1, classes, ((3, 3), (1, 1))), generator, layout=layout, masked=masked)
        for shift in (-95.0, 90.0):
            test_logits_far_from_0(backend, layout, shift, generator)
            test_masks_beside_logits_far_from_0(backend, layout, shift, generator)
            for classes in (5, 33, 700, 11_000):
                order = "contiguous" if layout == "contiguous" else "channels_last"
                test_nan_of_a_class_that_is_there_does_not_reach_absent_ones(backend, order, classes, generator)
