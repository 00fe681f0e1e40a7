"""fastfocal.compat.effdet against the real effdet: DetectionLoss alone, and a whole DetBenchTrain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from precision import Precision, check, every_precision
from torch import Tensor, nn

pytest.importorskip(
    "effdet", exc_type=Exception
)  # it needs torchvision, which does not load beside a CPU build of torch

import effdet
import effdet.loss

from fastfocal.compat import effdet as compat

CLASSES, ANCHORS = 7, 9
SIZES = ((6, 5), (3, 3), (1, 1))


def config(**changes: Any) -> SimpleNamespace:
    options = {
        "num_classes": CLASSES,
        "alpha": 0.25,
        "gamma": 1.5,
        "delta": 0.1,
        "box_loss_weight": 50.0,
        "label_smoothing": 0.0,
        "legacy_focal": False,
        "jit_loss": False,
    }
    return SimpleNamespace(**{**options, **changes})


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    logits = [(draw(2, ANCHORS * CLASSES, h, w) - 2).requires_grad_() for h, w in SIZES]
    boxes = [draw(2, ANCHORS * 4, h, w).requires_grad_() for h, w in SIZES]
    labels = [torch.randint(-2, CLASSES, (2, h, w, ANCHORS), generator=generator) for h, w in SIZES]
    box_targets = [draw(2, h, w, ANCHORS * 4) * (draw(2, h, w, ANCHORS * 4) > 0) for h, w in SIZES]
    return logits, boxes, labels, box_targets, torch.tensor([12, 0])


@pytest.mark.parametrize(
    "changes", [{}, {"label_smoothing": 0.1}, {"legacy_focal": True}, {"gamma": 2.0}, {"jit_loss": True}]
)
def test_same_losses_and_gradients(changes: dict[str, Any]) -> None:
    """effdet computes in float32 whatever the logits are, so its own results are what limits the comparison."""
    theirs, ours = effdet.loss.DetectionLoss(config(**changes)), compat.FastDetectionLoss(config(**changes))
    found = []
    for criterion in (theirs, ours):
        logits, boxes, *rest = batch(torch.float32)
        losses = criterion(logits, boxes, *rest)
        losses[0].backward()
        found.append((losses, [t.grad for t in (*logits, *boxes)]))
    for a, b in zip(*(f[0] for f in found), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=0)  # float32 sums of 3000 terms, in another order
    for a, b in zip(*(f[1] for f in found), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=1e-6 * float(a.abs().max()))  # their 1 - p_t cancels


def exact_loss(logits: list[Tensor], labels: list[Tensor], positives: Tensor) -> Tensor:
    """effdet's own element by element, in the dtype of the logits and not in float32."""
    parts = [
        effdet.loss.new_focal_loss(
            x.permute(0, 2, 3, 1),
            effdet.loss.one_hot(y, CLASSES).flatten(3).to(x.dtype),
            alpha=0.25,
            gamma=1.5,
            normalizer=positives.sum().double() + 1.0,
            label_smoothing=0.0,
        )
        .unflatten(-1, (ANCHORS, CLASSES))
        .mul((y != -2).unsqueeze(-1))
        .sum()
        for x, y in zip(logits, labels, strict=True)
    ]
    return torch.stack(parts).sum()


@every_precision
def test_precision(precision: Precision) -> None:
    """float32, whatever the logits are: effdet casts them. One level, of a large sum."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, ANCHORS * CLASSES, 40, 50)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2
    y = torch.randint(-2, CLASSES, (1, 40, 50, ANCHORS), generator=generator)
    boxes, positives = torch.zeros(1, ANCHORS * 4, 40, 50), torch.tensor([0])
    rest = ([y], [torch.zeros(1, 40, 50, ANCHORS * 4)], positives)
    for part in (0, 1):  # the total, and the classes'
        theirs, ours = (
            lambda x, kind=kind, part=part: kind(config())([x], [boxes], *rest)[part]
            for kind in (effdet.loss.DetectionLoss, compat.FastDetectionLoss)
        )
        loss = check(ours, theirs, lambda x: exact_loss([x], [y], positives), x, precision, gamma=1.5)
        assert loss.dtype == torch.float32 and loss > 65504


@pytest.mark.parametrize("label", [CLASSES, -3, CLASSES + 20])
def test_an_anchor_label_that_is_none(label: int) -> None:
    logits, boxes, labels, *rest = batch(torch.float32)
    labels[1][1, 2, 0, 3] = label
    with pytest.raises(
        ValueError,
        match=rf"targets\[1\]: label {label} at \[1, 2, 0, 3\] \(level 1, image 1\); expected .*0\.\.{CLASSES - 1}",
    ):
        compat.FastDetectionLoss(config())(logits, boxes, labels, *rest)


@pytest.mark.parametrize("label", [0, CLASSES + 1])
def test_an_object_label_that_is_no_class(label: int) -> None:
    """Objects' classes are 1..K; effdet trained class 0 as background."""
    model = compat.accelerate(bench()).train()
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(5))
    boxes = [torch.tensor([[10.0, 12.0, 70.0, 90.0]]), torch.tensor([[30.0, 5.0, 60.0, 40.0], [0.0, 0.0, 0.0, 0.0]])]
    target = {"bbox": boxes, "cls": [torch.tensor([1]), torch.tensor([label, -1])]}
    message = rf'target\["cls"\]: image 1, object 0 has label {label}; expected one of the classes 1\.\.{CLASSES} '
    with pytest.raises(ValueError, match=message):
        model(images, target)
    target["cls"][1][0] = CLASSES
    assert model(images, target)["class_loss"] > 0  # -1 pads


def test_a_subclassed_bench_is_left_alone() -> None:
    model = bench()
    own = type("Own", (type(model),), {})
    model.__class__ = own
    assert type(compat.accelerate(model)) is own and type(model.loss_fn) is compat.FastDetectionLoss


def test_closer_to_float64_than_effdet() -> None:
    logits, boxes, *rest = batch(torch.float32)
    labels, _, positives = rest
    exact = exact_loss([x.detach().double() for x in logits], labels, positives)
    ours = compat.FastDetectionLoss(config())(logits, boxes, *rest)[1]
    torch.testing.assert_close(ours.double(), exact, rtol=3e-7, atol=0)  # one float32 rounding, and 1e-7 of accuracy


def bench() -> nn.Module:
    torch.manual_seed(0)
    settings = effdet.get_efficientdet_config("tf_efficientdet_d0")
    settings.image_size, settings.num_classes = (128, 128), CLASSES
    net = effdet.EfficientDet(settings, pretrained_backbone=False)
    return effdet.DetBenchTrain(net, create_labeler=True)


def step(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    for module in model.modules():  # what changes from step to step by itself
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    generator = torch.Generator().manual_seed(5)
    target = {
        "bbox": [torch.tensor([[10.0, 12.0, 70.0, 90.0]]), torch.tensor([[30.0, 5.0, 60.0, 40.0]])],
        "cls": [torch.tensor([1]), torch.tensor([CLASSES])],
    }
    losses = model(torch.rand(2, 3, 128, 128, generator=generator), target)
    losses["loss"].backward()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_training_bench() -> None:
    model = bench()
    before = list(model.state_dict())
    stock, expected = step(model)
    ours, gradients = step(compat.accelerate(model))
    assert type(model.loss_fn) is compat.FastDetectionLoss and list(model.state_dict()) == before
    assert list(ours) == list(stock)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-5, atol=0)  # float32, as above
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    again, _ = step(compat.restore(model))
    assert type(model.loss_fn) is effdet.loss.DetectionLoss and type(model) is effdet.DetBenchTrain
    torch.testing.assert_close(again["loss"], stock["loss"], rtol=0, atol=0)


def test_a_model_without_such_a_loss() -> None:
    with pytest.raises(ValueError, match="model: expected one with effdet's DetectionLoss, found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
