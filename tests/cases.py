"""What the tests share: levels in every layout, labels in every form, and results held against the oracle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from oracle import Array, Expected, oracle_focal_loss
from torch import Tensor

import fastfocal

T = TypeVar("T")
Labels = Tensor | list[Tensor]

# The promise, relative and element by element (design: float32 2e-6 at gamma 2, 5e-6 at any gamma). float64: a dozen
# roundings of 1e-16, times at most gamma * |x| = 140 where an exponent carries them.
PROMISED = {torch.float64: lambda gamma: 1e-12, torch.float32: lambda gamma: 2e-6 if gamma == 2 else 5e-6}
# Before the one rounding to 16 bits, which is off by 5e-4 itself, CUDA kernels save instructions: 1e-5 in their own
# arithmetic (losses/focal.h, short_term), and 2e-6 for what a GPU's exp and reciprocal may add.
SIXTEEN_BIT_PROMISED = 1.2e-5
# Weights, level weights, alpha per class, loss weight and the divisor: up to eight roundings of 6e-8 more in float32.
OPTION_ROUNDINGS = {torch.float64: 1e-14, torch.float32: 5e-7}
# Below the smallest normal number a result may become 0: vector units and GPUs flush subnormals, and no step sees them.
SMALLEST = {torch.float64: 2.3e-308, torch.float32: 1.18e-38}
# Stored bits of the mantissa and exponent of the smallest normal number of the 16-bit formats.
SIXTEEN_BIT = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}
NATIVE = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One implementation a test body runs on: CPU kernels, CUDA kernels, or CUDA kernels compiled for the host."""

    name: str
    device: torch.device
    slow: bool = False  # every CUDA thread is run in turn on the host: about 1e6 element-threads a second

    def sized(self, full: T, small: T) -> T:
        """The size a test uses here; `small` should stay under about 1e5 logits."""
        return small if self.slow else full


@dataclass(frozen=True)
class Size:
    """A pyramid: images, anchors per cell, classes, and each level's height and width."""

    images: int
    anchors: int
    classes: int
    cells: tuple[tuple[int, int], ...]

    def level_anchors(self) -> list[int]:
        return [h * w * self.anchors for h, w in self.cells]


# --- logits -----------------------------------------------------------------------------------------------------------

FOUR_D = (
    "contiguous",
    "channels_last",
    "offset",  # contiguous, but not starting on a 16-byte boundary: unaligned heads and tails
    "channels_last_offset",
    "channel_slice",  # part of a wider convolution's output: whole planes, images further apart
    "width_slice",  # gaps between neighbours
    "transposed",  # dense, in neither of the two natural orders
    "expanded",  # one image's memory for all images
)
THREE_D = ("3d", "3d_offset", "3d_rows", "3d_transposed")
TWO_D = ("2d", "2d_transposed")


def lay_out(x: Tensor, size: Size, hw: tuple[int, int], layout: str) -> Tensor:
    """The same values as the contiguous (N, A*K, H, W) tensor `x`, in the asked-for rank and strides."""
    if layout in FOUR_D:
        if layout == "contiguous":
            return x
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "expanded":
            return x[:1].expand_as(x)
        if layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        n, c, h, w = x.shape
        if layout == "offset":
            out = x.new_empty(x.numel() + 1)[1:].view(x.shape)
        elif layout == "channels_last_offset":
            out = x.new_empty(x.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        elif layout == "channel_slice":
            out = x.new_empty(n, c + 5, h, w)[:, 2 : 2 + c]
        else:
            out = x.new_empty(n, c, h, 2 * w + 1)[..., 1::2]
        return out.copy_(x)
    h, w = hw
    rows = x.reshape(size.images, size.anchors, size.classes, h, w).permute(0, 3, 4, 1, 2)
    rows = rows.reshape(size.images, h * w * size.anchors, size.classes)
    if layout in TWO_D:
        assert size.images == 1
        rows = rows[0].contiguous()
    if layout.endswith("_transposed"):
        return rows.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "3d_offset":
        return rows.new_empty(rows.numel() + 1)[1:].view(rows.shape).copy_(rows)
    if layout == "3d_rows":  # as torch.cat over levels followed by a split leaves them
        n, m, k = rows.shape
        return rows.new_empty(n, m + 3, k)[:, 1 : 1 + m].copy_(rows)
    return rows.contiguous()


def draw_levels(
    size: Size,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Logits around 0 with a spread of 4: both tails of the sigmoid, and what initialisation and training give."""
    levels = []
    for h, w in size.cells:
        x = torch.randn(size.images, size.anchors * size.classes, h, w, generator=generator, dtype=torch.float64)
        x = (4 * x).clamp(-28, 28).to(device=device, dtype=dtype)
        levels.append(lay_out(x, size, (h, w), layout))
    return levels


# --- labels and everything shaped like them ---------------------------------------------------------------------------

IGNORED, BACKGROUND = -2, -1
FORMS = ("nhwa", "nhwa_permuted", "nm", "nm_strided", "one", "one_transposed", "one_strided")


def draw_classes(
    size: Size, generator: torch.Generator, *, positive: float = 0.15, ignored: float = 0.1
) -> list[Tensor]:
    """(N, M) a level: a class, BACKGROUND or IGNORED. First and last anchor are positive: there tails go wrong."""
    drawn = []
    for anchors in size.level_anchors():
        shape = (size.images, anchors)
        kind = torch.rand(shape, generator=generator)
        assigned = torch.randint(size.classes, shape, generator=generator)
        assigned[kind >= positive] = BACKGROUND
        assigned[kind >= 1 - ignored] = IGNORED
        if positive and assigned.numel():
            assigned[0, 0], assigned[-1, -1] = 0, size.classes - 1
        drawn.append(assigned)
    return drawn


def encode(drawn: list[Tensor], classes: int, background: int | None = None, ignore: int = -1) -> list[Tensor]:
    """Classes as labels of one convention: with background 0 the foreground starts at 1."""
    labels = []
    for assigned in drawn:
        label = assigned + 1 if background == 0 else assigned.clone()
        label[assigned == BACKGROUND] = classes if background is None else background
        label[assigned == IGNORED] = ignore
        labels.append(label)
    return labels


def arrange(per_level: list[Tensor], size: Size, form: str, *, rank: int = 4) -> Labels:
    """(N, M) tensors, one per level, in one of the shapes and strides that labels and anchor weights may have."""
    if rank == 2:
        per_level = [x[0] for x in per_level]
    if form.startswith("one"):
        joined = torch.cat(per_level, dim=-1)
        if form == "one_transposed":
            return joined.t().contiguous().t()
        return _every_other(joined) if form == "one_strided" else joined
    if form.startswith("nm"):
        return [_every_other(x) for x in per_level] if form == "nm_strided" else per_level
    grids = []
    for x, (h, w) in zip(per_level, size.cells, strict=True):
        grid = x.reshape(size.images, h, w, size.anchors)
        if form == "nhwa_permuted":  # as a matcher that works on (N, A, H, W) hands them over
            grid = grid.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        grids.append(grid[..., 0] if form == "nhw" else grid)
    return grids


def _every_other(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1] + 1)[..., 1::2].copy_(x)


def move(value: Any, device: torch.device) -> Any:
    """To the device, strides and offset from aligned memory kept: `Tensor.to` keeps strides, and only of dense tensors."""
    if isinstance(value, (list, tuple)):
        return type(value)(move(entry, device) for entry in value)
    if not isinstance(value, Tensor) or value.device == device:
        return value
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    offset = value.storage_offset()
    memory = value.new_empty(offset + span, device=device)
    memory[offset:].copy_(value.as_strided((span,), (1,)))  # with what lies between, and an expanded value once
    return memory.as_strided(value.shape, value.stride(), offset)


# --- running and comparing --------------------------------------------------------------------------------------------


def to_numpy(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [to_numpy(entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value.long()).numpy()


def half_ulp(value: Array, dtype: torch.dtype) -> Array:
    """Half the distance between neighbours of a 16-bit format at `value`."""
    bits, smallest = SIXTEEN_BIT[dtype]
    _, exponent = np.frexp(np.where(np.isfinite(value), value, 0))
    return np.ldexp(0.5, np.maximum(exponent - 1, smallest) - bits)


def tolerance(dtype: torch.dtype, gamma: float, *, options: bool = True) -> float:
    """Relative error promised; of the float32 result before it is rounded, for the 16-bit formats."""
    promised = SIXTEEN_BIT_PROMISED if dtype in SIXTEEN_BIT else PROMISED[dtype](gamma)
    return promised + (OPTION_ROUNDINGS[torch.float32 if dtype in SIXTEEN_BIT else dtype] if options else 0.0)


def assert_close(
    got: Tensor,
    want: Any,
    relative: float,
    *,
    magnitude: Array | None = None,
    roundings: float = 1.0,
    flushed: float = 1.0,
    what: str = "",
) -> None:
    """Element by element, where `magnitude` replaces |want| if terms cancel.

    A 16-bit result is rounded `roundings` times; an intermediate that a factor `flushed` makes normal may be flushed.
    """
    want = np.asarray(want, dtype=np.float64)
    assert tuple(got.shape) == want.shape, f"{what}: shape {tuple(got.shape)}, expected {want.shape}"
    have = to_numpy(got)
    with np.errstate(invalid="ignore"):
        bound = relative * (np.abs(want) if magnitude is None else magnitude)
        bound = bound + flushed * SMALLEST[torch.float64 if got.dtype == torch.float64 else torch.float32]
        if got.dtype in SIXTEEN_BIT:
            bound = bound + roundings * half_ulp(np.abs(want) + bound, got.dtype)
        same = (np.isnan(have) & np.isnan(want)) | (have == want)
        wrong = ~(same | (np.isfinite(want) & (np.abs(have - want) <= bound)))
    if wrong.any():
        at = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} elements differ; first at {tuple(map(int, at))}: "
            f"got {have[at]!r}, expected {want[at]!r} within {bound[at]:.3g}"
        )


def expect(levels: Tensor | Sequence[Tensor], targets: Labels, **options: Any) -> Expected:
    """The oracle's answer; a single tensor is one level, and grad_mode changes no number."""
    options.pop("grad_mode", None)
    listed = [levels] if isinstance(levels, Tensor) else list(levels)
    numpy_options = {name: to_numpy(value) for name, value in options.items()}
    return oracle_focal_loss(to_numpy(listed), to_numpy(targets), **numpy_options)


def leaves(levels: Sequence[Tensor]) -> list[Tensor]:
    """The same memory and strides as leaves that require a gradient."""
    return [x.detach().requires_grad_() for x in levels]


def total(loss: Tensor | Sequence[Tensor]) -> Tensor:
    """One number to differentiate: the sum of what the reduction gave, in double so that float16 cannot overflow."""
    parts = [loss] if isinstance(loss, Tensor) else list(loss)
    if len(parts) == 1 and parts[0].ndim == 0:
        return parts[0]
    return torch.stack([part.double().sum() for part in parts]).sum()


def loss_function(options: dict[str, Any]) -> Any:
    """Options with a beta are those of focal loss star."""
    return fastfocal.focal_loss_star if "beta" in options else fastfocal.focal_loss


def run(levels: Sequence[Tensor], targets: Labels, **options: Any) -> tuple[Any, list[Tensor]]:
    """Loss and the gradient of every level, as the operator hands it out (no accumulation into .grad)."""
    inputs = leaves(levels)
    given = [x.clone() for x in inputs] if options.get("grad_mode") == "inplace" else inputs
    loss = loss_function(options)(given, targets, **options)
    return loss, list(torch.autograd.grad(total(loss), inputs))


def compare(
    loss: Any,
    grads: Sequence[Tensor],
    expected: Expected,
    relative: float,
    *,
    scale: float = 1.0,
    roundings: float = 1.0,
    flushed: float = 1.0,
) -> None:
    """Losses and gradients against the oracle's; `scale` is the incoming gradient."""
    if isinstance(loss, list):
        assert len(loss) == len(expected.loss)
        for level, (got, want) in enumerate(zip(loss, expected.loss, strict=True)):
            assert_close(got, want, relative, flushed=flushed, what=f"loss of level {level}")
    else:
        assert_close(loss.detach(), expected.loss, relative, flushed=flushed, what="loss")
    assert len(grads) == len(expected.grads)
    for level, (got, want, size) in enumerate(zip(grads, expected.grads, expected.magnitudes, strict=True)):
        what = f"gradient of level {level}"
        size = abs(scale) * size
        assert_close(got, scale * want, relative, magnitude=size, roundings=roundings, flushed=flushed, what=what)


def check(levels: Sequence[Tensor], targets: Labels, **options: Any) -> tuple[Any, list[Tensor]]:
    """Runs the loss and its gradient, and compares both with the oracle at the promised accuracy."""
    loss, grads = run(levels, targets, **options)
    relative = tolerance(levels[0].dtype, float(options.get("gamma", 2.0)))
    compare(loss, grads, expect(levels, targets, **options), relative)
    assert all(g.dtype == x.dtype for g, x in zip(grads, levels, strict=True))
    return loss, grads


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer)))


def assert_names(message: str, *facts: object) -> None:
    """Words anywhere, numbers as whole numbers; "level 1" also as an index: logits[1]."""
    for fact in facts:
        pattern = rf"(?<![\w.-]){re.escape(str(fact))}(?![\w.]*\d)"
        if fact == "level 1":
            pattern = r"(?i)level\W{0,3}1\b|\w\[1\]"
        elif isinstance(fact, str) and not re.fullmatch(r"[-\d.]+", fact):
            pattern = rf"(?i){re.escape(fact)}"
        assert re.search(pattern, message), f"the message does not name {fact!r}: {message}"
