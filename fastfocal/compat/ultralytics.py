"""The focal and varifocal loss of ultralytics' RT-DETR criterion, computed by fastfocal.

    from fastfocal.compat.ultralytics import accelerate
    criterion = accelerate(ultralytics.models.utils.loss.RTDETRDetectionLoss(nc=80, use_vfl=True))

Written from the formulas of the papers and from what the package computes (8.4); its code is AGPL and none of it is here.
`restore` undoes it.

Focal: `FL(p_t)` with alpha and gamma, mean over the second dimension, sum over the others. Varifocal (Zhang et al. 2020,
arXiv:2008.13367, equation 2): a negative costs `alpha p^gamma` times its cross entropy, which is a focal loss; a positive with
score q costs `q` times its cross entropy with the target q.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from ultralytics.utils import loss as host

import fastfocal
from fastfocal.compat import swaps

Criterion = TypeVar("Criterion", bound=nn.Module)


class FastFocalLoss(host.FocalLoss):  # type: ignore[misc]
    """ultralytics.utils.loss.FocalLoss: the same constructor, arguments and result."""

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Args: logits and targets in [0, 1], shaped alike, at least two dimensions."""
        alpha = float(self.alpha)
        return _focal_loss(pred, label.to(pred.dtype), alpha if alpha > 0 else None, self.gamma) / pred.shape[1]


class FastVarifocalLoss(host.VarifocalLoss):  # type: ignore[misc]
    """ultralytics.utils.loss.VarifocalLoss: the same constructor, arguments and result, for one-hot labels."""

    def forward(self, pred_score: Tensor, gt_score: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            pred_score: logits (N, queries, K).
            gt_score: the score q of a positive, 0 elsewhere, shaped alike.
            label: 1 at the class of a positive, 0 elsewhere: one class a query at most.
        """
        pred = pred_score.float() if pred_score.dtype != torch.float64 else pred_score
        has, k = label.max(dim=-1)
        labels = torch.where(has > 0, k, pred.shape[-1])
        # alpha 0 weighs a positive with 0 and a negative with 1.
        negatives = fastfocal.focal_loss(
            pred.reshape(-1, pred.shape[-1]), labels.reshape(-1), alpha=0.0, gamma=self.gamma, normalizer=None
        )
        assert isinstance(negatives, Tensor)
        x, q = (t.gather(-1, k.unsqueeze(-1)).squeeze(-1) for t in (pred, gt_score.to(pred.dtype)))
        entropy = nn.functional.binary_cross_entropy_with_logits(x, q, reduction="none")
        positives = (entropy * q * has).sum()
        return (self.alpha * negatives + positives) / pred.shape[1]


def _focal_loss(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> Tensor:
    loss = fastfocal.focal_loss(
        logits.reshape(-1, 1), targets.reshape(-1, 1), alpha=alpha, gamma=gamma, normalizer=None
    )
    assert isinstance(loss, Tensor)
    return loss.to(logits.dtype)


_FAST: swaps.Swaps = {host.FocalLoss: FastFocalLoss, host.VarifocalLoss: FastVarifocalLoss}


def accelerate(criterion: Criterion) -> Criterion:
    """Makes fastfocal compute the focal and varifocal losses inside a criterion, such as RTDETRDetectionLoss.

    Returns:
        The same criterion; its losses have changed their class and nothing else.

    Raises:
        ValueError: there is neither a FocalLoss nor a VarifocalLoss of ultralytics in it, or one that was subclassed.
    """
    return swaps.accelerate(criterion, _FAST, "criterion", "ultralytics' FocalLoss or VarifocalLoss")


def restore(criterion: Criterion) -> Criterion:
    """Undoes `accelerate`."""
    return swaps.restore(criterion, _FAST)
