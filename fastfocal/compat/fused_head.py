"""Logits that are made only where something reads them: `accelerate(..., fuse_head=True)`.

A detector's last convolution changes its class, and in training gives an `Unmade`, a tensor that knows what it would be made
of. It goes through the host's own code, which asks for shapes and devices alone, to `focal_loss`, which computes convolution
and loss as one (`fastfocal.conv_focal_loss`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fastfocal
from fastfocal.heads.head import conv
from fastfocal.heads.layers import Conv

READ = (
    "fuse_head=True: something beside the loss reads a head's logits in training, so they were made. Loss and gradients are "
    "right, but no memory is saved"
)


class Unmade(Tensor):
    """The outputs (N, A*K, H, W) of a convolution that has not run.

    Shape, dtype, device and history are there. Who asks for more (a hook, a log, a prediction in training) gets the logits:
    they are made then, once, and the loss is computed from them too. A reader is not refused, since what trains without
    `fuse_head` is to train with it; it is warned of, since it takes the memory that `fuse_head` is there to save. Writing to
    the logits is an error.

    It is a tensor that stands for its logits, and not another object that turns into them, so that autograd sees every use: an
    autograd.Function that is handed an object takes it for a constant, and would drop the gradient without a word.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    layer: Conv
    autocast: bool
    made: Tensor | None
    _node: Any  # of autograd
    _versions: tuple[int, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(features: Tensor, weight: Tensor, bias: Tensor | None, layer: Conv) -> Unmade:
        """What `layer` will make of them, as autocast and grad mode are now."""
        kind = features.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (features.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(kind) if autocast else features.dtype
        result: Unmade = _Unmake.apply(features, weight, bias, layer, dtype)
        parts = features, weight, bias
        if not torch.is_grad_enabled():  # the loss may be computed where it is
            parts = tuple([t if t is None else t.detach() for t in parts])  # type: ignore[assignment]
        result.features, result.weight, result.bias = parts
        result.layer, result.autocast, result.made = layer, autocast, None
        result._node, result._versions = result.grad_fn, result._versions_now()
        return result

    def _versions_now(self) -> tuple[int, ...]:
        parts = (self.features, self.weight, self.bias)
        return tuple([0 if t is None or t.is_inference() else t._version for t in parts])

    def is_as_left(self) -> bool:
        """Whether the convolution is still to be computed, and nothing of autograd's was put after it.

        Raises:
            RuntimeError: the features or the parameters were written to since.
        """
        if self.made is not None or self.grad_fn is not self._node:
            return False
        if self._backward_hooks or self.retains_grad:  # somebody waits for the logits' gradient
            return False
        self._check_versions()
        return True

    def _check_versions(self) -> None:
        if self._versions_now() != self._versions:
            raise RuntimeError(
                "fuse_head=True: the features in front of a head's last convolution, or its parameters, were changed in place "
                "between the head and its loss, for which the logits are made; train this model without fuse_head"
            )

    def logits(self) -> Tensor:
        """An ordinary tensor, differentiable."""
        return self.view_as(self)

    def _make(self) -> Tensor:
        if self.made is None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                x, weight = (t.detach().to(self.dtype) for t in (self.features, self.weight))
                bias = None if self.bias is None else self.bias.detach().to(self.dtype)
                # The strides that this tensor says it has.
                self.made = self.layer.forward(x, weight, bias, self.layer.groups).contiguous()
        return self.made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unmade(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if isinstance(value, Unmade) and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(
                    f"fuse_head=True: {function} writes to the logits of a head, which are not made; clone them first"
                )
        to_make = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Unmade) and t.made is None]
        for t in to_make:
            t._check_versions()
        if to_make:
            warnings.warn(READ, stacklevel=2)
        args, kwargs = tree_map_only(Unmade, Unmade._make, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Unmake(torch.autograd.Function):
    """(features, weight, bias) -> what stands for the convolution of them, whose backward is this one's."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, layer: Conv, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.layer, ctx.dtype = layer, dtype
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            Unmade, layer.outputs(features, weight), dtype=dtype, device=features.device
        )

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        with torch.autocast(features.device.type, enabled=False):
            found = ctx.layer.backward(gradient, features.to(ctx.dtype), weight.to(ctx.dtype), needs, ctx.layer.groups)
        return (*found, None, None)


class UnmadeConv2d(nn.Conv2d):
    """A detector's last convolution: in training what it gives is `Unmade`, in evaluation it is as ever.

    It is called as ever, so its hooks run, and may change what goes in and comes out.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.dim() != 4 or torch.jit.is_tracing() or self._refuses(x):
            return super().forward(x)
        return _of_module(self, x)

    def _refuses(self, x: Tensor) -> bool:
        """What a convolution raises an error for, or may."""
        padding = (0, 0) if isinstance(self.padding, str) else self.padding
        sides = zip(x.shape[2:], padding, self.dilation, self.kernel_size, strict=True)
        return self.padding != "same" and any(n == 0 or n + 2 * p < d * (k - 1) + 1 for n, p, d, k in sides)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _of_module(module: UnmadeConv2d, x: Tensor) -> Unmade:
    numbers = module.kernel_size, module.stride, module.padding, module.dilation, module.groups
    return Unmade.of(x, module.weight, module.bias, conv("", *numbers))


def _fused_loss(levels: list[Unmade], targets: Any, options: dict[str, Any]) -> Tensor:
    def one_or_each(parts: list[Any]) -> Any:
        return parts[0] if all(part is parts[0] for part in parts) else parts

    first, layer = levels[0], levels[0].layer
    if "weight" in options:  # of anchors
        options["anchor_weight"] = options.pop("weight")
    dtype = first.dtype if first.autocast else None
    with torch.autocast(first.device.type, dtype=dtype, enabled=first.autocast):
        return fastfocal.conv_focal_loss(
            [x.features for x in levels],
            one_or_each([x.weight for x in levels]),
            one_or_each([x.bias for x in levels]),
            targets,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            **options,
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loss_of_unmade(logits: Sequence[Tensor], targets: Any, options: dict[str, Any]) -> Tensor:
    layers = [x.layer for x in logits if isinstance(x, Unmade) and x.is_as_left()]
    if len(layers) == len(logits) and all(layer == layers[0] for layer in layers):
        return _fused_loss(list(logits), targets, options)  # type: ignore[arg-type]
    return focal_loss([x.logits() if isinstance(x, Unmade) else x for x in logits], targets, **options)


def focal_loss(logits: Sequence[Tensor], targets: Any, **options: Any) -> Tensor:
    """`fastfocal.focal_loss`, of a list of levels' logits that may be unmade."""
    if any(isinstance(x, Unmade) for x in logits):
        return _loss_of_unmade(logits, targets, options)  # type: ignore[no-any-return]
    loss = fastfocal.focal_loss(logits, targets, **options)
    assert isinstance(loss, Tensor)
    return loss


def check(name: str, layer: object) -> None:
    """Raises ValueError for a layer that cannot be fused with the loss; name: what it is called in the host."""
    if type(layer) not in (nn.Conv2d, UnmadeConv2d):
        raise ValueError(
            f"{name}: fuse_head=True needs PyTorch's own nn.Conv2d, neither subclassed nor parametrized, got "
            f"{type(layer).__name__}"
        )
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros":
        raise ValueError(f'{name}: fuse_head=True needs padding_mode "zeros", got {layer.padding_mode!r}')
    conv(f"{name}.", layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)


def check_restorable(root: nn.Module) -> None:
    """Raises ValueError where a class was made of the one that `restore` would take back."""
    for name, module in root.named_modules():
        if isinstance(module, UnmadeConv2d) and type(module) is not UnmadeConv2d:
            raise ValueError(f"{name}: a {type(module).__name__} now; remove its parametrizations first")


def restore(root: nn.Module) -> None:
    for module in root.modules():
        if type(module) is UnmadeConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
