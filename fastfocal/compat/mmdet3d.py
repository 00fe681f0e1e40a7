"""CenterPoint's head in mmdet3d with its heatmaps' loss computed by fastfocal, all tasks in one call.

    from fastfocal.compat.mmdet3d import accelerate
    model = accelerate(model)

mmdet3d takes the clipped sigmoid of each task's heatmap, in place, and some ten passes over it; here the logits of all tasks go
to one call, which reads them in place. Loss dict and state_dict stay as they are; the heatmaps in the predictions stay logits.
`restore` undoes it.

Equivalent to the heatmaps' part of mmdet3d.models.dense_heads.CenterHead.loss_by_feat (1.4.0) with mmdet's GaussianFocalLoss:
probabilities clipped to [1e-4, 1 - 1e-4], beyond which there is no gradient; each task's mean over its number of peaks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from mmdet.models.losses import GaussianFocalLoss
from mmdet3d.models.dense_heads import CenterHead
from torch import Tensor, nn

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.mmdet import EPSILON, weights_of_peaks

Model = TypeVar("Model", bound=nn.Module)
CLIP = 1e-4  # of mmdet3d's clip_sigmoid


class _Recorder(nn.Module):
    """Stands in for the head's loss_cls: keeps what it is called with, and costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, float]] = []

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float) -> Tensor:
        self.calls.append((target, avg_factor))
        return pred.new_zeros(())


class FastCenterHead(CenterHead):  # type: ignore[misc]
    """mmdet3d's CenterHead."""

    loss_cls: Any

    def loss_by_feat(self, preds_dicts: Any, *rest: Any, **options: Any) -> dict[str, Tensor]:
        """As the head's own: the losses of each task's heatmap and boxes."""
        _check(self)
        predictions = [task[0] for task in preds_dicts]
        logits = [prediction["heatmap"] for prediction in predictions]
        stock, recorder = self.loss_cls, _Recorder()
        self.loss_cls = recorder
        try:
            for prediction, x in zip(predictions, logits, strict=True):
                prediction["heatmap"] = x.new_zeros(1)
            losses: dict[str, Tensor] = super().loss_by_feat(preds_dicts, *rest, **options)
        finally:
            self.loss_cls = stock
            for prediction, x in zip(predictions, logits, strict=True):
                prediction["heatmap"] = x
        found = fastfocal.gaussian_focal_loss(
            logits,  # (N, classes, H, W): tasks have classes of their own, which are the anchors of one class to this call
            [heatmap.to(x.dtype) for x, (heatmap, _) in zip(logits, recorder.calls, strict=True)],
            num_classes=1,
            alpha=stock.alpha,
            gamma=stock.gamma,
            eps=CLIP,
            class_weight=weights_of_peaks(stock, 1),
            normalizer=None,
            reduction="level",
            level_weights=[stock.loss_weight / (average + EPSILON) for _, average in recorder.calls],
        )
        assert isinstance(found, Tensor)
        for task, (loss, (heatmap, _)) in enumerate(zip(found.unbind(), recorder.calls, strict=True)):
            losses[f"task{task}.loss_heatmap"] = loss.to(torch.promote_types(logits[task].dtype, heatmap.dtype))
        return losses


def _check(head: Any) -> None:
    loss = head.loss_cls
    if type(loss) is not GaussianFocalLoss or loss.reduction != "mean":
        raise ValueError(
            f"{type(head).__name__}.loss_cls: expected mmdet's GaussianFocalLoss with reduction 'mean', got {loss!r}"
        )


_FAST: patching.Swaps = {CenterHead: FastCenterHead}


def accelerate(model: Model) -> Model:
    """Makes fastfocal compute the heatmaps' loss of every CenterHead that `model` is or contains.

    Returns:
        The same model; its heads have changed their class and nothing else.

    Raises:
        ValueError: there is none in it, one that was subclassed, or its loss is another one.
    """
    return patching.accelerate(model, _FAST, "model", "mmdet3d's CenterHead", _check)


def restore(model: Model) -> Model:
    """Undoes `accelerate`."""
    return patching.restore(model, _FAST)
