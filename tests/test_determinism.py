"""The same bits from run to run, for any number of threads, wherever the memory lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Backend,
    Size,
    draw_classes,
    draw_levels,
    encode,
    move,
    run,
    same_bits,
)
from torch import Tensor
from watch import thread_count

# Some 2e5 logits on the first level: several times what one thread gets at once, with odd ends.
LARGE = Size(2, 3, 7, ((71, 67), (23, 19), (3, 3)))
SMALL = Size(2, 3, 7, ((19, 23), (3, 3)))


def results(levels: list[Tensor], labels: list[Tensor], classes: int) -> list[Tensor]:
    """Losses of every reduction and the gradients of one."""
    out: list[Tensor] = []
    for reduction in ("sum", "mean", "level", "image"):
        options: dict[str, Any] = {"num_classes": classes, "reduction": reduction, "gamma": 1.5}
        loss, grads = run(levels, labels, **options)
        out += [loss.detach(), *grads]
    return out


def draw(
    backend: Backend, generator: torch.Generator, dtype: torch.dtype, layout: str
) -> tuple[list[Tensor], list[Tensor], int]:
    size = backend.sized(LARGE, SMALL)
    levels = move(draw_levels(size, generator, dtype=dtype, layout=layout), backend.device)
    return levels, move(encode(draw_classes(size, generator), size.classes), backend.device), size.classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_same_bits_over_runs(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    levels, labels, classes = draw(backend, generator, dtype, layout)
    first = results(levels, labels, classes)
    for _ in range(2):
        assert all(same_bits(a, b) for a, b in zip(first, results(levels, labels, classes), strict=True))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_same_bits_for_any_number_of_threads(
    backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    levels, labels, classes = draw(backend, generator, dtype, layout)
    with thread_count(1):
        alone = results(levels, labels, classes)
    for threads in (2, 3, 5):  # 3 and 5 cut no power of two evenly
        with thread_count(threads):
            assert all(same_bits(a, b) for a, b in zip(alone, results(levels, labels, classes), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_same_bits_wherever_the_memory_lies(backend: Backend, layout: str, generator: torch.Generator) -> None:
    """The order of the sums is fixed by the problem's shape alone, so not by where a vector boundary falls."""
    for _ in range(backend.sized(12, 4)):
        levels, labels, classes = draw(backend, generator, torch.float32, layout)
        first = results(levels, labels, classes)
        moved = []
        for x in levels:
            memory = x.new_empty(x.numel() + 1)[1:]
            moved.append(memory.as_strided(x.shape, x.stride(), 1).copy_(x))
        assert all(x.data_ptr() % 16 for x in moved)
        assert all(same_bits(a, b) for a, b in zip(first, results(moved, labels, classes), strict=True))


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
def test_modes_agree(backend: Backend, mode: str, generator: torch.Generator) -> None:
    """One formula serves all modes: the numbers differ by a few roundings of 6e-8 at most, the sums by fewer."""
    levels, labels, classes = draw(backend, generator, torch.float32, "contiguous")
    loss, grads = run(levels, labels, num_classes=classes)
    other, other_grads = run(levels, labels, num_classes=classes, grad_mode=mode)
    torch.testing.assert_close(other, loss, rtol=2e-7, atol=0)
    for a, b in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_many_equal_terms_sum_exactly(backend: Backend) -> None:
    """Float32 partial sums of a million equal terms lose digits; double or compensated ones do not."""
    cells = backend.sized(1 << 20, 1 << 14)
    x = torch.full((1, 1, 1, cells), 0.1, device=backend.device)
    labels = torch.ones(1, cells, dtype=torch.int64, device=backend.device)
    whole, _ = run([x], labels, num_classes=1, normalizer=None)
    one, _ = run([x[..., :1].clone()], labels[:, :1], num_classes=1, normalizer=None)
    # Up to 16 terms are added in float32 before they go to double: 15 roundings of 6e-8.
    # A running float32 sum is off by 7.5e-3.
    assert whole.item() / cells == pytest.approx(one.item(), rel=1e-6)
