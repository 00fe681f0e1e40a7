"""Options that every loss takes: weights of classes, absent classes; and scores, of the losses that take them.

Held against the reference in float64, and the reference against what the option means, written out.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, Backend, Size, assert_close, draw_classes, draw_levels, encode, leaves, move, same_bits
from torch import Tensor, nn

import fastfocal
from fastfocal import FastFocalLoss, FastFocalLossStar, focal_loss, reference
from fastfocal.checks import ClassValues
from fastfocal.distributed import MODULE_DEFAULTS
from fastfocal.losses import LOSSES, Member
from fastfocal.losses.focal import FocalLoss
from fastfocal.losses.focal_star import FocalLossStar
from fastfocal.losses.loss import Loss
from fastfocal.options import Inputs, Options, checked
from fastfocal.prepare import prepare

K = 5
SIZE = Size(2, 2, K, ((5, 3), (2, 1)))
ROW = [0.5, 1.0, 2.0, 0.0, 3.0]
ROWS = [ROW, [1.0, 0.25, 4.0, 2.0, 0.0]]
ALPHA = [0.1, 0.2, 0.3, 0.4, 0.5]
MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
every_member = pytest.mark.parametrize("member", LOSSES, ids=lambda member: member.parameters.name)
# Those of one term for each logit. What the others make of these options is in a file of their own: test_softmax_focal.py.
OF_EACH_LOGIT = [member for member in LOSSES if not member.parameters.takes_anchors]
members = pytest.mark.parametrize("member", OF_EACH_LOGIT, ids=lambda member: member.parameters.name)
labelled_members = pytest.mark.parametrize(
    "member",
    [member for member in OF_EACH_LOGIT if member.parameters.targets != "soft"],
    ids=lambda member: member.parameters.name,
)


def alphas(member: Member, *alphas: Any) -> list[dict[str, Any]]:
    """Options with each of these, of losses whose alpha is a share of positives; without, of others."""
    if member.parameters not in (FocalLoss, FocalLossStar):
        return [{}]
    return [{"alpha": alpha} for alpha in alphas]


def problem(
    dtype: torch.dtype = torch.float64, layout: str = "contiguous", size: Size = SIZE
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(11)
    levels = draw_levels(size, generator, dtype=dtype, layout=layout)
    return levels, encode(draw_classes(size, generator), K)


def losses_and_gradients(function: Any, levels: list[Tensor], targets: Any, **options: Any) -> list[Tensor]:
    inputs = leaves(levels)
    loss = function(inputs, targets, **options)
    parts = loss if isinstance(loss, list) else [loss]
    # Each its own factor, so that parts cannot change places.
    total = sum(((i + 1) * part.double()).sum() for i, part in enumerate(parts))
    return [*(part.detach() for part in parts), *torch.autograd.grad(total, inputs)]


def compare(member: Member, levels: list[Tensor], targets: Any, relative: float, **options: Any) -> None:
    """The kernels with the reference in float64, from the same logits."""
    slow = getattr(reference, member.parameters.name)
    exact = [x.detach().double().cpu() for x in levels]
    on_host = move(options, torch.device("cpu")) if not isinstance(options, dict) else {
        name: move(value, torch.device("cpu")) for name, value in options.items()
    }  # fmt: skip
    want = losses_and_gradients(slow, exact, move(targets, torch.device("cpu")), **on_host)
    got = losses_and_gradients(member.function, levels, targets, **options)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w.numpy(), relative)


# Weights, sums of 160 terms of float32, and one rounding to 16 bits, which assert_close adds.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


# --- class_weight -----------------------------------------------------------------------------------------------------

CLASS_WEIGHTS: dict[str, Any] = {
    "numbers": ROW,
    "two_rows": ROWS,
    "tensor": torch.tensor(ROW),
    "tensor_of_two_rows": torch.tensor(ROWS),
}


@pytest.mark.parametrize("given", CLASS_WEIGHTS)
@labelled_members
def test_class_weight_means_factors(member: Member, given: str) -> None:
    """The reference against its own elementwise losses, times the factor that belongs to class and target."""
    levels, labels = problem()
    slow = getattr(reference, member.parameters.name)
    rows = torch.tensor(
        CLASS_WEIGHTS[given] if isinstance(CLASS_WEIGHTS[given], list) else CLASS_WEIGHTS[given].tolist()
    )
    positive, negative = rows.double().expand(2, K)
    pairs = []
    for alpha in alphas(member, 0.25, None, ALPHA, torch.tensor(ALPHA)):
        options: dict[str, Any] = {"num_classes": K, "normalizer": None, "reduction": "none", **alpha}
        weighted = slow(levels, labels, class_weight=CLASS_WEIGHTS[given], **options)
        pairs += zip(weighted, slow(levels, labels, **options), labels, SIZE.cells, strict=True)
    for got, plain, label, (h, w) in pairs:
        one_hot = nn.functional.one_hot(label.clamp(0, K), K + 1)[..., :K].double()
        factor = one_hot * positive + (1 - one_hot) * negative  # (N, M, K)
        as_logits = factor.view(2, h, w, 2, K).permute(0, 3, 4, 1, 2).reshape(plain.shape)
        torch.testing.assert_close(got, plain * as_logits, rtol=1e-14, atol=0)  # float64: three roundings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", CLASS_WEIGHTS)
@labelled_members
def test_class_weight(backend: Backend, member: Member, given: str, layout: str, dtype: torch.dtype) -> None:
    levels, labels = (move(part, backend.device) for part in problem(dtype, layout))
    weight = move(CLASS_WEIGHTS[given], backend.device)
    compare(member, levels, labels, RELATIVE[dtype], num_classes=K, class_weight=weight)
    for alpha in alphas(member, ALPHA):
        options = {"num_classes": K, "class_weight": weight, "reduction": "level", **alpha}
        compare(member, levels, labels, RELATIVE[dtype], **options)


@pytest.mark.parametrize("given", CLASS_WEIGHTS)
@members
def test_class_weight_of_soft_targets(backend: Backend, member: Member, given: str) -> None:
    levels, _ = problem()
    soft = [x.sigmoid().roll(1, 1) for x in levels]
    levels, soft = move(levels, backend.device), move(soft, backend.device)
    weight = move(CLASS_WEIGHTS[given], backend.device)
    compare(member, levels, soft, 1e-12, num_classes=K, class_weight=weight, normalizer=3.0)


@pytest.mark.parametrize("given", CLASS_WEIGHTS)
@labelled_members
def test_class_weight_of_a_module(member: Member, given: str) -> None:
    """Kept as a buffer, no part of the state, in float64; and it can be set later."""
    levels, labels = problem(torch.float32)
    weight = CLASS_WEIGHTS[given]
    want = member.function(levels, labels, num_classes=K, class_weight=weight)
    criterion = member.module(K, class_weight=weight)
    assert "class_weight=[0.5, 1, 2, 0, ...]" in repr(criterion)
    later = member.module(K)
    later(levels, labels)
    later.class_weight = weight
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    copies = [criterion, later, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), criterion.half()]
    copies += [torch.load(buffer, weights_only=False), criterion.to("meta").to_empty(device="cpu")]
    for twin in copies:
        assert same_bits(twin(levels, labels), want)
        assert twin.class_weight.dtype == torch.float64 and not twin.state_dict() and not list(twin.parameters())
    later.class_weight = None
    assert same_bits(later(levels, labels), member.function(levels, labels, num_classes=K)) and not list(
        later.buffers()
    )


WRONG_CLASS_WEIGHTS: list[tuple[Any, type[Exception], str]] = [
    (2.0, TypeError, "expected 5 numbers, or two rows of 5"),
    ("12345", TypeError, "expected 5 numbers"),
    ([1.0, "a", 1.0, 1.0, 1.0], TypeError, "expected 5 numbers"),
    ([1.0] * 4, ValueError, "two rows of 5 .* got 4"),
    ([ROW, ROW, ROW], ValueError, "got 5 and 5 and 5"),
    ([ROW, [1.0]], ValueError, "got 5 and 1"),
    ([1.0, float("nan"), 1.0, 1.0, 1.0], ValueError, "finite numbers"),
    (torch.ones(4), ValueError, r"expected shape \(5,\), or \(2, 5\) .* got \(4,\)"),
    (torch.ones(3, 5), ValueError, r"got \(3, 5\)"),
    (torch.tensor([1.0, float("inf"), 1.0, 1.0, 1.0]), ValueError, "finite numbers"),
    (torch.ones(5, dtype=torch.complex64), TypeError, "real numbers, got torch.complex64"),
    (torch.ones(5, requires_grad=True), ValueError, "requires_grad=False"),
    (torch.ones(5, device="meta"), ValueError, "without data"),
]


@pytest.mark.parametrize("wrong, error, words", WRONG_CLASS_WEIGHTS, ids=lambda value: str(value)[:20])
def test_wrong_class_weights(wrong: Any, error: type[Exception], words: str) -> None:
    levels, labels = problem()
    for call in (
        lambda: focal_loss(levels, labels, num_classes=K, class_weight=wrong),
        lambda: reference.focal_loss(levels, labels, num_classes=K, class_weight=wrong),
        lambda: FastFocalLoss(K, class_weight=wrong),
    ):
        with pytest.raises(error, match=f"^class_weight: .*{words}"):
            call()


# --- class_mask -------------------------------------------------------------------------------------------------------


def without_absent(levels: list[Tensor], bad: float) -> list[Tensor]:
    """The logits of absent classes replaced."""
    absent = ~MASK.repeat(1, 2)[:, :, None, None]  # (N, A*K, 1, 1)
    return [torch.where(absent, torch.tensor(bad, dtype=x.dtype), x) for x in levels]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none", "mean"])
@labelled_members
def test_class_mask_means_that_classes_are_absent(member: Member, reduction: str, bad: float) -> None:
    """The reference, image by image and class by class: the others as if these were not there, and the absent nothing."""
    levels, labels = problem()
    slow = getattr(reference, member.parameters.name)
    options: dict[str, Any] = {"num_classes": K, "normalizer": None}
    inputs = leaves(without_absent(levels, bad))
    masked = slow(inputs, labels, class_mask=MASK, reduction=reduction, **options)
    parts = masked if isinstance(masked, list) else [masked]
    grads = torch.autograd.grad([part.sum() for part in parts], inputs)
    plain = slow(levels, labels, reduction="none", **options)
    kept = [loss * MASK.repeat(1, 2)[:, :, None, None] for loss in plain]
    counted = sum(int((y[n] != -1).sum()) * int(MASK[n].sum()) for y in labels for n in range(2))
    want: Any = {
        "sum": sum(loss.sum() for loss in kept),
        "level": torch.stack([loss.sum() for loss in kept]),
        "image": sum(loss.sum((1, 2, 3)) for loss in kept),
        "none": kept,
        "mean": sum(loss.sum() for loss in kept) / counted,
    }[reduction]
    torch.testing.assert_close(masked, want, rtol=1e-13, atol=0)  # float64: sums of 160 terms
    for g in grads:
        assert not g[~MASK.repeat(1, 2)].any() and g.isfinite().all() and g.any()


MASKED = pytest.mark.parametrize("form", ["contiguous", "transposed", "expanded"])


def mask_of(form: str) -> Tensor:
    if form == "transposed":
        return MASK.t().contiguous().t()
    return MASK[:1].expand(2, K) if form == "expanded" else MASK


@MASKED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@labelled_members
def test_class_mask(backend: Backend, member: Member, layout: str, dtype: torch.dtype, form: str) -> None:
    levels, labels = (move(part, backend.device) for part in problem(dtype, layout))
    mask = move(mask_of(form), backend.device)
    for options in ({}, {"reduction": "mean"}, {"class_weight": ROWS, "normalizer": "positives_per_image"}):
        compare(member, levels, labels, RELATIVE[dtype], num_classes=K, class_mask=mask, **options)


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@labelled_members
def test_absent_classes_leave_no_trace(backend: Backend, member: Member, bad: float, mode: str) -> None:
    levels, labels = problem(torch.float32)
    results = []
    for value in (0.0, bad):
        inputs = leaves(move(without_absent(levels, value), backend.device))
        given = [x * 1 for x in inputs] if mode == "inplace" else inputs
        loss = member.function(
            given, move(labels, backend.device), num_classes=K, class_mask=move(MASK, backend.device), grad_mode=mode
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)
    for g in results[0][1:]:
        assert not g[~MASK.repeat(1, 2)].any() and g.any()


@members
def test_class_mask_of_soft_targets(backend: Backend, member: Member) -> None:
    levels, _ = problem()
    soft = [x.sigmoid().roll(1, 1) for x in levels]
    for options in ({"normalizer": 3.0}, {"reduction": "mean"}):
        given = move(levels, backend.device), move(soft, backend.device)
        compare(member, *given, 1e-12, num_classes=K, class_mask=move(MASK, backend.device), **options)


@labelled_members
def test_class_mask_of_one_image(backend: Backend, member: Member) -> None:
    mask = move(MASK, backend.device)
    rows = move(torch.randn(7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), backend.device)
    labels = move(torch.tensor([0, 5, 1, 4, -1, 5, 3]), backend.device)
    compare(member, [rows], [labels], 1e-12, class_mask=mask[0], reduction="mean")


def test_no_class_is_there() -> None:
    levels, labels = problem()
    nothing = torch.zeros(2, K, dtype=torch.bool)
    loss = reference.focal_loss(levels, labels, num_classes=K, class_mask=nothing, reduction="mean")
    assert loss == 0


WRONG_MASKS: list[tuple[Any, type[Exception], str]] = [
    (MASK.int(), TypeError, "expected torch.bool, got torch.int32"),
    (MASK[:1], ValueError, r"expected shape \(2, 5\), .* got \(1, 5\)"),
    (MASK[0], ValueError, r"got \(5,\)"),
    (MASK.to("meta"), ValueError, "expected the logits' device, cpu, got meta"),
    ([True] * K, TypeError, "expected a tensor, got list"),
    (MASK.to_sparse(), TypeError, "ordinary"),
]


@pytest.mark.parametrize("wrong, error, words", WRONG_MASKS, ids=lambda value: str(value)[:20])
def test_wrong_class_masks(wrong: Any, error: type[Exception], words: str) -> None:
    levels, labels = problem()
    for call in (
        lambda: focal_loss(levels, labels, num_classes=K, class_mask=wrong),
        lambda: reference.focal_loss(levels, labels, num_classes=K, class_mask=wrong),
        lambda: FastFocalLoss(K)(levels, labels, class_mask=wrong),
    ):
        with pytest.raises(error, match=f"^class_mask: .*{words}"):
            call()


# --- scores -----------------------------------------------------------------------------------------------------------


@checked
class Scored(Loss):
    """Binary cross entropy whose positives have their score for a target; the negatives weigh 0.75."""

    kind = 0  # for the operator's checks; the kernels of focal loss read no scores
    name = "scored"
    takes_scores = True

    def weights(self, num_classes: int, device: torch.device) -> tuple[float, float]:
        return 1.0, 0.75

    def parameters(self) -> list[float]:
        return [0.0, 0.0, 0.0]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        return nn.functional.softplus(x) - torch.where(y > 0, score, 0.0) * x


def scored_problem() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    levels, labels = problem()
    generator = torch.Generator().manual_seed(3)
    return levels, labels, [torch.rand(y.shape, generator=generator) for y in labels]


@pytest.mark.parametrize("form", ["list", "one"])
def test_scores_mean_targets_of_positives(form: str) -> None:
    levels, labels, scores = scored_problem()
    given = scores if form == "list" else torch.cat(scores, 1)
    inputs = Inputs(levels, labels, normalizer="scores", scores=given)
    got = reference.pyramid_loss(Scored(), Options(num_classes=K), inputs)
    total = of_positives = torch.zeros((), dtype=torch.float64)
    for x, y, s, (h, w) in zip(levels, labels, scores, SIZE.cells, strict=True):
        rows = x.view(2, 2, K, h, w).permute(0, 3, 4, 1, 2).reshape(-1, K)
        for row, label, score in zip(rows, y.flatten().tolist(), s.double().flatten().tolist(), strict=True):
            target = torch.zeros(K, dtype=torch.float64)
            if label == -1:
                continue
            if label < K:
                target[label] = score
                of_positives = of_positives + score
            terms = nn.functional.binary_cross_entropy_with_logits(row, target, reduction="none")
            weight = torch.full((K,), 0.75, dtype=torch.float64)
            if label < K:
                weight[label] = 1.0
            total = total + (weight * terms).sum()
    torch.testing.assert_close(got, total / of_positives.clamp(min=1), rtol=1e-13, atol=0)  # float64: 160 terms


def test_soft_targets_of_a_scored_loss_are_scores() -> None:
    levels, _ = problem()
    soft = [torch.where(x > 1, x.sigmoid().roll(1, 1), 0.0) for x in levels]
    got = reference.pyramid_loss(
        Scored(), Options(num_classes=K, reduction="none"), Inputs(levels, soft, normalizer=None)
    )
    for loss, x, y in zip(got, levels, soft, strict=True):
        want = nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none") * torch.where(y > 0, 1.0, 0.75)
        torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-14)  # softplus(x) - s x cancels


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_come_in_the_order_of_the_packed_labels(dtype: torch.dtype, layout: str) -> None:
    """As float32 beside 16-bit logits, whatever shape they came in."""
    levels, labels = problem(dtype, layout)
    # Scores that say which label they belong to, exact in every dtype: the packed labels have the same order.
    scores = [y.float() for y in labels]
    prepared = prepare(Scored(), Options(num_classes=K), Inputs(levels, labels, scores=scores))
    assert prepared.options.scores is not None and prepared.labels is not None
    assert prepared.options.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    packed, _ = fastfocal.ops.pack_labels(
        prepared.labels, prepared.pyramid.dense, None, K, K, -1, fastfocal.ops.COUNT_NOTHING, 1.0
    )
    by_score: dict[float, set[int]] = {}
    for score, label in zip(prepared.options.scores.tolist(), packed.tolist(), strict=True):
        by_score.setdefault(score, set()).add(label)
    assert len(by_score) > 3 and all(len(packed_labels) == 1 for packed_labels in by_score.values())


def test_wrong_scores() -> None:
    levels, labels, scores = scored_problem()
    soft = [x.sigmoid() for x in levels]

    def call(loss: Loss, targets: Any = labels, **inputs: Any) -> None:
        options = Options(num_classes=K)
        slow = pytest.raises((ValueError, TypeError))
        with slow as said:
            reference.pyramid_loss(loss, options, Inputs(levels, targets, **inputs))
        assert str(said.value).startswith(("scores", "normalizer"))
        prepare(loss, options, Inputs(levels, targets, **inputs))

    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss": FocalLoss(), "scores": scores}, "^scores: focal_loss takes none"),
        ({"loss": Scored(), "scores": scores, "targets": soft, "normalizer": 1.0}, "^scores: soft targets are scores"),
        (
            {"loss": Scored(), "normalizer": "scores"},
            "^normalizer: 'scores' sums the scores of positives, expected scores",
        ),
        ({"loss": FocalLoss(), "normalizer": "scores"}, "^normalizer: expected one of 'positives', "),
        ({"loss": Scored(), "scores": [s.requires_grad_() for s in copy.deepcopy(scores)]}, "^scores"),
        ({"loss": Scored(), "scores": scores[:1]}, "^scores: expected 2 levels"),
    ]
    for arguments, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            call(**arguments)
    for wrong, words in (([s.long() for s in scores], "floating scores"), ([s[:1] for s in scores], "expected shape")):
        with pytest.raises((ValueError, TypeError), match=rf"^scores\[0\]: .*{words}"):
            prepare(Scored(), Options(num_classes=K), Inputs(levels, labels, scores=wrong))
    with pytest.raises(TypeError, match="scores"):
        FastFocalLoss(K)(levels, labels, scores=scores)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^scores: focal_loss takes none"):
        focal_loss(levels, labels, num_classes=K, scores=scores)  # type: ignore[call-overload]


def test_targets_of_one_kind_alone() -> None:
    levels, labels = problem()
    soft = [x.sigmoid() for x in levels]
    for targets, kind, words in ((soft, "labels", "integer labels, got floating"), (labels, "soft", "got integer")):
        only = type("Only", (Scored,), {"targets": kind, "name": "only"})()
        for compute in (prepare, reference.pyramid_loss):
            with pytest.raises(TypeError, match=f"^targets: only expects .*{words}"):
                compute(only, Options(num_classes=K), Inputs(levels, targets, normalizer=None))


# --- keywords, signatures, and what was saved -------------------------------------------------------------------------


@every_member
def test_unknown_keywords_are_refused_as_python_does(member: Member) -> None:
    levels, labels = problem()
    name = member.parameters.name
    for call, said in (
        (lambda: member.function(levels, labels, num_classes=K, gama=2.0), rf"{name}\(\)"),
        (lambda: getattr(reference, name)(levels, labels, num_classes=K, gama=2.0), rf"{name}\(\)"),
        (lambda: member.module(K, gama=2.0), rf"{member.module.__name__}.__init__\(\)"),
        (lambda: getattr(reference, member.module.__name__)(K, gama=2.0), r"\w*Loss\w*.__init__\(\)"),
    ):
        with pytest.raises(TypeError, match=rf"^{said} got an unexpected keyword argument 'gama'"):
            call()


SAVED = Path(__file__).with_name("saved") / "modules_0.1.0.pt"


def test_modules_that_version_0_1_0_saved_whole_are_read() -> None:
    """They name their classes by the modules these were in, and hold what had been checked."""
    saved = torch.load(SAVED, weights_only=False)
    classes = {
        "focal": FastFocalLoss,
        "scheduled": FastFocalLoss,
        "star": FastFocalLossStar,
        "reference": reference.FocalLoss,
        "reference_star": reference.FocalLossStar,
    }
    assert saved["modules"].keys() == classes.keys()
    for name, criterion in saved["modules"].items():
        assert type(criterion) is classes[name]
        labels = saved["labels"]
        if name in ("focal", "star"):  # which ignore 255
            labels = [y.clamp(min=0) for y in labels]
        for twin in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            # Of another processor, perhaps: float32, sums of 160 terms.
            torch.testing.assert_close(twin(saved["levels"], labels), saved["losses"][name], rtol=1e-5, atol=0)
    focal = saved["modules"]["focal"]
    assert focal.alpha.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5] and focal.class_weight is None and not focal.state_dict()
    assert "gamma=1.5" in repr(focal) and "level_weights=[1.0, 3.0]" in repr(focal)
    focal.class_weight = ROW
    focal(saved["levels"], [y.clamp(min=0) for y in saved["labels"]])
    assert saved["modules"]["scheduled"].gamma == 3.0


def test_what_is_saved_now_names_no_internals() -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(K, alpha=ALPHA, class_weight=ROW)
    criterion(levels, labels)
    state = criterion.__getstate__()
    held = torch.utils._pytree.tree_leaves(state)
    assert not [x for x in held if isinstance(x, (Loss, Options, ClassValues))]


def test_a_shared_option_is_named_by_everyone() -> None:
    """Every option that has a default is a keyword of every function and of every module, but for those of a call."""
    import inspect

    shared = {field.name for field in dataclasses.fields(Options)} | {
        "weight",
        "normalizer",
        "class_weight",
        "class_mask",
    }
    for member in LOSSES:
        own = {field.name for field in dataclasses.fields(member.parameters)}
        wanted = shared | own | ({"scores"} if member.parameters.takes_scores else set())
        for function in (member.function, getattr(reference, member.parameters.name)):
            assert set(inspect.signature(function).parameters) == {"logits", "targets"} | wanted
        kept = wanted - {"weight", "class_mask", "scores"} | set(MODULE_DEFAULTS)
        assert set(inspect.signature(member.module).parameters) >= kept
