"""Label conventions: which labels are no class, by the project that uses them, and what is said of labels that fit none."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEFAULT_IGNORE_INDEX = -1
NOTHING_IGNORED = -(2**63)  # no label is: for hosts without such a thing


class Convention(NamedTuple):
    """The labels that are no class. With background 0 the classes are 1..K, else 0..K-1."""

    background: int | None  # None: K
    ignored: int


# The argument `labels`.
CONVENTIONS = {
    "torchvision": Convention(background=-1, ignored=-2),
    "detectron2": Convention(background=None, ignored=-1),
    "mmdet": Convention(background=None, ignored=-1),
    "effdet": Convention(background=-1, ignored=-2),
    "kuangliu": Convention(background=0, ignored=-1),
    "segmentation": Convention(background=None, ignored=255),
}


def resolve(
    labels: str | None, background_index: int | None, ignore_index: int, num_classes: int | None
) -> tuple[int | None, int]:
    """background_index and ignore_index, of the preset where one is named.

    Raises:
        ValueError: there is no such preset, it is given beside one of the two, or it ignores what is a class here.
    """
    if labels is None:
        return background_index, ignore_index
    if not isinstance(labels, str) or labels not in CONVENTIONS:
        raise ValueError(f"labels: expected one of {', '.join(map(repr, CONVENTIONS))} or None, got {labels!r}")
    if background_index is not None or ignore_index != DEFAULT_IGNORE_INDEX:
        given = "background_index" if background_index is not None else "ignore_index"
        raise ValueError(f"labels: {labels!r} says what {given} says; expected one of the two, got both")
    convention = CONVENTIONS[labels]
    if num_classes is not None and 0 <= convention.ignored <= num_classes:
        raise ValueError(
            f"labels: {labels!r} ignores {convention.ignored}, which is a class or background with num_classes {num_classes}; "
            "expected fewer classes, or another ignore_index"
        )
    return convention


def meaning(label: int, convention: Convention, num_classes: int) -> str | None:
    """What a label is by a convention; None: nothing."""
    background = num_classes if convention.background is None else convention.background
    if label == convention.ignored:
        return "ignored"
    if label == background:
        return "background"
    first = 1 if background == 0 else 0
    return "a class" if first <= label < num_classes + first else None


def numbers_of(t: Tensor) -> np.ndarray:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    with torch._C._DisableFuncTorch():  # it would wrap what comes of the tensor
        return t.detach().cpu().numpy()


def first_bad_label(
    targets: list[Tensor], anchors: list[int], num_classes: int, background: int | None, ignored: int
) -> tuple[int, int, tuple[int, ...], int] | None:
    """(level, image, position in the tensor that was given, the label) of the first label that is none of the three.

    targets: one tensor per level, or one over all levels, as the caller gave them.
    background: None: the labels are classes or ignored.
    """
    first = 1 if background == 0 else 0
    ends = np.cumsum(anchors)
    for index, t in enumerate(targets):
        values = numbers_of(t)
        fine = (values >= first) & (values < num_classes + first) | (values == ignored)
        if background is not None:
            fine |= values == background
        if fine.all():
            continue
        at = tuple(int(i) for i in np.argwhere(~fine)[0])
        together = len(targets) == 1 and len(anchors) > 1
        level = int(np.searchsorted(ends, at[-1], side="right")) if together else index
        image = at[0] if values.ndim > 1 else 0
        return level, image, at, int(values[at])
    return None


def describe_bad_label(
    targets: list[Tensor], together: bool, anchors: list[int], num_classes: int, background: int | None, ignored: int
) -> str | None:
    found = first_bad_label(targets, anchors, num_classes, background, ignored)
    if found is None:
        return None
    level, image, at, label = found
    name = "targets" if together else f"targets[{level}]"
    first = 1 if background == 0 else 0
    others = f", background_index {background} or ignore_index {ignored}"
    if background is None:
        others = f" or ignore_index {ignored}"
    elif ignored == NOTHING_IGNORED:
        others = f" or background_index {background}"
    message = (
        f"{name}: label {label} at {list(at)} (level {level}, image {image}); expected one of the classes "
        f"{first}..{num_classes - 1 + first}{others}"
    )
    if background is None:
        return message
    by_meaning: dict[str, list[str]] = {}
    for preset, convention in CONVENTIONS.items():
        what = meaning(label, convention, num_classes)
        if what is not None:
            by_meaning.setdefault(what, []).append(f'"{preset}"')
    fitting = "; ".join(f"{what} by labels={' or '.join(presets)}" for what, presets in by_meaning.items())
    return message + (f". It is {fitting}" if fitting else "")


class NoBackground:
    """Warns once where labels look as if -1 meant background, which the default takes for ignored.

    That costs a pass over the labels, so only the first calls are looked at; labels on a device are not, as it would wait.
    """

    def __init__(self, calls: int = 3) -> None:
        self.calls_left = calls

    def look(self, labels: list[Tensor], num_classes: int) -> None:
        if self.calls_left <= 0 or labels[0].device.type != "cpu" or torch._C._len_torch_dispatch_stack() > 0:
            return
        if any(type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for t in labels):
            return  # fake ones outside of their mode: they have no numbers
        self.calls_left -= 1
        total = sum(t.numel() for t in labels)
        # Counted, not summed: a sum makes eight bytes of each.
        ignored = sum(int(torch.count_nonzero(t == DEFAULT_IGNORE_INDEX)) for t in labels)
        if 2 * ignored <= total or any(bool((t == num_classes).any()) for t in labels):
            return
        self.calls_left = 0
        warnings.warn(
            f"fastfocal: {ignored} of {total} labels are -1, which means ignored here, and none is background ({num_classes}). "
            'If -1 is your background, say labels="torchvision" (background -1, ignored -2)',
            stacklevel=4,
        )


no_background = NoBackground()
