"""A table and plots from what pytest-benchmark saved.

pytest --benchmark-only --benchmark-json=saved.json
python -m benchmarks.report saved.json [more.json ...] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EAGER = "eager_per_level"
LABELS = {
    "copy": "copy",
    "copy_into": "copy into warm memory",
    "mul_": "mul_ in place",
    "operators": "fastfocal's operators alone",
    "reference": "fastfocal.reference (eager)",
    EAGER: "eager, per level",
    "eager_concatenated": "eager, concatenated",
    "compile_per_level": "torch.compile, per level",
    "compile_per_level_max_autotune": "torch.compile, max-autotune",
    "compile_concatenated": "torch.compile, concatenated",
    "torchvision": "torchvision.ops, concatenated",
    "triton": "Triton, one pass",
    "triton_graph": "Triton, one pass (CUDA graph)",
    "fastfocal_graph": "fastfocal (CUDA graph)",
    "copy_graph": "copy (CUDA graph)",
}
FRESH = "blocks of more than 1 MiB are fresh in cases of 32 MiB and more"
KEPT = "malloc keeps what is released (`--keep-memory`)"
NOISY = 0.2  # interquartile range over median, from which on a row is marked
OURS, FLOOR, OTHERS = "#d1495b", "#8d99ae", "#30638e"


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
        return LABELS.get(self.row, self.row)

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
        return tuple(self.info[k] for k in ("pyramid", "dtype", "layout", "gamma", "targets", "form", "threads"))


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
    yield f"| implementation | time |{host} x copy | faster than eager | GB/s | peak extra MiB |"
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
    yield "\nMedians; `~` marks an interquartile range above a fifth of the median. See ../README.md for the method.\n"
    if facts["gpu"]:
        yield "Times are the GPU's; `host` is what a call takes of the host, which goes on meanwhile. `h` marks rows with more"
        yield "kernels than can be enqueued beforehand: there the GPU may have waited for the host.\n"
    for picture in pictures:
        yield f"![{picture.removesuffix('.png')}]({picture})\n"
    for group, results in report.groups("main", "large", "small", "scaling", "levels").items():
        yield f"## {group}\n"
        yield from table(report, results)
        yield ""


# --- plots --------------------------------------------------------------------------------------------------------


def color_of(row: str) -> str:
    if row.startswith(("fastfocal", "operators")):
        return OURS
    return FLOOR if row.startswith(("copy", "mul_")) else OTHERS


def new_figure(report: Report, title: str, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(report.caption, x=0.01, ha="left", fontsize=7.5, color="#555555")
    return figure, axes


def horizontal_bars(axes: Any, bars: list[tuple[str, float, str, str]], unit: str, log: bool) -> None:
    """(label, value, text, color) each."""
    names, values, texts, colors = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colors, height=0.7)
    axes.bar_label(drawn, texts, padding=4, fontsize=9)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    low, high = min(values), max(values)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(low / 3, high * (high / low) ** 0.45 * 1.5)  # room for the texts
    else:
        axes.set_xlim(0, high * 1.45)
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0)


def plot_times(report: Report, out: Path) -> Path | None:
    """Bars by implementation, of the group in which all of them are."""
    groups = report.groups("main", "large")
    if not groups:
        return None
    group = max(groups, key=lambda name: len(groups[name]))
    results = sorted(groups[group], key=lambda r: r.seconds)
    figure, axes = new_figure(
        report, f"Forward and backward of the focal loss over all levels\n{group}", 9, 1.7 + 0.36 * len(results)
    )
    bars = []
    for r in results:
        eagers = report.eagers(r)
        text = f"{time_text(r.seconds)}   {ratio_text(report.copies(r))} x copy"
        text += f", {ratio_text(eagers)} x faster than eager" if eagers and r.row.startswith("fastfocal") else ""
        bars.append((r.label, r.seconds * 1e3, text, color_of(r.row)))
    horizontal_bars(axes, bars, "milliseconds (log scale)", log=True)
    return save(figure, out / "times.png")


def plot_cases(report: Report, out: Path) -> Path | None:
    """fastfocal against a copy of the same logits, case by case."""
    rows = [r for r in report.results if r.row == "fastfocal" and r.info["section"] in ("main", "large")]
    if not rows:
        return None
    parts = [r.group.split(", ") for r in rows]
    common = [part for part in parts[0] if all(part in others for others in parts)]
    figure, axes = new_figure(
        report,
        f"fastfocal, forward and backward, in copies of the same logits\n{', '.join(common)}",
        9,
        1.8 + 0.33 * len(rows),
    )
    bars = []
    for r, words in zip(rows, parts, strict=True):
        name = ", ".join(word for word in words if word not in common) or "all of them"
        copies = report.copies(r)
        bars.append((name, copies, f"{copies:.2f}   ({time_text(r.seconds)})", OURS))
    unit = "times empty_like(x).copy_(x) over every level, in the same dtype and threads"
    horizontal_bars(axes, bars, unit, log=False)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    return save(figure, out / "cases.png")


def plot_scaling(report: Report, out: Path) -> Path | None:
    """Time against the number of logits, on log axes."""
    series: dict[str, list[tuple[int, float]]] = {}
    for r in report.results:
        if r.info["section"] == "scaling":
            series.setdefault(r.row, []).append((r.info["logits"], r.seconds * 1e3))
    if not series:
        return None
    figure, axes = new_figure(report, "Time of forward and backward against the number of logits (five levels)", 8, 5)
    markers = {"fastfocal": "o", "copy": "s"}
    for row, points in series.items():
        points.sort()
        label, marker = LABELS.get(row, row), markers.get(row, "^")
        axes.loglog(*zip(*points, strict=True), label=label, marker=marker, color=color_of(row), markersize=5)
    axes.legend(frameon=False, reverse=True)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_xlabel("logits, all levels together (float32; bfloat16 from 1e8 on)")
    axes.set_ylabel("milliseconds")
    return save(figure, out / "scaling.png")


def plot_memory(report: Report, out: Path) -> Path | None:
    """Peak extra memory by implementation, of the group in which all of them are, with fastfocal's in-place mode."""
    groups = report.groups("main", "large")
    if not groups:
        return None
    group = max(groups, key=lambda name: len(groups[name]))
    results = [r for r in groups[group] if r.extra_mib is not None]
    problem = results[0].problem if results else ()
    labels = {(r.group, r.row): r.label for r in results}
    for r in report.results:
        if (
            r.row == "fastfocal"
            and r.info["grad_mode"] == "inplace"
            and r.problem == problem
            and r.extra_mib is not None
        ):
            results.append(r)
            labels[r.group, r.row] = 'fastfocal, grad_mode="inplace"'
    if not results:
        return None
    results.sort(key=lambda r: r.extra_mib or 0.0)
    size = results[0].info["logits"] * {"float32": 4, "float64": 8}.get(results[0].info["dtype"], 2) / 2**20
    figure, axes = new_figure(
        report, f"Peak memory beyond the logits and labels, forward and backward\n{group}", 9, 1.7 + 0.36 * len(results)
    )
    bars = []
    for r in results:
        mib = r.extra_mib or 0.0
        text = f"{mib:.1f} MiB   {ratio_text(mib / size)} x the logits"
        bars.append((labels[r.group, r.row], mib, text, color_of(r.row)))
    horizontal_bars(axes, bars, f"MiB; the logits themselves take {size:.0f} MiB", log=False)
    return save(figure, out / "memory.png")


def save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("saved", type=Path, nargs="+", help="files that pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    report = load(arguments.saved)
    if not report.results:
        parser.error(f"{', '.join(map(str, arguments.saved))}: no results of these benchmarks")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plots = (plot_times, plot_cases, plot_scaling, plot_memory)
    paths = [path for plot in plots if (path := plot(report, arguments.out)) is not None]
    text = "\n".join(markdown(report, [path.name for path in paths]))
    (arguments.out / "report.md").write_text(text)
    for path in [*paths, arguments.out / "report.md"]:
        print(path)


if __name__ == "__main__":
    main()
