"""Scores and class masks in the kernels: direct calls of the operators, against formulas in float64.

Here it matters that every positive meets its own anchor's score, wherever its logit lies, and that nothing else is read; how
accurate each loss is, is asked elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKGROUND, IGNORED, Backend, Size, assert_close, draw_classes, draw_levels, same_bits, to_numpy
from oracle import Array
from torch import Tensor

from fastfocal import ops
from fastfocal.losses.bce import BCELoss
from fastfocal.losses.focal import FocalLoss
from fastfocal.losses.iou_aware_bce import IoUAwareBCELoss
from fastfocal.losses.matchability_aware import MatchabilityAwareLoss
from fastfocal.losses.quality_focal import QualityFocalLoss
from fastfocal.losses.varifocal import VarifocalLoss

NAN = float("nan")
ODD = Size(2, 3, 5, ((7, 5), (3, 3), (1, 1)))
WIDE = Size(2, 2, 24, ((33, 31), (8, 8)))  # more than a tile of 8192 logits an image; planes of whole vectors
SEGMENTS = Size(2, 1, 1, ((65, 67),))
MANY = Size(1, 2, 3, tuple((2, 1 + i % 3) for i in range(18)))  # levels
LAYOUTS = ("contiguous", "channels_last", "offset", "channels_last_offset", "3d")

# --- formulas ---------------------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def cross_entropy(x: Array, t: Array) -> tuple[Array, Array]:
    return t * softplus(-x) + (1 - t) * softplus(x), sigmoid(x) - t


def quality(x: Array, s: Array) -> tuple[Array, Array]:
    p, (ce, difference) = sigmoid(x), cross_entropy(x, s)
    return difference**2 * ce, difference**3 + 2 * difference * p * sigmoid(-x) * ce


def iou_aware(x: Array, s: Array) -> tuple[Array, Array]:
    return cross_entropy(x, np.maximum(0.01, sigmoid(x) ** 0.25 * s**0.75))


def power_of_negative(gamma: float, detached: bool) -> Callable[[Array], tuple[Array, Array]]:
    def negative(x: Array) -> tuple[Array, Array]:
        p, rest = sigmoid(x), 0 if detached else gamma * sigmoid(-x) * softplus(x)
        return p**gamma * softplus(x), p**gamma * (p + rest)

    return negative


@dataclass(frozen=True)
class Scored:
    """A loss that reads scores: what the operator takes for it, and its two formulas."""

    kind: int
    parameters: list[float]
    negative: Callable[[Array], tuple[Array, Array]]
    positive: Callable[[Array, Array], tuple[Array, Array]]


def by_score(x: Array, s: Array) -> tuple[Array, Array]:
    ce, difference = cross_entropy(x, s)
    return s * ce, s * difference


LOSSES = {
    "varifocal": Scored(VarifocalLoss.kind, [2.0, 1.0, 0.0], power_of_negative(2.0, False), by_score),
    "varifocal_any_gamma": Scored(VarifocalLoss.kind, [1.5, 0.0, 1.0], power_of_negative(1.5, True), cross_entropy),
    "quality_focal": Scored(QualityFocalLoss.kind, [2.0, 0.0], power_of_negative(2.0, False), quality),
    "matchability_aware": Scored(
        MatchabilityAwareLoss.kind, [1.5], power_of_negative(1.5, True), lambda x, s: cross_entropy(x, s**1.5)
    ),
    "iou_aware_bce": Scored(IoUAwareBCELoss.kind, [0.25, 2.0], power_of_negative(2.0, False), iou_aware),
    "bce": Scored(BCELoss.kind, [0.0], power_of_negative(0.0, False), cross_entropy),
}


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Levels with labels, scores, weights and a class mask, by level as (N, M) or (N, M, K) in the order h, w, a."""

    size: Size
    layout: str
    levels: list[Tensor]
    assigned: list[Tensor]
    scores: list[Tensor]
    mask: Tensor | None = None
    anchor_weight: list[Tensor] | None = None
    soft: list[Tensor] | None = None
    alpha: tuple[float, float] = (0.75, 1.25)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def class_first(self) -> bool:
        return self.layout in ("contiguous", "offset")

    def rows(self, x: Tensor, level: int) -> Tensor:
        """(N, M, K) of what is shaped as a level's logits."""
        if x.dim() == 3:
            return x
        h, w = self.size.cells[level]
        return x.reshape(self.size.images, -1, self.size.classes, h, w).permute(0, 3, 4, 1, 2).flatten(1, 3)

    def like_logits(self, rows: Tensor, level: int) -> Tensor:
        """The same numbers in the shape and memory order of a level's logits."""
        x = self.levels[level]
        if x.dim() == 3:
            return rows.contiguous()
        n, m, k = rows.shape
        h, w = self.size.cells[level]
        return torch.empty_like(x, dtype=rows.dtype).copy_(
            rows.reshape(n, h, w, m // (h * w), k).permute(0, 3, 4, 1, 2).reshape(x.shape)
        )

    def packed(self, per_level: list[Tensor]) -> Tensor:
        """Flat, in the order of the packed labels."""
        flat = []
        for x, (h, w) in zip(per_level, self.size.cells, strict=True):
            if self.class_first:
                x = x.reshape(self.size.images, h * w, self.size.anchors).transpose(1, 2)
            flat.append(x.reshape(-1))
        return torch.cat(flat)

    def in_rows(self, per_level: list[Tensor]) -> Tensor:
        """(N, M of all levels) in the caller's order, with other numbers between the rows."""
        rows = torch.cat([x.reshape(self.size.images, -1) for x in per_level], dim=1)
        return torch.cat([rows, torch.full_like(rows[:, :3], 7.0)], dim=1)[:, : rows.shape[1]]

    def labels(self) -> list[Tensor]:
        classes = self.size.classes
        return [
            torch.where(x == BACKGROUND, classes, torch.where(x == IGNORED, -1, x)).contiguous() for x in self.assigned
        ]


def draw(size: Size, layout: str, dtype: torch.dtype, generator: torch.Generator, positive: float = 0.15) -> Problem:
    """Scores of anchors that are not positive are NaN, and so are the logits of ignored ones."""
    levels = draw_levels(size, generator, dtype=dtype, layout=layout)
    assigned = draw_classes(size, generator, positive=positive)
    accumulation = ops.accumulation_dtype(dtype)
    scores = [
        torch.where(x >= 0, torch.rand(x.shape, generator=generator, dtype=torch.float64), NAN).to(accumulation)
        for x in assigned
    ]
    problem = Problem(size, layout, levels, assigned, scores)
    for level, x in enumerate(assigned):
        rows = torch.where((x == IGNORED)[..., None], NAN, problem.rows(levels[level], level).double()).to(dtype)
        levels[level].copy_(problem.like_logits(rows, level))
    return problem


def call(
    problem: Problem, loss: Scored, backend: Backend, *, scores: bool = True, rows: bool = False, **options: Any
) -> Any:
    """Loss and gradients, as the operators give them. rows: scores as the caller has them, else as the packed labels lie."""
    to = backend.device
    levels = [x.to(to) if x.device != to else x for x in problem.levels]
    count = len(levels)
    packed = None
    if problem.soft is None:
        packed, _ = ops.operators.pack_labels(
            [x.to(to) for x in problem.labels()], levels, None, problem.size.classes, problem.size.classes, -1, 0, 1.0
        )
    soft = None if problem.soft is None else [problem.like_logits(y, i).to(to) for i, y in enumerate(problem.soft)]
    weight = problem.anchor_weight
    return ops.operators.pyramid_loss(
        levels,
        packed,
        soft,
        (problem.in_rows if rows else problem.packed)(problem.scores).to(to) if scores and soft is None else None,
        None if weight is None else problem.packed(weight).to(to),
        None,
        None if problem.mask is None else problem.mask.to(to),
        None,
        [1.0 + 0.5 * i for i in range(count)],
        *problem.alpha,
        loss.kind,
        loss.parameters,
        problem.size.classes,
        0,
        options.get("reduction", ops.SUM),
        [1] * count,
    )


def expect(problem: Problem, loss: Scored) -> Iterator[tuple[Array, Array]]:
    """Weighted loss and gradient of each logit, a level (N, M, K) at a time; float64."""
    for level, x_ in enumerate(problem.levels):
        x = to_numpy(problem.rows(x_, level))
        k = np.arange(problem.size.classes)
        assigned = to_numpy(problem.assigned[level])[..., None]
        if problem.soft is None:
            positive = assigned == k
            score = np.broadcast_to(to_numpy(problem.scores[level])[..., None], x.shape)
            apart = np.broadcast_to(assigned == IGNORED, x.shape)
        else:
            score = to_numpy(problem.soft[level])
            positive, apart = score > 0, np.zeros(x.shape, dtype=bool)
        if problem.mask is not None:
            apart = apart | ~problem.mask.cpu().numpy()[:, None, :]
        x, score = np.where(apart, 0.0, x), np.where(positive, score, 0.5)
        weight = np.where(positive, *problem.alpha) * (1 + 0.5 * level)
        if problem.anchor_weight is not None:
            weight = weight * to_numpy(problem.anchor_weight[level])[..., None]
        parts = [np.where(positive, a, b) for a, b in zip(loss.positive(x, score), loss.negative(x), strict=True)]
        yield tuple(np.where(apart, 0.0, weight * part) for part in parts)  # type: ignore[misc]


def check(problem: Problem, loss: Scored, backend: Backend, **options: Any) -> Any:
    losses, gradients = results = call(problem, loss, backend, **options)
    if problem.soft is None:
        again = call(problem, loss, backend, rows=True, **options)
        assert all(same_bits(a, b) for a, b in zip([*losses, *gradients], [*again[0], *again[1]], strict=True))
    expected = list(expect(problem, loss))
    dtype = problem.levels[0].dtype
    # As cases.py promises; differences such as p - s are known to a rounding of their terms, at most the weight, 4.
    relative = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 4e-5)
    absolute = {torch.float64: 1e-13, torch.float32: 4e-6}.get(dtype, 4e-5)
    if options.get("reduction") == ops.NONE:
        pairs = [(got, want) for got, (want, _) in zip(losses, expected, strict=True)]
    else:
        total = math.fsum(math.fsum(part.ravel()) for part, _ in expected)
        assert losses[0].item() == pytest.approx(total, rel=relative)
        pairs = []
    pairs += [(got, want) for got, (_, want) in zip(gradients, expected, strict=True)]
    for i, (got, want) in enumerate(pairs):
        rows = problem.rows(got, i % len(expected)).contiguous()
        assert_close(rows, want, relative, magnitude=np.abs(want) + absolute / relative, what=f"{i}")
    return results


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_positive_meets_its_own_score(
    backend: Backend, name: str, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    check(draw(ODD, layout, dtype, generator), LOSSES[name], backend)


@pytest.mark.parametrize("positive", (0.02, 0.9))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", (WIDE, SEGMENTS, MANY), ids=("tiles", "one_class", "levels"))
@pytest.mark.parametrize("name", ("varifocal", "matchability_aware", "bce"))
def test_sizes(
    backend: Backend, name: str, size: Size, layout: str, positive: float, generator: torch.Generator
) -> None:
    check(draw(size, layout, torch.float32, generator, positive), LOSSES[name], backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_beside_anchor_weights(
    backend: Backend, name: str, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The generic path."""
    problem = draw(ODD, layout, dtype, generator)
    accumulation = ops.accumulation_dtype(dtype)
    problem.anchor_weight = [torch.rand(x.shape, generator=generator).to(accumulation) for x in problem.assigned]
    check(problem, LOSSES[name], backend)


@pytest.mark.parametrize("name", LOSSES)
def test_elementwise(backend: Backend, name: str, generator: torch.Generator) -> None:
    check(draw(ODD, "contiguous", torch.float32, generator), LOSSES[name], backend, reduction=ops.NONE)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("name", LOSSES)
def test_without_scores_they_are_1(
    backend: Backend, name: str, layout: str, weighted: bool, generator: torch.Generator
) -> None:
    problem = draw(ODD, layout, torch.float32, generator)
    if weighted:
        problem.anchor_weight = [torch.rand(x.shape, generator=generator) for x in problem.assigned]
    losses, gradients = call(problem, LOSSES[name], backend, scores=False)
    problem.scores = [torch.ones_like(x) for x in problem.scores]
    with_ones = call(problem, LOSSES[name], backend)
    assert all(same_bits(a, b) for a, b in zip([*losses, *gradients], [*with_ones[0], *with_ones[1]], strict=True))


@pytest.mark.parametrize("weighted", (False, True), ids=("dense", "generic"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last_offset", "3d"))
@pytest.mark.parametrize("name", LOSSES)
def test_scores_as_soft_targets(
    backend: Backend, name: str, layout: str, dtype: torch.dtype, weighted: bool, generator: torch.Generator
) -> None:
    """A target of 0 is a negative, with its weight; any other a positive with that score."""
    problem = draw(ODD, layout, dtype, generator)
    shape = [problem.rows(x, i).shape for i, x in enumerate(problem.levels)]
    for x in problem.levels:
        x.nan_to_num_(nan=0.5)
    problem.soft = [torch.rand(s, generator=generator) * (torch.rand(s, generator=generator) < 0.3) for s in shape]
    problem.soft = [y.to(dtype) for y in problem.soft]
    if weighted:
        accumulation = ops.accumulation_dtype(dtype)
        problem.anchor_weight = [torch.rand(x.shape, generator=generator).to(accumulation) for x in problem.assigned]
    check(problem, LOSSES[name], backend)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_a_nan_score_stays_with_its_anchor(backend: Backend, layout: str, generator: torch.Generator) -> None:
    problem = draw(ODD, layout, torch.float32, generator)
    want = [problem.rows(g, i) for i, g in enumerate(call(problem, LOSSES["bce"], backend)[1])]
    problem.scores[0][1, -1] = NAN  # positive, as draw_classes makes the last one
    losses, gradients = call(problem, LOSSES["bce"], backend)
    assert losses[0].isnan()
    for i, (got, before) in enumerate(zip(gradients, want, strict=True)):
        rows = problem.rows(got, i)
        changed = ~((rows == before) | (rows.isnan() & before.isnan()))
        assert changed.nonzero().tolist() == ([[1, rows.shape[1] - 1, ODD.classes - 1]] if i == 0 else [])


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("name", ("varifocal", "matchability_aware"))
def test_any_number_of_threads_gives_the_same_bits(name: str, layout: str, generator: torch.Generator) -> None:
    problem = draw(Size(2, 3, 8, ((64, 63), (32, 31))), layout, torch.float32, generator)
    backend, threads = Backend("cpu", torch.device("cpu")), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            losses, gradients = call(problem, LOSSES[name], backend)
            _, total = count_scores(problem, backend)
            found.append([*losses, *gradients, total])
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# --- class masks ------------------------------------------------------------------------------------------------------

FOCAL = Scored(FocalLoss.kind, [2.0, 0.0, 0.0], power_of_negative(2.0, False), lambda x, _: mirrored(x))


def mirrored(x: Array) -> tuple[Array, Array]:
    loss, gradient = power_of_negative(2.0, False)(-x)
    return loss, -gradient


def masks(size: Size, form: str, generator: torch.Generator) -> Tensor:
    mask = torch.rand(size.images, size.classes, generator=generator) < 0.6
    mask[0, 0], mask[-1, -1] = False, True
    if form == "transposed":
        return mask.t().contiguous().t()
    if form == "strided":
        return mask.repeat_interleave(3, 1)[:, ::3]
    if form == "expanded":
        return mask[:1].expand_as(mask)
    return mask


@pytest.mark.parametrize("form", ("contiguous", "transposed", "strided", "expanded"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "3d"))
@pytest.mark.parametrize("name", ("focal", "varifocal", "matchability_aware"))
def test_a_masked_class_leaves_no_trace(
    backend: Backend, name: str, layout: str, form: str, generator: torch.Generator
) -> None:
    """Whatever its logits are, and whether or not its anchors are positive; without the mask they would be NaN."""
    problem = draw(ODD, layout, torch.float32, generator, positive=0.5)
    problem.mask = masks(ODD, form, generator)
    spoil_masked(problem)
    check(problem, {**LOSSES, "focal": FOCAL}[name], backend, scores=name != "focal")


def spoil_masked(problem: Problem) -> None:
    assert problem.mask is not None
    for level, x in enumerate(problem.levels):
        rows = torch.where(problem.mask[:, None, :], problem.rows(x, level), NAN)
        x.copy_(problem.like_logits(rows, level))


@pytest.mark.parametrize("reduction", (ops.SUM, ops.NONE))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("size", (ODD, WIDE, SEGMENTS), ids=("odd", "tiles", "one_class"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_masks_in_every_size(
    backend: Backend, layout: str, size: Size, dtype: torch.dtype, reduction: int, generator: torch.Generator
) -> None:
    problem = draw(size, layout, dtype, generator)
    problem.mask = masks(size, "contiguous", generator)
    spoil_masked(problem)
    check(problem, FOCAL, backend, scores=False, reduction=reduction)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "3d"))
def test_masks_over_soft_targets(backend: Backend, layout: str, generator: torch.Generator) -> None:
    problem = draw(ODD, layout, torch.float32, generator)
    for x in problem.levels:
        x.nan_to_num_(nan=0.5)
    shape = [problem.rows(x, i).shape for i, x in enumerate(problem.levels)]
    problem.soft = [(torch.rand(s, generator=generator) < 0.3).float() for s in shape]  # of the two classes alone
    problem.mask = masks(ODD, "contiguous", generator)
    spoil_masked(problem)
    check(problem, FOCAL, backend)


# --- counts -----------------------------------------------------------------------------------------------------------


def count_scores(problem: Problem, backend: Backend, minimum: float = 1.0, rows: bool = False) -> tuple[Tensor, Tensor]:
    size, to = problem.size, backend.device
    scores = (problem.in_rows if rows else problem.packed)(problem.scores).to(to)
    return ops.operators.pack_labels(  # type: ignore[no-any-return]
        [x.to(to) for x in problem.labels()], [x.to(to) for x in problem.levels], scores,
        size.classes, size.classes, -1, ops.COUNT_SCORES, minimum,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", (ODD, WIDE, SEGMENTS, MANY), ids=("odd", "tiles", "one_class", "levels"))
def test_the_sum_of_scores(
    backend: Backend, size: Size, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Of positives alone: the others' are NaN."""
    problem = draw(size, layout, dtype, generator)
    packed, total = count_scores(problem, backend)
    want = math.fsum(s for scores in problem.scores for s in scores.flatten().tolist() if not math.isnan(s))
    assert total.shape == () and total.dtype == torch.float64
    assert total.item() == pytest.approx(max(1.0, want), rel=1e-14)  # float64, in another order
    assert torch.equal(packed.long().cpu(), problem.packed(problem.assigned))
    assert count_scores(problem, backend, 1e6)[1].item() == 1e6
    assert same_bits(count_scores(problem, backend, rows=True)[1], total)


def test_the_sum_of_no_scores_is_the_minimum(backend: Backend, generator: torch.Generator) -> None:
    problem = draw(ODD, "contiguous", torch.float32, generator, positive=0.0)
    assert count_scores(problem, backend, 0.5)[1].item() == 0.5


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_anchors_of_each_image(backend: Backend, layout: str, generator: torch.Generator) -> None:
    problem, to = draw(ODD, layout, torch.float32, generator), backend.device
    problem.assigned[0][1] = torch.where(problem.assigned[0][1] == IGNORED, 0, problem.assigned[0][1])
    arguments = [x.to(to) for x in problem.labels()], [x.to(to) for x in problem.levels], None
    want = sum((x != IGNORED).sum(1) for x in problem.assigned).tolist()  # type: ignore[union-attr]
    assert want[0] != want[1]
    for minimum in (1.0, float(max(want))):
        _, counted = ops.operators.pack_labels(
            *arguments, ODD.classes, ODD.classes, -1, ops.COUNT_ANCHORS_PER_IMAGE, minimum
        )
        assert counted.dtype == torch.float64 and counted.tolist() == [max(minimum, n) for n in want]
