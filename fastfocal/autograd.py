"""The one autograd.Function: one node for every level, and one operator call in each direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.compiler import is_compiling

from fastfocal import ops

_keep_graph: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


class Options(NamedTuple):
    """The operators' arguments beside the logits, in their order (FASTFOCAL_OPTIONS_SCHEMA in csrc/operators.h)."""

    codes: Tensor | None
    soft_targets: list[Tensor]
    anchor_weight: Tensor | None
    class_weights: Tensor | None
    divisor: Tensor | None
    level_scales: list[float]
    positive_weight: float
    negative_weight: float
    gamma: float
    label_smoothing: float
    detach_modulating_factor: bool
    family: int
    beta: float
    num_classes: int
    reduction: int


def graph_is_kept() -> bool:
    """Whether the running backward may be followed by another one over the same graph."""
    return _keep_graph is None or is_compiling() or _keep_graph()


def is_one_number(gradient: Tensor) -> bool:
    """Whether it is one number expanded, as sum() and mean() hand back."""
    return not is_compiling() and not any(gradient.stride())


Memory = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


def memory_of_copied(logits: list[Tensor], dense: list[Tensor]) -> list[Memory | None]:
    """For logits that were copied to be read: their shape and their strides, as far as dense memory can have them."""
    return [
        None if t is d else (tuple(t.shape), torch.empty_like(t, device="meta").stride())
        for t, d in zip(logits, dense, strict=True)
    ]


def in_memory(gradient: Tensor, memory: Memory | None) -> Tensor:
    if memory is None:
        return gradient
    return torch.empty_strided(*memory, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


class Call(NamedTuple):
    """What forward takes beside the logits themselves, as one argument: autograd looks at each."""

    mode: str
    options: Options
    # The logits in the memory order that the kernels read: the same tensors but for those copied for it.
    dense: list[Tensor]
    needs_grad: list[int]  # a flag a level
    copied: list[Memory | None] | None  # None: no level was


class FocalLossFunction(torch.autograd.Function):
    """(logits of every level) -> (loss,), or one elementwise loss a level."""

    @staticmethod
    def forward(ctx: Any, call: Call, *logits: Tensor) -> tuple[Tensor, ...]:
        mode, options, dense, needs_grad, copied = call
        ctx.kept = mode, options.reduction, needs_grad, copied
        if mode == "recompute":
            losses, _ = ops.operators.focal_loss(dense, *options, [0] * len(dense))
            codes, soft_targets, anchor_weight, class_weights, divisor, *rest = options
            ctx.save_for_backward(*dense, *soft_targets, codes, anchor_weight, class_weights, divisor)
            ctx.options = (len(soft_targets), rest)  # those that are no tensors
        elif mode == "inplace":
            losses = ops.new_losses(dense, options.reduction)
            ops.operators.focal_loss_(dense, losses, *options, needs_grad)
            overwritten = [t for t, need in zip(dense, needs_grad, strict=True) if need]
            # Whoever saved these logits for a backward of their own must hear that they are gone.
            torch.autograd.graph.increment_version(overwritten)
            empty = dense[0].new_empty(0)
            ctx.save_for_backward(*(t.detach() if need else empty for t, need in zip(dense, needs_grad, strict=True)))
        else:
            losses, gradients = ops.operators.focal_loss(dense, *options, needs_grad)
            # Saved, not kept on ctx: autograd then drops our reference before it hands the gradient on, and a leaf takes it
            # without a copy.
            ctx.save_for_backward(*gradients)
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastfocal: create_graph=True (a second derivative of the focal loss) is not supported yet; "
                "fastfocal.reference supports it"
            )
        mode, reduction, needs_grad, copied = ctx.kept
        gradients = list(ctx.saved_tensors)
        if mode == "recompute":
            gradients = recomputed(gradients, grad_outputs, needs_grad, *ctx.options)
        elif reduction == ops.NONE:
            wanted = [level for level, need in enumerate(needs_grad) if need]
            products = torch._foreach_mul(
                [gradients[level] for level in wanted], [grad_outputs[level] for level in wanted]
            )
            for level, product in zip(wanted, products, strict=True):
                # Ignored anchors keep their 0 beside an incoming gradient that is not finite.
                gradients[level] = product.masked_fill_(gradients[level] == 0, 0)
        elif graph_is_kept():
            # What was saved is handed out itself only if nobody can ask for it again: it then belongs to whoever got it.
            gradients = ops.operators.scale_gradients(gradients, grad_outputs[0], reduction)
        else:
            ops.operators.scale_gradients_(gradients, grad_outputs[0], reduction)
        found: list[Tensor | None] = gradients
        if 0 in needs_grad:
            found = [t if need else None for t, need in zip(gradients, needs_grad, strict=True)]
        if copied is not None:
            found = [None if t is None else in_memory(t, memory) for t, memory in zip(found, copied, strict=True)]
        return (None, *found)


def recomputed(
    saved: list[Tensor], grad_outputs: tuple[Tensor, ...], needs_grad: list[int], soft: int, rest: list[Any]
) -> list[Tensor]:
    """The gradients of the logits that forward saved, with everything else that it took."""
    levels = len(needs_grad)
    dense, soft_targets = saved[:levels], saved[levels : levels + soft]
    codes, *operands = saved[-4:]
    options = Options(codes, soft_targets, *operands, *rest)  # type: ignore[arg-type]
    if options.reduction != ops.NONE:
        incoming = list(grad_outputs)
    elif all(is_one_number(g) for g in grad_outputs):
        options = options._replace(reduction=ops.LEVEL)
        numbers = [g.as_strided((), ()) if g.numel() else g.new_zeros(()) for g in grad_outputs]
        incoming = [torch.stack(numbers).to(ops.accumulation_dtype(dense[0].dtype))]
    else:  # the kernel reads them in the logits' order
        incoming = [
            g if g.stride() == t.stride() else torch.empty_like(t).copy_(g)
            for g, t in zip(grad_outputs, dense, strict=True)
        ]
    return ops.operators.focal_loss_backward(incoming, dense, *options, needs_grad)  # type: ignore[no-any-return]


def focal_loss(mode: str, options: Options, logits: list[Tensor], dense: list[Tensor]) -> tuple[Tensor, ...]:
    """The operator, recorded by autograd where a gradient is wanted."""
    needs_grad = [int(t.requires_grad) for t in logits]
    if torch.is_grad_enabled() and any(needs_grad):
        copied = None if dense is logits else memory_of_copied(logits, dense)
        return FocalLossFunction.apply(Call(mode, options, dense, needs_grad, copied), *logits)
    if not is_compiling() and any([unpack_dual(t).tangent is not None for t in logits]):
        raise RuntimeError(
            "fastfocal: forward-mode derivatives of the focal loss are not supported; fastfocal.reference supports them"
        )
    losses, _ = ops.operators.focal_loss(dense, *options, [])
    return tuple(losses)
