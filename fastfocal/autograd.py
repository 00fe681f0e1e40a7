"""The one autograd.Function: one node for every level, and one operator call in each direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfocal import ops

_keep_graph: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


class Plan(NamedTuple):
    """The operators' arguments that are not tensors, in their order."""

    level_scales: list[float]
    positive_weight: float
    negative_weight: float
    gamma: float
    label_smoothing: float
    num_classes: int
    reduction: int


class Operands(NamedTuple):
    """Those that are tensors, beside the logits and the soft targets."""

    codes: Tensor | None
    anchor_weight: Tensor | None
    class_alpha: Tensor | None
    divisor: Tensor | None


def options(plan: Plan, operands: Operands, soft_targets: list[Tensor], needs_grad: list[int]) -> tuple[Any, ...]:
    """The operators' common arguments (FASTFOCAL_OPTIONS_SCHEMA in csrc/operators.h)."""
    return operands.codes, soft_targets, *operands[1:], *plan, needs_grad


def graph_is_kept() -> bool:
    """Whether the running backward may be followed by another one over the same graph."""
    return True if torch.compiler.is_compiling() or _keep_graph is None else _keep_graph()


class FocalLossFunction(torch.autograd.Function):
    """(logits of every level) -> (loss,), or one elementwise loss a level."""

    @staticmethod
    def forward(ctx: Any, mode: str, plan: Plan, operands: Operands, levels: int, *tensors: Tensor) -> Any:
        """tensors: the logits of `levels` levels, then their soft targets, if any."""
        logits, soft_targets = list(tensors[:levels]), list(tensors[levels:])
        needs_grad = [int(need) for need in ctx.needs_input_grad[4 : 4 + levels]]
        ctx.mode, ctx.plan, ctx.needs_grad = mode, plan, needs_grad
        if mode == "recompute":
            losses, _ = ops.library.focal_loss(logits, *options(plan, operands, soft_targets, [0] * levels))
            ctx.levels = levels
            ctx.present = [t is not None for t in operands]
            ctx.save_for_backward(*tensors, *(t for t in operands if t is not None))
        elif mode == "inplace":
            losses = ops.library.focal_loss_(logits, *options(plan, operands, soft_targets, needs_grad))
            # Whoever saved these logits for a backward of their own must hear that they are gone.
            torch.autograd.graph.increment_version([t for t, need in zip(logits, needs_grad, strict=True) if need])
            empty = logits[0].new_empty(0)
            ctx.save_for_backward(*(t.detach() if need else empty for t, need in zip(logits, needs_grad, strict=True)))
        else:
            losses, gradients = ops.library.focal_loss(logits, *options(plan, operands, soft_targets, needs_grad))
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
        plan, needs_grad = ctx.plan, ctx.needs_grad
        if ctx.mode == "recompute":
            saved = iter(ctx.saved_tensors)
            logits = [next(saved) for _ in range(ctx.levels)]
            soft_targets = [next(saved) for _ in range(len(ctx.saved_tensors) - ctx.levels - sum(ctx.present))]
            operands = Operands(*(next(saved) if present else None for present in ctx.present))
            if plan.reduction == ops.NONE:  # the kernel reads the incoming gradients in the logits' order
                grad_outputs = tuple(
                    g if g.stride() == t.stride() else torch.empty_like(t).copy_(g)
                    for g, t in zip(grad_outputs, logits, strict=True)
                )
            gradients = ops.library.focal_loss_backward(
                list(grad_outputs), logits, *options(plan, operands, soft_targets, needs_grad)
            )
        else:
            # What was saved is handed out itself only if nobody can ask for it again: it then belongs to whoever got it.
            gradients = list(ctx.saved_tensors)
            keep = graph_is_kept()
            if plan.reduction == ops.NONE:
                wanted = [(t, g) for t, g, need in zip(gradients, grad_outputs, needs_grad, strict=True) if need]
                scaled = iter(torch._foreach_mul(*map(list, zip(*wanted, strict=True))))
                gradients = [next(scaled) if need else t for t, need in zip(gradients, needs_grad, strict=True)]
            elif keep:
                gradients = ops.library.scale_gradients(gradients, grad_outputs[0], plan.reduction)
            else:
                ops.library.scale_gradients_(gradients, grad_outputs[0], plan.reduction)
        found = [t if need else None for t, need in zip(gradients, needs_grad, strict=True)]
        # forward's other arguments: mode, plan, operands, levels before the logits, soft targets behind them.
        return (None, None, None, None, *found, *[None] * (len(ctx.needs_input_grad) - 4 - len(found)))


def focal_loss(
    mode: str, plan: Plan, operands: Operands, logits: list[Tensor], soft_targets: list[Tensor]
) -> tuple[Tensor, ...]:
    """The operator, recorded by autograd where a gradient is wanted."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in logits):
        return FocalLossFunction.apply(mode, plan, operands, len(logits), *logits, *soft_targets)
    losses, _ = ops.library.focal_loss(logits, *options(plan, operands, soft_targets, []))
    return tuple(losses)
