"""oracle_losses.py against the papers' formulas in 60-digit arithmetic, and against the projects' own code in float64."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import oracle_losses
import pytest
import torch
from oracle_losses import Array, Element, Loss
from torch import Tensor

Formula = Callable[[Any], Any]  # of a logit (or a probability), in mpmath's numbers

mpmath.mp.dps = 60

LOGITS = [-28.0, -7.25, -2.9444, -1.0, -1e-3, 0.0, 0.5, 1.5, 9.0, 28.0]
SCORES = [0.0, 1e-6, 0.01, 0.3, 0.5, 0.75, 1 - 2.0**-24, 1.0]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def cross_entropy(x: Any, t: Any) -> Any:
    """No 0 log 0 arises: logits are finite."""
    p = sigmoid(x)
    return -t * mpmath.log(p) - (1 - t) * mpmath.log(1 - p)


def product(x: float, constant: Formula, factor: Formula, detached: bool) -> tuple[Any, Any, Any]:
    """constant(x) factor(x) and its two derivatives, to which the first is a constant where `detached`."""
    at = mpmath.mpf(x)
    held = constant(at)

    def whole(z: Any) -> Any:
        return (held if detached else constant(z)) * factor(z)

    return whole(at), mpmath.diff(whole, at), mpmath.diff(whole, at, 2)


def power(base: Any, exponent: float) -> Any:
    return mpmath.mpf(1) if exponent == 0 else base ** mpmath.mpf(exponent)


def n(gamma: float) -> Formula:
    return lambda z: power(sigmoid(z), gamma)


def textbook(name: str, numbers: dict[str, Any], x: float, s: float | None) -> tuple[Any, Any, Any]:
    """Loss and derivatives of a negative (s None), or a positive's, or of the soft target s of a loss without scores."""
    detached = bool(numbers.get("detached", False))
    zero = lambda z: cross_entropy(z, 0)  # noqa: E731
    score = None if s is None else mpmath.mpf(s)
    if name in ("varifocal", "iou_aware_bce", "matchability_aware", "quality_focal", "bce") and score is None:
        gamma = {"bce": 0.0, "quality_focal": numbers.get("beta")}.get(name, numbers.get("gamma"))
        return product(x, n(gamma), zero, detached or name == "matchability_aware")  # type: ignore[arg-type]
    if name == "varifocal":
        weight = score if numbers["iou_weighted"] else 1
        return product(x, lambda z: weight, lambda z: cross_entropy(z, score), False)
    if name == "quality_focal":
        return product(
            x, lambda z: power(abs(score - sigmoid(z)), numbers["beta"]), lambda z: cross_entropy(z, score), False
        )
    if name == "matchability_aware":
        t = power(score, numbers["gamma"])
        return product(x, lambda z: 1, lambda z: cross_entropy(z, t), False)
    if name == "iou_aware_bce":
        alpha = mpmath.mpf(numbers["alpha"])
        t = max(mpmath.mpf(0.01), power(sigmoid(mpmath.mpf(x)), alpha) * power(score, 1 - alpha))
        return product(x, lambda z: 1, lambda z: cross_entropy(z, t), False)
    if name == "bce":
        return product(x, lambda z: 1, lambda z: cross_entropy(z, score), False)
    y = mpmath.mpf(0) if score is None else score
    if name == "gaussian_focal":
        eps = mpmath.mpf(numbers["eps"])

        def clamped(z: Any) -> Any:
            return min(max(sigmoid(z), eps), 1 - eps)

        if y == 1:
            return product(
                x, lambda z: power(1 - clamped(z), numbers["alpha"]), lambda z: -mpmath.log(clamped(z)), False
            )
        factor = power(1 - y, numbers["gamma"])
        return product(
            x, lambda z: factor * power(clamped(z), numbers["alpha"]), lambda z: -mpmath.log(1 - clamped(z)), False
        )
    assert name == "asymmetric_loss"
    clip = mpmath.mpf(numbers["clip"])

    def shifted(z: Any) -> Any:
        return max(sigmoid(z) - clip, mpmath.mpf(0))

    yes = product(x, lambda z: power(1 - sigmoid(z), numbers["gamma_pos"]), lambda z: cross_entropy(z, 1), detached)
    no = product(x, lambda z: power(shifted(z), numbers["gamma_neg"]), lambda z: -mpmath.log(1 - shifted(z)), detached)
    first, gradient, second = (y * a + (1 - y) * b for a, b in zip(yes, no, strict=True))
    return first, gradient, second


PROBLEMS: list[tuple[str, dict[str, Any]]] = [
    ("varifocal", {"gamma": 2.0, "iou_weighted": True, "detached": False}),
    ("varifocal", {"gamma": 1.5, "iou_weighted": False, "detached": True}),
    ("varifocal", {"gamma": 0.0, "iou_weighted": True, "detached": False}),
    ("quality_focal", {"beta": 2.0}),
    ("quality_focal", {"beta": 0.5}),
    ("quality_focal", {"beta": 3.3}),
    ("quality_focal", {"beta": 0.0}),
    ("matchability_aware", {"gamma": 1.5}),
    ("matchability_aware", {"gamma": 2.0}),
    ("matchability_aware", {"gamma": 0.0}),
    ("iou_aware_bce", {"alpha": 0.25, "gamma": 2.0}),
    ("iou_aware_bce", {"alpha": 0.0, "gamma": 1.5}),
    ("iou_aware_bce", {"alpha": 1.0, "gamma": 2.0}),
    ("bce", {}),
    ("gaussian_focal", {"alpha": 2.0, "gamma": 4.0, "eps": 0.0}),
    ("gaussian_focal", {"alpha": 2.0, "gamma": 4.0, "eps": 1e-4}),
    ("gaussian_focal", {"alpha": 0.5, "gamma": 1.5, "eps": 1e-2}),
    ("asymmetric_loss", {"gamma_pos": 1.0, "gamma_neg": 4.0, "clip": 0.05, "detached": False}),
    ("asymmetric_loss", {"gamma_pos": 1.0, "gamma_neg": 4.0, "clip": 0.05, "detached": True}),
    ("asymmetric_loss", {"gamma_pos": 0.0, "gamma_neg": 0.5, "clip": 0.2, "detached": False}),
    ("asymmetric_loss", {"gamma_pos": 0.5, "gamma_neg": 2.5, "clip": 0.0, "detached": False}),
]


def name_of(problem: tuple[str, dict[str, Any]]) -> str:
    return problem[0] + "".join(f"_{value:g}" for value in problem[1].values())


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_the_papers_formulas(problem: tuple[str, dict[str, Any]]) -> None:
    name, numbers = problem
    loss: Loss = getattr(oracle_losses, name)(**numbers)
    x = np.array(LOGITS, dtype=np.longdouble)
    for s in (None, *SCORES):
        # The error of extended precision, 1e-19, times a hundred: what a difference of rounded numbers makes of it too.
        relative = 1e-17
        if s is None:
            found = loss.negative(x, relative=relative)
        elif name in ("gaussian_focal", "asymmetric_loss"):
            found = loss.dense(x, np.full_like(x, s), relative=relative)
        else:
            found = loss.positive(x, np.full_like(x, s), relative=relative)
        for i, logit in enumerate(LOGITS):
            met = name == "quality_focal" and s == float(sigmoid(mpmath.mpf(logit)))
            if met and 0 < numbers["beta"] <= 1:
                continue  # |p - s| has no derivative at 0
            want = textbook(name, numbers, logit, s)
            for got, expected, bound, what in zip(
                (found.loss[i], found.gradient[i], found.second[i]),
                want,
                (found.loss_bound[i], found.gradient_bound[i], found.second_bound[i]),
                ("loss", "gradient", "second derivative"),
                strict=True,
            ):
                if met and what == "second derivative" and numbers["beta"] not in (0, 2):
                    continue  # nor a second one, below 2; above, mpmath's differences reach 0 at a root of their steps alone
                # mpmath's diff is good to half of its digits.
                error = abs(exactly(got) - expected)
                # np.float64 where extended precision is no more than that
                slack = 1e-25 * (1 + abs(expected))
                if np.finfo(np.longdouble).eps > 1e-18:
                    bound = bound * 1e3
                assert error <= exactly(bound) + slack, (what, logit, s, got, expected)


def exactly(value: Any) -> Any:
    """An extended number, without the rounding of float()."""
    high = float(value)
    return mpmath.mpf(high) + mpmath.mpf(float(value - np.longdouble(high)) if np.isfinite(high) else 0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.5, 2.0, 5.0])
def test_quality_focal_loss_of_probabilities_is_torchs(beta: float) -> None:
    """mmdetection's quality_focal_loss_with_prob: torch's binary_cross_entropy, whose logarithms end at -100."""
    p = torch.tensor([0.0, 1e-300, 1e-14, 1e-6, 0.1, 0.5, 0.9, 1 - 2.0**-24, 1.0], dtype=torch.float64)
    for s in SCORES:
        leaf = p.clone().requires_grad_()
        score = torch.full_like(p, s)
        loss = torch.nn.functional.binary_cross_entropy(leaf, score, reduction="none") * (score - leaf).abs().pow(beta)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), leaf)
        # Extended: of 1e-300 float64 has no powers.
        exact = (part.numpy().astype(np.longdouble) for part in (p, score))
        found = oracle_losses.quality_focal(beta, activated=True).positive(*exact, relative=1e-8)
        with np.errstate(over="ignore"):
            found = Element(*(part.astype(np.float64) for part in found))
        # |p - s|^beta has no derivative at 0, and torch makes 0 * inf of it for beta < 1.
        away = (p != s) | (beta == 0) | (beta > 1)
        np.testing.assert_allclose(found.loss, loss.detach().numpy(), rtol=1e-13, atol=0)
        # torch's 1e-12 is a float32, off by 4e-9.
        np.testing.assert_allclose(found.gradient[away], gradient.detach().numpy()[away], rtol=1e-8, atol=0)
        # Its terms have either sign for beta < 1. At p = s torch takes |p - s|^2, a parabola, for flat; of p next to 0 its
        # log(1 - p) has lost half of the digits, and powers of 1e-300 are 0 or infinite.
        away = ((p.numpy() != s) | (beta == 0)) & np.isfinite(second.numpy())
        assert away.sum() >= len(p) - 2
        ours, theirs = found.second[away], second.numpy()[away]
        bound = found.second_bound[away] + 1e-300 + np.where(p.numpy()[away] < 1e-8, 1e-8 * np.abs(ours), 0)
        with np.errstate(invalid="ignore"):
            error = np.abs(ours - theirs)
        assert ((ours == theirs) | (error <= bound)).all()


def test_limits() -> None:
    """At infinity the loss has its limit and the gradient is finite; -inf costs a negative nothing; NaN stays NaN."""
    x = np.array([np.inf, -np.inf, np.nan])
    for name, numbers in PROBLEMS:
        loss: Loss = getattr(oracle_losses, name)(**numbers)
        for s in SCORES:
            for found in (loss.negative(x), loss.positive(x, np.full(3, s)), loss.dense(x, np.full(3, s))):
                assert not np.isnan(found.loss[:2]).any() and np.isfinite(found.gradient[:2]).all(), (name, s)
                assert np.isnan(found.loss[2]) and np.isnan(found.gradient[2]), (name, s)
                assert np.isfinite(found.second[:2]).all() and np.isnan(found.second[2]), (name, s)
        negative = loss.negative(x)
        assert negative.loss[1] == 0 and negative.gradient[1] == 0 and negative.second[1] == 0


# --- the projects' own code, in float64 -------------------------------------------------------------------------------


def random_problem(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of the last dimension's classes (one past the last: background) and scores, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(shape[-1] + 1, shape[:-1], generator=generator)
    return x, labels, torch.rand(shape[:-1], generator=generator, dtype=torch.float64)


def hold(loss: Callable[[Tensor], Tensor], expected: Callable[[Array], tuple[Array, Array]], x: Tensor) -> None:
    """A host's loss, a sum or not, and its gradient against the sum of the oracle's elements."""
    leaf = x.clone().requires_grad_()
    total = loss(leaf).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    want_loss, want_gradient = expected(x.numpy())
    assert total.item() == pytest.approx(want_loss.sum(), rel=1e-12)
    # Hosts subtract p from 1 and 1 from p: 1e-16 of 1 is lost, whatever is left.
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-9, atol=1e-13)


def of_labels(loss: Loss, labels: Tensor, scores: Tensor, negative_weight: float = 1.0) -> Callable[[Array], Any]:
    def expected(x: Array) -> tuple[Array, Array]:
        positive = np.zeros(x.shape, dtype=bool)
        kept = labels < x.shape[-1]
        positive[(*np.nonzero(kept.numpy()), labels[kept].numpy())] = True
        s = np.broadcast_to(scores.numpy()[..., None], x.shape)
        yes, no = loss.positive(x, s), loss.negative(x)
        return (
            np.where(positive, yes.loss, negative_weight * no.loss),
            np.where(positive, yes.gradient, negative_weight * no.gradient),
        )

    return expected


def dense_targets(x: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    one_hot = torch.nn.functional.one_hot(labels, x.shape[-1] + 1)[..., :-1]
    return one_hot * scores[..., None]


@pytest.fixture(scope="module")
def mmdet_losses() -> Any:
    """mmcv-lite will do: no compiled operator is called here."""
    pytest.importorskip("mmcv")
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:

        class Absent(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return None

        sys.modules["mmcv._ext"] = Absent("mmcv._ext")
    pytest.importorskip("mmdet", exc_type=Exception)
    from mmdet.models import losses

    return losses


@pytest.mark.parametrize("iou_weighted", [True, False])
def test_mmdetections_varifocal_loss(mmdet_losses: Any, iou_weighted: bool) -> None:
    x, labels, scores = random_problem(40, 7)
    host = mmdet_losses.VarifocalLoss(alpha=0.75, gamma=2.0, iou_weighted=iou_weighted, reduction="sum")
    ours = oracle_losses.varifocal(2.0, iou_weighted)
    hold(lambda leaf: host(leaf, dense_targets(x, labels, scores)), of_labels(ours, labels, scores, 0.75), x)


@pytest.mark.parametrize("beta", [2.0, 1.5])
def test_mmdetections_quality_focal_loss(mmdet_losses: Any, beta: float) -> None:
    x, labels, scores = random_problem(40, 7)
    host = mmdet_losses.QualityFocalLoss(beta=beta, reduction="sum")
    ours = of_labels(oracle_losses.quality_focal(beta), labels, scores)
    hold(lambda leaf: host(leaf, (labels, scores)), ours, x)
    hold(lambda leaf: host(leaf, dense_targets(x, labels, scores)), ours, x)
    activated = mmdet_losses.QualityFocalLoss(beta=beta, reduction="sum", activated=True)
    ours = of_labels(oracle_losses.quality_focal(beta, activated=True), labels, scores)
    hold(lambda leaf: activated(leaf, (labels, scores)), ours, x.sigmoid())


@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_mmdetections_gaussian_focal_loss(mmdet_losses: Any, eps: float) -> None:
    """CenterNet's head gives it sigmoids, mmdet3d's clamped ones; the 1e-12 inside of its logarithms does not show here."""
    x, _, _ = random_problem(2, 3, 8, 8)
    x = x.clamp(-9, 9) if eps == 0 else 2 * x
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y[0, 0, 2, 3] = y[1, 2, 7, 0] = 1.0
    host = mmdet_losses.GaussianFocalLoss(alpha=2.0, gamma=4.0, reduction="sum")

    def loss(leaf: Tensor) -> Tensor:
        p = leaf.sigmoid()
        return host(torch.clamp(p, eps, 1 - eps) if eps else p, y)

    leaf = x.clone().requires_grad_()
    total = loss(leaf)
    (gradient,) = torch.autograd.grad(total, leaf)
    found = oracle_losses.gaussian_focal(2.0, 4.0, eps).dense(x.numpy(), y.numpy())
    assert total.item() == pytest.approx(found.loss.sum(), rel=1e-8)  # 1e-12 beside 1e-4
    np.testing.assert_allclose(gradient.numpy(), found.gradient, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_timms_asymmetric_loss(clip: float, detached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logarithms end at log(1e-8), which logits of up to 14 do not reach."""
    timm_loss = pytest.importorskip("timm.loss", exc_type=Exception)
    host = timm_loss.AsymmetricLossMultiLabel(4.0, 1.0, clip, disable_torch_grad_focal_loss=detached, reduction="sum")
    x, labels, scores = random_problem(40, 7)
    x, y = x.clamp(-14, 14), dense_targets(x, labels, torch.ones_like(scores))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it computes in float32 whatever it is given
    ours = oracle_losses.asymmetric_loss(1.0, 4.0, clip, detached)
    hold(lambda leaf: host(leaf, y), lambda x: ours.dense(x, y.numpy())[:2], x)


def test_ultralytics_varifocal_loss() -> None:
    loss_module = pytest.importorskip("ultralytics.utils.loss", exc_type=Exception)
    x, labels, scores = random_problem(3, 20, 5)
    x, scores = x.float().double(), scores.float().double()
    one_hot = dense_targets(x, labels, torch.ones_like(scores))
    host = loss_module.VarifocalLoss(gamma=1.5, alpha=0.25)
    leaf = x.float().requires_grad_()  # it computes in float32
    loss = host(leaf, one_hot * scores[..., None], one_hot) * x.shape[1]
    (gradient,) = torch.autograd.grad(loss, leaf)
    want_loss, want_gradient = of_labels(oracle_losses.varifocal(1.5), labels, scores, 0.25)(x.numpy())
    assert loss.item() == pytest.approx(want_loss.sum(), rel=1e-5)
    np.testing.assert_allclose(gradient.numpy(), want_gradient, rtol=1e-4, atol=1e-6)


def boxes_with_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (center and size) of 1 by s inside of unit boxes: their IoU is s."""
    outer = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64).expand(*scores.shape, 4)
    inner = outer.clone()
    inner[..., 3] = scores
    return inner, outer


DETRS = {
    "loss_rt_detr.RTDetrLoss.loss_labels_vfl": (oracle_losses.varifocal(1.5, True, True), 0.75),
    "loss_deimv2.Deimv2Loss.loss_labels_mal": (oracle_losses.matchability_aware(1.5), 0.75),
    "loss_lw_detr.LwDetrImageLoss.loss_labels": (oracle_losses.iou_aware_bce(0.25, 2.0), 1.0),
    "loss_d_fine.DFineLoss.loss_labels_vfl": (oracle_losses.varifocal(1.5, True, True), 0.75),
}


@pytest.mark.parametrize("path", DETRS)
def test_transformers_losses_of_detrs(path: str) -> None:
    """RT-DETR's and D-FINE's varifocal loss, DEIMv2's matchability-aware loss, LW-DETR's and RF-DETR's IoU-aware BCE."""
    module_name, class_name, method = path.split(".")
    module = pytest.importorskip(f"transformers.loss.{module_name}", exc_type=Exception)
    ours, negative_weight = DETRS[path]
    x, labels, scores = random_problem(2, 12, 5)
    scores = scores.clamp(0.05, 0.95)  # a box of no area has no IoU
    inner, outer = boxes_with_scores(scores)
    queries = [torch.nonzero(row < x.shape[-1])[:, 0] for row in labels]
    targets = [{"class_labels": labels[i][q], "boxes": outer[i][q]} for i, q in enumerate(queries)]
    indices = [(q, torch.arange(len(q))) for q in queries]
    host = getattr(module, class_name)
    criterion = types.SimpleNamespace(
        num_classes=x.shape[-1],
        alpha=0.75,
        gamma=1.5,
        mal_alpha=0.75,
        focal_alpha=0.25,
        _get_source_permutation_idx=lambda pairs: (
            torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)]),
            torch.cat([q for q, _ in pairs]),
        ),
    )

    def loss(leaf: Tensor) -> Tensor:
        (value,) = getattr(host, method)(
            criterion, {"logits": leaf, "pred_boxes": inner}, targets, indices, 1.0
        ).values()
        return value

    hold(loss, of_labels(ours, labels, scores, negative_weight), x)


def test_yolos_cross_entropy_is_torchs() -> None:
    x, labels, scores = random_problem(3, 20, 5)
    targets = dense_targets(x, labels, scores)
    hold(
        lambda leaf: torch.nn.functional.binary_cross_entropy_with_logits(leaf, targets, reduction="sum"),
        of_labels(oracle_losses.bce(), labels, scores),
        x,
    )
