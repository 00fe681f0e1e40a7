"""The sigmoid focal loss of Hugging Face transformers' detectors and mask losses, computed by fastfocal.

    from fastfocal.compat.transformers import fused_functions
    with fused_functions():
        loss = model(pixel_values, labels=labels).loss

Deformable DETR, Grounding DINO, and the focal mask losses of DETR, LW-DETR, RT-DETR and MaskFormer (5.23) call a function
`sigmoid_focal_loss` of their module; inside the context these names mean the fused one. RT-DETR, its second version and D-FINE
classify with the varifocal loss of their criterion, `RTDetrLoss.loss_labels_vfl`; inside the context that is a fused one too.

Equivalent to transformers.loss.loss_for_object_detection.sigmoid_focal_loss (mean over the second dimension, sum over the
others), to that of loss_grounding_dino (sum over all), both over the number of boxes, and to RTDetrLoss.loss_labels_vfl.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastfocal


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
    return sum_focal_loss(inputs, targets, num_boxes, alpha, gamma) / inputs.shape[1]


def sum_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """transformers.loss.loss_grounding_dino.sigmoid_focal_loss: as above, without the mean; any number of dimensions."""
    loss = fastfocal.focal_loss(
        inputs.reshape(-1, 1),
        targets.reshape(-1, 1).to(inputs.dtype),
        alpha=None if alpha < 0 else alpha,
        gamma=gamma,
        normalizer=None,
    )
    assert isinstance(loss, Tensor)
    return loss.to(inputs.dtype) / num_boxes


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
    """
    host = importlib.import_module("transformers.loss.loss_rt_detr")
    logits, boxes = outputs["logits"], outputs["pred_boxes"]
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
        logits, labels, alpha=0.0, gamma=criterion.gamma, detach_modulating_factor=True, normalizer=None
    )
    assert isinstance(negatives, Tensor)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits[image, query, classes], overlap, reduction="none")
    loss = criterion.alpha * negatives.to(logits.dtype) + (overlap * entropy).sum()
    return {"loss_vfl": loss / num_boxes}


_SWAPS = {
    "transformers.loss.loss_for_object_detection": mean_focal_loss,
    "transformers.loss.loss_deformable_detr": mean_focal_loss,
    "transformers.loss.loss_lw_detr": mean_focal_loss,
    "transformers.loss.loss_rt_detr": mean_focal_loss,
    "transformers.loss.loss_grounding_dino": sum_focal_loss,
    "transformers.models.maskformer.modeling_maskformer": mean_focal_loss,
}


@contextmanager
def fused_functions() -> Iterator[None]:
    """Swaps `sigmoid_focal_loss` in the modules above and RTDetrLoss.loss_labels_vfl, for every model of the process, for as
    long as the context lasts."""
    swaps: list[tuple[Any, str, Any]] = [
        (importlib.import_module(name), "sigmoid_focal_loss", function) for name, function in _SWAPS.items()
    ]
    criterion = importlib.import_module("transformers.loss.loss_rt_detr").RTDetrLoss
    swaps.append((criterion, "loss_labels_vfl", varifocal_loss))
    stock = [getattr(owner, name) for owner, name, _ in swaps]
    try:
        for owner, name, function in swaps:
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name, _), function in zip(swaps, stock, strict=True):
            setattr(owner, name, function)
