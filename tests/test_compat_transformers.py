"""fastfocal.compat.transformers against the real transformers: its functions, and training steps of two of its models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from precision import Precision, check, every_precision, large_logits
from torch import Tensor, nn

pytest.importorskip("transformers", exc_type=Exception)
pytest.importorskip("scipy")  # its matchers need it

from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DFineConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deformable_detr import DeformableDetrImageLoss
from transformers.loss.loss_grounding_dino import GroundingDinoImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from fastfocal import reference
from fastfocal.compat import transformers as compat

# float64: both formulas agree to a few roundings; theirs loses two digits of 1 - p_t where p_t is nearly 1.
DOUBLE = 1e-10


@pytest.mark.parametrize("alpha", [0.25, -1])
@pytest.mark.parametrize("module", compat._SWAPS)
def test_the_functions(module: str, alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64).requires_grad_()
    targets = (torch.rand(2, 7, 11, generator=generator) < 0.1).double()
    host = importlib.import_module(module)
    stock = host.sigmoid_focal_loss
    theirs = stock(inputs, targets, 3, alpha, 2)
    with compat.fused_functions():
        assert host.sigmoid_focal_loss is not stock
        ours = host.sigmoid_focal_loss(inputs, targets, 3, alpha, 2)
    assert host.sigmoid_focal_loss is stock
    torch.testing.assert_close(ours, theirs, rtol=DOUBLE, atol=0)
    (mine,), (expected,) = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=DOUBLE, atol=1e-16)


def exact_function(module: str, num_boxes: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Its definition, by a focal loss whose float64 loses nothing."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        elements = reference.sigmoid_focal_loss(x, y.to(x.dtype))
        return (elements.sum() if module.endswith("grounding_dino") else elements.mean(1).sum()) / num_boxes

    return loss


BOXES = {"number": 3, "0-d": torch.tensor(3.0), "one element": torch.tensor([3.0]), "integer": torch.tensor(3)}


@pytest.mark.parametrize("targets", ["alike", "float32"])
@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("module", compat._SWAPS)
@every_precision
def test_precision_of_the_functions(precision: Precision, module: str, boxes: str, targets: str) -> None:
    """Their own dtype depends on the targets' and on how the number of boxes is given."""
    generator = torch.Generator().manual_seed(0)
    shape = (1200, 2, 11)
    x = large_logits(*shape, generator=generator)
    y = (torch.rand(shape, generator=generator) < 0.1).double()
    stock = importlib.import_module(module).sigmoid_focal_loss
    ours = compat._SWAPS[module]

    def of(function: Any) -> Any:
        return lambda x: function(x, y.to(torch.float32 if targets == "float32" else x.dtype), BOXES[boxes])

    loss = check(
        of(ours), of(stock), lambda x: exact_function(module, 3)(x, y).reshape(BOXES_SHAPES[boxes]), x, precision
    )
    assert (loss.isinf() == (loss.dtype == torch.float16)).all() and (loss > 65504).all()


BOXES_SHAPES = {name: tuple(torch.as_tensor(value).shape) for name, value in BOXES.items()}


def varifocal_problem() -> tuple[Tensor, Tensor, list[dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Logits, boxes, targets, matches: overlaps of 1, 1/2 and 1/4, which every dtype has, and an image without objects."""
    generator = torch.Generator().manual_seed(1)
    logits = large_logits(2, 400, 7, generator=generator)
    boxes = torch.full((2, 400, 4), 0.5)
    corner = torch.tensor([0.25, 0.25, 0.5, 0.5])  # centre and size
    boxes[0, [5, 17, 200]] = corner
    matched = torch.stack([corner, torch.tensor([0.125, 0.25, 0.25, 0.5]), torch.tensor([0.125, 0.125, 0.25, 0.25])])
    targets = [
        {"class_labels": torch.tensor([2, 6, 0]), "boxes": matched},
        {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    nothing = torch.tensor([], dtype=torch.int64)
    return logits, boxes, targets, [(torch.tensor([5, 17, 200]), torch.tensor([2, 0, 1])), (nothing, nothing)]


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("host", ["RT-DETR", "D-FINE"])
@every_precision
def test_precision_of_the_varifocal_loss(precision: Precision, host: str, boxes: str) -> None:
    logits, pred_boxes, targets, indices = varifocal_problem()
    made, config = {"RT-DETR": (RTDetrLoss, RTDetrConfig), "D-FINE": (DFineLoss, DFineConfig)}[host]
    criterion = made(config(num_labels=7, focal_loss_alpha=0.75))

    def of(context: Callable[[], Any], num_boxes: Any) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            with context():
                found: Tensor = criterion.loss_labels_vfl(
                    {"logits": x, "pred_boxes": pred_boxes}, targets, indices, num_boxes
                )["loss_vfl"]
                return found

        return loss

    # Division by less than 1, so that the loss itself is more than float16 has.
    number: Any = {
        "number": 0.5,
        "0-d": torch.tensor(0.5),
        "one element": torch.tensor([0.5]),
        "integer": torch.tensor(1),
    }[boxes]
    exact = torch.as_tensor(number).double()
    loss = check(of(compat.fused_functions, number), of(nullcontext, number), of(nullcontext, exact), logits, precision)
    assert (loss.isinf() == (loss.dtype == torch.float16)).all() and (loss > 65504).all()


# --- labels that are no class -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [7, -1, 8, -3])
def test_a_label_that_is_no_class_of_the_varifocal_loss(label: int) -> None:
    logits, boxes, targets, indices = varifocal_problem()
    targets[0]["class_labels"][1] = label
    criterion = RTDetrLoss(RTDetrConfig(num_labels=7))
    message = rf"class_labels: image 0, object 1 has label {label}; expected one of the classes 0\.\.6 "
    with compat.fused_functions(), pytest.raises(ValueError, match=message):
        criterion.loss_labels_vfl({"logits": logits, "pred_boxes": boxes}, targets, indices, 4)


@pytest.mark.parametrize("label", [7, -1, 8])
def test_a_label_that_is_no_class_of_deformable_detr(label: int) -> None:
    """7 is background to the stock criterion, and an index out of range to its matcher."""
    logits, _, targets, indices = varifocal_problem()
    targets[0]["class_labels"][1] = label
    criterion = DeformableDetrImageLoss(None, 7, 0.25, ["labels"])
    stock = DeformableDetrImageLoss.loss_labels
    message = rf"class_labels: image 0, object 1 has label {label}; expected one of the classes 0\.\.6 "
    with compat.fused_functions(), pytest.raises(ValueError, match=message):
        criterion.loss_labels({"logits": logits}, targets, indices, 4)
    assert DeformableDetrImageLoss.loss_labels is stock


@pytest.mark.parametrize("label", [2, -1, 5])
def test_a_label_that_is_no_phrase_of_grounding_dino(label: int) -> None:
    """Its label map has two rows in the second image; -1 is the last one to the stock criterion, and 2 one of another image."""
    outputs = {
        "logits": torch.zeros(2, 5, 8),
        "text_mask": torch.ones(2, 5, 8, dtype=torch.bool),
        "label_maps": [torch.eye(3, 8), torch.eye(2, 8)],
    }
    targets = [{"class_labels": torch.tensor([0, 2])}, {"class_labels": torch.tensor([label])}]
    indices = [(torch.tensor([1, 4]), torch.tensor([0, 1])), (torch.tensor([3]), torch.tensor([0]))]
    criterion = GroundingDinoImageLoss(matcher=None, focal_alpha=0.25, losses=["labels"])
    message = rf"class_labels: image 1, object 0 has label {label}; expected one of the classes 0\.\.1 "
    with compat.fused_functions(), pytest.raises(ValueError, match=message):
        criterion.loss_labels(outputs, targets, indices, 3)


def test_one_class_labelled_1() -> None:
    logits, boxes, targets, indices = varifocal_problem()
    targets[0]["class_labels"][:] = 1
    with compat.fused_functions():
        with pytest.raises(ValueError, match=r"image 0, object 0 has label 1; expected 0, the one class"):
            RTDetrLoss(RTDetrConfig(num_labels=1)).loss_labels_vfl(
                {"logits": logits[..., :1], "pred_boxes": boxes}, targets, indices, 4
            )
        with pytest.raises(ValueError, match=r"image 0, object 0 has label 1; expected 0, the one class"):
            DeformableDetrImageLoss(None, 1, 0.25, ["labels"]).loss_labels(
                {"logits": logits[..., :1]}, targets, indices, 4
            )


def test_the_swap_is_undone_by_an_error() -> None:
    from transformers.loss import loss_deformable_detr as host

    stock = host.sigmoid_focal_loss
    with pytest.raises(KeyError), compat.fused_functions():
        raise KeyError
    assert host.sigmoid_focal_loss is stock


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("host", ["RT-DETR", "D-FINE"])
def test_the_varifocal_loss_of_the_criteria(host: str, gamma: float) -> None:
    """One match of disjoint boxes, whose overlap 0 makes a positive that costs nothing; one image without objects."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 7, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = (0.2 + 0.3 * torch.rand(3, 9, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    boxes.data[0, 4] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    classes, found = ([2, 6, 2], []), [torch.tensor([1, 4, 8]), torch.tensor([], dtype=torch.int64)]
    targets = [{"class_labels": torch.tensor(k, dtype=torch.int64), "boxes": torch.zeros(len(k), 4)} for k in classes]
    targets[0]["boxes"] = torch.tensor([[0.3, 0.3, 0.3, 0.4], [0.2, 0.2, 0.1, 0.1], [0.4, 0.4, 0.4, 0.4]]).double()
    targets.append({"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.35, 0.3, 0.3, 0.3]]).double()})
    indices = [(found[0], torch.tensor([2, 1, 0])), (found[1], found[1]), (torch.tensor([3]), torch.tensor([0]))]
    made, config = {"RT-DETR": (RTDetrLoss, RTDetrConfig), "D-FINE": (DFineLoss, DFineConfig)}[host]
    criterion = made(config(num_labels=7, focal_loss_alpha=0.6, focal_loss_gamma=gamma))
    given = ({"logits": logits, "pred_boxes": boxes}, targets, indices, 4)
    theirs = criterion.loss_labels_vfl(*given)
    with compat.fused_functions():
        ours = criterion.loss_labels_vfl(*given)
        assert RTDetrLoss.loss_labels_vfl is compat.varifocal_loss
    assert RTDetrLoss.loss_labels_vfl is not compat.varifocal_loss
    assert list(ours) == list(theirs) == ["loss_vfl"]
    # float64, and no 1 - p_t that cancels: a few roundings, times gamma in the power; sums of 189 terms in another order.
    torch.testing.assert_close(ours["loss_vfl"], theirs["loss_vfl"], rtol=1e-13, atol=0)
    mine, expected = (torch.autograd.grad(loss["loss_vfl"], logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-16)
    assert not mine[0, 4, 6] and mine[0, 1, 2] and mine[0, 4, 0]


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_training_step_of_deformable_detr() -> None:
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_indices=[2, 3, 4])
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20, "num_labels": 7}
    config = DeformableDetrConfig(backbone_config=backbone, use_timm_backbone=False, dropout=0.0, **small, **heads)
    model = DeformableDetrForObjectDetection(config).double().eval()  # no dropout, no batch statistics
    compare_steps(model)


def compare_steps(model: nn.Module) -> None:
    """Loss and every parameter's gradient, stock and fused; the second image has no object."""
    labels = [
        {
            "class_labels": torch.tensor([2, 6]),
            "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.3, 0.6]]).double(),
        },
        {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4).double()},
    ]
    inputs = {"pixel_values": torch.rand(2, 3, 64, 96, dtype=torch.float64), "labels": labels}
    theirs, expected = step(model, **inputs)
    with compat.fused_functions():
        ours, gradients = step(model, **inputs)
    torch.testing.assert_close(ours, theirs, rtol=DOUBLE, atol=0)
    assert list(gradients) == list(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients.items():  # that of an attention's key bias is 0 but for rounding
        torch.testing.assert_close(gradient, expected[name], rtol=DOUBLE, atol=1e-12 * largest, msg=name)


def test_a_training_step_of_rt_detr() -> None:
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic"
    )
    backbone.out_features = ["stage2", "stage3", "stage4"]
    small = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20, "num_labels": 7}
    widths = {"encoder_in_channels": [16, 16, 16], "decoder_in_channels": [32, 32, 32], "num_denoising": 0}
    config = RTDetrConfig(backbone_config=backbone, dropout=0.0, **small, **heads, **widths)
    model = RTDetrForObjectDetection(config).double().eval()  # no dropout, no batch statistics
    compare_steps(model)


def test_the_criterion_of_grounding_dino() -> None:
    """Its classification loss, on what its model would give: text tokens for classes, some of them masked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    outputs = {
        "logits": logits,
        "text_mask": (torch.arange(8) < 6).expand(2, 5, 8),
        "label_maps": [torch.eye(3, 8), torch.eye(3, 8).roll(1, 1)],
    }
    targets = [{"class_labels": torch.tensor([0, 2])}, {"class_labels": torch.tensor([1])}]
    indices = [(torch.tensor([1, 4]), torch.tensor([0, 1])), (torch.tensor([3]), torch.tensor([0]))]
    criterion = GroundingDinoImageLoss(matcher=None, focal_alpha=0.25, losses=["labels"])
    found = []
    for context in (nullcontext(), compat.fused_functions()):
        with context:
            loss = criterion.loss_labels(outputs, targets, indices, 3)["loss_ce"]
        found.append((loss, torch.autograd.grad(loss, logits)[0]))
    # It makes float32 targets, so that its own cross entropy of float64 logits is rounded to float32, and its gradient too.
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-16)
