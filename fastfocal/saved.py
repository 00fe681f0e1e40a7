"""What a node keeps for backward, found again whatever a saved-tensor hook did to it in between.

Offloading, compressing and checkpointing hooks (``torch.autograd.graph.saved_tensors_hooks``) may give back other memory than
was saved. The kernels read labels, weights and logits side by side, so memory order is part of the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Kept = list[tuple[Any, ...]]  # shape, strides, dtype and device of each tensor


def describe(tensors: Sequence[Tensor | None]) -> Kept:
    return [() if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def restore(tensors: Sequence[Tensor | None], kept: Kept) -> list[Any]:
    """The saved tensors with the strides they had.

    Raises:
        RuntimeError: a hook changed a shape, a dtype or a device.
    """
    if describe(tensors) == kept:
        return list(tensors)
    restored: list[Tensor | None] = []
    for i, (t, was) in enumerate(zip(tensors, kept, strict=True)):
        if t is None or not was:
            restored.append(t)
            continue
        shape, strides, dtype, device = was
        if t.shape != shape or t.dtype != dtype or t.device != device:
            raise RuntimeError(
                f"fastfocal: saved tensor {i} came back from a saved-tensor hook as {tuple(t.shape)}, {t.dtype}, {t.device}; "
                f"expected {tuple(shape)}, {dtype}, {device} as it was saved"
            )
        if t.stride() != strides:
            t = torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(t)
        restored.append(t)
    return restored


def has_hooks() -> bool:
    """Whether hooks see what is saved now; they may keep what they give back, so nothing is written to it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[no-any-return]
