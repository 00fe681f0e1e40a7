"""Edges that mistakes planted on purpose had slipped through: each test was seen to fail with one of them in the sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    IGNORED,
    Backend,
    Size,
    assert_close,
    check,
    draw_classes,
    draw_levels,
    encode,
    expect,
    leaves,
    move,
    run,
    tolerance,
)
from fuzz import Interval
from torch import Tensor

import fastfocal

INF = float("inf")

# --- NaN with a payload -----------------------------------------------------------------------------------------------

# Every NaN is one: signalling, with all bits set, with none but the lowest, and negative. Rounding to bfloat16 by adding to
# the bits makes 0, -0 or infinity of some of them.
PAYLOADS = {
    torch.float32: (0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F80FFFF, 0x7FFF8000),
    torch.float64: (0x7FF0000000000001, 0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0xFFF0000000000001),
    torch.float16: tuple(sign | bits for sign in (0, 0x8000) for bits in range(0x7C01, 0x8000)),
    torch.bfloat16: tuple(sign | bits for sign in (0, 0x8000) for bits in range(0x7F81, 0x8000)),
}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def nans(dtype: torch.dtype) -> Tensor:
    bits = np.array(PAYLOADS[dtype], dtype=UNSIGNED[dtype.itemsize])
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype)


@pytest.mark.parametrize("targets", ["labels", "weighted", "soft"])
@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_logits_with_payloads(backend: Backend, dtype: torch.dtype, mode: str, targets: str) -> None:
    """NaN gradients there and nowhere else, among positives, negatives and ignored anchors; a NaN loss."""
    bad = nans(dtype)
    x = torch.full((3, 1, len(bad), 2), 0.5, dtype=dtype)
    x.view(SIGNED[dtype.itemsize])[..., 0] = bad.view(SIGNED[dtype.itemsize])  # a copy of numbers might change the bits
    labels = torch.tensor([0, 1, IGNORED])[:, None].expand(3, 2 * len(bad))
    options: dict[str, object] = {"num_classes": 1, "ignore_index": IGNORED, "grad_mode": mode, "reduction": "image"}
    given = move([x], backend.device)
    if targets == "soft":
        y = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        loss, (grad,) = run(given, move([y], backend.device), normalizer=None, **options)
    else:
        if targets == "weighted":
            options["weight"] = torch.ones(3, 2 * len(bad), device=backend.device)
        loss, (grad,) = run(given, move(labels, backend.device), **options)
    wrong = grad.isnan().cpu()
    ignored = 0 if targets == "soft" else 1
    assert wrong[: 3 - ignored, ..., 0].all() and not wrong[..., 1].any()
    assert loss.isnan().tolist() == [True, True, not ignored]
    assert ignored == 0 or not grad[2].any()


@pytest.mark.parametrize("what", ["normalizer", "incoming", "weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_weights_with_payloads(
    backend: Backend, dtype: torch.dtype, layout: str, what: str, generator: torch.Generator
) -> None:
    """Whatever the bits of a NaN that multiplies everything: each gradient but those of ignored anchors is NaN."""
    size = Size(1, 2, 8, ((9, 16),))
    (x,) = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    drawn = draw_classes(size, generator)
    labels = move(encode(drawn, size.classes), backend.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for bad in nans(torch.float64 if what == "normalizer" else wide):
        options = {"num_classes": size.classes, "grad_mode": "save"}
        if what == "normalizer":
            options["normalizer"] = bad.to(backend.device)
        elif what == "weight":
            options["weight"] = [bad.to(backend.device).expand(1, 288)]
        (leaf,) = leaves([x])
        loss = fastfocal.focal_loss([leaf], labels, **options)
        incoming = bad.to(backend.device) if what == "incoming" else torch.ones_like(loss)
        for keep in (True, False):  # by two operators
            (grad,) = torch.autograd.grad(loss, leaf, incoming, retain_graph=keep)
            rows = grad if layout == "3d" else grad.unflatten(1, (2, 8)).permute(0, 3, 4, 1, 2).reshape(1, -1, 8)
            ignored = (drawn[0] == IGNORED).to(backend.device)
            assert not rows[ignored].any()
            wrong = rows[~ignored].isnan()
            if dtype == torch.float16 and what == "incoming":  # saved as 0 what is small, and 0 stays 0
                wrong |= rows[~ignored] == 0
            assert wrong.all()


# --- a weight of 0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "level", "image", "mean", "none"])
@pytest.mark.parametrize("what", ["alpha_0", "alpha_1", "alpha_per_class", "anchor", "level", "loss"])
@pytest.mark.parametrize("targets", ["soft", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weight_of_an_infinite_loss(
    backend: Backend, dtype: torch.dtype, targets: str, what: str, reduction: str
) -> None:
    """0 times infinity would be NaN: what has no weight adds nothing, in whole vectors and at their end."""
    size = Size(2, 1, 1, ((1, 37), (1, 5)))
    # Where alpha does not do it, the other logits are not of infinite loss.
    positive = {"alpha_0": True, "alpha_1": False}.get(what, True)
    levels = [torch.full((2, 1, 1, n), 0.5, dtype=dtype) for n in (37, 5)]
    levels[0][0, 0, 0, [0, 17, 36]] = -INF if positive else INF
    labels = [torch.full((2, n), 0 if positive else 1) for n in (37, 5)]
    weight = [torch.ones(2, n) for n in (37, 5)]
    weight[0][0, [0, 17, 36]] = 0
    options: dict[str, object] = {"num_classes": 1, "normalizer": None, "reduction": reduction}
    options |= {
        "alpha_0": {"alpha": 0.0},
        "alpha_1": {"alpha": 1.0},
        "alpha_per_class": {"alpha": [0.0]},
        "anchor": {"weight": move(weight, backend.device)},
        "level": {"level_weights": [0.0, 1.0]},
        "loss": {"loss_weight": 0.0},
    }[what]
    given: list[Tensor] = labels
    if targets == "soft":
        given = [(1.0 - y).view(2, 1, 1, -1).to(dtype) for y in labels]
    loss, _ = check(move(levels, backend.device), move(given, backend.device), **options)
    parts = loss if isinstance(loss, list) else [loss]
    assert all(part.isfinite().all() for part in parts)
    assert size.images == len(levels[0])


# --- as many classes as 16 bits count ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [32766, 32767, 32768, 32769])
def test_classes_at_the_edge_of_16_bits(
    backend: Backend, classes: int, layout: str, generator: torch.Generator
) -> None:
    """The last class, background and ignored, packed in 16 and in 32 bits; torch.compile is told the same width."""
    size = Size(1, 2, classes, ((1, 2),))
    levels = move(draw_levels(size, generator, layout=layout), backend.device)
    labels = torch.tensor([[classes - 1, classes, -1, 0]], device=backend.device)
    check(levels, labels, num_classes=classes, reduction="level")
    check(levels, labels, num_classes=classes, alpha=None, gamma=1.5, label_smoothing=0.125)
    arguments = ([labels], levels, None, classes, classes, -1, fastfocal.ops.COUNT_POSITIVES, 1.0)
    packed, count = fastfocal.ops.operators.pack_labels(*arguments)
    assert packed.dtype == (torch.int16 if classes <= 32767 else torch.int32)
    assert packed.tolist() == [classes - 1, -1, -2, 0] or packed.tolist() == [classes - 1, -2, -1, 0]  # by layout
    assert count.item() == 2
    with torch._subclasses.FakeTensorMode() as mode:
        meant = [mode.from_tensor(x) for x in levels]
        fake, _ = fastfocal.ops.operators.pack_labels([mode.from_tensor(labels)], meant, *arguments[2:])
    assert (fake.dtype, fake.shape) == (packed.dtype, packed.shape)


# --- more levels than one launch takes --------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [16, 17, 32, 33])
@pytest.mark.parametrize("reduction", ["sum", "image"])
def test_float64_sums_over_many_levels_stay_float64(backend: Backend, reduction: str, levels: int) -> None:
    """What the first launch leaves is added to by the next, and must not lose digits on the way."""
    generator = torch.Generator().manual_seed(levels)
    size = Size(2, 1, 2, tuple((1, 1 + i % 3) for i in range(levels)))
    given = draw_levels(size, generator, dtype=torch.float64)
    labels = encode(draw_classes(size, generator, positive=0.5), size.classes)
    options = {"num_classes": 2, "reduction": reduction}
    loss = fastfocal.focal_loss(move(given, backend.device), move(labels, backend.device), **options)
    # A dozen roundings of 1e-16 for each loss; the sums here are of a few hundred terms, all positive.
    assert_close(loss, expect(given, labels, **options).loss, 1e-13, what=reduction)


# --- one number, expanded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (1, 2), (2, 3), (0, 1, 2), (1, 2, 3), ()])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_incoming_gradient_expanded_along_some_axes(
    backend: Backend, dtype: torch.dtype, layout: str, axes: tuple[int, ...], mode: str, generator: torch.Generator
) -> None:
    """Only where every stride is 0 is it one number: a bias per channel or per image is none."""
    size = Size(2, 2, 3, ((3, 4), (2, 2)))
    levels = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    labels = move(encode(draw_classes(size, generator), size.classes), backend.device)
    inputs = leaves(levels)
    given = [x.clone() for x in inputs] if mode == "inplace" else inputs
    losses = fastfocal.focal_loss(given, labels, num_classes=3, reduction="none", grad_mode=mode)
    incoming = []
    for x in levels:
        shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
        numbers = torch.randint(1, 17, shape, generator=generator) / 16  # exact
        incoming.append(numbers.to(x).expand(x.shape))
    got = torch.autograd.grad(losses, inputs, incoming)
    expected = expect(levels, labels, num_classes=3)
    for level, g in enumerate(got):
        factor = incoming[level].double().cpu().numpy()
        bound = tolerance(dtype, 2.0) * expected.magnitudes[level]
        saved = Interval.around(expected.grads[level], bound, dtype, rounded=mode != "recompute")
        saved.times(factor).assert_holds(g, f"gradient of level {level}")


# --- a normalizer on another device -----------------------------------------------------------------------------------


def test_only_one_number_may_be_a_normalizer_from_another_device() -> None:
    """A number on the CPU for logits elsewhere is ordinary in torch; a tensor of them is a mistake. The meta device will do."""
    x, y = torch.zeros(2, 3, 4, 5, device="meta"), torch.zeros(2, 20, dtype=torch.int64, device="meta")
    assert fastfocal.focal_loss(x, y, num_classes=3, normalizer=torch.tensor(2.0)).device.type == "meta"
    with pytest.raises(ValueError, match=r"^normalizer: expected the logits' device, meta, got cpu"):
        fastfocal.focal_loss(x, y, num_classes=3, normalizer=torch.ones(2))
