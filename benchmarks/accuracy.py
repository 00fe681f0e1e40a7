"""Relative error of loss and gradient against float64, logit by logit: fastfocal, the plain formula, and peers.

    python -m benchmarks.accuracy [--out docs]

Writes accuracy.png and accuracy.md. Needs the `demo` extra (matplotlib); peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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
    page = PAGE.format(gamma=GAMMA, alpha=ALPHA, points=POINTS, table=table(middles, found), machine=machine)
    (out / "accuracy.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
