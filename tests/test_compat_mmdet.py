"""fastfocal.compat.mmdet against the real mmdet: its FocalLoss, and its RetinaHead, ATSSHead and FCOSHead.

mmcv-lite will do: mmdet imports mmcv's compiled operators everywhere, but none is called here.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from precision import Precision, check, every_precision
from torch import Tensor, nn

pytest.importorskip("mmcv")
if importlib.util.find_spec("mmcv._ext") is None:

    class Absent(types.ModuleType):
        """Has every name, so that mmdet can be imported, and raises when one is called."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def missing(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f"mmcv._ext.{name} is not there: this is mmcv-lite")

            return missing

    sys.modules["mmcv._ext"] = Absent("mmcv._ext")
pytest.importorskip("mmdet", exc_type=Exception)

from mmdet.models.losses import FocalLoss
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from fastfocal.compat import mmdet as compat

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
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = {**COMMON, "loss_cls": LOSS, **HEADS[name]}
    head: nn.Module = MODELS.build(ConfigDict(config))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return head


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


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


@pytest.mark.parametrize("empty", [False, True])
@every_precision
def test_precision_of_the_heads(head: nn.Module, precision: Precision, empty: bool) -> None:
    """Each loss has mmdet's dtype, which may depend on whether there are objects; a large sum has its value, from float64."""
    with torch.no_grad():
        for name, bias in head.named_parameters():
            if name.endswith("_cls.bias"):
                bias.fill_(30.0)
    gt = objects([], []) if empty else objects()
    losses, gradients = [], []
    for kind in (copy.deepcopy(head), compat.accelerate(head)):
        kind.to(precision.logits)
        with precision.context():
            outputs = kind(tuple(draw_features(precision.logits)))
            losses.append(kind.loss_by_feat(*outputs, gt, METAS))
        total = losses[-1]["loss_cls"]
        total = torch.stack(total).float().sum() if isinstance(total, list) else total.float()
        scale = 1024 if precision.logits == torch.float16 else 65536
        gradients.append(torch.autograd.grad(total * scale, outputs[0]))
    stock, ours = losses

    def dtypes(found: dict[str, Any]) -> dict[str, Any]:
        return {n: [v.dtype for v in (x if isinstance(x, list) else [x])] for n, x in found.items()}

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
    while type(node).__name__ != "PyramidLossFunctionBackward":
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


def test_errors() -> None:
    with pytest.raises(ValueError, match="found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
    head = build("retina")
    head.loss_cls = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"RetinaHead\.loss_cls: expected mmdet's FocalLoss on logits"):
        compat.accelerate(head)
