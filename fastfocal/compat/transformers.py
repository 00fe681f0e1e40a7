"""The sigmoid focal loss of Hugging Face transformers' detectors and mask losses, computed by fastfocal.

    from fastfocal.compat.transformers import fused_functions
    with fused_functions():
        loss = model(pixel_values, labels=labels).loss

Deformable DETR, Grounding DINO, and the focal mask losses of DETR, LW-DETR, RT-DETR and MaskFormer (5.23) call a function
`sigmoid_focal_loss` of their module; inside the context these names mean the fused one. RT-DETR, its second version and D-FINE
classify with the varifocal loss of their criterion, `RTDetrLoss.loss_labels_vfl`; inside the context that is a fused one too.

Equivalent to transformers.loss.loss_for_object_detection.sigmoid_focal_loss (mean over the second dimension, sum over the
others), to that of loss_grounding_dino (sum over all), both over the number of boxes, and to RTDetrLoss.loss_labels_vfl. Losses
have the dtype that theirs have: what logits and targets promote to, but float32 for 16 bits under autocast. They are computed
in float32 or float64 and rounded once; in float16, without autocast, a loss above 65504 is infinite, as theirs is.

Inside the context, an object whose label is no class is a ValueError that names image and object, in the classification losses
of DeformableDetrImageLoss (Deformable DETR and those built on it), RTDetrLoss and GroundingDinoImageLoss. In transformers K is
background to these losses (an IndexError to their matchers), and -1 the last class or an error of the scatter.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastfocal
from fastfocal.compat.conventions import check_classes
from fastfocal.sigmoid import entropy_dtype


def mean_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """transformers.loss.loss_for_object_detection.sigmoid_focal_loss.

    Args:
        inputs: logits of at least two dimensions.
        targets: of the same shape, values in [0, 1].
        num_boxes: what the sum is divided by, besides the length of the second dimension.
        alpha: weight of positives; a negative number: no weights.
        gamma: exponent of the modulating factor.
    """
    loss = _focal_loss(inputs, targets, alpha, gamma) / inputs.shape[1]
    return _over(loss, num_boxes, entropy_dtype(inputs, targets))


def sum_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """transformers.loss.loss_grounding_dino.sigmoid_focal_loss: as above, without the mean; any number of dimensions."""
    return _over(_focal_loss(inputs, targets, alpha, gamma), num_boxes, entropy_dtype(inputs, targets))


def _focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """The sum, in float32 or float64."""
    if torch.promote_types(inputs.dtype, targets.dtype) == torch.float64:
        inputs = inputs.double()
    if not targets.is_floating_point():
        targets = targets.to(inputs.dtype)
    loss = fastfocal.focal_loss(
        inputs.reshape(-1, 1),
        targets.reshape(-1, 1),
        alpha=None if alpha < 0 else alpha,
        gamma=gamma,
        normalizer=None,
    )
    assert isinstance(loss, Tensor)
    return loss


def _over(loss: Tensor, divisor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Their quotient, in the dtype of a division of a 0-d tensor of `dtype`: rounded once."""
    if isinstance(divisor, Tensor) and divisor.is_floating_point():
        dtype = divisor.dtype if divisor.dim() > 0 else torch.promote_types(dtype, divisor.dtype)
    return (loss / divisor).to(dtype)


def varifocal_loss(
    criterion: Any,
    outputs: dict[str, Tensor],
    targets: list[dict[str, Tensor]],
    indices: list[tuple[Tensor, Tensor]],
    num_boxes: float | Tensor,
    log: bool = True,
) -> dict[str, Tensor]:
    """transformers.loss.loss_rt_detr.RTDetrLoss.loss_labels_vfl, a method of the criterion.

    Varifocal loss (Zhang et al. 2020, arXiv:2008.13367, equation 2) with its weights taken from detached logits: a negative
    costs `alpha p^gamma` times its cross entropy, a query matched with overlap q costs `q` times its cross entropy with the
    target q.

    Args:
        criterion: the RTDetrLoss: its alpha and gamma.
        outputs: "logits" (N, queries, K), "pred_boxes" (N, queries, 4) as centre and size.
        targets: an image each: "class_labels" (T,), "boxes" (T, 4).
        indices: an image each: which queries are matched, and with which targets.
        num_boxes: what the sum is divided by.
        log: not used.

    Raises:
        KeyError: outputs without logits or pred_boxes.
        ValueError: an object's class is outside 0..K-1 (on CUDA: a device-side assertion).
    """
    host = importlib.import_module("transformers.loss.loss_rt_detr")
    logits, boxes = outputs["logits"], outputs["pred_boxes"]
    check_classes("class_labels", [target["class_labels"] for target in targets], logits.shape[-1])
    image = torch.cat([torch.full_like(queries, n) for n, (queries, _) in enumerate(indices)])
    query = torch.cat([queries for queries, _ in indices])
    classes = torch.cat([target["class_labels"][i] for target, (_, i) in zip(targets, indices, strict=True)])
    matched = torch.cat([target["boxes"][i] for target, (_, i) in zip(targets, indices, strict=True)])
    corners = [host.center_to_corners_format(b) for b in (boxes[image, query].detach(), matched)]
    overlap = torch.diag(host.box_iou(*corners)[0]).to(logits.dtype)

    labels = torch.full(logits.shape[:2], logits.shape[2], dtype=torch.int64, device=logits.device)
    labels[image, query] = classes
    # alpha 0 weighs a positive with 0 and a negative with 1.
    negatives = fastfocal.focal_loss(
        logits,
        labels,
        alpha=0.0,
        gamma=criterion.gamma,
        detach_modulating_factor=True,
        normalizer=None,
        loss_weight=criterion.alpha,
    )
    assert isinstance(negatives, Tensor)
    x, q = logits[image, query, classes].to(negatives.dtype), overlap.to(negatives.dtype)
    entropy = nn.functional.binary_cross_entropy_with_logits(x, q, reduction="none")
    loss = negatives + (q * entropy).sum()
    return {"loss_vfl": _over(loss, num_boxes, entropy_dtype(logits, logits))}


_SWAPS = {
    "transformers.loss.loss_for_object_detection": mean_focal_loss,
    "transformers.loss.loss_deformable_detr": mean_focal_loss,
    "transformers.loss.loss_lw_detr": mean_focal_loss,
    "transformers.loss.loss_rt_detr": mean_focal_loss,
    "transformers.loss.loss_grounding_dino": sum_focal_loss,
    "transformers.models.maskformer.modeling_maskformer": mean_focal_loss,
}


def _checked_labels(stock: Callable[..., Any]) -> Callable[..., Any]:
    """DeformableDetrImageLoss.loss_labels with a check of the classes in front."""

    @functools.wraps(stock)
    def loss_labels(
        criterion: Any, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *rest: Any, **options: Any
    ) -> Any:
        check_classes("class_labels", [target["class_labels"] for target in targets], criterion.num_classes)
        return stock(criterion, outputs, targets, *rest, **options)

    return loss_labels


def _checked_phrases(stock: Callable[..., Any]) -> Callable[..., Any]:
    """GroundingDinoImageLoss.loss_labels with the same: an image's classes are the rows of its label map."""

    @functools.wraps(stock)
    def loss_labels(
        criterion: Any, outputs: dict[str, Any], targets: list[dict[str, Tensor]], *rest: Any, **options: Any
    ) -> Any:
        for image, (target, label_map) in enumerate(zip(targets, outputs["label_maps"], strict=True)):
            check_classes("class_labels", [target["class_labels"]], len(label_map), first_image=image)
        return stock(criterion, outputs, targets, *rest, **options)

    return loss_labels


@contextmanager
def fused_functions() -> Iterator[None]:
    """Swaps `sigmoid_focal_loss` in the modules above and RTDetrLoss.loss_labels_vfl, for as long as the context lasts.

    It holds for every model of the process, and has the labels checked in the criteria of Deformable DETR and Grounding DINO.
    """
    swaps: list[tuple[Any, str, Any]] = [
        (importlib.import_module(name), "sigmoid_focal_loss", function) for name, function in _SWAPS.items()
    ]
    criterion = importlib.import_module("transformers.loss.loss_rt_detr").RTDetrLoss
    swaps.append((criterion, "loss_labels_vfl", varifocal_loss))
    for module, name, checked in (
        ("loss_deformable_detr", "DeformableDetrImageLoss", _checked_labels),
        ("loss_grounding_dino", "GroundingDinoImageLoss", _checked_phrases),
    ):
        criterion = getattr(importlib.import_module(f"transformers.loss.{module}"), name)
        swaps.append((criterion, "loss_labels", checked(criterion.loss_labels)))
    stock = [getattr(owner, name) for owner, name, _ in swaps]
    try:
        for owner, name, function in swaps:
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name, _), function in zip(swaps, stock, strict=True):
            setattr(owner, name, function)
