"""What the operators cannot do themselves: raise errors of torch's own types, and refuse tensors that they are never given.

Used by ops.py, where the operators are loaded and their shape functions registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import _C

OPERATORS = (
    "pack_labels", "pyramid_loss", "pyramid_loss_", "pyramid_loss_backward", "pyramid_loss_double_backward",
    "scale_gradients", "scale_gradients_",
)  # fmt: skip


def tensors_of(args: Iterable[Any]) -> list[Tensor]:
    """Those among an operator's arguments, and in its lists."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [entry for entry in value if isinstance(entry, Tensor)]
    return found


def on_one_device(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """A shape function that refuses tensors of several devices.

    One meta tensor among the arguments sends a call here, whatever the others are; what it returned would be uninitialised.
    """

    @wraps(shapes)
    def checked(*args: Any, **kwargs: Any) -> Any:
        devices = list(dict.fromkeys(t.device for t in tensors_of((*args, *kwargs.values()))))
        if len(devices) > 1:
            raise RuntimeError(
                f"{shapes.__name__}: expected all tensors on one device, got {' and '.join(map(str, devices))}"
            )
        return shapes(*args, **kwargs)

    return checked


def with_torchs_own_error(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, where memory that runs out raises what torch raises: on CUDA torch.OutOfMemoryError.

    PyTorch's stable ABI hands on no exception. An operator that fails to allocate has written nothing yet, so the allocation is
    tried again from here.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return operator(*args, **kwargs)
        try:
            return operator(*args, **kwargs)
        except RuntimeError as error:
            failed = _C.failed_allocation()
            if failed is None or failed[2] not in str(error):
                raise
        size, device, _ = failed
        torch.empty(size, dtype=torch.uint8, device=device)
        return operator(*args, **kwargs)  # memory has been freed since

    return call


class Operators:
    """The operators of a namespace of torch.ops, each `with_torchs_own_error`."""

    def __init__(self, namespace: Any) -> None:
        self.name: str = namespace.name
        for name in OPERATORS:
            setattr(self, name, with_torchs_own_error(getattr(namespace, name)))
