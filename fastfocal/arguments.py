"""Checks what users pass, and brings it into the form the operators take.

Every error is raised here, before anything is computed, and names the argument, the level, what came and what was expected.
(The one exception is a label out of range on a CUDA device: finding it on the host would take a synchronisation.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fastfocal.ops import accumulation_dtype, images
from fastfocal.registration import NO_VMAP, is_mapped

Levels = Tensor | Sequence[Tensor]

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("sum", "level", "image", "none", "mean")
NORMALIZERS = ("positives", "positives_per_image")
STRIDED = torch.strided
GRAD_MODES = ("auto", "save", "recompute", "inplace")


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def is_class_last(t: Tensor) -> bool:
    """Whether the classes of an anchor are neighbours in memory (as `is_class_last` in csrc/operators.h has it)."""
    return t.dim() < 4 or t.is_contiguous(memory_format=torch.channels_last)


def as_levels(name: str, value: Levels) -> list[Tensor]:
    """The tensors as a list; those of a subclass that only adds to Python's side of a tensor as plain ones."""
    if isinstance(value, (list, tuple)):
        # In one line, as it is on the way of every call.
        if all(
            [(type(t) is Tensor or type(t) is Parameter) and t.layout is STRIDED and not t.is_nested for t in value]
        ):
            return list(value)
    elif isinstance(value, Tensor):
        return [as_plain(name, value)]
    elif not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(
            f"{name}: expected a tensor or a sequence of tensors, one per level; got {type(value).__name__}"
        )
    return [as_plain(f"{name}[{level}]", t) for level, t in enumerate(value)]


def as_plain(name: str, t: Tensor) -> Tensor:
    """The tensor, if the kernels can read such a one.

    Raises:
        TypeError: it is no tensor, or it is sparse, nested, of another layout, or distributed.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if (kind := type(t)) is not Tensor and kind is not Parameter:
        t = without_subclass(name, t)
    if t.layout is not STRIDED or t.is_nested:
        kind_of = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected an ordinary (strided) tensor, got {kind_of}")
    return t


def check_floating(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")


def without_subclass(name: str, t: Tensor) -> Tensor:
    if hasattr(t, "device_mesh") and hasattr(t, "placements"):
        raise TypeError(
            f"{name}: expected a local tensor, got a {type(t).__name__}; pass this rank's shard, {name}.to_local(), and a "
            "normalizer that counts over all ranks"
        )
    # Those that dispatch by themselves (fake tensors of a compiler among them) do so when the operators are called.
    if type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl or torch.compiler.is_compiling():
        return t
    with torch._C.DisableTorchFunctionSubclass():
        return t.as_subclass(Tensor)


def dispatches_itself(t: Tensor) -> bool:
    """Whether it is of a subclass that takes operators into its own hands; the tracers' own do what they are told."""
    kind = type(t)
    return (
        kind is not Tensor
        and kind is not Parameter
        and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
        and not kind.__module__.startswith("torch._subclasses")
    )


def check_transforms(levels: list[Tensor], targets: list[Tensor]) -> None:
    """Within torch.func: reverse and forward mode are the operators' own; a mapped dimension is not."""
    if any(map(is_mapped, (*levels, *targets))):
        raise RuntimeError(NO_VMAP)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def as_number(name: str, value: object) -> float:
    """A Python or numpy number as a float."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name}: expected a number that float64 can hold, got an integer beyond it") from None


def as_index(name: str, value: object) -> int:
    """A Python or numpy integer of 64 bits."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return value if isinstance(value, int) else int(value)


def check_num_classes(num_classes: int) -> int:
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or not 1 <= num_classes < 2**31:
        raise ValueError(f"num_classes: expected a positive integer below 2^31, got {num_classes!r}")
    return num_classes if isinstance(num_classes, int) else int(num_classes)


def number_of_classes(logits: Levels, targets: Levels, num_classes: int | None) -> int:
    """K, from the logits' or the soft targets' shape where it was not given."""
    if num_classes is not None:
        return check_num_classes(num_classes)
    soft = any(t.is_floating_point() for t in as_levels("targets", targets))
    return check_logits(logits, None, need_classes=not soft)[1]


def check_logits(
    logits: Levels, num_classes: int | None, need_classes: bool = True
) -> tuple[list[Tensor], int, list[int]]:
    """Returns the levels as a list, K, and M of every level."""
    levels = as_levels("logits", logits)
    if not levels:
        raise ValueError("logits: expected at least one level, got an empty sequence")
    first = levels[0]
    shapes = [t.shape for t in levels]  # once: each time it is asked for, torch makes it anew
    dtype, device, dim = first.dtype, first.device, len(shapes[0])
    check_floating("logits[0]", first)
    if dim not in (2, 3, 4):
        raise ValueError(f"logits[0]: expected (N, A*K, H, W), (N, M, K) or (M, K), got shape {shape(first)}")
    if dim > 2 and shapes[0][0] >= 2**31:
        raise ValueError(f"logits[0]: expected less than 2^31 images, got shape {shape(first)}")
    for i in range(1, len(levels)):
        t, size = levels[i], shapes[i]
        if t.dtype != dtype:
            raise TypeError(f"logits[{i}]: expected the dtype of level 0, {dtype}, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"logits[{i}]: expected the device of level 0, {device}, got {t.device}")
        if len(size) != dim:
            raise ValueError(f"logits[{i}]: expected {dim} dimensions as level 0 has, got shape {shape(t)}")
        if dim > 2 and size[0] != shapes[0][0]:
            raise ValueError(f"logits[{i}]: expected batch size {shapes[0][0]} as level 0 has, got shape {shape(t)}")
    if num_classes is None:
        if dim == 4 and need_classes:
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
    return levels, num_classes, anchors


def is_dense(t: Tensor) -> bool:
    """Whether the kernels can read it in place."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def dense(levels: list[Tensor], differentiably: bool = False) -> list[Tensor]:
    """The levels as the kernels read them: the same list, or one with copies of those in neither of the two natural orders.

    differentiably: autograd sees the copying.
    """
    if all(map(is_dense, levels)):
        return levels
    return [t if is_dense(t) else (t if differentiably else t.detach()).contiguous() for t in levels]


def check_anchors(
    name: str, given: list[Tensor], together: bool, levels: list[Tensor], num_classes: int, anchors: list[int]
) -> list[Tensor]:
    """Per-anchor values (labels, weights) as (N, M) a level, or as one (N, sum M); views wherever strides allow.

    together: one tensor came instead of a sequence of them.
    """
    size = levels[0].shape
    dim, device = len(size), levels[0].device
    n = 1 if dim == 2 else size[0]
    for i, t in enumerate(given):
        if t.device != device:
            raise ValueError(f"{name}[{i}]: expected the logits' device, {device}, got {t.device}")
        if t.requires_grad:
            raise ValueError(
                f"{name}[{i}]: is not differentiated, expected requires_grad=False, got requires_grad=True"
            )
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
                a = channels // num_classes
                allowed.append((n, h, w, a))
                if a == 1:
                    allowed.append((n, h, w))
            if tuple(size) not in allowed:
                raise ValueError(
                    f"{name}[{i}]: expected shape {' or '.join(map(str, allowed))} for logits of shape {shape(levels[i])} and "
                    f"{num_classes} classes, got {tuple(size)}"
                )
            t = t.reshape(n, m)
        rows.append(t)
    return rows


def check_labels(
    given: list[Tensor], together: bool, levels: list[Tensor], num_classes: int, anchors: list[int]
) -> list[Tensor]:
    labels = check_anchors("targets", given, together, levels, num_classes, anchors)
    first = labels[0].dtype
    if first not in INTEGER:
        raise TypeError(f"targets[0]: expected integer labels or floating soft targets, got {first}")
    for i in range(1, len(labels)):
        if labels[i].dtype != first:
            raise TypeError(f"targets[{i}]: expected the dtype of level 0, {first}, got {labels[i].dtype}")
    return labels


def check_soft_targets(given: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
    """Soft targets in the logits' memory order, of the logits' dtype or the accumulation dtype."""
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
            raise ValueError(
                f"targets[{i}]: is not differentiated, expected requires_grad=False, got requires_grad=True"
            )
    dtype = levels[0].dtype if all(t.dtype == levels[0].dtype for t in given) else accumulation_dtype(levels[0].dtype)
    # empty_like keeps the logits' strides.
    return [
        t if t.dtype == dtype and t.stride() == logits.stride() else torch.empty_like(logits, dtype=dtype).copy_(t)
        for t, logits in zip(given, levels, strict=True)
    ]


def check_weight(weight: Levels, levels: list[Tensor], num_classes: int, anchors: list[int]) -> Tensor:
    """Per-anchor weights as one flat tensor, in the order of the label codes."""
    rows = check_anchors(
        "weight", as_levels("weight", weight), isinstance(weight, Tensor), levels, num_classes, anchors
    )
    for i, t in enumerate(rows):
        if not t.is_floating_point():
            raise TypeError(f"weight[{i}]: expected floating weights, got {t.dtype}")
    if len(rows) < len(levels):
        rows = list(rows[0].split(anchors, dim=1))
    flat = []
    for t, logits in zip(rows, levels, strict=True):
        if not is_class_last(logits):  # (N, cell, a) -> (N, a, cell)
            a = logits.shape[1] // num_classes
            t = t.unflatten(1, (logits.shape[2] * logits.shape[3], a)).transpose(1, 2)
        flat.append(t.reshape(-1))
    return torch.cat(flat).to(accumulation_dtype(levels[0].dtype))


def split_alpha(
    alpha: float | Sequence[float] | Tensor | None,
) -> tuple[float | None, Sequence[float] | Tensor | None]:
    """As a number, or as one per class."""
    if alpha is None or isinstance(alpha, (int, float, np.number, np.bool_)):
        return alpha, None  # type: ignore[return-value]
    return None, alpha


def check_alpha(alpha: float | None) -> tuple[float, float]:
    """Returns the weight of positives and of negatives."""
    if alpha is None:
        return 1.0, 1.0
    if not is_number(alpha):
        raise TypeError(f"alpha: expected a number, numbers, a tensor or None, got {alpha!r}")
    if not alpha <= 1:  # comparisons, which torch.compile can follow
        raise ValueError(f"alpha: expected a number in [0, 1], or None or a negative one for no weighting; got {alpha}")
    return (float(alpha), 1.0 - alpha) if alpha >= 0 else (1.0, 1.0)


def check_class_alpha(alpha: Sequence[float] | Tensor, num_classes: int) -> Tensor | tuple[float, ...]:
    """Returns one alpha per class: numbers, or a tensor in float64, so that 1 - alpha is rounded once."""
    if not isinstance(alpha, Tensor):
        if isinstance(alpha, np.ndarray):
            alpha = alpha.tolist()
        if isinstance(alpha, (str, bytes)) or not isinstance(alpha, Sequence) or not all(map(is_number, alpha)):
            raise TypeError(f"alpha: expected a number, {num_classes} numbers, a tensor or None, got {alpha!r}")
        if not all(0 <= a <= 1 for a in alpha):
            raise ValueError(f"alpha: expected numbers in [0, 1], got {list(alpha)}")
        if len(alpha) != num_classes:
            raise ValueError(f"alpha: expected one number per class, {num_classes} of them, got {len(alpha)}")
        return tuple(map(float, alpha))
    alpha = as_plain("alpha", alpha)
    if alpha.is_complex() or alpha.is_quantized:
        raise TypeError(f"alpha: expected real numbers, got {alpha.dtype}")
    if alpha.requires_grad:
        raise ValueError("alpha: is not differentiated, expected requires_grad=False, got requires_grad=True")
    if alpha.device.type == "meta":
        raise ValueError("alpha: expected numbers, got a tensor without data (device meta)")
    if (
        alpha.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool(((alpha >= 0) & (alpha <= 1)).all())
    ):
        raise ValueError(f"alpha: expected numbers in [0, 1], got {alpha.tolist()}")
    if alpha.dim() == 0:
        alpha = alpha.expand(num_classes)
    if shape(alpha) != (num_classes,):
        raise ValueError(f"alpha: expected one number per class, shape ({num_classes},), got shape {shape(alpha)}")
    return alpha.detach().to(torch.float64, copy=True).contiguous()


def check_formula(gamma: float, label_smoothing: float, detach_modulating_factor: bool) -> tuple[float, float]:
    gamma, label_smoothing = as_number("gamma", gamma), as_number("label_smoothing", label_smoothing)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma: expected a finite number >= 0, got {gamma}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if not isinstance(detach_modulating_factor, bool):
        raise TypeError(f"detach_modulating_factor: expected True or False, got {detach_modulating_factor!r}")
    return gamma, label_smoothing


def check_star(gamma: float, beta: float) -> tuple[float, float]:
    gamma, beta = as_number("gamma", gamma), as_number("beta", beta)
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma: expected a finite number > 0, by which focal loss star is divided, got {gamma}")
    if not -math.inf < beta < math.inf:
        raise ValueError(f"beta: expected a finite number, got {beta}")
    return gamma, beta


def check_loss_weight(loss_weight: float) -> float:
    loss_weight = as_number("loss_weight", loss_weight)
    if not -math.inf < loss_weight < math.inf:
        raise ValueError(f"loss_weight: expected a finite number, got {loss_weight}")
    return loss_weight


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_indices(background_index: int | None, ignore_index: int, num_classes: int) -> int:
    """Returns the label that means background."""
    background = num_classes if background_index is None else as_index("background_index", background_index)
    if background == ignore_index:
        raise ValueError(f"ignore_index: expected a label other than background_index, got {ignore_index} for both")
    if 0 < background < num_classes:
        raise ValueError(
            f"background_index: {background} is also one of the classes 0..{num_classes - 1}; expected 0 (the classes are then "
            f"1..{num_classes}), {num_classes} or a number outside 0..{num_classes - 1}"
        )
    return background


def check_level_weights(level_weights: Sequence[float] | None) -> list[float] | None:
    if level_weights is None:
        return None
    if isinstance(level_weights, Tensor) and level_weights.requires_grad:
        raise ValueError("level_weights: is not differentiated, expected requires_grad=False, got requires_grad=True")
    if isinstance(level_weights, (str, bytes, Mapping)):
        raise TypeError(f"level_weights: expected numbers, one per level, got {level_weights!r}")
    try:
        weights = [math.nan if isinstance(w, (bool, str, bytes)) else float(w) for w in level_weights]
    except OverflowError:
        raise ValueError("level_weights: expected numbers that float64 can hold, got an integer beyond it") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"level_weights: expected numbers, one per level, got {level_weights!r}") from None
    if not all(-math.inf < w < math.inf for w in weights):
        raise ValueError(f"level_weights: expected finite numbers, one per level, got {level_weights!r}")
    return weights


def check_number_of_level_weights(level_weights: list[float], levels: int) -> None:
    if len(level_weights) != levels:
        raise ValueError(f"level_weights: expected {levels} numbers, one per level, got {len(level_weights)}")


def check_normalizer(normalizer: str | float | Tensor | None) -> None:
    """What can be said of it without tensors."""
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, NORMALIZERS)
    elif is_number(normalizer):
        if not 0 < as_number("normalizer", normalizer) < math.inf:
            raise ValueError(f"normalizer: expected a finite number > 0, got {normalizer}")
    elif normalizer is not None and not isinstance(normalizer, Tensor):
        raise TypeError(f"normalizer: expected a string, a number, a tensor or None, got {normalizer!r}")


def check_normalizer_for(normalizer: str | float | Tensor | None, like: Tensor, soft: bool) -> None:
    check_normalizer(normalizer)
    if isinstance(normalizer, str):
        if soft:
            raise ValueError(
                f"normalizer: {normalizer!r} counts labels, but the targets are soft; expected a number, a tensor or None "
                "(for one, normalizer=soft_targets.sum())"
            )
    elif isinstance(normalizer, Tensor):
        n = images(like)
        if shape(normalizer) not in ((), (n,)):
            raise ValueError(f"normalizer: expected a 0-d tensor or one of shape ({n},), got shape {shape(normalizer)}")
        if normalizer.requires_grad:
            raise ValueError("normalizer: is not differentiated, expected requires_grad=False, got requires_grad=True")
        if normalizer.device != like.device and not (normalizer.dim() == 0 and normalizer.device.type == "cpu"):
            raise ValueError(f"normalizer: expected the logits' device, {like.device}, got {normalizer.device}")
        if normalizer.dtype == torch.bool or normalizer.is_complex() or normalizer.is_quantized:
            raise TypeError(f"normalizer: expected a tensor of real numbers, got {normalizer.dtype}")
