"""What is measured: pyramids of logits, their labels, and the options of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastfocal import reference
from fastfocal.losses import LOSSES

ALPHA = 0.25
MEMBERS = {member.parameters.name: member for member in LOSSES}
# Of the other losses: the defaults, which are their projects' own.
OPTIONS: dict[str, Mapping[str, Any]] = {name: {} for name in MEMBERS if name != "focal_loss"}
LOGIT_MEAN = -4.0  # randn - 4: a detector in training, nearly everything a confident negative
POSITIVE, IGNORED = 0.005, 0.01  # shares of the anchors
MULTI_HOT = 0.03  # of the logits: two or three labels of 80
# float16 is trained with a loss scale. Without one most gradients, divided by the positives, round to zero.
LOSS_SCALE = {torch.float16: 65536.0}


@dataclass(frozen=True)
class Pyramid:
    """The shape of all levels: N images, A anchors per cell, K classes, and each level's height and width."""

    name: str
    key: str  # short, for the names of tests
    images: int
    anchors: int
    classes: int
    cells: tuple[tuple[int, int], ...]

    @property
    def level_anchors(self) -> list[int]:
        """M of every level."""
        return [h * w * self.anchors for h, w in self.cells]

    @property
    def all_anchors(self) -> int:
        return self.images * sum(self.level_anchors)

    @property
    def logits(self) -> int:
        return self.all_anchors * self.classes


_LEVELS_800X1344 = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
_LEVELS_800X800 = ((100, 100), (50, 50), (25, 25), (13, 13), (7, 7))
_LEVELS_320X320 = ((40, 40), (20, 20), (10, 10), (5, 5), (3, 3))

MAIN = Pyramid("P3-P7 800x1344 N=2 K=80", "800x1344", 2, 9, 80, _LEVELS_800X1344)
SMALL = Pyramid("P3-P7 320x320 N=1 K=80", "320x320", 1, 9, 80, _LEVELS_320X320)
SINGLE = Pyramid("one level 10x10 N=1 K=80", "10x10", 1, 9, 80, ((10, 10),))
LARGE = Pyramid("P3-P7 800x800 N=16 K=80", "800x800", 16, 9, 80, _LEVELS_800X800)
HUGE = Pyramid("P3-P7 800x800 N=32 K=264", "800x800_K264", 32, 9, 264, _LEVELS_800X800)


def flat_pyramid(logits: int, levels: int) -> Pyramid:
    """About `logits` logits in `levels` levels, each a quarter of the one before it where there is room."""
    classes = 80
    anchors = max(levels, round(logits / classes))
    share = [max(1, int(anchors * 0.75 * 0.25**level)) for level in range(levels)]
    share[0] += anchors - sum(share)
    name = f"{anchors * classes:.1e} logits in {levels} level{'s' if levels > 1 else ''}"
    return Pyramid(name, f"{logits:.0e}_in_{levels}", 1, 1, classes, tuple((m, 1) for m in share))


@dataclass(frozen=True)
class Case:
    """One group of the benchmark: what every implementation in it computes."""

    section: str
    pyramid: Pyramid
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"  # or "channels_last", both (N, A*K, H, W); or "flattened", (N, M, K)
    gamma: float = 2.0
    grad_mode: str = "save"
    # "labels"; "classes": labels without a background. Dense ones, shaped as the logits: "soft": a score at each positive;
    # "heatmap": 1 at peaks, less beside them; "multi-hot": 0 and 1
    targets: str = "labels"
    threads: int | None = None  # None: as torch is set
    # "reduced"; "weighted": with a weight (of 1) for each anchor; "unreduced": a loss for each logit, then their sum
    form: str = "reduced"
    loss: str = "focal_loss"  # the function's name; any other has its options in OPTIONS, and `gamma` means nothing

    @property
    def name(self) -> str:
        """The group's name: pyramid, dtype, layout, gamma (or loss), grad mode, and what else is out of the ordinary."""
        parts = [self.pyramid.name, str(self.dtype).removeprefix("torch."), self.layout]
        parts += [f"gamma {self.gamma:g}" if self.loss == "focal_loss" else self.loss, self.grad_mode]
        parts += [f"{self.targets} targets"] if self.is_dense else []
        parts += [self.form] if self.form != "reduced" else []
        parts += [f"threads {self.threads}"] if self.threads else []
        return ", ".join(parts)

    @property
    def key(self) -> str:
        """The same, short."""
        parts = [self.pyramid.key, str(self.dtype).removeprefix("torch."), self.layout]
        parts += [f"{self.gamma:g}" if self.loss == "focal_loss" else self.loss]
        parts += [self.grad_mode] + ([self.targets] if self.is_dense else [])
        parts += [self.form] if self.form != "reduced" else []
        return "-".join(parts + ([f"threads{self.threads}"] if self.threads else []))

    @property
    def is_dense(self) -> bool:
        return self.targets in ("soft", "heatmap", "multi-hot")

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the loss itself."""
        return {"alpha": ALPHA, "gamma": self.gamma} if self.loss == "focal_loss" else OPTIONS[self.loss]

    @property
    def logit_bytes(self) -> int:
        return self.pyramid.logits * self.dtype.itemsize

    def bytes_moved(self) -> int:
        """The least that must move: logits read and gradient written once, targets read once.

        "recompute" reads logits and targets in both directions. "inplace" moves what "save" does. Unreduced: the losses are
        written and read too.
        """
        targets = self.logit_bytes if self.is_dense else self.pyramid.all_anchors * 8
        reads = 2 if self.grad_mode == "recompute" else 1
        losses = 2 * self.logit_bytes if self.form == "unreduced" else 0
        weights = self.pyramid.all_anchors * 4 if self.form == "weighted" else 0
        return reads * (self.logit_bytes + targets + weights) + self.logit_bytes + losses


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: logits of every level, and labels (N, sum M) in int64 or soft targets shaped as the logits."""

    levels: list[Tensor]
    labels: Tensor
    soft: list[Tensor] | None
    positives: int
    weights: Tensor  # (N, sum M), all 1
    scores: Tensor | None = None  # (N, sum M), where the loss takes them

    @property
    def targets(self) -> Tensor | list[Tensor]:
        return self.labels if self.soft is None else self.soft


def flatten(level: Tensor, classes: int) -> Tensor:
    """(N, A*K, H, W) to (N, M, K), anchors in the order h, w, a: what every PyTorch implementation begins with."""
    if level.ndim == 3:
        return level
    n, channels, h, w = level.shape
    rows = level.view(n, channels // classes, classes, h, w).permute(0, 3, 4, 1, 2)
    return rows.reshape(n, h * w * (channels // classes), classes)


def lay_out(rows: Tensor, case: Case, cells: tuple[int, int]) -> Tensor:
    """(N, M, K) in the case's layout; the reverse of `flatten`."""
    if case.layout == "flattened":
        return rows
    n, _, classes = rows.shape
    h, w = cells
    level = rows.view(n, h, w, case.pyramid.anchors, classes).permute(0, 3, 4, 1, 2).reshape(n, -1, h, w)
    memory = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return level.contiguous(memory_format=memory)


def draw_labels(case: Case, generator: torch.Generator) -> Tensor:
    """(N, sum M) int64, on the generator's device."""
    pyramid, device = case.pyramid, generator.device
    kind = torch.rand(pyramid.images, sum(pyramid.level_anchors), generator=generator, device=device)
    labels = torch.randint(pyramid.classes, kind.shape, generator=generator, device=device)
    if kind.numel() < 1000:
        kind[0, 0] = 0  # at least one positive
    if case.targets != "classes":
        labels[kind >= POSITIVE] = pyramid.classes
    if case.loss == "focal_loss":  # the assigners of the other losses' heads ignore no anchor
        labels[kind >= 1 - IGNORED] = -1
    return labels


def draw(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """The same values in every layout and, up to rounding, in every dtype. Drawn where they are wanted: 1e9 take a while."""
    generator = torch.Generator(device).manual_seed(seed)
    pyramid = case.pyramid
    labels = draw_labels(case, generator)
    positives = int(((labels >= 0) & (labels < pyramid.classes)).sum())

    levels: list[Tensor] = []
    soft: list[Tensor] = []
    for cells, of_level in zip(pyramid.cells, labels.split(pyramid.level_anchors, dim=1), strict=True):
        rows = torch.randn(*of_level.shape, pyramid.classes, generator=generator, device=device)
        rows = rows.add_(LOGIT_MEAN).to(case.dtype)
        levels.append(lay_out(rows, case, cells))
        if case.targets == "soft":  # as quality focal loss has them: a score in (0, 1) at each positive's class
            target = torch.zeros_like(rows)
            image, anchor = ((of_level >= 0) & (of_level < pyramid.classes)).nonzero(as_tuple=True)
            score = torch.rand(len(image), generator=generator, device=device).to(case.dtype)
            target[image, anchor, of_level[image, anchor]] = score
            soft.append(lay_out(target, case, cells))
        elif case.is_dense:
            values = torch.rand(rows.shape, generator=generator, device=device)
            if case.targets == "multi-hot":
                target = (values < MULTI_HOT).to(case.dtype)
            else:  # nearly everything far from a peak; and peaks at the positives' classes
                target = values.pow_(8).mul_(0.99).to(case.dtype)
                image, anchor = ((of_level >= 0) & (of_level < pyramid.classes)).nonzero(as_tuple=True)
                target[image, anchor, of_level[image, anchor]] = 1
            soft.append(lay_out(target, case, cells))
    weights = torch.ones(labels.shape if case.form == "weighted" else (0,), device=device)
    scores = None
    if MEMBERS[case.loss].parameters.takes_scores:
        scores = torch.rand(labels.shape, generator=generator, device=device)
    return Inputs(levels, labels, soft or None, positives, weights, scores)


# --- the right answer ---------------------------------------------------------------------------------------------

# Relative error of the loss; and L2 norm of the error over that of the answer, of every level's gradient, and of the
# gradient at positive and ignored anchors alone. float32: torchvision's formula subtracts p from 1, which costs the
# small gradients of well classified anchors three digits, so no rival could be held to the 2e-6 element by element to
# which fastfocal's tests hold it. 16 bit: the result is rounded once, by 2^-8 (bfloat16) or 2^-11 (float16) at most.
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8 + 2e-5, torch.float16: 2**-11 + 2e-5}


def chunk_logits(device: torch.device) -> int:
    """How many are compared at once: on the CPU what stays in cache, on a GPU what keeps it busy."""
    return 2**17 if device.type == "cpu" else 2**24


@dataclass(frozen=True)
class Answer:
    """Loss and gradients (N, M, K), one per level, of `fastfocal.reference` in float64.

    For 16-bit logits the gradients are kept in float32, whose rounding is nothing beside theirs: 1e9 logits are to be checked.
    """

    loss: float
    gradients: list[Tensor]


def answer(case: Case, inputs: Inputs) -> Answer:
    """Piece by piece, and on one thread of a CPU: at once, autograd over the reference would take 200 bytes a logit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _answer(case, inputs)
    finally:
        torch.set_num_threads(threads)


def _answer(case: Case, inputs: Inputs) -> Answer:
    pyramid = case.pyramid
    chunk = max(1, chunk_logits(inputs.labels.device) // pyramid.classes)
    normalizer = float(max(1, inputs.positives))
    loss = 0.0
    gradients = []
    per_level = inputs.labels.split(pyramid.level_anchors, dim=1)
    loss_function = getattr(reference, case.loss)
    scores = None if inputs.scores is None else inputs.scores.double().split(pyramid.level_anchors, dim=1)
    for index, (level, labels) in enumerate(zip(inputs.levels, per_level, strict=True)):
        rows = flatten(level.detach(), pyramid.classes)
        targets = labels if inputs.soft is None else flatten(inputs.soft[index], pyramid.classes)
        kept = torch.float32 if case.dtype.itemsize == 2 else torch.float64
        gradient = torch.empty(rows.shape, dtype=kept, device=rows.device)
        for image in range(pyramid.images):
            for begin in range(0, rows.shape[1], chunk):
                piece = (image, slice(begin, begin + chunk))
                x = rows[piece].double().requires_grad_()
                target = targets[piece] if inputs.soft is None else targets[piece].double()
                scored = {} if scores is None else {"scores": scores[index][piece]}
                part = loss_function(x, target, normalizer=normalizer, **case.options, **scored)
                gradient[piece] = torch.autograd.grad(part, x)[0]
                loss += float(part.detach())
        gradients.append(gradient)
    return Answer(loss, gradients)


def check(name: str, loss: Tensor, gradients: list[Tensor], case: Case, inputs: Inputs, right: Answer) -> None:
    """Raises AssertionError unless loss and gradients are those of the reference to within the tolerances above."""
    assert loss.dtype == torch.float32, f"{name}: the loss is {loss.dtype}"
    error = abs(float(loss) / right.loss - 1)
    assert error <= LOSS_TOLERANCE, f"{name}: loss {float(loss)}, expected {right.loss}, relative error {error:.1e}"
    per_level = inputs.labels.split(case.pyramid.level_anchors, dim=1)
    for index, (level, got, want) in enumerate(zip(inputs.levels, gradients, right.gradients, strict=True)):
        assert got.dtype == level.dtype and got.stride() == level.stride(), f"{name}: level {index} is {got.dtype}"
        special = per_level[index] != case.pyramid.classes
        rows = flatten(got, case.pyramid.classes)
        # Positives and ignored anchors also alone: they are few, and drown in the norm of all.
        for what, chosen in (("gradient", torch.ones_like(special)), ("gradient at positives and ignored", special)):
            error, expected = distance(rows, want, chosen, LOSS_SCALE.get(case.dtype, 1.0))
            bound = GRADIENT_TOLERANCE[case.dtype] * expected
            assert error <= bound, f"{name}: {what} of level {index}: error {error:.2e}, at most {bound:.2e}"


def distance(got: Tensor, want: Tensor, chosen: Tensor, loss_scale: float) -> tuple[float, float]:
    """L2 norms of got / loss_scale - want and of want, (N, M, K), over the chosen anchors (N, M); a piece at a time."""
    error = expected = 0.0
    anchors = max(1, chunk_logits(got.device) // got.shape[2])
    for image in range(got.shape[0]):
        pieces = (t[image].split(anchors) for t in (got, want, chosen))
        for have, true, rows in zip(*pieces, strict=True):
            right = true[rows].double()
            error += float((have[rows].double() / loss_scale - right).square().sum())
            expected += float(right.square().sum())
    return error**0.5, expected**0.5


# --- which cases --------------------------------------------------------------------------------------------------

_MAIN = Case("main", MAIN)
# Cases that share values follow each other, so that the answer is computed once.
DEFAULT = [
    _MAIN,
    replace(_MAIN, layout="channels_last"),
    replace(_MAIN, layout="flattened"),
    replace(_MAIN, grad_mode="recompute"),
    replace(_MAIN, grad_mode="inplace"),
    replace(_MAIN, threads=1),
    replace(_MAIN, gamma=1.5),
    replace(_MAIN, form="weighted"),
    replace(_MAIN, form="unreduced", grad_mode="recompute"),
    replace(_MAIN, targets="soft"),
    replace(_MAIN, dtype=torch.bfloat16),
    replace(_MAIN, dtype=torch.float16, grad_mode="recompute"),
]
SMALL_WORK = [Case("small", SMALL), Case("small", SINGLE)]
EXTRA = [
    replace(_MAIN, layout="channels_last", grad_mode="inplace"),
    replace(_MAIN, layout="flattened", grad_mode="recompute"),
    replace(_MAIN, dtype=torch.bfloat16, layout="channels_last"),
    replace(_MAIN, dtype=torch.bfloat16, layout="flattened"),
    replace(_MAIN, dtype=torch.bfloat16, grad_mode="inplace"),
    replace(_MAIN, dtype=torch.bfloat16, threads=1),
    replace(_MAIN, dtype=torch.bfloat16, gamma=1.5),
    replace(_MAIN, dtype=torch.float16, layout="flattened", grad_mode="recompute"),
    replace(_MAIN, gamma=0.0),
    Case("large", LARGE),
    Case("large", LARGE, dtype=torch.bfloat16),
]
# What a GPU is for; the default there too.
GPU = [
    Case("large", pyramid, dtype=dtype, layout=layout)
    for pyramid in (LARGE, HUGE)
    for dtype in (torch.float32, torch.bfloat16)
    for layout in ("nchw", "flattened")
]


def scaling(largest: float) -> list[Case]:
    """Time against the number of logits: five levels, 1e3 logits to `largest`. bfloat16 from 1e8 on."""
    sizes = [10**power for power in range(3, 8)] + [3 * 10**7]
    sizes += [10**power for power in range(8, 11)]
    return [
        Case(
            "scaling",
            flat_pyramid(size, 5),
            dtype=torch.bfloat16 if size >= 10**8 else torch.float32,
            layout="flattened",
        )
        for size in reversed(sizes)  # the large ones first, while the heap has no holes that they could use
        if size <= largest
    ]


def level_counts() -> list[Case]:
    """The same logits in more and more levels."""
    return [Case("levels", flat_pyramid(2 * 10**6, levels), layout="flattened") for levels in (1, 2, 5, 10, 40)]
