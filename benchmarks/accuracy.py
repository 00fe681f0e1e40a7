"""Relative error of loss and gradient against float64, logit by logit: fastfocal, the plain formula, and peers.

    python -m benchmarks.accuracy [--out docs]

Writes accuracy.png and accuracy.md. Needs the `demo` extra (matplotlib); peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastfocal
from benchmarks.cases import ALPHA
from benchmarks.implementations import sigmoid_focal_loss
from benchmarks.machine import describe
from fastfocal.demo import style

GAMMA = 2.0
BINS, POINTS = 200, 256  # of one logit's width each; the largest error of so many logits is drawn
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANGES = (10, 28, 100)
DASHES = ("-", "--", ":", "-.", (0, (5, 1)))

ElementLoss = Callable[[Tensor, Tensor], Tensor]


def elementwise(x: Tensor, targets: Tensor) -> Tensor:
    return fastfocal.sigmoid_focal_loss(x, targets, ALPHA, GAMMA, "none")


def plain(x: Tensor, targets: Tensor) -> Tensor:
    return sigmoid_focal_loss(x, targets, ALPHA, GAMMA)


def implementations() -> Iterator[tuple[str, ElementLoss]]:
    yield "fastfocal", elementwise
    yield "plain formula", plain
    yield "torch.compile of it", torch.compile(plain)
    if importlib.util.find_spec("torchvision"):
        from torchvision.ops import sigmoid_focal_loss as of_torchvision

        yield "torchvision", lambda x, targets: of_torchvision(x, targets, ALPHA, GAMMA, "none")
    if importlib.util.find_spec("fvcore"):
        from fvcore.nn import sigmoid_focal_loss as of_fvcore

        yield "fvcore", lambda x, targets: of_fvcore(x, targets, ALPHA, GAMMA, "none")


def truth(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, in a form that neither cancels nor overflows."""
    x = x.double()
    z = torch.where(targets == 1, -x, x)  # the logit of being wrong
    q, not_q = torch.sigmoid(z), torch.sigmoid(-z)
    cross_entropy = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    weight = torch.where(targets == 1, ALPHA, 1 - ALPHA).double() * q**GAMMA
    slope = weight * (GAMMA * not_q * cross_entropy + q)
    return weight * cross_entropy, torch.where(targets == 1, -slope, slope)


def relative_errors(call: ElementLoss, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of loss and gradient: infinite where the result is no number, NaN where the true one is less than a normal number."""
    x = x.detach().requires_grad_()
    loss = call(x, targets.to(x.dtype))
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    least = torch.finfo(x.dtype).tiny

    def error(found: Tensor, want: Tensor) -> Tensor:
        relative = (found.detach().double() - want).abs() / want.abs()
        return torch.where(want.abs() < least, torch.nan, relative.nan_to_num(torch.inf, torch.inf))

    true_loss, true_gradient = truth(x.detach(), targets)
    return error(loss, true_loss), error(gradient, true_gradient)


def largest(error: Tensor) -> Tensor:
    """In each row, NaN aside."""
    missing = error.isnan()
    return torch.where(missing.all(1), torch.nan, error.masked_fill(missing, 0).amax(1))


Errors = dict[tuple[str, torch.dtype, int], tuple[Tensor, Tensor]]  # by name, dtype and target


def measure() -> tuple[Tensor, Errors]:
    generator = torch.Generator().manual_seed(0)
    edges = torch.arange(BINS, dtype=torch.float64) - BINS / 2
    x = (edges[:, None] + torch.rand(BINS, POINTS, generator=generator, dtype=torch.float64)).clamp(-100, 100)
    found: Errors = {}
    for name, call in implementations():
        for dtype in DTYPES:
            for target in (0, 1):
                given = x.to(dtype)
                errors = relative_errors(call, given.flatten(), torch.full((given.numel(),), target))
                loss, gradient = (largest(e.view(BINS, POINTS)) for e in errors)
                found[name, dtype, target] = loss, gradient
    return edges + 0.5, found


def names_of(found: Errors) -> list[str]:
    return list(dict.fromkeys(name for name, *_ in found))


def draw(middles: Tensor, found: Errors, path: Path, caption: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**style.RC, "axes.titlesize": 11, "axes.titlepad": 8, "font.size": 11}):
        figure = Figure(figsize=(13, 7.6), dpi=100, facecolor="white")
        axes = figure.subplots(2, len(DTYPES), sharex=True, sharey=True)
        figure.subplots_adjust(left=0.06, right=0.985, top=0.82, bottom=0.12, wspace=0.06, hspace=0.2)
        figure.text(0.015, 0.958, "Relative error of the loss and its gradient", size=15, weight="bold", va="center")
        subtitle = (
            "Against float64, by the logit of a background anchor; a line ends where the dtype's normal numbers do"
        )
        figure.text(0.015, 0.915, subtitle, size=10.5, color=style.QUIET, va="center")
        figure.text(0.015, 0.022, caption, size=8, color=style.QUIET, va="center")
        for column, dtype in enumerate(DTYPES):
            rounding = torch.finfo(dtype).eps / 2
            for row, what in enumerate(("Loss", "Gradient")):
                plot = axes[row][column]
                for i, name in enumerate(names_of(found)):
                    error = found[name, dtype, 0][row].clamp(1e-9, 1e1).numpy()
                    color, width = (style.FAST, 2.4) if i == 0 else (style.PLAIN, 1.4)
                    plot.semilogy(middles, error, label=name, color=color, linewidth=width, linestyle=DASHES[i])
                plot.axhline(rounding, color=style.QUIET, linewidth=0.8, linestyle=":")
                plot.text(59, rounding, "one rounding", size=8.5, color=style.QUIET, ha="right", va="bottom")
                plot.set_title(f"{what}, {str(dtype).removeprefix('torch.')}")
                plot.grid(True)
                plot.set_ylim(1e-9, 2e1)
                plot.set_xlim(-32, 60)
                plot.tick_params(labelsize=9)
        for plot in axes[1]:
            plot.set_xlabel("logit", size=10, color=style.QUIET)
        for plot in axes[:, 0]:
            plot.set_ylabel("relative error", size=10, color=style.QUIET)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(0.985, 0.985), ncols=len(labels), fontsize=10)
        figure.savefig(path)


def worst(middles: Tensor, errors: Iterable[Tensor], limit: int) -> str:
    near = [e[middles.abs() < limit] for e in errors]
    value = float(np.nanmax(torch.cat(near).numpy()))
    return "no number" if value == np.inf else f"{value:.1e}"


def table(middles: Tensor, found: Errors) -> str:
    lines = ["| | dtype | " + " | ".join(f"loss, \\|x\\| <= {r}" for r in RANGES)]
    lines[0] += " | " + " | ".join(f"gradient, \\|x\\| <= {r}" for r in RANGES) + " |"
    lines.append("|---|---|" + "--:|" * (2 * len(RANGES)))
    for dtype in DTYPES:
        for name in names_of(found):
            cells = [
                worst(middles, [found[name, dtype, target][what] for target in (0, 1)], limit)
                for what in (0, 1)
                for limit in RANGES
            ]
            lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- the other losses -------------------------------------------------------------------------------------------------

TESTS = Path(__file__).parents[1] / "tests"
ROWS = 100_000
FARTHEST = 28.0  # to which the promise goes


@dataclass(frozen=True)
class Found:
    """The largest errors of one loss: relative, and in units of what is promised."""

    relative: float
    promised: float

    def __str__(self) -> str:
        return f"{self.relative:.1e} | {self.promised:.2f}"


def member_calls() -> Iterator[tuple[str, str, dict[str, Any], str, tuple[str, tuple[float, ...]], float]]:
    """Function, what is measured of it, options, targets, the oracle with its numbers, and the gamma that the promise goes by.

    A weight of 1 for both classes: the formula alone.
    """
    for targets in ("negatives", "positives"):
        yield "varifocal_loss", targets, {"alpha": 1.0}, targets, ("varifocal", (2.0,)), 2.0
        yield "quality_focal_loss", targets, {}, targets, ("quality_focal", (2.0,)), 2.0
        yield "matchability_aware_loss", targets, {}, targets, ("matchability_aware", (1.5,)), 1.5
        yield "iou_aware_bce_loss", targets, {}, targets, ("iou_aware_bce", (0.25, 2.0)), 2.0
        yield "bce_loss", targets, {}, targets, ("bce", ()), 2.0
    yield "gaussian_focal_loss", "heatmap", {}, "heatmap", ("gaussian_focal", (2.0, 4.0, 0.0)), 2.0
    yield "asymmetric_loss", "negatives", {}, "negatives", ("asymmetric_loss", (1.0, 4.0, 0.05)), 0.0
    yield "asymmetric_loss", "multi-hot", {}, "multi-hot", ("asymmetric_loss", (1.0, 4.0, 0.05)), 0.0


def largest_errors(got: Tensor, want: Any, bound: Any, dtype: torch.dtype) -> Found:
    """`bound`: of a result that is not rounded to 16 bits yet."""
    from cases import SIXTEEN_BIT, SMALLEST, half_ulp, to_numpy

    want, have = np.asarray(want, dtype=np.float64), to_numpy(got)
    bound = np.asarray(bound, dtype=np.float64) + SMALLEST[torch.float32]
    if dtype in SIXTEEN_BIT:
        bound = bound + half_ulp(np.abs(want) + bound, dtype)
    error = np.abs(have - want)
    normal = np.abs(want) > torch.finfo(dtype).tiny
    return Found(float((error[normal] / np.abs(want[normal])).max()), float((error / bound).max()))


def measure_member(
    name: str,
    options: dict[str, Any],
    targets: str,
    oracle: tuple[str, tuple[float, ...]],
    gamma: float,
    dtype: torch.dtype,
) -> tuple[Found, Found]:
    """Of the loss and of the gradient of logits up to 28, against extended precision."""
    import oracle_losses
    from cases import tolerance

    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(ROWS, 1, generator=generator, dtype=torch.float64) * 2 - 1).mul(FARTHEST).to(dtype)
    draw = torch.rand(ROWS, 1, generator=generator).to(dtype)
    x.requires_grad_()
    y: Tensor = draw
    if targets in ("negatives", "positives"):
        labels = torch.full((ROWS,), int(targets == "negatives"))
        given: dict[str, Any] = {"normalizer": None, **options}
        if targets == "positives":
            y = draw.float()
            given["scores"] = y.flatten()
        loss = getattr(fastfocal, name)(x, labels, reduction="none", **given)
    else:
        y = (draw < 0.5).to(dtype) if targets == "multi-hot" else torch.where(draw < 0.2, 1.0, draw).to(dtype)
        loss = getattr(fastfocal, name)(x, y, reduction="none", normalizer=None, **options)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    of_oracle = getattr(oracle_losses, oracle[0])(*oracle[1])
    how = {"negatives": "negative", "positives": "positive"}.get(targets, "dense")
    exact = [t.detach().double().numpy().astype(np.longdouble) for t in (x, y)]
    right = getattr(of_oracle, how)(*exact[: 1 if how == "negative" else 2], relative=tolerance(dtype, gamma))
    return (
        largest_errors(loss, right.loss, right.loss_bound, dtype),
        largest_errors(gradient, right.gradient, right.gradient_bound, dtype),
    )


def measure_softmax(dtype: torch.dtype, classes: int = 80) -> tuple[Found, Found]:
    """Of rows whose logits are up to 28 apart; the gradients' terms cancel, so their sizes are what the promise goes by."""
    import oracle_softmax
    from cases import tolerance

    generator = torch.Generator().manual_seed(0)
    rows = ROWS // classes
    x = (torch.rand(rows, classes, generator=generator, dtype=torch.float64) * FARTHEST).to(dtype).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=generator)
    loss = fastfocal.softmax_focal_loss(x, labels, reduction="none", normalizer=None)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    of_loss, of_gradient, size = oracle_softmax.softmax_focal(x.detach().double().numpy(), labels.numpy())
    promised = tolerance(dtype, 2.0)
    return (
        largest_errors(loss, of_loss, promised * of_loss, dtype),
        largest_errors(gradient, of_gradient, promised * size, dtype),
    )


def table_of_members() -> str:
    sys.path.insert(0, str(TESTS))  # the oracles are the tests' own
    lines = ["| | of | dtype | loss | of the promise | gradient | of the promise |", "|---|---|---|--:|--:|--:|--:|"]
    kinds = [(name, *rest) for name, *rest in member_calls() if hasattr(fastfocal, name)]
    for dtype in (torch.float32, torch.bfloat16):
        words = str(dtype).removeprefix("torch.")
        for name, of, options, targets, oracle, gamma in kinds:
            loss, gradient = measure_member(name, options, targets, oracle, gamma, dtype)
            lines.append(f"| `{name}` | {of} | {words} | {loss} | {gradient} |")
        if hasattr(fastfocal, "softmax_focal_loss"):
            loss, gradient = measure_softmax(dtype)
            lines.append(f"| `softmax_focal_loss` | rows of 80 classes | {words} | {loss} | {gradient} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------

PAGE = """# Accuracy

![Relative error of loss and gradient over the logit](accuracy.png)

Relative error against float64 of the loss of each logit and of its gradient, gamma {gamma:g}, alpha {alpha:g}. Drawn: the
largest of {points} logits in every interval of length 1, for background anchors (positives mirror them). A line ends where the
true value is less than the dtype's least normal number. 1 means that nothing of the value is left, more that another number
stands there.

The plain formula is torchvision's: `p = sigmoid(x)`, `ce = binary_cross_entropy_with_logits(x, y)`, `(1 - p_t)^gamma * ce`. Its
`1 - p_t` is rounded to a multiple of 6e-8 (float32), 5e-4 (float16) or 4e-3 (bfloat16): an easy anchor's loss and gradient,
small as they are, lose their digits one by one. `torch.compile` and fvcore compute 16-bit logits in float32, and fvcore's loss
stays in it. Dotted: one rounding to the dtype, half a unit in the last place.

The largest error, of both kinds of anchors:

{table}

## The other losses

The largest relative error of {rows} logits between -{farthest:g} and {farthest:g}, against the formulas in extended precision
(`tests/oracle_losses.py`, `tests/oracle_softmax.py`), with the defaults of each and no weights. Beside it the largest error in
units of what is promised: 1 would be all of it. Where the formula itself subtracts, as p - s of a score or p - clip, a result
near 0 has few digits, whoever computes it: there the promise is what two rounded numbers leave of their difference. bfloat16 is
rounded once.

{members}

{machine}. Made by `python -m benchmarks.accuracy`.

What is promised for all options and gammas is in the [using it](usage.md#accuracy), what is tested in
`tests/test_formula.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for accuracy.png and accuracy.md")
    out: Path = parser.parse_args().out
    middles, found = measure()
    machine = describe(torch.device("cpu"), "torchvision", "fvcore")
    out.mkdir(parents=True, exist_ok=True)
    draw(middles, found, out / "accuracy.png", machine)
    page = PAGE.format(
        **{"gamma": GAMMA, "alpha": ALPHA, "points": POINTS, "table": table(middles, found), "machine": machine},
        **{"members": table_of_members(), "rows": f"{ROWS:,}", "farthest": FARTHEST},
    )
    (out / "accuracy.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
