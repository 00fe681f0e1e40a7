"""Problems drawn by hypothesis: any shape, layout, label, option and logit, against the oracle."""

from __future__ import annotations

from typing import Any

import torch
from cases import (
    FORMS,
    FOUR_D,
    THREE_D,
    TWO_D,
    Size,
    arrange,
    check,
    compare,
    draw_classes,
    draw_levels,
    encode,
    expect,
    leaves,
    tolerance,
    total,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastfocal

# Values where a formula may turn: both signs, both underflows, both infinities.
SPECIAL = [0.0, -0.0, 1e-30, 17.0, -17.0, 28.0, -28.0, 88.8, -104.0, 1e4, -1e4, float("inf"), float("-inf")]
# Multiples of 1/16: exact in float32, so that what an option loses in conversion is not counted as the kernel's error.
SIXTEENTHS = st.integers(0, 16).map(lambda n: n / 16)
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def problems(draw: Any) -> tuple[list[torch.Tensor], Any, dict[str, Any]]:
    layout = draw(st.sampled_from(FOUR_D + THREE_D + TWO_D))
    rank = 2 if layout in TWO_D else 3 if layout in THREE_D else 4
    cells = tuple(draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4)))
    images = 1 if rank == 2 else draw(st.integers(1 if layout == "expanded" else 0, 3))
    size = Size(images, draw(st.integers(1, 3)), draw(st.integers(1, 6)), cells)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw_levels(size, generator, dtype=dtype, layout=layout)
    for value in draw(st.lists(st.sampled_from(SPECIAL) | st.floats(-28, 28, width=32), max_size=6)):
        level = levels[draw(st.integers(0, len(levels) - 1))]
        if level.numel():
            # The index is taken modulo the size; through a view, so that strides stay as they are.
            at = draw(st.integers(0, 10**6)) % level.numel()
            level[tuple(int(i) for i in torch.unravel_index(torch.tensor(at), level.shape))] = value

    drawn = draw_classes(size, generator, positive=draw(SIXTEENTHS), ignored=draw(SIXTEENTHS))
    background, ignore = draw(st.sampled_from([(None, -1), (0, -1), (-1, -2), (size.classes, 255), (0, 255)]))
    form = draw(st.sampled_from([form for form in FORMS if rank == 4 or form in ("nm", "nm_strided", "one")]))
    soft = draw(st.booleans())
    targets: Any = arrange(encode(drawn, size.classes, background, ignore), size, form, rank=rank)
    if soft:
        steps = [torch.randint(0, 17, x.shape, generator=generator) for x in levels]
        targets = [(step / 16).to(dtype) for step in steps]
    per_class = st.lists(SIXTEENTHS, min_size=size.classes, max_size=size.classes)
    number = st.integers(1, 160).map(lambda n: n / 16)
    normalizers = [
        st.none(),
        number,
        number.map(torch.tensor),
        st.just(torch.rand(size.images, generator=generator) + 1),
    ]
    if not soft:
        normalizers += [st.just("positives"), st.just("positives_per_image")]
    weight = [torch.rand(entry.shape, generator=generator) + 0.25 for entry in drawn]
    options = {
        "num_classes": size.classes,
        "alpha": draw(st.none() | SIXTEENTHS | per_class),
        "gamma": draw(st.sampled_from([0.0, 1.0, 2.0]) | st.integers(0, 80).map(lambda n: n / 16)),
        "background_index": background,
        "ignore_index": ignore,
        "weight": draw(st.sampled_from([None, arrange(weight, size, form, rank=rank)])),
        "level_weights": draw(st.none() | st.lists(SIXTEENTHS, min_size=len(cells), max_size=len(cells))),
        "label_smoothing": draw(st.sampled_from([0.0, 0.125])),
        "detach_modulating_factor": draw(st.booleans()),
        "normalizer": draw(st.one_of(normalizers)),
        "reduction": draw(st.sampled_from(["sum", "level", "image", "none", "mean"])),
        "loss_weight": draw(st.sampled_from([1.0, 0.75])),
    }
    return levels, targets, options


@QUIET
@given(problem=problems(), mode=st.sampled_from(["auto", "save", "recompute", "inplace"]))
def test_any_problem(problem: tuple[list[torch.Tensor], Any, dict[str, Any]], mode: str) -> None:
    levels, targets, options = problem
    check(levels, targets, grad_mode=mode, **options)


@QUIET
@given(problem=problems())
def test_any_problem_of_the_reference(problem: tuple[list[torch.Tensor], Any, dict[str, Any]]) -> None:
    """Held to the same contract in float64, where its plain formulas lose a few digits to cancellation."""
    levels, targets, options = problem
    levels = [x.double().clamp(-28, 28) for x in levels]
    inputs = leaves(levels)
    loss = fastfocal.reference.focal_loss(inputs, targets, **options)
    grads = torch.autograd.grad(total(loss), inputs)
    # 1 - p_t made by subtraction keeps 1e-16 / e^-28 = 1e-4 of its digits at worst; the promise is the kernels' alone.
    expected = expect(levels, targets, **options)
    compare(loss, grads, expected, max(1e-9, tolerance(torch.float64, options["gamma"])))
