"""A training run of torchvision's RetinaNet, stock and accelerated, from one seed: curve, time and memory of a step.

    pip install ".[demo]" torchvision
    python -m benchmarks.torchvision_training --out benchmarks/results
    python -m benchmarks.torchvision_training --classes 1203 --fuse-head --out benchmarks/results
    python -m benchmarks.torchvision_training --redraw benchmarks/results/torchvision_training_128.json

The data are the digit scenes of `python -m fastfocal`, enlarged; the head has COCO's 91 classes, of which the digits
are the first ten. With --classes each digit stands for every tenth class, at random, so that labels are spread over all of
them. With --fuse-head there is a model more, whose last convolution and loss are computed as one. All models see the same
batches, one step in turn, so that a machine that slows down slows both. The time is that of a whole step: transforms,
forward, losses, backward, optimizer. The memory is the most that a step holds beyond what was there before it.

Training from scratch amplifies every rounding. How much, a third model says: the stock one, its first weights changed by one
rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from benchmarks.machine import describe
from benchmarks.memory import MIB, peak_extra_bytes
from fastfocal.demo import style
from fastfocal.demo.scenes import SceneMaker

CLASSES = 91  # COCO's
FEWEST_STEPS = 60  # of a curve that is drawn: fewer show nothing but its beginning
STOCK, OURS, CONTROL = "stock", "accelerated", "stock, first weights changed by one rounding"
FUSED = "accelerated, fuse_head=True"


def spread(digits: Tensor, classes: int, index: int) -> Tensor:
    """Classes of a scene's digits among `classes`, at random: 3 is 3, 13, 23, ... The same for the same scene."""
    choices = (classes - 1 - digits) // 10 + 1
    chosen = torch.rand(len(digits), generator=torch.Generator().manual_seed(index)) * choices
    return digits + 10 * torch.minimum(chosen.long(), choices - 1)


def batch(
    maker: SceneMaker, first: int, count: int, device: torch.device, spread_over: int | None = None
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    scenes = [maker(first + i) for i in range(count)]
    images = [torch.from_numpy(s.image).permute(2, 0, 1).to(device, torch.float32) / 255 for s in scenes]
    labels = [torch.from_numpy(s.labels) for s in scenes]
    if spread_over is not None:
        labels = [spread(digits, spread_over, first + i) for i, digits in enumerate(labels)]
    targets = [
        {"boxes": torch.from_numpy(s.boxes).to(device), "labels": y.to(device)}
        for s, y in zip(scenes, labels, strict=True)
    ]
    return images, targets


class Trainer:
    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        self.curve: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        device = images[0].device
        started = time.perf_counter()
        self.optimizer.zero_grad()
        losses = self.model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.curve.append(losses["classification"].item())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torchvision_training", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=512, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--classes", type=int, help=f"labels spread over so many; default: {CLASSES} and digits")
    parser.add_argument("--fuse-head", action="store_true", help="also accelerate(model, fuse_head=True)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for torchvision_training_SIZE.md, with --classes torchvision_training_SIZE_KCLASSES.md and .json; "
        f"from {FEWEST_STEPS} steps on also .json and .png",
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="JSON", help="draw the curves of an earlier run, and do nothing else"
    )
    arguments = parser.parse_args()
    if arguments.redraw:
        draw(json.loads(arguments.redraw.read_text()), arguments.redraw.with_suffix(".png"))
        return

    from torchvision.models.detection import retinanet_resnet50_fpn_v2

    from fastfocal.compat.torchvision import accelerate

    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    size = arguments.size
    classes = CLASSES if arguments.classes is None else arguments.classes
    if classes < 10:
        parser.error("--classes: expected at least 10, one for each digit")
    model = retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=classes, min_size=size, max_size=size
    ).to(device)
    off = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in off.parameters():
            parameter.mul_(1 + torch.finfo(torch.float32).eps)
    trainers = {STOCK: Trainer(model, arguments.rate)}
    trainers[OURS] = Trainer(accelerate(copy.deepcopy(model)), arguments.rate)
    if arguments.fuse_head:
        trainers[FUSED] = Trainer(accelerate(copy.deepcopy(model), fuse_head=True), arguments.rate)
    control = Trainer(off, arguments.rate)

    maker = SceneMaker(arguments.seed)
    for index in trange(arguments.steps):
        data = batch(maker, index * arguments.batch, arguments.batch, device, arguments.classes)
        in_turn = list(trainers.values())
        for trainer in in_turn if index % 2 == 0 else reversed(in_turn):
            trainer.step(*data)
        control.step(*data)
    memory: dict[str, list[int]] = {name: [] for name in trainers}
    for _ in range(3):
        for name, trainer in trainers.items():
            used = peak_extra_bytes(lambda trainer=trainer: trainer.step(*data), device)
            memory[name] += [] if used is None else [used]

    curves = {name: trainer.curve[: arguments.steps] for name, trainer in trainers.items()}
    curves[CONTROL] = control.curve
    differences = {name: largest_difference(curves, name) for name in curves if name != STOCK}
    options = ("" if arguments.classes is None else f" --classes {classes}") + " --fuse-head" * arguments.fuse_head
    lines = [
        "# torchvision's RetinaNet, stock and accelerated",
        "",
        describe(device, "torchvision"),
        "",
        f"`python -m benchmarks.torchvision_training --steps {arguments.steps} --size {size} --batch {arguments.batch} "
        f"--rate {arguments.rate} --seed {arguments.seed}{options}`: retinanet_resnet50_fpn_v2 from scratch, "
        f"{classes} classes, "
        f"{arguments.batch} images of {size}x{size}. Load average at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "| | time of a step (median; least) | peak extra memory of a step | classification loss, first and last step |",
        "|---|--:|--:|--:|",
    ]
    for name, trainer in trainers.items():
        seconds = trainer.seconds[1 : arguments.steps]  # the first allocates and compiles
        used = f"{statistics.median(memory[name]) / MIB:.0f} MiB" if memory[name] else "not measured"
        lines.append(
            f"| {name} | {statistics.median(seconds):.3f} s; {min(seconds):.3f} s | {used} | "
            f"{curves[name][0]:.4f}, {curves[name][-1]:.4f} |"
        )
    lines.append("")
    for name in list(trainers)[1:]:
        pairs = zip(*(trainers[t].seconds[1 : arguments.steps] for t in (STOCK, name)), strict=True)
        lines.append(
            f"Saved per step ({name}), median of the pairs: {statistics.median(a - b for a, b in pairs):.3f} s.\n"
        )
    lines.append("Largest relative difference from the stock curve:\n")
    lines += [f"* {name}: {difference:.1e}" for name, difference in differences.items()]
    lines.append(f"\nOne rounding is {torch.finfo(torch.float32).eps:.1e}.")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"torchvision_training_{size}" + ("" if arguments.classes is None else f"_K{classes}")
        run = {"size": size, "batch": arguments.batch, "classes": classes, "where": describe(device, "torchvision")}
        run["peak_mib"] = {n: statistics.median(used) / MIB if used else None for n, used in memory.items()}
        run["curves"] = curves
        if arguments.classes is not None or arguments.steps >= FEWEST_STEPS:
            (arguments.out / f"{name}.json").write_text(json.dumps(run) + "\n")
        if arguments.steps >= FEWEST_STEPS:
            text += f"\n![Training curves]({name}.png)\n"
            draw(run, arguments.out / f"{name}.png")
        (arguments.out / f"{name}.md").write_text(text)


def largest_difference(curves: dict[str, list[float]], name: str) -> float:
    """Of a curve from the stock one, relative to it."""
    return max(abs(a - b) / abs(a) for a, b in zip(curves[STOCK], curves[name], strict=True))


def draw(run: dict[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    curves = run["curves"]
    looks: dict[str, dict[str, Any]] = {
        STOCK: {"color": style.PLAIN, "linewidth": 6, "alpha": 0.55, "solid_capstyle": "round"},
        CONTROL: {"color": style.ATTENTION, "linewidth": 1.3, "linestyle": (0, (1, 1.2))},
        OURS: {"color": style.FAST, "linewidth": 1.6},
        FUSED: {"color": style.IN_PLACE, "linewidth": 1.6, "linestyle": "--"},
    }
    looks = {name: look for name, look in looks.items() if name in curves}
    names = {STOCK: "stock", CONTROL: "stock, first weights off by one rounding", OURS: "accelerated by fastfocal"}
    names[FUSED] = "the same, convolution and loss as one"
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(10, 5.4), dpi=150, facecolor="white")
        axes = figure.add_axes((0.085, 0.185, 0.885, 0.6))
        for name, look in looks.items():
            axes.plot(range(1, len(curves[name]) + 1), curves[name], label=names[name], **look)
        size = run["size"]
        figure.text(0.02, 0.937, "torchvision's RetinaNet, trained from one seed", size=15, weight="bold", va="center")
        of_fused = f"{largest_difference(curves, FUSED):.0%} fused, " if FUSED in curves else ""
        subtitle = (
            f"From scratch on {size} × {size} scenes of digits. Largest difference from stock: "
            f"{largest_difference(curves, OURS):.0%} accelerated, {of_fused}"
            f"{largest_difference(curves, CONTROL):.0%} by rounding alone"
        )
        figure.text(0.02, 0.874, subtitle, size=10.5, color=style.QUIET, va="center")
        figure.text(0.02, 0.033, run["where"], size=8, color=style.QUIET, va="center")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.grid(axis="y")
        axes.tick_params(labelsize=10)
        axes.set_xlabel("step", size=10.5, color=style.QUIET)
        axes.set_ylabel("classification loss", size=10.5, color=style.QUIET)
        handles, labels = axes.get_legend_handles_labels()
        order = [labels.index(names[name]) for name in (STOCK, OURS, FUSED, CONTROL) if name in looks]
        axes.legend([handles[i] for i in order], [labels[i] for i in order], loc="lower left", fontsize=11)
        figure.savefig(path)


if __name__ == "__main__":
    main()
