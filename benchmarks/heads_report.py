"""What is made of heads.json: a table of everything, and the numbers and the picture of docs/many_classes.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.memory import MIB
from fastfocal.demo import style

BASE = "save"
LABELS = {
    "stock": "stock: `torchvision.ops.sigmoid_focal_loss`",
    "save": "`FastFocalLoss`",
    "inplace": '`FastFocalLoss(grad_mode="inplace")`',
    "checkpoint stock": "`torch.utils.checkpoint` of each level, stock",
    "checkpoint": "`torch.utils.checkpoint` of each level, `FastFocalLoss`",
    "fused": "**`fused_with`**",
}
DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- numbers: made by python -m benchmarks.heads --docs -->", "<!-- end of numbers -->"
DRAWN = "512x512-N2-", "-float32"  # what the picture shows: as many images whatever K is


def as_json(data: dict[str, Any]) -> str:
    """A case a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(case)}" for key, case in data["cases"].items())
    head = {key: value for key, value in data.items() if key != "cases"}
    return json.dumps(head)[:-1] + f', "cases": {{\n{lines}\n}}}}\n'


def words(key: str) -> str:
    size, images, anchors, classes, dtype = key.split("-")
    return f"{size.replace('x', ' x ')}, N = {images[1:]}, A = {anchors[1:]}, K = {classes[1:]}, {dtype}"


def classes_of(key: str) -> int:
    return int(key.split("-")[3][1:])


def ratio(case: dict[str, Any], name: str, clock: int) -> float | None:
    """Time over that of FastFocalLoss in the same round, 0: the wall's, 1: the processor's; the median of the rounds."""
    found = [r[name][clock] / r[BASE][clock] for r in case["rounds"] if name in r]
    return statistics.median(found) if found else None


def spread(case: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Least and largest of these ratios, of the wall's clock."""
    found = [r[name][0] / r[BASE][0] for r in case["rounds"] if name in r]
    return (min(found), max(found)) if found else None


def peak_mib(case: dict[str, Any], name: str) -> float | None:
    found = case["peaks"].get(name)
    return None if found is None or found["bytes"] is None else found["bytes"] / MIB


def aimed_mib(case: dict[str, Any]) -> float:
    return float(1.5 * case["gradient_bytes"] / MIB + 100)


def verdicts(key: str, case: dict[str, Any]) -> Iterator[str]:
    """What the fused row misses of its aims."""
    peak, time = peak_mib(case, "fused"), ratio(case, "fused", 0)
    if peak is not None and peak > aimed_mib(case):
        yield f"peak {peak:.0f} MiB, aim {aimed_mib(case):.0f}"
    most = 1.0 if classes_of(key) >= 1000 else 1.05 if classes_of(key) >= 80 else None
    if time is not None and most is not None and time > most:
        yield f"time {time:.2f} x `FastFocalLoss`, aim {most:g}"


def text_of(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def label(name: str, data: dict[str, Any]) -> str:
    if name == "stock" and "torchvision" not in data["where"]:
        return "stock: torchvision's formula"
    return LABELS.get(name, f"`fused_with(..., chunk_bytes={name.split()[-2]} * 2**20)`" if " MiB" in name else name)


# --- results/heads.md -------------------------------------------------------------------------------------------------


def table(data: dict[str, Any]) -> Iterator[str]:
    yield "# The last convolution and the loss together\n"
    yield f"{data['where']} · `python -m benchmarks.heads`\n"
    yield "Features to gradients of features, weight and bias; 256 channels, 3x3, P3-P7. Times over those of `FastFocalLoss`"
    yield "after the convolution, medians of rounds in which each row ran once; in brackets the least and the largest. Peak"
    yield "extra memory: each row in a process of its own. [benchmarks/README.md](../README.md#fused-heads) has the method.\n"
    missed = [f"* {words(key)}: {verdict}" for key, case in data["cases"].items() for verdict in verdicts(key, case)]
    yield "Aims of `fused_with`: peak at most 1.5 x gradients + 100 MiB; time at most 1.05 from K = 80 on, less than 1 from"
    yield "K = 1000 on. Missed:\n" if missed else "K = 1000 on. None is missed in what was measured.\n"
    yield from [*missed, ""] if missed else []
    for key, case in data["cases"].items():
        yield f"## {words(key)}\n"
        base = [r[BASE][0] for r in case["rounds"]]
        seconds = f", `FastFocalLoss` {statistics.median(base):.3g} s" if base else ""
        load = f", load average {min(case['load']):g} to {max(case['load']):g}" if case["load"] else ""
        gradients = f"Gradients {case['gradient_bytes'] / MIB:.0f} MiB, aim {aimed_mib(case):.0f} MiB"
        yield f"{gradients}; {len(base)} rounds{seconds}{load}.\n"
        yield "| | peak extra MiB | time | of processor time |\n|---|--:|--:|--:|"
        names = dict.fromkeys([*case["peaks"], *(name for r in case["rounds"] for name in r)])
        for name in names:
            near = spread(case, name)
            between = "" if near is None or name == BASE else f" ({near[0]:.2f} - {near[1]:.2f})"
            time = text_of(ratio(case, name, 0), 2) + between
            yield f"| {label(name, data)} | {text_of(peak_mib(case, name), 0)} | {time} | {text_of(ratio(case, name, 1), 2)} |"
        for name, why in case["left_out"].items():
            yield f"| {label(name, data)} | left out: {why} | | |"
        yield ""
    if data["tensor_bytes"]:
        yield "## Tensors alone\n"
        yield "Bytes of the tensors that live at once, at their most, as PyTorch's dispatcher sees them made and released:"
        yield "what a GPU would hold, beside the convolution's workspaces. Counted over tensors without memory; `--bytes`.\n"
        yield from bytes_table(data)


def bytes_table(data: dict[str, Any]) -> Iterator[str]:
    yield "| MiB | stock | `FastFocalLoss` | in place | fused |\n|---|--:|--:|--:|--:|"
    for key, found in data["tensor_bytes"].items():
        cells = " | ".join(f"{found[name] / MIB:,.0f}" for name in ("stock", "save", "inplace", "fused"))
        yield f"| {words(key)} | {cells} |"


def write_table(data: dict[str, Any], path: Path) -> None:
    path.write_text("\n".join(table(data)).rstrip() + "\n")


# --- docs/many_classes.md ---------------------------------------------------------------------------------------------

COLUMNS = ("stock", "checkpoint stock", "save", "inplace", "fused")


def numbers(data: dict[str, Any], out: Path, picture: str | None) -> Iterator[str]:
    """Between the two comments of the page."""
    results = f"../benchmarks/{out.name}"
    if picture is not None:
        yield f"![Peak memory against the number of classes]({picture})\n"
    yield f"{data['where']}. Peak memory of forward and backward from features to gradients, in MiB; *checkpoint* is"
    yield "`torch.utils.checkpoint` around convolution and stock loss of each level. The time is that of `fused_with` over that"
    yield f"of `FastFocalLoss` after an ordinary convolution ([every row]({results}/heads.md)).\n"
    yield "| | gradients alone | stock | checkpoint | `FastFocalLoss` | in place | fused | time |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for key, case in data["cases"].items():
        peaks = [text_of(peak_mib(case, name), 0) for name in COLUMNS]
        cells = [text_of(case["gradient_bytes"] / MIB, 0), *peaks, text_of(ratio(case, "fused", 0), 2)]
        yield f"| {words(key)} | {' | '.join(cells)} |"
    if any(case["left_out"] for case in data["cases"].values()):
        yield "\nAn empty cell did not fit into the machine's memory."
    if data["tensor_bytes"]:
        yield "\nThe tensors alone, as a GPU would hold them beside the convolution's workspaces (counted, not run on one):\n"
        yield from bytes_table(data)
    for path in sorted(out.glob("torchvision_training_*_K*.json")):
        run = json.loads(path.read_text())
        peaks = [f"{name} {mib:,.0f} MiB" for name, mib in run["peak_mib"].items() if mib is not None]
        of = f"{run['classes']:,} classes, {run['batch']} images of {run['size']}x{run['size']}"
        yield f"\nThe peak of a step of torchvision's RetinaNet with {of}:"
        yield f"{', '.join(peaks)} ([the run]({results}/{path.stem}.md))."


def write_docs(data: dict[str, Any], out: Path, docs: Path = DOCS) -> None:
    picture = draw(data, docs / "many_classes.png")
    page = docs / "many_classes.md"
    made = "\n".join(numbers(data, out, picture and picture.name))
    old = page.read_text()
    new, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{made}\n\n{END}", old, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{page}: expected the two comments {BEGIN} and {END} once, found them {count} times")
    page.write_text(new)
    print(page, *([picture] if picture else []), sep="\n")


LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("stock loss", {"color": style.PLAIN, "marker": "o"}),
    "checkpoint stock": (
        "checkpoint of each level",
        {"color": style.PLAIN, "marker": "s", "markerfacecolor": "white", "linestyle": "--"},
    ),
    "save": ("FastFocalLoss", {"color": style.FAST, "marker": "o", "markerfacecolor": "white", "linestyle": "--"}),
    "inplace": ("FastFocalLoss, in place", {"color": style.IN_PLACE, "marker": "s"}),
    "fused": ("fused_with the convolution", {"color": style.FAST, "marker": "o", "linewidth": 3}),
}


def draw(data: dict[str, Any], path: Path) -> Path | None:
    """Peak memory against K, on log axes. A = 9; the last K, of A = 1, stands for itself."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = {k: c for k, c in data["cases"].items() if k.startswith(DRAWN[0]) and k.endswith(DRAWN[1])}
    chosen = dict(sorted(chosen.items(), key=lambda item: classes_of(item[0])))
    if not chosen:
        return None
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(10, 6), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.085, 0.16, 0.885, 0.66))
        axes.set_xscale("log")
        axes.set_yscale("log")
        for name, (text, look) in LOOKS.items():
            kept = {"linewidth": 2, "markersize": 7, "zorder": 3 if name == "fused" else 2, **look}
            found = [(classes_of(k), peak_mib(c, name), "-A9-" in k) for k, c in chosen.items()]
            line = [(k, mib) for k, mib, nine in found if nine and mib is not None]
            alone = [(k, mib) for k, mib, nine in found if not nine and mib is not None]
            if line:
                axes.plot(*zip(*line, strict=True), label=text, **kept)
            if alone:
                axes.plot(*zip(*alone, strict=True), **{**kept, "linestyle": "none"})
        gradients = [(classes_of(k), c["gradient_bytes"] / MIB, "-A9-" in k) for k, c in chosen.items()]
        line = [(k, mib) for k, mib, nine in gradients if nine]
        look = {"color": style.QUIET, "linewidth": 1.3, "linestyle": (0, (1, 1.2))}
        if line:
            axes.plot(*zip(*line, strict=True), label="the gradients alone", **look)
        alone = [(k, mib) for k, mib, nine in gradients if not nine]
        if alone:
            axes.plot(*zip(*alone, strict=True), color=style.QUIET, marker="_", markersize=12, linestyle="none")
        ticks = [classes_of(k) for k in chosen]
        axes.set_xticks(
            ticks, [f"{k:,}" if "-A9-" in key else f"{k:,}\n(A = 1)" for k, key in zip(ticks, chosen, strict=True)]
        )
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(axis="y")
        axes.tick_params(labelsize=10)
        axes.set_xlabel("classes", size=10.5, color=style.QUIET)
        axes.set_ylabel("MiB", size=10.5, color=style.QUIET)
        axes.legend(loc="upper left", fontsize=10.5)
        title = "Peak memory of the last convolution and the loss, by the number of classes"
        figure.text(0.02, 0.943, title, size=15, weight="bold", va="center")
        subtitle = (
            "Features to gradients; five FPN levels (P3–P7) of two images of 512 × 512, nine anchors a cell, float32"
        )
        figure.text(0.02, 0.887, subtitle, size=10.5, color=style.QUIET, va="center")
        figure.text(0.02, 0.03, data["where"], size=8, color=style.QUIET, va="center")
        figure.savefig(path)
    return path
