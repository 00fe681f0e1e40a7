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
        # Weights for anchors are stored in float32 where the loss is "none".
        rtol = 1e-6 if weights == "anchors" and reduction == "none" else DOUBLE
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14)


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


def step(head: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
    """Losses, and the gradients of features and parameters. The second image has no objects."""
    generator = torch.Generator().manual_seed(3)
    features = [torch.rand(2, WIDTH, 128 // s, 160 // s, generator=generator).requires_grad_() for s in STRIDES]
    boxes = [[[10.0, 10.0, 50.0, 54.0], [60.0, 20.0, 130.0, 100.0]], []]
    classes = [[0, 6], []]
    gt = [
        InstanceData(bboxes=torch.tensor(b).reshape(-1, 4), labels=torch.tensor(k, dtype=torch.int64))
        for b, k in zip(boxes, classes, strict=True)
    ]
    metas = [{"img_shape": (128, 160), "pad_shape": (128, 160), "scale_factor": (1.0, 1.0)}] * 2
    head.zero_grad()
    losses = head.loss_by_feat(*head(tuple(features)), gt, metas)
    flat = [loss for value in losses.values() for loss in (value if isinstance(value, (list, tuple)) else [value])]
    torch.stack(flat).sum().backward()
    return losses, [t.grad.clone() for t in (*features, *head.parameters()) if t.grad is not None]


def assert_same(ours: Any, theirs: Any, rtol: float) -> None:
    """A loss, or a list with one a level, as the head has it."""
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


def test_one_node_for_all_levels(head: nn.Module) -> None:
    losses, _ = step(compat.accelerate(head))
    loss = losses["loss_cls"]
    node = (loss[0] if isinstance(loss, list) else loss).grad_fn
    while type(node).__name__ != "FocalLossFunctionBackward":
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
