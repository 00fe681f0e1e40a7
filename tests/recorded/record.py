"""The cases whose bits are recorded, what those bits depend on, and the record: bits.json.

    cd tests && python -m recorded.record

writes it anew from what the checkout computes now. That is right after a change that is meant to change bits, and then the
commit says why; a change that is not meant to (code moved, renamed, split) must leave the record as it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import host_build
import numpy as np
import torch
from cases import Size, lay_out
from cpu_isas import build as cpu_isas
from torch import Tensor
from watch import thread_count

import fastfocal

HERE = Path(__file__).resolve().parent
BITS = HERE / "bits.json"
BACKENDS = ("extension", "avx512", "avx2", "portable", "cuda_on_host")

# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call: its loss and its gradients are recorded."""

    layout: str
    variant: str
    dtype: str
    reduction: str
    grad_mode: str
    incoming: str

    @property
    def name(self) -> str:
        return " ".join((self.layout, self.variant, self.dtype, self.reduction, self.grad_mode, self.incoming))


ORDINARY = Size(2, 3, 7, ((19, 17), (5, 3), (2, 1)))
MANY_CLASSES = Size(2, 2, 33, ((13, 11), (3, 2)))
LAYOUTS = {  # what `lay_out` makes, and the pyramid
    "contiguous": ("contiguous", ORDINARY),
    "channels_last": ("channels_last", MANY_CLASSES),
    "offset": ("offset", ORDINARY),
    "channels_last_offset": ("channels_last_offset", ORDINARY),
    "channel_slice": ("channel_slice", ORDINARY),
    "width_slice": ("width_slice", ORDINARY),
    "3d": ("3d", MANY_CLASSES),
    "3d_offset": ("3d_offset", Size(2, 1, 19, ((17, 15), (3, 3)))),
    "3d_transposed": ("3d_transposed", ORDINARY),
    "2d": ("2d", Size(1, 3, 80, ((9, 7), (3, 2)))),
    "small_planes": ("contiguous", Size(3, 2, 5, ((1, 1), (1, 3), (5, 1), (2, 4), (3, 5)))),
    "many_levels": ("contiguous", Size(2, 1, 3, tuple((1 + i % 4, 1 + i % 5) for i in range(19)))),  # two launches
    "several_tiles": ("contiguous", Size(1, 3, 7, ((61, 59), (3, 3)))),
    "several_tiles_last": ("channels_last", Size(1, 1, 91, ((29, 31), (3, 3)))),
    "32769_classes": ("3d", Size(1, 1, 32769, ((1, 1),))),  # a class beyond int16
}
NOT_DENSE = ("channel_slice", "width_slice", "3d_transposed")  # grad_mode "inplace" refuses these


@dataclass(frozen=True)
class Variant:
    """Options as they are, and what is to be drawn for the call."""

    options: dict[str, Any] = field(default_factory=dict)
    soft: str | None = None  # dtype of the soft targets: "own" or "float32"
    class_alpha: bool = False
    anchor_weight: bool = False
    level_weights: bool = False
    tails: str | None = None  # some logits from nothing up to infinity; "finite": where they are summed, up to 104
    star: bool = False
    module: bool = False


VARIANTS = {
    "plain": Variant(),
    "gamma_1.5": Variant({"gamma": 1.5, "normalizer": "positives_per_image"}),
    "gamma_0": Variant({"gamma": 0.0, "normalizer": None}),
    "gamma_5": Variant({"gamma": 5.0, "alpha": 0.4, "loss_weight": 1.7}),
    "smoothing": Variant({"label_smoothing": 0.1}),
    "smoothing_1.5": Variant({"label_smoothing": 0.15, "gamma": 1.5}),
    "detached": Variant({"detach_modulating_factor": True}),
    "detached_1.5": Variant({"detach_modulating_factor": True, "gamma": 1.5}),
    "alpha_none": Variant({"alpha": None, "normalizer": 37.0}),
    "class_alpha": Variant(class_alpha=True),
    "weight": Variant(anchor_weight=True),
    "weight_1.5": Variant({"gamma": 1.5, "label_smoothing": 0.05}, class_alpha=True, anchor_weight=True),
    "level_weights": Variant({"loss_weight": 0.3}, level_weights=True),
    "module": Variant({"gamma": 2.5, "background_index": 0, "ignore_index": 255}, level_weights=True, module=True),
    "tails": Variant(tails="infinite"),
    "tails_1.5": Variant({"gamma": 1.5}, tails="finite"),
    "soft": Variant({"normalizer": None}, soft="own"),
    "soft_float32": Variant({"normalizer": 11.0}, soft="float32"),
    "soft_1.5": Variant({"gamma": 1.5, "label_smoothing": 0.1, "normalizer": None}, soft="own", tails="finite"),
    "soft_weight": Variant({"normalizer": None}, soft="float32", class_alpha=True, anchor_weight=True),
    "star": Variant({"gamma": 2.0, "beta": 1.0}, star=True),
    "star_steep": Variant({"gamma": 3.5, "beta": -0.5, "alpha": None}, star=True, tails="finite", anchor_weight=True),
    "star_soft": Variant({"gamma": 1.5, "beta": 0.5, "normalizer": None}, soft="own", star=True),
}
TYPES = ("float32", "float16", "bfloat16", "float64")
REDUCTIONS = ("sum", "level", "image", "none", "mean")
GRAD_MODES = ("save", "recompute", "inplace")
INCOMING = ("one", "number", "elements", "huge")


def all_cases() -> Iterator[Case]:
    """Every layout with half of the variants and every variant with half of the layouts; the rest in turn.

    The factors below are such that every two choices meet in some case, but for half of the layouts and variants
    (test_recorded.py looks).
    """
    for i, layout in enumerate(LAYOUTS):
        for j, variant in enumerate(VARIANTS):
            if (i + j) % 2:
                continue
            turn = (i + j) // 2
            mode = GRAD_MODES[2 * turn % len(GRAD_MODES)]
            if mode == "inplace" and layout in NOT_DENSE:
                mode = "save"
            yield Case(
                layout,
                variant,
                TYPES[(2 * j + turn) % len(TYPES)],
                REDUCTIONS[(i + 2 * turn) % len(REDUCTIONS)],
                mode,
                INCOMING[(2 * i + j + 3 * turn) % len(INCOMING)],
            )


# --- inputs, from integers alone: no version of torch or numpy draws them differently ---------------------------------

FINITE_TAILS = (
    *(0.0, -0.0, 1e-30, -1e-30, 1e-40, -1e-40, 0.6931472, -0.6931472, 16.6, -16.6, 50.0, -50.0, 87.3, -87.3),
    *(88.03, -88.03, 89.0, -89.0, 104.0, -104.0),
)
TAILS = (*FINITE_TAILS, 700.0, -700.0, 6e4, -6e4, np.inf, -np.inf)


def integers(count: int, stream: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """`count` numbers below 2^32, by SplitMix64."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)


def uniform(count: int, stream: int) -> Tensor:
    """In [0, 1), exact in float64."""
    return torch.from_numpy(integers(count, stream).astype(np.float64) / 2.0**32)


def bell(count: int, stream: int) -> Tensor:
    """Around 0, with a spread of 4, in [-28, 28]."""
    return 14 * (sum(uniform(count, stream + i) for i in range(4)) - 2)  # type: ignore[return-value]


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def flat_layout(x: Tensor, logits: Tensor, size: Size, hw: tuple[int, int], layout: str) -> Tensor:
    """Soft targets: of the logits' shape, in memory of their own order."""
    simple = {4: "contiguous", 3: "3d", 2: "2d"}[logits.ndim]
    return lay_out(x, size, hw, simple if layout in ("offset", "3d_offset", "width_slice") else layout)


def compute(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The losses and the gradients of a case."""
    variant, dtype = VARIANTS[case.variant], dtype_of(case.dtype)
    layout, size = LAYOUTS[case.layout]
    classes = size.classes
    options = {"reduction": case.reduction, "grad_mode": case.grad_mode, **variant.options}

    logits, targets, weights = [], [], []
    for level, (h, w) in enumerate(size.cells):
        stream = 100 * level
        shape = (size.images, size.anchors * classes, h, w)
        count, anchors = size.images * size.anchors * classes * h * w, h * w * size.anchors
        x = bell(count, stream)
        if variant.tails is not None:  # at places of no order: each meets both labels and every place of a vector
            infinite = variant.tails == "infinite" or case.reduction == "none"
            values = torch.tensor(TAILS if infinite else FINITE_TAILS, dtype=torch.float64)
            at = torch.from_numpy((integers(count, stream + 10) % np.uint64(3 * len(values))).astype(np.int64))
            x = torch.where(at < len(values), values[at.clamp(max=len(values) - 1)], x)
        logits.append(lay_out(x.view(shape).to(dtype), size, (h, w), layout))
        if variant.soft is not None:
            y = uniform(count, stream + 20)
            y = torch.where(y < 0.3, 0.0, torch.where(y > 0.9, 1.0, y))
            soft = dtype if variant.soft == "own" else torch.float32
            targets.append(flat_layout(y.view(shape).to(soft), logits[-1], size, (h, w), layout))
        else:
            kind = uniform(size.images * anchors, stream + 30)
            assigned = torch.from_numpy(
                (integers(size.images * anchors, stream + 40) % np.uint64(classes)).astype(np.int64)
            )
            first, background = (1, 0) if variant.options.get("background_index") == 0 else (0, classes)
            label = torch.where(kind < 0.8, background, assigned + first)
            label = torch.where(kind > 0.92, variant.options.get("ignore_index", -1), label)
            targets.append(label.view(size.images, anchors))
        weights.append((0.25 + 2 * uniform(size.images * anchors, stream + 50)).float().view(size.images, anchors))
    flat = logits[0].ndim == 2
    if flat:
        targets = [t if t.ndim == 2 and variant.soft is not None else t[0] for t in targets]
        weights = [t[0] for t in weights]

    if variant.class_alpha:
        options["alpha"] = (0.05 + 0.9 * uniform(classes, 7)).tolist()
    if variant.level_weights:
        options["level_weights"] = [0.5 + 0.25 * level for level in range(len(size.cells))]
    weight = weights if variant.anchor_weight else None

    leaves = [x.detach().requires_grad_() for x in logits]
    given = [x.clone() for x in leaves] if case.grad_mode == "inplace" else leaves
    if variant.module:
        loss = fastfocal.FastFocalLoss(classes, **options)(given, targets, weight)
    elif variant.star:
        loss = fastfocal.focal_loss_star(given, targets, num_classes=classes, weight=weight, **options)  # type: ignore
    else:
        loss = fastfocal.focal_loss(given, targets, num_classes=classes, weight=weight, **options)  # type: ignore
    losses = [loss] if isinstance(loss, Tensor) else list(loss)
    kept = [x.detach().clone() for x in losses]
    return kept, list(torch.autograd.grad(losses, leaves, incoming_gradients(case.incoming, losses)))


def incoming_gradients(incoming: str, losses: list[Tensor]) -> list[Tensor]:
    if incoming == "one":
        return [torch.ones_like(x) for x in losses]
    if incoming == "number":
        return [torch.full_like(x, 0.37) for x in losses]
    if incoming == "huge":  # beyond what is multiplied into the terms: the finished gradient is
        return [torch.full_like(x, 2.0**14 if x.dtype == torch.float16 else 2.0**60) for x in losses]
    return [(bell(x.numel(), 60 + i).view(x.shape) / 4).to(x.dtype) for i, x in enumerate(losses)]


# torchvision's function has a way in of its own.
FUNCTION_CASES = tuple(
    (dtype, reduction, gamma) for dtype in TYPES for reduction in ("none", "mean", "sum") for gamma in (2.0, 1.5)
)


def compute_function(dtype: str, reduction: str, gamma: float) -> tuple[list[Tensor], list[Tensor]]:
    inputs = bell(5 * 7 * 11, 1).view(5, 7, 11).to(dtype_of(dtype)).requires_grad_()
    targets = uniform(5 * 7 * 11, 2).view(5, 7, 11).to(dtype_of(dtype))
    loss = fastfocal.sigmoid_focal_loss(inputs, targets, 0.25, gamma, reduction)
    return [loss.detach().clone()], list(torch.autograd.grad([loss], [inputs], incoming_gradients("elements", [loss])))


# --- their bits -------------------------------------------------------------------------------------------------------


def digest(tensors: list[Tensor]) -> str:
    """Of dtypes, shapes and bytes, whatever the strides."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(f"{t.dtype} {tuple(t.shape)};".encode())
        sha.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def compute_bits() -> dict[str, list[str]]:
    """Of every case the digests of losses and of gradients, by the operators that are in use.

    In one thread: the bits are those of any number (test_determinism.py), and threads that wait for a busy machine take long.
    """
    with thread_count(1):
        bits = {case.name: [digest(part) for part in compute(case)] for case in all_cases()}
        for dtype, reduction, gamma in FUNCTION_CASES:
            name = f"sigmoid_focal_loss {dtype} {reduction} gamma_{gamma:g}"
            bits[name] = [digest(part) for part in compute_function(dtype, reduction, gamma)]
    return bits


# --- what they depend on beside the code ------------------------------------------------------------------------------


def conditions(backend: str) -> dict[str, str]:
    """Bits are comparable where all of these are the same."""
    probe = ctypes.CDLL(
        str(host_build.build_library("probe", [host_build.Source(HERE / "probe.cpp")], host_build.default_directory()))
    )

    def fingerprint(name: str) -> str:
        function = getattr(probe, name)
        function.restype = ctypes.c_uint64
        return f"{function():016x}"

    if backend == "extension":
        compiler = f"{fastfocal.build_info()['compiler']}, as build_info() has it"
        instructions = cpu_isas.capability()
    else:
        compiler = host_build.run([*host_build.compiler(), "--version"]).splitlines()[0]
        instructions = {"avx512": "AVX512", "avx2": "AVX2"}.get(backend, "default")
        if backend == "avx512" and cpu_isas.capability() != "AVX512":
            instructions = "AVX512, emulated"
    found = {
        "compiler": compiler,
        "C library": os.confstr("CS_GNU_LIBC_VERSION") or "unknown",
        "instructions": instructions,
        "libm's results": fingerprint("libm"),
    }
    if instructions in ("AVX512", "AVX2"):
        found["the processor's reciprocals"] = fingerprint({"AVX512": "rcp14_ps", "AVX2": "rcp_ps"}[instructions])
    return found


def read() -> dict[str, Any]:
    record = json.loads(BITS.read_text())
    assert isinstance(record, dict)
    return record


def write(found: dict[str, dict[str, Any]]) -> None:
    """A line for each case: what changed shows in a diff."""
    lines = []
    for backend in BACKENDS:
        rows = [f"{json.dumps(name)}: {json.dumps(bits)}" for name, bits in found[backend]["bits"].items()]
        where = json.dumps(found[backend]["conditions"])
        body = ",\n  ".join(rows)
        lines.append(f'"{backend}": {{"conditions": {where}, "bits": {{\n  {body}\n}}}}')
    BITS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class Recorder:
    """Where pytest has this plugin, test_recorded.py hands over what it computed, and compares nothing."""

    NAME = "fastfocal_recorder"

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}


def main() -> None:
    import pytest

    recorder = Recorder()

    class Plugin:
        def pytest_configure(self, config: pytest.Config) -> None:
            config.pluginmanager.register(recorder, Recorder.NAME)

    status = pytest.main([str(HERE.parent / "test_recorded.py"), "-q", "-k", "bits"], plugins=[Plugin()])
    if status != 0 or set(recorder.found) != set(BACKENDS):
        sys.exit(f"nothing written: computed for {', '.join(recorder.found) or 'no backend'} of {', '.join(BACKENDS)}")
    write(recorder.found)
    print(f"{BITS}: {sum(len(entry['bits']) for entry in recorder.found.values())} entries")


if __name__ == "__main__":
    main()
