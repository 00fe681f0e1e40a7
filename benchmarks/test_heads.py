"""Time from features to gradients, the last convolution included. `pytest --benchmark-only` runs this on a small size.

`python -m benchmarks.heads` has the sizes that detectors train at, and memory in processes of their own. With --all-cases also
the plain loss, checkpointing and other sizes of a tile.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import heads
from benchmarks.heads import HEAD_ROWS, HeadCall, HeadCase
from benchmarks.memory import fix_allocator, peak_extra_bytes, touch_memory
from benchmarks.timing import HostClock

FEWEST_ROUNDS, MOST_ROUNDS = 3, 60
ROWS = ("save", "inplace", "fused")
CASES = {case.key: case for k in (80, 1203) for dtype in heads.DTYPES for case in [HeadCase(128, 128, 2, 9, k, dtype)]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = tuple(HEAD_ROWS) if metafunc.config.getoption("all_cases") else ROWS
    pairs = []
    for key in CASES:
        marks = pytest.mark.benchmark(group=f"head {key}", timer=HostClock(1))
        pairs += [pytest.param(name, key, id=f"{name.replace(' ', '_')}-{key}", marks=marks) for name in names]
    metafunc.parametrize("row_name, case_key", pairs)


def test_head(
    benchmark: BenchmarkFixture, row_name: str, case_key: str, device: torch.device, keep_memory: bool
) -> None:
    """Check, memory, time, in this order."""
    if device.type != "cpu":
        pytest.skip("measured on the CPU")
    case, row = CASES[case_key], HEAD_ROWS[row_name]
    fix_allocator(case.logit_bytes, keep_memory)
    small = heads.draw(case.small)
    heads.check(case.small, row, small, heads.answer(case.small, small))
    call = HeadCall(case, heads.draw(case), row)
    clock = HostClock(1)
    start = clock()
    call()
    seconds = clock() - start
    call.release()
    fix_allocator(case.logit_bytes, keep_memory)
    touch_memory(8 * case.logit_bytes)
    peak = peak_extra_bytes(call, device)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(float(benchmark._max_time) / seconds)))
    benchmark.pedantic(call, rounds=rounds)
    call.release()
    benchmark.extra_info.update(
        section="heads",
        row=row_name,
        pyramid=case.key,
        dtype=str(case.dtype).removeprefix("torch."),
        grad_mode="save",
        logits=case.of_loss.pyramid.logits,
        gradient_bytes=case.gradient_bytes,
        threads=torch.get_num_threads(),
        peak_extra_bytes=peak,
    )
