"""Problems from anywhere in the contract of every loss, drawn by hypothesis and held against the float64 oracle.

    python tests/fuzz.py --examples 20000            # with the CPU kernels; a failure is shrunk and printed
    python tests/fuzz.py --loss bce_loss             # of one loss alone
    python tests/fuzz.py --seed 7 --examples 500     # the part of it that printed this seed, alone

`test_fuzz.py` runs a short part that is the same every time. A failing `Problem` is printed whole: `fuzz.check(Problem(...))`
repeats it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from math import inf, nan
from typing import Any

import numpy as np
import oracle_pyramid
import torch
from cases import (
    BACKGROUND,
    FOUR_D,
    OPTION_ROUNDINGS,
    SMALLEST,
    THREE_D,
    TWO_D,
    Size,
    arrange,
    draw_classes,
    encode,
    lay_out,
    same_bits,
    to_numpy,
    tolerance,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import Array
from oracle_pyramid import Expected
from torch import Tensor, nn

import fastfocal
from fastfocal.losses import LOSSES
from fastfocal.losses.loss import Member

DTYPES = ("float32", "float16", "bfloat16", "float64")
MEMBERS: dict[str, Member] = {member.parameters.name: member for member in LOSSES}


@dataclass(frozen=True, repr=False)
class Problem:
    """All that a call and its backward depend on, in plain values: what fails is printed, and repeats from what was printed."""

    loss: str = "focal_loss"
    own: tuple[tuple[str, Any], ...] = ()  # the loss's own parameters that are no defaults
    # logits
    layouts: tuple[str, ...] = ("contiguous",)  # one per level, all of one rank
    images: int = 1
    anchors: int = 1
    classes: int = 1
    cells: tuple[tuple[int, int], ...] = ((1, 1),)
    dtype: str = "float32"
    seed: int = 0
    spread: float = 4.0
    places: tuple[tuple[int, int, float], ...] = ()  # level, position, value: logits that are replaced
    needs_grad: tuple[bool, ...] = (True,)
    # targets
    targets: str = "labels"  # or what the soft targets are drawn from
    target_dtype: str = "int64"
    form: str = "nm"  # of labels and weights
    soft_layout: str = "logits"
    convention: tuple[int | None, int] = (None, -1)
    positive: float = 0.25
    ignored: float = 0.125
    scores: str | None = None  # dtype
    scores_form: str = "nm"
    # options
    as_tensors: bool = False  # numbers for each class, as one tensor
    class_weight: tuple[tuple[float, ...], ...] | None = None  # one row, or two
    class_mask: float | None = None  # the share of classes that are there
    weight: str | None = None  # dtype
    level_weights: tuple[float, ...] | None = None
    loss_weight: float = 1.0
    normalizer: Any = "positives"  # a tuple: a tensor of one number, or of one per image
    normalizer_dtype: str = "float32"
    reduction: str = "sum"
    grad_mode: str = "auto"
    # how it is called and differentiated
    module: bool = False
    fused: int | None = None  # bytes: through a last layer that hands on what it gets, in tiles of so many
    alone: bool = False  # one level: a tensor, not a list
    name_classes: bool = True
    incoming: tuple[float, ...] = (1.0,)  # cycled over the incoming gradient's numbers
    incoming_form: str = "dense"
    again: tuple[float, ...] | None = None  # a second backward
    undifferentiated: int | None = None  # with reduction "none", a level's loss that backward does not reach

    def __repr__(self) -> str:
        """What differs from the defaults."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.default is not MISSING)
        shown = (f"{name}={value!r}" for name, value in values if value != getattr(Problem, name))
        return f"Problem({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def size(self) -> Size:
        return Size(self.images, self.anchors, self.classes, self.cells)

    @property
    def rank(self) -> int:
        return 2 if self.layouts[0] in TWO_D else 3 if self.layouts[0] in THREE_D else 4

    @property
    def numbers(self) -> dict[str, Any]:
        """The loss's own parameters."""
        return dict(self.own)

    @property
    def activated(self) -> bool:
        """The logits are probabilities."""
        return bool(self.numbers.get("activated"))

    @property
    def mode(self) -> str:
        """What "auto" means."""
        if self.fused is not None:
            recompute = self.grad_mode == "recompute" or self.reduction in ("level", "image")
            return "recompute" if recompute else "save"
        if self.grad_mode != "auto":
            return self.grad_mode
        return "recompute" if self.dtype == "float16" or self.reduction == "none" else "save"


# --- drawing ----------------------------------------------------------------------------------------------------------

# Where a formula may turn: both signs, the ends of the promise, both underflows, far beyond, and no numbers.
SPECIAL = (0.0, -0.0, 1e-30, -1e-38, 17.0, -17.0, 28.0, -28.0, 87.3, -87.3, 88.8, -88.8, 104.0, -104.0, 710.0, -745.0, 1e4,
           -1e4, inf, -inf, nan)  # fmt: skip
INCOMING = (1.0, 0.0, -0.0, -1.0, 0.3, 1e-3, -2.5, 65536.0, 1e-30, 1e30, inf, -inf, nan)
CONVENTIONS = {
    "int8": ((None, -1), (0, -1), (-1, -2), (-1, 127), (-128, 0x7F), (None, -128)),
    "uint8": ((None, 255), (0, 255), (255, 254)),
}
CONVENTIONS |= dict.fromkeys(
    ("int16", "int32", "int64"), (*CONVENTIONS["int8"], (None, 255), (0, 255), (-1, 255), (-100, -1))
)
LARGE = ((1, 257), (16, 16), (31, 33), (1, 4097), (2, 4096), (64, 65))  # whole groups and tiles, and ends of them
SIXTEENTHS = st.integers(0, 16).map(lambda n: n / 16)
# Weights are 0 or well within the kernels' numbers: one that is nearly 0 counts as 0 beside an infinite loss.
SHARE = st.floats(0, 1, width=32).map(lambda x: x if x > 1e-6 else 0.0)
SIGNED = (
    st.sampled_from((1.0, 0.5, -1.5, 0.3, 0.0)) | st.floats(2**-19, 2, width=32) | st.floats(-2, -(2**-19), width=32)
)
POSITIVE = st.floats(2**-6, 64, width=32)
# A positive exponent that float32 has as 0 makes 1 of 0^gamma.
GAMMA = st.sampled_from((2.0, 0.0, 1.0, 0.5, 1.5, 3.0, 20.0, 100.0)) | st.floats(1e-30, 10)
FLAG = st.booleans()
ALPHA = st.just(0.25) | st.none() | st.just(-1.0) | SHARE  # or one for each class
# The loss's own parameters, each with what is drawn for it.
OWN: dict[str, dict[str, Any]] = {
    "focal_loss": {
        "alpha": ALPHA,
        "gamma": GAMMA,
        "label_smoothing": st.sampled_from((0.0, 0.0, 0.1, 0.125, 1.0)) | SHARE,
        "detach_modulating_factor": FLAG,
    },
    "focal_loss_star": {
        "alpha": ALPHA,
        "gamma": GAMMA.filter(lambda gamma: gamma >= 2**-6),
        "beta": st.sampled_from((1.0, 0.0)) | SIGNED,
    },
    "varifocal_loss": {
        "alpha": st.sampled_from((0.75, 0.0, 1.0)) | POSITIVE,
        "gamma": GAMMA,
        "iou_weighted": FLAG,
        "detach_modulating_factor": FLAG,
    },
    "quality_focal_loss": {"beta": GAMMA, "activated": st.sampled_from((False, False, True))},
    "matchability_aware_loss": {"gamma": GAMMA, "alpha": st.sampled_from((None, 0.0, 1.0)) | POSITIVE},
    "iou_aware_bce_loss": {"alpha": SIXTEENTHS | SHARE, "gamma": GAMMA},
    "bce_loss": {},
    "gaussian_focal_loss": {
        "alpha": GAMMA,
        "gamma": GAMMA,
        "eps": st.sampled_from((0.0, 1e-4, 1e-12, 0.25, 0.49)) | st.floats(1e-6, 0.49),
    },
    "asymmetric_loss": {
        "gamma_pos": GAMMA,
        "gamma_neg": GAMMA,
        "clip": st.sampled_from((0.05, None, 0.0, 0.5, 1.0)) | SHARE,
        "detach_modulating_factor": FLAG,
    },
    "softmax_focal_loss": {"gamma": GAMMA, "detach_modulating_factor": FLAG},
}
FORMS = ("nm", "nm_strided", "one", "one_transposed", "one_strided", "nhwa", "nhwa_permuted", "nhw")


def sizes(draw: Any, rank: int) -> Size:
    kind = draw(st.integers(0, 99))
    images = 1 if rank == 2 else draw(st.sampled_from((1, 2, 3, 1, 2, 3, 2, 0)))
    if kind == 0:  # more classes than 16 bits count; more levels than a launch takes
        return Size(1, 1, draw(st.sampled_from((32767, 32768, 32769))), ((1, 2),))
    if kind < 4:
        return Size(images, 1, 2, tuple((1, 1 + i % 3) for i in range(draw(st.integers(16, 18)))))
    if kind < 6:  # more classes than a block of the softmax has, and than its buffers
        return Size(images, 1, draw(st.sampled_from((161, 330, 1203))), ((1, 2), (2, 3)))
    side = st.sampled_from((1, 2, 3, 4, 5, 6, 4, 3, 2, 0))
    small = st.tuples(side, side)
    if kind < 20:
        cells = draw(st.lists(small | st.sampled_from(LARGE), min_size=1, max_size=2))
        return Size(min(images, 2), draw(st.integers(1, 2)), draw(st.integers(1, 3)), tuple(cells))
    classes = draw(st.integers(1, 8) | st.sampled_from((16, 33, 91)))
    return Size(images, draw(st.integers(1, 4)), classes, tuple(draw(st.lists(small, min_size=1, max_size=4))))


def own_parameters(draw: Any, loss: str, classes: int) -> tuple[tuple[str, Any], ...]:
    drawn = {}
    for name, values in OWN[loss].items():
        if values is ALPHA and classes < 100 and draw(st.integers(0, 3)) == 0:
            values = st.lists(SIXTEENTHS | SHARE, min_size=classes, max_size=classes).map(tuple)
        if draw(st.integers(0, 3)):  # else the default
            drawn[name] = draw(values)
    return tuple(drawn.items())


@st.composite
def problems(draw: Any, losses: Sequence[str] = tuple(OWN)) -> Problem:
    loss = draw(st.sampled_from(losses))
    member = MEMBERS[loss].parameters
    of_rank = draw(st.sampled_from((FOUR_D, FOUR_D, FOUR_D, THREE_D, TWO_D)))
    rank = {FOUR_D: 4, THREE_D: 3, TWO_D: 2}[of_rank]
    size = sizes(draw, rank)
    levels = len(size.cells)
    each = st.sampled_from(of_rank)
    layouts = draw(st.lists(each, min_size=levels, max_size=levels) | each.map(lambda layout: [layout] * levels))
    if "expanded" in layouts and size.images == 0:
        size = replace(size, images=1)
    dtype = draw(st.sampled_from(DTYPES))
    soft_targets = ("sixteenths", "hard", "uniform", "ends")
    kinds = {"labels": ("labels",), "soft": soft_targets, "either": ("labels", "labels", *soft_targets)}
    targets = draw(st.sampled_from(kinds[member.targets]))
    scores = draw(st.sampled_from((None, *DTYPES))) if member.takes_scores and targets == "labels" else None
    own = own_parameters(draw, loss, size.classes)
    forms = [f for f in FORMS if rank == 4 or f in ("nm", "nm_strided", "one", "one_strided")]
    if size.anchors > 1:
        forms = [f for f in forms if f != "nhw"]
    many = size.classes > 120  # 8 bits do not hold their labels, and 127 may be one of them
    integers = "int32" if many else draw(st.sampled_from(tuple(CONVENTIONS)))
    reduction = draw(st.sampled_from(("sum", "level", "image", "none", "mean")))
    mode = draw(st.sampled_from(("auto", "save", "recompute", "inplace")))
    if any("transposed" in layout for layout in layouts) and mode == "inplace":
        mode = "save"  # in place the kernels' own orders are asked for
    conventions: Any = st.just((None, -1)) if many else st.sampled_from(CONVENTIONS[integers])
    if member.takes_anchors:  # background is one of the classes, or there is none
        ignored_label = 255 if integers == "uint8" else draw(st.sampled_from((-1, -100, 0, size.classes)))
        backgrounds = [None, *(k for k in {0, size.classes - 1} if k != ignored_label)]
        conventions = st.sampled_from(backgrounds).map(lambda background: (background, ignored_label))
    numbers = st.lists(st.sampled_from(INCOMING), min_size=1, max_size=5).map(tuple)
    normalizers: list[Any] = [
        st.none(),
        POSITIVE,
        POSITIVE.map(lambda n: (n,)),
        st.lists(POSITIVE, min_size=size.images, max_size=size.images).map(tuple),
    ]
    if targets == "labels" or member.positive_target is not None:
        normalizers += [st.just("positives"), st.just("positives_per_image")] * 2
    if scores is not None:
        normalizers += [st.just("scores")] * 2
    class_weight = None
    if size.classes < 100 and draw(st.integers(0, 2)) == 0:
        row = st.lists(SIGNED, min_size=size.classes, max_size=size.classes).map(tuple)
        class_weight = tuple(draw(row) for _ in range(1 if member.takes_anchors else draw(st.integers(1, 2))))
    place = st.tuples(
        st.integers(0, levels - 1), st.integers(0, 10**4), st.sampled_from(SPECIAL) | st.floats(-28, 28, width=32)
    )
    problem = Problem(
        loss=loss,
        own=own,
        layouts=tuple(layouts),
        images=size.images,
        anchors=size.anchors,
        classes=size.classes,
        cells=size.cells,
        dtype=dtype,
        seed=draw(st.integers(0, 2**31)),
        spread=draw(st.sampled_from((4.0, 1.0, 0.1, 12.0))),
        places=tuple(draw(st.lists(place, max_size=6))),
        needs_grad=tuple(
            draw(st.lists(st.sampled_from((True, True, True, True, True, False)), min_size=levels, max_size=levels))
        ),
        targets=targets,
        target_dtype=integers if targets == "labels" else draw(st.just(dtype) | st.sampled_from(DTYPES)),
        form=draw(st.sampled_from(forms)),
        soft_layout=draw(st.sampled_from(("logits", "contiguous", "expanded"))),
        convention=draw(conventions),
        positive=draw(SIXTEENTHS),
        ignored=draw(SIXTEENTHS),
        scores=scores,
        scores_form=draw(st.sampled_from(forms)),
        as_tensors=draw(st.booleans()),
        class_weight=class_weight,
        class_mask=None if member.takes_anchors else draw(st.sampled_from((None, None, None, 0.75, 0.5, 0.9, 0.1))),
        weight=draw(st.sampled_from((None, None, *DTYPES))),
        level_weights=draw(st.none() | st.lists(SIGNED, min_size=levels, max_size=levels).map(tuple)),
        loss_weight=draw(st.just(1.0) | SIGNED),
        normalizer=draw(st.one_of(normalizers)),
        normalizer_dtype=draw(st.sampled_from(("float32", "float64"))),
        reduction=reduction,
        grad_mode=mode,
        module=draw(st.booleans()),
        alone=draw(st.booleans()),
        name_classes=draw(st.booleans()),
        incoming=draw(st.just((1.0,)) | numbers),
        incoming_form=draw(st.sampled_from(("dense", "strided", "expanded"))),
        again=draw(st.none() | numbers),
        undifferentiated=draw(st.none() | st.integers(0, levels - 1)),
    )
    if draw(st.integers(0, 4)) == 4:
        problem = fused(problem, draw(st.sampled_from((1, 2000, 2**20))))
    return problem


def fused(problem: Problem, chunk_bytes: int) -> Problem:
    """The same through a layer, where that can be: it multiplies all other logits by 0, so there must be numbers alone.

    Its float16 gradients are rounded in other places, which its own tests know.
    """

    def numbers(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(number for number in values if abs(number) < 1e6) or (1.0,)

    channels = problem.classes * (problem.anchors if problem.rank == 4 else 1)
    if problem.dtype == "float16" or problem.activated or channels > 64:
        return problem
    return replace(
        problem,
        fused=chunk_bytes,
        reduction="sum" if problem.reduction == "none" else problem.reduction,
        places=tuple(place for place in problem.places if abs(place[2]) < 1e6),
        incoming=numbers(problem.incoming),
        again=None if problem.again is None else numbers(problem.again),
    )


# --- building ---------------------------------------------------------------------------------------------------------


def make_levels(problem: Problem, generator: torch.Generator) -> list[Tensor]:
    size = problem.size
    drawn = []
    for h, w in size.cells:
        x = torch.randn(size.images, size.anchors * size.classes, h, w, generator=generator, dtype=torch.float64)
        x = (problem.spread * x).clamp(-28, 28)
        drawn.append((x.sigmoid() if problem.activated else x).to(getattr(torch, problem.dtype)))
    for level, at, value in problem.places:
        if problem.targets in ("uniform", "ends") and abs(value) == inf:
            # Infinity times a power that the kernels' numbers cannot hold: whether that is infinite or 0 is left open.
            value = 1e4 if value > 0 else -1e4
        if drawn[level].numel():
            drawn[level].view(-1)[at % drawn[level].numel()] = value
    return [lay_out(x, size, hw, name) for x, hw, name in zip(drawn, size.cells, problem.layouts, strict=True)]


def make_soft_targets(problem: Problem, levels: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    dtype = getattr(torch, problem.target_dtype)
    made = []
    for x in levels:
        draw = torch.rand(x.shape, generator=generator)
        if problem.targets == "sixteenths":
            y = (draw * 17).floor() / 16
        elif problem.targets == "hard":
            y = (draw < problem.positive).float()
        elif problem.targets == "ends":
            y = torch.tensor([0, 1, 1e-30, 1e-6, 1 - 2**-8, 1 - 2**-24])[(draw * 6).long()]
        else:
            y = draw
        y = y.to(dtype)  # of float32 numbers, which no conversion of the package rounds
        if problem.soft_layout == "expanded" and y.numel():
            y = y.reshape(-1)[:1].expand(y.shape)
        elif problem.soft_layout == "logits":
            y = torch.empty_like(x, dtype=dtype).copy_(y)
        made.append(y)
    return made


def make_weight(problem: Problem, generator: torch.Generator) -> list[Tensor]:
    """About a tenth of them 0, about a tenth negative."""
    dtype = getattr(torch, problem.weight or "float32")
    made = []
    for anchors in problem.size.level_anchors():
        draw = torch.rand(problem.images, anchors, generator=generator) + 0.25
        made.append(torch.where(draw < 0.35, 0, torch.where(draw > 1.15, -draw, draw)).to(dtype))
    return made


def make_scores(problem: Problem, drawn: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Half of the positives' anywhere, half at the ends; the others', which nobody looks at, are no numbers."""
    made = []
    for assigned in drawn:
        ends = torch.tensor([0, 1, 1e-30, 1e-6, 1 - 2**-8, 1 - 2**-24])
        draw, which = torch.rand(2, *assigned.shape, generator=generator)
        score = torch.where(which < 0.5, draw, ends[(draw * 6).long()])
        made.append(torch.where(assigned < 0, nan, score).to(getattr(torch, problem.scores or "float32")))
    return made


def make_layer(problem: Problem) -> nn.Module:
    """One that hands on what it gets."""
    dtype = getattr(torch, problem.dtype)
    channels = problem.classes * (problem.anchors if problem.rank == 4 else 1)
    layer = nn.Conv2d(channels, channels, 1, bias=False) if problem.rank == 4 else nn.Linear(channels, channels, False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels).view(layer.weight.shape))
    return layer.to(dtype).requires_grad_(False)


def make_incoming(problem: Problem, like: Tensor, numbers: Sequence[float], start: int) -> Tensor:
    """An incoming gradient for one result, from `numbers` over and over again."""
    if problem.incoming_form == "expanded" or like.ndim == 0:
        return like.new_tensor(numbers[start % len(numbers)]).expand(like.shape)
    flat = like.new_tensor([numbers[(start + i) % len(numbers)] for i in range(min(like.numel(), 64))])
    flat = flat.repeat(-(-like.numel() // max(1, len(flat))))[: like.numel()].view(like.shape)
    if problem.incoming_form == "strided":
        return flat.new_empty(*like.shape, 2)[..., 0].copy_(flat)
    return flat


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass
class Interval:
    """Where results of a dtype may lie. Exactly 0 stays 0 whatever it is multiplied by, infinity and NaN too."""

    low: Array
    high: Array
    must_be_nan: Array
    may_be_nan: Array
    dtype: torch.dtype

    @staticmethod
    def around(want: Array, bound: Array, dtype: torch.dtype, *, rounded: bool = True) -> Interval:
        missing = np.isnan(want)
        with np.errstate(invalid="ignore"):
            bound = np.where(np.isfinite(want), bound, 0)
            low, high = want - bound, want + bound
        if rounded:
            low, high = _rounded(low, dtype), _rounded(high, dtype)
        return Interval(low, high, missing, missing, dtype)

    def times(self, factor: Array) -> Interval:
        """Both ends by `factor`, and rounded.

        A factor that is no number is multiplied with the rounded gradient in every mode; one that is huge may be.
        """
        rounded = _rounded(self.low, self.dtype), _rounded(self.high, self.dtype)
        huge, number = ~(np.abs(factor) < 2.0**50), np.isfinite(factor)
        low_end = np.where(huge, np.where(number, np.minimum(rounded[0], self.low), rounded[0]), self.low)
        high_end = np.where(huge, np.where(number, np.maximum(rounded[1], self.high), rounded[1]), self.high)
        # What is infinite in its dtype is no number times 0.
        no_numbers = [np.isinf(end) & (factor == 0) for end in (low_end, high_end)]
        never = no_numbers[0] & no_numbers[1] & (low_end == high_end)
        exactly_zero, maybe_zero = (low_end == 0) & (high_end == 0), (low_end <= 0) & (high_end >= 0)
        missing = np.isnan(factor)
        must_be_nan = ~exactly_zero & (self.must_be_nan | (missing & ~maybe_zero) | never)
        may_be_nan = ~exactly_zero & (self.must_be_nan | missing | no_numbers[0] | no_numbers[1])
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            ends = [
                np.where((end == 0) | missing | no, 0, end * factor)
                for end, no in zip((low_end, high_end), no_numbers, strict=True)
            ]
            low, high = np.minimum(*ends), np.maximum(*ends)
            # The product is rounded to the kernels' own precision first.
            slack = (2.0**-52 if self.dtype == torch.float64 else 2.0**-23) * np.maximum(np.abs(low), np.abs(high))
            slack = np.where(np.isfinite(slack) & (slack > 0), slack + SMALLEST[_wide(self.dtype)], 0)
            low, high = _rounded(low - slack, self.dtype), _rounded(high + slack, self.dtype)
        return Interval(low, high, must_be_nan, may_be_nan, self.dtype)

    def assert_holds(self, got: Tensor, what: str) -> None:
        assert tuple(got.shape) == self.low.shape, f"{what}: shape {tuple(got.shape)}, expected {self.low.shape}"
        have = to_numpy(got)
        with np.errstate(invalid="ignore"):
            right = (have >= self.low) & (have <= self.high) & ~self.must_be_nan
        right |= self.may_be_nan & np.isnan(have)
        if not right.all():
            at = np.unravel_index(np.argmin(right), right.shape)
            expected = "NaN" if self.must_be_nan[at] else f"{self.low[at]!r} to {self.high[at]!r}"
            raise AssertionError(
                f"{what}: {int((~right).sum())} of {right.size} elements differ; first at {tuple(map(int, at))}: "
                f"got {have[at]!r}, expected {expected}"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounded(values: Array, dtype: torch.dtype) -> Array:
    """Monotone, so a result that lies between two numbers lies between the two rounded."""
    return np.asarray(torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype).double().numpy())


def promised(problem: Problem, exponent: float) -> float:
    """Relative, before the rounding to 16 bits: for exponents beyond 10 it grows with them (docs/usage.md)."""
    dtype = getattr(torch, problem.dtype)
    if problem.loss == "bce_loss":
        exponent = 2.0  # none, so the least that is promised
    relative = tolerance(dtype, exponent)
    if problem.numbers.get("detach_modulating_factor"):
        relative += OPTION_ROUNDINGS[_wide(dtype)]
    beyond = max(0.0, exponent - 10)
    return relative + (1e-13 if dtype == torch.float64 else 5e-7) * beyond


def flush(problem: Problem, levels: Sequence[Array], expected: Expected, exponent: float) -> list[Array]:
    """How far a result is off where a power, below the least normal number, became 0: by what multiplies it."""
    least = SMALLEST[torch.float64 if problem.dtype == "float64" else torch.float32]
    shift = abs(problem.numbers.get("beta", 1.0)) if problem.loss == "focal_loss_star" else 0.0
    if problem.activated:  # torch's binary_cross_entropy: derivatives of 1e12, logarithms of -100
        shift = 1e12
    return [
        least * (1 + np.abs(factor) * (1 + exponent) * (2 + shift + np.minimum(np.nan_to_num(np.abs(x), nan=0), 1e5)))
        for x, factor in zip(levels, expected.factors, strict=True)
    ]


def check(problem: Problem) -> None:
    """One call and its backward, against the oracle."""
    generator = torch.Generator().manual_seed(problem.seed)
    size, rank = problem.size, problem.rank
    levels = make_levels(problem, generator)
    background, ignore = problem.convention
    options: dict[str, Any] = {
        "num_classes": size.classes,
        "background_index": background,
        "ignore_index": ignore,
        "level_weights": None if problem.level_weights is None else list(problem.level_weights),
        "normalizer": problem.normalizer,
        "reduction": problem.reduction,
        "loss_weight": problem.loss_weight,
    }
    own = {name: as_given(value, problem.as_tensors) for name, value in problem.own}
    if problem.class_weight is not None:
        rows = problem.class_weight
        options["class_weight"] = as_given(rows if len(rows) > 1 else rows[0], problem.as_tensors)
    if isinstance(problem.normalizer, tuple):
        tensor = torch.tensor(problem.normalizer, dtype=getattr(torch, problem.normalizer_dtype))
        options["normalizer"] = tensor[0] if len(problem.normalizer) == 1 else tensor
    if problem.targets == "labels":
        drawn = draw_classes(size, generator, positive=problem.positive, ignored=problem.ignored)
        labels = encode(drawn, size.classes, background, ignore)
        if MEMBERS[problem.loss].parameters.takes_anchors:
            none = [torch.where(y == BACKGROUND, background or 0, y) for y in drawn]
            labels = [torch.where(y < 0, ignore, y) for y in none]
        labels = [y.to(getattr(torch, problem.target_dtype)) for y in labels]
        targets: Any = arrange(labels, size, problem.form, rank=rank)
        if problem.scores is not None:
            options["scores"] = arrange(make_scores(problem, drawn, generator), size, problem.scores_form, rank=rank)
    else:
        targets = make_soft_targets(problem, levels, generator)
    numbers = [to_numpy(x) for x in levels]
    if problem.weight is not None:
        options["weight"] = arrange(make_weight(problem, generator), size, problem.form, rank=rank)
    if problem.class_mask is not None:
        shape = (size.classes,) if rank == 2 else (size.images, size.classes)
        options["class_mask"] = torch.rand(shape, generator=generator) < problem.class_mask

    # What is promised.
    dtype = getattr(torch, problem.dtype)
    formula = oracle_pyramid.LOSSES[problem.loss](**{name: to_numpy(value) for name, value in own.items()})
    relative = promised(problem, formula.exponent)
    in_numpy = {name: to_numpy(value) for name, value in options.items()}
    expected = oracle_pyramid.pyramid_loss(numbers, to_numpy(targets), formula, relative=relative, **in_numpy)
    bounds = flush(problem, numbers, expected, formula.exponent)
    options |= {"grad_mode": problem.grad_mode, **own}

    # The call.
    watched = [t for t in _tensors([targets, options]) if t.device.type == "cpu"]
    before = [t.clone() for t in watched]
    inputs = [x.detach().requires_grad_(need) for x, need in zip(levels, problem.needs_grad, strict=True)]
    inplace = problem.mode == "inplace" and problem.fused is None
    given_levels = [x.clone() if inplace and x.requires_grad else x for x in inputs]
    call_options = dict(options)
    if not problem.name_classes and (rank != 4 or (problem.targets != "labels" and size.anchors == 1)):
        del call_options["num_classes"]
    loss = call(problem, given_levels, targets, call_options)
    unchanged = [
        np.array_equal(to_numpy(t), to_numpy(copy), equal_nan=True) for t, copy in zip(watched, before, strict=True)
    ]
    assert all(unchanged), "targets or options were changed"

    # The loss.
    parts = loss if isinstance(loss, list) else [loss]
    wants = expected.loss if problem.reduction == "none" else [expected.loss]
    errors = expected.loss_bound if problem.reduction == "none" else [expected.loss_bound]
    flushes: list[Any] = [sum(float(b.sum()) for b in bounds)]
    if problem.reduction == "none":  # of an anchor that has one loss, all that its logits have
        flushes = [b if b.shape == w.shape else np.full(w.shape, b.sum()) for b, w in zip(bounds, wants, strict=True)]
    result = dtype if problem.reduction == "none" else _wide(dtype)
    assert len(parts) == len(wants)
    for level, (got, want, error, flushed) in enumerate(zip(parts, wants, errors, flushes, strict=True)):
        assert got.dtype == result, f"loss[{level}]: {got.dtype}"
        bound = np.asarray(error) + flushed
        Interval.around(np.asarray(want, dtype=np.float64), bound, result).assert_holds(got, f"loss[{level}]")

    # The gradient.
    wanted = [level for level, need in enumerate(problem.needs_grad) if need]
    assert all(part.requires_grad == bool(wanted) for part in parts)
    if wanted:
        first = differentiate(problem, parts, inputs, problem.incoming, problem.again is not None)
        check_gradients(problem, first, levels, expected, bounds, problem.incoming, "gradient")
        if problem.again is not None:
            kept = [g.clone() for g in first]
            second = differentiate(problem, parts, inputs, problem.again, False)
            check_gradients(problem, second, levels, expected, bounds, problem.again, "second gradient")
            assert all(map(same_bits, first, kept)), "the second backward changed what the first had handed out"
    unchanged = [np.array_equal(to_numpy(x), n, equal_nan=True) for x, n in zip(inputs, numbers, strict=True)]
    assert all(unchanged), "logits were changed"


def as_given(value: Any, as_tensor: bool) -> Any:
    """Numbers for each class as callers have them: tuples are for printing."""
    if not isinstance(value, tuple):
        return value
    if as_tensor:
        return torch.tensor(value, dtype=torch.float64)
    return [list(row) if isinstance(row, tuple) else row for row in value]


def call(problem: Problem, levels: list[Tensor], targets: Any, options: dict[str, Any]) -> Any:
    logits: Any = levels[0] if problem.alone and len(levels) == 1 else levels
    member = MEMBERS[problem.loss]
    if problem.fused is None and not (problem.module and "num_classes" in options):
        loss = member.function(logits, targets, **options)
    elif problem.fused is not None and not problem.module and problem.loss in FUSED:
        kind = "conv" if problem.rank == 4 else "linear"
        options["anchor_weight"] = options.pop("weight", None)
        weight = make_layer(problem).weight
        fused: Callable[..., Tensor] = getattr(fastfocal, f"{kind}_{problem.loss}")
        options["num_classes"] = problem.classes
        loss = fused(logits, weight, None, targets, chunk_bytes=problem.fused, **options)
    else:
        of_call = {name: options.pop(name) for name in ("weight", "scores", "class_mask") if name in options}
        if isinstance(options["normalizer"], Tensor):
            of_call["normalizer"] = options.pop("normalizer")
        module = member.module(**{"num_classes": problem.classes, **options})
        if problem.fused is None:
            loss = module(logits, targets, **of_call)
        else:
            loss = module.fused_with(make_layer(problem), logits, targets, chunk_bytes=problem.fused, **of_call)
    if problem.reduction == "none":
        assert isinstance(loss, Tensor if logits is not levels else list)
    return loss


FUSED = ("focal_loss", "focal_loss_star")  # of which there are functions, beside the modules' method


def differentiate(
    problem: Problem, parts: list[Tensor], inputs: list[Tensor], numbers: Sequence[float], retain: bool
) -> list[Tensor]:
    reached = [i for i in range(len(parts)) if i != problem.undifferentiated or len(parts) == 1]
    return list(
        torch.autograd.grad(
            [parts[i] for i in reached],
            [x for x in inputs if x.requires_grad],
            [make_incoming(problem, parts[i], numbers, i) for i in reached],
            retain_graph=retain,
        )
    )


def factors(problem: Problem, levels: Sequence[Tensor], expected: Expected, numbers: Sequence[float]) -> list[Array]:
    """The incoming gradient at every logit."""
    made: list[Array] = []
    for level, x in enumerate(levels):
        if problem.reduction == "none":
            if level == problem.undifferentiated and len(levels) > 1:
                made.append(np.zeros(x.shape))
                continue
            shape = expected.loss[level].shape
            incoming = make_incoming(problem, torch.empty(shape, dtype=x.dtype), numbers, level).double()
            if shape != x.shape:
                of_image, of_anchor = expected.anchors[level]
                incoming = incoming.flatten()[
                    torch.from_numpy(of_image * (incoming.numel() // max(1, problem.images)) + of_anchor)
                ]
        else:
            count = {"level": len(levels), "image": problem.images}.get(problem.reduction)
            incoming = make_incoming(
                problem, torch.empty(() if count is None else (count,), dtype=_wide(x.dtype)), numbers, 0
            ).double()
            if problem.reduction == "level":
                incoming = incoming[level]
            elif problem.reduction == "image":
                incoming = incoming[0] if x.ndim == 2 else incoming.view(-1, *[1] * (x.ndim - 1))
        made.append(np.broadcast_to(incoming.numpy(), x.shape))
    return made


def check_gradients(
    problem: Problem,
    found: Sequence[Tensor],
    levels: Sequence[Tensor],
    expected: Expected,
    bounds: Sequence[Array],
    numbers: Sequence[float],
    what: str,
) -> None:
    incoming = factors(problem, levels, expected, numbers)
    wanted = [level for level, need in enumerate(problem.needs_grad) if need]
    assert len(found) == len(wanted)
    for got, level in zip(found, wanted, strict=True):
        x = levels[level]
        assert got.dtype == x.dtype
        layout = x if fastfocal.checks.is_dense(x) else torch.empty_like(x)
        for n, stride, expected_stride in zip(x.shape, got.stride(), layout.stride(), strict=True):
            if problem.fused is not None:
                break  # the layer's own backward made it
            assert n == 1 or got.numel() == 0 or stride == expected_stride, f"{what} of level {level}: {got.stride()}"
        error, want, factor = (values[level] for values in (expected.grad_bounds, expected.grads, expected.factors))
        # What is ignored or has a weight of 0 is 0 exactly, and so is what float64 has as 0 in fewer bits.
        bound = np.where((factor == 0) | ((error == 0) & (x.dtype != torch.float64)), 0, error + bounds[level])
        # Recomputed, the incoming gradient is multiplied in before the one rounding.
        gradient = Interval.around(want, bound, x.dtype, rounded=problem.mode != "recompute")
        gradient.times(incoming[level]).assert_holds(got, f"{what} of level {level}")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


PART = 500  # hypothesis remembers what it tried: it starts anew after so many
PROFILE = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20000)
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the first 500 examples; later ones count on"
    )
    parser.add_argument("--loss", choices=list(OWN), help="this one alone")
    arguments = parser.parse_args()
    losses = [arguments.loss] if arguments.loss else list(OWN)
    with tqdm(total=arguments.examples, unit=" problems", mininterval=1) as bar:
        first = arguments.seed
        while bar.n < arguments.examples:
            start, wanted = first, min(PART, arguments.examples - bar.n)
            bar.set_postfix(seed=start)

            @seed(start)
            @settings(PROFILE, max_examples=wanted)
            @given(problem=problems(losses))
            def run(problem: Problem) -> None:
                bar.update()
                check(problem)

            try:
                run()
            except BaseException:
                only = f" --loss {arguments.loss}" if arguments.loss else ""
                print(f"\nfound with --seed {start} --examples {wanted}{only}", flush=True)
                raise
            first += 1
    print(f"{bar.n} problems, seeds {arguments.seed} to {first - 1}: every loss and gradient as the oracle has them")


if __name__ == "__main__":
    main()
