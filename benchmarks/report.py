"""A table and plots from what pytest-benchmark saved.

pytest --benchmark-only --benchmark-json=saved.json
python -m benchmarks.report saved.json [more.json ...] [--out benchmarks/results]

Beside them it writes data.json, from which it draws and writes all of it again:

python -m benchmarks.report benchmarks/results/data.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfocal.demo import style

EAGER = "eager_per_level"
LABELS = {
    "fastfocal": style.FAST_NAME,
    "fastfocal focal_loss": "focal_loss, the same kind of targets",
    "copy": "copy of the logits",
    "copy_into": "copy into memory in use",
    "mul_": "mul_ in place",
    "operators": "FastFocalLoss, its operators alone",
    "reference": "fastfocal.reference",
    EAGER: style.PLAIN_NAME,
    "eager_concatenated": "plain loss, levels concatenated",
    "compile_per_level": "torch.compile, level by level",
    "compile_per_level_max_autotune": "torch.compile, max-autotune",
    "compile_concatenated": "torch.compile, levels concatenated",
    "torchvision": "torchvision.ops, levels concatenated",
    "triton": "Triton, one pass",
    "triton_graph": "Triton, one pass (CUDA graph)",
    "fastfocal_graph": "FastFocalLoss (CUDA graph)",
    "copy_graph": "copy of the logits (CUDA graph)",
}
FRESH = "blocks of more than 1 MiB are fresh in cases of 32 MiB and more"
KEPT = "malloc keeps what is released (`--keep-memory`)"
NOISY = 0.2  # interquartile range over median, from which on a row is marked


@dataclass(frozen=True)
class Result:
    """One row of one group."""

    group: str
    row: str
    seconds: float  # median
    spread: float  # interquartile range over median
    rounds: int
    info: dict[str, Any]

    @property
    def label(self) -> str:
        loss = self.info.get("loss", "focal_loss")
        return (
            f"fastfocal.{loss}" if self.row == "fastfocal" and loss != "focal_loss" else LABELS.get(self.row, self.row)
        )

    @property
    def gigabytes_per_second(self) -> float:
        return self.info["bytes_moved"] / self.seconds / 1e9

    @property
    def host_seconds(self) -> float | None:
        """Of the host for a call, on a GPU, where `seconds` are the device's."""
        return self.info.get("host_seconds")

    @property
    def extra_mib(self) -> float | None:
        extra = self.info["peak_extra_bytes"]
        return None if extra is None else extra / 2**20

    @property
    def problem(self) -> tuple[Any, ...]:
        """What an implementation without grad modes computes."""
        names = ("pyramid", "dtype", "layout", "gamma", "targets", "form", "threads", "loss")
        return tuple(self.info.get(name, "focal_loss") for name in names)  # older runs know one loss


@dataclass(frozen=True)
class Report:
    results: list[Result]
    facts: dict[str, Any]
    commit: str
    date: str

    def groups(self, *sections: str) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = {}
        for result in self.results:
            if result.info["section"] in sections:
                found.setdefault(result.group, []).append(result)
        return found

    def copies(self, result: Result) -> float:
        """Times the copy that was timed between the row's own rounds; for a CUDA graph, that of the row `copy_graph`."""
        if result.row.endswith("_graph"):
            graph = [r for r in self.results if r.group == result.group and r.row == "copy_graph"]
            if graph:
                return result.seconds / graph[0].seconds
        return result.seconds / result.info["copy_seconds"]

    def eagers(self, result: Result) -> float | None:
        """How many times as long the eager loop over levels takes for the same problem."""
        eager = [r for r in self.results if r.row == EAGER and r.problem == result.problem]
        same_group = [r for r in eager if r.group == result.group]
        chosen = (same_group or eager)[:1]
        return chosen[0].seconds / result.seconds if chosen else None

    @property
    def threads(self) -> int:
        return int(self.facts["threads"])

    @property
    def caption(self) -> str:
        facts = self.facts
        where = f"{facts['cpu_name']} ({facts['cpu_capability']}), {facts['threads']} threads"
        if facts["gpu"]:
            where = f"{facts['gpu']}, CUDA {facts['cuda']}"
        elif facts.get("keep_memory"):
            where += ", malloc keeps memory"
        return f"{where} · torch {facts['torch']} · fastfocal {facts['version']} · commit {self.commit} · {self.date}"


def load(paths: list[Path]) -> Report:
    """One run, or several on the same machine; the facts are the first one's."""
    runs = [json.loads(path.read_text()) for path in paths]
    machines = {run["machine_info"]["fastfocal"]["gpu"] or run["machine_info"]["fastfocal"]["cpu_name"] for run in runs}
    if len(machines) > 1:
        raise SystemExit(f"these runs are of different machines: {', '.join(sorted(machines))}")
    saved = runs[0]
    results = [
        Result(
            bench["group"],
            bench["extra_info"]["row"],
            bench["stats"]["median"],
            bench["stats"]["iqr"] / bench["stats"]["median"],
            bench["stats"]["rounds"],
            bench["extra_info"],
        )
        for run in runs
        for bench in run["benchmarks"]
        if "row" in bench["extra_info"]
    ]
    commit = saved["commit_info"]
    name = (commit.get("id") or "unknown")[:10] + (" + changes" if commit.get("dirty") else "")
    return Report(results, saved["machine_info"]["fastfocal"], name, saved["datetime"][:10])


# --- the table ----------------------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.2f}"


def table(report: Report, results: list[Result]) -> Iterator[str]:
    on_device = any(r.host_seconds is not None for r in results)
    host = " host |" if on_device else ""
    yield f"| implementation | time |{host} x copy | faster than plain | GB/s | peak extra MiB |"
    yield f"|---|--:|{'--:|' if on_device else ''}--:|--:|--:|--:|"
    for r in sorted(results, key=lambda r: r.seconds):
        name = f"**{r.label}**" if r.row == "fastfocal" else r.label
        mark = (" ~" if r.spread > NOISY else "") + (" h" if r.info.get("host_bound") else "")
        memory = "" if r.extra_mib is None else f"{r.extra_mib:.4g}" if r.extra_mib >= 1 else f"{r.extra_mib:.2f}"
        faster = ratio_text(report.eagers(r))
        cells = [
            name,
            time_text(r.seconds) + mark,
            *([time_text(r.host_seconds) if r.host_seconds else ""] if on_device else []),
            ratio_text(report.copies(r)),
            faster,
            f"{r.gigabytes_per_second:.3g}",
            memory,
        ]
        yield f"| {' | '.join(cells)} |"


def markdown(report: Report, pictures: list[str]) -> Iterator[str]:
    facts = report.facts
    yield "# Benchmark results\n"
    yield f"{report.caption}\n"
    flags = " ".join(facts["cpu_flags"])
    yield f"* CPU: {facts['cpu_name']}, {facts['cores']} cores, {facts['threads']} threads; {flags}"
    yield f"* fastfocal {facts['version']}: instruction set {facts['cpu_capability']}, compiler {facts['compiler']}"
    yield f"* torch {facts['torch']}, Python {facts['python']}"
    if facts["gpu"]:
        capability = ".".join(map(str, facts["gpu_capability"]))
        yield f"* GPU: {facts['gpu']} (compute capability {capability}), CUDA {facts['cuda']}"
    if not facts["gpu"]:
        yield f"* memory: {KEPT if facts.get('keep_memory') else FRESH}"
    if facts["load_average"] is not None:
        yield f"* load average at the end of the run: {facts['load_average']:.1f}"
    yield "\nMedians; `~` marks an interquartile range above a fifth of the median. benchmarks/README.md has the method.\n"
    if facts["gpu"]:
        yield "Times are the GPU's; `host` is what a call takes of the host, which goes on meanwhile. `h` marks rows with more"
        yield "kernels than can be enqueued beforehand: there the GPU may have waited for the host.\n"
    for picture in pictures:
        yield f"![{picture.removesuffix('.png')}]({picture})\n"
    for group, results in report.groups("main", "large", "small", "scaling", "levels", "losses").items():
        yield f"## {group}\n"
        yield from table(report, results)
        yield ""


# --- plots --------------------------------------------------------------------------------------------------------


def pyramid_in_words(name: str) -> str:
    """ "P3-P7 800x1344 N=2 K=80" as a reader who has not seen the benchmarks would say it."""
    match = re.fullmatch(r"P3-P7 (\d+)x(\d+) N=(\d+) K=(\d+)", name)
    if match is None:
        return name
    height, width, images, classes = match.groups()
    images = "one image" if images == "1" else f"{images} images"
    return f"five FPN levels (P3–P7) of {images} of {height} × {width}, {classes} classes"


def options_in_words(info: dict[str, Any], threads: int) -> list[str]:
    """What a case computes beside the pyramid, the ordinary left out."""
    words = [info["dtype"], {"nchw": "NCHW", "flattened": "flattened (N, M, K)"}.get(info["layout"], info["layout"])]
    words += [f"gamma = {info['gamma']:g}"] if info["gamma"] != 2 else []
    words += ["soft targets"] if info["targets"] == "soft" else []
    words += ["weights for anchors"] if info["form"] == "weighted" else []
    words += ['reduction="none"'] if info["form"] == "unreduced" else []
    own = "recompute" if info["form"] == "unreduced" or info["dtype"] == "float16" else "save"  # what "auto" is
    words += [f'grad_mode="{info["grad_mode"]}"'] if info["grad_mode"] != own else []
    words += [f"{info['threads']} thread{'s' if info['threads'] > 1 else ''}"] if info["threads"] != threads else []
    return words


def marker_of(row: str) -> dict[str, Any]:
    """A row's mark: ours filled teal, others filled grey, copies an outline."""
    if row.startswith(("fastfocal", "operators")):
        return {"color": style.FAST, "marker": "o"}
    if row.startswith(("copy", "mul_")):
        return {"color": style.PLAIN, "marker": "s", "markerfacecolor": "white", "markeredgewidth": 1.8}
    return {"color": style.PLAIN, "marker": "o"}


def new_figure(report: Report, title: str, subtitle: str, width: float, height: float) -> tuple[Any, Any]:
    """A title that says what is shown, one quiet line that says of what, and at the foot where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    inch = 1 / height
    figure.text(0.02, 1 - 0.34 * inch, title, size=15, weight="bold", va="center")
    figure.text(0.02, 1 - 0.68 * inch, subtitle, size=10.5, color=style.QUIET, va="center")
    figure.text(0.02, 0.18 * inch, report.caption, size=8, color=style.QUIET, va="center")
    return figure, figure.add_axes((0.09, inch, 0.87, 1 - 2.05 * inch))


def points_on_a_log_axis(axes: Any, rows: list[tuple[str, float, str, dict[str, Any]]], unit: str) -> None:
    """(name, value, text, mark) each. A log axis has no zero for a bar to start from, so a row is a point on a line."""
    values = [row[1] for row in rows]
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 2, high * max(5, (high / low) ** 0.25))  # room for the texts
    for y, (_, value, text, mark) in enumerate(rows):
        axes.axhline(y, color=style.GRID, linewidth=1, zorder=0)
        axes.plot([value], [y], markersize=11, linestyle="none", **mark)
        annotate(axes, text, (value, y), 11)
    name_rows(axes, rows, unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="x")


def bars(axes: Any, rows: list[tuple[str, float, str, dict[str, Any]]], unit: str) -> None:
    """(name, value, text, mark) each, on an axis that starts at zero."""
    for y, (_, value, text, mark) in enumerate(rows):
        outline = "markerfacecolor" in mark
        look = {"facecolor": "white", "edgecolor": mark["color"], "linewidth": 1.5} if outline else {}
        axes.barh(y, value, height=0.62, **(look or {"color": mark["color"]}))
        annotate(axes, text, (value, y), 7)
    axes.set_xlim(0, max(row[1] for row in rows) * 1.4 or 1)
    name_rows(axes, rows, unit)


def annotate(axes: Any, text: str, point: tuple[float, float], points: float, **look: Any) -> None:
    """Words to the right of a point, on white, so that no line goes through them."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    words = {"va": "center", "size": 10.5, "bbox": box, "annotation_clip": False, **look}
    axes.annotate(text, point, (points, 0), textcoords="offset points", **words)


def name_rows(axes: Any, rows: list[tuple[str, float, str, dict[str, Any]]], unit: str) -> None:
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], size=11)
    ours = [row[3]["color"] == style.FAST for row in rows]
    for label, of_ours in zip(axes.get_yticklabels(), ours, strict=True):
        if of_ours and not all(ours):
            label.set(weight="bold", color=style.FAST)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=10)
    axes.set_xlabel(unit, size=10.5, color=style.QUIET)
    # The axis begins where the longest name ends.
    renderer = axes.figure.canvas.get_renderer()
    widest = max(label.get_window_extent(renderer).width for label in axes.get_yticklabels())
    box = axes.get_position()
    left = 0.02 + (widest / axes.figure.dpi + 0.1) / axes.figure.get_figwidth()
    axes.set_position((left, box.y0, box.x1 - left, box.height))


def largest_group(report: Report) -> str | None:
    """The group in which all implementations are."""
    groups = report.groups("main", "large")
    return max(groups, key=lambda name: len(groups[name])) if groups else None


def subtitle_of(report: Report, result: Result) -> str:
    words = ", ".join([pyramid_in_words(result.info["pyramid"]), *options_in_words(result.info, report.threads)])
    return words[:1].upper() + words[1:]


def plot_times(report: Report, out: Path) -> Path | None:
    """Time by implementation, of the group in which all of them are."""
    group = largest_group(report)
    if group is None:
        return None
    results = sorted(report.groups("main", "large")[group], key=lambda r: r.seconds)
    figure, axes = new_figure(
        report, "Time of the loss and its gradient", subtitle_of(report, results[0]), 10, 2.2 + 0.4 * len(results)
    )
    rows = []
    for r in results:
        text = style.seconds(r.seconds)
        eagers = report.eagers(r)
        if eagers and r.row.startswith("fastfocal"):
            text += f"   {style.ratio(eagers)} faster than the plain loss"
        rows.append((r.label, r.seconds * 1e3, text, marker_of(r.row)))
    points_on_a_log_axis(axes, rows, "milliseconds, log scale")
    return save(figure, out / "times.png")


def plot_cases(report: Report, out: Path) -> Path | None:
    """fastfocal against a copy of the same logits, case by case."""
    results = [r for r in report.results if r.row == "fastfocal" and r.info["section"] in ("main", "large")]
    if not results:
        return None
    pyramids = {r.info["pyramid"]: pyramid_in_words(r.info["pyramid"]) for r in results}
    several = len(pyramids) > 1
    subtitle = "several pyramids" if several else pyramids[results[0].info["pyramid"]]
    subtitle = subtitle[:1].upper() + subtitle[1:]
    title = "FastFocalLoss beside a copy of the same logits"
    figure, axes = new_figure(report, title, subtitle, 10, 2.2 + 0.36 * len(results))
    rows = []
    for r in results:
        words = options_in_words(r.info, report.threads)
        if several:
            words.insert(0, r.info["pyramid"])
        copies = report.copies(r)
        text = f"{copies:.2f}   ({style.seconds(r.seconds)})"
        rows.append((", ".join(words), copies, text, marker_of(r.row)))
    bars(axes, rows, "time of the loss and its gradient over that of the copy, same dtype and threads")
    axes.axvline(1, color=style.QUIET, linewidth=1.2, linestyle="--")
    annotate(axes, "the copy", (1, -0.35), 4, color=style.QUIET, size=10)
    axes.set_xlim(0, max(1.18, axes.get_xlim()[1]))
    return save(figure, out / "cases.png")


def plot_scaling(report: Report, out: Path) -> Path | None:
    """Time against the number of logits, on log axes; a line for each dtype, as they are different work."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in report.results:
        if r.info["section"] == "scaling":
            series.setdefault((r.row, r.info["dtype"]), []).append((r.info["logits"], r.seconds * 1e3))
    if not series:
        return None
    dtypes = list(dict.fromkeys(sorted((dtype for _, dtype in series), key=lambda d: d != "float32")))
    subtitle = "Five levels; logits of all levels together"
    if len(dtypes) > 1:
        subtitle += f". Solid: {dtypes[0]}; dashed: {', '.join(dtypes[1:])}"
    figure, axes = new_figure(report, "Time of the loss and its gradient, by the number of logits", subtitle, 10, 6)
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, box.width - 0.13, box.height))
    for (row, dtype), points in series.items():
        points.sort()
        first = dtype == dtypes[0]
        axes.loglog(
            *zip(*points, strict=True),
            **marker_of(row),
            linestyle="-" if first else "--",
            linewidth=2,
            markersize=7,
        )
        # Names stand at the lines' ends, where there is one for each row: at the dtype that reaches farthest.
        if max(points) == max(p for (other, _), ps in series.items() if other == row for p in ps):
            ours = row == "fastfocal"
            look = {"color": style.FAST if ours else style.QUIET, "weight": "bold" if ours else "normal"}
            annotate(axes, LABELS.get(row, row), points[-1], 11, **look)
    axes.grid(True, which="major")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.tick_params(labelsize=10)
    axes.set_xlabel("logits", size=10.5, color=style.QUIET)
    axes.set_ylabel("milliseconds", size=10.5, color=style.QUIET)
    return save(figure, out / "scaling.png")


def plot_memory(report: Report, out: Path) -> Path | None:
    """Peak extra memory by implementation, of the group in which all of them are, with fastfocal's in-place mode."""
    group = largest_group(report)
    if group is None:
        return None
    results = [r for r in report.groups("main", "large")[group] if r.extra_mib is not None]
    problem = results[0].problem if results else ()
    labels = {(r.group, r.row): r.label for r in results}
    for r in report.results:
        in_place = r.row == "fastfocal" and r.info["grad_mode"] == "inplace"
        if in_place and r.problem == problem and r.extra_mib is not None:
            results.append(r)
            labels[r.group, r.row] = style.IN_PLACE_NAME
    if not results:
        return None
    results.sort(key=lambda r: r.extra_mib or 0.0)
    size = results[0].info["logits"] * {"float32": 4, "float64": 8}.get(results[0].info["dtype"], 2) / 2**20
    figure, axes = new_figure(
        report,
        "Memory the loss and its gradient need, at the peak",
        f"Beyond the logits, which take {size:.0f} MiB, and the labels; {pyramid_in_words(results[0].info['pyramid'])}",
        10,
        2.2 + 0.4 * len(results),
    )
    rows = []
    for r in results:
        mib = r.extra_mib or 0.0
        rows.append((labels[r.group, r.row], mib, style.mebibytes(mib * 2**20), marker_of(r.row)))
    bars(axes, rows, "MiB")
    return save(figure, out / "memory.png")


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path


# --- the data -----------------------------------------------------------------------------------------------------


def data(paths: list[Path]) -> str:
    """The runs without what the report does not read: a file as pytest-benchmark's, small enough to be committed."""
    runs = [json.loads(path.read_text()) for path in paths]
    first = runs[0]
    kept = {
        "machine_info": {"fastfocal": first["machine_info"]["fastfocal"]},
        "commit_info": {key: first["commit_info"].get(key) for key in ("id", "dirty")},
        "datetime": first["datetime"],
    }
    benchmarks = [
        {
            "group": bench["group"],
            "stats": {key: bench["stats"][key] for key in ("median", "iqr", "rounds")},
            "extra_info": bench["extra_info"],
        }
        for run in runs
        for bench in run["benchmarks"]
        if "row" in bench["extra_info"]
    ]
    lines = ",\n".join(json.dumps(bench) for bench in benchmarks)
    return json.dumps(kept)[:-1] + f', "benchmarks": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("saved", type=Path, nargs="+", help="files that pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    report = load(arguments.saved)
    if not report.results:
        parser.error(f"{', '.join(map(str, arguments.saved))}: no results of these benchmarks")
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = data(arguments.saved)  # read before it is written: it may be the file that was named
    (arguments.out / "data.json").write_text(kept)
    paths = plot(report, arguments.out)
    text = "\n".join(markdown(report, [path.name for path in paths]))
    (arguments.out / "report.md").write_text(text)
    for path in [*paths, arguments.out / "report.md", arguments.out / "data.json"]:
        print(path)


def plot(report: Report, out: Path) -> list[Path]:
    import matplotlib

    with matplotlib.rc_context(style.RC):
        drawn = [draw(report, out) for draw in (plot_times, plot_cases, plot_scaling, plot_memory)]
    return [path for path in drawn if path is not None]


if __name__ == "__main__":
    main()
