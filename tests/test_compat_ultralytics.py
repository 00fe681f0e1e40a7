"""fastfocal.compat.ultralytics against the real ultralytics: both losses, and the RT-DETR criterion around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from precision import Precision, check, every_precision, large_logits
from torch import Tensor, nn

pytest.importorskip("ultralytics", exc_type=Exception)  # it needs torchvision

from ultralytics.models.utils.loss import DETRLoss, RTDETRDetectionLoss
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


def criterion_step(criterion: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    layers = 2
    boxes = torch.rand(layers, 2, QUERIES, 4, generator=generator).requires_grad_()
    logits = (torch.randn(layers, 2, QUERIES, CLASSES, generator=generator) - 2).requires_grad_()
    batch = {
        "cls": torch.tensor([1, 5, 8]),
        "bboxes": torch.rand(3, 4, generator=generator) * 0.5 + 0.2,
        "gt_groups": [2, 1],
    }
    losses = criterion((boxes, logits), batch)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}, [boxes.grad, logits.grad]


@pytest.mark.parametrize("varifocal", [True, False])
def test_the_criterion_of_rt_detr(varifocal: bool) -> None:
    criterion = RTDETRDetectionLoss(nc=CLASSES, use_vfl=varifocal)
    stock, expected = criterion_step(criterion)
    assert compat.accelerate(criterion) is criterion and type(criterion.fl) is compat.FastFocalLoss
    ours, gradients = criterion_step(criterion)
    assert list(ours) == list(stock)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=2e-6, atol=1e-7)  # float32 sums in another order
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    again, _ = criterion_step(compat.restore(criterion))
    assert type(criterion.fl) is host.FocalLoss and type(criterion) is RTDETRDetectionLoss
    for name in stock:
        assert torch.equal(again[name], stock[name])


def test_a_criterion_without_such_losses() -> None:
    with pytest.raises(ValueError, match=r"criterion: expected one with ultralytics' .* found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
