"""The kernels against the float64 oracle: layouts, dtypes, target forms and sizes that have a reason."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DTYPES,
    FORMS,
    FOUR_D,
    IGNORED,
    THREE_D,
    TWO_D,
    Backend,
    Size,
    arrange,
    assert_close,
    check,
    draw_classes,
    draw_levels,
    encode,
    lay_out,
    move,
    same_bits,
)
from torch import Tensor
from watch import Recorder

import fastfocal

# K = 5 and odd planes: no vector width divides a row of classes or a plane. The last level is one cell.
ODD = Size(2, 3, 5, ((7, 5), (3, 3), (1, 1)))
EVEN = Size(2, 2, 8, ((8, 8), (4, 4)))  # everything divides: the straight vector path
FLAT = Size(1, 3, 5, ((7, 5), (3, 3), (1, 1)))  # 2-D logits have no images

SIZES = {
    "odd": ODD,
    "even": EVEN,
    "coco": Size(2, 9, 80, ((7, 5), (4, 3), (2, 2), (1, 1))),  # RetinaNet's head
    "open_images_like_91": Size(1, 1, 91, ((5, 7), (3, 1))),  # odd K above two warps
    "264_classes": Size(1, 1, 264, ((5, 3), (2, 2))),  # K above the 256 threads of a usual block
    "one_class": Size(2, 3, 1, ((7, 5), (4, 4))),  # K = 1: an anchor has one logit
    "one_class_one_anchor": Size(2, 1, 1, ((7, 5), (4, 4))),  # dense segmentation
    "one_cell": Size(2, 9, 4, ((1, 1),)),  # H = W = 1: both layouts have the same strides
    "one_row": Size(2, 2, 3, ((1, 13), (13, 1))),  # planes of one row and of one column
    "one_anchor": Size(1, 1, 7, ((1, 1),)),
    "one_logit": Size(1, 1, 1, ((1, 1),)),
    "three_images": Size(3, 2, 3, ((5, 3), (2, 1))),
    "empty_levels": Size(2, 2, 3, ((0, 5), (3, 3), (4, 0), (2, 1), (0, 0))),
    "only_empty_levels": Size(2, 2, 3, ((0, 5), (4, 0))),
    "no_images": Size(0, 2, 3, ((5, 3), (2, 1))),
    "17_levels": Size(2, 1, 3, tuple((1 + i % 3, 1 + i % 5) for i in range(17))),  # one more than a launch holds
    "33_levels": Size(1, 2, 3, tuple((1 + i % 4, 1 + i % 3) for i in range(33))),  # three launches
}
# Sizes whose total ends just before, at and just after multiples of 8192 elements, in one level and over several.
for before in (8191, 8192, 8193, 16383, 16384, 16385):
    SIZES[f"one_class_{before}"] = Size(1, 1, 1, ((1, before),))
for cells in (2730, 2731):
    SIZES[f"three_classes_{3 * cells}"] = Size(1, 1, 3, ((1, cells), (1, 3)))
SIZES["two_images_of_8190"] = Size(2, 1, 5, ((2, 819), (1, 1)))
SIZES["levels_of_4096_and_4097"] = Size(1, 1, 1, ((64, 64), (17, 241), (64, 64)))


def problem(
    backend: Backend,
    size: Size,
    generator: torch.Generator,
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    form: str = "nm",
    integers: torch.dtype = torch.int64,
) -> tuple[list[Tensor], Tensor | list[Tensor]]:
    levels = draw_levels(size, generator, dtype=dtype, layout=layout)
    labels = [x.to(integers) for x in encode(draw_classes(size, generator), size.classes)]
    arranged = arrange(labels, size, form, rank=levels[0].ndim)
    return move(levels, backend.device), move(arranged, backend.device)


def test_each_backend_runs_its_own_kernels(backend: Backend, generator: torch.Generator) -> None:
    """A fixture that pointed every test at the same library would pass them all."""
    levels, labels = problem(backend, ODD, generator)
    called = {}
    for namespace in ("fastfocal", "fastfocal_on_host"):
        with Recorder(namespace) as recorder:
            check(levels, labels, num_classes=ODD.classes)
        called[namespace] = len(recorder.calls)
    assert (called["fastfocal"] == 0) == (backend.name == "cuda_on_host")
    assert (called["fastfocal_on_host"] > 0) == (backend.name == "cuda_on_host")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(backend: Backend, name: str, layout: str, generator: torch.Generator) -> None:
    size = SIZES[name]
    levels, labels = problem(backend, size, generator, layout=layout)
    check(levels, labels, num_classes=size.classes, reduction="level")


@pytest.mark.parametrize("label", [0, -1], ids=["positive", "ignored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_anchor_alone(backend: Backend, dtype: torch.dtype, label: int, generator: torch.Generator) -> None:
    """A warp that passes over background together must not miss an anchor that begins in the last vector of its 512 bytes."""
    classes, anchors = 91, 104  # no vector divides a row; a whole tile of 8192 logits, and 8 divides an image's
    span, vector = 512 // dtype.itemsize, 16 // dtype.itemsize
    found = [a for a in range(8192 // classes) if a * classes % span > span - vector]
    assert len(found) > 1
    logits = (torch.randn(len(found), anchors, classes, generator=generator) - 1).to(dtype)
    labels = torch.full((len(found), anchors), classes)
    labels[range(len(found)), found] = label
    check(move([logits], backend.device), move(labels, backend.device), num_classes=classes, reduction="image")


@pytest.mark.parametrize("label", [3, -1], ids=["positive", "ignored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_cell_alone(backend: Backend, dtype: torch.dtype, label: int, generator: torch.Generator) -> None:
    """The same of a plane's first cell, where the vector that has it began in the plane before (4 divides 1004, 8 does not)."""
    logits = (torch.randn(1, 17, 4, 251, generator=generator) - 1).to(dtype)
    labels = torch.full((1, 4, 251), 17)
    labels[0, 0, 0] = label
    check(move([logits], backend.device), move([labels], backend.device), num_classes=17, reduction="level")


@pytest.mark.parametrize("name", ["odd", "coco", "empty_levels", "17_levels", "two_images_of_8190", "no_images"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_by_image(backend: Backend, name: str, layout: str, generator: torch.Generator) -> None:
    """Images are the other way to cut the work: a block may hold the end of one and the start of the next."""
    size = SIZES[name]
    levels, labels = problem(backend, size, generator, layout=layout)
    check(levels, labels, num_classes=size.classes, reduction="image", normalizer="positives_per_image")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("elements", range(1, 40))
def test_every_tail_length(backend: Backend, elements: int, layout: str, generator: torch.Generator) -> None:
    """Every remainder of every vector width up to 32, as a plane and as a row of classes."""
    for size in (Size(2, 1, 2, ((1, elements), (1, 1))), Size(1, 2, elements, ((1, 3),))):
        levels, labels = problem(backend, size, generator, layout=layout, dtype=torch.float16)
        check(levels, labels, num_classes=size.classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FOUR_D + THREE_D + TWO_D)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Strides are the logits' own wherever memory can have them: every dense layout."""
    for size in (FLAT,) if layout in TWO_D else (ODD, EVEN):
        levels, labels = problem(backend, size, generator, layout=layout, dtype=dtype)
        loss, grads = check(levels, labels, num_classes=size.classes)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for x, g in zip(levels, grads, strict=True):
            if layout in ("width_slice", "channel_slice", "expanded", "3d_rows"):
                continue  # not dense: a new tensor has no gaps to keep
            moving = [i for i, n in enumerate(x.shape) if n > 1]  # the stride of a single entry means nothing
            assert [g.stride(i) for i in moving] == [x.stride(i) for i in moving]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FOUR_D + THREE_D + TWO_D)
def test_soft_targets(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Targets come in the logits' layout and, as often, in another."""
    size = FLAT if layout in TWO_D else ODD
    levels = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    other = "2d_transposed" if layout in TWO_D else "3d_transposed" if layout in THREE_D else "channels_last"
    for target_layout in (layout, other):
        targets = []
        for hw in size.cells:
            y = torch.rand(size.images, size.anchors * size.classes, *hw, generator=generator)
            y = torch.where(y < 0.3, torch.zeros(()), torch.where(y > 0.8, torch.ones(()), y)).to(dtype)
            targets.append(lay_out(y, size, hw, target_layout))
        check(levels, move(targets, backend.device), num_classes=size.classes, normalizer=7.0)
        check(levels, move(targets, backend.device), num_classes=size.classes, normalizer=None, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_soft_targets_under_autocast(backend: Backend, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Autocast leaves 16-bit logits beside float32 targets: 0.3 must not be rounded to 16 bits."""
    levels = move(draw_levels(ODD, generator, dtype=dtype), backend.device)
    targets = [torch.full(x.shape, 0.3, device=backend.device) for x in levels]
    check(levels, targets, normalizer=1.0)


@pytest.mark.parametrize("name", ["one_class", "264_classes", "empty_levels", "no_images", "17_levels", "one_logit"])
def test_sizes_of_soft_targets(backend: Backend, name: str, generator: torch.Generator) -> None:
    size = SIZES[name]
    levels = move(draw_levels(size, generator), backend.device)
    targets = [x.detach().sigmoid().round(decimals=1) for x in move(draw_levels(size, generator), backend.device)]
    check(levels, targets, normalizer=None, reduction="level")
    check(levels, targets, normalizer=None, reduction="image")


def test_soft_targets_at_both_ends_equal_labels(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = problem(backend, ODD, generator, dtype=torch.float64, layout="3d")
    one_hot = [torch.nn.functional.one_hot(y.clamp(min=0), ODD.classes + 1)[..., :-1].double() for y in labels]
    kept = [(y >= 0).double() for y in labels]
    hard = fastfocal.focal_loss(levels, labels, normalizer=None, reduction="level")
    soft = fastfocal.focal_loss(levels, one_hot, normalizer=None, reduction="level", weight=kept)
    torch.testing.assert_close(hard, soft, rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d", "2d"])
@pytest.mark.parametrize("form", [*FORMS, "nhw"])
def test_label_forms(backend: Backend, form: str, layout: str, generator: torch.Generator) -> None:
    """Every shape and stride of labels is the same problem, to the bit, as (N, M) int64 labels."""
    if layout in ("3d", "2d") and form.startswith("nhw"):
        form = "nm"  # (N, M, K) logits have no grid
    size = FLAT if layout == "2d" else ODD
    if form == "nhw":
        size = Size(size.images, 1, size.classes, size.cells)
    levels, labels = problem(backend, size, generator, layout=layout, form=form)
    loss, grads = check(levels, labels, num_classes=size.classes)
    plain = torch.Generator().manual_seed(generator.initial_seed())
    again, again_grads = check(*problem(backend, size, plain, layout=layout), num_classes=size.classes)
    assert same_bits(loss, again)
    assert all(same_bits(a, b) for a, b in zip(grads, again_grads, strict=True))


@pytest.mark.parametrize("form", ["nhwa", "nm_strided", "one_transposed"])
@pytest.mark.parametrize("integers", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integer_dtypes(backend: Backend, integers: torch.dtype, form: str, generator: torch.Generator) -> None:
    size = Size(2, 2, 100, ((5, 3), (2, 1)))  # as many classes as int8 holds beside two more labels
    ignore = 255 if integers == torch.uint8 else -1
    levels = move(draw_levels(size, generator), backend.device)
    labels = [x.to(integers) for x in encode(draw_classes(size, generator), size.classes, ignore=ignore)]
    arranged = move(arrange(labels, size, form), backend.device)
    check(levels, arranged, num_classes=size.classes, ignore_index=ignore)


def test_many_classes(backend: Backend, generator: torch.Generator) -> None:
    """More classes than an int16 label or a byte-sized table could name."""
    size = Size(1, 1, backend.sized(40000, 33000), ((1, 2),))
    levels = move(draw_levels(size, generator), backend.device)
    labels = torch.tensor([[size.classes - 1, size.classes]], device=backend.device)
    check(levels, labels, num_classes=size.classes)


def test_a_single_tensor_is_one_level(backend: Backend, generator: torch.Generator) -> None:
    size = Size(2, 3, 5, ((7, 5),))
    (x,), (labels,) = problem(backend, size, generator)
    listed = fastfocal.focal_loss([x], [labels], num_classes=5, reduction="none")
    for targets in (labels, [labels], labels.view(2, 7, 5, 3)):
        alone = fastfocal.focal_loss(x, targets, num_classes=5, reduction="none")
        assert isinstance(alone, Tensor) and same_bits(alone, listed[0])
    as_tuple = fastfocal.focal_loss((x,), labels, num_classes=5, reduction="none")
    assert isinstance(as_tuple, list) and same_bits(as_tuple[0], listed[0])


def test_levels_may_differ_in_layout(backend: Backend, generator: torch.Generator) -> None:
    """One call over contiguous, channels_last and strided levels, with labels of one tensor."""
    layouts = ["contiguous", "channels_last", "channel_slice", "transposed", "channels_last_offset"]
    size = Size(2, 3, 5, ((7, 5), (5, 5), (3, 3), (3, 2), (2, 2)))
    levels = [
        lay_out(x, size, hw, layout)
        for x, hw, layout in zip(draw_levels(size, generator), size.cells, layouts, strict=True)
    ]
    labels = arrange(encode(draw_classes(size, generator), size.classes), size, "one_strided")
    check(move(levels, backend.device), move(labels, backend.device), num_classes=size.classes, reduction="level")


def test_levels_may_differ_in_anchors(backend: Backend, generator: torch.Generator) -> None:
    """SSD's heads have 4 or 6 anchors per cell; each level has its own A = channels / K."""
    parts = [Size(2, 4, 3, ((5, 5),)), Size(2, 6, 3, ((3, 3),)), Size(2, 1, 3, ((1, 1),))]
    levels = [draw_levels(part, generator)[0] for part in parts]
    labels = torch.cat([encode(draw_classes(part, generator), 3)[0] for part in parts], dim=1)
    check(move(levels, backend.device), labels.to(backend.device), num_classes=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "width_slice", "3d"])
def test_unreduced_loss(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels, labels = problem(backend, ODD, generator, layout=layout, dtype=dtype)
    losses, _ = check(levels, labels, num_classes=ODD.classes, reduction="none", gamma=1.5)
    for x, loss in zip(levels, losses, strict=True):
        assert loss.dtype == dtype and loss.shape == x.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_positives_share_an_anchors_neighbours(backend: Backend, layout: str) -> None:
    """Each anchor its own class and each logit its own value: a shifted row, plane or class cannot go unseen."""
    size = Size(2, 3, 7, ((5, 3), (2, 3)))
    levels, labels = [], []
    for h, w in size.cells:
        count = size.images * size.anchors * size.classes * h * w
        x = torch.linspace(-6, 6, count).reshape(size.images, size.anchors * size.classes, h, w)
        levels.append(lay_out(x, size, (h, w), layout))
        labels.append(torch.arange(size.images * h * w * size.anchors).reshape(size.images, -1) % (size.classes + 1))
    for gamma in (0.0, 0.5, 2.0):
        check(move(levels, backend.device), move(labels, backend.device), num_classes=size.classes, gamma=gamma)


def test_inputs_are_left_as_they_were(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = problem(backend, ODD, generator)
    before = [x.clone() for x in levels], [y.clone() for y in labels]
    check(levels, labels, num_classes=ODD.classes)
    assert all(same_bits(a, b) for a, b in zip(levels + labels, before[0] + before[1], strict=True))


def test_the_same_tensor_as_two_levels(backend: Backend, generator: torch.Generator) -> None:
    """Its gradient is the sum of both."""
    size = Size(2, 3, 5, ((4, 3), (4, 3)))
    (x, _), labels = problem(backend, size, generator, dtype=torch.float64)
    leaf = x.requires_grad_()
    fastfocal.focal_loss([leaf, leaf], labels, num_classes=5).backward()
    twin = [x.detach().clone().requires_grad_() for _ in range(2)]
    fastfocal.focal_loss(twin, labels, num_classes=5).backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, (twin[0].grad + twin[1].grad).cpu().numpy(), 1e-15)  # type: ignore[operator]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_whole_tiles_of_16_bit_logits(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    """A tile is 8192 logits in every dtype: vectors of 8 cross it in half as many steps as vectors of 4."""
    size = SIZES["two_images_of_8190"]
    levels, labels = problem(backend, size, generator, layout=layout, dtype=dtype)
    check(levels, labels, num_classes=size.classes, reduction="image")


# Levels of several whole tiles of 8192 logits, which the kernels read without looking for an end.
WHOLE_TILES = {
    "rows_of_80": Size(2, 1, 80, ((15, 16),)),  # a row of classes is whole vectors
    "rows_of_91": Size(1, 1, 91, ((13, 16),)),  # and is not: a vector goes over an anchor's end at every place
    "rows_of_9": Size(1, 3, 9, ((25, 28),)),  # hardly more than one vector
    "rows_of_3": Size(1, 1, 3, ((50, 110),)),  # less than one
    "planes_of_9000": Size(1, 1, 2, ((90, 100),)),  # more than a tile
    "planes_of_2100": Size(1, 2, 6, ((35, 60),)),  # a tile has several; the last goes on to the next anchor
    "planes_of_4900": Size(2, 1, 4, ((70, 70),)),  # vectors of 8 packed labels, not of 4, go over the end
    "planes_of_4900_twice": Size(1, 2, 4, ((70, 70),)),  # and beyond that end lie another anchor's
    "planes_of_4425": Size(1, 1, 4, ((59, 75),)),  # of no whole vectors
    "planes_of_70000": Size(1, 1, 1, ((250, 280),)),  # one class, which is a single plane of each image
    "large_planes": Size(1, 1, 2, ((250, 280),)),  # too large for division by a multiplication
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("name", WHOLE_TILES)
def test_whole_tiles(backend: Backend, name: str, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """With positives, ignored anchors and infinite and NaN logits in these at every place of a vector."""
    size = WHOLE_TILES[name]
    levels = draw_levels(size, generator, dtype=dtype, layout=layout)
    drawn = draw_classes(size, generator, positive=0.03, ignored=0.02)
    for classes in drawn:  # what a vector that goes on at a plane's start must find, and not beyond the plane's end
        classes[:, : 4 * size.anchors : size.anchors] = IGNORED
    levels = [with_odd_logits_where_ignored(x, y, size) for x, y in zip(levels, drawn, strict=True)]
    labels = encode(drawn, size.classes)
    levels, labels = move(levels, backend.device), move(labels, backend.device)
    for mode in ("save", "inplace"):
        check(levels, labels, num_classes=size.classes, reduction="image", grad_mode=mode)


SHORT_PLANES = (
    1,
    2,
    9,
    15,
    16,
    17,
    63,
    64,
    65,
    77,
    127,
    128,
    129,
    255,
    256,
    257,
)  # about a vector, and about a group of them
SPARSE = {"background": (0.0, 0.0), "positives": (0.02, 0.0), "ignored": (0.0, 0.02), "both": (0.03, 0.03)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", SPARSE)
@pytest.mark.parametrize("cells", SHORT_PLANES)
def test_short_planes(backend: Backend, cells: int, which: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Planes that are no whole vectors, and few of whose cells are not background; the last level's tiles begin inside one."""
    positive, ignored = SPARSE[which]
    for size in (Size(2, 2, 5, ((1, cells),)), Size(1, 2, 19, ((1, cells),)), Size(1, 2, 9000 // cells, ((1, cells),))):
        levels = draw_levels(size, generator, dtype=dtype)
        drawn = draw_classes(size, generator, positive=positive, ignored=ignored)
        levels = [with_odd_logits_where_ignored(x, y, size) for x, y in zip(levels, drawn, strict=True)]
        labels = encode(drawn, size.classes)
        levels, labels = move(levels, backend.device), move(labels, backend.device)
        for mode in ("save", "inplace"):
            check(levels, labels, num_classes=size.classes, reduction="image", grad_mode=mode)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cells", SHORT_PLANES)
def test_ignored_under_an_infinite_weight(
    backend: Backend, cells: int, layout: str, generator: torch.Generator
) -> None:
    """A divisor of 0 makes the weights infinite, and 0 times that is NaN: an ignored anchor's gradient is 0 all the same."""
    size = Size(1, 2, 19, ((1, cells),))
    (x,), (drawn,) = (
        draw_levels(size, generator, layout=layout),
        draw_classes(size, generator, positive=0, ignored=0.03),
    )
    drawn[0, cells // 2] = IGNORED
    labels = encode([drawn], size.classes)
    leaf = x.to(backend.device).requires_grad_()
    loss = fastfocal.focal_loss(
        [leaf], move(labels, backend.device), num_classes=19, normalizer=torch.zeros((), device=backend.device)
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    by_anchor = gradient.cpu().unflatten(1, (2, 19)).permute(0, 3, 4, 1, 2).reshape(1, -1, 19)
    assert (by_anchor[drawn == IGNORED] == 0).all()
    assert by_anchor[drawn != IGNORED].isinf().all()


def with_odd_logits_where_ignored(x: Tensor, drawn: Tensor, size: Size) -> Tensor:
    """inf, -inf and NaN in turn for the logits of ignored anchors; x is a level in any layout, changed where it lies."""
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=x.dtype)
    if x.dim() == 4:
        n, _, h, w = x.shape
        rows = x.unflatten(1, (size.anchors, size.classes)).permute(0, 3, 4, 1, 2)  # (N, H, W, A, K), a view
        ignored = (drawn == IGNORED).view(n, h, w, size.anchors)
    else:
        rows, ignored = x, drawn == IGNORED
    rows[ignored] = odd[torch.arange(size.classes) % 3]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_in_a_whole_tile(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """NaN there and nowhere else, among infinite ones, positives too."""
    size = WHOLE_TILES["rows_of_80"]
    (x,), (y,) = draw_levels(size, generator, dtype=dtype, layout=layout), draw_classes(size, generator)
    memory = x.permute(0, 2, 3, 1).view(-1) if layout == "channels_last" else x.view(-1)
    for at, value in ((1001, float("nan")), (9003, float("inf")), (13002, -float("inf"))):
        memory[at] = value
    labels = encode([y], size.classes)
    check(move([x], backend.device), move(labels, backend.device), num_classes=size.classes, reduction="level")


@pytest.mark.parametrize("reduction", ["sum", "image"])
def test_more_images_than_a_block_has_threads(backend: Backend, reduction: str, generator: torch.Generator) -> None:
    """A CUDA block of 256 threads adds 300 partial sums; 300 divisors are more than one block."""
    size = Size(300, 1, 2, ((1, 1), (2, 1)))
    levels, labels = problem(backend, size, generator)
    check(levels, labels, num_classes=2, reduction=reduction, normalizer="positives_per_image")


@pytest.mark.parametrize("what", ["classes", "cells"])
def test_divisors_too_large_for_a_multiplication(backend: Backend, what: str, generator: torch.Generator) -> None:
    """From 61,600 on, n / d is a division: 71534 * ceil(2^32 / 71535) >> 32 is 1, and the last class or cell is lost."""
    size = Size(1, 1, 71535, ((1, 1),)) if what == "classes" else Size(1, 1, 2, ((251, 285),))
    levels, labels = problem(backend, size, generator)
    check(levels, labels, num_classes=size.classes)


# --- some of an anchor's classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["flattened", "channels_last", "planes", "odd planes", "short planes"])
@pytest.mark.parametrize("reads", ["labels", "weights"])
def test_parts_of_the_classes_are_the_whole(
    backend: Backend, layout: str, dtype: torch.dtype, reads: str, generator: torch.Generator
) -> None:
    """Kernels that get the classes in parts of odd sizes find the positives that they find in all of them.

    Every part has whole tiles (8192 logits), as the vector paths take no others, and most anchors have a class, so that those
    of another part lie next to every logit.
    """
    n, k, parts = 2, 71, (13, 29, 21, 8)
    h, w = {"odd planes": (27, 31), "short planes": (7, 9)}.get(layout, (26, 32))
    if layout == "short planes":
        n, k, parts = 2, 620, (157, 301, 162)
    logits = (torch.randn(n, k, h, w, generator=generator) * 3).to(dtype)
    labels = torch.randint(-2, k, (n, h * w), generator=generator)  # ignored, background, classes
    weight = torch.rand(n * h * w, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def lay_out_part(part: Tensor) -> Tensor:
        if layout == "flattened":
            return part.flatten(2).transpose(1, 2).contiguous().to(backend.device)
        last = layout == "channels_last"
        form = torch.channels_last if last else torch.contiguous_format
        return part.contiguous(memory_format=form).to(backend.device)

    def run(part: Tensor, first: int) -> tuple[Tensor, Tensor]:
        options = fastfocal.ops.OperatorOptions(
            packed_labels=labels.flatten().to(backend.device, torch.int16),
            soft_targets=None,
            scores=None,
            anchor_weight=weight.to(backend.device) if reads == "weights" else None,
            class_weights=None,
            class_mask=None,
            divisor=None,
            level_scales=[1.0],
            positive_weight=0.25,
            negative_weight=0.75,
            loss=fastfocal.losses.focal.FocalLoss.kind,
            loss_parameters=[2.0, 0.0, 0.0],
            num_classes=part.shape[1],
            first_class=first,
            reduction=fastfocal.ops.SUM,
        )
        (loss,), (gradient,) = fastfocal.ops.pyramid_loss([lay_out_part(part)], options, [1])
        gradient = gradient.cpu()
        if layout == "flattened":
            gradient = gradient.transpose(1, 2).reshape(part.shape)
        return loss.cpu().double(), gradient.double()

    whole, whole_gradient = run(logits, 0)
    losses, gradients, first = [], [], 0
    for size in parts:
        loss, gradient = run(logits[:, first : first + size], first)
        losses.append(loss)
        gradients.append(gradient)
        first += size
    assert first == k
    # Sums are float32 by the end; 16-bit gradients of other vector paths may be rounded to a neighbour.
    torch.testing.assert_close(torch.stack(losses).sum(), whole, rtol=1e-6, atol=0)
    rtol = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(torch.cat(gradients, 1), whole_gradient, rtol=rtol, atol=1e-30)
