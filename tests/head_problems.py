"""A last layer, its features and labels, for the tests of fused heads; and what the layer and the reference make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Size, draw_classes, encode, move
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastfocal
from fastfocal import reference

# One channel of an image at a time, some classes of an anchor, some anchors, everything; and what callers get.
CHUNKS = (1, 700, 4000, 2**40, "auto")
SOME = (300, 4000, 2**40)
# float64: sums of at most some ten thousand terms in another order, 1e-16 each, beside the largest number of a tensor.
EXACT = 1e-12


@dataclass(frozen=True)
class Layer:
    """What a convolution or a linear layer is like, and what it is given."""

    anchors: int = 3
    classes: int = 5
    channels: int | tuple[int, ...] = 4  # of the features; one number for each level where these differ
    cells: tuple[tuple[int, int], ...] = ((5, 4), (3, 3), (1, 1))  # of the features; of a linear layer (1, M)
    images: int = 2
    kernel: tuple[int, int] = (1, 1)
    options: dict[str, Any] = field(default_factory=dict)  # stride, padding, dilation, groups
    linear: bool = False
    bias: bool = True
    weight_per_level: bool = False
    bias_per_level: bool = False
    features_format: torch.memory_format = torch.contiguous_format
    weight_format: torch.memory_format = torch.contiguous_format

    def channels_of(self, level: int) -> int:
        return self.channels if isinstance(self.channels, int) else self.channels[level]


@dataclass
class Problem:
    layer: Layer
    features: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    size: Size  # of the logits
    drawn: list[Tensor]  # (N, M) a level, as cases.draw_classes has them

    @property
    def classes(self) -> int:
        return self.layer.classes

    def labels(self, background: int | None = None, ignore: int = -1) -> list[Tensor]:
        return move(encode(self.drawn, self.classes, background, ignore), self.features[0].device)  # type: ignore[no-any-return]

    def tensors(self) -> list[Tensor]:
        return [*self.features, *self.weights, *self.biases]

    def parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        start, end = len(self.features), len(self.features) + len(self.weights)
        return list(tensors[:start]), list(tensors[start:end]), list(tensors[end:])

    def logits(self, features: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
        """Of a layer called as ever."""
        found = []
        for i, (x, cells) in enumerate(zip(features, self.size.cells, strict=True)):
            weight = weights[i if len(weights) > 1 else 0]
            bias = biases[i if len(biases) > 1 else 0] if biases else None
            if self.layer.linear:
                found.append(torch.nn.functional.linear(x, weight, bias))
            elif 0 in cells:  # which PyTorch does not convolve
                found.append((0 * (x.sum() + weight.sum())).expand(x.shape[0], weight.shape[0], *cells))
            else:
                found.append(torch.nn.functional.conv2d(x, weight, bias, **self.layer.options))
        return found


def draw(
    layer: Layer,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    positive: float = 0.15,
) -> Problem:
    """Features around 0, and a weight that makes logits with a spread of 3 of them."""
    options = layer.options

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(t: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return t.to(device, dtype).contiguous(memory_format=memory_format)

    levels = range(len(layer.cells))
    outputs = layer.anchors * layer.classes
    features, weights, biases = [], [], []
    for i, (h, w) in enumerate(layer.cells):
        shape = (layer.images, h * w, layer.channels_of(i))
        x = normal(*shape) if layer.linear else normal(layer.images, layer.channels_of(i), h, w)
        features.append(placed(x, layer.features_format))
    for i in levels if layer.weight_per_level else range(1):
        inputs = layer.channels_of(i) // options.get("groups", 1)
        shape = (outputs, inputs) if layer.linear else (outputs, inputs, *layer.kernel)
        weight = normal(*shape)
        weights.append(placed(3 * weight / max(1, weight[0].numel()) ** 0.5, layer.weight_format))
    if layer.bias:
        biases = [placed(normal(outputs)) for _ in (levels if layer.bias_per_level else range(1))]
    cells = layer.cells if layer.linear else tuple(output_cells(layer, hw) for hw in layer.cells)
    size = Size(layer.images, layer.anchors, layer.classes, cells)
    drawn = draw_classes(size, generator, positive=positive) if layer.images else no_images(size)
    return Problem(layer, features, weights, biases, size, drawn)


def no_images(size: Size) -> list[Tensor]:
    return [torch.zeros(0, m, dtype=torch.int64) for m in size.level_anchors()]


def output_cells(layer: Layer, hw: tuple[int, int]) -> tuple[int, int]:
    """By PyTorch's own convolution of one number, where it makes any."""
    if 0 in hw:
        return hw  # such layers keep the size here
    out = torch.nn.functional.conv2d(
        torch.zeros(1, 1, *hw), torch.zeros(1, 1, *layer.kernel), **{**layer.options, "groups": 1}
    )
    return out.shape[2], out.shape[3]


# --- running and comparing --------------------------------------------------------------------------------------------


def one_or_all(tensors: list[Tensor]) -> Any:
    return tensors if len(tensors) > 1 else tensors[0] if tensors else None


def leaves_of(problem: Problem, needs: Sequence[bool] | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
    needs = [True] * len(problem.tensors()) if needs is None else needs
    return [
        t.detach().to(dtype or t.dtype).requires_grad_(need) for t, need in zip(problem.tensors(), needs, strict=True)
    ]


def fused_loss(problem: Problem, tensors: Sequence[Tensor], targets: Any, *, star: bool = False, **options: Any) -> Any:
    """The function's result."""
    features, weights, biases = problem.parts(tensors)
    kind = "linear" if problem.layer.linear else "conv"
    function = getattr(fastfocal, f"{kind}_focal_loss{'_star' if star else ''}")
    options = {"num_classes": problem.classes, **problem.layer.options, **options}
    return function(features, one_or_all(weights), one_or_all(biases), targets, **options)


def plain_loss(problem: Problem, tensors: Sequence[Tensor], targets: Any, *, star: bool = False, **options: Any) -> Any:
    """The reference's of the layer's logits: the right value, with tensors of float64."""
    options = {name: value for name, value in options.items() if name != "grad_mode"}
    if "anchor_weight" in options:
        options["weight"] = options.pop("anchor_weight")
    function = reference.focal_loss_star if star else reference.focal_loss
    return function(problem.logits(*problem.parts(tensors)), targets, num_classes=problem.classes, **options)


def differentiate(loss: Tensor, leaves: Sequence[Tensor], incoming: Tensor | float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad((loss * incoming).sum(), leaves, allow_unused=True, materialize_grads=True))


def assert_near(got: Tensor, want: Tensor, relative: float = EXACT, what: str = "") -> None:
    """Within `relative` of the largest number; where nothing is there, nothing."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    difference = (got.detach().cpu().double() - want.detach().cpu().double()).abs().max().item()
    largest = want.detach().abs().max().item()
    assert difference <= relative * largest, f"{what}: off by {difference:.3g}, the largest number is {largest:.3g}"


def check(
    problem: Problem, targets: Any, chunks: Sequence[Any], *, incoming: Tensor | float = 1.0, **options: Any
) -> None:
    """Loss and every gradient of the fused head, in tiles of each size, against the layer and the reference."""
    plain = leaves_of(problem)
    want_loss = plain_loss(problem, plain, targets, **options)
    want = differentiate(want_loss, plain, incoming)
    kinds = zip(("features", "weight", "bias"), problem.parts(plain), strict=True)
    names = [f"{name}[{i}]" for name, tensors in kinds for i in range(len(tensors))]
    for chunk in chunks:
        leaves = leaves_of(problem)
        loss = fused_loss(problem, leaves, targets, chunk_bytes=chunk, **options)
        found = differentiate(loss, leaves, incoming)
        assert loss.dtype == want_loss.dtype
        torch.testing.assert_close(loss.detach(), want_loss.detach(), rtol=EXACT, atol=0)
        for name, got, expected, leaf in zip(names, found, want, leaves, strict=True):
            assert got.dtype == leaf.dtype
            assert_near(got, expected, what=f"{name}, chunks of {chunk}")


class Calls(TorchDispatchMode):
    """Convolutions, matrix products and losses, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.masks: list[tuple[bool, ...]] = []  # of the convolutions' backwards
        self.products: list[tuple[int, ...]] = []  # shapes of what matrix products gave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        name = {"conv2d": "convolution"}.get(name, name)  # as it comes below autograd
        self.names.append(name)
        if name == "convolution_backward":
            self.masks.append(tuple(args[10]))
        if name in ("mm", "addmm", "bmm", "matmul", "linear"):
            self.products.append(tuple(result.shape))
        return result

    def count(self, name: str) -> int:
        return self.names.count(name)
