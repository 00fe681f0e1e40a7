"""What a small call of FastFocalLoss takes beside its operators: checks in Python, and autograd.

    python -m benchmarks.overhead --out benchmarks/results

The operators are timed within the calls, and an autograd.Function that computes nothing, over as many leaves, is called in
turn with them: what no loss that one such function records can go below. Both are measured with warm caches and after a copy
of the logits, which leaves little of Python in the second-level cache. The last case's kernels have next to nothing to do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastfocal
from benchmarks.cases import SINGLE, SMALL, Case, Pyramid, draw
from benchmarks.implementations import Call, Copy, fast
from benchmarks.machine import describe
from benchmarks.memory import fix_allocator

CELLS = Pyramid("five levels of one cell N=1 K=80", "cells", 1, 9, 80, ((1, 1),) * 5)


class Nothing(torch.autograd.Function):
    """Gradients made beforehand, handed on as PyramidLossFunction hands its own on."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *logits: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        gradients.clear()  # a leaf takes over what nobody else holds
        return logits[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.saved_tensors)


class Timed:
    """The operators, and the seconds spent in them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("pack_labels", "pyramid_loss", "scale_gradients_"):
            setattr(self, name, self._timed(getattr(torch.ops.fastfocal, name)))

    def _timed(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = operator(*args)
            self.seconds += time.perf_counter() - start
            return result

        return call


def measure(pyramid: Pyramid, cold: bool, rounds: int) -> list[float]:
    """Medians of the whole call, of what is outside its operators, and of a Function that does nothing; seconds."""
    case = Case("small", pyramid)
    inputs = draw(case, torch.device("cpu"))
    call, copy = Call(case, [inputs], fast(case)), Copy(case, [inputs])
    leaves = [x.detach().requires_grad_() for x in inputs.levels]
    timed = Timed()
    times: list[tuple[float, float, float]] = []
    fastfocal.ops.operators = timed
    try:
        for _ in range(rounds):
            if cold:
                copy()
            timed.seconds = 0.0
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
            for leaf in leaves:
                leaf.grad = None
            gradients = [torch.empty_like(leaf) for leaf in leaves]
            if cold:
                copy()
            start = time.perf_counter()
            Nothing.apply(gradients, *leaves).backward()
            times.append((whole, whole - timed.seconds, time.perf_counter() - start))
    finally:
        fastfocal.ops.operators = torch.ops.fastfocal
    return [statistics.median(column) for column in zip(*times[rounds // 10 :], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000, help="calls of each, for a median")
    parser.add_argument("--out", type=Path, help="folder for overhead.md")
    arguments = parser.parse_args()
    fix_allocator(1)
    lines = [
        "# What a small call takes beside its operators",
        "",
        f"{describe(torch.device('cpu'))} · `python -m benchmarks.overhead --rounds {arguments.rounds}`",
        "",
        "Forward and backward, medians, microseconds.",
        "",
        "| case | caches | whole call | in its operators | beside them | an autograd.Function that does nothing |",
        "|---|---|--:|--:|--:|--:|",
    ]
    print(*lines, sep="\n")
    for pyramid in (SMALL, SINGLE, CELLS):
        for cold in (False, True):
            whole, beside, nothing = (1e6 * t for t in measure(pyramid, cold, arguments.rounds))
            caches = "after a copy" if cold else "warm"
            lines.append(
                f"| {pyramid.name} | {caches} | {whole:.0f} | {whole - beside:.0f} | {beside:.0f} | {nothing:.0f} |"
            )
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "overhead.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
