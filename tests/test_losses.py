"""The losses beside the focal loss as users call them: the kernels against oracle_losses.py, element by element, and the
reference, derivatives, modules, defaults, what is counted, and errors.

What every loss takes is in test_shared_options.py, scores and class masks in the kernels in test_scores.py.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracle_losses
import pytest
import torch
from cases import DTYPES, SIXTEEN_BIT, Backend, assert_close, leaves, move, same_bits, tolerance
from oracle_losses import Element, Loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastfocal
from fastfocal import reference

CLASSES = 3
LAYOUTS = {"planes": torch.contiguous_format, "classes": torch.channels_last}


class Problem(NamedTuple):
    """A loss, its numbers, the same in the oracle, the weight of negatives, and the gamma that the promise goes by."""

    name: str
    numbers: dict[str, Any]
    oracle: Loss
    negative_weight: float = 1.0
    gamma: float = 0.0

    def __str__(self) -> str:
        return self.name + "".join(f"_{value}" for value in self.numbers.values())


SCORED = [
    Problem("varifocal_loss", {}, oracle_losses.varifocal(), 0.75, 2.0),
    Problem(
        "varifocal_loss",
        {"alpha": 0.25, "gamma": 1.5, "iou_weighted": False, "detach_modulating_factor": True},
        oracle_losses.varifocal(1.5, False, True),
        0.25,
    ),
    Problem("quality_focal_loss", {}, oracle_losses.quality_focal(), gamma=2.0),
    Problem("quality_focal_loss", {"beta": 1.5}, oracle_losses.quality_focal(1.5)),
    Problem("matchability_aware_loss", {}, oracle_losses.matchability_aware()),
    Problem("matchability_aware_loss", {"gamma": 2, "alpha": 0.5}, oracle_losses.matchability_aware(2.0), 0.5, 2.0),
    Problem("iou_aware_bce_loss", {}, oracle_losses.iou_aware_bce(), gamma=2.0),
    Problem("iou_aware_bce_loss", {"alpha": 0.5, "gamma": 1.0}, oracle_losses.iou_aware_bce(0.5, 1.0)),
    Problem("bce_loss", {}, oracle_losses.bce(), gamma=2.0),
]
ACTIVATED = [
    Problem("quality_focal_loss", {"activated": True}, oracle_losses.quality_focal(2.0, True), gamma=2.0),
    Problem("quality_focal_loss", {"activated": True, "beta": 0.5}, oracle_losses.quality_focal(0.5, True)),
]
DENSE = [
    Problem("gaussian_focal_loss", {}, oracle_losses.gaussian_focal(), gamma=2.0),
    Problem("gaussian_focal_loss", {"eps": 1e-4}, oracle_losses.gaussian_focal(eps=1e-4), gamma=2.0),
    Problem("gaussian_focal_loss", {"alpha": 1, "gamma": 2.5}, oracle_losses.gaussian_focal(1.0, 2.5)),
    Problem("asymmetric_loss", {}, oracle_losses.asymmetric_loss()),
    Problem("asymmetric_loss", {"detach_modulating_factor": True}, oracle_losses.asymmetric_loss(detached=True)),
    Problem("asymmetric_loss", {"clip": None}, oracle_losses.asymmetric_loss(clip=0.0)),
    Problem(
        "asymmetric_loss",
        {"gamma_pos": 0.5, "gamma_neg": 2.0, "clip": 0.2},
        oracle_losses.asymmetric_loss(0.5, 2.0, 0.2),
    ),
]
OF_LABELS = [*SCORED, *ACTIVATED, *(problem for problem in DENSE if problem.name == "asymmetric_loss")]
every = pytest.mark.parametrize("problem", [*SCORED, *ACTIVATED, *DENSE], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def is_activated(problem: Problem) -> bool:
    return bool(problem.numbers.get("activated"))


def logits_of(problem: Problem, points: int, dtype: torch.dtype) -> Tensor:
    x = torch.cat([torch.linspace(-28, 28, points, dtype=torch.float64), torch.tensor([0.0, 1e-7, -1e-30, -2.9444])])
    if not is_activated(problem):
        return x.to(dtype)
    # At p next to 0 or 1 binary_cross_entropy has derivatives beyond float16's numbers.
    return (x / 4 if dtype == torch.float16 else x).sigmoid().to(dtype)


def with_classes(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """(1, K, 1, W): every logit in each class."""
    level = x.expand(1, CLASSES, 1, len(x)).to(device)
    return level.contiguous(memory_format=LAYOUTS[layout])


def elements(problem: Problem, level: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Every logit's loss and gradient."""
    function = getattr(fastfocal, problem.name)
    options = {"num_classes": CLASSES, "normalizer": None, **problem.numbers, **options}
    with torch.no_grad():
        loss = function(level, targets, reduction="none", **options)
    (leaf,) = leaves([level])
    (gradient,) = torch.autograd.grad(function(leaf, targets, **options), leaf)
    return loss, gradient


def hold(problem: Problem, found: tuple[Tensor, Tensor], want: Element, weight: Any, dtype: torch.dtype) -> None:
    # Weights of the two classes: one rounding more.
    flushed = 1.0 if not is_activated(problem) else 1e12  # of binary_cross_entropy's derivative
    for got, value, bound in zip(found, want[:2], want[2:4], strict=True):
        assert_close(got, value * weight, 1.0, magnitude=bound * weight, flushed=flushed)


class Case(NamedTuple):
    """Logits, their targets and what else the call takes; what each is to give, and the weight of its class."""

    level: Tensor
    targets: Tensor
    options: dict[str, Any]
    want: Element
    weight: Any


def labels_and_scores(backend: Backend, problem: Problem, dtype: torch.dtype, layout: str) -> Case:
    """Every logit as a negative of each class, then with every score as a positive of one class among negatives."""
    x = logits_of(problem, backend.sized(301, 41), dtype)
    scores = torch.tensor([0.0, 1e-6, 0.01, 0.3, 0.5, 0.75, 1 - 2.0**-24, 1.0], dtype=torch.float64)
    given = x.repeat(1 + len(scores))
    labels = torch.arange(len(given))[None] % CLASSES
    labels[:, : len(x)] = CLASSES
    score = torch.cat([torch.full((len(x),), math.nan, dtype=torch.float64), scores.repeat_interleave(len(x))])
    score = score.float() if dtype != torch.float64 else score
    level = with_classes(given, layout, backend.device)
    is_positive = (labels == torch.arange(CLASSES)[:, None]).numpy()[None, :, None]
    exact = np.broadcast_to(given.double().numpy(), level.shape).astype(np.longdouble)
    s = np.nan_to_num(np.broadcast_to(score.double().numpy(), level.shape)).astype(np.longdouble)
    relative = tolerance(dtype, problem.gamma, options=problem.negative_weight != 1)
    yes, no = problem.oracle.positive(exact, s, relative=relative), problem.oracle.negative(exact, relative=relative)
    want = Element(*(np.where(is_positive, a, b).astype(np.float64) for a, b in zip(yes, no, strict=True)))
    options = {} if problem in DENSE else {"scores": score[None].to(backend.device)}
    weight = np.where(is_positive, 1.0, problem.negative_weight)
    return Case(level, labels.to(backend.device), options, want, weight)


def dense_targets(backend: Backend, problem: Problem, dtype: torch.dtype, layout: str) -> Case:
    x = logits_of(problem, backend.sized(301, 41), dtype)
    targets = [0.0, 0.01, 0.3, 0.5, 0.75, 1 - 2.0**-7, 1.0]
    given = x.repeat(len(targets))
    y = torch.tensor(targets, dtype=torch.float64).to(dtype).repeat_interleave(len(x))
    level, target = (with_classes(part, layout, backend.device) for part in (given, y))
    exact, s = (np.broadcast_to(part.double().numpy(), level.shape).astype(np.longdouble) for part in (given, y))
    relative = tolerance(dtype, problem.gamma, options=problem.negative_weight != 1)
    want = problem.oracle.dense(exact, s, relative=relative)
    want = Element(*(part.astype(np.float64) for part in want))
    return Case(level, target, {}, want, np.where(s > 0, 1.0, problem.negative_weight))


@every_layout
@every_dtype
@pytest.mark.parametrize("problem", OF_LABELS, ids=str)
def test_accuracy_of_labels_and_scores(backend: Backend, problem: Problem, dtype: torch.dtype, layout: str) -> None:
    case = labels_and_scores(backend, problem, dtype, layout)
    hold(problem, elements(problem, case.level, case.targets, **case.options), case.want, case.weight, dtype)


@every_layout
@every_dtype
@every
def test_accuracy_of_dense_targets(backend: Backend, problem: Problem, dtype: torch.dtype, layout: str) -> None:
    case = dense_targets(backend, problem, dtype, layout)
    hold(problem, elements(problem, case.level, case.targets), case.want, case.weight, dtype)


def limits(
    backend: Backend, problem: Problem, dtype: torch.dtype
) -> tuple[Tensor, list[tuple[Tensor, dict[str, Any]]]]:
    """Logits at which exponentials vanish, infinite ones and NaN; soft targets, and labels beside scores."""
    far = [11.0, 29.0, 87.5, 88.8, 104.0, 746.0, 1e4, float(torch.finfo(dtype).max), math.inf]
    # At its ends binary_cross_entropy has a derivative of 1e12, which float16 has not.
    ends = [] if dtype == torch.float16 else [0.0, 1.0, -0.5, 1.5]
    values = [0.25, 0.75, *ends] if is_activated(problem) else [*far, *(-x for x in far), 0.5]
    x = torch.tensor([*values, math.nan, 0.5 if is_activated(problem) else 2.0], dtype=dtype)
    targets = torch.tensor([0.0, 0.25, 1.0], dtype=dtype)
    level = with_classes(x.repeat(3), "planes", backend.device)
    soft = with_classes(targets.repeat_interleave(len(x)), "planes", backend.device)
    calls: list[tuple[Tensor, dict[str, Any]]] = [(soft, {})]
    if problem in OF_LABELS:
        labels = torch.arange(level.shape[-1], device=backend.device)[None] % (CLASSES + 1)
        scores = soft[:, 0, 0].float() if dtype != torch.float64 else soft[:, 0, 0]
        calls.append((labels, {} if problem in DENSE else {"scores": scores}))
    return level, calls


@every_dtype
@every
def test_limits(backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    """A finite gradient for every logit but NaN, a loss for each, and NaN for NaN alone."""
    level, calls = limits(backend, problem, dtype)
    for target, options in calls:
        loss, gradient = elements(problem, level, target, **options)
        nan = level.isnan()
        assert torch.equal(loss.isnan(), nan) and torch.equal(gradient.isnan(), nan)
        assert torch.equal(gradient.isfinite(), ~nan) and not (loss < 0).any()


@every
def test_a_target_that_is_nan_is_not_lost(backend: Backend, problem: Problem) -> None:
    level = with_classes(torch.linspace(0.1, 0.9, 19), "planes", backend.device)
    target = torch.full_like(level, math.nan)
    loss, gradient = elements(problem, level, target)
    assert loss.isnan().all() and gradient.isnan().all()


# --- the reference, and derivatives -----------------------------------------------------------------------------------


def small_problem(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any, dict[str, Any]]:
    """Two levels with what a detector gives: labels and scores, or heatmaps with peaks."""
    generator = torch.Generator().manual_seed(5)
    levels = [
        4 * torch.randn(2, 2 * CLASSES, h, w, generator=generator, dtype=torch.float64) for h, w in ((3, 4), (2, 2))
    ]
    options: dict[str, Any] = {"num_classes": CLASSES, **problem.numbers}
    if problem in DENSE:
        targets = [torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in levels]
        for y in targets:
            y[y > 0.8] = 1.0
            y[y < 0.2] = 0.0
    else:
        targets = [torch.randint(-1, CLASSES + 1, (2, h, w, 2), generator=generator) for h, w in ((3, 4), (2, 2))]
        options["scores"] = [torch.rand(y.shape, generator=generator, dtype=torch.float64) for y in targets]
    if is_activated(problem):
        levels = [x.sigmoid() for x in levels]
    return [x.to(dtype) for x in levels], [y if y.dtype == torch.int64 else y.to(dtype) for y in targets], options


@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none", "mean"])
@every
def test_the_reference_agrees(backend: Backend, problem: Problem, reduction: str) -> None:
    levels, targets, options = small_problem(problem)
    normalizers: list[Any] = ["positives", "positives_per_image", 3.0, torch.tensor([2.0, 5.0])]
    if problem in SCORED + ACTIVATED:
        normalizers.append("scores")
    elif problem.name == "asymmetric_loss":
        normalizers = normalizers[2:]
    more: dict[str, Any] = {
        "reduction": reduction,
        "class_weight": [[0.5, 1.0, 2.0], [3.0, 0.25, 1.0]],
        "class_mask": torch.tensor([[True, False, True], [True, True, True]]),
        "weight": [torch.rand(2, 24, dtype=torch.float64), torch.rand(2, 8, dtype=torch.float64)],
        "level_weights": [0.5, 2.0],
        "loss_weight": 1.5,
    }
    for normalizer in normalizers[:1] if reduction == "mean" and len(normalizers) > 2 else normalizers:
        results = []
        for function, device in (
            (getattr(fastfocal, problem.name), backend.device),
            (getattr(reference, problem.name), "cpu"),
        ):
            given = {name: move_all(value, torch.device(device)) for name, value in {**options, **more}.items()}
            inputs = leaves(move(levels, torch.device(device)))
            goal = move(targets, torch.device(device))
            loss = function(inputs, goal, normalizer=move_all(normalizer, torch.device(device)), **given)
            parts = loss if isinstance(loss, list) else [loss]
            total = sum(((i + 1) * part).sum() for i, part in enumerate(parts))
            results.append([*(part.detach() for part in parts), *torch.autograd.grad(total, inputs)])
        for got, want in zip(*results, strict=True):
            # float64: p - s of two roundings, and sums of a hundred terms
            torch.testing.assert_close(got.cpu(), want, rtol=1e-11, atol=1e-14)


def move_all(value: Any, device: torch.device) -> Any:
    return move(value, device) if isinstance(value, (Tensor, list)) else value


@every
def test_the_reference_is_the_oracle(problem: Problem) -> None:
    """Element by element in float64, and finite at infinity."""
    x = torch.linspace(-12, 12, 49, dtype=torch.float64)
    x = x.sigmoid() if is_activated(problem) else torch.cat([x, torch.tensor([math.inf, -math.inf, 1e300, -1e300])])
    targets = [0.0, 0.3, 1.0]
    level = x.repeat(len(targets)).view(1, 1, 1, -1).requires_grad_()
    y = torch.tensor(targets, dtype=torch.float64).repeat_interleave(len(x)).view(level.shape)
    function = getattr(reference, problem.name)
    loss = function(level, y, num_classes=1, normalizer=None, reduction="none", **problem.numbers)
    (gradient,) = torch.autograd.grad(loss.sum(), level)
    assert gradient.isfinite().all()
    exact, s = (part.detach().numpy().astype(np.longdouble) for part in (level, y))
    # It subtracts from 1 what is 6e-6 short of it, at worst; and the 1e-12 in torch's binary_cross_entropy is a float32's.
    want = problem.oracle.dense(exact, s, relative=1e-8)
    weight = np.where(s > 0, 1.0, problem.negative_weight)
    for got, value, bound in zip((loss.detach(), gradient), want[:2], want[2:4], strict=True):
        with np.errstate(invalid="ignore"):
            error = np.abs(got.numpy() - value * weight)
        assert ((got.numpy() == value * weight) | (error <= bound * weight + 1e-15)).all()


@every
def test_gradcheck(problem: Problem) -> None:
    """Of what is differentiable everywhere: not across a clamp, and not of a constant factor."""
    if problem.numbers.get("detach_modulating_factor") or problem.name in (
        "matchability_aware_loss",
        "iou_aware_bce_loss",
    ):
        pytest.skip("the gradient takes a factor for a constant, on purpose; the oracle's has that too")
    levels, targets, options = small_problem(problem)
    if is_activated(problem):
        levels = [0.05 + 0.9 * x for x in levels]
    function = getattr(fastfocal, problem.name)
    inputs = leaves(levels)
    assert torch.autograd.gradcheck(lambda *xs: function(list(xs), targets, **options), inputs, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every
def test_grad_modes_agree(backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    levels, targets, options = small_problem(problem, dtype)
    levels, targets = move(levels, backend.device), move(targets, backend.device)
    options = {name: move_all(value, backend.device) for name, value in options.items()}
    results = []
    for mode in ("save", "recompute", "inplace"):
        inputs = leaves(levels)
        given = [x * 1 for x in inputs] if mode == "inplace" else inputs
        loss = getattr(fastfocal, problem.name)(given, targets, grad_mode=mode, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# --- modules and defaults ---------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "FastVarifocalLoss": (
        "varifocal_loss",
        {"alpha": 0.75, "gamma": 2.0, "iou_weighted": True, "detach_modulating_factor": False},
    ),
    "FastQualityFocalLoss": ("quality_focal_loss", {"beta": 2.0, "activated": False}),
    "FastMatchabilityAwareLoss": ("matchability_aware_loss", {"gamma": 1.5, "alpha": None}),
    "FastIoUAwareBCELoss": ("iou_aware_bce_loss", {"alpha": 0.25, "gamma": 2.0}),
    "FastBCELoss": ("bce_loss", {}),
    "FastGaussianFocalLoss": ("gaussian_focal_loss", {"alpha": 2.0, "gamma": 4.0, "eps": 0.0}),
    "FastAsymmetricLoss": (
        "asymmetric_loss",
        {"gamma_pos": 1.0, "gamma_neg": 4.0, "clip": 0.05, "detach_modulating_factor": False, "normalizer": None},
    ),
}


@pytest.mark.parametrize("module", MODULES)
def test_defaults(module: str) -> None:
    """Those of the papers and of the projects: mmdetection's, transformers', timm's."""
    function, defaults = MODULES[module]
    for callable_ in (getattr(fastfocal, module), getattr(fastfocal, function)):
        parameters = inspect.signature(callable_).parameters
        assert {name: parameters[name].default for name in defaults} == defaults
    kept = getattr(fastfocal, module)(80)
    assert {name: getattr(kept, name) for name in defaults} == defaults
    assert repr(kept) == f"{module}(num_classes=80)"


@every
def test_the_module_is_the_function(problem: Problem) -> None:
    levels, targets, options = small_problem(problem, torch.float32)
    scores = {"scores": options.pop("scores")} if "scores" in options else {}
    (module,) = [name for name, (function, _) in MODULES.items() if function == problem.name]
    criterion = getattr(fastfocal, module)(**options)
    slow = getattr(reference, module.removeprefix("Fast"))(**options)
    want = getattr(fastfocal, problem.name)(levels, targets, **options, **scores)
    for twin in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert same_bits(twin(levels, targets, **scores), want)
    torch.testing.assert_close(slow(levels, targets, **scores), want, rtol=1e-5, atol=0)  # float32: a sum of 192 terms
    for name, value in problem.numbers.items():
        if value != inspect.signature(type(criterion).__init__).parameters[name].default:
            assert f"{name}={value!r}" in repr(criterion)


def test_a_changed_number_is_read_and_checked() -> None:
    levels, targets, options = small_problem(SCORED[0], torch.float32)
    scores = options.pop("scores")
    criterion = fastfocal.FastVarifocalLoss(CLASSES)
    criterion(levels, targets, scores=scores)
    criterion.gamma = 1.5
    want = fastfocal.varifocal_loss(levels, targets, num_classes=CLASSES, gamma=1.5, scores=scores)
    assert same_bits(criterion(levels, targets, scores=scores), want)
    criterion.gamma = -1.0
    with pytest.raises(ValueError, match=r"^gamma: expected a finite number >= 0, got -1"):
        criterion(levels, targets, scores=scores)


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_peaks_are_the_positives_of_heatmaps(backend: Backend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    levels = [torch.randn(2, CLASSES, h, w, generator=generator).to(dtype) for h, w in ((8, 9), (4, 3))]
    heat = [torch.rand(x.shape, generator=generator).clamp(max=0.98).to(dtype) for x in levels]
    heat[0][0, 1, 2, 3] = heat[0][0, 0, 7, 8] = heat[1][0, 2, 0, 0] = 1.0  # three in the first image, none in the other
    levels, heat = move(levels, backend.device), move(heat, backend.device)
    options: dict[str, Any] = {"num_classes": CLASSES}
    for function in (fastfocal.gaussian_focal_loss, reference.gaussian_focal_loss):
        bare = function(levels, heat, normalizer=None, reduction="image", **options).double()
        counted = function(levels, heat, reduction="image", **options).double()
        torch.testing.assert_close(counted, bare / 3, rtol=1e-6, atol=0)  # one division in float32
        by_image = function(levels, heat, normalizer="positives_per_image", reduction="image", **options).double()
        torch.testing.assert_close(by_image, bare / torch.tensor([6.0, 2.0], device=bare.device), rtol=1e-6, atol=0)
        none = [y.clamp(max=0.98) for y in heat]
        bare, counted = (function(levels, none, normalizer=n, **options) for n in (None, "positives"))
        assert same_bits(bare, counted)  # at least one
    rows = levels[0].flatten(1).t()  # (M, K = images): two-dimensional logits are one image
    y = heat[0].flatten(1).t()
    for normalizer in ("positives", "positives_per_image"):
        found = fastfocal.gaussian_focal_loss(rows, y, normalizer=normalizer)
        bare = fastfocal.gaussian_focal_loss(rows, y, normalizer=None)
        torch.testing.assert_close(found, bare / 2, rtol=1e-6, atol=0)


def test_scores_are_summed_over_positives(backend: Backend) -> None:
    levels, targets, options = small_problem(SCORED[0])
    scores = options.pop("scores")
    total = sum(float(s[(y >= 0) & (y < CLASSES)].sum()) for s, y in zip(scores, targets, strict=True))
    assert total > 2
    levels, targets, scores = (move(part, backend.device) for part in (levels, targets, scores))
    bare, counted = (
        fastfocal.varifocal_loss(levels, targets, scores=scores, normalizer=n, **options) for n in (None, "scores")
    )
    torch.testing.assert_close(counted, bare / total, rtol=1e-14, atol=0)  # float64


# --- errors -----------------------------------------------------------------------------------------------------------

X = [torch.zeros(1, 3, 2, 2)]
LABELS = [torch.zeros(1, 4, dtype=torch.int64)]
HEAT = [torch.zeros(1, 3, 2, 2)]
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("varifocal_loss", {"alpha": -0.5}, ValueError, "alpha: expected a finite number >= 0, got -0.5"),
    ("varifocal_loss", {"alpha": None}, TypeError, "alpha: expected a number, got NoneType"),
    ("varifocal_loss", {"alpha": [0.1, 0.2, 0.3]}, TypeError, "alpha: expected a number, got list"),
    ("varifocal_loss", {"gamma": math.inf}, ValueError, "gamma: expected a finite number >= 0, got inf"),
    ("varifocal_loss", {"iou_weighted": 1}, TypeError, "iou_weighted: expected True or False, got 1"),
    ("varifocal_loss", {"detach_modulating_factor": "yes"}, TypeError, "detach_modulating_factor: expected True or"),
    ("quality_focal_loss", {"beta": -1}, ValueError, "beta: expected a finite number >= 0, got -1"),
    ("quality_focal_loss", {"activated": 0}, TypeError, "activated: expected True or False, got 0"),
    ("matchability_aware_loss", {"gamma": math.nan}, ValueError, "gamma: expected a finite number >= 0, got nan"),
    ("matchability_aware_loss", {"alpha": -1}, ValueError, "alpha: expected a finite number >= 0, got -1"),
    ("iou_aware_bce_loss", {"alpha": 1.5}, ValueError, r"alpha: expected a number in \[0, 1\], got 1.5"),
    ("iou_aware_bce_loss", {"gamma": "2"}, TypeError, "gamma: expected a number, got str"),
    ("bce_loss", {"gamma": 2.0}, TypeError, r"bce_loss\(\) got an unexpected keyword argument 'gamma'"),
    ("gaussian_focal_loss", {"eps": 0.5}, ValueError, "eps: expected a number >= 0 and < 0.5, got 0.5"),
    ("gaussian_focal_loss", {"eps": -1e-4}, ValueError, "eps: expected a number >= 0 and < 0.5, got -0.0001"),
    ("gaussian_focal_loss", {"alpha": -1}, ValueError, "alpha: expected a finite number >= 0, got -1"),
    ("asymmetric_loss", {"clip": 1.5}, ValueError, r"clip: expected a number in \[0, 1\], got 1.5"),
    ("asymmetric_loss", {"gamma_neg": -4}, ValueError, "gamma_neg: expected a finite number >= 0, got -4"),
    ("asymmetric_loss", {"gamma_pos": True}, TypeError, "gamma_pos: expected a number, got bool"),
]


@pytest.mark.parametrize("name, numbers, error, words", WRONG, ids=lambda value: str(value)[:30])
def test_wrong_numbers(name: str, numbers: dict[str, Any], error: type[Exception], words: str) -> None:
    targets = HEAT if name == "gaussian_focal_loss" else LABELS
    calls: list[Callable[[], Any]] = [
        lambda: getattr(fastfocal, name)(X, targets, num_classes=3, **numbers),
        lambda: getattr(reference, name)(X, targets, num_classes=3, **numbers),
    ]
    if name != "bce_loss":
        (module,) = [module for module, (function, _) in MODULES.items() if function == name]
        calls.append(lambda: getattr(fastfocal, module)(3, **numbers))
    for call in calls:
        with pytest.raises(error, match=f"^{words}"):
            call()


def test_wrong_targets_and_scores() -> None:
    scores = [torch.ones(1, 4)]
    for library in (fastfocal, reference):
        with pytest.raises(
            TypeError, match=r"^targets: gaussian_focal_loss expects floating soft targets, got integer"
        ):
            library.gaussian_focal_loss(X, LABELS, num_classes=3)
        for name in ("gaussian_focal_loss", "asymmetric_loss"):
            with pytest.raises(ValueError, match=f"^scores: {name} takes none"):
                getattr(library, name)(X, HEAT, num_classes=3, normalizer=None, scores=scores)
        with pytest.raises(ValueError, match=r"^scores: soft targets are scores themselves"):
            library.bce_loss(X, HEAT, num_classes=3, normalizer=None, scores=scores)
        with pytest.raises(ValueError, match=r"^normalizer: 'positives' counts labels, but the targets are soft"):
            library.bce_loss(X, HEAT, num_classes=3)
        with pytest.raises(
            ValueError, match=r"^normalizer: expected one of 'positives', 'positives_per_image', got 'scores'"
        ):
            library.gaussian_focal_loss(X, HEAT, num_classes=3, normalizer="scores")
        with pytest.raises(ValueError, match=r"^normalizer: 'scores' sums the scores of positives, expected scores"):
            library.varifocal_loss(X, LABELS, num_classes=3, normalizer="scores")
        with pytest.raises(TypeError, match=r"^scores\[0\]: expected floating scores"):
            fastfocal.varifocal_loss(X, LABELS, num_classes=3, scores=LABELS)


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("problem", SCORED, ids=str)
def test_scores_of_all_levels_are_read_where_they_are(
    backend: Backend, problem: Problem, dtype: torch.dtype, mode: str
) -> None:
    """One tensor, also of wider rows than these levels need, is not copied, and gives the bits of a list."""
    levels, targets, options = small_problem(problem, dtype)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    scores = [s.to(backend.device, accumulation).flatten(1) for s in options.pop("scores")]
    levels, targets = move(levels, backend.device), move(targets, backend.device)
    together = torch.cat([*scores, scores[0]], 1)[:, : 24 + 8]
    loss = getattr(fastfocal, problem.name)

    def call(scores: Any, normalizer: str = "scores", grad_mode: str = mode) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in levels]
        given = [x * 1 for x in leaves]  # a leaf is not written to
        found = loss(given, targets, scores=scores, normalizer=normalizer, grad_mode=grad_mode, **options)
        return [found.detach(), *torch.autograd.grad(found, leaves)]

    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("cat", "copy_") and result.dtype == accumulation:
                copies.append(func)
            return result

    with Copies():
        got = call(together)
    assert not copies
    with Copies():
        want = call(scores)
    assert copies  # as a list has to be
    assert all(map(same_bits, got, want))
    for other in (
        together.double() if accumulation == torch.float32 else together.float(),
        together.t().contiguous().t(),
    ):
        again = call(other)
        for a, b in zip(again, got, strict=True):
            torch.testing.assert_close(
                a, b, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
            )  # scores rounded
    with torch.inference_mode():
        kept = together.clone()
    assert all(map(same_bits, call(kept), got))
    leaves = [x.clone().requires_grad_() for x in levels]
    found = loss(leaves, targets, scores=together, grad_mode="recompute", **options)
    together.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("name", ["scores", "class_mask", "both"])
def test_expanded_tensors_come_back_from_hooks(backend: Backend, name: str, mode: str) -> None:
    """One row for all images, given back by a hook as another tensor."""
    problem = SCORED[0]
    levels, targets, options = small_problem(problem, torch.float32)
    levels, targets = move(levels, backend.device), move(targets, backend.device)
    scores = torch.cat([s.flatten(1) for s in options.pop("scores")], 1).to(backend.device, torch.float32)[:1]
    mask = torch.tensor([[True, False, True]], device=backend.device)
    given: dict[str, Any] = {} if name == "scores" else {"class_mask": mask}
    given |= {} if name == "class_mask" else {"scores": scores}
    loss = getattr(fastfocal, problem.name)

    def call(**more: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in levels]
        found = loss(leaves, targets, grad_mode=mode, **options, **more)
        return [found.detach(), *torch.autograd.grad(found, leaves)]

    want = call(**{key: value.repeat(2, 1) for key, value in given.items()})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        got = call(**{key: value.expand(2, -1) for key, value in given.items()})
    assert all(map(same_bits, got, want))


def test_a_second_derivative_looks_whether_scores_were_written_to(backend: Backend) -> None:
    """Those of one tensor, which are the caller's; those of a list were copied."""
    levels, targets, options = small_problem(SCORED[0])
    levels, targets = move(levels, backend.device), move(targets, backend.device)
    scores = [s.flatten(1).to(backend.device) for s in options.pop("scores")]

    def second(given: Any, writes_to: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in levels]
        loss = getattr(fastfocal, SCORED[0].name)(leaves, targets, scores=given, grad_mode="save", **options)
        for t in writes_to:
            t.mul_(0.5)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    together = torch.cat(scores, 1)
    want = second(together, [])
    with pytest.raises(RuntimeError, match="scores, mask or normalizer modified in place since the loss was computed"):
        second(together, [together])
    assert all(map(same_bits, second(scores, scores), want))


def test_sixteen_bit_logits_keep_their_scores_digits(backend: Backend) -> None:
    """Scores next to 1 that a 16-bit number would round to it: the loss of a large logit is their distance from it."""
    x = torch.full((1, 64, 1), 20.0, dtype=torch.bfloat16, device=backend.device)
    labels = torch.zeros(1, 64, dtype=torch.int64, device=backend.device)
    scores = 1 - torch.arange(1, 65, device=backend.device)[None] * 2.0**-20
    assert all(dtype in SIXTEEN_BIT for dtype in (x.dtype,))
    loss = fastfocal.bce_loss(x, labels, scores=scores, normalizer=None)
    want = (20 * (1 - scores.double()) + math.log1p(math.exp(-20))).sum()
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0)
