"""The formulas of csrc/losses without kernels: every struct in double, float and the vectors of every instruction set.

loss_headers.cpp evaluates them; oracle_losses.py, in extended precision, says what is right.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import host_build
import numpy as np
import oracle_losses
import pytest
import torch
from cases import SMALLEST, tolerance
from cpu_isas import build
from host_build import CSRC, TESTS, Source
from oracle_losses import Array, Element, Loss

EMULATED = build.capability() != "AVX512"
FLAGS = {
    "avx512": build.EMULATED_FLAGS if EMULATED else build.AVX512_FLAGS,
    "avx2": build.AVX2_FLAGS,
    "portable": (),
}
INSTRUCTION_SETS = [
    pytest.param("avx512", id="avx512_emulated" if EMULATED else "avx512"),
    pytest.param("avx2", marks=pytest.mark.skipif(build.capability() == "default", reason="no AVX2 on this processor")),
    "portable",
]
WIDTHS = {"double": np.float64, "float": np.float32, "vector": np.float32}
MOST_LANES = 16


class Kind(NamedTuple):
    """A loss: its number in csrc/losses/, its oracle, and which numbers have a struct of their own."""

    number: int
    oracle: Callable[..., Loss]
    is_fast: Callable[..., bool]
    gamma: Callable[..., float]  # what the promise goes by
    scores: bool = True


KINDS = {
    "varifocal": Kind(2, oracle_losses.varifocal, lambda g, *_: g == 2, lambda g, *_: g),
    "quality_focal": Kind(3, oracle_losses.quality_focal, lambda b, *_: b == 2, lambda b, *_: b),
    "matchability_aware": Kind(4, oracle_losses.matchability_aware, lambda g: g == 2, lambda g: g),
    "iou_aware_bce": Kind(5, oracle_losses.iou_aware_bce, lambda a, g: g == 2, lambda a, g: g),
    "bce": Kind(6, oracle_losses.bce, lambda: False, lambda: 2.0),
    "gaussian_focal": Kind(
        7, oracle_losses.gaussian_focal, lambda a, g, e: (a, g) == (2, 4), lambda a, g, e: a if g == 4 else 0.0, False
    ),
    "asymmetric": Kind(
        8, oracle_losses.asymmetric_loss, lambda p, n, *_: (p, n) == (1, 4), lambda p, n, *_: 0.0, False
    ),
}

CASES: list[tuple[str, tuple[float, ...]]] = [
    *[("varifocal", (gamma, weighted, 0)) for gamma in (0, 0.3, 1.5, 2, 5, 10) for weighted in (1, 0)],
    *[("varifocal", (gamma, 1, 1)) for gamma in (1.5, 2)],
    *[("quality_focal", (beta, activated)) for beta in (0, 0.5, 1, 1.5, 2, 3.3, 5) for activated in (0, 1)],
    *[("matchability_aware", (gamma,)) for gamma in (0, 0.1, 1, 1.5, 2, 4.4)],
    *[("iou_aware_bce", (alpha, gamma)) for alpha in (0, 0.25, 0.5, 0.99, 1) for gamma in (2, 1.5)],
    ("bce", ()),
    *[("gaussian_focal", (2, 4, eps)) for eps in (0, 1e-12, 1e-4, 0.1, 0.3)],
    ("gaussian_focal", (2, 4, 1e-9)),  # the logarithm of its ends, 20.7, is rounded by 7.7e-7
    *[("gaussian_focal", numbers) for numbers in ((1, 3, 0), (0.5, 0.7, 1e-4), (3.3, 0, 1e-6), (0, 0, 0), (2, 10, 0))],
    *[("asymmetric", (1, 4, clip, detached)) for clip in (0.05, 0, 1e-6, 0.5) for detached in (0, 1)],
    *[("asymmetric", numbers) for numbers in ((0, 2, 0.05, 0), (0, 0, 0.05, 0), (0.5, 0.5, 0.2, 0), (2, 3.3, 1e-3, 1))],
    *[("asymmetric", numbers) for numbers in ((0, 7, 0, 0), (1, 1, 0.05, 0), (2.5, 0, 0, 1), (3, 3, 1, 0))],
]
HUGE: list[tuple[str, tuple[float, ...]]] = [
    *[("varifocal", (gamma, 1, 0)) for gamma in (1e-30, 1e8, 1e30, 1e39)],
    *[("quality_focal", (beta, activated)) for beta in (1e-30, 1e3, 1e15, 1e30, 1e39) for activated in (0, 1)],
    *[("matchability_aware", (gamma,)) for gamma in (1e-30, 1e3, 1e30, 1e39)],
    *[("iou_aware_bce", (alpha, gamma)) for alpha in (1e-30, 1 - 1e-9) for gamma in (1e30, 0)],
    *[("gaussian_focal", (gamma, gamma, eps)) for gamma in (1e-30, 1e30, 1e39) for eps in (0, 1e-4, 0.5)],
    *[("asymmetric", (gamma, gamma, clip, 0)) for gamma in (1e-30, 1e30, 1e39) for clip in (0, 1e-38, 0.05, 1)],
]


def name_of(case: tuple[str, tuple[float, ...]]) -> str:
    return case[0] + "".join(f"_{number:g}" for number in case[1])


class How(NamedTuple):
    number: int
    oracle: str
    fills: bool  # with scores or targets


HOWS = {
    "negative": How(0, "negative", False),
    "negative_in_steps": How(1, "negative", False),
    "positive": How(2, "positive", True),
    "soft": How(3, "dense", True),
    "soft_in_steps": How(4, "dense", True),
}
# These give the gradient in the place of the loss, and the second derivative in that of the gradient.
SECOND_HOWS = {
    "negative": How(6, "negative", False),
    "positive": How(7, "positive", True),
    "soft": How(8, "dense", True),
}
SOFT_WEIGHT = 5

SCORES = [0.0, 1e-6, 0.01, 0.05, 0.3, 0.5, 0.75, 1 - 2.0**-7, 1 - 1e-4, 1 - 2.0**-24, 1.0]


@cache
def built(isa: str) -> ctypes.CDLL | host_build.CompileError:
    """A failure is kept too: a thousand tests should not compile the same mistake a thousand times."""
    flags = (f"-DFASTFOCAL_ISA={isa}", *FLAGS[isa])
    source = Source(TESTS / "loss_headers.cpp", flags)
    about = 30.0 if isa == "avx512" and EMULATED else 5.0
    directory = host_build.default_directory()
    try:
        path = host_build.build_library(f"loss_headers_{isa}", [source], directory, include=(CSRC,), about=about)
    except host_build.CompileError as error:
        return error
    return ctypes.CDLL(str(path))


def library(isa: str) -> ctypes.CDLL:
    made = built(isa)
    if isinstance(made, host_build.CompileError):
        raise host_build.CompileError(str(made))
    return made


def evaluate(
    isa: str, width: str, case: tuple[str, tuple[float, ...]], how: int, x: Array, y: Array, *, which: int
) -> tuple[Array, Array]:
    kind, numbers = case
    dtype = WIDTHS[width]
    assert x.dtype == dtype and y.dtype == dtype and x.shape == y.shape
    padding = (0, -len(x) % MOST_LANES)
    given = [np.pad(value, padding) for value in (x, y)]
    made = [np.full_like(given[0], 12345) for _ in range(2)]
    pointers = [value.ctypes.data_as(ctypes.c_void_p) for value in (*given, *made)]
    values = (ctypes.c_double * 4)(*numbers)
    call = getattr(library(isa), f"evaluate_{width}")
    call.restype = ctypes.c_bool
    assert call(KINDS[kind].number, which, values, how, ctypes.c_long(len(given[0])), *pointers)
    return made[0][: len(x)], made[1][: len(x)]


def is_activated(case: tuple[str, tuple[float, ...]]) -> bool:
    return case[0] == "quality_focal" and case[1][1] != 0


def oracle_of(case: tuple[str, tuple[float, ...]]) -> Loss:
    return KINDS[case[0]].oracle(*case[1])


ANY, USUAL, SHARED_ANY, SHARED_USUAL = range(4)
SHARED = ("varifocal", "quality_focal", "matchability_aware", "iou_aware_bce")


def shares(case: tuple[str, tuple[float, ...]]) -> bool:
    return case[0] in SHARED and not is_activated(case)


def structs_with_second_derivatives(case: tuple[str, tuple[float, ...]]) -> list[int]:
    """Where losses share a struct, it is that one which the kernels take."""
    return [which for which in structs_of(case) if not shares(case) or which >= SHARED_ANY]


def structs_of(case: tuple[str, tuple[float, ...]]) -> list[int]:
    """With the usual exponents a kernel may take either struct; four losses have one in common."""
    structs = [ANY] + ([SHARED_ANY] if shares(case) else [])
    return structs + [which + 1 for which in structs if KINDS[case[0]].is_fast(*case[1])]


@cache
def problem(
    case: tuple[str, tuple[float, ...]], how: str, dtype: type, relative: float
) -> tuple[Array, Array, Element]:
    """Logits of up to 28 (or probabilities) beside scores, and what is right, in extended precision."""
    # Steps that no power of two divides fill the mantissa.
    x = np.concatenate([np.linspace(-28, 28, 293), [-2.9444, -2.94, 1e-3, 1e-7, 1e-30, 1e-42, -1e-42, 0.0, -0.0]])
    if is_activated(case):
        p = 1 / (1 + np.exp(-x[:293]))
        x = np.concatenate([p, 1 - p, [0.0, 1.0, 0.5, 1e-6, 1 - 2.0**-24, 1e-13, 1e-30]])
    else:
        # Where p^gamma is near float32's least number its exponent's rounding weighs most.
        gamma = KINDS[case[0]].gamma(*case[1])
        if gamma > 3:
            far = np.linspace(57, 87, 61) / gamma
            x = np.concatenate([x, far, -far])
    y = np.array(SCORES) if HOWS[how].fills else np.zeros(1)
    if case[0] == "asymmetric":
        y = y[[0, 1, 4, 8, 10]] if HOWS[how].fills else y
    x, y = np.tile(x, len(y)).astype(dtype), np.repeat(y, len(x)).astype(dtype)
    exact = (x.astype(np.longdouble), y.astype(np.longdouble))
    loss = oracle_of(case)
    given = exact if HOWS[how].fills else exact[:1]
    return x, y, getattr(loss, HOWS[how].oracle)(*given, relative=relative)


def multiplied(case: tuple[str, tuple[float, ...]], x: Array, y: Array) -> Array | float:
    """What may multiply a modulating factor that is less than the least normal number, and so counts as 0. Of logits
    nothing more than 1 does, of probabilities the derivative of their logarithms and of the distance's power."""
    if not is_activated(case):
        return 1.0
    distance, variance = np.abs(x - y).astype(np.float64), (x * (1 - x)).astype(np.float64)
    return 1 + 1 / np.maximum(variance, 1e-12) + case[1][0] * 100 / np.maximum(distance, 1e-38)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_accuracy(isa: str, case: tuple[str, tuple[float, ...]]) -> None:
    """Loss and gradient, element by element; where a difference of rounded numbers is 0 somewhere, as the oracle says."""
    for width, dtype in WIDTHS.items():
        torch_dtype = torch.float64 if width == "double" else torch.float32
        relative = tolerance(torch_dtype, KINDS[case[0]].gamma(*case[1]), options=False)
        for name, how in HOWS.items():
            x, y, want = problem(case, name, dtype, relative)
            flushed = SMALLEST[torch_dtype] * multiplied(case, x, y)
            for which in structs_of(case):
                loss, gradient = evaluate(isa, width, case, how.number, x, y, which=which)
                where = f"{width}, {name}, struct {which}"
                hold(loss, want.loss, want.loss_bound + SMALLEST[torch_dtype], x, y, f"loss, {where}")
                hold(gradient, want.gradient, want.gradient_bound + flushed, x, y, f"gradient, {where}")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_accuracy_of_second_derivatives(isa: str, case: tuple[str, tuple[float, ...]]) -> None:
    """And of the gradient that is computed beside it."""
    for width, dtype in WIDTHS.items():
        torch_dtype = torch.float64 if width == "double" else torch.float32
        relative = tolerance(torch_dtype, KINDS[case[0]].gamma(*case[1]), options=False)
        for name, how in SECOND_HOWS.items():
            x, y, want = problem(case, name, dtype, relative)
            flushed = SMALLEST[torch_dtype] * multiplied(case, x, y)
            flushed_twice = SMALLEST[torch_dtype] * multiplied_twice(case, x, y)
            for which in structs_with_second_derivatives(case):
                gradient, second = evaluate(isa, width, case, how.number, x, y, which=which)
                where = f"{width}, {name}, struct {which}"
                hold(gradient, want.gradient, want.gradient_bound + flushed, x, y, f"gradient, {where}")
                hold(second, want.second, want.second_bound + flushed_twice, x, y, f"second derivative, {where}")


def multiplied_twice(case: tuple[str, tuple[float, ...]], x: Array, y: Array) -> Array | float:
    """The same of the second derivative. What a modulating factor's exponent brings down multiplies it twice, and a cross
    entropy does: of logits no more than 87."""
    exponent = max(case[1], default=0.0)
    if not is_activated(case):
        return 1 + 87 * exponent**2
    exact = (x.astype(np.longdouble), y.astype(np.longdouble))
    plain = oracle_losses.quality_focal(0.0, activated=True).positive(*exact)  # the cross entropy
    distance, variance = np.abs(exact[0] - exact[1]), exact[0] * (1 - exact[0])
    of_power = exponent**2 * plain.loss / np.maximum(distance, 1e-38) ** 2
    return 1 + plain.second + 2 * exponent / np.maximum(variance, 1e-12) + of_power


def hold(got: Array, want: Array, bound: Array, x: Array, y: Array, what: str) -> None:
    with np.errstate(invalid="ignore"):
        right = (got == want) | (np.abs(got.astype(np.longdouble) - want) <= bound)
    right &= np.isfinite(got) | np.isinf(want)
    if not right.all():
        i = int(np.argmin(right))
        raise AssertionError(
            f"{what}: {int((~right).sum())} of {len(got)} differ; at x {x[i]!r}, y {y[i]!r}: {got[i]!r}, "
            f"expected {float(want[i])!r} within {float(bound[i]):.3g}"
        )


def far_logits(case: tuple[str, tuple[float, ...]], dtype: type) -> Array:
    inf, nan = np.inf, np.nan
    if is_activated(case):  # beyond the ends too, and subnormal
        values = [0, 1, 0.5, 1e-45, 1e-40, 1.1e-38, 1e-30, 1e-12, 1e-13, 1 - 2.0**-24, -0.1, 1.1, inf, -inf, nan]
    else:
        far = [
            11,
            17,
            28,
            29,
            60,
            80,
            87.3,
            87.5,
            88.02,
            88.03,
            88.8,
            104,
            150,
            708,
            710,
            746,
            1e4,
            1e10,
            1e30,
            3e38,
            inf,
        ]
        near = [0.0, -0.0, 1e-42, -1e-42, 1.17e-38, 1e-30]
        values = [*far, *(-x for x in far), *near, nan]
    return np.array(values, dtype=dtype)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES + HUGE, ids=name_of)
def test_limits(isa: str, case: tuple[str, tuple[float, ...]]) -> None:
    """No loss is NaN or negative and every gradient is finite, unless logit or target is NaN: then both are NaN."""
    # One is next to a probability, whose distance is then far less than it.
    targets = [0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-30 * (1 + 1e-7), 1e-6, 0.01, 0.5, 1 - 2.0**-24, 1, np.nan]
    for width, dtype in WIDTHS.items():
        for name, how in HOWS.items():
            x = far_logits(case, dtype)
            y = np.array(targets if how.fills else [0.0], dtype=dtype)
            x, y = np.tile(x, len(y)), np.repeat(y, len(x))
            reads = name.startswith("soft") or (name == "positive" and KINDS[case[0]].scores)
            nan = np.isnan(x) | (np.isnan(y) & reads)
            for which in structs_of(case):
                loss, gradient = evaluate(isa, width, case, how.number, x, y, which=which)
                where = f"{width}, {name}, struct {which}"
                for wrong, what in (
                    (np.isnan(loss) != nan, "whether the loss is NaN"),
                    (np.isfinite(gradient) == nan, "whether the gradient is finite"),
                    (np.isnan(gradient) != nan, "whether the gradient is NaN"),
                    (loss < 0, "a negative loss"),
                ):
                    at = int(np.argmax(wrong))
                    assert not wrong.any(), (what, where, x[at], y[at], loss[at], gradient[at])
                if not how.fills:
                    nothing = x == -np.inf
                    assert nothing.any() and not loss[nothing].any() and not gradient[nothing].any(), where


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES + HUGE, ids=name_of)
def test_limits_of_second_derivatives(isa: str, case: tuple[str, tuple[float, ...]]) -> None:
    """Both derivatives are finite, unless logit or target is NaN: then both are NaN."""
    targets = [0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-30 * (1 + 1e-7), 1e-6, 0.01, 0.5, 1 - 2.0**-24, 1, np.nan]
    for width, dtype in WIDTHS.items():
        for name, how in SECOND_HOWS.items():
            x = far_logits(case, dtype)
            y = np.array(targets if how.fills else [0.0], dtype=dtype)
            x, y = np.tile(x, len(y)), np.repeat(y, len(x))
            nan = np.isnan(x) | (np.isnan(y) & (name == "soft" or (name == "positive" and KINDS[case[0]].scores)))
            for which in structs_with_second_derivatives(case):
                found = evaluate(isa, width, case, how.number, x, y, which=which)
                for derivative, what in zip(found, ("gradient", "second derivative"), strict=True):
                    wrong = (np.isnan(derivative) != nan) | (np.isfinite(derivative) == nan)
                    at = int(np.argmax(wrong))
                    assert not wrong.any(), (what, width, name, which, x[at], y[at], derivative[at])
                    if not how.fills:
                        nothing = x == -np.inf
                        assert nothing.any() and not derivative[nothing].any(), (what, width, which)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", [case for case in CASES if not is_activated(case)], ids=name_of)
def test_infinite_logits_have_the_losss_limit(isa: str, case: tuple[str, tuple[float, ...]]) -> None:
    for width, dtype in WIDTHS.items():
        relative = 1e-12 if width == "double" else 5e-6
        x = np.array([np.inf, -np.inf, 1e4, -1e4], dtype=dtype).repeat(len(SCORES))
        y = np.tile(np.array(SCORES, dtype=dtype), 4)
        exact = (x.astype(np.longdouble), y.astype(np.longdouble))
        for name, how in HOWS.items():
            given = exact if how.fills else exact[:1]
            want: Element = getattr(oracle_of(case), how.oracle)(*given, relative=relative)
            least = SMALLEST[torch.float64 if width == "double" else torch.float32]
            for which in structs_of(case):
                loss, gradient = evaluate(isa, width, case, how.number, x, y, which=which)
                # 1e4 times a factor that is flushed
                hold(loss, want.loss, want.loss_bound + 1e4 * least, x, y, f"loss, {width}, {name}")
                hold(gradient, want.gradient, want.gradient_bound + 1e4 * least, x, y, f"gradient, {width}, {name}")
        for name, how in SECOND_HOWS.items():
            given = exact if how.fills else exact[:1]
            want = getattr(oracle_of(case), how.oracle)(*given, relative=relative)
            for which in structs_with_second_derivatives(case):
                _, second = evaluate(isa, width, case, how.number, x, y, which=which)
                hold(second, want.second, want.second_bound + 1e4 * least, x, y, f"second, {width}, {name}")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_probabilities_beyond_the_ends_count_as_the_ends(isa: str) -> None:
    for beta in (0.0, 1.5, 2.0):
        case = ("quality_focal", (beta, 1))
        for width, dtype in WIDTHS.items():
            x, ends = (np.array(p, dtype=dtype) for p in ([-0.5, -np.inf, 1.5, np.inf], [0.0, 0.0, 1.0, 1.0]))
            for s in SCORES:
                y = np.full(4, s, dtype=dtype)
                for which in structs_of(case):
                    for how in (*HOWS.values(), *SECOND_HOWS.values()):
                        found = evaluate(isa, width, case, how.number, x, y, which=which)
                        expected = evaluate(isa, width, case, how.number, ends, y, which=which)
                        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_a_soft_target(isa: str, kind: str) -> None:
    """Of 3 for positives and 5 for negatives: one of the two, but for targets that mix both losses."""
    numbers = {"gaussian_focal": (2.0, 4.0, 0.0), "asymmetric": (1.0, 4.0, 0.05, 0.0)}.get(kind, (2.0, 0.0))
    y = np.array([0.0, 0.25, 0.75, 1.0])
    want = {"gaussian_focal": [5.0, 5.0, 5.0, 3.0], "asymmetric": [5.0, 4.5, 3.5, 3.0]}.get(kind, [5.0, 3.0, 3.0, 3.0])
    for width, dtype in WIDTHS.items():
        x = np.zeros(4, dtype=dtype)
        found, _ = evaluate(isa, width, (kind, numbers), SOFT_WEIGHT, x, y.astype(dtype), which=ANY)
        assert found.tolist() == want


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_target_that_is_met_leaves_a_small_loss(isa: str) -> None:
    """1 - s^gamma of a score next to 1, as rounded, would be off by a third; so would the loss of a large logit."""
    s = np.float32(1 - 2.0**-24)
    x, y = np.array([28.0], dtype=np.float32), np.array([s])
    exact = [np.longdouble(28), np.longdouble(s)]
    for case, rest in (
        (("matchability_aware", (1.5,)), -np.expm1(1.5 * np.log(exact[1]))),
        (("iou_aware_bce", (0.25, 2.0)), -np.expm1(0.75 * np.log(exact[1]) - 0.25 * np.log1p(np.exp(-exact[0])))),
        (("bce", ()), 1 - exact[1]),
    ):
        want = float(np.log1p(np.exp(-exact[0])) + 28 * rest)
        for width in ("float", "vector"):
            loss, _ = evaluate(isa, width, case, HOWS["positive"].number, x, y, which=ANY)
            assert loss[0] == pytest.approx(want, rel=2e-6)


def test_the_harness_tells_the_instruction_sets_apart() -> None:
    """One library under three names would not: a reciprocal of 12 bits, one of 14 and a division leave their traces."""
    x = np.linspace(-28, 28, 4096, dtype=np.float32)
    found: list[Any] = []
    for isa in ("avx512", "avx2", "portable"):
        if isa == "avx2" and build.capability() == "default":
            continue
        found.append(evaluate(isa, "vector", ("bce", ()), HOWS["negative"].number, x, np.zeros_like(x), which=ANY)[1])
    for i, one in enumerate(found):
        assert all((one != other).any() for other in found[:i])
