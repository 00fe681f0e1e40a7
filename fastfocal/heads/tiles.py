"""How a level's logits are cut into tiles, each of which is made, used and gone before the next one.

A tile is the logits of some images (or some rows of one, for a linear layer) and some output channels: whole anchors, or some
classes of one anchor. A sigmoid loss looks at one logit at a time, so channels need not see each other, there is no halo, and
a row of the weight's gradient is complete for these images after its tile. (Bands of rows of a convolution would compute halos,
and the whole weight's gradient in each.)

What cutting costs is adding up: the features' gradient once for every group of channels, the weight's gradient once for every
group of images. `plan` takes, among the cuts whose tiles are small enough, the one that adds up the least. With q channels and
m cells to a tile this comes to about 1/q + k^2/m of the convolution's own work, k the kernel's size: the larger the tile, the
less; what bounds it is the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

MIB = 2**20

# Bytes of a tile's logits where the caller leaves it open, by device (measured: docs/notes/heads.md).
AUTO_BYTES = {"cpu": 32 * MIB, "cuda": 32 * MIB}
# On the CPU with numbers of 16 bits: as many of them. Convolutions work in float32 there, in as much memory again.
AUTO_BYTES_OF_16_BITS = 16 * MIB


class Channels(NamedTuple):
    """Classes [first_class, first_class + classes) of the anchors [first_anchor, first_anchor + anchors) of a cell."""

    first_anchor: int
    anchors: int
    first_class: int
    classes: int  # all K of them where there is more than one anchor

    def range(self, num_classes: int) -> tuple[int, int]:
        begin = self.first_anchor * num_classes + self.first_class
        return begin, begin + self.anchors * self.classes


class Rows(NamedTuple):
    """Images [first_image, last_image); of a linear layer's single image also rows [first, last) alone."""

    first_image: int
    last_image: int
    first: int
    last: int


@dataclass(frozen=True)
class LevelSize:
    """What `plan` has to know of a level and its layer."""

    images: int
    cells: int  # of an image's output: H*W, or the rows of a linear layer
    anchors: int  # A
    classes: int  # K
    feature_numbers: int  # of an image
    weight_numbers: int
    rows_apart: bool  # an image may be cut into rows: a linear layer
    groups: int  # of a convolution
    whole_anchors: bool  # the loss takes an anchor's classes together


@dataclass(frozen=True)
class Plan:
    """A level's tiles: every group of rows with every group of channels."""

    rows: list[Rows]
    channels: list[Channels]

    def __iter__(self) -> Iterator[tuple[int, Rows, int, Channels]]:
        for i, rows in enumerate(self.rows):
            for j, channels in enumerate(self.channels):
                yield i, rows, j, channels


def tile_bytes(chunk_bytes: int | str, device: torch.device, dtype: torch.dtype) -> int:
    if not isinstance(chunk_bytes, str):
        return chunk_bytes
    most = AUTO_BYTES.get(device.type, 32 * MIB)
    return min(most, AUTO_BYTES_OF_16_BITS) if device.type == "cpu" and dtype.itemsize == 2 else most


def plan(size: LevelSize, numbers: int) -> Plan:
    """The cut of a level into tiles of at most `numbers` logits; of the smallest there are, where one channel of one image (or
    row), or what has to stay together, is more. The weight's gradient of a tile, which waits to be added up, is bounded alike.
    """
    if size.images == 0 or size.cells == 0:
        return Plan([], [])
    best: tuple[int, int, int, Plan] | None = None
    for rows in row_groups(size):
        most = max((group.last_image - group.first_image) * (group.last - group.first) for group in rows)
        each = max(most, size.weight_numbers // (size.anchors * size.classes))
        channels = channel_groups(size, max(1, numbers // each))
        added = len(rows) * size.weight_numbers
        if len(channels) > 1:
            added += len(channels) * size.images * size.feature_numbers
        largest = most * max(group.anchors * group.classes for group in channels)
        found = (largest if largest > numbers else 0, added, len(rows) * len(channels), Plan(rows, channels))
        if best is None or found[:3] < best[:3]:
            best = found
        if len(channels) == 1 and largest <= numbers:
            break  # more groups of rows add up more
    assert best is not None
    return best[3]


def row_groups(size: LevelSize) -> Iterator[list[Rows]]:
    """All images at once, then ever fewer; of a linear layer also parts of one image."""
    n, cells = size.images, size.cells
    seen = set()
    for parts in range(1, n + 1):
        each = -(-n // parts)
        if each not in seen:
            seen.add(each)
            yield [Rows(i, min(i + each, n), 0, cells) for i in range(0, n, each)]
    bands = 2
    while size.rows_apart and bands < 2 * cells and cells > 1:  # down to one row
        each = -(-cells // bands)
        yield [Rows(i, i + 1, r, min(r + each, cells)) for i in range(n) for r in range(0, cells, each)]
        bands *= 2


def channel_groups(size: LevelSize, most: int) -> list[Channels]:
    """At most `most` channels each, equally large: whole anchors, or classes of one anchor."""
    a, k = size.anchors, size.classes
    if size.groups == 1 or most >= a * k:
        return groups_of_anchors(0, a, k, most, size.whole_anchors)
    of_group = a * k // size.groups  # channels of one of the convolution's groups, which no tile leaves
    if of_group % k == 0:
        each = of_group // k
        return [c for g in range(0, a, each) for c in groups_of_anchors(g, each, k, most, size.whole_anchors)]
    if size.whole_anchors:
        return [Channels(0, a, 0, k)]
    ends = sorted({*range(0, a * k + 1, k), *range(0, a * k + 1, of_group)})
    return [Channels(c // k, 1, c % k, n) for first, end in pairwise(ends) for c, n in parts_of(first, end, most)]


def groups_of_anchors(first: int, a: int, k: int, most: int, whole: bool) -> list[Channels]:
    if most >= k or whole:
        parts = -(-a // max(1, most // k))
        each = -(-a // parts)
        return [Channels(i, min(each, first + a - i), 0, k) for i in range(first, first + a, each)]
    return [Channels(i, 1, c, n) for i in range(first, first + a) for c, n in parts_of(0, k, most)]


def parts_of(first: int, end: int, most: int) -> list[tuple[int, int]]:
    """[first, end) in equal parts of at most `most`: where each begins, and how many it has."""
    parts = -(-(end - first) // most)
    each = -(-(end - first) // parts)
    return [(c, min(each, end - c)) for c in range(first, end, each)]
