"""The benchmarks' clock for a GPU, against a model of one: its time of a call, whatever the host takes for it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastfocal

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(ROOT))
from benchmarks import cases, report, test_focal_loss, timing  # noqa: E402
from benchmarks.implementations import ROWS  # noqa: E402

US = 1e-6
CYCLES = 1.7e9  # a second


class Device:
    """A stream of one GPU and the host that enqueues into it, with simulated time."""

    def __init__(self, queue: int = 1024) -> None:
        self.host = self.free = 100.0  # now; when the device is through with everything enqueued
        self.ends: list[float] = []  # of each kernel
        self.queue = queue

    def launch(self, seconds: float, host: float = 0.0) -> None:
        self.host += host
        if len(self.ends) >= self.queue:  # full until the one that many before has begun: here, has ended
            self.host = max(self.host, self.ends[-self.queue])
        self.free = max(self.host, self.free) + seconds
        self.ends.append(self.free)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def sleep(self, cycles: int) -> None:
        self.launch(cycles / CYCLES)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = max(self.host, self.free)

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: event.at <= self.host
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], timing.DeviceClock]:
    def use(device: Device) -> timing.DeviceClock:
        monkeypatch.setattr(torch.cuda, "Event", device.event)
        monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: device.host)
        return timing.DeviceClock()

    return use


@pytest.mark.parametrize("on_device", [3 * US, 30 * US, 3000 * US])
@pytest.mark.parametrize("on_host", [5 * US, 100 * US])
def test_time_is_the_devices(use: Callable[[Device], timing.DeviceClock], on_device: float, on_host: float) -> None:
    device = Device()
    clock = use(device)

    def call() -> None:
        device.launch(on_device / 2, on_host / 2)
        device.launch(on_device / 2, on_host / 2)

    assert clock.count_host(call) == pytest.approx(on_host)
    clock.calls = 50
    for _ in range(3):
        start = clock()
        call()  # between rounds nothing counts
        assert clock() == start
        assert not clock.run(call)
        assert clock() - start == pytest.approx(on_device)


def test_more_kernels_than_the_queue_holds(use: Callable[[Device], timing.DeviceClock]) -> None:
    """The device then waits for the host, and the clock says that it may have."""
    device = Device()
    clock = use(device)

    def call() -> None:
        for _ in range(100):
            device.launch(1 * US, 4 * US)

    clock.count_host(call)
    clock.calls = 50
    assert clock.run(call)
    clock.calls = 10
    assert not clock.run(call)


def test_a_host_slower_than_it_was_is_noticed(use: Callable[[Device], timing.DeviceClock]) -> None:
    device = Device()
    clock = use(device)
    clock.count_host(lambda: device.launch(1 * US, 10 * US))
    clock.calls = 50
    assert clock.run(lambda: device.launch(1 * US, 200 * US))


@pytest.mark.parametrize(
    ("seconds", "sets", "most", "calls"),
    [
        (30 * US, 1, None, 50),
        (30 * US, 3, None, 51),
        (30 * US, 188, None, 188),
        (0.02, 1, None, 25),
        (2.0, 1, None, 3),
        (30 * US, 1, 17, 17),
        (30 * US, 4, 17, 16),
    ],
)
def test_calls_of_a_round(seconds: float, sets: int, most: int | None, calls: int) -> None:
    assert timing.device_calls(seconds, sets, most) == calls


@pytest.mark.parametrize("cache", [50 * 2**20, 6 * 2**20])
def test_inputs_are_three_times_the_cache(monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=cache))
    for case in [*cases.DEFAULT, *cases.GPU, *cases.SMALL_WORK, *cases.scaling(3e7), *cases.level_counts()]:
        sets = test_focal_loss.number_of_sets(case, True)
        if sets < test_focal_loss.MOST_SETS:
            assert (sets - 1) * case.bytes_moved() < 3 * cache <= sets * case.bytes_moved()
        else:
            assert case.bytes_moved() <= cache / 100 + 3 * cache / sets


class Benchmark:
    """What `measure` needs of pytest-benchmark's fixture."""

    _max_time = 0.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.extra_info: dict[str, Any] = {}
        self.times: list[float] = []

    def pedantic(self, body: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            start = self.clock()
            body()
            self.times.append(self.clock() - start)


class HostEvent:
    """An event of a device that is the host itself: then its time and the host's are the same."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("row", ["fastfocal", "copy"])
@pytest.mark.parametrize("grad_mode", ["save", "inplace"])
def test_a_measurement_from_end_to_end(monkeypatch: pytest.MonkeyPatch, row: str, grad_mode: str) -> None:
    """`measure` as on a GPU, with CPU tensors: results are checked, inputs go round, what is said is there."""
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = timing.DeviceClock()
    monkeypatch.setattr(test_focal_loss, "clock_of", lambda case, cuda: clock)
    monkeypatch.setattr(test_focal_loss, "number_of_sets", lambda case, cuda: 3)
    monkeypatch.setattr(timing, "LONGEST_ROUND", 1e9)  # this machine may be slow
    turns: Counter[int] = Counter()

    def counted(case: cases.Case, sets: list[cases.Inputs]) -> Any:
        call = ROWS[row].make(case, sets)

        class Counted(type(call)):  # type: ignore[misc]
            def __call__(self) -> None:
                super().__call__()
                turns[self.turn] += 1

        call.__class__ = Counted
        return call

    case = cases.Case("small", cases.flat_pyramid(2000, 2), layout="flattened", grad_mode=grad_mode)
    benchmark = Benchmark(clock)
    test_focal_loss.inputs_of.cache_clear()
    try:
        measured = dataclasses.replace(ROWS[row], make=counted)
        test_focal_loss.measure(benchmark, case, measured, torch.device("cpu"), False)
    finally:
        test_focal_loss.inputs_of.cache_clear()
    info = benchmark.extra_info
    assert (info["calls_per_round"], info["input_sets"], info["host_bound"]) == (51, 3, False)
    assert len(benchmark.times) == test_focal_loss.FEWEST_ROUNDS and min(benchmark.times) > 0
    assert info["host_seconds"] > 0 and info["copy_seconds"] > 0
    # 3 rounds of 51, beside the three calls that memory is measured in.
    assert set(turns) == {0, 1, 2} and min(turns.values()) >= 51
    assert max(turns.values()) == min(turns.values())


def saved(
    tmp_path: Path, name: str, *, row: str, gpu: str | None = "Some GPU", host: float | None = 1e-4, **more: Any
) -> Path:
    info = {
        **dict(row=row, section="main", pyramid="p", dtype="float32", layout="nchw", gamma=2.0, grad_mode="save"),
        **dict(targets="labels", form="reduced", logits=1, levels=1, bytes_moved=3e8, threads=1),
        **dict(copy_seconds=1e-4, peak_extra_bytes=0, host_seconds=host, host_bound=row == "eager_per_level"),
        **more,
    }
    facts = {
        **dict(gpu=gpu, cpu_name="Some CPU", cpu_capability="AVX2", cpu_flags=[], threads=1, cores=1, cuda="13.0"),
        **dict(gpu_capability=[9, 0], torch="2.11.0", python="3.12", version="0", compiler="c", load_average=None),
    }
    run = {
        "benchmarks": [{"group": "g", "extra_info": info, "stats": {"median": 5e-5, "iqr": 0.0, "rounds": 3}}],
        "machine_info": {"fastfocal": facts},
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-01-01",
    }
    path = tmp_path / name
    path.write_text(json.dumps(run))
    return path


def test_report_of_several_runs(tmp_path: Path) -> None:
    files = [saved(tmp_path, f"{row}.json", row=row) for row in ("fastfocal", "eager_per_level")]
    lines = list(report.markdown(report.load(files), []))
    assert "| implementation | time | host | x copy | faster than plain | GB/s | peak extra MiB |" in lines
    assert "| **FastFocalLoss** | 50 µs | 100 µs | 0.50 | 1.00 | 6e+03 | 0.00 |" in lines
    assert "| plain loss, level by level | 50 µs h | 100 µs | 0.50 | 1.00 | 6e+03 | 0.00 |" in lines
    with pytest.raises(SystemExit, match="different machines: Other GPU, Some GPU"):
        report.load([*files, saved(tmp_path, "other.json", row="copy", gpu="Other GPU")])


def test_report_of_the_cpu_has_no_column_for_the_host(tmp_path: Path) -> None:
    lines = list(report.markdown(report.load([saved(tmp_path, "cpu.json", row="fastfocal", gpu=None, host=None)]), []))
    assert "| implementation | time | x copy | faster than plain | GB/s | peak extra MiB |" in lines
    assert "| **FastFocalLoss** | 50 µs | 0.50 |  | 6e+03 | 0.00 |" in lines


def test_the_data_of_a_report_draw_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda report, out: [])
    files = [saved(tmp_path, f"{row}.json", row=row) for row in ("fastfocal", "eager_per_level")]
    pages = []
    for named in (files, [tmp_path / "data.json"]):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, named), "--out", str(tmp_path)])
        report.main()
        pages.append(((tmp_path / "report.md").read_text(), (tmp_path / "data.json").read_text()))
    assert pages[0] == pages[1] and "FastFocalLoss" in pages[0][0]


def test_pictures_say_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar on a log axis, where its length means nothing; and no line through two dtypes."""
    pytest.importorskip("matplotlib")
    pyramid = "P3-P7 800x1344 N=2 K=80"
    files = [
        saved(tmp_path, f"{row}.json", row=row, gpu=None, pyramid=pyramid, threads=1)
        for row in ("fastfocal", "copy", "eager_per_level")
    ]
    for logits, dtype in ((10**6, "float32"), (10**7, "float32"), (10**8, "bfloat16"), (10**9, "bfloat16")):
        more = {"section": "scaling", "logits": logits, "dtype": dtype}
        files.append(saved(tmp_path, f"{logits}.json", row="fastfocal", gpu=None, **more))
    figures = {}

    def keep(figure: Any, path: Path) -> Path:
        figure.savefig(path, dpi=20)
        figures[path.stem] = figure
        return path

    monkeypatch.setattr(report, "save", keep)
    report.plot(report.load(files), tmp_path)
    assert set(figures) == {"times", "cases", "scaling", "memory"}
    (times,), (scaling,) = figures["times"].axes, figures["scaling"].axes
    assert times.get_xscale() == "log" and not times.patches
    (memory,) = figures["memory"].axes
    assert memory.get_xscale() == "linear" and len(memory.patches) == 3
    assert sorted(tuple(line.get_xdata()) for line in scaling.lines) == [(10**6, 10**7), (10**8, 10**9)]
    words = [text.get_text() for figure in figures.values() for text in figure.texts]
    assert "Five FPN levels (P3–P7) of 2 images of 800 × 1344, 80 classes, float32, NCHW" in words
    assert not [text for text in words if "N=2" in text or "nchw" in text]


def test_training_curves_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "sklearn", "PIL", "tqdm"):
        pytest.importorskip(module)
    from benchmarks import torchvision_training as training

    curves = {training.STOCK: [1.0, 0.5], training.OURS: [1.0, 0.6], training.CONTROL: [1.0, 0.4]}
    assert training.largest_difference(curves, training.OURS) == pytest.approx(0.2)
    saved = tmp_path / "torchvision_training_64.json"
    saved.write_text(json.dumps({"size": 64, "where": "a CPU", "curves": curves}))
    monkeypatch.setattr(sys, "argv", ["torchvision_training", "--redraw", str(saved)])
    training.main()
    assert (tmp_path / "torchvision_training_64.png").stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 2  # nothing else was run


@pytest.mark.slow
def test_a_run_that_is_ended_saves_what_it_measured(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    rows = "test_small_work and (fastfocal or copy) and 10x10"
    # Not `python -m pytest`, which would import the checkout's fastfocal in place of an installed one.
    program = "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--benchmark-only", f"--benchmark-json={saved}", "--device=cpu", "-v"]
    command += ["-p", "no:cacheprovider", "-k", rows, "--benchmark-max-time=60"]
    path = str(Path(fastfocal.__file__).parent.parent)
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert run.stdout is not None
    for line in run.stdout:
        if "PASSED" in line:
            run.send_signal(signal.SIGTERM)
            break
    run.communicate(timeout=100)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert len(json.loads(saved.read_text())["benchmarks"]) >= 1
