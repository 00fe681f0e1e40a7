"""A last layer as it comes: a module, or its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from fastfocal import checks
from fastfocal.checks import Levels, as_levels
from fastfocal.heads.layers import Conv, Layer, Linear, Pair

ChunkBytes = int | str


@dataclass
class Head:
    """The layer, its parameters (one for all levels, or one for each), and how much of the logits may exist at a time."""

    layer: Layer
    weights: list[Tensor]
    biases: list[Tensor]
    chunk_bytes: ChunkBytes = "auto"
    names: tuple[str, str] = ("weight", "bias")  # in errors


def head_of(module: nn.Module | Sequence[nn.Module], chunk_bytes: ChunkBytes) -> Head:
    """Of one module for all levels, or of one for each. Hooks of all modules do not run for it: a warning.

    Raises:
        TypeError, ValueError: there is something in it that would not be computed.
    """
    many = isinstance(module, (nn.ModuleList, list, tuple))
    modules: list[nn.Module] = list(module) if many else [module]  # type: ignore[arg-type, list-item]
    if not modules:
        raise ValueError("head: expected a layer, or one for each level; got an empty sequence")
    names = [f"head[{i}]" if many else "head" for i in range(len(modules))]
    layers = [layer_of(name, m) for name, m in zip(names, modules, strict=True)]
    # A profiler's or a logger's as a rule, so that an error would be too much. A compiler cannot trace a warning.
    if not is_compiling() and torch_module._has_any_global_hook():
        warnings.warn(
            "fastfocal: hooks registered for all modules do not run for the head, as it is not called", stacklevel=4
        )
    for name, m, layer in zip(names, modules, layers, strict=True):
        if layer != layers[0] or (m.bias is None) != (modules[0].bias is None):
            raise ValueError(f"{name}: expected a layer like that of level 0, {modules[0]}; got {m}")
    if all(m is modules[0] for m in modules):
        modules = modules[:1]
    weights = [checks.as_plain("head.weight", m.weight) for m in modules]  # type: ignore[arg-type]
    biases = [checks.as_plain("head.bias", m.bias) for m in modules if m.bias is not None]  # type: ignore[arg-type]
    return Head(layers[0], weights, biases, chunk_bytes, ("head.weight", "head.bias"))


def layer_of(name: str, module: nn.Module) -> Layer:
    kind = type(module)
    is_conv = isinstance(module, nn.Conv2d) and kind.forward is nn.Conv2d.forward  # type: ignore[attr-defined]
    is_conv = is_conv and kind._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
    is_linear = isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward  # type: ignore[attr-defined]
    of_its_own = (
        "forward" in module.__dict__ or "_conv_forward" in module.__dict__
    )  # put there by hooks of other libraries
    if not (is_conv or is_linear) or of_its_own:
        what = kind.__name__ + (" with a forward of its own" if of_its_own else "")
        raise TypeError(f"{name}: expected an nn.Conv2d or an nn.Linear whose forward is PyTorch's, got {what}")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hook) for hook in hooks):
        raise ValueError(f"{name}: has hooks, which would not run, as it is not called; expected a layer without them")
    if not isinstance(module, nn.Conv2d):
        return Linear()
    if module.padding_mode != "zeros":
        raise ValueError(f'{name}: expected padding_mode "zeros", got {module.padding_mode!r}')
    return conv("head.", module.kernel_size, module.stride, module.padding, module.dilation, module.groups)


def parameters_of(name: str, value: Levels) -> list[Tensor]:
    """One for all levels, or one for each."""
    return [checks.as_plain(name, value)] if isinstance(value, Tensor) else as_levels(name, value)


# --- a convolution's numbers ------------------------------------------------------------------------------------------


def conv(prefix: str, kernel: Sequence[int], stride: object, padding: object, dilation: object, groups: object) -> Conv:
    dilated = pair(f"{prefix}dilation", dilation, 1)
    strided = pair(f"{prefix}stride", stride, 1)
    name = f"{prefix}padding"
    if padding == "valid":
        padded: Pair = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilated, kernel, strict=True)]
        if any(t % 2 for t in total) or strided != (1, 1):
            raise ValueError(f'{name}: "same" needs stride 1 and the same on both sides, got kernel {tuple(kernel)}')
        padded = (total[0] // 2, total[1] // 2)
    else:
        padded = pair(name, padding, 0)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{prefix}groups: expected an integer, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{prefix}groups: expected a number >= 1, got {groups}")
    return Conv(strided, padded, dilated, groups)


def pair(name: str, value: object, least: int) -> Pair:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name}: expected an integer or two, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name}: expected numbers >= {least}, got {value!r}")
    return values[0], values[1]
