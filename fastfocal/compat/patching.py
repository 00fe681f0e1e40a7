"""How `accelerate` and `restore` work for every host: a module changes its class, and so what it computes; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from fastfocal.compat import fused_head

Root = TypeVar("Root", bound=nn.Module)
Swaps = dict[type[nn.Module], type[nn.Module]]  # the host's class: fastfocal's subclass of it
LastLayer = Callable[
    [nn.Module], str | None
]  # the path from one of the host's modules to its last layer; None: it has none


def accelerate(
    root: Root,
    swaps: Swaps,
    name: str,
    expected: str,
    check: Callable[[nn.Module], None] | None = None,
    around: Swaps | None = None,
    last_layer: LastLayer | None = None,
) -> Root:
    """Every module in `root` of one of the host's classes gets fastfocal's; all are checked before the first is changed.

    Args:
        root: a module that is or contains them, also inside wrappers for distributed training or compilation.
        name: what the user calls `root`, for the errors.
        expected: the host's classes in words.
        check: raises ValueError for a module that fastfocal's class would compute wrongly.
        around: the host's modules around those, whose swap only checks what goes in; there may be none, and subclasses stay.
        last_layer: names the layers to be fused with the loss, and raises ValueError for a module that cannot be; None: none
            is, and those that were no longer are.

    Raises:
        ValueError: none is there, or one is that was subclassed, whose own code a swap would drop; a last layer that is no
            plain convolution.
    """
    found = [module for module in root.modules() if isinstance(module, tuple(swaps))]
    if not found:
        raise ValueError(f"{name}: expected one with {expected}, found none in a {type(root).__name__}")
    for module in found:
        if type(module) not in (*swaps, *swaps.values()):
            raise ValueError(f"{name}: expected {expected} as they are, found the subclass {type(module).__name__}")
        if check is not None:
            check(module)
    layers = []
    for module in found if last_layer is not None else ():
        assert last_layer is not None
        path = last_layer(module)
        if path is not None:
            layers.append(module.get_submodule(path))
            fused_head.check(f"{type(module).__name__}.{path}", layers[-1])
    fused_head.check_restorable(root)
    changes = {**swaps, **(around or {})}
    for module in root.modules():
        module.__class__ = changes.get(type(module), type(module))
    fused_head.restore(root)
    for layer in layers:
        layer.__class__ = fused_head.UnmadeConv2d
    return root


def restore(root: Root, swaps: Swaps) -> Root:
    """Undoes `accelerate`. What was not accelerated stays as it is.

    Raises:
        ValueError: a layer that was fused with the loss has been parametrized since.
    """
    fused_head.check_restorable(root)
    fused_head.restore(root)
    stock = {fast: host for host, fast in swaps.items()}
    for module in root.modules():
        module.__class__ = stock.get(type(module), type(module))
    return root
