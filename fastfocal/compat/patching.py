"""How `accelerate` and `restore` work for every host: a module changes its class, and so what it computes; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Root = TypeVar("Root", bound=nn.Module)
Swaps = dict[type[nn.Module], type[nn.Module]]  # the host's class: fastfocal's subclass of it


def accelerate(
    root: Root,
    swaps: Swaps,
    name: str,
    expected: str,
    check: Callable[[nn.Module], None] | None = None,
    around: Swaps | None = None,
) -> Root:
    """Every module in `root` of one of the host's classes gets fastfocal's; all are checked before the first is changed.

    Args:
        root: a module that is or contains them, also inside wrappers for distributed training or compilation.
        name: what the user calls `root`, for the errors.
        expected: the host's classes in words.
        check: raises ValueError for a module that fastfocal's class would compute wrongly.
        around: the host's modules around those, whose swap only checks what goes in; there may be none, and subclasses stay.

    Raises:
        ValueError: none is there, or one is that was subclassed, whose own code a swap would drop.
    """
    found = [module for module in root.modules() if isinstance(module, tuple(swaps))]
    if not found:
        raise ValueError(f"{name}: expected one with {expected}, found none in a {type(root).__name__}")
    for module in found:
        if type(module) not in (*swaps, *swaps.values()):
            raise ValueError(f"{name}: expected {expected} as they are, found the subclass {type(module).__name__}")
        if check is not None:
            check(module)
    changes = {**swaps, **(around or {})}
    for module in root.modules():
        module.__class__ = changes.get(type(module), type(module))
    return root


def restore(root: Root, swaps: Swaps) -> Root:
    """Undoes `accelerate`. What was not accelerated stays as it is."""
    stock = {fast: host for host, fast in swaps.items()}
    for module in root.modules():
        module.__class__ = stock.get(type(module), type(module))
    return root
