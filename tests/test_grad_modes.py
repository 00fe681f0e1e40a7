"""grad_mode: the same gradient three ways, who owns it afterwards, what it may write and what it may allocate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    NATIVE,
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
    same_bits,
    tolerance,
)
from torch import Tensor
from watch import Recorder, peak_bytes

import fastfocal

SIZE = Size(2, 2, 5, ((7, 5), (3, 3), (1, 1)))
MODES = ("auto", "save", "recompute", "inplace")
LAYOUTS = ("contiguous", "channels_last", "3d")
OPTIONS: dict[str, Any] = {"num_classes": SIZE.classes}


def draw(
    backend: Backend, generator: torch.Generator, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[list[Tensor], list[Tensor]]:
    levels = move(draw_levels(SIZE, generator, dtype=dtype, layout=layout), backend.device)
    return levels, move(encode(draw_classes(SIZE, generator), SIZE.classes), backend.device)


def prepared(levels: list[Tensor], mode: str) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and what the loss is given: in place needs logits that some operator made."""
    inputs = leaves(levels)
    return inputs, [x.clone() for x in inputs] if mode == "inplace" else inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_gradient(
    backend: Backend, mode: str, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    levels, labels = draw(backend, generator, dtype, layout)
    for reduction in ("sum", "level", "image", "mean", "none"):
        check(levels, labels, grad_mode=mode, reduction=reduction, gamma=1.5, **OPTIONS)
    soft = [x.float().sigmoid().to(dtype) for x in levels]
    check(levels, soft, grad_mode=mode, normalizer=2.0, **OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_scaled_loss(backend: Backend, mode: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator, dtype)
    inputs, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **OPTIONS)
    (loss * 3).backward()
    grads = [x.grad for x in inputs]
    # A gradient saved in 16 bits is rounded before and after the factor 3; recompute (float16's auto) rounds once.
    once = mode == "recompute" or (mode == "auto" and dtype == torch.float16)
    compare(
        loss, grads, expect(levels, labels, **OPTIONS), tolerance(dtype, 2.0), scale=3, roundings=1 if once else 1 + 3
    )


@pytest.mark.parametrize("mode", ["save", "inplace"])
def test_an_incoming_gradient_of_one_changes_no_bit(backend: Backend, mode: str, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    inputs, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **OPTIONS)
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in plain]
    for g, k in zip(torch.autograd.grad(loss, inputs, torch.ones_like(loss)), kept, strict=True):
        assert same_bits(g, k)


@pytest.mark.parametrize("scales", [(3.0, 0.0, 1.0, 1.0, -0.5), (0.0, 1.0, 3.0), (1.0, 2.0, 1.0)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_backward_again_with_another_scale(
    backend: Backend, mode: str, reduction: str, scales: tuple[float, ...], generator: torch.Generator
) -> None:
    """A scale of 0 destroys whatever is rescaled in place; a first scale of 3 must not stay in the second gradient."""
    levels, labels = draw(backend, generator)
    inputs, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, reduction=reduction, **OPTIONS)
    losses = loss if isinstance(loss, list) else [loss]
    expected = expect(levels, labels, **OPTIONS)
    handed_out: list[tuple[Tensor, Tensor]] = []
    for scale in scales:
        incoming = [torch.full_like(part, scale) for part in losses]
        got = torch.autograd.grad(losses, inputs, incoming, retain_graph=True)
        for level, (g, want) in enumerate(zip(got, expected.grads, strict=True)):
            # 2e-7: twice two more roundings of 6e-8, where an applied scale is replaced by another.
            assert_close(g, scale * want, tolerance(g.dtype, 2.0) + 2e-7, what=f"scale {scale}, level {level}")
        if mode != "inplace":  # its gradients are the logits' own memory
            handed_out += [(g, g.clone()) for g in got]
    assert all(same_bits(g, copy) for g, copy in handed_out), "a later backward wrote to what an earlier one gave away"


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_was_handed_out_may_be_changed(backend: Backend, mode: str, generator: torch.Generator) -> None:
    """As gradient clipping does. In place, where the memory is one, an error is as good; wrong numbers never are."""
    levels, labels = draw(backend, generator)
    inputs, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **OPTIONS)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for g in first:
        g.mul_(100).add_(1)
    try:
        second = torch.autograd.grad(loss, inputs)
    except RuntimeError:
        assert mode == "inplace"
        return
    compare(loss, second, expect(levels, labels, **OPTIONS), tolerance(levels[0].dtype, 2.0))


@pytest.mark.parametrize("mode", MODES)
def test_grad_accumulates_over_three_backwards(backend: Backend, mode: str, generator: torch.Generator) -> None:
    """`.grad` may be the very tensor that backward returned, and the engine adds to it in place."""
    levels, labels = draw(backend, generator)
    inputs, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **OPTIONS)
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
    compare(loss, [x.grad for x in inputs], expect(levels, labels, **OPTIONS), tolerance(levels[0].dtype, 2.0), scale=3)


@pytest.mark.parametrize("mode", MODES)
def test_without_retain_graph_a_second_backward_raises(backend: Backend, mode: str, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    _, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **OPTIONS)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_logits_changed_before_backward(backend: Backend, mode: str, generator: torch.Generator) -> None:
    """A saved gradient no longer needs the logits; recompute does, and must not use other numbers in silence."""
    levels, labels = draw(backend, generator)
    inputs = leaves(levels)
    given = [x.clone() for x in inputs]
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **OPTIONS)
    expected = expect(levels, labels, **OPTIONS)
    with torch.no_grad():
        given[1].add_(1)
    if mode == "recompute":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        compare(loss, torch.autograd.grad(loss, inputs), expected, tolerance(loss.dtype, 2.0))


@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_float16_gradients_keep_what_the_loss_scale_saves(
    backend: Backend, mode: str, generator: torch.Generator
) -> None:
    """Easy negatives' gradients lie below float16's 6e-8 until the loss scale of 65536 lifts them."""
    levels, labels = draw(backend, generator, torch.float16)
    levels = [x.abs().neg() - 5 for x in levels]
    inputs = leaves(levels)
    loss = fastfocal.focal_loss(inputs, labels, normalizer=100.0, grad_mode=mode, **OPTIONS)
    (loss * 65536).backward()
    expected = expect(levels, labels, normalizer=100.0, **OPTIONS)
    assert min(abs(g[g != 0]).min() for g in expected.grads) < 2.0**-24 / 2
    compare(loss, [x.grad for x in inputs], expected, tolerance(torch.float16, 2.0), scale=65536)


@pytest.mark.parametrize("layout", ["contiguous", "width_slice"])  # read in place; copied to be read
@pytest.mark.parametrize("mode", ["auto", "save", "recompute"])
def test_only_some_levels_require_a_gradient(
    backend: Backend, mode: str, layout: str, generator: torch.Generator
) -> None:
    levels, labels = draw(backend, generator, layout=layout)
    inputs = [levels[0].requires_grad_(), levels[1].detach(), levels[2].requires_grad_()]
    loss = fastfocal.focal_loss(inputs, labels, grad_mode=mode, reduction="level", **OPTIONS)
    loss.sum().backward()
    expected = expect(levels, labels, reduction="level", **OPTIONS)
    assert inputs[1].grad is None
    compare(loss, [inputs[0].grad], _only(expected, [0]), tolerance(loss.dtype, 2.0))
    compare(loss, [inputs[2].grad], _only(expected, [2]), tolerance(loss.dtype, 2.0))


@pytest.mark.parametrize("without", ["frozen", "empty"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "level"])
@pytest.mark.parametrize("mode", MODES)
def test_first_level_without_a_gradient_while_the_graph_is_kept(
    backend: Backend, mode: str, reduction: str, without: str, generator: torch.Generator
) -> None:
    """Of each launch of 16 levels; whoever decides by its memory whether gradients are scaled in place finds none there."""
    cells = [(2, 3)] * 20
    if without == "empty":
        cells[0] = cells[16] = (0, 3)
    size = Size(2, 1, 3, tuple(cells))
    levels = move(draw_levels(size, generator), backend.device)
    labels = move(encode(draw_classes(size, generator), size.classes), backend.device)
    options: dict[str, Any] = {"num_classes": size.classes, "reduction": reduction}
    inputs, given = prepared(levels, mode)
    if without == "frozen":
        for level in (0, 16):
            given[level] = inputs[level] = levels[level].detach()
    wanted = [i for i in range(20) if i not in (0, 16)]
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **options)
    expected = expect(levels, labels, **options)
    for _ in range(2):
        poison = [
            torch.full_like(levels[1], float("nan")) for _ in range(64)
        ]  # what a gradient nobody wrote would hold
        del poison
        grads = torch.autograd.grad(loss.sum(), [inputs[i] for i in wanted], retain_graph=True)
        compare(loss, list(grads), _only(expected, wanted), tolerance(loss.dtype, 2.0))


def _only(expected: Any, levels: list[int]) -> Any:
    return type(expected)(
        expected.loss,
        [expected.grads[i] for i in levels],
        [expected.magnitudes[i] for i in levels],
        expected.positives,
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_for_each_level_beyond_one_launch(backend: Backend, mode: str, generator: torch.Generator) -> None:
    """A launch holds 16 levels; the later ones have their own entries of the incoming gradient too."""
    size = Size(2, 1, 3, ((2, 1),) * 20)
    levels = move(draw_levels(size, generator), backend.device)
    labels = move(encode(draw_classes(size, generator), size.classes), backend.device)
    inputs, given = prepared(levels, mode)
    options: dict[str, Any] = {"num_classes": size.classes, "reduction": "level"}
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, **options)
    grads = torch.autograd.grad(loss, inputs, torch.arange(1, 21).to(loss))
    expected = expect(levels, labels, **options)
    for level, (g, want) in enumerate(zip(grads, expected.grads, strict=True)):
        assert_close(g, (level + 1) * want, tolerance(g.dtype, 2.0), what=f"level {level}")


@pytest.mark.parametrize("reduction", ["sum", "image"])
@pytest.mark.parametrize("mode", MODES)
def test_scaled_loss_of_a_level_larger_than_a_tile(
    backend: Backend, mode: str, reduction: str, generator: torch.Generator
) -> None:
    """Gradients are rescaled in pieces of 8192 logits: three an image here, the last of them short."""
    size = Size(2, 2, 5, ((35, 50), (1, 1)))
    levels = move(draw_levels(size, generator), backend.device)
    labels = move(encode(draw_classes(size, generator), size.classes), backend.device)
    inputs, given = prepared(levels, mode)
    loss = fastfocal.focal_loss(given, labels, grad_mode=mode, reduction=reduction, num_classes=size.classes)
    incoming = torch.tensor(3.0 if reduction == "sum" else [3.0, -0.5]).to(loss)
    grads = torch.autograd.grad(loss, inputs, incoming)
    factor = incoming.cpu().double().expand(size.images).numpy().reshape(-1, 1, 1, 1)
    expected = expect(levels, labels, reduction=reduction, num_classes=size.classes)
    for level, (g, want) in enumerate(zip(grads, expected.grads, strict=True)):
        assert_close(g, factor * want, tolerance(g.dtype, 2.0), what=f"level {level}")


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inplace_leaves_the_gradient_in_the_logits(
    backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    levels, labels = draw(backend, generator, dtype, layout)
    inputs, given = prepared(levels, "inplace")
    versions = [x._version for x in given]
    loss = fastfocal.focal_loss(given, labels, grad_mode="inplace", **OPTIONS)
    expected = expect(levels, labels, **OPTIONS)
    compare(loss, [x.detach() for x in given], expected, tolerance(dtype, 2.0))
    assert all(x._version > v for x, v in zip(given, versions, strict=True)), "autograd must see the write"
    grads = torch.autograd.grad(loss, given)
    assert [g.data_ptr() for g in grads] == [x.data_ptr() for x in given]
    compare(loss, grads, expected, tolerance(dtype, 2.0))
    assert all(same_bits(x, before) for x, before in zip(inputs, levels, strict=True))


def test_inplace_makes_an_operator_that_needs_the_logits_raise(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    given = [x.requires_grad_().sigmoid() for x in levels]  # sigmoid's backward reads its own output
    loss = fastfocal.focal_loss(given, labels, grad_mode="inplace", **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_writes_only_where_a_gradient_is_wanted(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = draw(backend, generator)
    given = [levels[0].requires_grad_().clone(), levels[1].clone(), levels[2].requires_grad_().clone()]
    loss = fastfocal.focal_loss(given, labels, grad_mode="inplace", **OPTIONS)
    assert same_bits(given[1], levels[1])
    expected = _only(expect(levels, labels, **OPTIONS), [0, 2])
    compare(loss, torch.autograd.grad(loss, [levels[0], levels[2]]), expected, tolerance(loss.dtype, 2.0))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inplace_without_gradient_overwrites_nothing(
    backend: Backend, context: Any, generator: torch.Generator
) -> None:
    levels, labels = draw(backend, generator)
    before = [x.clone() for x in levels]
    with context():
        loss = fastfocal.focal_loss(levels, labels, grad_mode="inplace", **OPTIONS)
    compare(loss, [], _only(expect(before, labels, **OPTIONS), []), tolerance(loss.dtype, 2.0))
    fastfocal.focal_loss(levels, labels, grad_mode="inplace", **OPTIONS)  # and these require none either
    assert all(same_bits(x, b) for x, b in zip(levels, before, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------

# K = 2, so that a copy of the labels (8 bytes an anchor) is as large as the logits and shows.
WIDE = Size(2, 3, 2, ((40, 40), (20, 20)))
LOGIT_BYTES = 4 * 2 * 3 * 2 * (1600 + 400)
# Partial sums, counts and 2-byte labels of a pre-pass: well below a quarter of the logits each.
SMALL = LOGIT_BYTES // 2
# The host shim's own bookkeeping would be measured too.
on_a_device = pytest.mark.parametrize("backend", NATIVE, indirect=True)


def measured(
    backend: Backend, generator: torch.Generator, layout: str, form: str = "one_transposed"
) -> tuple[list[Tensor], Tensor | list[Tensor]]:
    levels = move(draw_levels(WIDE, generator, layout=layout), backend.device)
    labels = move(arrange(encode(draw_classes(WIDE, generator), WIDE.classes), WIDE, form), backend.device)
    fastfocal.focal_loss(levels, labels, num_classes=WIDE.classes)  # whatever is made once a process
    return levels, labels


@on_a_device
@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "no_requires_grad"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_without_gradient_no_memory_is_taken(
    backend: Backend, layout: str, context: str, generator: torch.Generator
) -> None:
    """Neither for a gradient nor for a copy of logits or labels: they are read where they lie."""
    levels, labels = measured(backend, generator, layout)

    def body() -> Tensor:
        if context == "no_requires_grad":
            return fastfocal.focal_loss(levels, labels, num_classes=WIDE.classes)
        with getattr(torch, context)():
            return fastfocal.focal_loss(leaves(levels), labels, num_classes=WIDE.classes)

    assert peak_bytes(backend, body) < SMALL
    with Recorder() as recorder:
        loss = body()
    assert not loss.requires_grad
    results = [result for call in recorder.calls for result in torch.utils._pytree.tree_leaves(call.result)]
    assert recorder.calls and sum(r.nbytes for r in results if isinstance(r, Tensor)) < SMALL


@on_a_device
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize(
    "mode, forward, both", [("save", 1, 1), ("auto", 1, 1), ("recompute", 0, 1), ("inplace", 0, 0)]
)
def test_memory_of_each_mode(
    backend: Backend, mode: str, forward: int, both: int, layout: str, generator: torch.Generator
) -> None:
    """In units of the logits: forward, and forward with backward while the gradients are still held."""
    levels, labels = measured(backend, generator, layout)
    _, given = prepared(levels, mode)
    options: dict[str, Any] = {"num_classes": WIDE.classes, "grad_mode": mode}
    first = peak_bytes(backend, lambda: fastfocal.focal_loss(given, labels, **options))
    assert forward * LOGIT_BYTES <= first < forward * LOGIT_BYTES + SMALL
    _, given = prepared(levels, mode)

    def body() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastfocal.focal_loss(given, labels, **options), given)

    peak = peak_bytes(backend, body)
    assert both * LOGIT_BYTES <= peak < both * LOGIT_BYTES + SMALL


@on_a_device
def test_leaf_takes_the_saved_gradient_without_a_copy(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = measured(backend, generator, "contiguous")
    inputs = leaves(levels)

    def body() -> None:
        fastfocal.focal_loss(inputs, labels, num_classes=WIDE.classes, grad_mode="save").backward()

    assert LOGIT_BYTES <= peak_bytes(backend, body) < LOGIT_BYTES + SMALL


def test_inplace_takes_no_view_of_a_leaf() -> None:
    weights = torch.randn(2, 3, requires_grad=True)
    before = weights.detach().clone()
    for view in (weights.view(6, 1), weights[:], weights.reshape(3, 2)):
        with pytest.raises(
            ValueError, match=r"^grad_mode: .*logits\[0\] is a leaf that requires grad, or a view of one"
        ):
            fastfocal.focal_loss(view, torch.zeros(len(view)).long(), grad_mode="inplace")
    assert same_bits(weights.detach(), before)


@pytest.mark.parametrize("other", ["same", "detached", "overlapping"])
def test_inplace_takes_no_levels_that_share_memory(backend: Backend, other: str) -> None:
    memory = torch.randn(10, 4, device=backend.device).requires_grad_() * 1
    first = memory[:6]
    second = {"same": first, "detached": first.detach(), "overlapping": memory[4:]}[other]
    labels = torch.zeros(6, dtype=torch.int64, device=backend.device)
    before = memory.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"logits\[\d\]: shares memory with logits\[\d\], which grad_mode=\"inplace\""
    ):
        fastfocal.focal_loss([first, second], [labels, labels], grad_mode="inplace")
    assert same_bits(memory.detach(), before)
    apart = [memory[:5], memory[5:]]
    fastfocal.focal_loss(apart, [labels[:5], labels[:5]], grad_mode="inplace")


# --- incoming gradients that are no numbers, or none at all -----------------------------------------------------------

# Both limits, where float32's exponentials underflow, where only a power of them does, and ordinary logits.
EXTREME = (
    0.0,
    1.0,
    -5.0,
    17.6,
    -17.6,
    28.0,
    -28.0,
    60.0,
    -60.0,
    88.0,
    -88.0,
    100.0,
    -100.0,
    1e4,
    -1e4,
    np.inf,
    -np.inf,
)
INCOMING = (0.0, 1.0, 3.0, float("inf"), float("-inf"), float("nan"))
PROBLEMS: dict[str, dict[str, Any]] = {
    "labels": {"gamma": 2.0},
    "large_gamma": {"gamma": 20.0},
    "cross_entropy": {"gamma": 0.0},
    "smoothing": {"gamma": 3.3, "label_smoothing": 0.125},
    "soft": {"gamma": 2.0},
    "soft_half": {"gamma": 0.5},
    "anchor_weight": {"gamma": 2.0},
    "class_alpha": {"gamma": 2.0, "alpha": [1.0, 0.0]},
    "star": {"gamma": 2.0, "beta": 1.0},
}


def extreme_problem(
    backend: Backend, name: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Two levels, two images; all weights are powers of two, so that the order of the products is no matter."""
    x = torch.tensor(EXTREME, dtype=torch.float64).to(dtype)
    rows = torch.cat([x, x.flip(0), x.roll(5)])
    levels = [
        torch.stack([rows, rows.roll(7)]).view(2, 1, -1, 1).expand(2, 2, -1, 1).contiguous(),
        rows.view(1, 1, -1, 1),
    ]
    levels[1] = levels[1].expand(2, 2, -1, 1).contiguous(memory_format=torch.channels_last)
    labels = [(torch.arange(t.shape[2]) % 4 - 1).expand(2, -1) for t in levels]  # ignored, two classes, background
    options: dict[str, Any] = {"num_classes": 2, "alpha": None, "normalizer": None, **PROBLEMS[name]}
    if name.startswith("soft"):
        labels = [(torch.arange(t.numel()) % 5 / 4).to(dtype).view(t.shape) for t in levels]
        labels[1] = labels[1].contiguous(memory_format=torch.channels_last)
    if name == "anchor_weight":
        options["weight"] = move([torch.full((2, t.shape[2]), 2.0) for t in levels], backend.device)
    return move(levels, backend.device), move(labels, backend.device), options


def gradients(levels: list[Tensor], targets: list[Tensor], mode: str, incoming: float, **options: Any) -> list[Tensor]:
    """Of a loss whose first number has that incoming gradient and whose others have 1."""
    inputs, given = prepared(levels, mode)
    call = fastfocal.focal_loss_star if "beta" in options else fastfocal.focal_loss
    loss = call(given, targets, grad_mode=mode, **options)
    losses = loss if isinstance(loss, list) else [loss]
    ones = [torch.ones_like(part) for part in losses]
    ones[0].view(-1)[: None if isinstance(loss, list) else 1] = incoming
    return list(torch.autograd.grad(losses, inputs, ones))


def same_values(a: Tensor, b: Tensor, relative: float = 0.0) -> bool:
    """Bit for bit, but for the sign of a zero and for what a NaN carries; or numbers that are not 0 to `relative`."""
    near = (a != 0) & (b != 0) & ((a - b).abs() <= relative * b.abs())
    return bool(((a == b) | (a.isnan() & b.isnan()) | near).all())


def first_number(t: Tensor, level: int, reduction: str, incoming: float) -> Tensor:
    """What each gradient of a level is multiplied by, as `gradients` has it."""
    factor = torch.ones_like(t)
    if reduction == "image":
        factor[0] = incoming
    elif reduction == "sum" or level == 0:
        factor.fill_(incoming)
    return factor


@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_zero_stays_zero(backend: Backend, dtype: torch.dtype, name: str, reduction: str) -> None:
    """Whatever number comes in; any other gradient gives what a multiplication gives. In all modes alike."""
    levels, targets, options = extreme_problem(backend, name, dtype)
    options["reduction"] = reduction
    finished = gradients(levels, targets, "save", 1.0, **options)
    assert all((g == 0).any() and (g != 0).any() for g in finished)
    # On CUDA the kernel for an incoming gradient of each logit is not the one that saves, which takes short cuts in 16 bits: a
    # unit in the last place.
    apart = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(dtype, 0.0)
    for incoming in INCOMING:
        expected = [
            torch.where(g == 0, g, g * first_number(g, level, reduction, incoming)) for level, g in enumerate(finished)
        ]
        for mode in ("save", "inplace", "recompute"):
            if incoming == 3 and apart and mode == "recompute":
                continue  # which rounds once, where the others do before and after
            for g, e in zip(gradients(levels, targets, mode, incoming, **options), expected, strict=True):
                assert same_values(g, e, apart if mode == "recompute" else 0.0), f"incoming {incoming}, {mode}"


@pytest.mark.parametrize("incoming", [float("inf"), float("nan"), 2.0**60])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_beside_an_infinite_product_in_whole_tiles(
    backend: Backend, dtype: torch.dtype, layout: str, incoming: float, generator: torch.Generator
) -> None:
    """A finite incoming gradient too: with the loss' own weight it is no number of float32's."""
    size = Size(2, 1, 4, ((64, 64),))  # two tiles an image
    levels = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    levels[0][:, 1] = -300.0  # of no gradient as a negative, in float16 neither
    targets = move(encode(draw_classes(size, generator), size.classes), backend.device)
    options: dict[str, Any] = {"num_classes": 4, "alpha": None, "normalizer": None, "loss_weight": 2.0**90}
    if dtype == torch.float16:
        options["loss_weight"] = 1.0
    finished = gradients(levels, targets, "save", 1.0, **options)
    expected = [torch.where(g == 0, g, g * incoming) for g in finished]
    assert all((e == 0).any() and not (e.isfinite() & (e != 0)).all() for e in expected)
    for mode in ("save", "inplace", "recompute"):
        for g, e in zip(gradients(levels, targets, mode, incoming, **options), expected, strict=True):
            assert same_values(g, e), mode
