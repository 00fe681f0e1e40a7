"""The node as operators of their own, for compilers: opaque to them, as the loop over tiles is nothing to take apart.

Eager calls go past them (loss.py). They are written in Python, so a program that runs without Python cannot have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfocal import ops
from fastfocal.heads.compute import HeadCall, compute
from fastfocal.heads.layers import Conv, Layer, Linear
from fastfocal.heads.sizes import Sizes, without_autocast
from fastfocal.ops import OperatorOptions

# As pyramid_loss takes them after the logits: no second place says what they are.
_OPTIONS = str(torch.ops.fastfocal.pyramid_loss.default._schema).partition("logits, ")[2].partition(") ->")[0]
# tensors: features of every level, weights, biases. layer: 0 for a linear one, else stride, padding, dilation, groups.
# needs_grad, among the options: a flag for each of these tensors.
_OWN = "Tensor[] tensors, int levels, int weights, ScalarType dtype, int[] layer, int bytes_of_tile, bool whole_anchors"
_OWN_COUNT = _OWN.count(",") + 1
_ARGUMENTS = f"{_OWN}, {_OPTIONS}"
_SOFT_TARGETS = _OWN_COUNT + ops.OPTION_NAMES.index("soft_targets")
_library = torch.library.Library("fastfocal", "FRAGMENT")
_library.define(f"head_loss({_ARGUMENTS}) -> (Tensor losses, Tensor[] gradients)")
_library.define(f"head_loss_backward(Tensor incoming, {_ARGUMENTS}) -> Tensor[]")


def numbers_of(layer: Layer) -> list[int]:
    if isinstance(layer, Linear):
        return [0]  # torch.library takes an empty list for one of tensors
    return [*layer.stride, *layer.padding, *layer.dilation, layer.groups]


def arguments_of(call: HeadCall, sizes: Sizes, tensors: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Any]:
    flags = [int(flag) for flag in needs_grad]
    head = [list(tensors), sizes.levels, sizes.weights, sizes.dtype, numbers_of(call.layer), call.bytes_of_tile]
    return [*head, call.whole_anchors, *call.options.arguments(flags)]


def run(arguments: Sequence[Any], incoming: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    tensors, levels, weights, dtype, numbers, bytes_of_tile, whole_anchors, *rest = arguments
    options, needs_grad = OperatorOptions.named(rest)
    if options.soft_targets is None:
        options.soft_targets = []
    sizes = Sizes(levels, weights, dtype)
    layer: Layer = Linear()
    if len(numbers) > 1:
        s, t, p, q, d, e, groups = numbers
        layer = Conv((s, t), (p, q), (d, e), groups)
    call = HeadCall(layer, options, options.divisor, bytes_of_tile, whole_anchors)
    wanted = sizes.split([bool(flag) for flag in needs_grad])
    with without_autocast(tensors[0].device):
        losses, found = compute(call, sizes.parts(tensors), wanted, sizes.kept(tensors), incoming)
    return losses, [as_promised(g, p) for g, p in zip(found, promised(tensors, sizes, needs_grad), strict=True)]


def promised(tensors: list[Tensor], sizes: Sizes, needs_grad: list[int]) -> list[Tensor]:
    """Memory for the gradients, of those wanted."""
    return [
        torch.empty_like(t, dtype=dtype) if need else t.new_empty(0)
        for t, dtype, need in zip(tensors, sizes.kept(tensors), needs_grad, strict=True)
    ]


def as_promised(gradient: Tensor | None, promise: Tensor) -> Tensor:
    """Of that dtype and in that memory order, which the shape functions say."""
    if gradient is None:
        return promise
    same = gradient.dtype == promise.dtype and gradient.stride() == promise.stride()
    return gradient if same else promise.copy_(gradient)


def head_loss(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    return run(arguments)


def head_loss_backward(incoming: Tensor, *arguments: Any) -> list[Tensor]:
    return run(arguments, incoming)[1]


def head_loss_shapes(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    tensors, levels, weights, dtype, needs_grad = *arguments[:4], arguments[-1]
    losses = tensors[0].new_empty((levels, tensors[0].shape[0]), dtype=torch.float64)
    return losses, promised(tensors, Sizes(levels, weights, dtype), needs_grad)


def head_loss_backward_shapes(incoming: Tensor, *arguments: Any) -> list[Tensor]:
    return head_loss_shapes(*arguments)[1]


# --- derivatives ------------------------------------------------------------------------------------------------------


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    tensors, needs_grad = inputs[0], inputs[-1]
    ctx.saves = any(needs_grad)
    ctx.dtypes = [t.dtype for t in tensors]
    ctx.requires = [t.requires_grad for t in tensors]
    ctx.soft_targets = len(inputs[_SOFT_TARGETS] or ())
    if ctx.saves:
        ctx.needs_grad = list(needs_grad)
        ctx.save_for_backward(*output[1])
        return
    ctx.others = inputs[1:_OWN_COUNT]
    options, _ = OperatorOptions.named(inputs[_OWN_COUNT:])
    ctx.options = options.without_tensors()
    ctx.save_for_backward(*tensors, *options.tensors())


def backward(ctx: Any, incoming: Tensor, _: Any) -> tuple[Any, ...]:
    if ctx.saves:
        number = incoming.flatten()[:1].sum()
        found = [times(t, number) if need else None for t, need in zip(ctx.saved_tensors, ctx.needs_grad, strict=True)]
    else:
        count = len(ctx.requires)
        tensors, options = list(ctx.saved_tensors[:count]), ctx.options.with_tensors(ctx.saved_tensors[count:])
        flags = [int(flag) for flag in ctx.requires]
        made = torch.ops.fastfocal.head_loss_backward(incoming, tensors, *ctx.others, *options.arguments(flags))
        found = [t if need else None for t, need in zip(made, flags, strict=True)]
    found = [None if t is None else t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True)]
    others: list[Any] = [None] * _ARGUMENTS.count(",")
    if ctx.soft_targets:
        others[_SOFT_TARGETS - 1] = [None] * ctx.soft_targets
    return (found, *others)


def times(gradient: Tensor, number: Tensor) -> Tensor:
    """In float32, to be rounded then. What a bfloat16 gradient is kept in, it has been rounded to before."""
    wide = ops.accumulation_dtype(gradient.dtype)
    return gradient.to(wide) * number.to(wide)


_library.impl("head_loss", head_loss, "CompositeExplicitAutograd")
_library.impl("head_loss_backward", head_loss_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastfocal::head_loss", head_loss_shapes, lib=_library)
torch.library.register_fake("fastfocal::head_loss_backward", head_loss_backward_shapes, lib=_library)
torch.library.register_autograd("fastfocal::head_loss", backward, setup_context=setup_context, lib=_library)
