"""fastfocal.compat.ultralytics against the real ultralytics: RT-DETR's losses and criterion, and YOLO's criteria."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph import fused_nodes
from precision import Precision, check, every_precision, large_logits
from torch import Tensor, nn

pytest.importorskip("ultralytics", exc_type=Exception)  # it needs torchvision

from ultralytics.cfg import get_cfg
from ultralytics.models.utils.loss import DETRLoss, RTDETRDetectionLoss
from ultralytics.nn import tasks
from ultralytics.utils import loss as host

from fastfocal import reference
from fastfocal.compat import ultralytics as compat

CLASSES, QUERIES = 9, 30


def scores(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, scores and one-hot labels: a third of the queries is matched."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, QUERIES, CLASSES, generator=generator, dtype=torch.float64) - 2).to(dtype).requires_grad_()
    k = torch.randint(CLASSES, (2, QUERIES), generator=generator)
    matched = torch.rand(2, QUERIES, generator=generator) < 0.3
    one_hot = nn.functional.one_hot(k, CLASSES) * matched.unsqueeze(-1)
    return logits, torch.rand(2, QUERIES, 1, generator=generator).to(dtype) * one_hot, one_hot


def both(stock: nn.Module, fast: nn.Module, logits: Tensor, *rest: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    found = []
    for criterion in (stock, fast):
        loss = criterion(logits, *rest)
        found.append([loss.detach(), torch.autograd.grad(loss, logits)[0]])
    return found[0], found[1]


@pytest.mark.parametrize("gamma, alpha", [(1.5, 0.25), (2.0, 0.75), (2.0, 0.0)])
def test_focal_loss(gamma: float, alpha: float) -> None:
    logits, _, one_hot = scores(torch.float64)
    theirs, ours = both(host.FocalLoss(gamma, alpha), compat.FastFocalLoss(gamma, alpha), logits, one_hot.double())
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-15)  # float64; their 1 - p_t cancels


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.75), (1.5, 0.25)])
def test_varifocal_loss(gamma: float, alpha: float) -> None:
    """ultralytics computes it in float32."""
    logits, q, one_hot = scores(torch.float32)
    theirs, ours = both(host.VarifocalLoss(gamma, alpha), compat.FastVarifocalLoss(gamma, alpha), logits, q, one_hot)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)  # sums of 540 terms in another order
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-5, atol=1e-6 * float(theirs[1].abs().max()))


@pytest.mark.parametrize("targets", ["alike", "float32", "bfloat16"])
@every_precision
def test_precision_of_the_focal_loss(precision: Precision, targets: str) -> None:
    """Its own dtype is the labels', as it multiplies in place what torch's cross entropy returns."""
    generator = torch.Generator().manual_seed(2)
    x = large_logits(1200, 2, CLASSES, generator=generator)
    y = (torch.rand(x.shape, generator=generator) < 0.1).double()

    def of(kind: type[nn.Module]) -> Callable[[Tensor], Tensor]:
        return lambda x: kind(2.0, 0.25)(x, y.to(x.dtype if targets == "alike" else getattr(torch, targets)))

    exact = lambda x: reference.sigmoid_focal_loss(x, y).mean(1).sum()  # noqa: E731
    loss = check(of(compat.FastFocalLoss), of(host.FocalLoss), exact, x, precision)
    assert loss.isinf() == (loss.dtype == torch.float16) and loss > 65504


@every_precision
def test_precision_of_the_varifocal_loss(precision: Precision) -> None:
    """float32, whatever the logits are: ultralytics casts them."""
    generator = torch.Generator().manual_seed(2)
    x = large_logits(1200, 2, CLASSES, generator=generator)
    one_hot = nn.functional.one_hot(torch.randint(CLASSES, (1200, 2), generator=generator), CLASSES)
    one_hot = one_hot * (torch.rand(1200, 2, 1, generator=generator) < 0.3)
    q = torch.rand(1200, 2, 1, generator=generator) * one_hot

    def exact(x: Tensor) -> Tensor:
        weight = 0.75 * x.sigmoid() ** 2 * (1 - one_hot) + q.double() * one_hot
        entropy = nn.functional.binary_cross_entropy_with_logits(x, q.double(), reduction="none")
        return (weight * entropy).mean(1).sum()

    def of(kind: type[nn.Module]) -> Callable[[Tensor], Tensor]:
        return lambda x: kind(2.0, 0.75)(x, q, one_hot)

    # A float32 p - q, the positives' gradient, cancels.
    loss = check(of(compat.FastVarifocalLoss), of(host.VarifocalLoss), exact, x, precision, absolute=2e-7)
    assert loss.dtype == torch.float32 and loss > 65504


def test_several_classes_of_a_query() -> None:
    """ultralytics' criterion gives none; the fused loss would take one of them."""
    logits, q, one_hot = scores(torch.float32)
    one_hot[1, 2, :2] = 1
    with pytest.raises(ValueError, match="label: expected one class a query at most"):
        compat.FastVarifocalLoss()(logits, q, one_hot)


def test_an_alpha_for_each_class() -> None:
    """A tensor for alpha is broadcast over the classes."""
    logits, _, one_hot = scores(torch.float64)
    alpha = torch.linspace(0, 0.9, CLASSES)
    theirs, ours = both(host.FocalLoss(1.5, alpha), compat.FastFocalLoss(1.5, alpha), logits, one_hot.double())
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-15)


# --- labels that are no class -----------------------------------------------------------------------------------------


def labelled(classes: list[int]) -> dict[str, Any]:
    return {"cls": torch.tensor(classes), "bboxes": torch.rand(3, 4) * 0.5 + 0.2, "gt_groups": [2, 0, 1]}


@pytest.mark.parametrize("label", [CLASSES, -1, CLASSES + 5])
@pytest.mark.parametrize("kind", [DETRLoss, RTDETRDetectionLoss])
def test_a_label_that_is_no_class(kind: type[nn.Module], label: int) -> None:
    criterion = compat.accelerate(kind(nc=CLASSES))
    preds = torch.rand(1, 3, QUERIES, 4), torch.zeros(1, 3, QUERIES, CLASSES)
    given = preds if kind is DETRLoss else (preds,)
    message = rf'batch\["cls"\]: image 2, object 0 has label {label}; expected one of the classes 0\.\.{CLASSES - 1} '
    with pytest.raises(ValueError, match=message):
        criterion(*given, labelled([1, 5, label]))
    assert criterion(*given, labelled([1, 5, 0]))["loss_class"] > 0


def test_one_class_labelled_1() -> None:
    criterion = compat.accelerate(RTDETRDetectionLoss(nc=1, use_vfl=True))
    with pytest.raises(ValueError, match=r"image 0, object 1 has label 1; expected 0, the one class"):
        criterion((torch.rand(1, 3, QUERIES, 4), torch.zeros(1, 3, QUERIES, 1)), labelled([0, 1, 0]))


def test_a_subclassed_criterion_is_left_alone() -> None:
    own = type("Own", (RTDETRDetectionLoss,), {})
    criterion = compat.accelerate(own(nc=CLASSES))
    assert type(criterion) is own and type(criterion.fl) is compat.FastFocalLoss


# --- the criterion of RT-DETR -----------------------------------------------------------------------------------------


def criterion_step(
    criterion: nn.Module,
    *,
    denoising: bool = False,
    classes: tuple[int, ...] = (1, 5, 8),
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    layers = 3
    boxes = torch.rand(layers, 2, QUERIES, 4, generator=generator).requires_grad_()
    logits = (torch.randn(layers, 2, QUERIES, CLASSES, generator=generator) - 2).to(dtype).requires_grad_()
    objects = len(classes)
    batch = {
        "cls": torch.tensor(classes, dtype=torch.int64),
        "bboxes": torch.rand(objects, 4, generator=generator) * 0.5 + 0.2,
        "gt_groups": [max(objects - 1, 0), min(objects, 1)],
    }
    more: dict[str, Any] = {}
    leaves = [boxes, logits]
    if denoising:
        leaves += [torch.rand(layers, 2, 8, 4, generator=generator).requires_grad_()]
        leaves += [torch.randn(layers, 2, 8, CLASSES, generator=generator).to(dtype).requires_grad_()]
        places = [torch.tensor([0, 1, 4, 5]), torch.tensor([0, 4])]
        found = {"dn_pos_idx": places, "dn_num_group": 2, "dn_gt_idx": [torch.tensor([0, 1]), torch.tensor([2])]}
        more = {"dn_bboxes": leaves[2], "dn_scores": leaves[3], "dn_meta": found}
    losses = criterion((boxes, logits), batch, **more)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "options",
    [
        {"use_vfl": True},
        {"use_vfl": False},
        {"use_vfl": True, "gamma": 2.0, "alpha": 0.75, "loss_gain": {"class": 3, "bbox": 5, "giou": 2}},
        {"use_vfl": True, "aux_loss": False},
        {"use_vfl": True, "use_uni_match": True},
        {"use_vfl": False, "alpha": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("denoising", [False, True])
def test_the_criterion_of_rt_detr(denoising: bool, options: dict[str, Any]) -> None:
    criterion = RTDETRDetectionLoss(nc=CLASSES, **options)
    stock, expected = criterion_step(criterion, denoising=denoising)
    assert compat.accelerate(criterion) is criterion and type(criterion.fl) is compat.FastFocalLoss
    ours, gradients = criterion_step(criterion, denoising=denoising)
    assert list(ours) == list(stock)
    for name in stock:
        assert ours[name].dtype == stock[name].dtype
        torch.testing.assert_close(ours[name], stock[name], rtol=2e-6, atol=1e-7)  # float32 sums in another order
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    again, _ = criterion_step(compat.restore(criterion), denoising=denoising)
    assert type(criterion.fl) is host.FocalLoss and type(criterion) is RTDETRDetectionLoss
    for name in stock:
        assert torch.equal(again[name], stock[name])


@pytest.mark.parametrize("varifocal", [True, False])
def test_a_batch_without_objects(varifocal: bool) -> None:
    criterion = RTDETRDetectionLoss(nc=CLASSES, use_vfl=varifocal)
    stock, _ = criterion_step(criterion, classes=())
    ours, _ = criterion_step(compat.accelerate(criterion), classes=())
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=2e-6, atol=1e-7)


def test_the_criterion_with_a_cross_entropy() -> None:
    """It has no focal loss, and so is not swapped by itself; a fast one computes that loss too."""
    stock, expected = criterion_step(DETRLossOfPairs(nc=CLASSES, use_fl=False))
    ours, gradients = criterion_step(FastLossOfPairs(nc=CLASSES, use_fl=False))
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradients[1], expected[1], rtol=1e-5, atol=1e-9)


class DETRLossOfPairs(DETRLoss):  # type: ignore[misc]
    """Called as RTDETRDetectionLoss is."""

    def forward(self, preds: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Any:
        return super().forward(*preds, batch)


class FastLossOfPairs(compat.FastDETRLoss):
    def forward(self, preds: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Any:  # type: ignore[override]
        return super().forward(*preds, batch)


def test_one_node_for_all_layers() -> None:
    criterion = compat.accelerate(RTDETRDetectionLoss(nc=CLASSES, use_vfl=True))
    boxes, logits = torch.rand(4, 2, QUERIES, 4), torch.zeros(4, 2, QUERIES, CLASSES, requires_grad=True)
    losses = criterion((boxes, logits), {"cls": torch.tensor([1]), "bboxes": torch.rand(1, 4), "gt_groups": [1, 0]})
    assert len({id(n) for name in ("loss_class", "loss_class_aux") for n in fused_nodes(losses[name])}) == 1


def test_a_criterion_without_such_losses() -> None:
    with pytest.raises(ValueError, match=r"criterion: expected one with ultralytics' .* found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))


# --- YOLO -------------------------------------------------------------------------------------------------------------

MODELS = {
    "v8": (tasks.DetectionModel, "yolov8n.yaml"),
    "v10": (tasks.DetectionModel, "yolov10n.yaml"),
    "26": (tasks.DetectionModel, "yolo26n.yaml"),
    "11, masks": (tasks.SegmentationModel, "yolo11n-seg.yaml"),
    "26, masks": (tasks.SegmentationModel, "yolo26n-seg.yaml"),
    "v8, pose": (tasks.PoseModel, "yolov8n-pose.yaml"),
    "26, pose": (tasks.PoseModel, "yolo26n-pose.yaml"),
    "v8, oriented boxes": (tasks.OBBModel, "yolov8n-obb.yaml"),
}


def yolo(name: str, weights: Tensor | None = None) -> Any:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config, ch=3, nc=5, verbose=False).train()
    model.args = get_cfg()
    if weights is not None:
        model.class_weights = weights
    return model


def batch_of(name: str, classes: tuple[float, ...] = (1.0, 4.0, 0.0)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.3, 0.2], [0.6, 0.5, 0.5, 0.7]])[: len(classes)]
    masks = torch.zeros(2, 16, 16)
    masks[:, 4:9, 4:9], masks[0, 2:5, 2:5] = 1, 2
    return {
        "img": torch.rand(2, 3, 64, 64, generator=generator),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0])[: len(classes)],
        "cls": torch.tensor(classes).view(-1, 1),
        "bboxes": torch.cat([boxes, torch.full((len(boxes), 1), 0.2)], dim=1) if "oriented" in name else boxes,
        "keypoints": torch.rand(3, 17, 3, generator=generator),
        "masks": masks,
        "sem_masks": torch.zeros(2, 16, 16, dtype=torch.int64),
    }


def yolo_step(model: Any, name: str) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The same outputs at each call: batch norms are left alone."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.zero_grad()
    torch.manual_seed(1)
    loss, items = model.loss(batch_of(name))
    loss.sum().backward()
    return loss.detach(), items, [p.grad.clone() for p in model.parameters() if p.grad is not None]


class EntropyInDouble(nn.BCEWithLogitsLoss):
    """torch's own, in float32, is off by a rounding of 1 for each negative: by 1e-4 of what these cost here."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return super().forward(pred.double(), target.double())


@pytest.mark.parametrize("name, weighted", [*((name, False) for name in MODELS), ("v8", True), ("26", True)])
def test_yolo(name: str, weighted: bool) -> None:
    """A model's criterion, made when it is first needed: all losses, and every parameter's gradient."""
    model = yolo(name, torch.linspace(0.5, 2, 5) if weighted else None)
    plain, _, _ = yolo_step(model, name)
    for criterion in compat._yolo_criteria(model.criterion):
        criterion.bce = EntropyInDouble(reduction="none")
    stock, items, expected = yolo_step(model, name)
    weights = [criterion.class_weights for criterion in compat._yolo_criteria(model.criterion)]
    assert compat.accelerate(model) is model
    swapped = list(compat._yolo_criteria(model.criterion))
    assert swapped and all(type(criterion) in compat._STOCK_YOLO for criterion in swapped)
    assert compat.accelerate(model) is model  # once more: nothing happens
    ours, found, gradients = yolo_step(model, name)
    assert list(found) == list(items) and ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock, rtol=2e-6, atol=1e-7)  # float32: a few roundings
    for key, value in items.items():
        torch.testing.assert_close(found[key], value, rtol=2e-6, atol=1e-7)
    largest = max(float(g.abs().max()) for g in expected)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * largest)
    again, _, _ = yolo_step(compat.restore(model), name)
    assert torch.equal(again, plain)
    for criterion, before in zip(compat._yolo_criteria(model.criterion), weights, strict=True):
        assert type(criterion) in compat._YOLO and type(criterion.bce) is nn.BCEWithLogitsLoss
        assert (before is None) == (criterion.class_weights is None)
        assert before is None or torch.equal(criterion.class_weights, before)


def test_a_model_that_has_no_criterion_yet() -> None:
    model = yolo("v8")
    assert type(compat.accelerate(model).criterion) is compat.FastDetectionLoss
    around = nn.Sequential(yolo("26"))
    compat.accelerate(around)
    assert type(around[0].criterion.one2many) is compat.FastDetectionLoss
    assert type(copy.deepcopy(around[0]).criterion.one2one) is compat.FastDetectionLoss
    assert type(pickle.loads(pickle.dumps(model.criterion))) is compat.FastDetectionLoss


def test_yolo_without_objects() -> None:
    model = yolo("v8")
    empty = batch_of("v8", ())
    empty["bboxes"] = torch.zeros(0, 4)
    stock, _ = model.loss(empty)
    ours, _ = compat.accelerate(model).loss(empty)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-7)  # see EntropyInDouble


@pytest.mark.parametrize("label", [5.0, -1.0, 9.0])
@pytest.mark.parametrize("name", ["v8", "26", "v8, oriented boxes"])
def test_a_label_that_is_no_class_of_yolo(name: str, label: float) -> None:
    model = compat.accelerate(yolo(name))
    message = rf'batch\["cls"\]: image 0, object 1 has label {label}; expected one of the classes 0\.\.4 '
    with pytest.raises(ValueError, match=message):
        model.loss(batch_of(name, (1.0, label, 0.0)))


@pytest.mark.parametrize("weighted", [False, True])
@every_precision
def test_precision_of_the_summed_entropy(precision: Precision, weighted: bool) -> None:
    """float32, which v8DetectionLoss makes of a sum when it divides it: this one was not rounded to 16 bits before."""
    generator = torch.Generator().manual_seed(2)
    x = large_logits(4, 300, CLASSES, generator=generator)
    y = (torch.rand(x.shape, generator=generator) * 8).round() / 8 * (torch.rand(x.shape, generator=generator) < 0.1)
    weights = torch.linspace(0.5, 2, CLASSES) if weighted else None

    def exact(x: Tensor) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(x, y.double(), reduction="none")
        return (loss if weights is None else loss * weights.double()).sum()

    check(lambda x: compat.SummedBCE(weights)(x, y.to(x.dtype)), torch.float32, exact, x, precision, absolute=2e-7)


def test_criteria_that_are_not_ultralytics() -> None:
    model = yolo("v8")
    criterion = model.init_criterion()
    criterion.__class__ = type("Own", (host.v8DetectionLoss,), {})
    with pytest.raises(ValueError, match=r"expected ultralytics' v8DetectionLoss .* found the subclass Own"):
        compat.accelerate(criterion)
    with pytest.raises(
        ValueError, match="expected one with ultralytics' v8DetectionLoss, found none in a v8Classification"
    ):
        compat.accelerate(host.v8ClassificationLoss())
