"""The demo's picture: training curves, time and memory, detections on held-out scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from . import style
from .measure import CLASSES, IMAGES, Cost
from .scenes import SIZE, Scene
from .style import FAST, FOUND, IN_PLACE, PLAIN, QUIET, WRONG
from .train import Detection, Score, Trained, found

NAME_WIDTH, NAME_HEIGHT = 5, 7  # of a class name, in pixels of a scene
COLOURS = {"plain": PLAIN, "fast": FAST, "inplace": IN_PLACE}
NAMES = {"plain": style.PLAIN_NAME, "fast": style.FAST_NAME, "inplace": style.IN_PLACE_NAME}


def draw(
    plain: Trained,
    fast: Trained,
    rounding: float,
    costs: dict[str, Cost],
    scenes: Sequence[Scene],
    detections: Sequence[Detection],
    score: Score,
    where: str,
    out: Path,
) -> None:
    """Draws everything and saves it; the format is that of the name's ending.

    ``rounding``: how far another rounding of the plain loss drives its training curve from itself, at most.
    """
    columns = len(scenes)
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(16, 8.4), dpi=100, facecolor="white")
        top = figure.add_gridspec(
            1, 3, left=0.05, right=0.975, top=0.85, bottom=0.475, wspace=0.42, width_ratios=(1.2, 1, 1)
        )
        bottom = figure.add_gridspec(1, columns, left=0.02, right=0.98, top=0.325, bottom=0.015, wspace=0.04)
        figure.text(0.02, 0.945, "fastfocal: one focal loss over every FPN level", size=21, weight="bold")
        figure.text(0.98, 0.948, where, size=12, color=QUIET, ha="right")
        _curves(figure.add_subplot(top[0]), plain, fast, rounding)
        size = f"{IMAGES} images of 800 × 1344, {CLASSES} classes"
        _bars(
            figure.add_subplot(top[1]),
            "Time of the loss and its gradient",
            {kind: cost.median for kind, cost in costs.items()},
            style.milliseconds,
            "faster",
            size,
        )
        _bars(
            figure.add_subplot(top[2]),
            "Memory needed, at the peak",
            {kind: cost.memory for kind, cost in costs.items()},
            style.mebibytes,
            "less",
            size,
        )
        figure.text(0.02, 0.352, "Held-out scenes, trained with FastFocalLoss", size=15, weight="bold")
        figure.legend(
            handles=[Patch(color=FOUND, label="right"), Patch(color=WRONG, label="wrong, or missed (dotted)")],
            loc="center left",
            bbox_to_anchor=(0.345, 0.358),
            ncols=2,
            frameon=False,
            handlelength=0.9,
            handleheight=0.9,
        )
        summary = f"recall {score.recall:.0%}, precision {score.precision:.0%} (right class, IoU ≥ 0.5)"
        figure.text(0.98, 0.352, summary, size=13, color=QUIET, ha="right")
        for column, (scene, detection) in enumerate(zip(scenes, detections, strict=True)):
            _scene(figure.add_subplot(bottom[column]), scene, detection)
        figure.savefig(out)


def _curves(axes: Axes, plain: Trained, fast: Trained, rounding: float) -> None:
    steps = torch.arange(1, len(plain.curve) + 1)
    axes.plot(
        steps,
        plain.curve,
        color=PLAIN,
        linewidth=6,
        alpha=0.55,
        label=style.PLAIN_NAME,
        solid_capstyle="round",
    )
    axes.plot(steps, fast.curve, color=FAST, linewidth=1.6, label=style.FAST_NAME)
    axes.set_title("Training from one seed")
    axes.set_xlabel("step")
    axes.set_ylabel("focal loss")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(axis="y")
    difference = (plain.curve - fast.curve).abs().max().item()
    words = f"largest difference {difference:.2g}\nby rounding alone {rounding:.2g}"
    axes.text(0.97, 0.63, words, transform=axes.transAxes, ha="right", va="top", color=QUIET, linespacing=1.4)
    axes.legend(loc="upper right")


def _bars(
    axes: Axes, title: str, values: dict[str, float | None], text: Callable[[float], str], better: str, size: str
) -> None:
    plain = values["plain"]
    longest = max((v for v in values.values() if v is not None), default=0) or 1
    for row, (kind, value) in enumerate(values.items()):
        if value is None:
            axes.text(0, row, " not measured", va="center", color=QUIET)
            continue
        axes.barh(row, value, height=0.6, color=COLOURS[kind])
        inside = value > 0.5 * longest
        words = text(value)
        if kind != "plain" and plain and value > 0:
            words += f"   {style.ratio(plain / value)} {better}"
        axes.annotate(
            words,
            (value, row),
            xytext=(-8 if inside else 8, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else "black",
            weight="bold",
            size=14,
        )
    axes.set_xlim(0, longest)
    axes.set_yticks(range(len(values)), [NAMES[kind].replace(", ", ",\n") for kind in values])
    axes.invert_yaxis()
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title)
    axes.set_xlabel(size, color=QUIET, loc="left", labelpad=10)


def _place_of_name(box: list[float], taken: list[list[float]]) -> list[float]:
    """A place beside ``box`` that is free, if there is one; else its left top corner."""
    x1, y1, x2, y2 = box
    above, right = y1 - NAME_HEIGHT, x2 - NAME_WIDTH
    for x, y in ((x1, above), (right, above), (x1, y2), (right, y2), (x2, y1), (x1 - NAME_WIDTH, y1)):
        place = [x, y, x + NAME_WIDTH, y + NAME_HEIGHT]
        apart = (place[2] <= t[0] or t[2] <= x or place[3] <= t[1] or t[3] <= y for t in taken)
        if min(place) >= 0 and max(place) <= SIZE and all(apart):
            return place
    return [x1, y1, x1 + NAME_WIDTH, y1 + NAME_HEIGHT]


def _scene(axes: Axes, scene: Scene, detection: Detection) -> None:
    boxes, classes, _ = detection
    hits = found(scene, detection)
    # Enlarged smoothly: a scene is only SIZE pixels wide.
    axes.imshow(scene.image, interpolation="lanczos", extent=(0, SIZE, SIZE, 0))
    taken = boxes.tolist()
    for d, box in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = box
        colour = FOUND if hits[:, d].any() else WRONG
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2.5))
        place = _place_of_name(box, taken[:d] + taken[d + 1 :])
        taken.append(place)
        axes.text(
            (place[0] + place[2]) / 2,
            (place[1] + place[3]) / 2,
            f"{int(classes[d])}",
            color="black",
            size=11,
            weight="bold",
            ha="center",
            va="center_baseline",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
        )
    for t in range(len(scene.boxes)):
        if not hits[t].any():
            x1, y1, x2, y2 = scene.boxes[t].tolist()
            missed = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=WRONG, linewidth=2, linestyle=":")
            axes.add_patch(missed)
    axes.set_xlim(0, SIZE)
    axes.set_ylim(SIZE, 0)
    axes.axis("off")
