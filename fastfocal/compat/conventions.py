"""What hosts share: the check of objects' classes, and the way from an anchor matcher's result to labels.

fastfocal's own convention is background K, ignored -1; detectron2's and mmdet's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

IGNORED = -1


def check_classes(
    name: str,
    classes: Sequence[Tensor],
    num_classes: int,
    *,
    first: int = 0,
    ignored: int | None = None,
    first_image: int = 0,
) -> None:
    """Raises an error for an object whose label is no class, before anything is computed from it.

    On the CPU it is a ValueError that names image, object, label and range. On CUDA it is a device-side assertion, as for the
    labels that the kernels meet, since the host does not wait for the device; in a compiled graph a RuntimeError. These two
    name the range alone.

    Args:
        name: what the host calls the labels.
        classes: for each image, its objects' labels, of any shape; there may be none.
        num_classes: K.
        first: the label of the first class, so that `first + K - 1` is that of the last one.
        ignored: one more label that the host allows, which means that the object is ignored.
        first_image: the index of the first of these images.
    """
    if len(classes) == 0:
        return
    flat = torch.cat([labels.reshape(-1) for labels in classes])
    expected = _range(first, num_classes)
    wrong = (flat < first) | (flat >= first + num_classes)
    if ignored is not None:
        wrong &= flat != ignored
        expected += f", or {ignored} for an object that is ignored"

    def place(index: int) -> str:
        image = 0
        while index >= classes[image].numel():
            index -= classes[image].numel()
            image += 1
        return f"image {first_image + image}, object {index}"

    _raise_where(wrong, name, flat, place, expected)


def check_rows(name: str, labels: Tensor, num_classes: int) -> None:
    """The same for labels (n,) of rows of logits, of which a negative one means that the row does not count."""
    expected = f"{_range(0, num_classes)}, or a negative number for a row that does not count"
    _raise_where(labels >= num_classes, name, labels, lambda row: f"row {row}", expected)


def require(condition: Tensor, message: str) -> None:
    """A ValueError, or a device-side assertion as above, where the 0-d tensor is False."""
    if is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _range(first: int, num_classes: int) -> str:
    last = first + num_classes - 1
    classes = f"one of the classes {first}..{last}" if num_classes > 1 else f"{first}, the one class"
    return f"{classes} (num_classes is {num_classes})"


def _raise_where(wrong: Tensor, name: str, labels: Tensor, place: Callable[[int], str], expected: str) -> None:
    """place: names what the label at an index belongs to."""
    if is_compiling() or wrong.device.type != "cpu":
        require(~wrong.any(), f"{name}: a label is no class; expected {expected}")
    elif wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: {place(index)} has label {labels[index].item()}; expected {expected}")


def over(loss: Tensor, divisor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Their quotient, in the dtype of a division of a 0-d tensor of `dtype`: rounded once."""
    if isinstance(divisor, Tensor) and divisor.is_floating_point():
        dtype = divisor.dtype if divisor.dim() > 0 else torch.promote_types(dtype, divisor.dtype)
    return (loss / divisor).to(dtype)


def labels_of_matches(
    matches: Sequence[Tensor], classes: Sequence[Tensor], num_classes: int, ignored: int | None = None
) -> Tensor:
    """(N, M) int64 labels of all anchors.

    Args:
        matches: for each image ``(M,)``, the index of the object that the anchor is matched to; negative for none.
        classes: for each image ``(objects,)``, the class 0..K-1 of every object; there may be none.
        num_classes: K, which is the label of background.
        ignored: the match that means neither object nor background; None where the host has no such thing.
    """
    rows = []
    for match, of_object in zip(matches, classes, strict=True):
        row = torch.full_like(match, num_classes)
        if len(of_object) > 0:
            row = torch.where(match >= 0, of_object[match.clamp(min=0)], row)
        rows.append(row if ignored is None else row.masked_fill(match == ignored, IGNORED))
    return torch.stack(rows)
