"""Every option of the contract against the oracle: alpha, conventions, weights, normalizers, reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    FORMS,
    Backend,
    Size,
    arrange,
    assert_close,
    check,
    compare,
    draw_classes,
    draw_levels,
    encode,
    expect,
    leaves,
    move,
    run,
    tolerance,
)
from torch import Tensor
from watch import Recorder

import fastfocal

SIZE = Size(3, 2, 5, ((5, 3), (3, 1), (1, 1)))
NAN, INF = float("nan"), float("inf")


def draw(
    backend: Backend, generator: torch.Generator, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[list[Tensor], list[Tensor]]:
    levels = move(draw_levels(SIZE, generator, dtype=dtype, layout=layout), backend.device)
    return levels, move(encode(draw_classes(SIZE, generator), SIZE.classes), backend.device)


def soft_targets(levels: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x) for x in levels]


# --- alpha ------------------------------------------------------------------------------------------------------------

PER_CLASS = [0.0, 0.25, 0.3, 0.9, 1.0]
ALPHAS: dict[str, Any] = {
    "quarter": 0.25,
    "third": 0.3,
    "zero": 0.0,
    "one": 1.0,
    "none": None,
    "minus_one": -1,
    "negative": -0.5,
    "list": PER_CLASS,
    "tuple": tuple(PER_CLASS),
    "tensor": torch.tensor(PER_CLASS),
    "double_tensor": torch.tensor(PER_CLASS, dtype=torch.float64),
    "strided_tensor": torch.tensor(PER_CLASS).repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("targets", ["labels", "soft"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("name", ALPHAS)
def test_alpha(backend: Backend, name: str, layout: str, targets: str, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator, layout=layout)
    given = labels if targets == "labels" else soft_targets(levels, generator)
    # The layout matters: the class of a logit is found by stride, and alpha by class.
    check(levels, given, num_classes=5, alpha=move(ALPHAS[name], backend.device), normalizer=3.0)


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.99, 0.9999])
@pytest.mark.parametrize("per_class", [False, True], ids=["one", "per_class"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_alpha_next_to_its_ends(
    backend: Backend, weighted: bool, per_class: bool, alpha: float, generator: torch.Generator
) -> None:
    """The smaller weight is no difference of rounded ones: soft targets at the other end would be off by 3e-8 / alpha."""
    levels, labels = draw(backend, generator)
    options: dict[str, Any] = {"num_classes": 5, "normalizer": 3.0, "alpha": [alpha] * 5 if per_class else alpha}
    if weighted:
        options["weight"] = [torch.rand(y.shape, generator=generator).to(backend.device) + 0.5 for y in labels]
    ends = torch.tensor([0.0, 1e-6, 0.5, 1 - 2.0**-10, 1.0])
    soft = [ends[torch.randint(5, x.shape, generator=generator)].to(x) for x in levels]
    check(levels, labels, **options)
    check(levels, soft, **options)
    check(levels, soft, reduction="none", **options)


@pytest.mark.parametrize("alpha", [0.3, [0.1, 0.3, 0.7, 0.9, 0.6]], ids=["number", "list"])
def test_options_keep_double_precision(
    backend: Backend, alpha: float | list[float], generator: torch.Generator
) -> None:
    """float64 logits: no option may pass through float32 on its way; none of these is a float32 number."""
    levels, labels = draw(backend, generator, torch.float64)
    weight = [0.1 + torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y.device) for y in labels]
    check(
        levels,
        labels,
        num_classes=5,
        alpha=alpha,
        gamma=3.3,
        label_smoothing=0.07,
        weight=weight,
        level_weights=[1.1, 0.7, 0.3],
        normalizer=2.9,
        loss_weight=1.7,
    )


# --- label conventions ------------------------------------------------------------------------------------------------

CONVENTIONS = {
    "torchvision_mmdet": (None, -1),
    "detectron2": (5, -1),  # background K, written out
    "effdet_apex": (-1, -2),
    "kuangliu": (0, -1),
    "voc": (0, 255),
    "swapped_signs": (-2, -1),
    "far_apart": (1_000_000, -1_000_000),
    "above_k": (6, 7),
    "ignore_first": (None, 3),  # ignore_index is looked at first: class 3 is ignored
    "ignore_zero": (-1, 0),
    "background_0_ignore_k": (0, 5),  # ignores the last class, whose label is K here
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions(backend: Backend, name: str, layout: str, generator: torch.Generator) -> None:
    background, ignore = CONVENTIONS[name]
    levels = move(draw_levels(SIZE, generator, layout=layout), backend.device)
    labels = move(encode(draw_classes(SIZE, generator), 5, background, ignore), backend.device)
    check(levels, labels, num_classes=5, background_index=background, ignore_index=ignore)
    check(levels, labels, num_classes=5, background_index=background, ignore_index=ignore, reduction="mean")


@pytest.mark.parametrize("background, ignore", [(0, -1), (-1, -2)])
def test_conventions_with_one_class(backend: Backend, background: int, ignore: int, generator: torch.Generator) -> None:
    size = Size(2, 2, 1, ((5, 3),))
    levels = move(draw_levels(size, generator), backend.device)
    labels = move(encode(draw_classes(size, generator, positive=0.5), 1, background, ignore), backend.device)
    check(levels, labels, num_classes=1, background_index=background, ignore_index=ignore)


def test_uint8_255_is_ignored_and_int8_minus_one_is_not_255(backend: Backend, generator: torch.Generator) -> None:
    """Segmentation masks: compared as values, not as bytes."""
    size = Size(2, 1, 5, ((5, 3),))
    levels = move(draw_levels(size, generator), backend.device)
    (labels,) = encode(draw_classes(size, generator), 5, ignore=255)
    mask = labels.view(2, 5, 3).to(torch.uint8).to(backend.device)
    check(levels, [mask], num_classes=5, ignore_index=255)
    signed = torch.full((2, 15), -1, dtype=torch.int8, device=backend.device)
    loss, _ = check(levels, [signed], num_classes=5, background_index=-1, ignore_index=255)
    assert loss > 0


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_weight_forms(backend: Backend, form: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Weights take every shape of labels, whatever shape the labels have; some are exactly 0, some above 1."""
    levels, labels = draw(backend, generator)
    weight = [(2 * torch.rand(y.shape, generator=generator) - 0.4).clamp(min=0).to(dtype) for y in labels]
    arranged = move(arrange(weight, SIZE, form), backend.device)
    check(levels, labels, num_classes=5, weight=arranged)
    check(levels, torch.cat(labels, dim=1), num_classes=5, weight=arranged)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_weight_with_soft_targets(backend: Backend, layout: str, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator, layout=layout)
    weight = [torch.rand(y.shape, generator=generator).to(backend.device) for y in labels]
    targets = soft_targets(levels, generator)
    check(levels, targets, num_classes=5, weight=weight, normalizer=2.0)
    check(levels, targets, num_classes=5, weight=torch.cat(weight, dim=1), normalizer=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_every_dtype(backend: Backend, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator, dtype)
    weight = [torch.rand(y.shape, generator=generator).to(backend.device) for y in labels]
    check(levels, labels, num_classes=5, weight=weight, level_weights=(1.5, 0.0, 3.0), loss_weight=0.25, alpha=0.3)


@pytest.mark.parametrize("level_weights", [[1.5, 0.0, 3.0], (1, 2, 3), (0.0, 0.0, 0.0)], ids=str)
def test_level_weights(backend: Backend, level_weights: Any, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    for reduction in ("level", "image", "none"):
        check(levels, labels, num_classes=5, level_weights=level_weights, reduction=reduction)


def test_level_weights_beyond_one_launch(backend: Backend, generator: torch.Generator) -> None:
    size = Size(2, 1, 3, ((2, 1),) * 20)
    levels = move(draw_levels(size, generator), backend.device)
    labels = move(encode(draw_classes(size, generator), 3), backend.device)
    check(levels, labels, num_classes=3, level_weights=[0.5 + i for i in range(20)], reduction="level")


@pytest.mark.parametrize("loss_weight", [0.0, 1.7])
def test_loss_weight(backend: Backend, loss_weight: float, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    check(levels, labels, num_classes=5, loss_weight=loss_weight, reduction="mean")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.3])
@pytest.mark.parametrize("label_smoothing", [0.05, 0.5, 1.0])
def test_label_smoothing(backend: Backend, label_smoothing: float, gamma: float, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    check(levels, labels, num_classes=5, gamma=gamma, label_smoothing=label_smoothing)
    soft = soft_targets(levels, generator)
    check(levels, soft, num_classes=5, gamma=gamma, label_smoothing=label_smoothing, normalizer=None)


@pytest.mark.parametrize("gamma", [0, 1, 2, 4, 0.1, 1.999999, 2.5, 8.0])
def test_gamma_may_be_any_number(backend: Backend, gamma: float, generator: torch.Generator) -> None:
    """Whole numbers given as int, and one beside a special case that must not be taken for it."""
    levels, labels = draw(backend, generator, torch.float64)
    check(levels, labels, num_classes=5, gamma=gamma)


# --- normalizers and reductions ---------------------------------------------------------------------------------------

NORMALIZERS: dict[str, Any] = {
    "positives": "positives",
    "positives_per_image": "positives_per_image",
    "none": None,
    "float": 7.5,
    "int": 7,
    "below_one": 0.125,  # used as given, not clamped
    "scalar_tensor": torch.tensor(7.5),
    "count_tensor": torch.tensor(7),
    "double_tensor": torch.tensor(7.5, dtype=torch.float64),
    "small_tensor": torch.tensor(0.125),
    "per_image": torch.tensor([3.0, 0.5, 11.0]),
    "per_image_counts": torch.tensor([3, 1, 11]),
    "per_image_strided": torch.tensor([3.0, 9.0, 0.5, 9.0, 11.0, 9.0])[::2],
}


@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none", "mean"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers_and_reductions(backend: Backend, name: str, reduction: str, generator: torch.Generator) -> None:
    """Every reduction applies every normalizer, but the mean, which has its own divisor."""
    levels, labels = draw(backend, generator)
    normalizer = move(NORMALIZERS[name], backend.device)
    weight = [0.5 + torch.rand(y.shape, generator=generator).to(backend.device) for y in labels]
    options: dict[str, Any] = {"num_classes": 5, "normalizer": normalizer, "weight": weight, "loss_weight": 2.0}
    check(levels, labels, reduction=reduction, level_weights=[1.0, 2.0, 0.5], **options)
    if not isinstance(normalizer, str):
        check(levels, soft_targets(levels, generator), reduction=reduction, **options)


def test_reductions_have_the_promised_shapes(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator, torch.float16)
    shapes = {"sum": (), "mean": (), "level": (3,), "image": (3,)}
    for reduction, shape in shapes.items():
        loss = fastfocal.focal_loss(levels, labels, num_classes=5, reduction=reduction)
        assert loss.shape == shape and loss.dtype == torch.float32 and loss.device == levels[0].device
    rows = levels[0].new_zeros(4, 5)
    image = fastfocal.focal_loss(rows, torch.zeros(4, dtype=torch.int64, device=rows.device), reduction="image")
    assert image.shape == (1,)  # 2-D logits are one image


@pytest.mark.parametrize("reduction", ["level", "image", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_mode", ["save", "recompute", "auto"])
def test_incoming_gradients_may_differ(
    backend: Backend, grad_mode: str, dtype: torch.dtype, reduction: str, generator: torch.Generator
) -> None:
    """Zero for some results, another number for each of the rest."""
    levels, labels = draw(backend, generator, dtype)
    inputs = leaves(levels)
    options: dict[str, Any] = {"num_classes": 5, "reduction": reduction}
    loss = fastfocal.focal_loss(inputs, labels, grad_mode=grad_mode, **options)
    expected = expect(levels, labels, **options)
    if reduction == "none":
        incoming = [torch.randn(x.shape, generator=generator).to(x) for x in levels]
        factors = [g.double().cpu().numpy() for g in incoming]
        got = torch.autograd.grad(loss, inputs, incoming)
    else:
        values = torch.tensor([-2.0, 0.0, 0.375], dtype=loss.dtype, device=loss.device)
        shaped = [torch.full(x.shape, float(v)) for x, v in zip(levels, values, strict=True)]
        if reduction == "image":
            shaped = [values.cpu().view(3, 1, 1, 1).expand(x.shape) for x in levels]
        factors = [g.double().numpy() for g in shaped]
        got = torch.autograd.grad(loss, inputs, values)
    for g, want, size, factor in zip(got, expected.grads, expected.magnitudes, factors, strict=True):
        # A gradient that was saved in 16 bits is rounded before the incoming one meets it and after; the first error
        # grows with the factor, which stays below 4.5 for these draws.
        roundings = 1 + 4.5 if grad_mode != "recompute" else 1
        size = abs(factor) * size
        assert_close(g, factor * want, tolerance(dtype, 2.0), magnitude=size, roundings=roundings, what=reduction)


@pytest.mark.parametrize("reduction", ["level", "image", "none"])
def test_one_result_alone_may_be_differentiated(backend: Backend, reduction: str, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    inputs = leaves(levels)
    loss = fastfocal.focal_loss(inputs, labels, num_classes=5, reduction=reduction)
    got = torch.autograd.grad(loss[1].sum(), inputs)
    expected = expect(levels, labels, num_classes=5)
    for level, (g, want) in enumerate(zip(got, expected.grads, strict=True)):
        mask = np.full(want.shape, float(level == 1))
        if reduction == "image":
            mask = np.zeros(want.shape)
            mask[1] = 1
        assert_close(g, mask * want, tolerance(g.dtype, 2.0))


# --- edges ------------------------------------------------------------------------------------------------------------

ALL_REDUCTIONS = ("sum", "level", "image", "mean", "none")


@pytest.mark.parametrize("normalizer", ["positives", "positives_per_image"])
def test_no_positives(backend: Backend, normalizer: str, generator: torch.Generator) -> None:
    """Divided by 1, not by 0."""
    levels = move(draw_levels(SIZE, generator), backend.device)
    labels = move(encode(draw_classes(SIZE, generator, positive=0.0), 5), backend.device)
    for reduction in ALL_REDUCTIONS:
        check(levels, labels, num_classes=5, normalizer=normalizer, reduction=reduction)


def test_positives_in_one_image_only(backend: Backend, generator: torch.Generator) -> None:
    levels = move(draw_levels(SIZE, generator), backend.device)
    drawn = draw_classes(SIZE, generator, positive=0.6)
    for x in drawn:
        x[1:].clamp_(max=-1)
    labels = move(encode(drawn, 5), backend.device)
    check(levels, labels, num_classes=5, normalizer="positives_per_image", reduction="image")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_ignored_anchors_leave_no_trace(backend: Backend, bad: float, layout: str, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator, layout="3d")
    for x, y in zip(levels, labels, strict=True):
        x[y == -1] = bad
    if layout != "3d":
        for i, (h, w) in enumerate(SIZE.cells):
            grid = levels[i].view(3, h, w, 2, 5).permute(0, 3, 4, 1, 2).reshape(3, 10, h, w)
            levels[i] = grid.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else grid
    for reduction in ALL_REDUCTIONS:
        loss, grads = check(levels, labels, num_classes=5, reduction=reduction)
        parts = loss if isinstance(loss, list) else [loss]
        assert all(part.isfinite().all() for part in [*parts, *grads])


@pytest.mark.parametrize("bad", [0.0, NAN, INF])
def test_all_ignored(backend: Backend, bad: float, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    levels = [torch.full_like(x, bad) for x in levels]
    labels = [torch.full_like(y, -1) for y in labels]
    for reduction in ALL_REDUCTIONS:
        loss, grads = run(levels, labels, num_classes=5, reduction=reduction)
        parts = loss if isinstance(loss, list) else [loss]
        assert all((part == 0).all() for part in [*parts, *grads])


def test_nan_stays_where_it_is(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    labels[0].clamp_(min=0)  # not ignored
    levels[0][1, 3, 2, 1] = NAN
    loss, grads = run(levels, labels, num_classes=5, reduction="level")
    assert loss.isnan().tolist() == [True, False, False]
    compare(loss, grads, expect(levels, labels, num_classes=5, reduction="level"), tolerance(levels[0].dtype, 2.0))
    assert sum(int(g.isnan().sum()) for g in grads) == 1
    image, _ = run(levels, labels, num_classes=5, reduction="image")
    assert image.isnan().tolist() == [False, True, False]


def test_no_images(backend: Backend) -> None:
    levels = [torch.zeros(0, 10, h, w, device=backend.device) for h, w in SIZE.cells]
    labels = [torch.zeros(0, h * w * 2, dtype=torch.int64, device=backend.device) for h, w in SIZE.cells]
    for normalizer in ("positives", "positives_per_image", None, 2.0, torch.zeros(0, device=backend.device)):
        for reduction in ALL_REDUCTIONS:
            check(levels, labels, num_classes=5, normalizer=normalizer, reduction=reduction)


@pytest.mark.parametrize("grad_mode", ["save", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_sum_of_elementwise_losses_reads_no_incoming_gradient(
    backend: Backend, dtype: torch.dtype, grad_mode: str, generator: torch.Generator
) -> None:
    """sum() and mean() hand back one number, expanded: nothing of the logits' size is made of it."""
    levels, labels = draw(backend, generator, dtype)
    inputs = leaves(levels)
    options: dict[str, Any] = {"num_classes": 5, "reduction": "none"}
    losses = fastfocal.focal_loss(inputs, labels, grad_mode=grad_mode, **options)
    # Powers of two, which round nothing. Level 1 gets an incoming gradient of its own for each logit.
    factors = [2.0, 0.5, 4.0]
    ones = [torch.full_like(loss, factor) for loss, factor in zip(losses, factors, strict=True)]
    one_number = [loss.new_tensor(factor).expand(loss.shape) for loss, factor in zip(losses, factors, strict=True)]
    dense = torch.autograd.grad(losses, inputs, ones, retain_graph=True)
    mixed = torch.autograd.grad(losses, inputs, [one_number[0], ones[1], one_number[2]], retain_graph=True)
    with Recorder(fastfocal.ops.operators.name) as recorder:
        expanded = torch.autograd.grad(losses, inputs, one_number)
    expected = expect(levels, labels, **options)
    for level, want in enumerate(expected.grads):
        for got in (dense[level], mixed[level], expanded[level]):
            assert got.stride() == levels[level].stride()
            size = factors[level] * expected.magnitudes[level]
            assert_close(got, factors[level] * want, tolerance(dtype, 2.0), magnitude=size, what=f"level {level}")
    if grad_mode == "recompute":
        [call] = recorder.calls
        assert sum(incoming.numel() for incoming in call.args[0]) == len(levels)


@pytest.mark.parametrize("mode", ["auto", "save", "recompute", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ignored_anchors_get_nothing_whatever_comes_in(
    backend: Backend, dtype: torch.dtype, mode: str, generator: torch.Generator
) -> None:
    """Beside an elementwise incoming gradient that is infinite or NaN there; the others get theirs."""
    levels, labels = draw(backend, generator, dtype=dtype, layout="3d")
    inputs = [x.detach().requires_grad_() for x in levels]
    given = [x.clone() for x in inputs] if mode == "inplace" else inputs
    losses = fastfocal.focal_loss(given, labels, num_classes=5, normalizer=None, reduction="none", grad_mode=mode)
    incoming = [torch.ones_like(x) for x in losses]
    for g, y in zip(incoming, labels, strict=True):
        g[y == -1] = torch.tensor([INF, NAN, -INF, 1.0, 2.0]).to(g)
    grads = torch.autograd.grad(losses, inputs, incoming)
    for g, y in zip(grads, labels, strict=True):
        assert not g[y == -1].any()
    expected = expect(levels, labels, num_classes=5, normalizer=None)
    for g, want in zip(grads, expected.grads, strict=True):
        assert_close(g, want, tolerance(dtype, 2.0), roundings=2)  # saved, then multiplied by 1


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "level", "image"])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_anchors_get_nothing_of_a_loss_scale_that_overflowed(
    backend: Backend, dtype: torch.dtype, mode: str, reduction: str, kept: bool, generator: torch.Generator
) -> None:
    levels, labels = draw(backend, generator, dtype=dtype, layout="3d")
    for bad in (INF, NAN):
        inputs = [x.detach().requires_grad_() for x in levels]
        given = [x.clone() for x in inputs] if mode == "inplace" else inputs
        loss = fastfocal.focal_loss(given, labels, num_classes=5, reduction=reduction, grad_mode=mode)
        grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, bad), retain_graph=kept)
        for g, y in zip(grads, labels, strict=True):
            assert not g[y == -1].any()
            # float16 rounds small gradients to 0 when it saves them, and a 0 stays one.
            assert dtype == torch.float16 or not g[y != -1].isfinite().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("normalizer", [0.0, NAN, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_anchors_get_nothing_whatever_the_normalizer(
    backend: Backend, dtype: torch.dtype, normalizer: float, layout: str, generator: torch.Generator
) -> None:
    """A weight that is not finite makes NaN of a zero unless that is kept out of the product. Whole tiles, and ends of them."""
    size = Size(1, 1, 8, ((64, 64),))
    levels = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    drawn = draw_classes(size, generator)
    labels = move(encode(drawn, size.classes), backend.device)
    divisor = torch.tensor(normalizer, device=backend.device)
    _, grads = run(levels, labels, num_classes=size.classes, normalizer=divisor, grad_mode="save")
    rows = grads[0].permute(0, 2, 3, 1).reshape(1, -1, size.classes)
    ignored = labels[0] == -1
    assert ignored.any()
    assert not rows[ignored].any()
