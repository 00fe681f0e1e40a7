"""Calls that take every kernel's every way once, for tools that watch them (tests/gpu.sh): no test of what they compute.

Small ones, for compute-sanitizer, in parts that run beside each other; --large: calls at 800x1344, for a profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastfocal

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
K, A = 5, 3
CELLS = ((9, 13), (4, 7), (1, 1), (0, 3))  # odd, shorter than a vector, one cell, empty


def pyramid(n: int, cells: tuple[tuple[int, int], ...], a: int, k: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Logits of every level, (N, A*K, H, W), and labels (N, sum M): half background, the rest of every kind."""
    levels = [torch.randn(n, a * k, h, w, device=device) for h, w in cells]
    anchors = sum(a * h * w for h, w in cells)
    labels = torch.randint(-1, k, (n, anchors), device=device)
    return levels, torch.where(torch.rand(n, anchors, device=device) < 0.5, k, labels)


def options(labels: Tensor, levels: list[Tensor], k: int) -> Iterator[dict[str, Any]]:
    for gamma in (2.0, 1.5):
        for mode in ("save", "recompute", "inplace"):
            yield {"gamma": gamma, "grad_mode": mode}
    for reduction in ("level", "image", "mean", "none"):
        yield {"reduction": reduction}
    yield {"normalizer": "positives_per_image"}
    yield {"weight": torch.rand(labels.shape, device=labels.device)}
    yield {"alpha": [0.5] * k, "label_smoothing": 0.1}
    yield {"targets": [torch.rand_like(x, dtype=torch.float32) for x in levels], "normalizer": 7.0}


def off_the_grid(x: Tensor, shifted: bool) -> Tensor:
    """The same strides, one element beyond where a vector begins."""
    if not shifted:
        return x
    return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


def call(levels: list[Tensor], labels: Tensor, k: int, **chosen: Any) -> None:
    leaves = [x.clone().requires_grad_() for x in levels]
    used = [x * 1 for x in leaves] if chosen.get("grad_mode") == "inplace" else leaves
    loss = fastfocal.focal_loss(used, chosen.pop("targets", labels), num_classes=k, **chosen)
    parts = loss if isinstance(loss, list) else [loss]
    total = torch.stack([part.sum().double() for part in parts]).sum()
    total.backward(retain_graph=True)
    if chosen.get("grad_mode") != "inplace":
        (3 * total).backward()  # an incoming gradient that is not 1


def small(dtype: torch.dtype, device: str) -> int:
    calls = 0
    for order in ORDERS.values():
        levels, labels = pyramid(2, CELLS, A, K, device)
        levels = [x.to(dtype, memory_format=order) for x in levels]
        for chosen in options(labels, levels, K):
            call(levels, labels, K, **chosen)
            calls += 1
        # Tiles that are whole, read as vectors and not; a block takes several tiles where the device is small.
        levels, labels = pyramid(2, ((32, 36), (16, 16)), 3, 16, device)
        for shifted in (False, True):
            given = [off_the_grid(x.to(dtype, memory_format=order), shifted) for x in levels]
            for gamma in (2.0, 1.5):
                call(given, labels, 16, gamma=gamma)
                calls += 1
    return calls


def other(device: str) -> int:
    """Sizes out of the ordinary, and the other formula."""
    for k in (1, 80, 40000):  # one plane; a plane for each class; packed labels of 32 bits
        levels, labels = pyramid(1, ((2, 3),), 1, k, device)
        call(levels, labels, k)
    many, labels = pyramid(2, ((3, 5),) * 20, 1, K, device)  # two launches, and levels without a gradient
    mixed = [x.requires_grad_(i % 3 > 0) for i, x in enumerate(many)]
    fastfocal.focal_loss(mixed, labels, num_classes=K, reduction="level").sum().backward()
    fastfocal.focal_loss_star(many, labels, num_classes=K).backward()
    # More tiles than any GPU holds blocks at once: shared memory is used again and again.
    huge, labels = pyramid(1, ((128, 160),), 9, 64, device)
    call([x.to(torch.bfloat16) for x in huge], labels, 64)
    return 6


def large(dtypes: list[str], orders: list[str], device: str) -> int:
    for name in dtypes:
        levels, labels = pyramid(2, ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), 9, 80, device)
        labels = torch.where(torch.rand(labels.shape, device=device) < 0.98, 80, labels)
        for order in orders:
            call([x.to(DTYPES[name], memory_format=ORDERS[order]) for x in levels], labels, 80)
    return len(dtypes) * len(orders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=[*DTYPES, "other"], help="of the small calls; default: all")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--order", choices=ORDERS, help="of the large calls; default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="of the large calls; default: bfloat16 and float32")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.large:
        dtypes = [chosen.dtype] if chosen.dtype else ["bfloat16", "float32"]
        calls = large(dtypes, [chosen.order] if chosen.order else list(ORDERS), chosen.device)
    else:
        parts = [chosen.part] if chosen.part else [*DTYPES, "other"]
        calls = sum(other(chosen.device) if part == "other" else small(DTYPES[part], chosen.device) for part in parts)
    if chosen.device != "cpu":
        torch.cuda.synchronize()
    print(f"{calls} calls on {chosen.device}")


if __name__ == "__main__":
    main()
