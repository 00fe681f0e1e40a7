"""fastfocal.compat.rfdetr against the real rfdetr: its criterion, layer by layer and as it stacks the layers itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graph import fused_nodes
from torch import Tensor, nn

pytest.importorskip("rfdetr", exc_type=Exception)
pytest.importorskip("scipy")  # its matcher needs it

from rfdetr.models import criterion as host
from rfdetr.models.matcher import HungarianMatcher

from fastfocal.compat import rfdetr as compat

CLASSES, QUERIES, GROUPS = 7, 5, 3
DOUBLE = 1e-10
FORMS: dict[str, dict[str, Any]] = {
    "IoU-aware": {"ia_bce_loss": True},
    "varifocal": {"use_varifocal_loss": True},
    "focal": {},
}
every_form = pytest.mark.parametrize("form", FORMS)


def make(form: str = "IoU-aware", losses: tuple[str, ...] = ("labels", "boxes", "cardinality"), **more: Any) -> Any:
    given = {"num_classes": CLASSES, "matcher": HungarianMatcher(), "weight_dict": {}, "focal_alpha": 0.25}
    return host.SetCriterion(**given, losses=list(losses), group_detr=GROUPS, **{**FORMS.get(form, {}), **more})


def layer(generator: torch.Generator, dtype: torch.dtype, queries: int) -> dict[str, Tensor]:
    logits = torch.randn(3, queries, CLASSES, generator=generator, dtype=torch.float64) - 1
    boxes = 0.2 + 0.3 * torch.rand(3, queries, 4, generator=generator, dtype=torch.float64)
    return {"pred_logits": logits.to(dtype).requires_grad_(), "pred_boxes": boxes.to(dtype).requires_grad_()}


def predictions(dtype: torch.dtype = torch.float64, more: int = 0) -> dict[str, Any]:
    """Final, two auxiliary, and encoder outputs; these with `more` queries."""
    generator = torch.Generator().manual_seed(0)
    queries = QUERIES * GROUPS
    outputs: dict[str, Any] = layer(generator, dtype, queries)
    outputs["aux_outputs"] = [layer(generator, dtype, queries) for _ in range(2)]
    outputs["enc_outputs"] = layer(generator, dtype, queries + more * GROUPS)
    return outputs


def objects(dtype: torch.dtype = torch.float64, padded: bool = False) -> list[dict[str, Tensor]]:
    """Three images, one without objects; padded to four objects with ones whose label is that of nothing."""
    generator, targets = torch.Generator().manual_seed(1), []
    for classes in ([2, 1, 2], [], [0]):
        boxes = (0.2 + 0.3 * torch.rand(len(classes), 4, generator=generator, dtype=torch.float64)).to(dtype)
        target = {"labels": torch.tensor(classes, dtype=torch.int64), "boxes": boxes}
        if padded:
            missing = 4 - len(classes)
            filler = torch.tensor([0.5, 0.5, 1e-3, 1e-3], dtype=dtype).expand(missing, 4)
            target = {
                "labels": torch.cat([target["labels"], torch.zeros(missing, dtype=torch.int64)]),
                "boxes": torch.cat([boxes, filler]),
                "valid": torch.arange(4) < len(classes),
            }
        targets.append(target)
    return targets


def leaves(outputs: dict[str, Any]) -> list[Tensor]:
    layers = [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]
    return [one[name] for one in layers for name in ("pred_logits", "pred_boxes")]


def step(criterion: nn.Module, outputs: dict[str, Any], targets: Any, **given: Any) -> tuple[dict[str, Tensor], Any]:
    losses = criterion(outputs, targets, **given)
    total = sum(loss for loss in losses.values() if loss.requires_grad)
    return losses, torch.autograd.grad(total, leaves(outputs), allow_unused=True)


def compare(
    stock: tuple[dict[str, Tensor], Any], ours: tuple[dict[str, Tensor], Any], rtol: float, atol: float
) -> None:
    assert list(ours[0]) == list(stock[0])
    for name, loss in stock[0].items():
        torch.testing.assert_close(
            ours[0][name], loss, rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    for mine, theirs in zip(ours[1], stock[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("losses", [("labels", "boxes", "cardinality"), ("labels", "cardinality")])
@every_form
def test_the_criterion(form: str, losses: tuple[str, ...], more: int, training: bool) -> None:
    """Of layers that it could stack, and of others; with its groups, and in evaluation without."""
    criterion = make(form, losses).train(training)
    stock = step(criterion, predictions(more=more), objects())
    assert compat.accelerate(criterion) is criterion and type(criterion) is compat.FastSetCriterion
    compare(stock, step(criterion, predictions(more=more), objects()), DOUBLE, 1e-15)


@pytest.mark.parametrize("form", ["IoU-aware"])
@pytest.mark.parametrize("more", [0, 2])
def test_padded_targets(form: str, more: int) -> None:
    """A query matched with padding is a negative."""
    criterion = make(form)
    stock = step(criterion, predictions(more=more), objects(padded=True))
    compare(stock, step(compat.accelerate(criterion), predictions(more=more), objects(padded=True)), DOUBLE, 1e-15)
    assert stock[0]["loss_ce"] > 0.1


def test_padded_targets_of_another_loss() -> None:
    for criterion in (make("focal"), compat.accelerate(make("focal"))):
        with pytest.raises(NotImplementedError, match="Fixed-size target padding"):
            criterion(predictions(), objects(padded=True))


@pytest.mark.parametrize("divisor", [1.0, 3, torch.tensor(2.5)], ids=str)
@every_form
def test_a_divisor_of_ones_own(form: str, divisor: Any) -> None:
    criterion = make(form)
    stock = step(criterion, predictions(), objects(), num_boxes=divisor)
    compare(stock, step(compat.accelerate(criterion), predictions(), objects(), num_boxes=divisor), DOUBLE, 1e-15)


@every_form
def test_no_objects_at_all(form: str) -> None:
    nothing = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4).double()}] * 3
    criterion = make(form)
    stock = step(criterion, predictions(), nothing)
    compare(stock, step(compat.accelerate(criterion), predictions(), nothing), DOUBLE, 1e-15)


@every_form
def test_the_loss_of_a_layer(form: str) -> None:
    """Called by itself; one match of disjoint boxes."""
    nothing = torch.tensor([], dtype=torch.int64)
    indices = [
        (torch.tensor([8, 1, 4]), torch.tensor([0, 2, 1])),
        (nothing, nothing),
        (torch.tensor([3]), torch.tensor([0])),
    ]
    found = []
    for criterion in (make(form), compat.accelerate(make(form))):
        outputs = predictions()
        outputs["pred_boxes"].data[0, 4] = torch.tensor([0.9, 0.9, 0.1, 0.1])
        losses = criterion.loss_labels(outputs, objects(), indices, torch.tensor(4.0))
        found.append((losses, torch.autograd.grad(losses["loss_ce"], outputs["pred_logits"])))
    compare(found[0], found[1], DOUBLE, 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_form
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    """rfdetr's result is float32 for 16 bits too; its value, from float64 at the same logits."""
    matches = [(torch.tensor([8, 1, 4]), torch.tensor([0, 2, 1]))] * 3
    targets = objects(torch.float32)[:1] * 3
    outputs = predictions(dtype)
    outputs["pred_boxes"] = outputs["pred_boxes"].detach().float()
    exact = {name: outputs[name].detach().double() for name in ("pred_logits", "pred_boxes")}
    exact["pred_logits"].requires_grad_()
    divisor = torch.tensor(4.0)
    in_double = [{**target, "boxes": target["boxes"].double()} for target in targets]
    true = make(form).loss_labels(exact, in_double, matches, divisor, log=False)["loss_ce"]
    (slope,) = torch.autograd.grad(true, exact["pred_logits"])
    ours = compat.accelerate(make(form)).loss_labels(outputs, targets, matches, divisor, log=False)["loss_ce"]
    (gradient,) = torch.autograd.grad(ours, outputs["pred_logits"])
    if form == "focal" or dtype == torch.float32:  # of the others, the stock one puts float32 into 16 bits: an error
        stock = make(form).loss_labels(outputs, targets, matches, divisor, log=False)["loss_ce"]
        assert ours.dtype == stock.dtype == torch.float32
    # float32 overlaps of boxes; 16 bits: a gradient rounded once.
    torch.testing.assert_close(ours.double(), true, rtol=3e-6, atol=0)
    rtol = 3e-6 + (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
    torch.testing.assert_close(gradient.double(), slope, rtol=rtol, atol=torch.finfo(torch.float16).tiny)


def test_its_own_stack_of_layers() -> None:
    """What rfdetr compiles on CUDA computes the same as its layers one by one, and as ours."""
    criterion = make()
    outputs, targets = predictions(), objects()
    matched = [
        {k: v for k, v in outputs.items() if k != "aux_outputs"},
        *outputs["aux_outputs"],
        outputs["enc_outputs"],
    ]
    indices = [criterion.matcher(one, targets, group_detr=GROUPS) for one in matched]
    gathered = [criterion._get_matched_targets(targets, of_layer) for of_layer in indices]
    divisor = criterion.num_boxes_for_targets(outputs, targets)
    stacked = criterion._get_batched_detection_losses(matched, targets, indices, gathered, divisor)
    theirs = torch.stack([losses["loss_ce"] for losses in stacked])
    losses = compat.accelerate(criterion)(outputs, targets)
    ours = torch.stack([losses[name] for name in ("loss_ce", "loss_ce_0", "loss_ce_1", "loss_ce_enc")])
    torch.testing.assert_close(ours, theirs, rtol=DOUBLE, atol=0)
    logits = [one["pred_logits"] for one in matched]
    for mine, their in zip(
        torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits), strict=True
    ):
        torch.testing.assert_close(mine, their, rtol=DOUBLE, atol=1e-15)


@pytest.mark.parametrize("more", [0, 2])
@every_form
def test_one_node_for_all_layers(form: str, more: int) -> None:
    losses = compat.accelerate(make(form))(predictions(more=more), objects())
    of_classes = [loss for name, loss in losses.items() if name.startswith("loss_ce")]
    assert len(of_classes) == 4 and len({id(node) for loss in of_classes for node in fused_nodes(loss)}) == 1


@pytest.mark.parametrize("label", [CLASSES, -1, CLASSES + 5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_label_that_is_no_class(label: int, padded: bool) -> None:
    targets = objects(padded=padded)
    targets[2]["labels"][0] = label
    message = rf"labels: image 2, object 0 has label {label}; expected one of the classes 0\.\.{CLASSES - 1} "
    criterion = compat.accelerate(make())
    with pytest.raises(ValueError, match=message):
        criterion(predictions(), targets)
    matches = [(torch.tensor([0]), torch.tensor([0]))] * 3
    with pytest.raises(ValueError, match=message):
        criterion.loss_labels(predictions(), targets, matches, torch.tensor(1.0))


def test_the_label_of_padding() -> None:
    targets = objects(padded=True)
    for target in targets:
        target["labels"].masked_fill_(~target["valid"], 99)
    indices = [(torch.arange(4), torch.arange(4))] * 3
    losses = compat.accelerate(make()).loss_labels(predictions(), targets, indices, torch.tensor(1.0), log=False)
    assert losses["loss_ce"] > 0


def test_a_subclass() -> None:
    """It is not swapped; one of the fast class gets each layer's loss when it asks."""

    class Own(compat.FastSetCriterion):
        def loss_labels(self, *given: Any, **options: Any) -> dict[str, Tensor]:
            return {name: 2 * value for name, value in super().loss_labels(*given, **options).items()}

    criterion = make()
    stock = criterion(predictions(), objects())
    criterion.__class__ = Own
    ours = criterion(predictions(), objects())
    torch.testing.assert_close(ours["loss_ce_0"], 2 * stock["loss_ce_0"], rtol=DOUBLE, atol=0)
    criterion.__class__ = type("Other", (host.SetCriterion,), {})
    with pytest.raises(ValueError, match="found the subclass Other"):
        compat.accelerate(criterion)


def test_the_loss_that_is_left_out() -> None:
    with pytest.raises(ValueError, match=r"SetCriterion\.use_position_supervised_loss: .* rfdetr's alone"):
        compat.accelerate(make("", use_position_supervised_loss=True))
    both = make("IoU-aware", use_position_supervised_loss=True)  # the first wins
    assert type(compat.accelerate(both)) is compat.FastSetCriterion


def test_restore() -> None:
    criterion = make()
    stock, _ = step(criterion, predictions(), objects())
    step(compat.accelerate(criterion), predictions(), objects())
    again, _ = step(compat.restore(criterion), predictions(), objects())
    assert type(criterion) is host.SetCriterion
    for name, loss in stock.items():
        assert torch.equal(again[name], loss)


def test_an_error_leaves_nothing_behind() -> None:
    criterion = compat.accelerate(make())
    broken = predictions()
    del broken["aux_outputs"][1]["pred_boxes"]
    with pytest.raises(KeyError):
        criterion(broken, objects())
    copy.deepcopy(criterion)
    compare(step(make(), predictions(), objects()), step(criterion, predictions(), objects()), DOUBLE, 1e-15)


def test_nothing_to_accelerate() -> None:
    with pytest.raises(ValueError, match="module: expected one with rfdetr's SetCriterion, found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
