"""Clocks for rounds of calls: the host's on the CPU, the device's own time on CUDA."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

FEWEST_DEVICE_CALLS = 50  # between two events, whose resolution is half a microsecond
LONGEST_ROUND = 0.5  # seconds, from which on a round is of fewer calls: they are long themselves
LONGEST_HOLD = 0.25  # seconds that the device is kept waiting for the host
HOST_CALLS = 20


class HostClock:
    """Seconds divided by the calls of a round: pytest-benchmark then shows the time of one."""

    __name__ = "perf_counter per call"

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self) -> float:
        return time.perf_counter() / self.calls

    def run(self, call: Call) -> bool:
        """A round. Whether the device waited for the host in it, which here is nobody's question."""
        for _ in range(self.calls):
            call()
        return False


class DeviceClock:
    """Seconds a call that the device takes. The clock goes on in `run` alone.

    Two events enclose a round's calls in the stream. Before the first one the device is kept busy until the host is through
    with all of them, so that it has one call's work after the other's and never waits for the host, which takes longer for
    a call than the device does where logits are few. A round with more kernels than the launch queue holds (about a
    thousand) is not all enqueued by then: `run` says so, and its time may be what the host makes of it.
    """

    __name__ = "CUDA events per call"

    def __init__(self) -> None:
        self.calls = 1
        self.seconds = 0.0
        self.host_seconds = 0.0  # that the host took for a call, at the last count: how long the device has to be held

    def __call__(self) -> float:
        return self.seconds

    @functools.cached_property
    def cycles_per_second(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for cycles in (1000, 10_000_000):  # the first loads the kernel
            torch.cuda.synchronize()
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
        end.synchronize()
        return 10_000_000 / (start.elapsed_time(end) / 1e3)

    def run(self, call: Call) -> bool:
        """A round. Whether the first call began before the last one was enqueued, so that the device may have waited."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        hold = min(LONGEST_HOLD, 1.5 * self.host_seconds * self.calls + 1e-3)
        cycles = int(hold * self.cycles_per_second)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        start.record()
        for _ in range(self.calls):
            call()
        end.record()
        late = start.query()
        end.synchronize()
        self.seconds += start.elapsed_time(end) / 1e3 / self.calls
        return late

    def count_host(self, call: Call, calls: int = HOST_CALLS) -> float:
        """Seconds until the host is through with a call, the device idle before it: the median."""
        seconds = []
        for _ in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        self.host_seconds = statistics.median(seconds)
        return self.host_seconds


def whole_turns(calls: int, sets: int) -> int:
    """At least that many, and every set of inputs as often as the others."""
    return -(-calls // sets) * sets


def device_calls(seconds: float, sets: int, most: int | None = None) -> int:
    """How many calls a round has on a device: 50 or more, fewer only where they take long, whole turns over the sets.

    Args:
        seconds: of one call.
        sets: of inputs.
        most: where each call needs memory of its own.
    """
    calls = min(FEWEST_DEVICE_CALLS, max(3, int(LONGEST_ROUND / max(seconds, 1e-9))))
    calls = whole_turns(calls, sets)
    return calls if most is None else max(sets, min(calls, most // sets * sets))
