"""The loop over tiles: of each its logits, their loss, their gradient over the same memory, the layer's backward, and what
comes of it added up. No logit outlives its tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastfocal import ops
from fastfocal.heads.layers import Layer
from fastfocal.heads.tiles import Channels, LevelSize, Plan, Rows, plan
from fastfocal.ops import OperatorOptions

INT16_MAX = 2**15 - 1


@dataclass
class HeadCall:
    """Everything but the tensors that a gradient may be wanted of, and but the flags that say of which one is."""

    layer: Layer
    # Per-anchor tensors lie as [level][image][anchor shape][cell]; soft targets as the caller gave them.
    options: OperatorOptions
    divisor: Tensor | None  # a number, or one for each image; float64
    bytes_of_tile: int
    whole_anchors: bool

    def changed(self, **values: Any) -> HeadCall:
        return replace(self, **values)


@dataclass
class HeadGradients:
    """Of every level's features, and of each weight and bias; None where none is wanted.

    The features' have the dtypes asked for, the others the accumulation dtype.
    """

    features: list[Tensor | None]
    weights: list[Tensor | None]
    biases: list[Tensor | None]


@dataclass
class Wanted:
    features: list[bool]
    weights: list[bool]
    biases: list[bool]

    def any(self) -> bool:
        return any((*self.features, *self.weights, *self.biases))


def compute(
    call: HeadCall,
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    wanted: Wanted,
    feature_dtypes: list[torch.dtype],
    incoming: Tensor | None = None,
) -> tuple[Tensor, HeadGradients]:
    """The loss of each image of each level, (L, N) float64, and the gradients of its sum.

    Args:
        features: (N, C, H, W) or (N, M, C), a level each; like weights and biases of the dtype that is computed in.
        weights, biases: one for all levels or one for each; no biases: none.
        feature_dtypes: of the features' gradients.
        incoming: (L, N), the factor of each loss; the gradients alone are then of use.
    """
    first = features[0]
    losses = first.new_zeros((len(features), first.shape[0]), dtype=torch.float64)
    found = HeadGradients([None] * len(features), [None] * len(weights), [None] * len(biases))
    start = 0
    for level, x in enumerate(features):
        at_weight = level if len(weights) > 1 else 0
        at_bias = (level if len(biases) > 1 else 0) if biases else None
        bias = None if at_bias is None else biases[at_bias]
        divisor = call.divisor
        if incoming is not None:
            divisor = incoming[level].reciprocal() if divisor is None else divisor / incoming[level]
        of_level = Level(call, level, x, weights[at_weight], bias, divisor, start)
        start += of_level.labels
        wants_bias = at_bias is not None and wanted.biases[at_bias]
        needs = (wanted.features[level], wanted.weights[at_weight], wants_bias)
        if incoming is not None and not any(needs):
            continue
        of_weight = Sum.of(found.weights[at_weight], of_level.weight)
        of_bias = Sum.of(None if at_bias is None else found.biases[at_bias], of_level.bias)
        found.features[level] = of_level.run(needs, losses[level], of_weight, of_bias, feature_dtypes[level])
        found.weights[at_weight] = of_weight.total
        if at_bias is not None:
            found.biases[at_bias] = of_bias.total
    for i, (weight, flag) in enumerate(zip(weights, wanted.weights, strict=True)):
        if flag and found.weights[i] is None:  # no level has a logit
            found.weights[i] = torch.zeros_like(weight, dtype=ops.accumulation_dtype(weight.dtype))
    for i, (bias, flag) in enumerate(zip(biases, wanted.biases, strict=True)):
        if flag and found.biases[i] is None:
            found.biases[i] = torch.zeros_like(bias, dtype=ops.accumulation_dtype(bias.dtype))
    return losses, found


@dataclass
class Sum:
    """The gradient of a weight or a bias, in the accumulation dtype; `total` is None before anything was added."""

    total: Tensor | None
    like: Tensor | None
    # What is added first to every output channel is written.
    fresh: bool

    @staticmethod
    def of(total: Tensor | None, like: Tensor | None) -> Sum:
        return Sum(total, like, total is None)

    def add(self, part: Tensor, begin: int, end: int, first_rows: bool) -> None:
        assert self.like is not None
        if self.total is None:
            if end - begin == self.like.shape[0]:
                self.total = part.to(ops.accumulation_dtype(part.dtype))
                return
            self.total = torch.empty_like(self.like, dtype=ops.accumulation_dtype(part.dtype))
        target = self.total[begin:end]
        if self.fresh and first_rows:
            target.copy_(part)
        else:
            target.add_(part)


class Level:
    """One level's tiles."""

    def __init__(
        self,
        call: HeadCall,
        index: int,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        divisor: Tensor | None,
        start: int,
    ) -> None:
        self.call, self.index, self.features, self.weight, self.bias = call, index, features, weight, bias
        self.divisor = divisor
        layer, options = call.layer, call.options
        shape = layer.outputs(features, weight)
        self.is_linear = len(shape) == 3
        classes, n = options.num_classes, shape[0]
        channels = shape[-1] if self.is_linear else shape[1]
        cells = shape[1] if self.is_linear else shape[2] * shape[3]
        self.anchors = channels // classes
        # What a convolution gives, and PyTorch's own choice; of the two orders the kernels read.
        channels_last = not self.is_linear and any(
            t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (features, weight)
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.labels = n * self.anchors * cells
        self.arranged = Arranged(options, start, n, self.anchors, cells, channels_last)
        size = LevelSize(
            images=n,
            cells=cells,
            anchors=self.anchors,
            classes=classes,
            feature_numbers=features[:1].numel(),
            weight_numbers=weight.numel(),
            rows_apart=self.is_linear,
            groups=layer.groups,
            whole_anchors=call.whole_anchors,
        )
        self.plan: Plan = plan(size, max(1, call.bytes_of_tile // features.element_size()))

    def run(
        self, needs: tuple[bool, bool, bool], losses: Tensor, of_weight: Sum, of_bias: Sum, dtype: torch.dtype
    ) -> Tensor | None:
        """Adds the images' losses, and returns the features' gradient."""
        x = self.features
        if not self.plan.rows or not self.plan.channels:
            return torch.zeros_like(x, dtype=dtype) if needs[0] else None
        whole = len(self.plan.rows) == 1
        result = torch.empty_like(x, dtype=dtype) if needs[0] and not whole else None
        sums = None
        for i, rows in enumerate(self.plan.rows):
            part = x[rows.first_image : rows.last_image]
            if self.is_linear:
                part = part[:, rows.first : rows.last]
            sums = x.new_zeros((len(self.plan.channels), part.shape[0]), dtype=ops.accumulation_dtype(x.dtype))
            of_part = None
            for j, channels in enumerate(self.plan.channels):
                of_part = self.tile(part, rows, channels, i == 0, needs, sums[j], of_part, of_weight, of_bias)
            losses[rows.first_image : rows.last_image] += sums.sum(0, dtype=torch.float64)
            if of_part is None:
                continue
            if result is None:
                return of_part.to(dtype)
            target = result[rows.first_image : rows.last_image]
            (target[:, rows.first : rows.last] if self.is_linear else target).copy_(of_part)
        return result

    def tile(
        self,
        x: Tensor,
        rows: Rows,
        channels: Channels,
        first_rows: bool,
        needs: tuple[bool, bool, bool],
        loss: Tensor,
        of_features: Tensor | None,
        of_weight: Sum,
        of_bias: Sum,
    ) -> Tensor | None:
        """Writes the images' losses of this tile, adds to weight's and bias's gradient, returns the features' so far."""
        layer = self.call.layer
        begin, end = channels.range(self.call.options.num_classes)
        weight, bias = self.weight[begin:end], None if self.bias is None else self.bias[begin:end]
        inputs, groups = slice(None), layer.groups
        if groups > 1 and end - begin < self.weight.shape[0]:  # within one of them
            width = self.weight.shape[1]
            group = begin // (self.weight.shape[0] // groups)
            inputs, groups = slice(group * width, (group + 1) * width), 1
        read = x if groups == layer.groups else x[:, inputs]
        logits = layer.forward(read, weight, bias, groups).contiguous(memory_format=self.memory_format)
        options = self.arranged.options_of(rows, channels, logits, self.call.options, self.index, self.divisor)
        if not any(needs):
            (of_images,), _ = ops.pyramid_loss([logits], options, [0])
            loss.copy_(of_images)
            return None
        ops.pyramid_loss_([logits], [loss], options, [1])
        to_features, to_weight, to_bias = layer.backward(logits, read, weight, needs, groups)
        del logits
        if to_weight is not None:
            of_weight.add(to_weight, begin, end, first_rows)
        if to_bias is not None:
            of_bias.add(to_bias, begin, end, first_rows)
        if to_features is None:
            return None
        if groups != layer.groups:
            if of_features is None:
                of_features = torch.zeros_like(x, dtype=ops.accumulation_dtype(x.dtype))
            of_features[:, inputs].add_(to_features)
            return of_features
        if of_features is None:
            return to_features if len(self.plan.channels) == 1 else to_features.to(ops.accumulation_dtype(x.dtype))
        return of_features.add_(to_features)


class Arranged:
    """A level's per-anchor tensors, with those of a tile next to each other: [anchors of a tile][image][...]."""

    def __init__(
        self, options: OperatorOptions, start: int, images: int, anchors: int, cells: int, channels_last: bool
    ) -> None:
        self.start, self.images, self.anchors, self.cells = start, images, anchors, cells
        self.channels_last = channels_last
        self.per_anchor = {
            name: None if (flat := getattr(options, name)) is None else self.of_level(flat)
            for name in ("packed_labels", "scores", "anchor_weight")
        }
        self.made: dict[tuple[str, int, int, bool], Tensor] = {}

    def of_level(self, flat: Tensor) -> Tensor:
        """(N, A, cells)"""
        of_level = flat[self.start : self.start + self.images * self.anchors * self.cells]
        return of_level.view(self.images, self.anchors, self.cells)

    def of_tile(self, name: str, rows: Rows, channels: Channels, narrow: bool) -> Tensor | None:
        values = self.per_anchor[name]
        if values is None:
            return None
        key = name, channels.first_anchor, channels.anchors, narrow
        if key not in self.made:
            part = values[:, channels.first_anchor : channels.first_anchor + channels.anchors]
            if narrow:  # the last of the labels that 16 bits hold
                part = torch.where(part <= INT16_MAX, part, -1).to(torch.int16)
            if self.channels_last:
                part = part.transpose(1, 2)
            self.made[key] = part.reshape(self.images, -1).contiguous()  # a view where A or cells is 1
        of_images = self.made[key][rows.first_image : rows.last_image]
        if rows.last - rows.first < self.cells:  # of a linear layer, whose anchors have one shape
            of_images = of_images[:, rows.first : rows.last]
        return of_images.reshape(-1)

    def options_of(
        self,
        rows: Rows,
        channels: Channels,
        logits: Tensor,
        options: OperatorOptions,
        level: int,
        divisor: Tensor | None,
    ) -> OperatorOptions:
        """What the operator takes for these logits."""
        labels = options.packed_labels
        narrow = labels is not None and labels.dtype == torch.int32
        narrow = narrow and channels.first_class + channels.classes <= INT16_MAX
        of_classes = slice(channels.first_class, channels.first_class + channels.classes)
        mask, weights = options.class_mask, options.class_weights
        soft = None
        if options.soft_targets:
            begin, end = channels.range(options.num_classes)
            given = options.soft_targets[level]
            given = (given[None] if given.dim() == 2 else given)[rows.first_image : rows.last_image]
            given = given[:, rows.first : rows.last, begin:end] if logits.dim() == 3 else given[:, begin:end]
            exact = given.dtype in (logits.dtype, ops.accumulation_dtype(logits.dtype))
            dtype = given.dtype if exact else ops.accumulation_dtype(logits.dtype)
            # empty_like keeps the logits' order.
            soft = [torch.empty_like(logits, dtype=dtype).copy_(given)]
        if divisor is not None and divisor.numel() > 1:
            divisor = divisor[rows.first_image : rows.last_image]
        return options.changed(
            packed_labels=self.of_tile("packed_labels", rows, channels, narrow),
            soft_targets=soft,
            scores=self.of_tile("scores", rows, channels, False),
            anchor_weight=self.of_tile("anchor_weight", rows, channels, False),
            class_weights=None if weights is None else weights[:, of_classes].contiguous(),
            class_mask=None if mask is None else mask[rows.first_image : rows.last_image, of_classes],
            divisor=divisor,
            level_scales=[options.level_scales[level]],
            num_classes=channels.classes,
            first_class=0 if options.soft_targets else channels.first_class,
            reduction=ops.IMAGE,
        )
