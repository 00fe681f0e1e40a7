"""The CPU kernel of every instruction set, on any processor: the essential test bodies of other files, run once for each.

The rest of the suite runs on the best one alone. float64 is left out: its arithmetic is scalar, the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_formula
import test_grad_modes
import test_kernels
import test_losses
import test_options
import test_scores
import test_second_derivatives
import torch
from cases import FOUR_D, SIXTEEN_BIT, THREE_D, TWO_D, Backend, Size, run
from cpu_isas import build
from test_losses import Problem
from watch import Recorder

from fastfocal import ops

EMULATED = build.capability() != "AVX512"
INSTRUCTION_SETS = [
    pytest.param("avx512", id="avx512_emulated" if EMULATED else "avx512"),
    pytest.param("avx2", marks=pytest.mark.skipif(build.capability() == "default", reason="no AVX2 on this processor")),
    "portable",
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=INSTRUCTION_SETS)
def backend(request: pytest.FixtureRequest, use_operators: Callable[[str], None]) -> Backend:
    build.load()
    use_operators(f"fastfocal_{request.param}")
    return Backend(request.param, torch.device("cpu"))


def test_the_stand_in_for_avx512_is_complete() -> None:
    """A processor that has AVX-512 compiles nothing else with it, so a new intrinsic would fail on the others alone."""
    build.check_stand_in()


# --- each its own -----------------------------------------------------------------------------------------------------


def test_the_operators_are_those_of_the_instruction_set(backend: Backend, generator: torch.Generator) -> None:
    levels, labels = test_kernels.problem(backend, test_kernels.ODD, generator)
    for name in ("avx512", "avx2", "portable"):
        with Recorder(f"fastfocal_{name}") as recorder:
            run(levels, labels, num_classes=test_kernels.ODD.classes)
        assert bool(recorder.calls) == (name == backend.name)


def test_each_rounds_in_its_own_way(backend: Backend, use_operators: Callable[[str], None]) -> None:
    """A reciprocal of 12 bits, one of 14 and a division leave their traces: one kernel under two names would not."""
    levels, labels = test_formula.hard_problem(test_formula.grid(8191, torch.float32, backend.device), "planes")
    (mine,) = run(levels, labels, num_classes=test_formula.CLASSES, normalizer=None)[1]
    for other in {"avx512", "avx2", "portable"} - {backend.name}:
        if other == "avx2" and build.capability() == "default":
            continue
        use_operators(f"fastfocal_{other}")
        (theirs,) = run(levels, labels, num_classes=test_formula.CLASSES, normalizer=None)[1]
        assert (mine != theirs).any()


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", test_formula.LAYOUTS)
@pytest.mark.parametrize("gamma", test_formula.GAMMAS)
def test_accuracy_of_labels(backend: Backend, gamma: float, layout: str) -> None:
    test_formula.test_accuracy_of_labels(backend, torch.float32, gamma, layout)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_accuracy_of_labels_in_16_bits(backend: Backend, dtype: torch.dtype) -> None:
    test_formula.test_accuracy_of_labels(backend, dtype, 2.0, "planes")


@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_ties_round_to_even(backend: Backend, dtype: torch.dtype, steps: int) -> None:
    """A logit of 0 has the gradient 1/2 (where 1 / 2 is exact) times a weight that lies between two numbers."""
    weight = 1 + steps * 2.0 ** -(SIXTEEN_BIT[dtype][0] + 1)
    x = torch.zeros(1, 1, 1, 37, dtype=dtype)  # vectors of every width, and a tail
    labels = torch.ones(1, 37, dtype=torch.int64)
    options = {"num_classes": 1, "alpha": None, "gamma": 0.0, "normalizer": None, "loss_weight": weight}
    (wide,), (narrow,) = run([x.float()], [labels], **options)[1], run([x], [labels], **options)[1]
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("gamma", (0.5, 2.0, 5.0))
def test_accuracy_of_soft_targets(backend: Backend, gamma: float) -> None:
    test_formula.test_accuracy_of_soft_targets(backend, torch.float32, gamma)


@pytest.mark.parametrize("gamma", (2.0, 3.3))
def test_accuracy_with_label_smoothing(backend: Backend, gamma: float) -> None:
    test_formula.test_accuracy_with_label_smoothing(backend, torch.float32, gamma)


@pytest.mark.parametrize("form", ("hard", "soft", "soft_smoothed"))
def test_accuracy_at_a_large_gamma(backend: Backend, form: str, generator: torch.Generator) -> None:
    test_formula.test_accuracy_at_any_gamma(backend, 10.0, form, generator)


@pytest.mark.parametrize("form", ("hard", "soft"))
def test_far_logits_keep_what_smoothing_leaves_them(backend: Backend, form: str) -> None:
    test_formula.test_far_logits_keep_what_smoothing_leaves_them(backend, torch.float32, 0.1, form)


@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("name", ("labels", "soft_half", "anchor_weight"))
def test_a_gradient_of_zero_stays_zero(backend: Backend, name: str, reduction: str) -> None:
    test_grad_modes.test_a_gradient_of_zero_stays_zero(backend, torch.float32, name, reduction)


# --- second derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", (0.5, 2.0, 3.3, 10.0))
def test_accuracy_of_second_derivatives(backend: Backend, gamma: float) -> None:
    test_second_derivatives.test_accuracy_of_labels(backend, torch.float32, gamma, False)
    test_second_derivatives.test_accuracy_of_soft_targets(backend, torch.float32, gamma, False)
    test_second_derivatives.test_accuracy_with_label_smoothing(backend, torch.float32, gamma, 0.1)
    test_second_derivatives.test_accuracy_of_star(backend, torch.float32, gamma, 1.0)


@pytest.mark.parametrize("problem", test_second_derivatives.OTHERS, ids=str)
def test_accuracy_of_second_derivatives_of_the_other_losses(backend: Backend, problem: Problem) -> None:
    for targets in ("labels", "soft"):
        if targets == "soft" or problem in test_losses.OF_LABELS:
            test_second_derivatives.test_accuracy_of_the_other_losses(backend, problem, targets, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", test_second_derivatives.OTHERS, ids=str)
def test_limits_of_second_derivatives_of_the_other_losses(
    backend: Backend, problem: Problem, dtype: torch.dtype
) -> None:
    test_second_derivatives.test_limits_of_the_other_losses(backend, problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ("labels", "soft", "smoothed", "star"))
@pytest.mark.parametrize("gamma", (0.5, 2.0, 1e4))
def test_limits_of_second_derivatives(backend: Backend, gamma: float, form: str, dtype: torch.dtype) -> None:
    test_second_derivatives.test_limits(backend, gamma, form, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last_offset", "3d", "2d_transposed"))
def test_layouts_of_second_derivatives(
    backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    test_second_derivatives.test_layouts(backend, layout, dtype, generator)


@pytest.mark.parametrize("reduction", ("sum", "image", "none"))
@pytest.mark.parametrize("name", ("alpha_per_class", "smoothed", "weight", "star"))
@pytest.mark.parametrize("targets", ("labels", "soft"))
def test_options_of_second_derivatives(
    backend: Backend, targets: str, name: str, reduction: str, generator: torch.Generator
) -> None:
    test_second_derivatives.test_options(backend, targets, name, reduction, "save", generator)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_ignored_anchors_of_second_derivatives(backend: Backend, bad: float, generator: torch.Generator) -> None:
    for name in test_second_derivatives.NAMES:
        test_second_derivatives.test_ignored_anchors_leave_no_trace(backend, name, bad, "contiguous", generator)


@pytest.mark.parametrize("dtype", list(SIXTEEN_BIT), ids=str)
def test_sixteen_bit_second_derivatives(backend: Backend, dtype: torch.dtype, generator: torch.Generator) -> None:
    for name in test_second_derivatives.NAMES:
        for targets in ("labels", "soft"):
            test_second_derivatives.test_sixteen_bits_are_rounded_once(backend, name, targets, dtype, generator)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", (0.0, 0.125))
@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("layout", test_formula.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_labels(backend: Backend, dtype: torch.dtype, layout: str, gamma: float, smoothing: float) -> None:
    test_formula.test_limits_of_labels(backend, dtype, layout, gamma, smoothing)


@pytest.mark.parametrize("gamma", (0.5, 2.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_soft_targets(backend: Backend, dtype: torch.dtype, gamma: float) -> None:
    test_formula.test_limits_of_soft_targets(backend, dtype, gamma)


@pytest.mark.parametrize("alpha", (0.0, 1.0))
@pytest.mark.parametrize("layout", test_formula.LAYOUTS)
def test_a_zero_weight_beats_infinity_but_not_nan(backend: Backend, layout: str, alpha: float) -> None:
    values = test_formula.limit_values(torch.float32, backend.device)
    levels, labels = test_formula.hard_problem(values, layout)
    test_formula.losses_and_gradients(levels, labels, alpha=alpha)


# --- where the vectors end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FOUR_D + THREE_D + TWO_D)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    test_kernels.test_layouts(backend, layout, dtype, generator)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("elements", range(1, 34))  # up to two of the widest vectors
def test_every_tail_length(backend: Backend, elements: int, layout: str, generator: torch.Generator) -> None:
    test_kernels.test_every_tail_length(backend, elements, layout, generator)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("which", test_kernels.SPARSE)
@pytest.mark.parametrize("cells", test_kernels.SHORT_PLANES)
def test_short_planes(backend: Backend, cells: int, which: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    test_kernels.test_short_planes(backend, cells, which, dtype, generator)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("name", ("coco", "one_class_8193", "two_images_of_8190", "17_levels"))
def test_sizes(backend: Backend, name: str, layout: str, generator: torch.Generator) -> None:
    test_kernels.test_sizes(backend, name, layout, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last_offset", "3d_transposed", "2d"))
def test_soft_targets(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    test_kernels.test_soft_targets(backend, layout, dtype, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unreduced_loss(backend: Backend, dtype: torch.dtype, generator: torch.Generator) -> None:
    test_kernels.test_unreduced_loss(backend, "contiguous", dtype, generator)


# --- positives and ignored anchors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "3d"))
def test_positives_share_an_anchors_neighbours(backend: Backend, layout: str) -> None:
    test_kernels.test_positives_share_an_anchors_neighbours(backend, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", test_grad_modes.LAYOUTS)
def test_inplace(backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    test_grad_modes.test_inplace_leaves_the_gradient_in_the_logits(backend, layout, dtype, generator)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_ignored_anchors_leave_no_trace(backend: Backend, bad: float, layout: str, generator: torch.Generator) -> None:
    test_options.test_ignored_anchors_leave_no_trace(backend, bad, layout, generator)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("cells", test_kernels.SHORT_PLANES)
def test_ignored_under_an_infinite_weight(
    backend: Backend, cells: int, layout: str, generator: torch.Generator
) -> None:
    test_kernels.test_ignored_under_an_infinite_weight(backend, cells, layout, generator)


def test_nan_stays_where_it_is(backend: Backend, generator: torch.Generator) -> None:
    test_options.test_nan_stays_where_it_is(backend, generator)


# --- scores and class masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "offset"))
@pytest.mark.parametrize("name", test_scores.LOSSES)
def test_every_positive_meets_its_own_score(
    backend: Backend, name: str, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    test_scores.test_every_positive_meets_its_own_score(backend, name, layout, dtype, generator)


@pytest.mark.parametrize("positive", (0.02, 0.9))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("size", (test_scores.WIDE, test_scores.SEGMENTS), ids=("tiles", "one_class"))
def test_scores_in_every_size(
    backend: Backend, size: Size, layout: str, positive: float, generator: torch.Generator
) -> None:
    test_scores.test_sizes(backend, "matchability_aware", size, layout, positive, generator)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_scores_beside_anchor_weights(
    backend: Backend, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    test_scores.test_beside_anchor_weights(backend, "quality_focal", layout, dtype, generator)


@pytest.mark.parametrize("weighted", (False, True), ids=("dense", "generic"))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scores_as_soft_targets(
    backend: Backend, dtype: torch.dtype, weighted: bool, generator: torch.Generator
) -> None:
    test_scores.test_scores_as_soft_targets(backend, "varifocal", "contiguous", dtype, weighted, generator)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_the_sum_of_scores(backend: Backend, layout: str, generator: torch.Generator) -> None:
    test_scores.test_the_sum_of_scores(backend, test_scores.WIDE, layout, torch.float32, generator)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_masks(backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator) -> None:
    test_scores.test_masks_in_every_size(backend, layout, test_scores.WIDE, dtype, ops.SUM, generator)


@pytest.mark.parametrize("name", ("losses", "gradients"))
def test_dense_targets_and_tails(backend: Backend, name: str, generator: torch.Generator) -> None:
    """Every number of elements up to three of the widest vectors, in 16 bits: they go through copies of them in float32."""
    for elements in range(1, 49):
        x = torch.randn(1, elements, 1, generator=generator).bfloat16()
        y = torch.rand(1, elements, 1, generator=generator).bfloat16()
        found = dict(zip(("losses", "gradients"), run([x], [y], num_classes=1, normalizer=1.0), strict=True))
        wide = dict(
            zip(("losses", "gradients"), run([x.float()], [y.float()], num_classes=1, normalizer=1.0), strict=True)
        )
        if name == "losses":
            assert found[name].item() == pytest.approx(wide[name].item(), rel=1e-6)  # the same numbers in float32
        else:
            assert torch.equal(found[name][0], wide[name][0].bfloat16())
