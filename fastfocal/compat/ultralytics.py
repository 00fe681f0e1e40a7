"""The focal and varifocal loss of ultralytics' RT-DETR criterion, computed by fastfocal.

    from fastfocal.compat.ultralytics import accelerate
    criterion = accelerate(ultralytics.models.utils.loss.RTDETRDetectionLoss(nc=80, use_vfl=True))

Written from the formulas of the papers and from what the package computes (8.4); its code is AGPL and none of it is here.
`restore` undoes it.

Focal: `FL(p_t)` with alpha and gamma, mean over the second dimension, sum over the others. Varifocal (Zhang et al. 2020,
arXiv:2008.13367, equation 2): a negative costs `alpha p^gamma` times its cross entropy, which is a focal loss; a positive with
score q costs `q` times its cross entropy with the target q.

An object of a criterion's batch whose class is outside 0..nc-1 is a ValueError that names image and object (ultralytics: an
index out of range in its matcher, or background for nc where the matches are given).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from ultralytics.models.utils import loss as host_criterion
from ultralytics.utils import loss as host

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.conventions import check_classes, require
from fastfocal.sigmoid import entropy_dtype

Criterion = TypeVar("Criterion", bound=nn.Module)


class FastFocalLoss(host.FocalLoss):  # type: ignore[misc]
    """ultralytics.utils.loss.FocalLoss: the same constructor, arguments and result."""

    alpha: Tensor

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            pred: logits, at least two dimensions.
            label: targets in [0, 1], shaped alike.

        Returns:
            A 0-d tensor of the labels' dtype (ultralytics computes in place in what torch's cross entropy returns), but float32
            for 16 bits under autocast; computed in float32 or float64 and rounded once.
        """
        if self.alpha.device.type != "cpu":  # ultralytics has moved it: a wait for the device, once
            self.alpha = self.alpha.cpu()
        targets = label if label.is_floating_point() else label.to(pred.dtype)
        dtype = entropy_dtype(targets, targets)
        alpha: float | Tensor | None = None
        logits, soft = pred.reshape(-1, 1), targets.reshape(-1, 1)
        if self.alpha.numel() == 1:
            alpha = float(self.alpha) if self.alpha > 0 else None
        elif (self.alpha > 0).any():
            alpha = self.alpha.expand(pred.shape[-1])
            logits, soft = (t.reshape(-1, pred.shape[-1]) for t in (pred, targets))
        loss = fastfocal.focal_loss(logits, soft, alpha=alpha, gamma=self.gamma, normalizer=None)
        assert isinstance(loss, Tensor)
        return (loss / pred.shape[1]).to(dtype)


class FastVarifocalLoss(host.VarifocalLoss):  # type: ignore[misc]
    """ultralytics.utils.loss.VarifocalLoss: the same constructor, arguments and result, for one-hot labels."""

    def forward(self, pred_score: Tensor, gt_score: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            pred_score: logits (N, queries, K).
            gt_score: the score q of a positive, 0 elsewhere, shaped alike.
            label: 1 at the class of a positive, 0 elsewhere: one class a query at most.

        Returns:
            A 0-d float32 tensor (float64 for float64 logits), under autocast and without.

        Raises:
            ValueError: a query has more than one class (on CUDA: a device-side assertion).
        """
        require((label.sum(dim=-1) <= 1).all(), "label: expected one class a query at most, got several for one")
        has, k = label.max(dim=-1)
        labels = torch.where(has > 0, k, pred_score.shape[-1])
        # alpha 0 weighs a positive with 0 and a negative with 1.
        negatives = fastfocal.focal_loss(
            pred_score.reshape(-1, pred_score.shape[-1]),
            labels.reshape(-1),
            alpha=0.0,
            gamma=self.gamma,
            normalizer=float(max(1, pred_score.shape[1])),
            loss_weight=self.alpha,
        )
        assert isinstance(negatives, Tensor)
        x, q = (t.gather(-1, k.unsqueeze(-1)).squeeze(-1).to(negatives.dtype) for t in (pred_score, gt_score))
        entropy = nn.functional.binary_cross_entropy_with_logits(x, q, reduction="none")
        return negatives + (entropy * q * has).sum() / pred_score.shape[1]


def _check_batch(criterion: host_criterion.DETRLoss, batch: dict[str, Any]) -> None:
    """The classes of a batch's objects, in the order of its images."""
    check_classes('batch["cls"]', batch["cls"].split(batch["gt_groups"]), criterion.nc)


class CheckedDETRLoss(host_criterion.DETRLoss):  # type: ignore[misc]
    """ultralytics' DETRLoss; `forward` checks the objects' classes first."""

    def forward(
        self, pred_bboxes: Tensor, pred_scores: Tensor, batch: dict[str, Any], *rest: Any, **options: Any
    ) -> Any:
        _check_batch(self, batch)
        return super().forward(pred_bboxes, pred_scores, batch, *rest, **options)


class CheckedRTDETRDetectionLoss(host_criterion.RTDETRDetectionLoss):  # type: ignore[misc]
    """ultralytics' RTDETRDetectionLoss; `forward` checks the objects' classes first."""

    def forward(self, preds: tuple[Tensor, Tensor], batch: dict[str, Any], *rest: Any, **options: Any) -> Any:
        _check_batch(self, batch)
        return super().forward(preds, batch, *rest, **options)


_FAST: patching.Swaps = {host.FocalLoss: FastFocalLoss, host.VarifocalLoss: FastVarifocalLoss}
_AROUND: patching.Swaps = {
    host_criterion.DETRLoss: CheckedDETRLoss,
    host_criterion.RTDETRDetectionLoss: CheckedRTDETRDetectionLoss,
}


def accelerate(criterion: Criterion) -> Criterion:
    """Makes fastfocal compute the focal and varifocal losses inside a criterion, such as RTDETRDetectionLoss.

    Returns:
        The same criterion; it and its losses have changed their class and nothing else.

    Raises:
        ValueError: there is neither a FocalLoss nor a VarifocalLoss of ultralytics in it, or one that was subclassed.
    """
    return patching.accelerate(criterion, _FAST, "criterion", "ultralytics' FocalLoss or VarifocalLoss", around=_AROUND)


def restore(criterion: Criterion) -> Criterion:
    """Undoes `accelerate`."""
    return patching.restore(criterion, {**_FAST, **_AROUND})
