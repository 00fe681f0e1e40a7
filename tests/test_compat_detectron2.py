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
from watch import Shapes

pytest.importorskip("detectron2", exc_type=Exception)

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage

from fastfocal.compat import detectron2 as compat
from fastfocal.heads import tiles

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


both_heads = pytest.mark.parametrize("fuse_head", [False, True])
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


@both_heads
def test_same_losses_and_gradients(model: nn.Module, fuse_head: bool) -> None:
    """Over three steps: the normalizer of each depends on those before it."""
    stock = steps(copy.deepcopy(model), 3)
    ours = steps(compat.accelerate(model, fuse_head=fuse_head), 3)
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


@both_heads
def test_restore_goes_on_with_the_same_normalizer(model: nn.Module, fuse_head: bool) -> None:
    types = [type(m) for m in model.modules()]
    stock = steps(copy.deepcopy(model), 3)
    steps(compat.accelerate(model, fuse_head=fuse_head), 2)
    assert type(compat.restore(model)) in (RetinaNet, FCOS) and isinstance(model.loss_normalizer, float)
    assert [type(m) for m in model.modules()] == types
    last, _, _ = steps(model, 1)
    for name, loss in last[0].items():
        torch.testing.assert_close(loss, stock[0][2][name], rtol=ROUNDED, atol=0)


@both_heads
def test_state_dict_and_inference_are_unchanged(model: nn.Module, fuse_head: bool) -> None:
    model.eval()
    before = list(model.state_dict())
    batch = inputs(torch.float32)
    with torch.no_grad():
        stock = model(batch)
        ours = compat.accelerate(model, fuse_head=fuse_head)(batch)
    assert list(model.state_dict()) == before
    for theirs, mine in zip(stock, ours, strict=True):
        for field, value in theirs["instances"].get_fields().items():
            other = mine["instances"].get(field)
            tensors = (value.tensor, other.tensor) if isinstance(value, Boxes) else (value, other)
            assert torch.equal(*tensors)


@both_heads
@every_precision
def test_precision(model: nn.Module, precision: Precision, fuse_head: bool) -> None:
    """Each loss has detectron2's dtype, a large sum its value, and gradients that a GradScaler scales are finite.

    Where detectron2 cannot train (FCOS in 16 bits: its box loss mixes dtypes), neither can we.
    """
    with torch.no_grad():
        model.head.cls_score.bias.fill_(40.0)
    model.to(precision.logits).train()
    model.loss_normalizer = 1e-6  # so that the sum is divided by little more than a tenth of the positives
    found, refused = [], []
    for detector in (copy.deepcopy(model), compat.accelerate(model, fuse_head=fuse_head)):
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


# --- the last convolution and the loss as one -------------------------------------------------------------------------

# Against the accelerated detector, which computes the classification loss in float64.
DOUBLE = 1e-10


def assert_equal(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """Losses and gradients against each one's largest element; what is logged, exactly."""
    assert ours[2] == theirs[2] and list(ours[1]) == list(theirs[1])
    for mine, expected in zip(ours[0], theirs[0], strict=True):
        for name in expected:
            # The loss itself is rounded to float32, as detectron2's.
            rtol = ROUNDED if expected[name].dtype == torch.float32 else DOUBLE
            torch.testing.assert_close(mine[name], expected[name], rtol=rtol, atol=0)
    for name, gradient in ours[1].items():
        expected = theirs[1][name]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=DOUBLE * float(expected.abs().max()))


@pytest.mark.filterwarnings("error:fuse_head")  # no logits are made
@pytest.mark.parametrize("frozen", [(), ("backbone",), ("head.cls_score.weight",), ("head.cls_subnet",)], ids=str)
def test_a_fused_head(model: nn.Module, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With many tiles to a level; only the normalizer goes through the loss' float32."""
    monkeypatch.setitem(tiles.AUTO_BYTES, "cpu", 2048)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    plain = steps(compat.accelerate(copy.deepcopy(model)), 3)
    assert_equal(steps(compat.accelerate(model, fuse_head=True), 3), plain)


@pytest.mark.filterwarnings("error:fuse_head")
def test_a_fused_head_without_objects(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [{**x, "instances": x["instances"][[]]} for x in inputs()]
    assert all(len(x["instances"]) == 0 for x in batch)
    monkeypatch.setitem(globals(), "inputs", lambda: copy.deepcopy(batch))
    stock = steps(copy.deepcopy(model), 1)
    plain = steps(compat.accelerate(copy.deepcopy(model)), 1)
    ours = steps(compat.accelerate(model, fuse_head=True), 1)
    assert_equal(ours, plain)
    for name, loss in stock[0][0].items():
        torch.testing.assert_close(ours[0][0][name].double(), loss.double(), rtol=SINGLE, atol=0)


def test_training_makes_no_logits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.AUTO_BYTES, "cpu", 1024)  # less than one level's logits
    channels = model.head.cls_score.out_channels
    logits = {(3, channels, 96 // s, 128 // s) for s in STRIDES}
    for fuse_head in (False, True):
        with Shapes() as shapes:
            steps(compat.accelerate(model, fuse_head=fuse_head), 1)
        assert logits <= shapes.seen if not fuse_head else not logits & shapes.seen


def test_detectron2s_own_losses_get_the_logits_of_a_fused_head(model: nn.Module) -> None:
    """A `losses` that somebody calls with the head's outputs, and what is logged of them."""
    stock = steps(copy.deepcopy(model), 2)
    compat.accelerate(model, fuse_head=True)
    kind = type(model).__mro__[1]
    model.__class__ = kind  # detectron2's own forward_training, which permutes and concatenates
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = steps(model, 2)
    assert ours[2] == stock[2] and all(
        torch.equal(ours[0][i][n], stock[0][i][n]) for i in range(2) for n in stock[0][i]
    )
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, stock[1][name], rtol=0, atol=DOUBLE * float(stock[1][name].abs().max()))


def test_a_hook_on_a_fused_head(model: nn.Module) -> None:
    def hook(module: Any, args: Any, outputs: Any) -> None:
        with torch.no_grad():
            seen.append([float(x.sigmoid().mean()) for x in outputs[0]])

    model.head.register_forward_hook(hook)
    seen: list[Any] = []
    plain = steps(compat.accelerate(copy.deepcopy(model)), 1)
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = steps(compat.accelerate(model, fuse_head=True), 1)
    assert_equal(ours, plain)
    assert seen[1] == pytest.approx(seen[0], rel=1e-12)


def test_a_last_convolution_that_cannot_be_fused(model: nn.Module) -> None:
    """detectron2's own, which may have a norm behind it."""
    plain = model.head.cls_score
    model.head.cls_score = Conv2d(WIDTH, plain.out_channels, 3, padding=1, norm=nn.BatchNorm2d(plain.out_channels))
    with pytest.raises(
        ValueError, match=r"\.head\.cls_score: fuse_head=True needs PyTorch's own nn.Conv2d, .* got Conv2d"
    ):
        compat.accelerate(model, fuse_head=True)
    assert type(model) in (RetinaNet, FCOS)


def test_the_fused_head_is_switched_on_and_off(model: nn.Module) -> None:
    fused = [type(m) for m in compat.accelerate(model, fuse_head=True).modules()]
    assert [type(m) for m in compat.accelerate(model, fuse_head=True).modules()] == fused
    assert type(compat.accelerate(model).head.cls_score) is nn.Conv2d


# --- labels that are no class -----------------------------------------------------------------------------------------


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
