"""The first run: trains a small detector twice, with the plain per-level loss and with FastFocalLoss, and compares.

Started by ``python -m fastfocal``; needs the extra, ``pip install "fastfocal[demo]"``.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .measure import GradientAnswer

HELD_OUT = 200  # scenes
SHOWN = 6  # of them, in the picture: the first ones, not the best ones


def run(steps: int, device: torch.device, out: Path, seed: int) -> None:
    """Prints what it finds and saves the picture to ``out``."""
    # Imported here, because the measuring processes import this package too and need nothing of it but `measure`.
    from tqdm import tqdm

    from fastfocal import FastFocalLoss

    from . import measure, picture, style
    from .detector import NUM_ANCHORS, STRIDES
    from .scenes import NUM_CLASSES, SceneMaker
    from .train import Data, evaluate, new_model, plain_loss, plain_loss_in_float64, train

    started = time.perf_counter()
    where = describe(device)
    print_build(where)

    fast_loss = FastFocalLoss(NUM_CLASSES)
    # The same algorithms in every run, and no rounding of float32 inputs to TF32: both would blur the comparison.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        data = Data(seed, steps, device)
        model = new_model(seed, device)
        size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        print(f"  detector   {size}, {len(STRIDES)} levels, {NUM_ANCHORS} anchors per cell, {NUM_CLASSES} classes")

        answers = [
            measure.gradient_question(model, data.batch(0), fast_loss, NUM_CLASSES, dtype)
            for dtype in tqdm((torch.float32, torch.float64), desc="comparing gradients", leave=False)
        ]
        print_gradients(answers, len(STRIDES))

        print(f"\nTraining twice from seed {seed}: same weights, same batches, same order", flush=True)
        plain = train(plain_loss(NUM_CLASSES), data, seed, steps, "  plain, per level")
        fast = train(fast_loss, data, seed, steps, "  FastFocalLoss   ")
        print("Once more with other rounding, to see how far that alone drives two trainings apart", flush=True)
        control = train(plain_loss_in_float64(NUM_CLASSES), data, seed, steps, "  plain, float64  ")
        maker = SceneMaker(seed, held_out=True)
        scenes = [maker(i) for i in tqdm(range(HELD_OUT), desc="composing held-out scenes", leave=False)]
        plain_score, _ = evaluate(plain.model, scenes, device, "detecting, plain loss")
        fast_score, detections = evaluate(fast.model, scenes, device, "detecting, FastFocalLoss")
    begin = min(20, steps)
    difference, rounding = ((plain.curve - other.curve).abs() for other in (fast, control))
    print(f"  focal loss from {plain.curve[0].item():.3f} to {plain.curve[-begin:].mean().item():.3f}")
    print_row("  largest difference of two curves", f"first {begin} steps", f"all {steps} steps")
    for name, values in (("    plain and FastFocalLoss", difference), ("    plain and plain in float64", rounding)):
        print_row(name, f"{values[:begin].max().item():.1e}", f"{values.max().item():.1e}")

    logits = measure.IMAGES * measure.ANCHORS * measure.CLASSES * sum(h * w for h, w in measure.LEVELS)
    print(
        f"\nLoss + backward down to the logits at 800x1344, P3-P7, N=2, A=9, K=80, float32: {logits / 1e6:.1f} M logits"
    )
    costs = {}
    for kind in tqdm(measure.KINDS, desc="  measuring", leave=False):
        costs[kind] = measure.cost(kind, device, seed)

    columns = list(costs.values())
    print_row("", "plain, per level", "FastFocalLoss", "FastFocalLoss, in place")
    print_row("  time (median)", *against_first([c.median for c in columns], style.milliseconds))
    print_row("  repeats", *(str(len(c.seconds)) for c in columns))
    print_row("  memory, extra at the peak", *against_first([c.memory for c in columns], style.mebibytes))
    for kind, c in costs.items():
        if c.failure:
            print(f"  ({kind}: {c.failure})")
    print(f"\nDetections in {HELD_OUT} held-out scenes")
    print_row("  recall (right class, IoU >= 0.5)", f"{plain_score.recall:.1%}", f"{fast_score.recall:.1%}")
    print_row("  precision", f"{plain_score.precision:.1%}", f"{fast_score.precision:.1%}")

    picture.draw(plain, fast, rounding.max().item(), costs, scenes[:SHOWN], detections[:SHOWN], fast_score, where, out)
    print(f"\nPicture: {out}   ({time.perf_counter() - started:.0f} s in all)")


def print_build(where: str) -> None:
    from fastfocal import build_info

    info = build_info()
    cuda = f"toolkit {info['cuda']} for {' '.join(info['cuda_archs'])}" if info["cuda"] else "not compiled in"
    print(f"fastfocal {info['version']}")
    print(
        f"  torch      {info['torch']} (compiled with the headers of {info['torch_built_for']}, compiler {info['compiler']})"
    )
    print(f"  kernels    CPU: {info['cpu_capability']}; CUDA: {cuda}")
    print(f"  device     {where}")


def print_gradients(answers: list[GradientAnswer], levels: int) -> None:
    print(
        "\nOne backward() for each level, or one for all? The largest difference over every parameter's .grad from one"
    )
    print("backward() of the plain losses' sum, relative to the largest gradient:")
    print_row("", *(str(a.dtype).removeprefix("torch.") for a in answers))
    print_row(f"  plain, {levels} x backward(retain_graph=True)", *(f"{a.per_level:.1e}" for a in answers))
    print_row("  FastFocalLoss, 1 x backward()", *(f"{a.fast:.1e}" for a in answers))
    print("  The same gradient, up to rounding.")


def against_first(values: Sequence[float | None], text: Callable[[float], str]) -> list[str]:
    """Each value in words, and how many times it goes into the first one."""
    first = values[0]
    cells = ["not measured" if value is None else text(value) for value in values]
    for i, value in enumerate(values[1:], start=1):
        if first and value:
            cells[i] += f" ({first / value:,.{0 if first >= 10 * value else 1}f}x less)"
    return cells


def print_row(name: str, *cells: str) -> None:
    print(f"{name:40}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (18, 20, 26), strict=False)))


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    threads = torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
