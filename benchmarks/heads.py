"""The last convolution and the focal loss together: features to gradients of features, weight and bias, by implementation.

    python -m benchmarks.heads --out benchmarks/results              # goes on where it was stopped
    python -m benchmarks.heads --out benchmarks/results --minutes 9  # as much as fits into that; again until it says "complete"
    python -m benchmarks.heads --out benchmarks/results --bytes      # the tensors alone, as a GPU would hold them
    python -m benchmarks.heads --out benchmarks/results --docs       # docs/many_classes.md and its picture, measuring nothing

P3-P7 of 256 channels, a 3x3 convolution with A*K outputs. Every row is checked, then measured twice over:

* Memory: the most that a call holds beyond what was there before it (`memory.py`), each row in a process of its own.
* Time: rounds in one process, a call of every row in each, forwards and backwards in turn; the ratio to `FastFocalLoss` after
  the convolution is the median of the rounds' ratios, of the wall's clock and of the processor's (all threads).

What was measured is kept in heads.json after every step; heads.md, the page in docs/ and its picture are made of that
(`heads_report.py`). A row that does not fit into the free memory is left out, and heads.md says so.

The aims: peak memory of at most 1.5 times the gradients of features, weight and bias plus 100 MiB; at most 1.05 times the
time of `FastFocalLoss` from 80 classes on, less than its time from 1000 on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks import cases, heads_report
from benchmarks.cases import ALPHA, Case, Inputs, Pyramid
from benchmarks.implementations import ROWS, concatenated, sigmoid_focal_loss, summed, torchvision_op
from benchmarks.machine import describe
from benchmarks.memory import MIB, TensorBytes, available_bytes, fix_allocator, peak_extra_bytes, touch_memory
from fastfocal import FastFocalLoss, reference
from fastfocal.heads.tiles import tile_bytes

CHANNELS, KERNEL = 256, 3
STRIDES = (8, 16, 32, 64, 128)  # P3-P7
SIZES = ((512, 512), (800, 1344))
CLASSES = {20: 9, 80: 9, 264: 9, 1203: 9, 13204: 1}  # and anchors: 1203 are LVIS's, 13204 V3Det's
DTYPES = (torch.float32, torch.bfloat16)
CHUNKS = (4, 16, 32, 64)  # MiB
CPU = torch.device("cpu")


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCase:
    height: int
    width: int
    images: int
    anchors: int
    classes: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.height}x{self.width}-N{self.images}-A{self.anchors}-K{self.classes}-{dtype}"

    @staticmethod
    def of(key: str) -> HeadCase:
        size, images, anchors, classes, dtype = key.split("-")
        height, width = map(int, size.split("x"))
        return HeadCase(height, width, int(images[1:]), int(anchors[1:]), int(classes[1:]), getattr(torch, dtype))

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        return tuple((-(-self.height // s), -(-self.width // s)) for s in STRIDES)

    @property
    def of_loss(self) -> Case:
        pyramid = Pyramid(self.key, self.key, self.images, self.anchors, self.classes, self.cells)
        return Case("heads", pyramid, dtype=self.dtype)

    @property
    def logit_bytes(self) -> int:
        return self.of_loss.logit_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients of features, weight and bias: what every row leaves behind."""
        features = self.images * CHANNELS * sum(h * w for h, w in self.cells)
        outputs = self.anchors * self.classes
        return (features + outputs * (CHANNELS * KERNEL**2 + 1)) * self.dtype.itemsize

    @property
    def operations(self) -> float:
        """Of the convolution, forward and both halves of backward."""
        return 6.0 * self.of_loss.pyramid.logits * CHANNELS * KERNEL**2

    @property
    def small(self) -> HeadCase:
        """The same layer over small levels: what is checked against float64, and what loads the code."""
        return replace(self, height=64, width=96, images=2)


def images_of(size: tuple[int, int], classes: int) -> int:
    """Two, where a machine with 20 GB holds what the stock loss makes of them."""
    return 1 if size == (800, 1344) and classes > 1000 else 2


def cases_of(sizes: list[tuple[int, int]], classes: list[int], dtypes: list[torch.dtype]) -> list[HeadCase]:
    return [
        HeadCase(*size, images_of(size, k), CLASSES.get(k, 9), k, dtype)
        for dtype in dtypes
        for size in sizes
        for k in classes
    ]


@dataclass
class Drawn:
    features: list[Tensor]
    layer: nn.Conv2d
    inputs: Inputs  # of the loss, but the logits

    @property
    def leaves(self) -> list[Tensor]:
        assert self.layer.bias is not None
        return [*self.features, self.layer.weight, self.layer.bias]

    def logits(self) -> list[Tensor]:
        return [self.layer(x) for x in self.features]


def draw(case: HeadCase, seed: int = 0) -> Drawn:
    """Features and weights of which the logits become about randn - 4, as in the other benchmarks; and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = cases.draw_labels(case.of_loss, generator)
    outputs = case.anchors * case.classes
    features = [
        torch.randn(case.images, CHANNELS, h, w, generator=generator).to(case.dtype).requires_grad_()
        for h, w in case.cells
    ]
    layer = nn.Conv2d(CHANNELS, outputs, KERNEL, padding=KERNEL // 2, dtype=case.dtype)
    with torch.no_grad():
        shape = layer.weight.shape
        layer.weight.copy_(torch.randn(shape, generator=generator).mul_((CHANNELS * KERNEL**2) ** -0.5))
        assert layer.bias is not None
        layer.bias.fill_(cases.LOGIT_MEAN)
    positives = int(((labels >= 0) & (labels < case.classes)).sum())
    return Drawn(features, layer, Inputs([], labels, None, positives, torch.ones(0)))


# --- what is compared -------------------------------------------------------------------------------------------------

HeadLoss = Callable[[HeadCase, Drawn], Tensor]


def stock(case: HeadCase, drawn: Drawn) -> Tensor:
    """As torchvision's RetinaNet: permute and concatenate all levels, one-hot, `torchvision.ops.sigmoid_focal_loss`.

    Where torchvision is not installed, its formula as it stands there.
    """
    loss = concatenated if ROWS["torchvision"].missing() else torchvision_op
    return loss(case.of_loss, drawn.logits(), drawn.inputs)


def after(grad_mode: str) -> HeadLoss:
    """FastFocalLoss of the convolution's outputs."""

    def loss(case: HeadCase, drawn: Drawn) -> Tensor:
        found = FastFocalLoss(case.classes, grad_mode=grad_mode)(drawn.logits(), drawn.inputs.labels)
        assert isinstance(found, Tensor)
        return found

    return loss


def stock_checkpointed(case: HeadCase, drawn: Drawn) -> Tensor:
    """Convolution and plain loss of each level made again in backward, one level at a time."""
    of_loss = case.of_loss

    def of_level(x: Tensor, labels: Tensor) -> Tensor:
        return summed(cases.flatten(drawn.layer(x), case.classes), labels, None, of_loss, sigmoid_focal_loss)

    per_level = drawn.inputs.labels.split(of_loss.pyramid.level_anchors, dim=1)
    pairs = zip(drawn.features, per_level, strict=True)
    sums = [checkpoint(of_level, x, labels, use_reentrant=False) for x, labels in pairs]
    return torch.stack(sums).sum() / max(1, drawn.inputs.positives)


def checkpointed(case: HeadCase, drawn: Drawn) -> Tensor:
    """The same with FastFocalLoss."""
    criterion = FastFocalLoss(case.classes, normalizer=float(max(1, drawn.inputs.positives)))

    def of_level(x: Tensor, labels: Tensor) -> Any:
        return criterion([drawn.layer(x)], labels)

    per_level = drawn.inputs.labels.split(case.of_loss.pyramid.level_anchors, dim=1)
    pairs = zip(drawn.features, per_level, strict=True)
    return torch.stack([checkpoint(of_level, x, y, use_reentrant=False) for x, y in pairs]).sum()


def fused(chunk_bytes: int | str) -> HeadLoss:
    def loss(case: HeadCase, drawn: Drawn) -> Tensor:
        criterion = FastFocalLoss(case.classes)
        return criterion.fused_with(drawn.layer, drawn.features, drawn.inputs.labels, chunk_bytes=chunk_bytes)

    return loss


@dataclass(frozen=True)
class HeadRow:
    name: str
    loss: HeadLoss
    # Bytes at the peak for each logit, of float32 and of bfloat16; of the largest level's alone where `by_level`. For the
    # choice of what fits: a convolution may also hold a copy of its outputs in its own order.
    memory: tuple[float, float]
    by_level: bool = False
    chunk_bytes: int | None = None  # given to the fused head

    def is_auto(self, case: HeadCase) -> bool:
        """Whether its tiles are as large as those of "auto"."""
        return self.chunk_bytes == tile_bytes("auto", CPU, case.dtype)

    def estimate(self, case: HeadCase) -> float:
        pyramid = case.of_loss.pyramid
        logits = pyramid.logits
        if self.by_level:
            logits = logits * pyramid.level_anchors[0] // sum(pyramid.level_anchors)
        return logits * self.memory[DTYPES.index(case.dtype)] + 4 * case.gradient_bytes + 200 * MIB


_ROWS = [
    HeadRow("stock", stock, (56, 56)),
    HeadRow("save", after("save"), (12, 6)),
    HeadRow("inplace", after("inplace"), (8, 4)),
    HeadRow("checkpoint stock", stock_checkpointed, (56, 56), by_level=True),
    HeadRow("checkpoint", checkpointed, (12, 6), by_level=True),
    HeadRow("fused", fused("auto"), (0, 0)),
    *[HeadRow(f"fused {mib} MiB", fused(mib * MIB), (0, 0), chunk_bytes=mib * MIB) for mib in CHUNKS],
]
HEAD_ROWS = {row.name: row for row in _ROWS}
BASE = "save"


class HeadCall:
    """Forward and backward, down to the gradients. It starts by releasing the last one's, as a training step does."""

    def __init__(self, case: HeadCase, drawn: Drawn, row: HeadRow) -> None:
        self.case, self.drawn, self.row = case, drawn, row
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        self.release()
        loss = self.row.loss(self.case, self.drawn)
        loss.backward()
        self.loss = loss.detach()

    def result(self) -> tuple[Tensor, list[Tensor]]:
        assert self.loss is not None
        gradients = [t.grad for t in self.drawn.leaves]
        return self.loss, [g for g in gradients if g is not None]

    def release(self) -> None:
        for t in self.drawn.leaves:
            t.grad = None


# --- the right answer -------------------------------------------------------------------------------------------------

# L2 norm of a gradient's error over the gradient's, and the loss's relative error. float32 as in cases.py: torchvision's
# formula costs three digits. bfloat16, against float64: near -4 a logit is rounded by 2^-6 at most (0.9% in the mean square),
# which is three times as much in the gradient, about exp(3x); and every gradient is rounded again. Against another bfloat16
# row: the latter alone, once for each of five levels added up.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
TOLERANCE_BETWEEN = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def answer(case: HeadCase, drawn: Drawn) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, of float64."""
    leaves = [t.detach().double().requires_grad_() for t in drawn.leaves]
    *features, weight, bias = leaves
    logits = [nn.functional.conv2d(x, weight, bias, padding=KERNEL // 2) for x in features]
    loss = reference.focal_loss(logits, drawn.inputs.labels, num_classes=case.classes, alpha=ALPHA, gamma=2.0)
    assert isinstance(loss, Tensor)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def compare(name: str, got: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    """Raises AssertionError unless loss and gradients agree."""
    error = abs(float(got[0]) / float(want[0]) - 1)
    assert error <= tolerance, f"{name}: loss {float(got[0])}, expected {float(want[0])}"
    assert len(got[1]) == len(want[1]), f"{name}: {len(got[1])} gradients, expected {len(want[1])}"
    for i, (have, true) in enumerate(zip(got[1], want[1], strict=True)):
        norm = torch.linalg.vector_norm
        distance = float(norm(have.to(true.dtype) - true, dtype=torch.float64))
        error = distance / float(norm(true, dtype=torch.float64))
        assert error <= tolerance, f"{name}: gradient {i} of {len(want[1])} has relative error {error:.1e}"


def check(case: HeadCase, row: HeadRow, drawn: Drawn, right: tuple[Tensor, list[Tensor]]) -> None:
    """Small levels, all of whose code is loaded by that too."""
    call = HeadCall(case, drawn, row)
    call()
    compare(f"{row.name}, {case.key}", call.result(), right, TOLERANCE[case.dtype])
    call.release()


# --- measuring --------------------------------------------------------------------------------------------------------

SHORT = 2.0  # seconds; a longer call is not made beforehand, beyond that of small levels
RATE = 5e10  # operations a second that are supposed before anything was timed


def measure_peak(case: HeadCase, row: HeadRow) -> dict[str, float | None]:
    """In this process, which should have measured nothing else. Whether the row is right, who times it says."""
    fix_allocator(case.logit_bytes)
    call = HeadCall(case.small, draw(case.small), row)  # loads the code, starts the threads
    call()
    call = HeadCall(case, draw(case), row)
    if case.operations < SHORT * RATE:
        call()
        call.release()
    fix_allocator(case.logit_bytes)
    touch_memory(int(min(row.estimate(case), available_bytes(CPU) / 2)))
    start = time.perf_counter()
    peak = peak_extra_bytes(call, CPU)
    return {"bytes": peak, "seconds": time.perf_counter() - start}


class Budget:
    """How long this run may go on. The first step is made however long it may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.first = True

    def allows(self, seconds: float) -> bool:
        if not self.first and time.perf_counter() + 1.2 * seconds > self.end:
            return False
        self.first = False
        return True


class Results:
    """heads.json: for each case its rows' peaks, its rounds, and what was left out."""

    def __init__(self, path: Path, where: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {"where": where, "cases": {}, "tensor_bytes": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
            if self.data["cases"] and self.data["where"] != where:
                raise SystemExit(
                    f"{path} was measured elsewhere: {self.data['where']}. Here: {where}. Move it away to begin anew."
                )
            self.data["where"] = where

    def case(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["cases"].setdefault(
            key,
            {"gradient_bytes": HeadCase.of(key).gradient_bytes, "peaks": {}, "left_out": {}, "rounds": [], "load": []},
        )
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(heads_report.as_json(self.data))
        unfinished.replace(self.path)
        heads_report.write_table(self.data, self.path.with_suffix(".md"))


def seconds_of(found: dict[str, Any], case: HeadCase, name: str) -> float:
    """An estimate of a row's call."""
    timed = [r[name][0] for r in found["rounds"] if name in r]
    if timed:
        return statistics.median(timed)
    if name in found["peaks"]:
        return float(found["peaks"][name]["seconds"])
    return case.operations / RATE


def measure(
    case: HeadCase,
    names: list[str],
    rounds: int,
    results: Results,
    budget: Budget,
    threads: int,
    log: Callable[[str], None],
) -> bool:
    """Goes on with a case. Whether it is finished."""
    found = results.case(case.key)
    fitting = []
    for name in names:
        if HEAD_ROWS[name].is_auto(case):
            continue
        needed, free = HEAD_ROWS[name].estimate(case), available_bytes(CPU)
        done = name in found["peaks"] and sum(name in r for r in found["rounds"]) >= rounds
        if needed > 0.95 * free and not done:
            words = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB were free"
            found["left_out"][name] = words
            log(f"{case.key}: {name} is left out, {words}")
            continue
        found["left_out"].pop(name, None)
        fitting.append(name)
    for name in fitting:
        if name in found["peaks"]:
            continue
        if not budget.allows(10 + 1.5 * seconds_of(found, case, name)):
            return False
        command = [
            sys.executable,
            "-m",
            "benchmarks.heads",
            "--case",
            case.key,
            "--row",
            name,
            "--threads",
            str(threads),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found["peaks"][name] = json.loads(output.splitlines()[-1])
        results.save()
        peak = found["peaks"][name]["bytes"]
        log(f"{case.key}: {name} {'not measured' if peak is None else f'{peak / MIB:.0f} MiB'}")
    return measure_times(case, fitting, rounds, found, results, budget, log)


def measure_times(
    case: HeadCase,
    names: list[str],
    rounds: int,
    found: dict[str, Any],
    results: Results,
    budget: Budget,
    log: Callable[[str], None],
) -> bool:
    """Rounds until each row was in as many; those with fewer first. `FastFocalLoss` is in all of them."""
    if BASE not in names:
        return True
    others = [name for name in names if name != BASE]

    def lacking() -> list[str]:
        counts = {name: sum(name in r for r in found["rounds"]) for name in others}
        return sorted((n for n in others if counts[n] < rounds), key=lambda n: counts[n])

    calls: dict[str, HeadCall] = {}
    kept: tuple[Tensor, list[Tensor]] | None = None
    compared: set[str] = set()
    while wanted := lacking():
        chosen, spent = [], seconds_of(found, case, BASE)
        for name in wanted:
            more = seconds_of(found, case, name)
            if budget.allows(spent + more + (0 if calls else 5)):
                chosen.append(name)
                spent += more
        if not chosen:
            return False
        if not calls:
            small = draw(case.small)
            right = answer(case.small, small)
            for name in [BASE, *others]:
                check(case.small, HEAD_ROWS[name], small, right)
            del small, right
            drawn = draw(case)
            calls = {name: HeadCall(case, drawn, HEAD_ROWS[name]) for name in [BASE, *others]}
            largest = max(HEAD_ROWS[name].estimate(case) for name in [BASE, *others])
            touch_memory(int(min(largest, available_bytes(CPU) / 2)))
            if seconds_of(found, case, BASE) < SHORT:
                for call in calls.values():
                    call()
                    call.release()
        order = [BASE, *[name for name in others if name in chosen]]
        if kept is not None and len(found["rounds"]) % 2:
            order.reverse()
        times: dict[str, list[float]] = {}
        for name in order:
            processor, wall = time.process_time(), time.perf_counter()
            calls[name]()
            times[name] = [time.perf_counter() - wall, time.process_time() - processor]
            if kept is None:  # of FastFocalLoss, which begins the first round
                kept = calls[name].result()
            elif name not in compared and name != BASE:
                compare(f"{name}, {case.key}", calls[name].result(), kept, TOLERANCE_BETWEEN[case.dtype])
                compared.add(name)
            calls[name].release()
        found["rounds"].append(times)
        found["load"].append(round(os.getloadavg()[0], 2))
        results.save()
        log(f"{case.key}: round {len(found['rounds'])}, " + ", ".join(f"{n} {times[n][0]:.3g} s" for n in order))
    return True


# --- the tensors alone ------------------------------------------------------------------------------------------------

# (height, width, N, A, K)
BYTES_CASES = ((800, 1344, 2, 9, 80), (800, 1344, 16, 9, 1203), (800, 1344, 2, 1, 13204))
BYTES_ROWS: dict[str, HeadLoss] = {
    "stock": lambda case, drawn: concatenated(case.of_loss, drawn.logits(), drawn.inputs),
    "save": after("save"),
    "inplace": after("inplace"),
    "fused": fused(tile_bytes("auto", torch.device("cuda"), torch.bfloat16)),
}


def tensor_bytes(case: HeadCase, loss: HeadLoss) -> int:
    """Of the tensors that live at once within forward and backward, at their most; of tensors without memory."""
    with FakeTensorMode():
        features = [
            torch.empty(case.images, CHANNELS, h, w, dtype=case.dtype, requires_grad=True) for h, w in case.cells
        ]
        layer = nn.Conv2d(CHANNELS, case.anchors * case.classes, KERNEL, padding=KERNEL // 2, dtype=case.dtype)
        labels = torch.empty(case.images, case.of_loss.pyramid.all_anchors // case.images, dtype=torch.int64)
        drawn = Drawn(features, layer, Inputs([], labels, None, 1, torch.ones(0)))
        with TensorBytes([*drawn.leaves, labels]) as counted:
            loss(case, drawn).backward()
    return counted.peak


# --- the command ------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__.split("\n")[0])
    names = [f"{h}x{w}" for h, w in SIZES]
    parser.add_argument("--sizes", nargs="+", default=names, metavar="HxW", help=f"of the images; default {names}")
    parser.add_argument(
        "--classes", nargs="+", type=int, default=list(CLASSES), metavar="K", help="A is 9, with 13204 1"
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", choices=list(HEAD_ROWS), default=list(HEAD_ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before a step that would not fit")
    parser.add_argument("--out", type=Path, help="folder of heads.json and heads.md; needed for all but --row")
    parser.add_argument("--bytes", action="store_true", help="the bytes of the tensors in bfloat16, and nothing else")
    parser.add_argument("--docs", action="store_true", help="make docs/many_classes.md of heads.json, and nothing else")
    parser.add_argument("--case", help="with --row: its memory, in this process; prints JSON")
    parser.add_argument("--row", choices=list(HEAD_ROWS))
    arguments = parser.parse_args()
    if arguments.row is None and arguments.out is None:
        parser.error("--out: expected a folder")
    if (arguments.row is None) != (arguments.case is None):
        parser.error("--case and --row go together")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(measure_peak(HeadCase.of(arguments.case), HEAD_ROWS[arguments.row])))
        return
    path = arguments.out / "heads.json"
    if arguments.docs:
        heads_report.write_docs(json.loads(path.read_text()), arguments.out)
        return
    results = Results(path, describe(CPU, "torchvision"))
    if arguments.bytes:
        for sizes in BYTES_CASES:
            case = HeadCase(*sizes, torch.bfloat16)
            found = {name: tensor_bytes(case, loss) for name, loss in BYTES_ROWS.items()}
            results.data["tensor_bytes"][case.key] = found
            print(case.key, ", ".join(f"{name} {count / MIB:.0f} MiB" for name, count in found.items()), flush=True)
        results.save()
        return
    sizes = [tuple(map(int, name.split("x"))) for name in arguments.sizes]
    budget = Budget(60 * arguments.minutes)
    names = [name for name in HEAD_ROWS if name in {BASE, *arguments.rows}]
    for case in cases_of(sizes, arguments.classes, [getattr(torch, name) for name in arguments.dtype]):
        if not measure(
            case, names, arguments.rounds, results, budget, arguments.threads, lambda line: print(line, flush=True)
        ):
            print(f"Stopped at {case.key}; the same command goes on from here.")
            return
    results.save()
    print("complete")


if __name__ == "__main__":
    main()
