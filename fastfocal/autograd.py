"""The one autograd.Function of an eager call: one node for every level, and one operator call in each direction.

Where something else than plain autograd may differentiate (`prepare.is_transformed`), the operators are called as they are:
they carry their own derivative (registration.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import ops
from fastfocal.ops import OperatorOptions
from fastfocal.registration import in_order_of, of_each_logit, refuse_batched, times
from fastfocal.saved import Kept, describe, has_hooks, restore

# Within it operators are called past their own derivative, which costs some microseconds and is not wanted here.
below_autograd = torch._C._AutoDispatchBelowAutograd

_keep_graph: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def graph_is_kept() -> bool:
    """Whether the running backward may be followed by another one over the same graph."""
    return _keep_graph is None or is_compiling() or _keep_graph()


def is_one_number(gradient: Tensor) -> bool:
    """Whether it is one number expanded, as sum() and mean() hand back."""
    return not is_compiling() and not any(gradient.stride())


NO_SECOND_IN_PLACE = (
    'fastfocal: grad_mode="inplace" has written over the logits, which a second derivative (create_graph=True) is made of; '
    'pass grad_mode="save" or "recompute"'
)
NO_SECOND_WITH_HOOKS = (
    'fastfocal: with grad_mode="save" no logits are kept under saved-tensor hooks or torch.utils.checkpoint, and a second '
    'derivative (create_graph=True) is made of them; pass grad_mode="recompute"'
)


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


class Recorded(NamedTuple):
    """What forward takes beside the logits themselves, as one argument: autograd looks at each."""

    mode: str
    options: OperatorOptions
    # The logits in the memory order that the kernels read: the same tensors but for those copied for it.
    dense: list[Tensor]
    needs_grad: list[int]  # a flag per level
    copied: list[Memory | None] | None  # None: no level was


# What a second derivative is made of where a gradient is saved: the logits, the options, the memory order that the kernels read
# where the logits were copied for it, and the versions of all that the caller may write to. References, for as long as the
# node's saved tensors. Not saved for backward: a first derivative does not need them, and they may be written to before it.
Again = tuple[tuple[Tensor, ...], OperatorOptions, Kept | None, list[int]]


def versions_of(logits: tuple[Tensor, ...], options: OperatorOptions) -> list[int]:
    """Of the tensors that may be the caller's own; the other options are copies. An inference tensor has none."""
    versions = [t._version for t in logits]
    for t in (options.divisor, options.scores, options.class_mask, *(options.soft_targets or ())):
        if t is not None and not t.is_inference():
            versions.append(t._version)
    return versions


def what_again_reads(again: Again) -> tuple[list[Tensor], OperatorOptions]:
    """The logits in the order that the kernels read, and the options.

    Raises:
        RuntimeError: one of the tensors has been written to.
    """
    logits, options, kept, versions = again
    now = versions_of(logits, options)
    if now != versions:
        written = "logits" if now[: len(logits)] != versions[: len(logits)] else "targets, scores, mask or normalizer"
        raise RuntimeError(
            f"fastfocal: {written} modified in place since the loss was computed; a second derivative (create_graph=True) is "
            "made of what they were"
        )
    return list(logits) if kept is None else restore(logits, kept), options


class PyramidLossFunction(torch.autograd.Function):
    """(logits of every level) -> (loss,), or one elementwise loss per level."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, *logits: Tensor) -> tuple[Tensor, ...]:
        mode, options, dense, needs_grad, copied = recorded
        hooked = has_hooks()
        saved: list[Any]
        again: Again | None = None
        if mode == "recompute":
            with below_autograd():
                losses, _ = ops.pyramid_loss(dense, options, [0] * len(dense))
            saved = [
                *logits,
                *options.tensors(),
            ]  # the logits themselves, so that autograd knows whose derivative it is
            ctx.options = options.without_tensors()
        elif mode == "inplace":
            # All that may fail comes before the first write.
            empty = dense[0].new_empty(0)
            saved = [t.detach() if need else empty for t, need in zip(dense, needs_grad, strict=True)]
            losses = ops.new_losses(dense, options)
            with below_autograd():
                ops.pyramid_loss_(dense, losses, options, needs_grad)
        else:
            with below_autograd():
                losses, saved = ops.pyramid_loss(dense, options, needs_grad)
            if not hooked:
                read = None if copied is None else describe(dense, hooked=False)
                again = logits, options, read, versions_of(logits, options)
        ctx.again = again
        # Saved, not kept on ctx: autograd then drops our reference before it hands the gradient on, and a leaf takes it
        # without a copy.
        ctx.save_for_backward(*saved)
        # Gradients in other memory are the same gradients; what is read together has to lie as it did.
        as_read = [*dense, *saved[len(dense) :]] if mode == "recompute" else saved
        kept = describe(as_read, hooked) if hooked or mode == "recompute" else None
        per_anchor = options.num_classes if options.reduction == ops.NONE and options.takes_anchors else None
        ctx.kept = mode, options.reduction, per_anchor, needs_grad, copied, hooked, kept
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not is_compiling():
            refuse_batched(grad_outputs[0])
        mode, reduction, per_anchor, needs_grad, copied, hooked, kept = ctx.kept
        gradients = list(ctx.saved_tensors) if kept is None else restore(ctx.saved_tensors, kept)
        again, followed = ctx.again, graph_is_kept()
        if not followed:
            ctx.again = None  # with the saved tensors
        if torch.is_grad_enabled():
            gradients = PyramidLossFunction.differentiable(ctx, gradients, again, grad_outputs)
        elif mode == "recompute":
            gradients = recomputed(gradients, grad_outputs, needs_grad, ctx.options)
        elif reduction == ops.NONE:
            gradients = [
                times(t, g if per_anchor is None else of_each_logit(g, t, per_anchor)) if need else t
                for t, g, need in zip(gradients, grad_outputs, needs_grad, strict=True)
            ]
        elif hooked or followed:
            # What was saved is handed out itself only if nobody can ask for it again: it then belongs to whoever got it.
            with below_autograd():
                gradients = ops.operators.scale_gradients(gradients, grad_outputs[0], reduction)
        else:
            with below_autograd():
                ops.operators.scale_gradients_(gradients, grad_outputs[0], reduction)
        found: list[Tensor | None] = gradients
        if 0 in needs_grad:
            found = [t if need else None for t, need in zip(gradients, needs_grad, strict=True)]
        if copied is not None:
            found = [None if t is None else in_memory(t, memory) for t, memory in zip(found, copied, strict=True)]
        return (None, *found)

    @staticmethod
    def differentiable(
        ctx: Any, saved: list[Tensor], again: Again | None, grad_outputs: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The gradients, made of the logits by the operator that carries its own derivative.

        Raises:
            RuntimeError: the logits are not there any more.
        """
        mode, reduction, _, needs_grad, *_ = ctx.kept
        levels = len(needs_grad)
        if mode == "recompute":
            dense, options = saved[:levels], ctx.options.with_tensors(saved[levels:])
        elif mode == "inplace":
            raise RuntimeError(NO_SECOND_IN_PLACE)
        elif again is None:
            raise RuntimeError(NO_SECOND_WITH_HOOKS)
        else:
            dense, options = what_again_reads(again)
        incoming = list(grad_outputs)
        if reduction == ops.NONE:
            incoming = [in_order_of(t, g, options) for g, t in zip(incoming, dense, strict=True)]
        return ops.pyramid_loss_backward(incoming, dense, options, needs_grad)


def recomputed(
    saved: list[Tensor], grad_outputs: tuple[Tensor, ...], needs_grad: list[int], without_tensors: OperatorOptions
) -> list[Tensor]:
    """The gradients of the logits that forward saved, with everything else that it took."""
    levels = len(needs_grad)
    dense, options = saved[:levels], without_tensors.with_tensors(saved[levels:])
    if options.reduction != ops.NONE:
        incoming = list(grad_outputs)
    elif all(is_one_number(g) for g in grad_outputs):
        options = options.changed(reduction=ops.LEVEL)
        numbers = [g.as_strided((), ()) if g.numel() else g.new_zeros(()) for g in grad_outputs]
        incoming = [torch.stack(numbers).to(ops.accumulation_dtype(dense[0].dtype))]
    else:  # the kernel reads them in the logits' order
        incoming = [in_order_of(t, g, options) for g, t in zip(grad_outputs, dense, strict=True)]
    with below_autograd():
        return ops.pyramid_loss_backward(incoming, dense, options, needs_grad)


def differentiable_loss(
    mode: str, options: OperatorOptions, logits: list[Tensor], dense: list[Tensor], transformed: bool
) -> tuple[Tensor, ...]:
    """The operator, recorded by autograd where a gradient is wanted.

    transformed: what `prepare.is_transformed` said; `dense` was then made of `logits` by operations that autograd has seen.
    """
    needs_grad = [int(t.requires_grad) for t in logits]
    wanted = torch.is_grad_enabled() and any(needs_grad)
    if transformed:
        # Gradients made in forward cannot be differentiated, so only a compiler, which cannot either, gets them.
        made = needs_grad if wanted and mode != "recompute" and is_compiling() else [0] * len(dense)
        losses, _ = ops.pyramid_loss(dense, options, made)
    elif wanted:
        copied = None if dense is logits else memory_of_copied(logits, dense)
        if mode == "inplace":
            # Whoever saved these logits for a backward of their own must hear that they are gone. Before the node is made: a
            # view has another grad_fn afterwards, which then is the one that the node points to.
            torch.autograd.graph.increment_version([t for t in logits if t.requires_grad])
        return PyramidLossFunction.apply(Recorded(mode, options, dense, needs_grad, copied), *logits)
    else:
        with below_autograd():
            losses, _ = ops.pyramid_loss(dense, options, [0] * len(dense))
    return tuple(losses)
