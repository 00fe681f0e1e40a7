"""A layer and the loss of what it gives, as one node: prepared as any call is, with shapes in the place of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import checks, ops
from fastfocal.autograd import below_autograd, graph_is_kept
from fastfocal.checks import Levels, as_levels, shape
from fastfocal.heads.compute import HeadCall, compute
from fastfocal.heads.head import ChunkBytes, Head
from fastfocal.heads.layers import Linear
from fastfocal.heads.operator import arguments_of
from fastfocal.heads.sizes import Sizes, without_autocast
from fastfocal.heads.tiles import tile_bytes
from fastfocal.options import Inputs, Options
from fastfocal.prepare import Pyramid
from fastfocal.pyramid import start
from fastfocal.registration import is_mapped, refuse_batched
from fastfocal.saved import has_hooks

if TYPE_CHECKING:
    from fastfocal.distributed import Ranks, Running
    from fastfocal.losses.loss import Loss


def head_loss(
    loss: Loss,
    options: Options,
    inputs: Inputs,
    head: Head,
    ranks: Ranks | None = None,
    running: Running | None = None,
) -> Tensor:
    """inputs: with the features where logits would be."""
    if options.reduction == "none":
        raise ValueError(
            'reduction: "none" gives a loss for each logit, and here there are none; expected "sum", "level", "image" or "mean"'
        )
    levels = read_features(inputs.logits, head)
    chunk_bytes = check_chunk_bytes(head.chunk_bytes)
    check_parameters(levels, head)
    dtype = computed_dtype(levels, head)
    chunk = tile_bytes(chunk_bytes, levels[0].device, dtype)
    refuse_transforms([*levels, *head.weights, *head.biases])
    given = inputs.logits if isinstance(inputs.logits, Tensor) else inputs.logits[0]
    pyramid = pyramid_of(levels, given, head, dtype, options.num_classes)
    _, known = start(loss, options, inputs, ranks, running, pyramid)
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (*levels, *head.weights, *head.biases))
    recompute = (
        options.grad_mode == "recompute"
        or options.reduction in ("level", "image")
        or (wants and not is_compiling() and has_hooks())
    )
    factor = None
    if dtype == torch.float16 and wants and not recompute:
        factor = defer(known, levels[0].device)
    call = HeadCall(head.layer, known, known.divisor, chunk, loss.takes_anchors)
    sizes = Sizes(len(levels), len(head.weights), dtype)
    tensors = (*levels, *head.weights, *head.biases)
    with without_autocast(levels[0].device):
        if is_compiling():
            made = [wants and not recompute and t.requires_grad for t in tensors]
            losses, _ = torch.ops.fastfocal.head_loss(*arguments_of(call, sizes, tensors, made))
        elif wants:
            losses = HeadLossFunction.apply(call, sizes, recompute, *tensors)
        else:
            with torch.no_grad():
                wanted = sizes.split([False] * len(tensors))
                losses, _ = compute(call, sizes.parts(tensors), wanted, sizes.kept(tensors))
        return reduced(losses, known.reduction, dtype, factor)


# --- what came --------------------------------------------------------------------------------------------------------


def read_features(features: Levels, head: Head) -> list[Tensor]:
    levels = as_levels("features", features)
    if not levels:
        raise ValueError("features: expected at least one level, got an empty sequence")
    if isinstance(head.layer, Linear):
        if isinstance(features, Tensor) and features.dim() == 4:  # the queries of all decoder layers
            levels = list(levels[0].unbind(0))
        if all(t.dim() == 2 for t in levels):
            levels = [t[None] for t in levels]
        words, dim = "(N, M, C) or (M, C)", 3
    else:
        words, dim = "(N, C, H, W)", 4
    if not levels:
        raise ValueError(f"features: expected at least one level, got shape {shape(features)}")  # type: ignore[arg-type]
    first = levels[0]
    for i, t in enumerate(levels):
        checks.floating(f"features[{i}]", t)
        if t.dim() != dim:
            raise ValueError(f"features[{i}]: expected {words}, got shape {shape(t)}")
        if t.dtype != first.dtype:
            raise TypeError(f"features[{i}]: expected the dtype of level 0, {first.dtype}, got {t.dtype}")
        if t.device != first.device:
            raise ValueError(f"features[{i}]: expected the device of level 0, {first.device}, got {t.device}")
        if t.shape[0] != first.shape[0]:
            raise ValueError(
                f"features[{i}]: expected batch size {first.shape[0]} as level 0 has, got shape {shape(t)}"
            )
    return levels


def check_parameters(levels: list[Tensor], head: Head) -> None:
    layer, first = head.layer, levels[0]
    kernel = layer is not None and not isinstance(layer, Linear)
    of_weight, of_bias = head.names
    for name, values in ((of_weight, head.weights), (of_bias, head.biases)):
        many = len(values) > 1
        if len(values) not in ((1, len(levels)) if name == of_weight else (0, 1, len(levels))):
            raise ValueError(f"{name}: expected one for all levels, or {len(levels)}, one per level; got {len(values)}")
        for i, t in enumerate(values):
            where = f"{name}[{i}]" if many else name
            checks.floating(where, t)
            if t.device != first.device:
                raise ValueError(f"{where}: expected the features' device, {first.device}, got {t.device}")
            if t.dtype != head.weights[0].dtype and not casts(first.device):
                raise TypeError(f"{where}: expected {head.weights[0].dtype}, the weight's dtype, got {t.dtype}")
    for i, weight in enumerate(head.weights):
        where = f"{of_weight}[{i}]" if len(head.weights) > 1 else of_weight
        if weight.dim() != (4 if kernel else 2):
            expected = "(A*K, C / groups, kH, kW)" if kernel else "(K, C)"
            raise ValueError(f"{where}: expected {expected}, got shape {shape(weight)}")
        if weight.shape[0] < 1:
            raise ValueError(f"{where}: expected at least one output, got shape {shape(weight)}")
        if weight.shape[0] != head.weights[0].shape[0]:
            raise ValueError(
                f"{where}: expected {head.weights[0].shape[0]} outputs as level 0 has, got shape {shape(weight)}"
            )
    for i, bias in enumerate(head.biases):
        if shape(bias) != (head.weights[0].shape[0],):
            where = f"{of_bias}[{i}]" if len(head.biases) > 1 else of_bias
            raise ValueError(f"{where}: expected shape ({head.weights[0].shape[0]},), got {shape(bias)}")
    if head.weights[0].shape[0] % layer.groups:
        raise ValueError(f"groups: expected a divisor of {head.weights[0].shape[0]} channels, got {layer.groups}")
    for i, t in enumerate(levels):
        weight = head.weights[i if len(head.weights) > 1 else 0]
        width = weight.shape[1] * layer.groups
        if t.shape[1 if kernel else -1] != width:
            raise ValueError(f"features[{i}]: expected {width} channels, as the weight has, got shape {shape(t)}")
        if not kernel:
            continue
        cells, outputs = min(t.shape[2:]), min(layer.outputs(t, weight)[2:])
        if outputs < 0 or outputs < 1 <= cells:
            raise ValueError(f"features[{i}]: smaller than the kernel {tuple(weight.shape[2:])}, got shape {shape(t)}")
        if cells < 1 <= outputs:
            raise ValueError(f"features[{i}]: without cells, which padding would make some of; got shape {shape(t)}")


def check_chunk_bytes(value: object) -> ChunkBytes:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'chunk_bytes: expected "auto" or a number of bytes, got {value!r}')
    if value < 1:
        raise ValueError(f'chunk_bytes: expected "auto" or a number of bytes >= 1, got {value}')
    return value


def computed_dtype(levels: list[Tensor], head: Head) -> torch.dtype:
    """What the layer computes in: autocast's dtype, or that of all."""
    first, weight = levels[0], head.weights[0]
    if casts(first.device) and torch.float64 not in (first.dtype, weight.dtype):
        return torch.get_autocast_dtype(first.device.type)
    if first.dtype != weight.dtype:
        raise TypeError(f"features[0]: expected {weight.dtype}, the weight's dtype, got {first.dtype}")
    return first.dtype


def casts(device: torch.device) -> bool:
    """Whether autocast is at work."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def refuse_transforms(tensors: Sequence[Tensor]) -> None:
    if is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or any(map(is_mapped, tensors)):
        raise RuntimeError(
            "fastfocal: a fused head is not computed under torch.func; call the layer, and the loss of its logits"
        )


def pyramid_of(levels: list[Tensor], given: Tensor, head: Head, dtype: torch.dtype, num_classes: int | None) -> Pyramid:
    """The logits' shapes. The tensors have no memory of their own: one number, expanded."""
    channels = head.weights[0].shape[0]
    linear = isinstance(head.layer, Linear)
    flat = linear and given.dim() == 2
    if num_classes is None:
        if not linear:
            raise ValueError("num_classes: needed with a convolution, got None")
        num_classes = channels
    if channels % num_classes or (linear and channels != num_classes):
        what = f"{num_classes} outputs, num_classes" if linear else f"a multiple of num_classes ({num_classes}) outputs"
        raise ValueError(f"{head.names[0]}: expected {what}, got shape {shape(head.weights[0])}")
    a = channels // num_classes
    one = levels[0].new_empty((), dtype=dtype)
    unmade, placeholders, anchors = [], [], []
    for i, t in enumerate(levels):
        size = head.layer.outputs(t, head.weights[i if len(head.weights) > 1 else 0])[1 if flat else 0 :]
        unmade.append(one.expand(size))
        placeholders.append(one.new_empty((*size[:-1], 1) if linear else (size[0], a, *size[2:])))
        anchors.append(size[-2] if linear else a * size[2] * size[3])
    return Pyramid(unmade, unmade, num_classes, anchors, placeholders)


# --- the scale --------------------------------------------------------------------------------------------------------


# What a normalized float16 gradient is multiplied by at the most while it is summed: less, and more of it is rounded to 0;
# more, and large sums become infinite, which no loss scale mends, as it comes later.
SPREAD = 2.0**11


def defer(known: ops.OperatorOptions, device: torch.device) -> Tensor:
    """For float16: the loss is divided after the sums, as that would push small gradients out of float16's range.

    Leaves scales and divisors that make no gradient larger than without any, nor more than SPREAD times as large as it will be.
    Returns the factor of the finished loss and gradients.
    """
    common = max([abs(s) for s in known.level_scales]) or 1.0
    known.level_scales = [s / common for s in known.level_scales]
    divisor = known.divisor
    least = torch.ones((), dtype=torch.float64, device=device)
    if divisor is not None and divisor.numel() > 0:
        least = divisor.abs().amin()
        least = torch.where((least > 0) & torch.isfinite(least), least, 1.0)
        divisor = divisor / least
    whole = common / least
    within = torch.clamp(whole * SPREAD, max=1.0)
    known.divisor = within.reciprocal() if divisor is None else divisor / within
    return whole / within


def reduced(losses: Tensor, reduction: int, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    """Of (L, N), as `reduction` says."""
    dims = {ops.SUM: (0, 1), ops.LEVEL: (1,), ops.IMAGE: (0,)}[reduction]
    of = losses.sum(dims)
    return (of if factor is None else of * factor).to(ops.accumulation_dtype(dtype))


# --- autograd ---------------------------------------------------------------------------------------------------------


NO_SECOND = (
    "fastfocal: a fused head has no second derivative (create_graph=True); call the layer, and the loss of its logits"
)


class HeadLossFunction(torch.autograd.Function):
    """(features of every level, weights, biases) -> the loss of each image of each level, (L, N) float64."""

    @staticmethod
    def forward(ctx: Any, call: HeadCall, sizes: Sizes, recompute: bool, *tensors: Tensor) -> Tensor:
        wanted = sizes.split([need and not recompute for need in ctx.needs_input_grad[3:]])
        losses, found = compute(call, sizes.parts(tensors), wanted, sizes.kept(tensors))
        ctx.sizes, ctx.dtypes, ctx.call = sizes, [t.dtype for t in tensors], None
        if recompute:
            ctx.call = call.changed(options=call.options.without_tensors(), divisor=None)
            ctx.save_for_backward(*tensors, *call.options.tensors(), call.divisor)
        else:
            # Saved, not kept on ctx: autograd then drops our reference before it hands the gradient on, and a leaf takes it
            # without a copy.
            ctx.save_for_backward(*found)
        return losses

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(incoming)
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        if ctx.call is None:
            with below_autograd():
                found = scaled(ctx.saved_tensors, incoming, graph_is_kept())
        else:
            found = recomputed(ctx, incoming)
        return (None, None, None, *[t if t is None else t.to(d) for t, d in zip(found, ctx.dtypes, strict=True)])


def scaled(gradients: Sequence[Tensor | None], incoming: Tensor, keep: bool) -> list[Tensor | None]:
    """Times the one number that all losses share, in float32; rounded to what they are kept in, and in that memory unless they
    are kept.
    """
    found = list(gradients)
    number = incoming.flatten()[:1].sum()
    for dtype in dict.fromkeys(t.dtype for t in found if t is not None):
        scale = number.to(ops.accumulation_dtype(dtype))
        for i, t in enumerate(found):
            if t is None or t.dtype != dtype or t.numel() == 0:
                continue
            as_level = t if checks.is_dense(t) else t.contiguous()
            as_level = as_level[None] if as_level.dim() == 1 else as_level
            if keep:
                (as_level,) = ops.operators.scale_gradients([as_level], scale, ops.SUM)
            else:
                ops.operators.scale_gradients_([as_level], scale, ops.SUM)
            found[i] = as_level.view(t.shape)
    return found


def recomputed(ctx: Any, incoming: Tensor) -> list[Tensor | None]:
    """The gradients, with each image's own incoming one folded into what its loss is divided by."""
    sizes: Sizes = ctx.sizes
    count = len(ctx.dtypes)
    saved = ctx.saved_tensors  # once: torch.utils.checkpoint hands each out a single time
    tensors, others = saved[:count], saved[count:]
    call: HeadCall = ctx.call
    call = call.changed(options=call.options.with_tensors(others[:-1]), divisor=others[-1])
    wanted = sizes.split(ctx.needs_input_grad[3:])
    with without_autocast(tensors[0].device), below_autograd():
        _, found = compute(call, sizes.parts(tensors), wanted, sizes.split(ctx.dtypes), incoming)
    return list(found)
