"""fastfocal.compat.mmdet against the real mmdet: its losses, and the dense heads around them.

mmcv-lite will do: mmdet imports mmcv's compiled operators everywhere, but none is called here. VFNetHead's deformable
convolutions, which are among them, are plain ones here.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import mmcv_stub  # noqa: F401
import pytest
import torch
from precision import PRECISIONS, Precision, check, every_precision
from torch import Tensor, nn
from watch import Shapes

pytest.importorskip("mmdet", exc_type=Exception)

from mmdet.models.dense_heads import TOODHead
from mmdet.models.losses import FocalLoss, QualityFocalLoss, VarifocalLoss
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from fastfocal.compat import mmdet as compat
from fastfocal.heads import tiles

register_all_modules()
CLASSES, WIDTH, STRIDES = 7, 32, (8, 16, 32)
# float64; mmdet's own 1 - p_t loses two digits at a prior of 0.01.
DOUBLE = 1e-10


# --- the loss alone ---------------------------------------------------------------------------------------------------


def single(one_hot: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = (torch.randn(60, CLASSES, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    target = torch.randint(CLASSES + 1, (60,), generator=generator)
    return pred, nn.functional.one_hot(target, CLASSES + 1)[:, :CLASSES] if one_hot else target


WEIGHTS = {"none": None, "anchors": (60,), "elements": (60, CLASSES), "flat elements": (60 * CLASSES,)}
REDUCTIONS = [("mean", None), ("mean", 12.0), ("sum", None), ("none", None), ("none", 12.0)]


@pytest.mark.parametrize("reduction, avg_factor", REDUCTIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("one_hot", [False, True])
def test_focal_loss(one_hot: bool, weights: str, reduction: str, avg_factor: float | None) -> None:
    pred, target = single(one_hot)
    shape = WEIGHTS[weights]
    weight = (
        None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    found = []
    for kind in (FocalLoss, compat.FastFocalLoss):
        criterion = kind(gamma=1.5, alpha=0.3, loss_weight=2.0)
        loss = criterion(pred, target, weight, avg_factor=avg_factor, reduction_override=reduction)
        found.append((loss, torch.autograd.grad(loss.sum(), pred)[0]))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=DOUBLE, atol=1e-14)


AVERAGES = {
    "none": None,
    "number": 12.0,
    "0-d": torch.tensor(12.0),
    "integer": torch.tensor(12),
    "one element": torch.tensor([12.0]),
    "bfloat16": torch.tensor(12.0, dtype=torch.bfloat16),
}
PRECISION_CASES = [
    *(("mean", weights, average) for weights in WEIGHTS for average in AVERAGES),
    *((reduction, weights, "none") for reduction in ("sum", "none") for weights in WEIGHTS),
]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction, weights, average", PRECISION_CASES)
@pytest.mark.parametrize("one_hot", [False, True])
@every_precision
def test_precision(
    precision: Precision, one_hot: bool, reduction: str, weights: str, average: str, weight_dtype: torch.dtype
) -> None:
    """Its own dtype depends on the weights' and on how the average is given."""
    generator = torch.Generator().manual_seed(2)
    n = 4000 if reduction == "sum" else 60
    pred = 4 * torch.randn(n, CLASSES, generator=generator, dtype=torch.float64) + 4
    target = torch.randint(CLASSES + 1, (n,), generator=generator)
    if one_hot:
        target = nn.functional.one_hot(target, CLASSES + 1)[:, :CLASSES]
    shape = WEIGHTS[weights]
    weight = None
    if shape is not None:
        elements = n * CLASSES if shape == (60 * CLASSES,) else n
        # Few bits: what the host rounds to the loss' dtype before it multiplies is exact.
        weight = 1 + torch.randint(3, (elements,) if len(shape) == 1 else (n, CLASSES), generator=generator) / 4
        weight = weight.to(weight_dtype)

    def loss_of(kind: type[nn.Module], exact: bool = False) -> Any:
        criterion = kind(gamma=2.0, alpha=0.25, loss_weight=2.0)
        factor = AVERAGES[average]
        if exact and isinstance(factor, Tensor):  # bfloat16 has no digits for the epsilon
            factor = 12.0 if factor.dim() == 0 else factor.double()
        given = weight.double() if exact and weight is not None else weight
        return lambda x: criterion(x, target, given, avg_factor=factor, reduction_override=reduction)

    loss = check(
        loss_of(compat.FastFocalLoss),
        loss_of(FocalLoss),
        loss_of(FocalLoss, exact=True),
        pred,
        precision,
        relative=3e-6,
    )
    if reduction == "sum":
        assert loss.isinf() == (loss.dtype == torch.float16) and loss > 65504


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", [CLASSES + 1, -1, -2, 100])
def test_an_anchor_label_that_is_none(label: int, weighted: bool) -> None:
    """mmdet: an error on the CPU, background on CUDA; -1 was ignored here."""
    pred, target = single(False)
    target[3] = label
    weight = torch.ones(60) if weighted else None
    with pytest.raises(RuntimeError, match="Class values must be"):
        FocalLoss()(pred, target, weight)
    for reduction in ("mean", "sum", "none"):
        with pytest.raises(
            ValueError, match=rf"label {label} at \[3\] .*; expected one of the classes 0\.\.{CLASSES - 1}"
        ):
            compat.FastFocalLoss()(pred, target, weight, reduction_override=reduction)


def test_the_mean_of_nothing() -> None:
    pred, target = torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.int64)
    for kind in (FocalLoss, compat.FastFocalLoss):
        assert kind()(pred, target).isnan()
        assert kind()(pred, target, avg_factor=3.0) == 0 and kind()(pred, target, reduction_override="sum") == 0


def test_average_of_a_sum() -> None:
    pred, target = single(False)
    for kind in (FocalLoss, compat.FastFocalLoss):
        with pytest.raises(ValueError, match="avg_factor can not be used with reduction"):
            kind()(pred, target, avg_factor=3.0, reduction_override="sum")


def test_built_from_a_config() -> None:
    criterion = MODELS.build(
        {"type": "FastFocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}
    )
    assert type(criterion) is compat.FastFocalLoss


# --- losses with scores -----------------------------------------------------------------------------------------------


def scored(form: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    """Logits (or probabilities, of the activated form) and targets: labels and scores, or a table of scores."""
    pred, labels = single(False)
    scores = torch.rand(60, generator=torch.Generator().manual_seed(5), dtype=torch.float64).where(
        labels < CLASSES, 0.0
    )
    scores[:5] = 0.0  # of positives, too
    pred = pred.detach().to(dtype)
    if form.endswith("activated"):
        pred = pred.sigmoid()
    target: Any = labels, scores.to(dtype)
    if not form.startswith("labels"):
        target = nn.functional.one_hot(labels, CLASSES + 1)[:, :CLASSES] * scores.to(dtype).unsqueeze(1)
    return pred.requires_grad_(), target


SCORED_WEIGHTS = {
    "QFL": {"none": None, "anchors": (60,)},
    "VFL": {"none": None, "anchors": (60, 1), "elements": (60, CLASSES)},
}
SCORED_LOSSES: list[tuple[str, str, dict[str, Any]]] = [
    *(("QFL", form, {"beta": beta}) for form in ("labels", "table") for beta in (2.0, 1.5)),
    *(("QFL", form, {"beta": 2.0, "activated": True}) for form in ("labels, activated", "table, activated")),
    ("VFL", "table", {"alpha": 0.75, "gamma": 2.0}),
    ("VFL", "table", {"alpha": 0.5, "gamma": 1.5, "iou_weighted": False}),
]
KINDS: dict[str, tuple[Any, Any]] = {
    "QFL": (QualityFocalLoss, compat.FastQualityFocalLoss),
    "VFL": (VarifocalLoss, compat.FastVarifocalLoss),
}


@pytest.mark.parametrize("reduction, avg_factor", REDUCTIONS)
@pytest.mark.parametrize(
    "name, form, numbers, weights",
    [(*case, weights) for case in SCORED_LOSSES for weights in SCORED_WEIGHTS[case[0]]],
    ids=str,
)
def test_scored_losses(
    name: str, form: str, numbers: dict[str, Any], weights: str, reduction: str, avg_factor: float | None
) -> None:
    """A positive of score 0 is a negative to both."""
    pred, target = scored(form)
    shape = SCORED_WEIGHTS[name][weights]
    weight = None
    if shape is not None:
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for kind in KINDS[name]:
        criterion = kind(loss_weight=2.0, **numbers)
        loss = criterion(pred, target, weight, avg_factor=avg_factor, reduction_override=reduction)
        found.append((loss, torch.autograd.grad(loss.sum(), pred)[0]))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=DOUBLE, atol=1e-14)


@pytest.mark.parametrize(
    "reduction, avg_factor", [("mean", None), ("mean", torch.tensor(12.0)), ("none", None), ("sum", None)]
)
@pytest.mark.parametrize("name, form, numbers", [SCORED_LOSSES[0], SCORED_LOSSES[2], SCORED_LOSSES[-2]], ids=str)
@every_precision
def test_precision_of_the_scored_losses(
    precision: Precision, name: str, form: str, numbers: dict[str, Any], reduction: str, avg_factor: Any
) -> None:
    """Scores of few bits, so that 16 have them. mmdet's own dtype, where it runs."""
    pred, target = scored(form)
    pred = 4 * pred.detach() + 4
    few_bits = lambda t: (t * 8).round() / 8  # noqa: E731
    target = (target[0], few_bits(target[1])) if isinstance(target, tuple) else few_bits(target)

    def of(kind: Any, exact: bool = False) -> Any:
        def loss(x: Tensor) -> Tensor:
            given = target
            if not exact:
                given = (target[0], target[1].to(x.dtype)) if isinstance(target, tuple) else target.to(x.dtype)
            factor = 12.0 if exact and avg_factor is not None else avg_factor
            found: Tensor = kind(loss_weight=2.0, **numbers)(x, given, avg_factor=factor, reduction_override=reduction)
            return found

        return loss

    stock, fast = KINDS[name]
    expected: Any = of(stock)
    try:
        with precision.context():
            expected(pred.to(precision.logits))
    except RuntimeError as error:  # float32 of autocast into 16 bits
        assert "Index put requires" in str(error)
        expected = torch.float32
    # A float32 s - p, whose power is the factor of a positive, cancels.
    check(of(fast), expected, of(stock, exact=True), pred, precision, relative=3e-6, absolute=1e-6)


@pytest.mark.parametrize("label", [CLASSES + 1, -1, 100])
def test_an_anchor_label_that_is_none_of_a_scored_loss(label: int) -> None:
    """Background, to mmdet."""
    pred, (labels, scores) = scored("labels")
    labels[3] = label
    with pytest.raises(ValueError, match=rf"label {label} at \[3\] .*; expected one of the classes 0\.\.{CLASSES - 1}"):
        compat.FastQualityFocalLoss()(pred, (labels, scores))


def test_what_the_scored_losses_leave_to_mmdet() -> None:
    """Targets of more dimensions, and weights that mmdet broadcasts."""
    pred, table = torch.randn(4, CLASSES, 3), torch.rand(4, CLASSES, 3)
    assert torch.equal(compat.FastQualityFocalLoss()(pred, table), QualityFocalLoss()(pred, table))
    square, scores, weight = torch.randn(CLASSES, CLASSES), torch.rand(CLASSES, CLASSES), torch.rand(CLASSES)
    assert torch.equal(compat.FastVarifocalLoss()(square, scores, weight), VarifocalLoss()(square, scores, weight))


@pytest.mark.parametrize("name", ["QualityFocalLoss", "VarifocalLoss"])
def test_scored_losses_built_from_a_config(name: str) -> None:
    criterion = MODELS.build({"type": f"Fast{name}", "use_sigmoid": True, "loss_weight": 1.0})
    assert type(criterion) is getattr(compat, f"Fast{name}")
    pred, target = scored("labels" if name == "QualityFocalLoss" else "table")
    with pytest.raises(ValueError, match="avg_factor can not be used with reduction"):
        criterion(pred, target, avg_factor=3.0, reduction_override="sum")
    with pytest.raises(ValueError, match="reduction_override: expected 'none', 'mean', 'sum' or None, got 'median'"):
        criterion(pred, target, reduction_override="median")


# --- heads ------------------------------------------------------------------------------------------------------------

ANCHORS = {"type": "AnchorGenerator", "strides": list(STRIDES), "ratios": [1.0]}
CODER = {"type": "DeltaXYWHBBoxCoder"}
COMMON = {"num_classes": CLASSES, "in_channels": WIDTH, "feat_channels": WIDTH, "stacked_convs": 1}
LOSS = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.5}


def training(assigner: dict[str, Any], pos_weight: float = -1) -> ConfigDict:
    return ConfigDict(assigner=assigner, sampler={"type": "PseudoSampler"}, allowed_border=-1, pos_weight=pos_weight)


MAX_IOU = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0, "ignore_iof_thr": -1}
HEADS: dict[str, dict[str, Any]] = {
    "retina": {
        "type": "RetinaHead",
        "anchor_generator": {**ANCHORS, "octave_base_scale": 4, "scales_per_octave": 2, "ratios": [0.5, 1.0, 2.0]},
        "bbox_coder": CODER,
        "train_cfg": training(MAX_IOU),
    },
    "retina, heavier positives": {
        "type": "RetinaHead",
        "anchor_generator": {**ANCHORS, "octave_base_scale": 4, "scales_per_octave": 1},
        "bbox_coder": CODER,
        "train_cfg": training(MAX_IOU, pos_weight=3.0),
    },
    "atss": {
        "type": "ATSSHead",
        "anchor_generator": {**ANCHORS, "octave_base_scale": 8, "scales_per_octave": 1},
        "bbox_coder": CODER,
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
        "train_cfg": training({"type": "ATSSAssigner", "topk": 9}),
    },
    "fcos": {
        "type": "FCOSHead",
        "strides": list(STRIDES),
        "regress_ranges": ((-1, 32), (32, 64), (64, 1e8)),
        "norm_cfg": None,
    },
    "gfl": {
        "type": "GFLHead",
        "anchor_generator": {**ANCHORS, "octave_base_scale": 8, "scales_per_octave": 1},
        "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.5},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
        "train_cfg": training({"type": "ATSSAssigner", "topk": 9}),
    },
    "gfl, heavier positives": {
        "type": "GFLHead",
        "anchor_generator": {**ANCHORS, "octave_base_scale": 8, "scales_per_octave": 1},
        "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 1.5, "loss_weight": 1.0},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
        "train_cfg": training({"type": "ATSSAssigner", "topk": 9}, pos_weight=3.0),
    },
    **{
        name: {
            "type": kind,
            "anchor_generator": {"type": "MlvlPointGenerator", "offset": 0, "strides": list(STRIDES)},
            "bbox_coder": {"type": "DistancePointBBoxCoder"},
            "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.5},
            "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
            "with_objectness": objectness,
            "train_cfg": training({"type": "DynamicSoftLabelAssigner", "topk": 13}),
        }
        for name, kind, objectness in (
            ("rtmdet", "RTMDetHead", False),
            ("rtmdet, objectness", "RTMDetHead", True),
            ("rtmdet, norms of each level", "RTMDetSepBNHead", False),
        )
    },
    "vfnet": {
        "type": "VFNetHead",
        "regress_ranges": ((-1, 32), (32, 64), (64, 1e8)),
        "strides": list(STRIDES),
        "norm_cfg": None,
        "anchor_generator": {**ANCHORS, "octave_base_scale": 8, "scales_per_octave": 1, "center_offset": 0.0},
        "loss_cls": {"type": "VarifocalLoss", "use_sigmoid": True, "alpha": 0.75, "gamma": 2.0, "loss_weight": 1.5},
        "train_cfg": training({"type": "ATSSAssigner", "topk": 9}),
    },
    "vfnet, points": {
        "type": "VFNetHead",
        "regress_ranges": ((-1, 32), (32, 64), (64, 1e8)),
        "strides": list(STRIDES),
        "norm_cfg": None,
        "use_atss": False,
        "anchor_generator": {**ANCHORS, "octave_base_scale": 8, "scales_per_octave": 1, "center_offset": 0.0},
        "sync_num_pos": False,
        "loss_cls": {"type": "VarifocalLoss", "use_sigmoid": True, "iou_weighted": False, "loss_weight": 1.0},
        "train_cfg": training({"type": "ATSSAssigner", "topk": 9}),
    },
}


class Plain(nn.Conv2d):
    """A convolution in place of a deformable one, which mmcv-lite has not."""

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return super().forward(x) + offset.mean()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = {**COMMON, "loss_cls": LOSS, **HEADS[name]}
    head: nn.Module = MODELS.build(ConfigDict(config))
    for part in ("vfnet_reg_refine_dconv", "vfnet_cls_dconv"):
        if hasattr(head, part):
            setattr(head, part, Plain(WIDTH, WIDTH, 3, padding=1))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return head


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


# A scored head's targets depend on its outputs' precision.
WITHOUT_SCORES = ["retina", "retina, heavier positives", "atss", "fcos"]


METAS = [{"img_shape": (128, 160), "pad_shape": (128, 160), "scale_factor": (1.0, 1.0)}] * 2


def draw_features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(2, WIDTH, 128 // s, 160 // s, generator=generator).to(dtype).requires_grad_() for s in STRIDES]


def objects(*classes: list[int]) -> list[InstanceData]:
    """Of two images; the second has no objects."""
    boxes = [[[10.0, 10.0, 50.0, 54.0], [60.0, 20.0, 130.0, 100.0]], []]
    return [
        InstanceData(bboxes=torch.tensor(b[: len(k)]).reshape(-1, 4), labels=torch.tensor(k, dtype=torch.int64))
        for b, k in zip(boxes, classes or ([0, 6], []), strict=True)
    ]


def step(head: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
    """Losses, and the gradients of features and parameters. The second image has no objects."""
    features = draw_features()
    head.zero_grad()
    losses = head.loss_by_feat(*head(tuple(features)), objects(), METAS)
    flat = [loss for value in losses.values() for loss in (value if isinstance(value, (list, tuple)) else [value])]
    torch.stack(flat).sum().backward()
    return losses, [t.grad.clone() for t in (*features, *head.parameters()) if t.grad is not None]


def assert_same(ours: Any, theirs: Any, rtol: float) -> None:
    """A loss, or a list with one per level, as the head has it."""
    assert isinstance(ours, (list, tuple)) == isinstance(theirs, (list, tuple))
    for mine, stock in zip(*(v if isinstance(v, (list, tuple)) else [v] for v in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, stock, rtol=rtol, atol=rtol * 1e-2)


def test_same_losses_and_gradients(head: nn.Module) -> None:
    before = list(head.state_dict())
    stock, expected = step(copy.deepcopy(head))
    ours, gradients = step(compat.accelerate(head))
    assert list(ours) == list(stock) and list(head.state_dict()) == before
    for name in stock:
        # float32: sums of some thousand terms in another order, and mmdet's 1 - p_t.
        assert_same(ours[name], stock[name], 1e-5)
    largest = max(float(g.abs().max()) for g in expected)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * largest)


def dtypes(found: dict[str, Any]) -> dict[str, Any]:
    return {n: [v.dtype for v in (x if isinstance(x, (list, tuple)) else [x])] for n, x in found.items()}


def levels_of(loss: Any) -> list[Tensor]:
    return list(loss) if isinstance(loss, (list, tuple)) else [loss]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", [name for name in HEADS if name not in WITHOUT_SCORES])
@every_precision
def test_precision_of_the_scored_heads(precision: Precision, name: str, empty: bool) -> None:
    """mmdet puts float32 losses of positives, or scores, into tensors of 16 bits, which is an error; where it runs, its dtype.

    The value is that of the same outputs in float32: a scored head's targets depend on its outputs.
    """
    gt, losses = objects([], []) if empty else objects(), {}
    for kind in ("stock", "ours", "float32"):
        head = build(name).to(precision.logits)
        with precision.context():
            outputs = head(tuple(draw_features(precision.logits)))
        if kind == "float32":
            head, outputs = head.float(), tuple([x.float() for x in o] for o in outputs)
        elif kind == "ours":
            compat.accelerate(head)
        try:
            with nullcontext() if kind == "float32" else precision.context():
                losses[kind] = head.loss_by_feat(*outputs, gt, METAS)
        except RuntimeError as error:
            assert kind == "stock" and "Index put requires" in str(error) and precision != PRECISIONS[2]
    if "stock" in losses:
        assert dtypes(losses["ours"]) == dtypes(losses["stock"])
    for mine, true in zip(*(levels_of(losses[kind]["loss_cls"]) for kind in ("ours", "float32")), strict=True):
        # Boxes, whose overlap is the score, are decoded in 16 bits, where mmdet does not cast them.
        boxes = 0.05 if mine.dtype.itemsize == 2 or precision.logits.itemsize == 2 or precision.autocast else 0.0
        torch.testing.assert_close(mine.float(), true, rtol=1e-5 + boxes, atol=0)


@pytest.mark.parametrize("fuse_head", [False, True])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", WITHOUT_SCORES)
@every_precision
def test_precision_of_the_heads(name: str, precision: Precision, empty: bool, fuse_head: bool) -> None:
    """Each loss has mmdet's dtype, which may depend on whether there are objects; a large sum has its value, from float64."""
    head = build(name)
    with torch.no_grad():
        for name, bias in head.named_parameters():
            if name.endswith("_cls.bias"):
                bias.fill_(30.0)
    gt = objects([], []) if empty else objects()
    losses, gradients = [], []
    for kind in (copy.deepcopy(head), compat.accelerate(head, fuse_head=fuse_head)):
        kind.to(precision.logits)
        with precision.context():
            outputs = kind(tuple(draw_features(precision.logits)))
            losses.append(kind.loss_by_feat(*outputs, gt, METAS))
        total = losses[-1]["loss_cls"]
        total = torch.stack(total).float().sum() if isinstance(total, list) else total.float()
        scale = 1024 if precision.logits == torch.float16 else 65536
        biases = [p for n, p in kind.named_parameters() if n.endswith("_cls.bias")]
        gradients.append(torch.autograd.grad(total * scale, biases if fuse_head else outputs[0]))
        if fuse_head:  # an ordinary convolution's
            with precision.context():
                outputs = compat.restore(kind)(tuple(draw_features(precision.logits)))
    stock, ours = losses

    assert dtypes(ours) == dtypes(stock)
    compat.restore(head).double()
    # The boxes' losses do not matter: the classes' are computed from the same logits in float64.
    exact = head.loss_by_feat(
        [x.double() for x in outputs[0]], *[[x.double() for x in o] for o in outputs[1:]], gt, METAS
    )
    rtol = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
    found = [v if isinstance(v, list) else [v] for v in (ours["loss_cls"], exact["loss_cls"])]
    assert sum(float(true) for true in found[1]) > 4000
    for mine, true in zip(*found, strict=True):
        # One rounding, or the float32 sum; the focal loss of such a bias loses nothing in mmdet's 1 - p_t.
        torch.testing.assert_close(mine, true.to(mine.dtype), rtol=rtol.get(mine.dtype, 1e-5), atol=0)
    for mine, theirs in zip(*gradients[::-1], strict=True):
        assert mine.dtype == theirs.dtype and (mine.isfinite() | ~theirs.isfinite()).all()


@pytest.mark.parametrize("label", [CLASSES, -1, CLASSES + 5])
def test_an_object_label_that_is_no_class(head: nn.Module, label: int) -> None:
    """mmdet trains an object of class K as background, and on CUDA one of any other such class too."""
    compat.accelerate(head)
    outputs = head(tuple(draw_features()))
    message = (
        rf"gt_instances\.labels: image 0, object 1 has label {label}; expected one of the classes 0\.\.{CLASSES - 1} "
    )
    with pytest.raises(ValueError, match=message):
        head.loss_by_feat(*outputs, objects([3, label], []), METAS)
    by_name = {"batch_gt_instances": objects([3, label], []), "batch_img_metas": METAS}
    with pytest.raises(ValueError, match=message):
        head.loss_by_feat(*outputs, **by_name)


def test_one_class_labelled_1() -> None:
    torch.manual_seed(0)
    head = MODELS.build(ConfigDict({**COMMON, "loss_cls": LOSS, **HEADS["retina"], "num_classes": 1}))
    outputs = compat.accelerate(head)(tuple(draw_features()))
    with pytest.raises(ValueError, match=r"image 0, object 1 has label 1; expected 0, the one class"):
        head.loss_by_feat(*outputs, objects([0, 1], []), METAS)


def test_one_node_for_all_levels(head: nn.Module) -> None:
    losses, _ = step(compat.accelerate(head))
    loss = losses["loss_cls"]
    node = (loss[0] if isinstance(loss, list) else loss).grad_fn
    while getattr(type(node), "_forward_cls", type(node)).__module__ != "fastfocal.autograd":
        node = node.next_functions[0][0]
    assert len([f for f, _ in node.next_functions if f is not None]) == len(STRIDES)


def test_restore(head: nn.Module) -> None:
    stock, _ = step(head)
    kind, loss_cls = type(head), head.loss_cls
    assert type(compat.accelerate(head)) is not kind and head.loss_cls is loss_cls
    again, _ = step(compat.restore(head))
    assert type(head) is kind
    for name in stock:
        assert_same(again[name], stock[name], 0.0)


def test_some_anchors_are_ignored() -> None:
    head = build("retina")
    seen: list[Tensor] = []
    original = head.loss_cls.forward
    head.loss_cls.forward = lambda pred, target, weight, **rest: (
        seen.append(weight),
        original(pred, target, weight, **rest),
    )[1]
    step(head)
    assert (torch.cat(seen) == 0).any()


def test_two_heads_that_were_swapped_are_built_again(head: nn.Module) -> None:
    """By name, as a config with the losses registered here has them."""
    loss = getattr(compat, f"Fast{type(head.loss_cls).__name__}")
    stock, _ = step(copy.deepcopy(head))
    head.loss_cls.__class__ = loss
    for found in (step(copy.deepcopy(head))[0], step(compat.accelerate(head))[0]):
        for name in stock:
            assert_same(found[name], stock[name], 1e-5)


# --- the last convolution and the loss as one -------------------------------------------------------------------------


def double_step(head: nn.Module, gt: list[InstanceData] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `step`, in float64."""
    features = draw_features(torch.float64)
    head.double().zero_grad()
    losses = head.loss_by_feat(*head(tuple(features)), objects() if gt is None else gt, METAS)
    torch.stack([loss.double() for value in losses.values() for loss in levels_of(value)]).sum().backward()
    gradients = {str(i): t.grad for i, t in enumerate(features)}
    gradients.update((n, p.grad.clone()) for n, p in head.named_parameters() if p.grad is not None)
    return {n: [loss.detach() for loss in levels_of(value)] for n, value in losses.items()}, gradients


def assert_equal(ours: tuple[dict[str, Any], ...], theirs: tuple[dict[str, Any], ...], rtol: float = DOUBLE) -> None:
    assert list(ours[0]) == list(theirs[0]) and list(ours[1]) == list(theirs[1])
    for name, expected in theirs[0].items():
        torch.testing.assert_close(torch.stack(ours[0][name]), torch.stack(expected), rtol=rtol, atol=0)
    largest = max(float(g.abs().max()) for g in theirs[1].values())
    for name, gradient in theirs[1].items():
        # Below 1e-2 of the largest gradient of all, against that: a bias before a norm has nothing but rounding.
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=rtol * scale)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.AUTO_BYTES, "cpu", 1024)


LAST = {"retina": "retina_cls", "retina, heavier positives": "retina_cls", "atss": "atss_cls", "fcos": "conv_cls"}


# Of fused heads that are to make no logits.
no_reader = pytest.mark.filterwarnings("error:fuse_head")


@no_reader
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("frozen", ["", "cls_convs", "last.weight", "last"])
@pytest.mark.parametrize("name", WITHOUT_SCORES)
def test_a_fused_head(name: str, frozen: str, empty: bool, small_tiles: None) -> None:
    """In float64 all of it, also where there are no objects."""
    head = build(name)
    assert list(LAST) == WITHOUT_SCORES
    if frozen:
        for path, parameter in head.named_parameters():
            parameter.requires_grad_(not path.startswith(frozen.replace("last", LAST[name])))
    classes: list[Any] = [[], []] if empty else []
    before = list(head.state_dict())
    stock = double_step(copy.deepcopy(head), objects(*classes))
    ours = double_step(compat.accelerate(head, fuse_head=True), objects(*classes))
    assert_equal(ours, stock)
    assert list(head.state_dict()) == before


@no_reader
@pytest.mark.parametrize("name", WITHOUT_SCORES)
def test_training_makes_no_logits(name: str, small_tiles: None) -> None:
    head = build(name)
    channels = head.get_submodule(LAST[name]).out_channels
    logits = {(2, channels, 128 // s, 160 // s) for s in STRIDES[:2]}  # more than a tile
    for fuse_head in (False, True):
        with Shapes() as shapes:
            double_step(compat.accelerate(head, fuse_head=fuse_head))
        assert logits <= shapes.seen if not fuse_head else not logits & shapes.seen


@pytest.mark.parametrize("name", WITHOUT_SCORES)
def test_the_fused_head_is_switched_on_and_off(name: str) -> None:
    head = build(name)
    types = [type(m) for m in head.modules()]
    plain = [type(m) for m in compat.accelerate(head).modules()]
    fused = [type(m) for m in compat.accelerate(head, fuse_head=True).modules()]
    assert [type(m) for m in compat.accelerate(head, fuse_head=True).modules()] == fused != plain
    assert [type(m) for m in compat.accelerate(head).modules()] == plain
    assert [type(m) for m in compat.restore(compat.accelerate(head, fuse_head=True)).modules()] == types


@no_reader
@pytest.mark.parametrize("name", WITHOUT_SCORES)
def test_a_fused_head_in_evaluation(name: str) -> None:
    head = build(name).eval()
    stock = head(tuple(draw_features()))
    compat.accelerate(head, fuse_head=True)
    for theirs, mine in zip(stock, head(tuple(draw_features())), strict=True):
        assert all(type(x) is Tensor and torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", WITHOUT_SCORES)
def test_mmdets_own_loss_gets_the_logits_of_a_fused_head(name: str) -> None:
    """What is called with the head's outputs and is none of ours: here the head's own `loss_by_feat`."""
    head = build(name)
    kind = type(head)
    stock = double_step(copy.deepcopy(head))
    compat.accelerate(head, fuse_head=True)
    head.__class__ = kind
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = double_step(head)
    assert_equal(ours, stock)


def test_a_subclass_that_logs_the_logits_of_a_fused_head() -> None:
    """With the mixin, and the layer's class changed by hand as `accelerate` would."""

    class Logging(compat.FastRetinaHead):
        def loss_by_feat(self, cls_scores: list[Tensor], *rest: Any, **options: Any) -> dict[str, Any]:
            seen.append(max(float(x.detach().sigmoid().max()) for x in cls_scores))
            losses: dict[str, Any] = super().loss_by_feat(cls_scores, *rest, **options)
            return losses

    head = build("retina")
    seen: list[float] = []
    head.__class__ = Logging
    plain = double_step(copy.deepcopy(head))
    head.retina_cls.__class__ = compat.fused_head.UnmadeConv2d
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = double_step(head)
    assert_equal(ours, plain)
    assert seen[1] == pytest.approx(seen[0], rel=1e-12)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in WITHOUT_SCORES])
def test_heads_that_need_their_logits_first(name: str) -> None:
    head = build(name)
    kind = type(head)
    reason = {"GFL": "weighs its boxes' losses", "RTM": "assigns targets by", "VFN": "has the varifocal loss"}
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: {reason[kind.__name__[:3]]}.* not accelerated with fuse_head"
    ):
        compat.accelerate(head, fuse_head=True)
    assert type(head) is kind


def test_fused_heads_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="CenterNetHead: has a target for each logit"):
        compat.accelerate(centernet(), fuse_head=True)
    with pytest.raises(
        ValueError, match=r"SimOTA, TOOD's or a Hungarian assigner, cannot have fuse_head=True.* none in a Linear"
    ):
        compat.accelerate(nn.Linear(1, 1), fuse_head=True)
    config = {
        **COMMON,
        "loss_cls": LOSS,
        **HEADS["fcos"],
        "cls_predictor_cfg": {"type": "NormedConv2d", "tempearture": 20},
    }
    head = MODELS.build(ConfigDict(config))
    with pytest.raises(ValueError, match=r"FCOSHead\.conv_cls: fuse_head=True needs .* got NormedConv2d"):
        compat.accelerate(head, fuse_head=True)
    head = build("atss")
    head.__class__ = TOODHead
    with pytest.raises(ValueError, match="found the subclass TOODHead"):
        compat.accelerate(head, fuse_head=True)


# --- heatmaps ---------------------------------------------------------------------------------------------------------

HEATMAPS = [{"batch_input_shape": (128, 160), "img_shape": (128, 160), "border": (0, 0, 0, 0)}] * 2


def centernet(**loss: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"type": "GaussianFocalLoss", "loss_weight": 1.5, **loss}
    sizes = {"in_channels": WIDTH, "feat_channels": WIDTH, "num_classes": CLASSES}
    test = {"topk": 10, "local_maximum_kernel": 3, "max_per_img": 10}
    head: nn.Module = MODELS.build(ConfigDict(type="CenterNetHead", loss_center_heatmap=given, test_cfg=test, **sizes))
    return head


def heatmap_step(head: nn.Module, gt: list[InstanceData], dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    feature = draw_features(dtype)[0]
    head.zero_grad()
    losses = head.loss_by_feat(*head((feature,)), gt, HEATMAPS)
    sum(losses.values()).backward()
    return losses, [feature.grad, *(p.grad.clone() for p in head.parameters())]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [{}, {"pos_weight": 0.5, "neg_weight": 2.0}], ids=str)
@pytest.mark.parametrize("alpha, gamma", [(2.0, 4.0), (1.5, 3.0)])
def test_centernet(alpha: float, gamma: float, weights: dict[str, float], training: bool, empty: bool) -> None:
    """In evaluation its outputs are probabilities, and so is what it trains from."""
    gt = objects([], []) if empty else objects()
    for image in gt:
        image.bboxes = image.bboxes.double()  # whose dtype the heatmap has
    head = centernet(alpha=alpha, gamma=gamma, **weights).double().train(training)
    before = list(head.state_dict())
    stock, expected = heatmap_step(head, gt, torch.float64)
    ours, gradients = heatmap_step(compat.accelerate(head), gt, torch.float64)
    assert list(ours) == list(stock) and list(head.state_dict()) == before
    assert type(head) is compat.FastCenterNetHead
    for name, loss in stock.items():
        torch.testing.assert_close(ours[name], loss, rtol=DOUBLE, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)  # the 1e-12 in mmdet's logarithms
    again, _ = heatmap_step(compat.restore(head), gt, torch.float64)
    assert all(torch.equal(again[name], loss) for name, loss in stock.items())


def test_what_centernet_predicts() -> None:
    """The same boxes and probabilities, in evaluation and in training."""
    head = centernet()
    feature = draw_features()[0].detach()

    def predicted(head: nn.Module) -> list[InstanceData]:
        found: list[InstanceData] = head.predict_by_feat(*head((feature,)), HEATMAPS, rescale=False)
        return found

    stock = predicted(head.eval())
    compat.accelerate(head)
    for found in (predicted(head.eval()), predicted(head.train())):
        for mine, theirs in zip(found, stock, strict=True):
            assert torch.equal(mine.scores, theirs.scores) and torch.equal(mine.bboxes, theirs.bboxes)


def test_a_certain_heatmap() -> None:
    """From a logit of 17, mmdet's float32 log(1 - p + 1e-12) stops at 27.6; here it is that of the logit."""
    head = compat.accelerate(centernet())
    outputs = [[x.detach()] for (x,) in head((draw_features()[0],))]
    outputs[0][0].fill_(-40.0)
    outputs[0][0][1, 2, 3, 4] = 40.0
    loss = head.loss_by_feat(*outputs, objects([], []), HEATMAPS)["loss_center_heatmap"]
    torch.testing.assert_close(loss, torch.tensor(40.0 * 1.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_an_object_label_that_is_no_class_of_centernet(label: int) -> None:
    head = compat.accelerate(centernet())
    with pytest.raises(
        ValueError, match=rf"gt_instances\.labels: image 0, object 1 has label {label}; expected one of"
    ):
        heatmap_step(head, objects([3, label], []), torch.float32)


def test_errors() -> None:
    with pytest.raises(ValueError, match="found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
    head = build("retina")
    head.loss_cls = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"RetinaHead\.loss_cls: expected mmdet's FocalLoss on logits"):
        compat.accelerate(head)
    head = build("gfl")
    head.loss_cls.activated = True
    with pytest.raises(ValueError, match=r"GFLHead\.loss_cls: expected mmdet's QualityFocalLoss on logits"):
        compat.accelerate(head)
