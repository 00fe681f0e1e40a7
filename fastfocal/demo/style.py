"""The look that all of the project's pictures share: colours, fonts, and the names of what is compared.

It stands in the package because the demo is installed and the benchmarks are not: `benchmarks` imports it from here.

Colour says what a mark is. FastFocalLoss is teal; what it is compared with is grey; a copy of the logits, which bounds
what memory allows, is an outline in the same grey; orange is for what is out of the ordinary: a control, a mistake.
"""

from __future__ import annotations

from typing import Any

PLAIN, FAST, IN_PLACE = "#7b8794", "#0b7285", "#22b8cf"
ATTENTION = "#e8590c"
INK, QUIET, GRID = "#212529", "#495057", "#e9ecef"
FOUND, WRONG = "#40e0d0", "#ff922b"  # on photographs, so brighter

PLAIN_NAME = "plain loss, level by level"
FAST_NAME = "FastFocalLoss"
IN_PLACE_NAME = "FastFocalLoss, in place"

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


def ratio(value: float) -> str:
    """Two digits, as more are not what a measurement is worth."""
    return f"{float(f'{value:.2g}'):,.0f}×" if value >= 10 else f"{value:.1f}×"


def seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:,.0f} {unit}" if value * factor >= 10 else f"{value * factor:.2g} {unit}"
    return f"{value * 1e6:.2g} µs"


def milliseconds(value: float) -> str:
    value *= 1e3
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2g} ms"


def mebibytes(count: float) -> str:
    value = count / 2**20
    return f"{value:,.0f} MiB" if value >= 10 or value == 0 else f"{value:.1f} MiB"
