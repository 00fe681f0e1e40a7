"""How a level's logits are cut into tiles, and what is there at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from head_problems import Calls, Layer, draw, fused_loss, leaves_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfocal
from benchmarks.memory import TensorBytes
from fastfocal.heads.tiles import LevelSize, plan

ROOT = Path(__file__).resolve().parent.parent


@st.composite
def level_sizes(draw: st.DrawFn) -> LevelSize:
    rows_apart = draw(st.booleans())
    anchors = 1 if rows_apart else draw(st.integers(1, 4))
    classes = draw(st.integers(1, 7))
    channels = anchors * classes
    groups = 1 if rows_apart else draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    return LevelSize(
        images=draw(st.integers(0, 5)),
        cells=draw(st.integers(0, 9)),
        anchors=anchors,
        classes=classes,
        feature_numbers=draw(st.integers(0, 60)),
        weight_numbers=draw(st.integers(1, 200)),
        rows_apart=rows_apart,
        groups=groups,
        whole_anchors=draw(st.booleans()),
    )


def channels_that_stay_together(size: LevelSize) -> list[range]:
    """The smallest parts: a channel; an anchor's, where the loss takes them together; all, where that does not fit groups."""
    total = size.anchors * size.classes
    if not size.whole_anchors:
        return [range(c, c + 1) for c in range(total)]
    if size.groups > 1 and (total // size.groups) % size.classes:
        return [range(total)]
    return [range(c, c + size.classes) for c in range(0, total, size.classes)]


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(level_sizes(), st.integers(1, 400))
def test_tiles_are_a_partition_and_small(size: LevelSize, numbers: int) -> None:
    """Each logit is in one tile; no tile is larger than was asked for, unless nothing smaller is possible; and in the layer's
    own terms: a tile is within one group or all of them, within one anchor or of whole ones.
    """
    found = plan(size, numbers)
    seen: dict[tuple[int, int, int], int] = {}
    total = size.anchors * size.classes
    of_group = total // size.groups
    least = max(map(len, channels_that_stay_together(size))) * (1 if size.rows_apart else size.cells)
    for rows, channels in product(found.rows, found.channels):
        begin, end = channels.range(size.classes)
        images = range(rows.first_image, rows.last_image)
        for at in product(images, range(rows.first, rows.last), range(begin, end)):
            seen[at] = seen.get(at, 0) + 1
        tile = len(images) * (rows.last - rows.first) * (end - begin)
        assert 0 < tile <= max(numbers, least)
        # The weight's gradient of a tile is bounded alike.
        row = size.weight_numbers // total
        assert (end - begin) * row <= max(numbers, row * max(map(len, channels_that_stay_together(size))))
        if (rows.first, rows.last) != (0, size.cells):
            assert size.rows_apart and len(images) == 1
        assert channels.anchors == 1 or (channels.first_class, channels.classes) == (0, size.classes)
        assert channels.first_class + channels.classes <= size.classes
        assert not size.whole_anchors or channels.classes == size.classes
        assert end - begin == total or begin // of_group == (end - 1) // of_group
    assert set(seen.values()) <= {1}
    assert len(seen) == size.images * size.cells * total
    assert [(i, j) for i, _, j, _ in found] == list(product(range(len(found.rows)), range(len(found.channels))))
    # Images in order, and each image's rows: what is first added to the weight's gradient is written.
    assert [(r.first_image, r.first) for r in found.rows] == sorted((r.first_image, r.first) for r in found.rows)


def cuts_of_channels(size: LevelSize, most: int) -> int:
    """The fewest tiles that go over channels, each of at most `most` and otherwise as small as can be; by walking over them."""
    total, k = size.anchors * size.classes, size.classes
    if most >= total:
        return 1
    parts = channels_that_stay_together(size)
    of_group = total // size.groups
    count, at = 0, 0
    while at < total:
        # As far as one tile may reach: the end of its group, or of its anchor unless it has whole ones.
        end_of_group = total if len(parts) == 1 else (at // of_group + 1) * of_group
        if size.whole_anchors or (most >= k and end_of_group % k == 0 and of_group % k == 0):
            reach = end_of_group
            step = max(1, most // k) * k if len(parts) > 1 else total
        else:
            reach = min(end_of_group, (at // k + 1) * k)
            step = most
        count += -(-(reach - at) // step)
        at = reach
    return count


def ways_to_cut_rows(size: LevelSize) -> list[tuple[int, int]]:
    """(how many groups, how many rows or cells the largest has)"""
    ways = [(len(range(0, size.images, each)), each * size.cells) for each in range(1, size.images + 1)]
    if size.rows_apart:
        for power in range(1, size.cells.bit_length() + 1):
            each = -(-size.cells // 2**power)
            ways.append((size.images * len(range(0, size.cells, each)), each))
    return ways


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(level_sizes(), st.integers(1, 400))
def test_the_cut_adds_up_least(size: LevelSize, numbers: int) -> None:
    """The weight's gradient once for every group of rows, the features' for every group of channels if there are several."""
    if not size.images or not size.cells:
        return
    found = plan(size, numbers)

    def cost(rows: int, channels: int) -> int:
        of_features = channels * size.images * size.feature_numbers if channels > 1 else 0
        return rows * size.weight_numbers + of_features

    smallest, total = max(map(len, channels_that_stay_together(size))), size.anchors * size.classes
    possible = [
        (cost(rows, cut), rows * cut)
        for rows, most in ways_to_cut_rows(size)
        if most * smallest <= numbers
        for cut in [cuts_of_channels(size, max(1, numbers // max(most, size.weight_numbers // total)))]
    ]
    if possible:
        got = cost(len(found.rows), len(found.channels)), len(found.rows) * len(found.channels)
        assert got == min(possible)


def test_a_chunk_bounds_what_is_made_at_a_time(generator: torch.Generator) -> None:
    """The logits that each convolution gives: within `chunk_bytes`, but for one channel of one image; each made once."""
    problem = draw(Layer(cells=((5, 4), (3, 3)), anchors=3, classes=5), generator)
    made = 2 * 15 * (20 + 9)

    class Sizes(Calls):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if self.names[-1] == "convolution":
                sizes.append(result.numel())
            return result

    for numbers in (1, 19, 20, 21, 100, 300, 301, 600, 2**40):
        sizes: list[int] = []
        with Sizes():
            fused_loss(problem, leaves_of(problem), problem.labels(), chunk_bytes=8 * numbers).backward()
        assert sum(sizes) == made and max(sizes) <= max(20, numbers)
        assert numbers < 600 or len(sizes) == 2


# --- memory -----------------------------------------------------------------------------------------------------------

MIB = 2**20
MEASURE = """
import json, sys, torch
from benchmarks.memory import fix_allocator, peak_extra_bytes
import fastfocal
torch.set_num_threads(1)
classes, anchors, side, chunk, mode = 300, 9, 128, int(sys.argv[1]), sys.argv[2]
torch.manual_seed(1)
x = [torch.randn(1, 32, side, side), torch.randn(1, 32, side // 2, side // 2)]
x = [t.requires_grad_() for t in x]
weight = (torch.randn(anchors * classes, 32, 1, 1) / 6).requires_grad_()
bias = torch.full((anchors * classes,), -4.0).requires_grad_()
labels = [torch.randint(0, 50 * classes, (1, t.shape[2] * t.shape[3] * anchors)).clamp(max=classes) for t in x]
fix_allocator(64 << 20)

def step(levels):
    if mode == "plain":
        loss = fastfocal.focal_loss([torch.conv2d(t, weight, bias) for t in levels], labels[-len(levels):], num_classes=classes)
    else:
        reduction = "image" if mode == "recompute" else "sum"
        loss = fastfocal.conv_focal_loss(
            levels, weight, bias, labels[-len(levels):], num_classes=classes, chunk_bytes=chunk, reduction=reduction
        )
    if mode != "forward":
        loss.sum().backward()

def grads():
    return [t.grad for t in (*x, weight, bias)]

torch.set_grad_enabled(mode != "forward")
step(x[1:])
for t in (*x, weight, bias):
    t.grad = None
print(json.dumps(peak_extra_bytes(lambda: step(x), torch.device("cpu"))))
"""


def peak(chunk: int, mode: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(chunk), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's high-water mark as Linux keeps it")
@pytest.mark.parametrize("mode", ["save", "recompute", "forward"])
def test_memory_is_that_of_the_gradients_and_some_tiles(mode: str) -> None:
    logits = 4 * 9 * 300 * (128**2 + 64**2)
    gradients = 4 * (32 * (128**2 + 64**2) + 2700 * 33)
    labels = 2 * 9 * (128**2 + 64**2)  # packed, in 16 bits
    chunk = 8 * MIB
    got = peak(chunk, mode)
    # The tile; what a convolution packs or reorders of it, which its library decides; the labels of a level, and of its tiles;
    # and for each gradient that of the tile beside the sum.
    bound = 2 * chunk + 3 * labels + (0 if mode == "forward" else 2 * gradients) + 2 * MIB
    assert got <= bound < logits / 4, f"{got / MIB:.1f} MiB, expected {bound / MIB:.1f}; logits {logits / MIB:.1f}"
    assert got >= chunk / 2  # something was measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("classes, side", [(300, 8), (4, 64)], ids=["large weight", "large features"])
def test_the_smaller_sums_wait(classes: int, side: int, dtype: torch.dtype) -> None:
    """Gradients of 16 bits are rounded from sums of 32, of which no more should be there than need be."""
    chunk, n, c, anchors, levels = 64 * 2**10, 2, 64, 9, 4
    outputs = anchors * classes
    with FakeTensorMode():
        features = [torch.empty(n, c, side, side, dtype=dtype, requires_grad=True) for _ in range(levels)]
        weight = torch.empty(outputs, c, 3, 3, dtype=dtype, requires_grad=True)
        labels = [torch.empty(n, side, side, anchors, dtype=torch.int64) for _ in range(levels)]
        weights = [torch.empty(n, side, side, anchors) for _ in range(levels)]
        with TensorBytes([*features, weight, *labels, *weights]) as counted:
            fastfocal.conv_focal_loss(
                features, weight, None, labels, num_classes=classes, padding=1, chunk_bytes=chunk, anchor_weight=weights
            ).backward()
    of_weight, of_features = weight.numel(), levels * features[0].numel()
    gradients = dtype.itemsize * (of_weight + of_features)
    # float32 has no wider sums; float16's range is too short to finish the weight's before they are scaled.
    sums = {torch.float32: 0, torch.float16: 4 * of_weight, torch.bfloat16: 4 * min(of_weight, of_features)}[dtype]
    # The logits of a tile and the gradients that come of them, for one level's features too. Packed labels and weights, of all
    # levels, and one level's again in the tiles' order.
    of_tile = 3 * chunk + (4 + dtype.itemsize) * features[0].numel() + (2 + 4) * (levels + 1) * labels[0].numel()
    assert gradients < counted.peak <= gradients + sums + of_tile
