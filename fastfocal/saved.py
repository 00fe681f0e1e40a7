"""What a node keeps for backward, found again whatever a saved-tensor hook did to it in between.

Offloading, compressing and checkpointing hooks (``torch.autograd.graph.saved_tensors_hooks``) may give back other memory than
was saved. The kernels read labels, weights and logits side by side, so memory order is part of the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """What saved tensors were like."""

    strides: list[tuple[int, ...] | None]
    # Shape, dtype and device of each, where hooks see them.
    others: list[tuple[Any, ...] | None] | None


def describe(tensors: Sequence[Tensor | None], hooked: bool) -> Kept:
    strides = [None if t is None else t.stride() for t in tensors]
    return Kept(strides, [others_of(t) for t in tensors] if hooked else None)


def others_of(t: Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.shape, t.dtype, t.device)


def restore(tensors: Sequence[Tensor | None], kept: Kept) -> list[Any]:
    """The saved tensors with the strides they had.

    Raises:
        RuntimeError: a hook changed a shape, a dtype or a device.
    """
    if kept.others is not None:
        for i, (t, was) in enumerate(zip(tensors, kept.others, strict=True)):
            if others_of(t) != was:
                shape, dtype, device = was or ((), None, None)
                got = None if t is None else f"{tuple(t.shape)}, {t.dtype}, {t.device}"
                raise RuntimeError(
                    f"fastfocal: saved tensor {i} came back from a saved-tensor hook as {got}; expected {tuple(shape)}, "
                    f"{dtype}, {device} as it was saved"
                )
    return [
        t if t is None or strides is None or t.stride() == strides else laid_out(t, strides)
        for t, strides in zip(tensors, kept.strides, strict=True)
    ]


def laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides. Where one is 0, as of a tensor that was expanded, the same numbers are there all along."""
    once = t
    for dim, stride in enumerate(strides):
        if stride == 0 and t.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    return torch.empty_strided(once.shape, strides, dtype=t.dtype, device=t.device).copy_(once).expand(t.shape)


def has_hooks() -> bool:
    """Whether hooks see what is saved now; they may keep what they give back, so nothing is written to it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[no-any-return]
