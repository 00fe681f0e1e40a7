"""fastfocal.compat.detectron2 against the real detectron2.

It is not on PyPI; a checkout on the path will do, as nothing here needs its compiled part:

    git clone https://github.com/facebookresearch/detectron2
    PYTHONPATH=detectron2 pytest tests/test_compat_detectron2.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from precision import Precision, every_precision
from torch import Tensor, nn

pytest.importorskip("detectron2", exc_type=Exception)

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage

from fastfocal.compat import detectron2 as compat

CLASSES, WIDTH = 7, 16
STRIDES = (8, 16, 32)


class Tiny(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=8, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1) for _ in STRIDES[1:])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [torch.relu(self.stem(x))]
        for conv in self.down:
            levels.append(torch.relu(conv(levels[-1])))
        return {f"p{i}": level for i, level in enumerate(levels)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{i}": ShapeSpec(channels=WIDTH, stride=s) for i, s in enumerate(STRIDES)}


COMMON: dict[str, Any] = {"num_classes": CLASSES, "pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}


def shapes(backbone: Backbone) -> list[ShapeSpec]:
    return list(backbone.output_shape().values())


def retinanet() -> nn.Module:
    backbone = Tiny()
    head = RetinaNetHead(input_shape=shapes(backbone), num_classes=CLASSES, num_anchors=3, conv_dims=[WIDTH])
    return RetinaNet(
        backbone=backbone,
        head=head,
        head_in_features=["p0", "p1", "p2"],
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[s * 3] for s in STRIDES], aspect_ratios=[0.5, 1.0, 2.0], strides=list(STRIDES)
        ),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        **COMMON,
    )


def fcos() -> nn.Module:
    backbone = Tiny()
    head = FCOSHead(input_shape=shapes(backbone), num_classes=CLASSES, conv_dims=[WIDTH])
    return FCOS(backbone=backbone, head=head, head_in_features=["p0", "p1", "p2"], **COMMON)


DETECTORS: dict[str, Callable[[], nn.Module]] = {"retinanet": retinanet, "fcos": fcos}


@pytest.fixture(params=DETECTORS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return DETECTORS[request.param]()


def inputs(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Images of different sizes; the second has no objects."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for (h, w), boxes, classes in (
        ((96, 128), [[10, 10, 40, 44], [12, 10, 41, 43], [50, 20, 110, 80]], [0, 6, 3]),
        ((90, 70), [], []),
        ((96, 96), [[5, 40, 25, 56]], [6]),
    ):
        instances = Instances((h, w))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=dtype).reshape(-1, 4))
        instances.gt_boxes.tensor = instances.gt_boxes.tensor.to(dtype)
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        batch.append({"image": torch.rand(3, h, w, generator=generator).to(dtype), "instances": instances})
    return batch


def steps(model: nn.Module, count: int = 2) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], list[float]]:
    """Losses of each step, every parameter's gradient after the last, the logged numbers of positives."""
    model.double().train()
    losses, logged = [], []
    with EventStorage():
        for _ in range(count):
            model.zero_grad()
            found = model(inputs())
            torch.stack(list(found.values())).sum().backward()
            losses.append({name: loss.detach() for name, loss in found.items()})
            logged.append(get_event_storage().latest()["num_pos_anchors"][0])
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, logged


# The models are float64, but fvcore computes the classification loss in float32: sums of 5000 terms, and a 1 - p_t that has
# lost two digits at a prior of 0.01. Its anchors are float32, and so are some of the other losses: one rounding of a quotient.
SINGLE, ROUNDED = 1e-5, 1.2e-7


def test_same_losses_and_gradients(model: nn.Module) -> None:
    """Over three steps: the normalizer of each depends on those before it."""
    stock = steps(copy.deepcopy(model), 3)
    ours = steps(compat.accelerate(model), 3)
    assert ours[2] == stock[2] and ours[2][0] > 0
    for mine, theirs in zip(ours[0], stock[0], strict=True):
        assert list(mine) == list(theirs)
        for name in theirs:
            rtol = SINGLE if name.endswith("_cls") else ROUNDED
            torch.testing.assert_close(mine[name].double(), theirs[name].double(), rtol=rtol, atol=0)
    assert list(ours[1]) == list(stock[1])
    for name, gradient in ours[1].items():
        torch.testing.assert_close(
            gradient, stock[1][name], rtol=SINGLE, atol=SINGLE * float(stock[1][name].abs().max())
        )
    assert isinstance(model.loss_normalizer, Tensor)


def test_some_anchors_are_ignored() -> None:
    detector = retinanet().double()
    batch = inputs()
    features = list(detector.backbone(detector.preprocess_image(batch).tensor).values())
    labels, _ = detector.label_anchors(detector.anchor_generator(features), [x["instances"] for x in batch])
    assert any((y == -1).any() for y in labels)


def test_restore_goes_on_with_the_same_normalizer(model: nn.Module) -> None:
    stock = steps(copy.deepcopy(model), 3)
    steps(compat.accelerate(model), 2)
    assert type(compat.restore(model)) in (RetinaNet, FCOS) and isinstance(model.loss_normalizer, float)
    last, _, _ = steps(model, 1)
    for name, loss in last[0].items():
        torch.testing.assert_close(loss, stock[0][2][name], rtol=ROUNDED, atol=0)


def test_state_dict_and_inference_are_unchanged(model: nn.Module) -> None:
    model.eval()
    before = list(model.state_dict())
    batch = inputs(torch.float32)
    with torch.no_grad():
        stock = model(batch)
        ours = compat.accelerate(model)(batch)
    assert list(model.state_dict()) == before
    for theirs, mine in zip(stock, ours, strict=True):
        for field, value in theirs["instances"].get_fields().items():
            other = mine["instances"].get(field)
            tensors = (value.tensor, other.tensor) if isinstance(value, Boxes) else (value, other)
            assert torch.equal(*tensors)


@every_precision
def test_precision(model: nn.Module, precision: Precision) -> None:
    """Each loss has detectron2's dtype, a large sum its value, and gradients that a GradScaler scales are finite.

    Where detectron2 cannot train (FCOS in 16 bits: its box loss mixes dtypes), neither can we.
    """
    with torch.no_grad():
        model.head.cls_score.bias.fill_(40.0)
    model.to(precision.logits).train()
    model.loss_normalizer = 1e-6  # so that the sum is divided by little more than a tenth of the positives
    found, refused = [], []
    for detector in (copy.deepcopy(model), compat.accelerate(model)):
        with EventStorage(), precision.context():
            try:
                losses = detector(inputs(precision.logits))
            except RuntimeError as error:
                refused.append(str(error))
                continue
        (name,) = (n for n in losses if n.endswith("_cls"))
        (losses[name] * (1024 if precision.logits == torch.float16 else 65536)).backward()
        found.append((losses, detector.head.cls_score.weight.grad))
    if refused:
        assert isinstance(model, FCOS) and len(refused) == 2 and refused[0] == refused[1]
        return
    (stock, expected), (ours, gradient) = found
    assert {n: loss.dtype for n, loss in ours.items()} == {n: loss.dtype for n, loss in stock.items()}
    assert ours[name].dtype == torch.float32 and ours[name] > 65504
    # fvcore computes in float32, from the same logits.
    torch.testing.assert_close(ours[name], stock[name], rtol=SINGLE, atol=0)
    assert gradient.dtype == expected.dtype and (gradient.isfinite() | ~expected.isfinite()).all()


def labelled(label: int) -> list[dict[str, Any]]:
    batch = inputs(torch.float32)
    batch[2]["instances"].gt_classes[0] = label
    return batch


@pytest.mark.parametrize("label", [CLASSES, -1, -2, CLASSES + 5])
def test_a_label_that_is_no_class(model: nn.Module, label: int) -> None:
    """detectron2 trains an object of class K as background; in RetinaNet, -1 has its anchors ignored."""
    stock = copy.deepcopy(model).train()
    compat.accelerate(model).train()
    with EventStorage():
        if label == -1 and isinstance(model, RetinaNet):
            expected, ours = stock(labelled(label)), model(labelled(label))
            for name in expected:
                torch.testing.assert_close(ours[name], expected[name], rtol=SINGLE, atol=0)
            return
        with pytest.raises(
            ValueError, match=rf"gt_classes: image 2, object 0 has label {label}; expected .*0\.\.{CLASSES - 1} "
        ):
            model(labelled(label))


def test_one_class_labelled_1(model: nn.Module) -> None:
    """The commonest mistake; detectron2 trains it as pure background."""
    compat.accelerate(model).train()
    model.num_classes = 1
    with (
        EventStorage(),
        pytest.raises(ValueError, match=r"gt_classes: image 0, object 1 has label 6; expected 0, the one class"),
    ):
        model(inputs(torch.float32))


def test_errors(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
    model.__class__ = type("Own", (type(model),), {})
    with pytest.raises(ValueError, match="found the subclass Own"):
        compat.accelerate(model)
