"""The sigmoid focal loss of Hugging Face transformers' detectors and mask losses, computed by fastfocal.

    from fastfocal.compat.transformers import fused_functions
    with fused_functions():
        loss = model(pixel_values, labels=labels).loss

Deformable DETR, Grounding DINO, and the focal mask losses of DETR, LW-DETR, RT-DETR and MaskFormer (5.23) call a function
`sigmoid_focal_loss` of their module; inside the context these names mean the fused one. RT-DETR's own classification loss is a
varifocal loss, which has another gradient, and is left alone.

Equivalent to transformers.loss.loss_for_object_detection.sigmoid_focal_loss (mean over the second dimension, sum over the
others), and to that of loss_grounding_dino (sum over all), both over the number of boxes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

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
    """Swaps `sigmoid_focal_loss` in the modules above, for every model of the process, for as long as the context lasts."""
    modules = {importlib.import_module(name): function for name, function in _SWAPS.items()}
    stock = {module: module.sigmoid_focal_loss for module in modules}
    try:
        for module, function in modules.items():
            module.sigmoid_focal_loss = function  # type: ignore[attr-defined]
        yield
    finally:
        for module, function in stock.items():
            module.sigmoid_focal_loss = function  # type: ignore[attr-defined]
