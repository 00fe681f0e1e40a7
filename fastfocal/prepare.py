"""What the operators take, made of what callers gave: one pass over the arguments of a call, each of which enters once.

Every error is raised here or in checks.py, before anything is computed or written, and names the argument, the level, what came
and what was expected.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastfocal import checks, ops
from fastfocal.checks import Levels, as_levels, shape
from fastfocal.ops import OperatorOptions
from fastfocal.options import Inputs, Options
from fastfocal.registration import NO_VMAP, is_mapped

if TYPE_CHECKING:
    from fastfocal.losses.loss import Loss, Weight

# "mean" is a sum over a divisor of its own.
REDUCTIONS = {"sum": ops.SUM, "mean": ops.SUM, "level": ops.LEVEL, "image": ops.IMAGE, "none": ops.NONE}


@dataclass
class Pyramid:
    """The logits of every level: the tensors, those that the kernels read in their place, K, and M of every level.

    Where logits are still to come, these have their shapes and no memory of their own; `placeholders` have one channel where
    they will have an anchor's K, and lie as the labels are to be packed.
    """

    levels: list[Tensor]
    dense: list[Tensor]
    num_classes: int
    anchors: list[int]
    placeholders: list[Tensor] | None = None

    @property
    def images(self) -> int:
        return ops.images(self.levels[0])

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return ops.accumulation_dtype(self.levels[0].dtype)


@dataclass
class Divisor:
    """What the sum is divided by: a number, and a tensor on the logits' device, of what `pack_labels` counts and of others."""

    count: int = ops.COUNT_NOTHING
    minimum: float = 1.0
    number: float = 1.0
    factor: Tensor | None = None  # of what is counted, or the divisor itself
    present: Tensor | None = None  # (N,), the classes that each image has: a factor of its anchors
    class_mask: Tensor | None = None  # (N, K): of the anchors, those whose own class is there are counted
    given: bool = False  # by the caller: used as it is
    counted: Tensor | None = None  # of soft targets; labels are counted where they are packed

    def of(self, counted: Tensor) -> Tensor | None:
        if self.present is not None:
            return (counted * self.present).sum().clamp(min=1)
        if self.class_mask is not None:
            return counted.clamp(min=self.minimum)
        if self.count == ops.COUNT_NOTHING:
            return self.factor
        return counted if self.factor is None else counted * self.factor

    def share(self, counted: Tensor | None) -> Tensor:
        """What this rank adds to the sum over ranks, one number in memory of its own: a count, of images for each of them."""
        if self.present is not None and counted is not None:
            return (counted * self.present).sum()
        if self.class_mask is not None and counted is not None:
            return counted
        share = self.factor if self.count in (ops.COUNT_NOTHING, ops.COUNT_POSITIVES_PER_IMAGE) else counted
        assert share is not None
        return share

    def of_whole_batch(self, counted: Tensor | None, total: Tensor, ranks: int) -> Tensor:
        """With the sum of every rank's share: what makes the mean of the ranks' gradients that of the whole batch."""
        each = (total if self.given else total.clamp(min=1)) / ranks
        if self.count == ops.COUNT_POSITIVES_PER_IMAGE:
            assert counted is not None
            return counted * each
        return each


POSITIVES, SCORES = Divisor(ops.COUNT_POSITIVES), Divisor(ops.COUNT_SCORES)
UNCLAMPED_POSITIVES, UNCLAMPED_SCORES = Divisor(ops.COUNT_POSITIVES, 0.0), Divisor(ops.COUNT_SCORES, 0.0)


@dataclass
class Prepared:
    """All that a call's operators take; `read_others` makes the last two, without what comes of packing the labels."""

    pyramid: Pyramid
    known: Options  # with num_classes
    transformed: bool
    labels: list[Tensor] | None  # None: soft targets
    given: list[Tensor]  # targets, as they came
    together: bool  # they came as one tensor
    scores: Tensor | None
    class_mask: Tensor | None
    divisor: Divisor

    mode: str = field(init=False)
    options: OperatorOptions = field(init=False)


def prepare(loss: Loss, options: Options, inputs: Inputs) -> Prepared:
    """Raises: ValueError, TypeError, RuntimeError."""
    prepared = read_targets(loss, options, inputs)
    read_others(prepared, loss, inputs)
    return prepared


def read_targets(
    loss: Loss,
    options: Options,
    inputs: Inputs,
    synced: bool = False,
    running: bool = False,
    pyramid: Pyramid | None = None,
) -> Prepared:
    """All that the labels are packed with and counted by.

    synced, running: the count is summed over ranks, or averaged over calls.
    pyramid: of logits that are still to come.
    """
    transformed = is_transformed()
    given = as_levels("targets", inputs.targets)
    soft = any([t.is_floating_point() for t in given])
    if pyramid is None:
        pyramid = read_logits(inputs.logits, options.num_classes, soft, transformed)
    if transformed and not is_compiling() and any(map(is_mapped, (*pyramid.levels, *given))):
        raise RuntimeError(NO_VMAP)
    if loss.targets != "either":
        check_targets_of_loss(loss, soft)
    if options.num_classes is None:
        options = options.of(pyramid.num_classes)
    class_mask = None if inputs.class_mask is None else read_class_mask(inputs.class_mask, pyramid)
    divisor = resolve_normalizer(loss, inputs, options.reduction, pyramid, soft, class_mask, synced, running)
    together = isinstance(inputs.targets, Tensor)
    return Prepared(
        pyramid=pyramid,
        known=options,
        transformed=transformed,
        labels=None if soft else read_labels(given, together, pyramid),
        given=given,
        together=together,
        scores=None if inputs.scores is None else read_scores(loss, inputs.scores, pyramid, soft),
        class_mask=class_mask,
        divisor=divisor,
    )


def read_others(prepared: Prepared, loss: Loss, inputs: Inputs) -> OperatorOptions:
    """The rest, for which a sum over ranks need not wait."""
    pyramid, known = prepared.pyramid, prepared.known
    classes, like = pyramid.num_classes, pyramid.levels[0]
    positive, negative, class_weights = weigh(loss, inputs.class_weight, classes, like, prepared.transformed)
    options = OperatorOptions(
        packed_labels=None,
        soft_targets=None,
        scores=prepared.scores,
        anchor_weight=None,
        class_weights=class_weights,
        class_mask=prepared.class_mask,
        divisor=prepared.divisor.factor,
        level_scales=level_scales(known, len(pyramid.levels), prepared.divisor.number),
        positive_weight=positive,
        negative_weight=negative,
        loss=loss.kind,
        loss_parameters=loss.parameters(),
        num_classes=classes,
        first_class=0,
        reduction=REDUCTIONS[known.reduction],
    )
    prepared.mode = resolve_mode(known.grad_mode, known.reduction, pyramid.levels)
    if inputs.weight is not None:
        options.anchor_weight = read_per_anchor(inputs.name_of_weight, "weights", inputs.weight, pyramid)
    if prepared.labels is None:
        options.soft_targets = read_soft_targets(prepared.given, pyramid.dense, pyramid.placeholders is not None)
    prepared.options = options
    return options


def is_transformed() -> bool:
    """Whether more than plain reverse mode may be at work: a compiler, torch.func or forward mode.

    Raises:
        RuntimeError: under torch.jit.trace.
    """
    if is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    # TorchScript keeps lists of tensors, which PyTorch's stable ABI empties.
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("fastfocal: torch.jit.trace is not supported; use torch.export or torch.compile")
    return False


# --- logits -----------------------------------------------------------------------------------------------------------


def read_logits(logits: Levels, num_classes: int | None, soft: bool, transformed: bool) -> Pyramid:
    levels = as_levels("logits", logits)
    if not levels:
        raise ValueError("logits: expected at least one level, got an empty sequence")
    first = levels[0]
    shapes = [t.shape for t in levels]  # once: each time it is asked for, torch makes it anew
    dtype, device, dim = first.dtype, first.device, len(shapes[0])
    checks.floating("logits[0]", first)
    if dim not in (2, 3, 4):
        raise ValueError(f"logits[0]: expected (N, A*K, H, W), (N, M, K) or (M, K), got shape {shape(first)}")
    n = shapes[0][0]
    if dim > 2 and n >= 2**31:
        raise ValueError(f"logits[0]: expected less than 2^31 images, got shape {shape(first)}")
    for i in range(1, len(levels)):
        t, size = levels[i], shapes[i]
        if t.dtype != dtype:
            raise TypeError(f"logits[{i}]: expected the dtype of level 0, {dtype}, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"logits[{i}]: expected the device of level 0, {device}, got {t.device}")
        if len(size) != dim:
            raise ValueError(f"logits[{i}]: expected {dim} dimensions as level 0 has, got shape {shape(t)}")
        if dim > 2 and size[0] != n:
            raise ValueError(f"logits[{i}]: expected batch size {n} as level 0 has, got shape {shape(t)}")
    if num_classes is None:
        if dim == 4 and not soft:
            raise ValueError("num_classes: needed with logits of shape (N, A*K, H, W) and labels, got None")
        num_classes = shapes[0][1] if dim == 4 else shapes[0][-1]
        if num_classes < 1:
            raise ValueError(f"logits[0]: expected at least one class, got shape {shape(first)}")
    anchors = []
    for i, size in enumerate(shapes):
        if dim == 4:
            _, channels, h, w = size
            if channels % num_classes:
                raise ValueError(
                    f"logits[{i}]: expected channels that are a multiple of num_classes ({num_classes}), got {channels} "
                    f"(shape {tuple(size)})"
                )
            anchors.append(channels // num_classes * h * w)
        elif size[-1] != num_classes:
            raise ValueError(
                f"logits[{i}]: expected {num_classes} classes in the last dimension, got shape {tuple(size)}"
            )
        else:
            anchors.append(size[-2])
    return Pyramid(levels, as_dense(levels, transformed), num_classes, anchors)


def as_dense(levels: list[Tensor], differentiably: bool) -> list[Tensor]:
    """The levels as the kernels read them: the same list, or one with copies of those in neither of the two natural orders.

    differentiably: autograd sees the copying.
    """
    if all(map(checks.is_dense, levels)):
        return levels
    return [t if checks.is_dense(t) else (t if differentiably else t.detach()).contiguous() for t in levels]


def resolve_mode(grad_mode: str, reduction: str, levels: list[Tensor]) -> str:
    """What "auto" means, and whether "inplace" may be."""
    if grad_mode == "auto":
        return "recompute" if levels[0].dtype == torch.float16 or reduction == "none" else "save"
    if grad_mode == "inplace" and torch.is_grad_enabled():
        for i, t in enumerate(levels):
            if t.requires_grad and checks.dispatches_itself(t):
                raise TypeError(
                    f'grad_mode: "inplace" expects ordinary tensors, got logits[{i}] of type {type(t).__name__}'
                )
            base = t if is_compiling() else t._base  # not None: t is a view of it
            if t.requires_grad and (t.is_leaf or (base is not None and base.is_leaf and base.requires_grad)):
                raise ValueError(
                    f'grad_mode: "inplace" overwrites the logits, but logits[{i}] is a leaf that requires grad, or a view of '
                    "one; expected the output of an operation, such as a convolution"
                )
            if t.requires_grad and not checks.is_dense(t):
                raise ValueError(
                    f'grad_mode: "inplace" needs contiguous or channels_last memory, got logits[{i}] with strides {t.stride()}'
                )
    return grad_mode


# --- targets ----------------------------------------------------------------------------------------------------------


def check_targets_of_loss(loss: Loss, soft: bool) -> None:
    if loss.targets not in ("either", "soft" if soft else "labels"):
        wanted = "integer labels" if loss.targets == "labels" else "floating soft targets"
        raise TypeError(f"targets: {loss.name} expects {wanted}, got {'floating' if soft else 'integer'} ones")


def class_factors(loss: Loss, class_weight: Any, num_classes: int) -> checks.ClassValues:
    """`class_weight`, checked."""
    factors = checks.class_weight("class_weight", class_weight, num_classes)
    if loss.takes_anchors and len(factors.shape) == 2:
        raise ValueError(
            f"class_weight: {loss.name} has no negatives; expected {num_classes} numbers, of the anchors with each label, got "
            "two rows"
        )
    return factors


def read_labels(given: list[Tensor], together: bool, pyramid: Pyramid) -> list[Tensor]:
    labels = read_anchors("targets", given, together, pyramid)
    first = labels[0].dtype
    if first not in checks.INTEGER:
        raise TypeError(f"targets[0]: expected integer labels or floating soft targets, got {first}")
    for i in range(1, len(labels)):
        if labels[i].dtype != first:
            raise TypeError(f"targets[{i}]: expected the dtype of level 0, {first}, got {labels[i].dtype}")
    return labels


def read_soft_targets(given: list[Tensor], levels: list[Tensor], as_given: bool = False) -> list[Tensor]:
    """Soft targets in the logits' memory order, of the logits' dtype or the accumulation dtype.

    as_given: in any order and dtype.
    """
    if len(given) != len(levels):
        raise ValueError(f"targets: expected {len(levels)} levels of soft targets, got {len(given)}")
    for i, (t, logits) in enumerate(zip(given, levels, strict=True)):
        if not t.is_floating_point():
            raise TypeError(f"targets[{i}]: expected floating soft targets as level 0 has, got {t.dtype}")
        if t.shape != logits.shape:
            raise ValueError(
                f"targets[{i}]: expected soft targets of the logits' shape {shape(logits)}, got {shape(t)}"
            )
        if t.device != logits.device:
            raise ValueError(f"targets[{i}]: expected the logits' device, {logits.device}, got {t.device}")
        if t.requires_grad:
            checks.no_gradient(f"targets[{i}]", t)
    if as_given:
        return given
    dtype = levels[0].dtype
    if not all(t.dtype == dtype for t in given):
        dtype = ops.accumulation_dtype(dtype)
    # empty_like keeps the logits' strides.
    return [
        t if t.dtype == dtype and t.stride() == logits.stride() else torch.empty_like(logits, dtype=dtype).copy_(t)
        for t, logits in zip(given, levels, strict=True)
    ]


# --- one value for each anchor ----------------------------------------------------------------------------------------


def read_anchors(name: str, given: list[Tensor], together: bool, pyramid: Pyramid) -> list[Tensor]:
    """Labels, weights or scores as (N, M) a level, or as one (N, sum M); views wherever strides allow.

    together: one tensor came instead of a sequence of them.
    """
    levels, anchors = pyramid.dense, pyramid.anchors
    size = levels[0].shape
    dim, device = len(size), levels[0].device
    n = 1 if dim == 2 else size[0]
    for i, t in enumerate(given):
        if t.device != device:
            raise ValueError(f"{name}[{i}]: expected the logits' device, {device}, got {t.device}")
        if t.requires_grad:
            checks.no_gradient(f"{name}[{i}]", t)
    if together and len(levels) > 1:
        value, total = given[0], sum(anchors)
        expected = (total,) if dim == 2 else (n, total)
        if value.shape != expected:
            raise ValueError(
                f"{name}: expected one tensor of shape {expected} for all {len(levels)} levels (their anchors: {anchors}), or "
                f"a list of {len(levels)}; got shape {shape(value)}"
            )
        return [value[None]] if dim == 2 else given
    if len(given) != len(levels):
        raise ValueError(f"{name}: expected {len(levels)} levels, or one tensor for all, got {len(given)}")
    rows = []
    for i, (t, m) in enumerate(zip(given, anchors, strict=True)):
        size = t.shape
        if dim == 2 or size != (n, m):
            allowed: list[tuple[int, ...]] = [(m,)] if dim == 2 else [(n, m)]
            if dim == 4:
                _, channels, h, w = levels[i].shape
                a = channels // pyramid.num_classes
                allowed.append((n, h, w, a))
                if a == 1:
                    allowed.append((n, h, w))
            if tuple(size) not in allowed:
                raise ValueError(
                    f"{name}[{i}]: expected shape {' or '.join(map(str, allowed))} for logits of shape {shape(levels[i])} and "
                    f"{pyramid.num_classes} classes, got {tuple(size)}"
                )
            t = t.reshape(n, m)
        rows.append(t)
    return rows


def read_per_anchor(name: str, plural: str, value: Levels, pyramid: Pyramid) -> Tensor:
    """Floating values as one flat tensor of the accumulation dtype, in the order of the packed labels."""
    rows = read_anchors(name, as_levels(name, value), isinstance(value, Tensor), pyramid)
    for i, t in enumerate(rows):
        if not t.is_floating_point():
            raise TypeError(f"{name}[{i}]: expected floating {plural}, got {t.dtype}")
    if len(rows) < len(pyramid.dense):
        rows = list(rows[0].split(pyramid.anchors, dim=1))
    dtype = pyramid.accumulation_dtype
    if all(map(checks.is_class_last, pyramid.dense)):
        return torch.cat([t.reshape(-1) for t in rows]).to(dtype)
    by_cell = []  # (N, cell, a), of which the kernels read (N, a, cell)
    for t, logits, m in zip(rows, pyramid.dense, pyramid.anchors, strict=True):
        a = 1 if checks.is_class_last(logits) else max(1, logits.shape[1] // pyramid.num_classes)
        by_cell.append(t.view(t.shape[0], m // a, a))
    if is_compiling():  # a compiler makes one pass of it
        return torch.cat([t.transpose(1, 2).reshape(-1) for t in by_cell]).to(dtype)
    # Each value is written once where it belongs; a copy in that order and `cat` are two passes.
    images = rows[0].shape[0]
    flat = rows[0].new_empty(images * sum(pyramid.anchors), dtype=dtype)
    start = 0
    for t, m in zip(by_cell, pyramid.anchors, strict=True):
        flat.as_strided(t.shape, (m, 1, t.shape[1]), start).copy_(t)
        start += images * m
    return flat


def read_scores(loss: Loss, scores: Levels, pyramid: Pyramid, soft: bool) -> Tensor:
    """As the packed labels lie; where one tensor came for all levels, its rows (N, sum M) as they are, which takes no pass."""
    check_scores(loss, soft)
    # A compiler makes one pass of the other way, whatever the strides of the next call are.
    if isinstance(scores, Tensor) and scores.dtype == pyramid.accumulation_dtype and not is_compiling():
        (rows,) = read_anchors("scores", as_levels("scores", scores), True, pyramid)
        # No row twice, and no inference tensor: what is kept for backward has to be found again.
        if rows.stride(1) == 1 and (len(rows) == 1 or rows.stride(0) >= rows.shape[1]) and not rows.is_inference():
            return rows
    return read_per_anchor("scores", "scores", scores, pyramid)


def check_scores(loss: Loss, soft: bool) -> None:
    if not loss.takes_scores:
        raise ValueError(f"scores: {loss.name} takes none, its positives have the target 1; expected None")
    if soft:
        raise ValueError("scores: soft targets are scores themselves; expected labels beside scores, or None")


# --- classes ----------------------------------------------------------------------------------------------------------


def read_class_mask(mask: Tensor, pyramid: Pyramid) -> Tensor:
    """(N, K), read in place."""
    mask = check_class_mask(mask, pyramid.levels[0], pyramid.num_classes)
    return mask[None] if mask.dim() == 1 else mask


def check_class_mask(mask: Tensor, logits: Tensor, num_classes: int) -> Tensor:
    mask = checks.as_plain("class_mask", mask)
    expected = (num_classes,) if logits.dim() == 2 else (logits.shape[0], num_classes)
    if mask.dtype != torch.bool:
        raise TypeError(f"class_mask: expected torch.bool, got {mask.dtype}")
    if mask.shape != expected:
        raise ValueError(
            f"class_mask: expected shape {expected}, one entry for each class of each image, got {shape(mask)}"
        )
    if mask.device != logits.device:
        raise ValueError(f"class_mask: expected the logits' device, {logits.device}, got {mask.device}")
    return mask


def weigh(
    loss: Loss, class_weight: object, num_classes: int, like: Tensor, transformed: bool
) -> tuple[float, float, Tensor | None]:
    """The weights of positives and of negatives as numbers, or for each class, (2, K) on the logits' device."""
    positive, negative = loss.weights(num_classes, like.device)
    if class_weight is not None:
        factors = class_factors(loss, class_weight, num_classes)
        of_positives, of_negatives = factors.rows(like.device)
        positive, negative = times(positive, of_positives), times(negative, of_negatives)
    elif isinstance(positive, float) and isinstance(negative, float):
        return positive, negative, None
    dtype = ops.accumulation_dtype(like.dtype)
    if isinstance(positive, Tensor) or isinstance(negative, Tensor):
        rows = torch.stack([as_row(weight, num_classes, like.device) for weight in (positive, negative)])
        return 1.0, 1.0, rows.to(dtype)
    numbers = tuple([(w,) * num_classes if isinstance(w, float) else w for w in (positive, negative)])
    # What is made under a mode or a transform may be no ordinary tensor (fake, traced, wrapped), and must not outlast it.
    if transformed or torch._C._len_torch_dispatch_stack() > 0:
        return 1.0, 1.0, make_class_weights(numbers, dtype, like.device)
    return 1.0, 1.0, remembered_class_weights(numbers, dtype, like.device)


def times(weight: Weight, factors: tuple[float, ...] | Tensor) -> Weight:
    if isinstance(weight, float):
        return weight * factors if isinstance(factors, Tensor) else tuple([weight * f for f in factors])
    if isinstance(weight, tuple) and isinstance(factors, tuple):
        return tuple([w * f for w, f in zip(weight, factors, strict=True)])
    device = weight.device if isinstance(weight, Tensor) else factors.device  # type: ignore[union-attr]
    return as_row(weight, 0, device) * as_row(factors, 0, device)


def as_row(weight: Weight, num_classes: int, device: torch.device) -> Tensor:
    """(K,) in float64."""
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, float):
        weight = (weight,) * num_classes
    return torch.tensor(weight, dtype=torch.float64, device=device)


Rows = tuple[tuple[float, ...], ...]


def make_class_weights(rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu").to(dtype).to(device)


@functools.cache  # for good: a captured graph may read it as long as the process lives
def remembered_class_weights(rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to the device once: a copy from the host waits for it, and a graph that is being captured refuses it."""
    with torch.inference_mode(False), torch.no_grad():
        return make_class_weights(rows, dtype, device)


# --- divisor ----------------------------------------------------------------------------------------------------------


def resolve_normalizer(
    loss: Loss,
    inputs: Inputs,
    reduction: str,
    pyramid: Pyramid,
    soft: bool,
    class_mask: Tensor | None,
    synced: bool = False,
    running: bool = False,
) -> Divisor:
    """synced: this rank's part of it, which may be 0, as it is the sum over ranks that is kept from that."""
    normalizer, like = inputs.normalizer, pyramid.levels[0]
    if reduction == "mean" and loss.takes_anchors:
        least = 0.0 if synced else 1.0
        if class_mask is not None:
            return Divisor(minimum=least, class_mask=class_mask)
        return Divisor(ops.COUNT_LOGITS, least, number=1 / pyramid.num_classes)  # anchors
    if reduction == "mean":
        return logits_that_count(pyramid, soft, class_mask, synced)
    if isinstance(normalizer, Tensor):
        normalizer = checks.as_plain("normalizer", normalizer)
    check_normalizer(loss, normalizer, like, soft, inputs.scores is not None)
    if isinstance(normalizer, str):
        counted = None
        if soft:
            assert loss.positive_target is not None
            per_image = normalizer == "positives_per_image"
            counted = count_positives(loss.positive_target, inputs.targets, like, per_image)
            counted = counted.clamp(min=0 if synced and not per_image else 1)
            if not per_image:
                return Divisor(ops.COUNT_POSITIVES, counted=counted)
        if normalizer == "positives":
            return UNCLAMPED_POSITIVES if synced else POSITIVES
        if normalizer == "scores":
            return UNCLAMPED_SCORES if synced else SCORES
        number, factor = size_as_divisor(max(0 if synced else 1, pyramid.images), like, synced)
        return Divisor(ops.COUNT_POSITIVES_PER_IMAGE, number=number, factor=factor, counted=counted)
    if isinstance(normalizer, Tensor):
        if normalizer.device != like.device and not is_compiling():  # a number on the host: nothing is copied
            number, factor = size_as_divisor(normalizer.item(), like, synced or running)
            return Divisor(number=number, factor=factor, given=True)
        divisor = normalizer.detach().to(like.device, torch.float64, non_blocking=True, copy=synced)
        return Divisor(factor=divisor.contiguous(), given=True)
    return Divisor(number=1.0 if normalizer is None else float(normalizer), given=True)


def count_positives(positive: float, targets: Levels, like: Tensor, per_image: bool) -> Tensor:
    """How many soft targets are a positive's, float64: in all, or (N,)."""
    found = [t == positive for t in as_levels("targets", targets)]
    if not per_image or like.dim() == 2:
        return torch.stack([t.sum(dtype=torch.float64) for t in found]).sum()
    return torch.stack([t.flatten(1).sum(1, dtype=torch.float64) for t in found]).sum(0)


def logits_that_count(pyramid: Pyramid, soft: bool, class_mask: Tensor | None, synced: bool = False) -> Divisor:
    """Of "mean": those of anchors that are not ignored and of classes that are there."""
    like = pyramid.levels[0]
    least = 0 if synced else 1
    if class_mask is None:
        if not soft:
            return Divisor(ops.COUNT_LOGITS, float(least))
        size = max(least, sum(t.numel() for t in pyramid.levels))
        number, factor = size_as_divisor(size, like, synced)
        return Divisor(number=number, factor=factor)
    present = class_mask.sum(1, dtype=torch.float64)
    if not soft:
        return Divisor(ops.COUNT_ANCHORS_PER_IMAGE, minimum=0.0, present=present)
    return Divisor(factor=(present * sum(pyramid.anchors)).sum().clamp(min=least))


def anchors_that_count(packed_labels: Tensor, pyramid: Pyramid, class_mask: Tensor) -> Tensor:
    """How many anchors have a class, and one that their image has; 0-d, float64.

    packed_labels: of one level after the other, in any order of an image's anchors.
    """
    images, start, found = pyramid.images, 0, []
    for m in pyramid.anchors:
        of_level = packed_labels[start : start + images * m].view(images, m)
        start += images * m
        there = class_mask.gather(1, of_level.clamp(min=0).long())
        found.append((there & (of_level >= 0)).sum())
    return torch.stack(found).sum().double()


def check_normalizer(
    loss: Loss, normalizer: str | float | Tensor | None, like: Tensor, soft: bool, scored: bool
) -> None:
    checks.normalizer("normalizer", normalizer, loss.takes_scores)
    if isinstance(normalizer, str):
        if soft and (loss.positive_target is None or normalizer == "scores"):
            raise ValueError(
                f"normalizer: {normalizer!r} counts labels, but the targets are soft; expected a number, a tensor or None "
                "(for one, normalizer=soft_targets.sum())"
            )
        if normalizer == "scores" and not scored:
            raise ValueError("normalizer: 'scores' sums the scores of positives, expected scores beside it, got None")
    elif isinstance(normalizer, Tensor):
        n = ops.images(like)
        if shape(normalizer) not in ((), (n,)):
            raise ValueError(f"normalizer: expected a 0-d tensor or one of shape ({n},), got shape {shape(normalizer)}")
        checks.no_gradient("normalizer", normalizer)
        if normalizer.device != like.device and not (normalizer.dim() == 0 and normalizer.device.type == "cpu"):
            raise ValueError(f"normalizer: expected the logits' device, {like.device}, got {normalizer.device}")
        if normalizer.dtype == torch.bool or normalizer.is_complex() or normalizer.is_quantized:
            raise TypeError(f"normalizer: expected a tensor of real numbers, got {normalizer.dtype}")


def size_as_divisor(size: float, like: Tensor, as_tensor: bool = False) -> tuple[float, Tensor | None]:
    """A size as a number; under a compiler as a tensor, since a number in an operator's list would fix a symbolic size."""
    if as_tensor or is_compiling():
        return 1.0, torch.full((), size, dtype=torch.float64, device=like.device)
    return float(size), None


def level_scales(options: Options, levels: int, number: float) -> list[float]:
    """What each level's loss is multiplied by: its weight, the loss' weight, and over the normalizer's number."""
    weights = options.level_weights
    if weights is None:
        return [quotient(options.loss_weight, number)] * levels
    if len(weights) != levels:
        raise ValueError(f"level_weights: expected {levels} numbers, one per level, got {len(weights)}")
    return [quotient(options.loss_weight * weight, number) for weight in weights]


def quotient(value: float, divisor: float) -> float:
    """As tensors are divided: by 0 too, which a tensor given as normalizer may hold."""
    return value / divisor if divisor != 0 else value * math.copysign(math.inf, divisor)
