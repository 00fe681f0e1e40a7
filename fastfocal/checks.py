"""Checks of single values, and the words of their errors: the argument, the level, what came and what was expected.

Every error is raised before anything is computed. (The one exception is a label out of range on a CUDA device: finding it on
the host would take a synchronisation.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

Levels = Tensor | Sequence[Tensor]

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("sum", "level", "image", "none", "mean")
NORMALIZERS = ("positives", "positives_per_image")
GRAD_MODES = ("auto", "save", "recompute", "inplace")
STRIDED = torch.strided


# --- tensors ----------------------------------------------------------------------------------------------------------


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def is_class_last(t: Tensor) -> bool:
    """Whether the classes of an anchor are neighbours in memory (as csrc/ has it)."""
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


def floating(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {t.dtype}")


def without_subclass(name: str, t: Tensor) -> Tensor:
    if hasattr(t, "device_mesh") and hasattr(t, "placements"):
        raise TypeError(
            f"{name}: expected a local tensor, got a {type(t).__name__}; pass this rank's shard, {name}.to_local(), and a "
            "normalizer that counts over all ranks"
        )
    # Those that dispatch by themselves (fake tensors of a compiler among them) do so when the operators are called.
    if type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl or is_compiling():
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


def is_dense(t: Tensor) -> bool:
    """Whether the kernels can read it in place."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def no_gradient(name: str, t: Tensor) -> None:
    if t.requires_grad:
        raise ValueError(f"{name}: is not differentiated, expected requires_grad=False, got requires_grad=True")


# --- numbers and words ------------------------------------------------------------------------------------------------


def anything(name: str, value: Any) -> Any:
    """For what is checked together with others."""
    return value


def is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def number(name: str, value: object) -> float:
    """A Python or numpy number as a float."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name}: expected a number that float64 can hold, got an integer beyond it") from None


def finite(name: str, value: object) -> float:
    value = number(name, value)
    if not -math.inf < value < math.inf:  # comparisons, which torch.compile can follow
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def at_least_0(name: str, value: object) -> float:
    value = number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value


def share(name: str, value: object) -> float:
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def index(name: str, value: object) -> int:
    """A Python or numpy integer of 64 bits."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return value if isinstance(value, int) else int(value)


def index_or_none(name: str, value: object) -> int | None:
    return None if value is None else index(name, value)


def num_classes(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value < 2**31:
        raise ValueError(f"{name}: expected a positive integer below 2^31, got {value!r}")
    return value if isinstance(value, int) else int(value)


def num_classes_or_none(name: str, value: object) -> int | None:
    return None if value is None else num_classes(name, value)


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        choice(name, value, choices)
        return value  # type: ignore[no-any-return]

    return check


def label_indices(background_index: int | None, ignore_index: int, num_classes: int) -> int:
    """Returns the label that means background."""
    background = num_classes if background_index is None else background_index
    if background == ignore_index:
        raise ValueError(f"ignore_index: expected a label other than background_index, got {ignore_index} for both")
    if 0 < background < num_classes:
        raise ValueError(
            f"background_index: {background} is also one of the classes 0..{num_classes - 1}; expected 0 (the classes are then "
            f"1..{num_classes}), {num_classes} or a number outside 0..{num_classes - 1}"
        )
    return background


NO_BACKGROUND = -1  # as pack_labels takes it where the background would be a class


def background_class(background_index: int | None, ignore_index: int, num_classes: int) -> int:
    """Of a loss whose background is a class like others: returns it, or NO_BACKGROUND."""
    if background_index is None:
        return NO_BACKGROUND
    if background_index == ignore_index:
        raise ValueError(f"ignore_index: expected a label other than background_index, got {ignore_index} for both")
    if not 0 <= background_index < num_classes:
        raise ValueError(
            f"background_index: expected one of the classes 0..{num_classes - 1}, as background is a class of its own here, or "
            f"None where there is none, got {background_index}"
        )
    return background_index


def level_weights(name: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        no_gradient(name, value)
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError(f"{name}: expected numbers, one per level, got {value!r}")
    try:
        weights = [math.nan if isinstance(w, (bool, str, bytes)) else float(w) for w in value]
    except OverflowError:
        raise ValueError(f"{name}: expected numbers that float64 can hold, got an integer beyond it") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected numbers, one per level, got {value!r}") from None
    if not all(-math.inf < w < math.inf for w in weights):
        raise ValueError(f"{name}: expected finite numbers, one per level, got {value!r}")
    return weights


def normalizer(name: str, value: object, takes_scores: bool) -> None:
    """What can be said of it without tensors."""
    if isinstance(value, str):
        choice(name, value, (*NORMALIZERS, "scores") if takes_scores else NORMALIZERS)
    elif is_number(value):
        if not 0 < number(name, value) < math.inf:
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    elif value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a string, a number, a tensor or None, got {value!r}")


# --- numbers for each class -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassValues:
    """A number for each class, checked; or two rows of them. A tensor is float64, so that 1 - alpha is rounded once."""

    values: tuple[float, ...] | tuple[tuple[float, ...], ...] | Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.values, Tensor):
            return tuple(self.values.shape)
        return (len(self.values), *((len(self.values[0]),) if isinstance(self.values[0], tuple) else ()))

    def on(self, device: torch.device) -> tuple[float, ...] | tuple[tuple[float, ...], ...] | Tensor:
        return self.values.to(device) if isinstance(self.values, Tensor) else self.values


def alpha(name: str, value: Any, num_classes: int | None = None) -> float | ClassValues | None:
    """One number, which is None for no weighting, or one for each class; `num_classes` None: those are looked at later."""
    if value is None or isinstance(value, (int, float, np.number, np.bool_)):
        if value is None:
            return None
        if not is_number(value):
            raise TypeError(f"{name}: expected a number, numbers, a tensor or None, got {value!r}")
        if not value <= 1:
            raise ValueError(
                f"{name}: expected a number in [0, 1], or None or a negative one for no weighting; got {value}"
            )
        return float(value) if value >= 0 else None
    if num_classes is None:
        return value  # type: ignore[no-any-return]
    if isinstance(value, ClassValues):
        number_of_values(name, value, num_classes)
        return value
    if isinstance(value, Tensor):
        value = tensor_of_class_values(name, value)
        if value.device.type == "cpu" and not is_compiling() and not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{name}: expected numbers in [0, 1], got {value.tolist()}")
        if value.dim() == 0:
            value = value.expand(num_classes)
        if shape(value) != (num_classes,):
            raise ValueError(f"{name}: expected one number per class, shape ({num_classes},), got shape {shape(value)}")
        return ClassValues(value.to(torch.float64, copy=True).contiguous())
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not all(map(is_number, value)):
        raise TypeError(f"{name}: expected a number, {num_classes} numbers, a tensor or None, got {value!r}")
    if not all(0 <= a <= 1 for a in value):
        raise ValueError(f"{name}: expected numbers in [0, 1], got {list(value)}")
    found = ClassValues(tuple(map(float, value)))
    number_of_values(name, found, num_classes)
    return found


def class_weight(name: str, value: Any, num_classes: int) -> ClassValues | None:
    """K factors, or two rows of them: of positives and of negatives."""
    if value is None:
        return None
    wanted = f"{num_classes} numbers, or two rows of {num_classes} (of positives, of negatives)"
    if not isinstance(value, (ClassValues, Tensor)):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        rows = value if is_sequence(value) and value and all(map(is_sequence, value)) else [value]
        if not all(is_sequence(row) and all(map(is_number, row)) for row in rows):
            raise TypeError(f"{name}: expected {wanted}, a tensor of them or None, got {value!r}")
        numbers = tuple(tuple(number(name, w) for w in row) for row in rows)
        if not all(-math.inf < w < math.inf for row in numbers for w in row):
            raise ValueError(f"{name}: expected finite numbers, got {value!r}")
        if [len(row) for row in numbers] not in ([num_classes], [num_classes] * 2):
            raise ValueError(f"{name}: expected {wanted}, got {' and '.join(str(len(row)) for row in numbers)}")
        return ClassValues(numbers if rows is value else numbers[0])
    checked = value if isinstance(value, ClassValues) else None
    if isinstance(value, Tensor):
        value = tensor_of_class_values(name, value)
        if value.device.type == "cpu" and not is_compiling() and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
        checked = ClassValues(value.to(torch.float64, copy=True).contiguous())
    assert checked is not None
    if checked.shape not in ((num_classes,), (2, num_classes)):
        raise ValueError(
            f"{name}: expected shape ({num_classes},), or (2, {num_classes}) (of positives, of negatives), got {checked.shape}"
        )
    return checked


def is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def number_of_values(name: str, value: ClassValues, num_classes: int) -> None:
    if len(value.values) != num_classes:
        raise ValueError(f"{name}: expected one number per class, {num_classes} of them, got {len(value.values)}")


def tensor_of_class_values(name: str, value: Tensor) -> Tensor:
    value = as_plain(name, value)
    if value.is_complex() or value.is_quantized:
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
    no_gradient(name, value)
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected numbers, got a tensor without data (device meta)")
    return value.detach()
