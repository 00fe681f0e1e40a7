"""Time of forward and backward, by implementation, in groups by case. `pytest --benchmark-only` runs this."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cases
from benchmarks.cases import Case, Inputs
from benchmarks.implementations import ROWS, Copy, Row, rows_of
from benchmarks.memory import available_bytes, fix_allocator, peak_extra_bytes, touch_memory
from benchmarks.timing import HOST_CALLS, DeviceClock, HostClock, device_calls, whole_turns

ROUND_LOGITS = 3e5  # a round of a smaller case is many calls, so that the clock's own cost does not show
FEWEST_ROUNDS, MOST_ROUNDS = 3, 60
SLOW_LOGITS = 4e7  # up to here the slow implementations run too, unless --all-cases
MOST_SETS = 300  # of inputs on a GPU: what is less than a hundredth of its L2 cache is found there

Clock = HostClock | DeviceClock
_cases: dict[str, Case] = {}
_device_clock = DeviceClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    every = config.getoption("all_cases")
    wanted = config.getoption("device")
    cuda = torch.cuda.is_available() if wanted is None else wanted.startswith("cuda")
    if metafunc.function is test_focal_loss:
        chosen = cases.DEFAULT + (cases.EXTRA if every else []) + (cases.GPU if cuda else [])
    elif metafunc.function is test_number_of_logits:
        chosen = cases.scaling(config.getoption("largest"))
    elif metafunc.function is test_number_of_levels:
        chosen = cases.level_counts()
    else:
        chosen = cases.SMALL_WORK
    pairs = []
    for case in chosen:
        if cuda and case.threads:
            continue
        for row in rows_of(case, every, cuda):
            if row.slow and case.pyramid.logits > SLOW_LOGITS and not every:
                continue
            _cases[case.key] = case
            marks = pytest.mark.benchmark(group=case.name, timer=clock_of(case, cuda))
            pairs.append(pytest.param(row.name, case.key, id=f"{row.name}-{case.key}", marks=marks))
    metafunc.parametrize("row_name, case_key", pairs)


def clock_of(case: Case, cuda: bool) -> Clock:
    return _device_clock if cuda else HostClock(calls_per_round(case))


def number_of_sets(case: Case, cuda: bool) -> int:
    """On a GPU, sets of inputs that together are three times its L2 cache."""
    if not cuda:
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(1, min(MOST_SETS, -(-3 * cache // case.bytes_moved())))


def calls_per_round(case: Case) -> int:
    """On the CPU; on a GPU a round's calls are counted when one has been timed."""
    fewest = 10 if case.section == "small" else 1  # of one call, what the copy before it left in the caches is a part
    return max(fewest, min(100, int(ROUND_LOGITS / case.pyramid.logits)))


@functools.lru_cache(maxsize=1)
def _answer(key: Case, device: torch.device) -> cases.Answer:
    return cases.answer(key, cases.draw(key, device))


def answer(case: Case, device: torch.device) -> cases.Answer:
    """Layout, grad mode and threads do not change it."""
    key = Case("", case.pyramid, dtype=case.dtype, layout="flattened", gamma=case.gamma)
    key = replace(key, targets=case.targets, loss=case.loss)
    return _answer(key, device)


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case, device: torch.device) -> list[Inputs]:
    return [cases.draw(case, device, seed) for seed in range(number_of_sets(case, device.type == "cuda"))]


def fits(row: Row, case: Case, device: torch.device) -> bool:
    """Whether inputs, float64 answer and the call's own memory do."""
    size = case.dtype.itemsize
    answer_bytes = 4 if size == 2 else 8
    needed = case.pyramid.logits * (2 * size + answer_bytes + row.memory * (size / 4 if row.memory <= 4 else 1))
    return needed < 0.8 * available_bytes(device)


def memory_for(case: Case, device: torch.device) -> int:
    """How many copies of the logits half of the free memory holds."""
    return int(available_bytes(device) / 2 / case.logit_bytes)


class Beside:
    """Times a copy of the logits before every round: what the machine gives at that moment.

    The copies are kept until the next one, as the row `copy` and gradients are.
    """

    def __init__(self, case: Case, sets: list[Inputs], clock: Clock) -> None:
        self.copy, self.clock = Copy(case, sets), clock
        self.seconds: list[float] = []

    def __call__(self) -> None:
        start = self.clock()
        self.clock.run(self.copy)
        self.seconds.append(self.clock() - start)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(_cases[request.node.callspec.params["case_key"]].threads or before)
    yield
    torch.set_num_threads(before)


def measure(benchmark: BenchmarkFixture, case: Case, row: Row, device: torch.device, keep_memory: bool) -> None:
    """Check, memory, time, in this order."""
    for module in row.needs:
        pytest.importorskip(module)
    if not fits(row, case, device):  # 1e9 logits, or an eager loop over 1e8: how far a machine gets is its own matter
        pytest.skip(f"{row.name} of {case.name} does not fit into memory")
    fix_allocator(case.logit_bytes, keep_memory)
    sets = inputs_of(case, device)
    call = row.make(case, sets)
    clock = clock_of(case, device.type == "cuda")
    on_device = isinstance(clock, DeviceClock)
    if on_device:
        clock.calls = whole_turns(3, len(sets))  # torch.compile's CUDA graphs come with the third call
    call.prepare(clock.calls)
    for _ in range(clock.calls):  # compiles what is to be compiled; every set has been used, the first one last
        call()
    if row.checked:
        loss, gradients = call.result()
        cases.check(row.name, loss, gradients, case, sets[0], answer(case, device))
        del loss, gradients
    call.release()
    fix_allocator(case.logit_bytes, keep_memory)  # again: what was compiled left holes
    if device.type == "cpu":  # for a call's gradients and the copies, and what eager implementations keep
        touch_memory(min(8 * case.logit_bytes, available_bytes(device) // 2))
    beside = Beside(case, sets, clock)
    beside()

    seconds = 0.0

    def one_call() -> None:
        nonlocal seconds
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start

    peaks = []
    for _ in range(1 if row.slow else 3):  # other rows left holes in the heap, and some calls touch more of them
        call.prepare(1)
        peaks.append(peak_extra_bytes(one_call, device))
        call.release()
    peak = min((p for p in peaks if p is not None), default=None)
    host_seconds = None
    if on_device:
        host_calls = whole_turns(3 if row.slow else HOST_CALLS, len(sets))
        call.prepare(host_calls)
        host_seconds = clock.count_host(call, host_calls)
    if clock.calls > 1:
        call.prepare(clock.calls)
        start = clock()
        clock.run(call)
        seconds = clock() - start
    call.release()
    if on_device:
        in_place = case.grad_mode == "inplace"  # then each call has a copy of the logits
        clock.calls = device_calls(seconds, len(sets), memory_for(case, device) if in_place else None)
    seconds = clock.calls * (seconds + beside.seconds.pop())  # of a round, with the copies before it

    def setup() -> None:
        for _ in range(3 if row.slow else 1):  # few rounds, so more copies for a median
            beside()
        call.prepare(clock.calls)

    waited: list[bool] = []

    def one_round() -> None:
        waited.append(clock.run(call))

    budget = float(benchmark._max_time)  # --benchmark-max-time, seconds
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(budget / seconds)))
    benchmark.pedantic(one_round, setup=setup, rounds=rounds)
    call.release()
    beside.copy.release()
    benchmark.extra_info.update(
        section=case.section,
        row=row.name,
        pyramid=case.pyramid.name,
        dtype=str(case.dtype).removeprefix("torch."),
        layout=case.layout,
        gamma=case.gamma,
        grad_mode=case.grad_mode,
        targets=case.targets,
        form=case.form,
        loss=case.loss,
        logits=case.pyramid.logits,
        levels=len(case.pyramid.cells),
        bytes_moved=case.bytes_moved(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        calls_per_round=clock.calls,
        input_sets=len(sets),
        host_seconds=host_seconds,
        host_bound=2 * sum(waited) > len(waited),
        copy_seconds=statistics.median(beside.seconds),
        peak_extra_bytes=peak,
    )


@pytest.mark.usefixtures("threads")
def test_focal_loss(
    benchmark: BenchmarkFixture, row_name: str, case_key: str, device: torch.device, keep_memory: bool
) -> None:
    measure(benchmark, _cases[case_key], ROWS[row_name], device, keep_memory)


@pytest.mark.usefixtures("threads")
def test_number_of_logits(
    benchmark: BenchmarkFixture, row_name: str, case_key: str, device: torch.device, keep_memory: bool
) -> None:
    measure(benchmark, _cases[case_key], ROWS[row_name], device, keep_memory)


@pytest.mark.usefixtures("threads")
def test_number_of_levels(
    benchmark: BenchmarkFixture, row_name: str, case_key: str, device: torch.device, keep_memory: bool
) -> None:
    measure(benchmark, _cases[case_key], ROWS[row_name], device, keep_memory)


@pytest.mark.usefixtures("threads")
def test_small_work(
    benchmark: BenchmarkFixture, row_name: str, case_key: str, device: torch.device, keep_memory: bool
) -> None:
    measure(benchmark, _cases[case_key], ROWS[row_name], device, keep_memory)
