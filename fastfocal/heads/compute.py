"""The loop over tiles: of each its logits, their loss, their gradient over the same memory, the layer's backward, and what
comes of it added up. No logit outlives its tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastfocal import ops
from fastfocal.heads.layers import Layer, Needs
from fastfocal.heads.sizes import Each
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


def compute(
    call: HeadCall, tensors: Each[Tensor], wanted: Each[bool], dtypes: Each[torch.dtype], incoming: Tensor | None = None
) -> tuple[Tensor, Each[Tensor | None]]:
    """The loss of each image of each level, (L, N) float64, and the gradients of its sum; None where none is wanted.

    Args:
        tensors: features (N, C, H, W) or (N, M, C); all of the dtype that is computed in.
        dtypes: of the gradients.
        incoming: (L, N), the factor of each loss; the gradients alone are then of use.
    """
    features, weights, biases = tensors.features, tensors.weights, tensors.biases
    losses = features[0].new_zeros((len(features), features[0].shape[0]), dtype=torch.float64)
    found: Each[Tensor | None] = Each([None] * len(features), [None] * len(weights), [None] * len(biases))
    of_biases = [Sum(bias) for bias in biases]
    by_weight: list[list[Level]] = [[] for _ in weights]
    start = 0
    for i, x in enumerate(features):
        at_weight = i if len(weights) > 1 else 0
        at_bias = (i if len(biases) > 1 else 0) if biases else None
        divisor = call.divisor
        if incoming is not None:
            divisor = incoming[i].reciprocal() if divisor is None else divisor / incoming[i]
        needs = wanted.features[i], wanted.weights[at_weight], at_bias is not None and wanted.biases[at_bias]
        of_bias = None if at_bias is None else of_biases[at_bias]
        level = Level(call, i, x, weights[at_weight], of_bias, divisor, start, needs, losses[i], dtypes.features[i])
        start += level.labels
        if level.plan.rows and (incoming is None or any(needs)):
            by_weight[at_weight].append(level)
        elif needs[0] and not level.plan.rows:
            found.features[i] = torch.zeros_like(x, dtype=dtypes.features[i])
    for at_weight, levels in enumerate(by_weight):
        weight, dtype = weights[at_weight], dtypes.weights[at_weight]
        if wanted.weights[at_weight] and not levels:
            found.weights[at_weight] = torch.zeros_like(weight, dtype=dtype)
        elif features_wait(levels, weight, dtype):
            found.weights[at_weight] = channels_first(levels, weight, dtype)
        elif levels:
            of_weight = images_first(levels, weight)
            found.weights[at_weight] = None if of_weight is None else of_weight.to(dtype)
        for level in levels:
            found.features[level.index] = level.result
    for at_bias, (of_bias, dtype) in enumerate(zip(of_biases, dtypes.biases, strict=True)):
        if wanted.biases[at_bias]:
            total = torch.zeros_like(of_bias.like) if of_bias.total is None else of_bias.total
            found.biases[at_bias] = total.to(dtype)
    return losses, found


# --- the order of the tiles -------------------------------------------------------------------------------------------


def features_wait(levels: list[Level], weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the features' sums are there for the whole time, and those of a part of the weight at a time.

    Where a gradient is narrower than the sum that it is rounded from, the smaller sums should be those that wait. Where it is
    not, a sum takes no more memory than the result, and features that are finished early, and a level at a time, take less.
    """
    if not levels or not levels[0].needs[1] or dtype == ops.accumulation_dtype(dtype):
        return False
    return sum(level.features.numel() for level in levels if level.needs[0]) < weight.numel()


def images_first(levels: list[Level], weight: Tensor) -> Tensor | None:
    """The weight's sum; a level's features are finished before the next one begins, some images before the next ones."""
    of_weight = Sum(weight)
    for level in levels:
        for i in range(len(level.plan.rows)):
            for channels in level.plan.channels:
                level.tile(i, channels, of_weight)
            level.finish(i)
        level.arranged.forget()
    return of_weight.total


def channels_first(levels: list[Level], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's gradient, of which some output channels are finished before the next ones begin."""
    # The same parts for all levels: the smallest.
    groups = max((level.plan.channels for level in levels), key=len)
    result = torch.empty_like(weight, dtype=dtype)
    for level in levels:
        level.plan = Plan(level.plan.rows, groups)
    for channels in groups:
        begin, end = channels.range(levels[0].call.options.num_classes)
        of_weight = Sum(weight[begin:end], begin)
        for level in levels:
            for i in range(len(level.plan.rows)):
                level.tile(i, channels, of_weight)
            level.arranged.forget()
        assert of_weight.total is not None
        result[begin:end] = of_weight.total
    for level in levels:
        for i in range(len(level.plan.rows)):
            level.finish(i)
    return result


@dataclass
class Sum:
    """The gradient of a weight or a bias, or of its output channels from `first` on; in the accumulation dtype."""

    like: Tensor
    first: int = 0
    total: Tensor | None = None
    # Up to which channel something was added.
    reached: int = 0

    def add(self, part: Tensor, begin: int) -> None:
        begin -= self.first
        end = begin + part.shape[0]
        dtype = ops.accumulation_dtype(part.dtype)
        if self.total is None and part.shape[0] == self.like.shape[0]:
            self.total, self.reached = part.to(dtype), end
            return
        if self.total is None:
            self.total = torch.empty_like(self.like, dtype=dtype)
        target = self.total[begin:end]
        if begin < self.reached:
            target.add_(part)
        else:  # channels come in their order
            target.copy_(part)
            self.reached = end


class Level:
    """One level's tiles."""

    def __init__(
        self,
        call: HeadCall,
        index: int,
        features: Tensor,
        weight: Tensor,
        of_bias: Sum | None,
        divisor: Tensor | None,
        start: int,
        needs: Needs,
        losses: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """losses: (N,), which the tiles' are added to. dtype: of the features' gradient, `result`."""
        self.call, self.index, self.features, self.weight, self.of_bias = call, index, features, weight, of_bias
        self.divisor, self.needs, self.losses, self.dtype = divisor, needs, losses, dtype
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
        self.sums: list[Tensor | None] = [None] * len(self.plan.rows)  # of the features' gradient, so far
        self.result: Tensor | None = None

    def part(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Of the features, or of a tensor like them."""
        of_images = tensor[rows.first_image : rows.last_image]
        return of_images[:, rows.first : rows.last] if self.is_linear else of_images

    def finish(self, at: int) -> None:
        """Puts the sums of these rows where they belong, in the gradient's dtype."""
        found, self.sums[at] = self.sums[at], None
        if found is None:
            return
        if len(self.plan.rows) == 1:
            self.result = found.to(self.dtype)
            return
        if self.result is None:
            self.result = torch.empty_like(self.features, dtype=self.dtype)
        self.part(self.result, self.plan.rows[at]).copy_(found)

    def tile(self, at: int, channels: Channels, of_weight: Sum) -> None:
        """Adds what comes of these rows and channels to the losses and the sums."""
        layer, rows = self.call.layer, self.plan.rows[at]
        begin, end = channels.range(self.call.options.num_classes)
        bias = None if self.of_bias is None else self.of_bias.like[begin:end]
        weight, x, inputs, groups = self.weight[begin:end], self.part(self.features, rows), slice(None), layer.groups
        if groups > 1 and end - begin < self.weight.shape[0]:  # within one of them
            width = self.weight.shape[1]
            group = begin // (self.weight.shape[0] // groups)
            inputs, groups = slice(group * width, (group + 1) * width), 1
        read = x if groups == layer.groups else x[:, inputs]
        logits = layer.forward(read, weight, bias, groups).contiguous(memory_format=self.memory_format)
        options = self.arranged.options_of(rows, channels, logits, self.call.options, self.index, self.divisor)
        if any(self.needs):
            loss = x.new_empty(x.shape[0], dtype=ops.accumulation_dtype(x.dtype))
            ops.pyramid_loss_([logits], [loss], options, [1])
        else:
            (loss,), _ = ops.pyramid_loss([logits], options, [0])
        self.losses[rows.first_image : rows.last_image] += loss  # in float64
        if not any(self.needs):
            return
        to_features, to_weight, to_bias = layer.backward(logits, read, weight, self.needs, groups)
        del logits
        if to_weight is not None:
            of_weight.add(to_weight, begin)
        if to_bias is not None and self.of_bias is not None:
            self.of_bias.add(to_bias, begin)
        if to_features is None:
            return
        so_far, dtype = self.sums[at], ops.accumulation_dtype(x.dtype)
        if groups != layer.groups:
            if so_far is None:
                so_far = self.sums[at] = torch.zeros_like(x, dtype=dtype)
            so_far[:, inputs].add_(to_features)
        elif so_far is None:
            self.sums[at] = to_features if len(self.plan.channels) == 1 else to_features.to(dtype)
        else:
            so_far.add_(to_features)


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

    def forget(self) -> None:
        """Lets the tiles' copies go, which are made again where they are wanted again."""
        self.made.clear()

    def of_level(self, flat: Tensor) -> Tensor:
        """(N, A, cells)"""
        if flat.dim() == 2:  # the caller's scores: rows of all levels, [cell][a]
            first = self.start // max(1, self.images)
            rows = flat[:, first : first + self.anchors * self.cells]
            return rows.unflatten(1, (self.cells, self.anchors)).transpose(1, 2)
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
