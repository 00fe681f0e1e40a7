"""What PyTorch is told about the operators in Python: their shapes, their derivatives, and how they meet ``vmap``.

An eager call of the loss records `autograd.PyramidLossFunction` itself and calls the operators below autograd: that costs
least. Everything else (``torch.compile``, ``torch.export``, ``torch.func``, forward mode, a direct call of
``torch.ops.fastfocal``) meets the operators, so they carry their own derivative: `pyramid_loss` and `pyramid_loss_backward` the
true one, the others a node that raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fastfocal import ops
from fastfocal.guards import on_one_device, tensors_of
from fastfocal.ops import IMAGE, LEVEL, NONE, OperatorOptions, accumulation_dtype, anchor_shape, images, new_losses
from fastfocal.saved import describe, restore

NO_SECOND_DERIVATIVE = (
    "fastfocal: gradients that were made in forward have no second derivative; torch.compile makes them there unless the loss "
    'has grad_mode="recompute"'
)
NO_THIRD_DERIVATIVE = (
    "fastfocal: a third derivative of the loss is not supported; fastfocal.reference has derivatives of any order"
)
NO_FORWARD_OVER_REVERSE = (
    'fastfocal: forward mode over logits that require grad needs grad_mode="recompute" under torch.compile'
)
NO_BATCHED_GRADIENTS = (
    "fastfocal: is_grads_batched=True is not supported; call torch.autograd.grad once for each incoming gradient, or use "
    "torch.func.vmap over torch.func.vjp"
)
NO_VMAP = (
    "fastfocal: torch.vmap over the focal loss is not supported; call it once for each entry of the mapped dimension, or make "
    "that dimension a part of N"
)


# --- shapes -----------------------------------------------------------------------------------------------------------


def pack_labels(
    labels: list[Tensor],
    logits: list[Tensor],
    scores: Tensor | None,
    num_classes: int,
    background: int,
    ignored: int,
    count: int,
    minimum: float,
    background_is_class: bool = False,
    one_channel: bool = False,
) -> tuple[Tensor, Tensor]:
    anchors = sum(t.numel() // (1 if one_channel else num_classes) for t in logits)
    packed = logits[0].new_empty(anchors, dtype=torch.int16 if num_classes < 2**15 else torch.int32)
    n = images(logits[0])
    per_image = {ops.COUNT_POSITIVES_PER_IMAGE: (n,), ops.COUNT_ANCHORS_PER_IMAGE: (n,)}
    shape = {ops.COUNT_NOTHING: (0,), **per_image}.get(count, ())
    return packed, logits[0].new_empty(shape, dtype=torch.float64)


def gradients_like(logits: list[Tensor], needs_grad: list[int]) -> list[Tensor]:
    return [torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(logits, needs_grad, strict=True)]


def pyramid_loss(logits: list[Tensor], *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    options, needs_grad = OperatorOptions.named(arguments)
    return new_losses(logits, options), gradients_like(logits, needs_grad) if any(needs_grad) else []


def pyramid_loss_(logits: list[Tensor], losses: list[Tensor], *arguments: Any) -> None:
    return None


def pyramid_loss_backward(grad_outputs: list[Tensor], logits: list[Tensor], *arguments: Any) -> list[Tensor]:
    _, needs_grad = OperatorOptions.named(arguments)
    return gradients_like(logits, needs_grad)


def pyramid_loss_double_backward(
    grad_gradients: list[Tensor], grad_outputs: list[Tensor], logits: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[Tensor]]:
    options, needs_grad = OperatorOptions.named(arguments)
    elementwise = options.reduction == NONE
    along = [torch.empty_like(t) for t in logits] if elementwise else [g.new_empty(g.shape) for g in grad_outputs]
    return along, gradients_like(logits, needs_grad)


def scale_gradients(gradients: list[Tensor], grad_output: Tensor, reduction: int) -> list[Tensor]:
    return [torch.empty_like(t) for t in gradients]


def scale_gradients_(gradients: list[Tensor], grad_output: Tensor, reduction: int) -> None:
    return None


SHAPES = (
    pack_labels,
    pyramid_loss,
    pyramid_loss_,
    pyramid_loss_backward,
    pyramid_loss_double_backward,
    scale_gradients,
    scale_gradients_,
)


# --- derivatives ------------------------------------------------------------------------------------------------------


class OperatorCall(NamedTuple):
    """One call of an operator on its way below autograd."""

    operator: Any
    keyset: Any
    namespace: str
    # Of the call: what is below it may be the next level of torch.func, which differentiates by itself.
    grad_mode: bool
    forward_grad_mode: bool

    def __call__(self, *args: Any) -> Any:
        with (
            torch._C._AutoDispatchBelowAutograd(),
            torch.set_grad_enabled(self.grad_mode),
            forward_ad._set_fwd_grad_enabled(self.forward_grad_mode),
        ):
            return self.operator.redispatch(self.keyset & torch._C._after_autograd_keyset, *args)


class PyramidLossDerivative(_SingleLevelFunction):
    """The operator `pyramid_loss` as autograd sees it: (logits of every level) -> (losses, gradients).

    Where the gradients of all levels that need one were made, they are what backward hands on; else it makes them from the
    logits. They are results too, so whoever differentiates them hears that it cannot be done.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: OperatorCall,
        options: OperatorOptions,
        made: list[int],
        for_jvp: list[Any],
        *logits: Tensor,
    ) -> tuple[Tensor, ...]:
        losses, gradients = call(list(logits), *options.arguments(made))
        ctx.set_materialize_grads(False)
        ctx.operators, ctx.losses = getattr(torch.ops, call.namespace), len(losses)
        ctx.options = options.without_tensors()
        needed = ctx.needs_input_grad[NOT_LOGITS:]
        ctx.gradients_made = bool(gradients) and all(got for got, need in zip(made, needed, strict=True) if need)
        saved = gradients if ctx.gradients_made else [*logits, *options.tensors()]
        ctx.kept = describe(saved, hooked=True)
        ctx.save_for_backward(*saved)
        ctx.for_jvp = for_jvp
        if not gradients:
            for_jvp += [list(logits), options]
        return (*losses, *gradients)

    @staticmethod
    @torch._disable_dynamo
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        incoming, of_gradients = list(grad_outputs[: ctx.losses]), grad_outputs[ctx.losses :]
        if any(g is not None for g in of_gradients):
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        needed = [int(need) for need in ctx.needs_input_grad[NOT_LOGITS:]]
        nothing = [None] * NOT_LOGITS
        if all(g is None for g in incoming):
            return (*nothing, *[None] * len(needed))
        for g in incoming:
            refuse_batched(g)
        saved = restore(ctx.saved_tensors, ctx.kept)
        found: list[Any]
        reduction = ctx.options.reduction
        if not ctx.gradients_made:
            found = PyramidLossDerivative.recomputed(ctx, incoming, saved, needed)
        elif reduction == NONE:
            found = [
                times(t, of_each_logit(g, t, ctx.options.num_classes) if ctx.options.takes_anchors else g)
                if need and g is not None
                else None
                for t, g, need in zip(saved, incoming, needed, strict=True)
            ]
        else:
            found = ctx.operators.scale_gradients(saved, incoming[0], reduction)
        return (*nothing, *(t if need else None for t, need in zip(found, needed, strict=True)))

    @staticmethod
    def recomputed(ctx: Any, incoming: list[Tensor | None], saved: list[Tensor], needed: list[int]) -> list[Tensor]:
        logits, options = saved[: len(needed)], ctx.options.with_tensors(saved[len(needed) :])
        if options.reduction == NONE:  # the kernel reads them in the logits' order
            zeros = new_losses(logits, options)
            given = [
                zero.zero_() if g is None else in_order_of(t, g, options)
                for g, t, zero in zip(incoming, logits, zeros, strict=True)
            ]
        else:
            given = [incoming[0]]  # type: ignore[list-item]
        return ops.pyramid_loss_backward(given, logits, options, needed, ctx.operators)

    @staticmethod
    @torch._disable_dynamo
    def jvp(ctx: Any, _call: None, _options: None, _made: None, _: None, *tangents: Tensor | None) -> Any:
        """The gradient, times the tangents of the logits."""
        if not ctx.for_jvp:
            raise RuntimeError(NO_FORWARD_OVER_REVERSE)
        # PyTorch calls this with forward mode off, for every level of torch.func below too: an outer jvp would find 0.
        with forward_ad._set_fwd_grad_enabled(True):
            return PyramidLossDerivative.directional(ctx, tangents)

    @staticmethod
    def directional(ctx: Any, tangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        logits, options = ctx.for_jvp
        reduction, logits = options.reduction, without_tangents(logits)
        dtype = accumulation_dtype(logits[0].dtype)
        if reduction == NONE:
            ones = [torch.ones_like(t) for t in new_losses(logits, options)]
        else:
            shape = {LEVEL: (len(logits),), IMAGE: (images(logits[0]),)}.get(reduction, ())
            ones = [torch.ones(shape, dtype=dtype, device=logits[0].device)]
        wanted = [int(t is not None) for t in tangents]
        gradients = ops.pyramid_loss_backward(ones, logits, options, wanted, ctx.operators)
        products = [
            torch.zeros_like(x) if t is None else times(g, t)
            for x, g, t in zip(logits, gradients, tangents, strict=True)
        ]
        if reduction == NONE:
            if options.takes_anchors:
                return tuple(sum_over_classes(p, options.num_classes) for p in products)
            return tuple(products)
        if reduction == IMAGE:
            n = images(logits[0])
            return (torch.stack([p.reshape(n, -1).sum(1, dtype=dtype) for p in products]).sum(0),)
        of_levels = torch.stack([p.sum(dtype=dtype) for p in products])
        return (of_levels if reduction == LEVEL else of_levels.sum(),)


NOT_LOGITS = 4  # what forward takes before them


class GradientsDerivative(_SingleLevelFunction):
    """The operator `pyramid_loss_backward` as autograd sees it: (incoming gradients, logits of every level) -> gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: OperatorCall,
        options: OperatorOptions,
        needs_grad: list[int],
        for_jvp: list[Any],
        incoming: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """incoming: how many of the tensors are incoming gradients; the others are the logits."""
        grad_outputs, logits = list(tensors[:incoming]), list(tensors[incoming:])
        gradients = call(grad_outputs, logits, *options.arguments(needs_grad))
        ctx.set_materialize_grads(False)
        ctx.operators, ctx.incoming = getattr(torch.ops, call.namespace), incoming
        ctx.options = options.without_tensors()
        in_order = [*logits, *options.tensors()]
        ctx.kept = describe(in_order, hooked=True)
        ctx.save_for_backward(*grad_outputs, *in_order)
        ctx.for_jvp = for_jvp
        for_jvp += [grad_outputs, logits, options, needs_grad]
        return tuple(gradients)

    @staticmethod
    @torch._disable_dynamo
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Any, ...]:
        nothing = [None] * NOT_TENSORS
        needed = [int(need) for need in ctx.needs_input_grad[NOT_TENSORS:]]
        if all(g is None for g in grad_gradients):
            return (*nothing, *[None] * len(needed))
        for g in grad_gradients:
            refuse_batched(g)
        grad_outputs, in_order = ctx.saved_tensors[: ctx.incoming], restore(ctx.saved_tensors[ctx.incoming :], ctx.kept)
        levels = len(grad_gradients)
        logits, options = in_order[:levels], ctx.options.with_tensors(in_order[levels:])
        found = second_derivative(
            grad_gradients, list(grad_outputs), logits, options, needed[ctx.incoming :], ctx.operators
        )
        return (*nothing, *(t if need else None for t, need in zip((*found[0], *found[1]), needed, strict=True)))

    @staticmethod
    @torch._disable_dynamo
    def jvp(
        ctx: Any, _call: None, _options: None, _needs: None, _: None, _incoming: None, *tangents: Tensor | None
    ) -> Any:
        """Linear in the incoming gradients; by the logits a diagonal, so the tangents' product is what backward computes."""
        with forward_ad._set_fwd_grad_enabled(True):  # as in `PyramidLossDerivative.jvp`
            return GradientsDerivative.directional(ctx, tangents[: ctx.incoming], tangents[ctx.incoming :])

    @staticmethod
    def directional(
        ctx: Any, of_incoming: tuple[Tensor | None, ...], of_logits: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, ...]:
        grad_outputs, logits, options, needs_grad = ctx.for_jvp
        grad_outputs, logits = without_tangents(grad_outputs), without_tangents(logits)
        found = [torch.zeros_like(t) if need else t.new_empty(0) for t, need in zip(logits, needs_grad, strict=True)]
        if any(t is not None for t in of_incoming):
            given = [torch.zeros_like(g) if t is None else t for t, g in zip(of_incoming, grad_outputs, strict=True)]
            if options.reduction == NONE:
                given = [in_order_of(t, g, options) for g, t in zip(given, logits, strict=True)]
            found = ops.pyramid_loss_backward(given, logits, options, needs_grad, ctx.operators)
        if any(t is not None for t in of_logits):
            _, seconds = second_derivative(of_logits, grad_outputs, logits, options, needs_grad, ctx.operators)
            found = [a + b for a, b in zip(found, seconds, strict=True)]
        return tuple(found)


NOT_TENSORS = 5  # what forward takes before them


def without_tangents(tensors: list[Tensor]) -> list[Tensor]:
    """Those of the running level; not by `forward_ad`, which a compiled graph does not tell of its level."""
    return [torch._VF._unpack_dual(t, level=0)[0] for t in tensors]  # type: ignore[attr-defined]


def second_derivative(
    grad_gradients: Sequence[Tensor | None],
    grad_outputs: list[Tensor],
    logits: list[Tensor],
    options: OperatorOptions,
    needs_grad: list[int],
    operators: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """`pyramid_loss_double_backward` of what autograd has."""
    given = [
        t.new_empty(0) if g is None or g.shape != t.shape else strided_as(t, g)
        for g, t in zip(grad_gradients, logits, strict=True)
    ]
    if options.reduction == NONE:
        grad_outputs = [in_order_of(t, g, options) for g, t in zip(grad_outputs, logits, strict=True)]
    try:
        return ops.pyramid_loss_double_backward(given, grad_outputs, logits, options, needs_grad, operators)
    except RuntimeError as error:
        if "has no second derivative" not in str(error):
            raise
        raise RuntimeError(no_second_derivative_of(options.loss)) from None


def no_second_derivative_of(kind: int) -> str:
    from fastfocal.losses import LOSSES  # which imports this file

    for member in LOSSES:
        if member.parameters.kind == kind:
            name = member.parameters.name
            return f"fastfocal: {name} has no second derivative (create_graph=True); fastfocal.reference.{name} has"
    return f"fastfocal: loss {kind} has no second derivative (create_graph=True)"


def refuse_batched(grad_output: Tensor | None) -> None:
    if grad_output is not None and torch._C._functorch.is_legacy_batchedtensor(grad_output):
        raise RuntimeError(NO_BATCHED_GRADIENTS)


def in_order_of(logits: Tensor, gradient: Tensor, options: OperatorOptions) -> Tensor:
    """An incoming gradient in the memory order that the kernel reads it in."""
    if options.takes_anchors and not is_mapped(gradient):
        return gradient.contiguous()
    return strided_as(logits, gradient)


def strided_as(logits: Tensor, gradient: Tensor) -> Tensor:
    if gradient.stride() == logits.stride() or is_mapped(gradient):
        return gradient
    return torch.empty_like(logits).copy_(gradient)


def of_each_logit(per_anchor: Tensor, logits: Tensor, num_classes: int) -> Tensor:
    """One number for each anchor, as one for each of its logits."""
    if logits.dim() != 4:
        return per_anchor.unsqueeze(-1).expand_as(logits)
    n, channels, h, w = logits.shape
    a = channels // num_classes
    per_anchor = per_anchor.reshape(n, h, w, a).permute(0, 3, 1, 2).unsqueeze(2)
    return per_anchor.expand(n, a, num_classes, h, w).reshape(logits.shape)


def sum_over_classes(logits: Tensor, num_classes: int) -> Tensor:
    """Of numbers shaped as logits: one for each anchor."""
    if logits.dim() != 4:
        return logits.sum(-1)
    n, channels, h, w = logits.shape
    per_anchor = logits.reshape(n, channels // num_classes, num_classes, h, w).sum(2).permute(0, 2, 3, 1)
    return per_anchor.reshape(anchor_shape(logits, num_classes))


def is_mapped(t: Tensor) -> bool:
    """Whether it holds an entry for each call that vmap makes of one; `entry_by_entry` takes them apart."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """Their product; a gradient of exactly 0, as an ignored anchor has, stays 0 beside what is not finite."""
    return (gradient * factor).masked_fill_(gradient == 0, 0)


class NotDifferentiated(_SingleLevelFunction):
    """An operator whose results, or what it wrote to, may be used but not differentiated."""

    @staticmethod
    def forward(ctx: Any, call: OperatorCall, why: str, args: tuple[Any, ...], *_: Tensor) -> tuple[Tensor, ...]:
        """why: the words of the error."""
        ctx.why = why
        results = call(*args)
        if results is not None:
            return tuple(tensors_of(results) if isinstance(results[0], Tensor) else [*results[0], *results[1]])
        written: list[Tensor] = args[0]
        ctx.mark_dirty(*written)
        return tuple(written)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(ctx.why)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(ctx.why)


def autograd_kernel(namespace: str, name: str) -> Callable[..., Any]:
    """What the operator does where its tensors may be differentiated."""
    operator = getattr(getattr(torch.ops, namespace), name).default

    @torch._disable_dynamo  # it is called by what was compiled
    def kernel(keyset: Any, *args: Any) -> Any:
        grad_mode = torch.is_grad_enabled()
        call = OperatorCall(operator, keyset, namespace, grad_mode, forward_ad._is_fwd_grad_enabled())
        tensors = tensors_of(args)
        if name == "pyramid_loss_":
            if grad_mode and any(t.requires_grad for t in tensors):
                raise RuntimeError(
                    f"fastfocal: the operator {name} writes over tensors that require grad, and is not differentiated; "
                    'call fastfocal.focal_loss(..., grad_mode="inplace")'
                )
            return call(*args)
        # A Function finds out by itself whether there is anything to record, and whether tangents come along.
        with enable_single_level_autograd_function():
            if name == "pyramid_loss":
                return differentiated_loss(call, *args)
            if name == "pyramid_loss_backward":
                return differentiated_gradients(call, *args)
            second = name == "pyramid_loss_double_backward"
            why = NO_THIRD_DERIVATIVE if second else NO_SECOND_DERIVATIVE
            results = NotDifferentiated.apply(call, why, args, *tensors)  # type: ignore[attr-defined]
        if second:
            levels = len(args[2])
            return list(results[:-levels]), list(results[-levels:])
        return None if name.endswith("_") else list(results)

    return kernel


def differentiated_loss(call: OperatorCall, logits: list[Tensor], *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    options, made = OperatorOptions.named(arguments)
    check_not_differentiated(call, options)
    for_jvp: list[Any] = []
    results = PyramidLossDerivative.apply(call, options, made, for_jvp, *logits)  # type: ignore[attr-defined]
    for_jvp.clear()  # it has been called by now, and the node lives on
    losses = len(logits) if options.reduction == NONE else 1
    return list(results[:losses]), list(results[losses:])


def differentiated_gradients(
    call: OperatorCall, grad_outputs: list[Tensor], logits: list[Tensor], *arguments: Any
) -> list[Tensor]:
    options, needs_grad = OperatorOptions.named(arguments)
    check_not_differentiated(call, options)
    for_jvp: list[Any] = []
    tensors = (*grad_outputs, *logits)
    results = GradientsDerivative.apply(call, options, needs_grad, for_jvp, len(grad_outputs), *tensors)  # type: ignore[attr-defined]
    for_jvp.clear()
    return list(results)


def check_not_differentiated(call: OperatorCall, options: OperatorOptions) -> None:
    if call.grad_mode and any(t is not None and t.requires_grad for t in options.tensors()):
        raise RuntimeError("fastfocal: targets, weights and divisors are not differentiated; detach() them")


# --- vmap -------------------------------------------------------------------------------------------------------------


def one_entry(value: Any, dims: Any, index: int) -> Any:
    if isinstance(value, Tensor):
        return value if dims is None else value.select(dims, index)
    if isinstance(value, (list, tuple)) and dims is not None:
        return [one_entry(entry, dim, index) for entry, dim in zip(value, dims, strict=True)]
    return value


def entry_by_entry(operator: Any) -> Callable[..., Any]:
    """A backward over many incoming gradients or directions (``torch.func.jacrev``, ``hessian``): one after the other."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = [
            operator(*[one_entry(value, dims, i) for value, dims in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], tuple):  # of two lists
            pair = [stacked(part) for part in zip(*results, strict=True)]
            return tuple(part for part, _ in pair), tuple(dims for _, dims in pair)
        return stacked(results)

    return rule


def stacked(results: Sequence[list[Tensor]]) -> tuple[list[Tensor], list[int]]:
    found = [torch.stack(entries) for entries in zip(*results, strict=True)]
    return found, [0] * len(found)


def backward_of_entry(operator: Any) -> Callable[..., Any]:
    """`pyramid_loss_backward` of incoming gradients that were taken apart, which lie in an order of their own."""

    def call(grad_outputs: list[Tensor], logits: list[Tensor], *arguments: Any) -> list[Tensor]:
        options, _ = OperatorOptions.named(arguments)
        if options.reduction == NONE:
            grad_outputs = [in_order_of(t, g, options) for g, t in zip(grad_outputs, logits, strict=True)]
        return operator(grad_outputs, logits, *arguments)  # type: ignore[no-any-return]

    return call


def double_backward_of_entry(operator: Any) -> Callable[..., Any]:
    def call(
        grad_gradients: list[Tensor], grad_outputs: list[Tensor], logits: list[Tensor], *arguments: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        options, _ = OperatorOptions.named(arguments)
        if options.reduction == NONE:
            grad_outputs = [in_order_of(t, g, options) for g, t in zip(grad_outputs, logits, strict=True)]
        given = [strided_as(t, g) if g.numel() else g for g, t in zip(grad_gradients, logits, strict=True)]
        return operator(given, grad_outputs, logits, *arguments)  # type: ignore[no-any-return]

    return call


def refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise RuntimeError(NO_VMAP)


# --- registration -----------------------------------------------------------------------------------------------------

_libraries: list[torch.library.Library] = []  # registrations last as long as these


def register(namespace: str) -> None:
    """Registers all of this for the operators of a namespace."""
    library = torch.library.Library(namespace, "IMPL")
    for shapes in SHAPES:
        name = shapes.__name__
        torch.library.register_fake(f"{namespace}::{name}", on_one_device(shapes))
        if name == "pack_labels":  # integers: there is nothing to differentiate
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        else:
            library.impl(name, autograd_kernel(namespace, name), "Autograd", with_keyset=True)
        operator = getattr(getattr(torch.ops, namespace), name)
        rules = {
            "pyramid_loss_backward": entry_by_entry(backward_of_entry(operator)),
            "pyramid_loss_double_backward": entry_by_entry(double_backward_of_entry(operator)),
            "scale_gradients": entry_by_entry(operator),
        }
        torch.library.register_vmap(f"{namespace}::{name}", rules.get(name, refuse_vmap))
    _libraries.append(library)


register("fastfocal")
