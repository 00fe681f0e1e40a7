"""A short part of fuzz.py, the same in every run; and that its own checks can fail."""

from __future__ import annotations

import inspect

import fuzz
import numpy as np
import oracle_pyramid
import pytest
import torch
from fuzz import Interval, Problem
from hypothesis import given, settings

from fastfocal.losses import LOSSES


@pytest.mark.slow
@settings(fuzz.PROFILE, max_examples=400, derandomize=True)
@given(problem=fuzz.problems())
def test_any_problem(problem: Problem) -> None:
    fuzz.check(problem)


# --- what a long run found --------------------------------------------------------------------------------------------

FOUND = {
    "no_weight_under_an_infinite_loss_scale": Problem(
        loss="focal_loss_star", cells=((2, 3),), dtype="float16", weight="float32", positive=0.0, incoming=(float("inf"),)
    ),
    "no_level_weight_under_an_infinite_incoming_gradient": Problem(
        cells=((1, 257),), dtype="float16", level_weights=(0.0,), reduction="none", incoming=(65536.0,)
    ),
    "a_far_logit_with_smoothed_soft_targets_and_a_small_gamma": Problem(
        own=(("gamma", 0.1), ("label_smoothing", 0.1)), cells=((2, 2),), places=((0, 1, -87.65),), targets="hard",
        target_dtype="float32", positive=0.0, normalizer=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    fuzz.check(FOUND[name])


# --- the fuzzer itself ------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("low", "high", "factor", "holds", "not_holds"),
    [
        (0.0, 0.0, INF, [0.0], [NAN, INF, -INF]),  # exactly 0 stays 0
        (0.0, 0.0, NAN, [0.0], [NAN]),
        (1.0, 1.0, INF, [INF], [0.0, NAN, -INF]),
        (1.0, 1.0, NAN, [NAN], [0.0, INF]),
        (-1e-40, 1e-40, NAN, [0.0], [NAN, INF]),  # 0 in float16, and stays 0
        (-1e-7, 1e-7, NAN, [NAN, 0.0], [INF]),  # 0 or not: both are right
        (NAN, NAN, 0.0, [NAN], [0.0]),
        (0.5, 0.5, 0.0, [0.0], [NAN, 0.5]),
        (60000.0, 60000.0, 2.0, [INF], [65504.0, NAN]),  # beyond float16
        (70000.0, 80000.0, 0.0, [NAN], [0.0, INF]),  # saved as infinity
        (60000.0, 70000.0, 0.0, [NAN, 0.0], [INF]),
        (0.25, 0.5, -2.0, [-0.5, -0.75, -1.0], [-1.01, -0.49, 0.5]),
    ],
)
def test_interval(low: float, high: float, factor: float, holds: list[float], not_holds: list[float]) -> None:
    middle = np.array([(low + high) / 2])
    interval = Interval.around(middle, np.array([(high - low) / 2]), torch.float16, rounded=not -1e-6 < low < 0)
    product = interval.times(np.array([factor]))
    for value in holds:
        product.assert_holds(torch.tensor([value], dtype=torch.float16), "value")
    for value in not_holds:
        with pytest.raises(AssertionError, match=r"value: 1 of 1 elements"):
            product.assert_holds(torch.tensor([value], dtype=torch.float16), "value")


def test_every_loss_and_every_parameter_of_it_is_drawn() -> None:
    for member in LOSSES:
        assert list(fuzz.OWN[member.parameters.name]) == [name for name, _, _ in member.parameters.checked_fields]
        signature = inspect.signature(oracle_pyramid.LOSSES[member.parameters.name])
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        assert defaults == {name: default for name, default, _ in member.parameters.checked_fields}
    assert len(fuzz.OWN) == len(oracle_pyramid.LOSSES) == len(LOSSES)


def test_what_fails_can_be_repeated() -> None:
    """A problem is printed as code that makes it again."""
    problem = Problem(own=(("alpha", (0.5, 1.0)),), cells=((2, 3),), classes=2, incoming=(INF, NAN), normalizer=None)
    again = eval(repr(problem), {"Problem": Problem, "inf": INF, "nan": NAN})
    assert repr(again) == repr(problem)
    assert again.incoming[0] == INF and again.numbers == {"alpha": (0.5, 1.0)} and again.normalizer is None
