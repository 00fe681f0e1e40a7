"""fastfocal.compat.transformers against the real transformers: its functions and criteria, and training steps of its models."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from graph import fused_nodes
from precision import Precision, check, every_precision, large_logits
from torch import Tensor, nn

pytest.importorskip("transformers", exc_type=Exception)
pytest.importorskip("scipy")  # its matchers need it

from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    Deimv2Config,
    Deimv2ForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)
from transformers.image_transforms import center_to_corners_format as corners
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.loss.loss_for_object_detection import box_iou
from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from fastfocal import reference
from fastfocal.compat import transformers as compat

# float64: both formulas agree to a few roundings; theirs loses two digits of 1 - p_t where p_t is nearly 1.
DOUBLE = 1e-10


@pytest.mark.parametrize("alpha", [0.25, -1])
@pytest.mark.parametrize("module", compat._FUNCTIONS)
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
@pytest.mark.parametrize("module", compat._FUNCTIONS)
@every_precision
def test_precision_of_the_functions(precision: Precision, module: str, boxes: str, targets: str) -> None:
    """Their own dtype depends on the targets' and on how the number of boxes is given."""
    generator = torch.Generator().manual_seed(0)
    shape = (1200, 2, 11)
    x = large_logits(*shape, generator=generator)
    y = (torch.rand(shape, generator=generator) < 0.1).double()
    stock = importlib.import_module(module).sigmoid_focal_loss
    ours = compat._FUNCTIONS[module]

    def of(function: Any) -> Any:
        return lambda x: function(x, y.to(torch.float32 if targets == "float32" else x.dtype), BOXES[boxes])

    loss = check(
        of(ours), of(stock), lambda x: exact_function(module, 3)(x, y).reshape(BOXES_SHAPES[boxes]), x, precision
    )
    assert (loss.isinf() == (loss.dtype == torch.float16)).all() and (loss > 65504).all()


BOXES_SHAPES = {name: tuple(torch.as_tensor(value).shape) for name, value in BOXES.items()}


def scored_problem() -> tuple[Tensor, Tensor, list[dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
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


def exact_of_lw_detr(
    x: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], indices: list[tuple[Tensor, Tensor]], number: Any
) -> Tensor:
    """Its definition, without the logarithm of 1 - p, which float64 loses from 37."""
    score = torch.zeros_like(x)
    for image, (queries, found) in enumerate(indices):
        chosen = image, queries, targets[image]["class_labels"][found]
        overlap = torch.diag(box_iou(*(corners(b) for b in (boxes[image, queries], targets[image]["boxes"][found])))[0])
        score[chosen] = (x[chosen].sigmoid() ** 0.25 * overlap.double() ** 0.75).clamp(min=0.01).detach()
    negative = x.sigmoid() ** 2 * nn.functional.softplus(x, threshold=1000)
    positive = nn.functional.binary_cross_entropy_with_logits(x, score, reduction="none")
    return torch.where(score > 0, positive, negative).sum() / number


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("host", ["RT-DETR", "D-FINE", "DEIMv2", "LW-DETR"])
@every_precision
def test_precision_of_the_losses_with_scores(precision: Precision, host: str, boxes: str) -> None:
    logits, pred_boxes, targets, indices = scored_problem()
    # D-FINE and DEIMv2 take the overlaps' gradient off, or not; all four have float32 boxes here.
    criterion = {
        "RT-DETR": lambda: rt_detr(focal_loss_alpha=0.75),
        "D-FINE": d_fine,
        "DEIMv2": lambda: deimv2(mal_alpha=0.75),
        "LW-DETR": lw_detr,
    }[host]()
    _, method, key = CRITERIA[host]

    def of(context: Callable[[], Any], num_boxes: Any) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            with context():
                outputs = {"logits": x, "pred_boxes": pred_boxes}
                found: Tensor = getattr(criterion, method)(outputs, targets, indices, num_boxes)[key]
                return found

        return loss

    # Division by less than 1, so that the loss itself is more than float16 has.
    number: Any = {
        "number": 0.5,
        "0-d": torch.tensor(0.5),
        "one element": torch.tensor([0.5]),
        "integer": torch.tensor(1),
    }[boxes]
    divisor = torch.as_tensor(number).double()
    exact = of(nullcontext, divisor)
    if host == "LW-DETR":
        exact = lambda x: exact_of_lw_detr(x, pred_boxes, targets, indices, divisor)  # noqa: E731
    loss = check(of(compat.fused_functions, number), of(nullcontext, number), exact, logits, precision)
    assert (loss.isinf() == (loss.dtype == torch.float16)).all() and (loss > 65504).all()


# --- labels that are no class -----------------------------------------------------------------------------------------


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
    logits, boxes, targets, indices = scored_problem()
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


# --- the classification loss of each criterion -----------------------------------------------------------------------

CLASSES = 7


def rt_detr(kind: type[nn.Module] = RTDetrLoss, config: Any = RTDetrConfig, **numbers: Any) -> Any:
    return kind(config(num_labels=CLASSES, **numbers))


def deimv2(**numbers: Any) -> Any:
    criterion = rt_detr(Deimv2Loss, Deimv2Config, focal_loss_gamma=1.5, weight_loss_mal=2.5, **numbers)
    criterion.losses = ["mal", "boxes"]  # its third one fails in float64
    return criterion


def d_fine() -> Any:
    criterion = rt_detr(DFineLoss, DFineConfig, weight_loss_vfl=0.5)
    criterion.losses = ["vfl", "boxes"]
    return criterion


def lw_detr() -> Any:
    return LwDetrImageLoss(LwDetrHungarianMatcher(), CLASSES, 0.25, ["labels", "boxes", "cardinality"], group_detr=3)


def deformable_detr() -> Any:
    return DeformableDetrImageLoss(DeformableDetrHungarianMatcher(), CLASSES, 0.3, ["labels", "boxes"])


def grounding_dino() -> Any:
    return GroundingDinoImageLoss(GroundingDinoHungarianMatcher(), 0.25, ["labels", "boxes", "cardinality"])


# The criterion, the method of its classification loss, and the loss's key.
CRITERIA: dict[str, tuple[Callable[[], Any], str, str]] = {
    "RT-DETR": (rt_detr, "loss_labels_vfl", "loss_vfl"),
    "RT-DETR, gamma 1.5": (lambda: rt_detr(focal_loss_gamma=1.5), "loss_labels_vfl", "loss_vfl"),
    "D-FINE": (d_fine, "loss_labels_vfl", "loss_vfl"),
    "DEIMv2": (deimv2, "loss_labels_mal", "loss_mal"),
    "DEIMv2, alpha": (lambda: deimv2(mal_alpha=0.3), "loss_labels_mal", "loss_mal"),
    "DEIMv2, each layer's own matches": (
        lambda: deimv2(use_dense_one_to_one=False),
        "loss_labels_mal",
        "loss_mal",
    ),
    "LW-DETR": (lw_detr, "loss_labels", "loss_ce"),
    "Deformable DETR": (deformable_detr, "loss_labels", "loss_ce"),
    "Grounding DINO": (grounding_dino, "loss_labels", "loss_ce"),
}
every_criterion = pytest.mark.parametrize("host", CRITERIA)
QUERIES = 12  # three groups of LW-DETR


def predictions(queries: int, generator: torch.Generator) -> dict[str, Any]:
    """Of one decoder layer. What Grounding DINO has beside them is there too."""
    logits = torch.randn(3, queries, CLASSES, generator=generator, dtype=torch.float64) - 1
    boxes = 0.2 + 0.3 * torch.rand(3, queries, 4, generator=generator, dtype=torch.float64)
    return {"logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}


def objects() -> list[dict[str, Tensor]]:
    """Three images, one without objects."""
    classes = [[2, 1, 2], [], [0]]
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "class_labels": torch.tensor(c, dtype=torch.int64),
            "boxes": 0.2 + 0.3 * torch.rand(len(c), 4, generator=generator, dtype=torch.float64),
        }
        for c in classes
    ]


def of_a_text(outputs: dict[str, Any]) -> dict[str, Any]:
    """With Grounding DINO's: three phrases of up to two tokens, and two tokens that are none. Their logits are -inf there."""
    maps = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]]).double()
    outputs = {**outputs, "label_maps": [maps] * 3}
    mask = (torch.arange(CLASSES) < 5).expand(3, 1, CLASSES)
    shared: dict[int, Tensor] = {}
    for layer in (outputs, *outputs.get("auxiliary_outputs", ())):
        queries = layer["logits"].shape[1]
        layer["text_mask"] = shared.setdefault(queries, mask.repeat(1, queries, 1))
        layer["label_maps"] = outputs["label_maps"]
    return outputs


def one_layer(host: str) -> dict[str, Any]:
    outputs = predictions(QUERIES, torch.Generator().manual_seed(0))
    return of_a_text(outputs) if host == "Grounding DINO" else outputs


def all_layers(host: str) -> dict[str, Any]:
    """Outputs of the last layer and of those before, the last of which, like an encoder's, has more queries."""
    generator = torch.Generator().manual_seed(0)
    outputs = predictions(QUERIES, generator)
    outputs["auxiliary_outputs"] = [predictions(QUERIES + more, generator) for more in (0, 0, 3)]
    if host == "LW-DETR":
        outputs["enc_outputs"] = predictions(QUERIES, generator)
    if host.startswith(("RT-DETR", "D-FINE", "DEIMv2")):
        outputs["dn_auxiliary_outputs"] = [predictions(8, generator) for _ in range(2)]
        positive = [torch.tensor([0, 1, 2, 4, 5, 6]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 4])]
        outputs["denoising_meta_values"] = {"dn_positive_idx": positive, "dn_num_group": 2}
    return of_a_text(outputs) if host == "Grounding DINO" else outputs


def leaves(outputs: dict[str, Any]) -> Iterator[Tensor]:
    layers = [outputs, outputs.get("enc_outputs", {})]
    layers += [*outputs.get("auxiliary_outputs", ()), *outputs.get("dn_auxiliary_outputs", ())]
    for layer in layers:
        yield from (layer[name] for name in ("logits", "pred_boxes") if name in layer)


@every_criterion
def test_the_loss_of_a_layer(host: str) -> None:
    """One match of disjoint boxes, whose overlap 0 makes a positive that costs nothing, or little; an image without objects."""
    make, method, key = CRITERIA[host]
    criterion, outputs, targets = make(), one_layer(host), objects()
    outputs["pred_boxes"].data[0, 4] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    nothing = torch.tensor([], dtype=torch.int64)
    indices = [
        (torch.tensor([8, 1, 4]), torch.tensor([0, 2, 1])),
        (nothing, nothing),
        (torch.tensor([3]), torch.tensor([0])),
    ]
    stock = getattr(type(criterion), method)
    theirs = getattr(criterion, method)(outputs, targets, indices, 4)
    with compat.fused_functions():
        ours = getattr(criterion, method)(outputs, targets, indices, 4)
        assert getattr(type(criterion), method) is not stock
    assert getattr(type(criterion), method) is stock and list(ours) == list(theirs) == [key]
    # Grounding DINO's targets are float32, so that its own cross entropy of float64 logits is rounded to float32.
    rtol = 2e-6 if host == "Grounding DINO" else DOUBLE
    torch.testing.assert_close(ours[key], theirs[key], rtol=rtol, atol=0)
    mine, expected = (torch.autograd.grad(loss[key], outputs["logits"])[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=rtol, atol=1e-15)
    assert mine[0, 8].abs().max() > 1e-3


@pytest.mark.parametrize("label", [CLASSES, -1, CLASSES + 1, -3])
@pytest.mark.parametrize("host", [name for name in CRITERIA if name != "Grounding DINO"])
def test_a_label_that_is_no_class(host: str, label: int) -> None:
    """K is background to most of the stock criteria and an index out of range to their matchers; -1 is the last class."""
    make, method, _ = CRITERIA[host]
    criterion, outputs, targets = make(), all_layers(host), objects()
    targets[0]["class_labels"][1] = label
    indices = [(torch.tensor([3]), torch.tensor([0]))] * 3
    message = rf"class_labels: image 0, object 1 has label {label}; expected one of the classes 0\.\.{CLASSES - 1} "
    with compat.fused_functions():
        with pytest.raises(ValueError, match=message):
            getattr(criterion, method)(outputs, targets, indices, 4)
        with pytest.raises(ValueError, match=message):
            criterion(outputs, targets)


@every_criterion
def test_all_layers(host: str) -> None:
    """Every loss of the criterion, and the gradients of all that it is given, with matchers and weights of its own."""
    make, _, key = CRITERIA[host]
    found = []
    for context in (nullcontext(), compat.fused_functions()):
        criterion, outputs = make(), all_layers(host)
        with context:
            losses = criterion(outputs, objects())
        gradients = torch.autograd.grad(
            sum(loss for loss in losses.values() if loss.requires_grad), list(leaves(outputs)), allow_unused=True
        )
        found.append((losses, gradients))
    (theirs, expected), (ours, gradients) = found
    assert list(ours) == list(theirs)
    assert len([name for name in ours if name.startswith(key)]) == len([x for x in leaves(all_layers(host))]) // 2
    rtol = 2e-6 if host == "Grounding DINO" else DOUBLE
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    for mine, their in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, their, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("host", [name for name in CRITERIA if name != "Grounding DINO"])
def test_one_node_for_all_layers(host: str) -> None:
    """Denoising queries, and the encoder's, included. Grounding DINO's layers share one text mask if they are of one size."""
    make, _, key = CRITERIA[host]
    with compat.fused_functions():
        losses = make()(all_layers(host), objects())
    of_classes = [loss for name, loss in losses.items() if name.startswith(key)]
    nodes = {id(node) for loss in of_classes for node in fused_nodes(loss)}
    assert len(of_classes) > 3 and len(nodes) == 1


def test_one_node_for_the_layers_of_a_text() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = predictions(QUERIES, generator)
    outputs["auxiliary_outputs"] = [predictions(QUERIES, generator) for _ in range(2)]
    with compat.fused_functions():
        losses = grounding_dino()(of_a_text(outputs), objects())
    of_classes = [loss for name, loss in losses.items() if name.startswith("loss_ce")]
    assert len(of_classes) == 3 and len({id(node) for loss in of_classes for node in fused_nodes(loss)}) == 1


def test_layers_that_do_not_fit_one_call() -> None:
    """A float32 layer among float64 ones."""
    found = []
    for context in (nullcontext(), compat.fused_functions()):
        outputs = all_layers("RT-DETR")
        layer = outputs["auxiliary_outputs"][1]
        layer["logits"] = layer["logits"].detach().float().requires_grad_()
        with context:
            losses = rt_detr()(outputs, objects())
        found.append((losses, torch.autograd.grad(losses["loss_vfl_aux_1"], layer["logits"])[0]))
    (theirs, expected), (ours, gradient) = found
    for name, loss in theirs.items():
        rtol = 1e-6 if loss.dtype == torch.float32 else DOUBLE  # sums of 252 terms in another order
        torch.testing.assert_close(ours[name], loss, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_a_criterion_of_ones_own() -> None:
    """What it does with its losses is not known: it gets each one when it asks."""

    class Own(RTDetrLoss):
        def get_loss(self, loss: str, *rest: Any, **options: Any) -> dict[str, Tensor]:
            return {name: value + 1 for name, value in super().get_loss(loss, *rest, **options).items()}

    found = []
    for context in (nullcontext(), compat.fused_functions()):
        with context:
            found.append(Own(RTDetrConfig(num_labels=CLASSES))(all_layers("RT-DETR"), objects()))
    for name, loss in found[0].items():
        torch.testing.assert_close(found[1][name], loss, rtol=DOUBLE, atol=0)


def test_a_loss_that_the_criterion_drops() -> None:
    criterion = rt_detr()
    del criterion.weight_dict["loss_vfl"]
    with compat.fused_functions():
        assert not any(name.startswith("loss_vfl") for name in criterion(all_layers("RT-DETR"), objects()))


def test_an_error_leaves_nothing_behind() -> None:
    criterion, broken = rt_detr(), all_layers("RT-DETR")
    del broken["auxiliary_outputs"][1]["pred_boxes"]
    with compat.fused_functions():
        with pytest.raises(KeyError):
            criterion(broken, objects())
        now = criterion.loss_labels_vfl(
            one_layer("RT-DETR"), objects()[:1], [(torch.tensor([1]), torch.tensor([0]))], 1
        )
    assert now["loss_vfl"].grad_fn is not None


def test_the_text_mask_of_one_query() -> None:
    outputs = one_layer("Grounding DINO")
    outputs["text_mask"][1, 2, 3] = False
    indices = [(torch.tensor([0]), torch.tensor([0]))] * 3
    targets = [{"class_labels": torch.tensor([0])}] * 3
    with (
        compat.fused_functions(),
        pytest.raises(ValueError, match="text_mask: expected the same tokens for all queries"),
    ):
        grounding_dino().loss_labels(outputs, targets, indices, 3)


@pytest.mark.parametrize("boxes", BOXES)
@every_precision
def test_precision_of_the_phrases(precision: Precision, boxes: str) -> None:
    """Grounding DINO's targets are float32, and so its losses of 16 bits. Its model gives -inf where the mask is False."""
    outputs = of_a_text(predictions(400, torch.Generator().manual_seed(0)))
    mask, number = outputs["text_mask"], BOXES[boxes]
    logits = large_logits(3, 400, CLASSES, generator=torch.Generator().manual_seed(2)).masked_fill(~mask, -math.inf)
    indices = [(torch.tensor([8, 1]), torch.tensor([0, 1])), (torch.tensor([5]), torch.tensor([0]))] * 2
    criterion, targets = grounding_dino(), [{"class_labels": torch.tensor([1, 2])}] * 3
    tokens = criterion._get_target_classes_one_hot({**outputs, "logits": logits}, targets, indices[:3]).double()

    def of(context: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            with context():
                found: Tensor = criterion.loss_labels({**outputs, "logits": x}, targets, indices[:3], number)["loss_ce"]
                return found

        return loss

    def exact(x: Tensor) -> Tensor:
        return reference.sigmoid_focal_loss(x[mask], tokens[mask], reduction="sum") / torch.as_tensor(number).double()

    check(of(compat.fused_functions), of(nullcontext), exact, logits, precision)


# --- LW-DETR's log(1 - p) ---------------------------------------------------------------------------------------------

# Where the sigmoid rounds to 1: half a unit in the last place below 1 (of 1 + exp(-x), in float32).
CERTAIN = [(torch.bfloat16, 6.5), (torch.float16, 9.0), (torch.float32, 17.0)]


def certain_layer(dtype: torch.dtype, logit: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Any]:
    """One logit is large, of a query that is matched with nothing."""
    logits = torch.full((1, 4, CLASSES), -2.0, dtype=dtype)
    logits[0, 2, 5] = logit
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    outputs = {"logits": logits.requires_grad_(), "pred_boxes": boxes.expand(1, 4, 4).to(dtype)}
    return outputs, [{"class_labels": torch.tensor([1]), "boxes": boxes}], [(torch.tensor([0]), torch.tensor([0]))]


@pytest.mark.parametrize("dtype, logit", CERTAIN, ids=str)
def test_a_certain_negative_of_lw_detr(dtype: torch.dtype, logit: float) -> None:
    """Theirs is infinite, and its gradient NaN; ours is their formula in float64, rounded once."""
    outputs, targets, indices = certain_layer(dtype, logit)
    stock = lw_detr().loss_labels(outputs, targets, indices, 1.0)["loss_ce"]
    assert stock.isinf() and torch.autograd.grad(stock, outputs["logits"])[0].isnan().any()
    with compat.fused_functions():
        ours = lw_detr().loss_labels(outputs, targets, indices, 1.0)["loss_ce"]
    (gradient,) = torch.autograd.grad(ours, outputs["logits"])
    exact = {name: value.detach().double() for name, value in outputs.items()}
    exact["logits"].requires_grad_()
    true = lw_detr().loss_labels(exact, targets, indices, 1.0)["loss_ce"]
    (slope,) = torch.autograd.grad(true, exact["logits"])
    # 16 bits: rounded once; float32: what its kernels promise.
    rtol = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 2e-6
    torch.testing.assert_close(ours.double(), true, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=rtol, atol=torch.finfo(dtype).tiny)
    assert gradient[0, 2, 5] > 0.9


@pytest.mark.parametrize("dtype, logit", CERTAIN, ids=str)
def test_just_below_it(dtype: torch.dtype, logit: float) -> None:
    """So that the test above cannot pass for another reason."""
    outputs, targets, indices = certain_layer(dtype, logit - 1.5)
    stock = lw_detr().loss_labels(outputs, targets, indices, 1.0)["loss_ce"]
    assert stock.isfinite() and torch.autograd.grad(stock, outputs["logits"])[0].isfinite().all()


def test_an_impossible_negative_of_lw_detr() -> None:
    """In float16 their p is 0 from -17.4, and 0 * log(0) is NaN."""
    outputs, targets, indices = certain_layer(torch.float16, -20.0)
    assert lw_detr().loss_labels(outputs, targets, indices, 1.0)["loss_ce"].isnan()
    with compat.fused_functions():
        assert lw_detr().loss_labels(outputs, targets, indices, 1.0)["loss_ce"].isfinite()


# --- models -----------------------------------------------------------------------------------------------------------


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


def compare_steps(model: nn.Module, size: tuple[int, int] = (64, 96), rtol: float = DOUBLE) -> None:
    """Loss and every parameter's gradient, stock and fused; the second image has no object."""
    dtype = next(model.parameters()).dtype
    labels = [
        {
            "class_labels": torch.tensor([2, 6]),
            "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.3, 0.6]]).to(dtype),
        },
        {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4, dtype=dtype)},
    ]
    inputs = {"pixel_values": torch.rand(2, 3, *size, dtype=dtype), "labels": labels}
    found = []
    for context in (nullcontext(), compat.fused_functions()):
        torch.manual_seed(1)  # denoising queries are noisy
        with context:
            found.append(step(model, **inputs))
    (theirs, expected), (ours, gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    assert list(gradients) == list(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients.items():  # that of an attention's key bias is 0 but for rounding
        torch.testing.assert_close(gradient, expected[name], rtol=10 * rtol, atol=1e-2 * rtol * largest, msg=name)


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


def test_a_training_step_of_lw_detr() -> None:
    """In training, so that its queries have their groups; it has no dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    backbone = LwDetrViTConfig(
        pretrain_image_size=64, num_windows=4, window_block_indices=[0], out_indices=[1, 2], **sizes
    )
    small = {"projector_scale_factors": [1.0], "c2f_num_blocks": 1, "d_model": 32, "decoder_ffn_dim": 32}
    heads = {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4, "num_queries": 8, "group_detr": 3}
    config = LwDetrConfig(backbone_config=backbone, decoder_layers=2, num_labels=CLASSES, **small, **heads)
    compare_steps(LwDetrForObjectDetection(config).double().train(), (64, 64))


@pytest.mark.parametrize(
    "kind, config", [(Deimv2ForObjectDetection, Deimv2Config), (DFineForObjectDetection, DFineConfig)]
)
def test_a_training_step_with_denoising(kind: Any, config: Any) -> None:
    """In training, so that there are denoising queries; in float32, as their losses of corners fail in float64."""
    torch.manual_seed(0)
    stages = {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8] * 4,
        "stage_out_channels": [16] * 4,
        "stage_num_blocks": [1] * 4,
        "stage_numb_of_layers": [1] * 4,
    }
    backbone = HGNetV2Config(out_indices=[2, 3, 4], hidden_sizes=[16] * 4, depths=[1] * 4, embedding_size=8, **stages)
    small = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20, "num_labels": CLASSES}
    widths = {
        "encoder_in_channels": [16] * 3,
        "decoder_in_channels": [32] * 3,
        "num_denoising": 6,
        "lqe_hidden_dim": 16,
    }
    model = kind(config(backbone_config=backbone, **small, **heads, **widths)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # a batch of 2 by 2 cells has next to no variance
    for weights in model.parameters():
        if weights.dim() > 1:
            nn.init.normal_(
                weights, std=weights[0].numel() ** -0.5
            )  # nor have so few channels, as they are initialised
    compare_steps(model, (64, 64), rtol=1e-5)
