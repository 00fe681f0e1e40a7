"""mmdet's focal loss by fastfocal: a loss for its configs, and one call for all levels in its dense heads.

    import fastfocal.compat.mmdet                       # registers FastFocalLoss
    loss_cls = dict(type="FastFocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)   # in the config

    from fastfocal.compat.mmdet import accelerate
    model = accelerate(model)                           # RetinaNet, ATSS, FCOS: every level in one call

The first alone changes the function: heads still permute every level. The second hands the head's raw outputs over. `restore`
undoes it.

Equivalent to mmdet.models.losses.FocalLoss (3.3.0): background K, anchors of weight 0 ignored, the mean over `avg_factor` plus
the float32 epsilon. Here it runs on the CPU and in bfloat16 too, and mmcv's compiled operators are not needed for it.

Losses have the dtype of mmdet's own computation in PyTorch (py_sigmoid_focal_loss, which it uses without CUDA): float32 under
autocast; else what logits, weights and a tensor `avg_factor` promote to. Sums are float32 or float64 inside and rounded once.

Labels of anchors are 0..K; another one is an error of the kernels, a ValueError on the CPU (mmdet: an error there, background
on CUDA). An object's label is 0..K-1; the heads have a ValueError that names image and object for any other, where mmdet trains
the anchors of an object labelled K as background.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, RetinaHead
from mmdet.models.losses import FocalLoss
from mmdet.registry import MODELS
from torch import Tensor, nn

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.conventions import check_classes
from fastfocal.labels import NOTHING_IGNORED
from fastfocal.ops import accumulation_dtype
from fastfocal.sigmoid import entropy_dtype

# The label of an anchor of weight 0: none that an assigner gives, so that -1 among these is an error.
NOT_COUNTED = NOTHING_IGNORED
EPSILON = torch.finfo(torch.float32).eps
Model = TypeVar("Model", bound=nn.Module)


@MODELS.register_module()  # type: ignore[misc]
class FastFocalLoss(FocalLoss):  # type: ignore[misc]
    """mmdet's FocalLoss: the same constructor, arguments and result. `activated=True`, on probabilities, is left to mmdet."""

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of one level.

        Args:
            pred: logits (n, K).
            target: labels (n,), K for background; or one-hot or soft targets (n, K).
            weight: (n,), (n, K) or (n * K,).
            avg_factor: what a "mean" divides the sum by, instead of n * K.
            reduction_override: "none", "mean" or "sum" instead of the constructor's.

        Raises:
            ValueError: avg_factor together with "sum".
        """
        if self.activated:
            loss: Tensor = super().forward(pred, target, weight, avg_factor, reduction_override)
            return loss
        reduction = reduction_override or self.reduction
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction_override: expected 'none', 'mean', 'sum' or None, got {reduction!r}")
        if avg_factor is not None and reduction == "sum":
            raise ValueError('avg_factor can not be used with reduction="sum"')
        rows, elements = pred.reshape(-1, pred.shape[-1]), pred.numel()
        soft = target.dim() == pred.dim()
        options = {
            "alpha": self.alpha,
            "gamma": self.gamma,
            "loss_weight": self.loss_weight,
            "ignore_index": NOTHING_IGNORED,
        }
        dtype = _dtype(pred, weight, avg_factor, reduction)
        per_anchor = weight is not None and weight.numel() == len(rows)
        anchor_weight = (
            weight.reshape(-1).to(accumulation_dtype(pred.dtype)) if weight is not None and per_anchor else None
        )
        elementwise = reduction == "none" or (weight is not None and not per_anchor)
        if elementwise:  # losses have the logits' dtype: 16 bits would be rounded before they are weighed or added
            wide = reduction != "none" or (weight is not None and not per_anchor)
            rows = rows.to(accumulation_dtype(pred.dtype) if wide else dtype)
        given = target.reshape(rows.shape).to(rows.dtype) if soft else target.reshape(-1)
        if elementwise:
            loss = _tensor(
                fastfocal.focal_loss(rows, given, weight=anchor_weight, normalizer=None, reduction="none", **options)
            ).view(pred.shape)
            if weight is not None and not per_anchor:
                loss = loss * weight.view(loss.shape)
            if reduction != "none":
                loss = loss.sum() / _divisor(reduction, avg_factor, elements)
            return loss.to(dtype)
        of_nothing = elements == 0 and avg_factor is None and reduction == "mean"
        divisor = None if of_nothing else _divisor(reduction, avg_factor, elements)
        loss = _tensor(fastfocal.focal_loss(rows, given, weight=anchor_weight, normalizer=divisor, **options)).to(dtype)
        if isinstance(avg_factor, Tensor):
            loss = loss.reshape(avg_factor.shape)  # () or (1,)
        return loss * float("nan") if of_nothing else loss


def _tensor(loss: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(loss, Tensor)
    return loss


def _divisor(reduction: str, avg_factor: float | Tensor | None, elements: int) -> float | Tensor:
    if reduction == "sum":
        return 1.0
    return float(elements) if avg_factor is None else avg_factor + EPSILON


def _dtype(
    pred: Tensor, weight: Tensor | None, avg_factor: float | Tensor | None, reduction: str = "mean"
) -> torch.dtype:
    """That of py_sigmoid_focal_loss: of elementwise losses times weights, over an average."""
    dtype = entropy_dtype(pred, pred)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    if isinstance(avg_factor, Tensor) and reduction == "mean":
        average = avg_factor.dtype if avg_factor.is_floating_point() else torch.get_default_dtype()
        # A sum has no dimension: a divisor that has one decides.
        dtype = average if avg_factor.dim() > 0 else torch.promote_types(dtype, average)
    return dtype


class _Recorder(nn.Module):
    """Stands in for the head's loss_cls: keeps what it is called with, and costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None, Any]] = []

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: Any = None) -> Tensor:
        self.calls.append((target, weight, avg_factor))
        return pred.new_zeros(())


class OneCall:
    """Mixin for a dense head: `class MyHead(OneCall, RetinaHead)`. Its `loss_by_feat` computes loss_cls in one call."""

    loss_cls: Any
    cls_out_channels: int
    num_classes: int
    train_cfg: Any

    def loss_by_feat(self, cls_scores: list[Tensor], *rest: Any, **options: Any) -> dict[str, Any]:
        """As the head's own; `loss_cls` is the list of levels' losses, or the one of all, as the head has it."""
        check_loss(self)
        given = inspect.signature(super().loss_by_feat).bind(cls_scores, *rest, **options).arguments  # type: ignore[misc]
        check_classes("gt_instances.labels", [x.labels for x in given.get("batch_gt_instances", ())], self.num_classes)
        stock, channels, recorder = self.loss_cls, self.cls_out_channels, _Recorder()
        # The head assigns targets and computes the other losses; for the classes it sees one that takes no memory.
        blank = [x.new_zeros(()).expand(x.shape[0], x.shape[1] // channels, *x.shape[2:]) for x in cls_scores]
        self.loss_cls, self.cls_out_channels = recorder, 1
        try:
            losses: dict[str, Any] = super().loss_by_feat(blank, *rest, **options)  # type: ignore[misc]
        finally:
            self.loss_cls, self.cls_out_channels = stock, channels
        per_level = len(recorder.calls) == len(cls_scores) and len(cls_scores) > 1
        anchors = [x.shape[1] // channels * x.shape[2] * x.shape[3] * x.shape[0] for x in cls_scores]
        labels = self._by_level([target for target, _, _ in recorder.calls], anchors, cls_scores)
        weights = [weight for _, weight, _ in recorder.calls if weight is not None]
        anchor_weight = None
        if weights:
            by_level = self._by_level(weights, anchors, cls_scores)
            if self.train_cfg["pos_weight"] <= 0:  # then a weight is 0 or 1
                labels = [y.masked_fill(w == 0, NOT_COUNTED) for y, w in zip(labels, by_level, strict=True)]
            else:
                anchor_weight = [w.to(accumulation_dtype(cls_scores[0].dtype)) for w in by_level]
        loss = _tensor(
            fastfocal.focal_loss(
                cls_scores,
                labels,
                num_classes=self.num_classes,
                alpha=stock.alpha,
                gamma=stock.gamma,
                ignore_index=NOT_COUNTED,
                weight=anchor_weight,
                normalizer=_divisor("mean", recorder.calls[0][2], 1),
                reduction="level" if per_level else "sum",
                loss_weight=stock.loss_weight,
            )
        ).to(_dtype(cls_scores[0], *recorder.calls[0][1:]))
        losses["loss_cls"] = list(loss.unbind()) if per_level else loss
        return losses

    @staticmethod
    def _by_level(values: Sequence[Tensor], anchors: list[int], cls_scores: list[Tensor]) -> list[Tensor]:
        """(N, M) a level, of what the head flattened: image by image within a level."""
        flat = torch.cat([v.reshape(-1) for v in values])
        return [v.view(x.shape[0], -1) for v, x in zip(flat.split(anchors), cls_scores, strict=True)]


class FastRetinaHead(OneCall, RetinaHead):  # type: ignore[misc]
    """mmdet's RetinaHead."""


class FastATSSHead(OneCall, ATSSHead):  # type: ignore[misc]
    """mmdet's ATSSHead."""


class FastFCOSHead(OneCall, FCOSHead):  # type: ignore[misc]
    """mmdet's FCOSHead."""


_FAST: patching.Swaps = {
    RetinaHead: FastRetinaHead,
    ATSSHead: FastATSSHead,
    FCOSHead: FastFCOSHead,
}


def check_loss(head: Any) -> None:
    """Raises ValueError where the head's classification loss is not a mean sigmoid focal loss on logits."""
    loss = head.loss_cls
    if type(loss) not in (FocalLoss, FastFocalLoss) or loss.activated or loss.reduction != "mean":
        raise ValueError(
            f"{type(head).__name__}.loss_cls: expected mmdet's FocalLoss on logits, with reduction 'mean', got {loss!r}"
        )


def accelerate(model: Model) -> Model:
    """Makes fastfocal compute the classification loss of every RetinaHead, ATSSHead and FCOSHead that `model` is or contains.

    Returns:
        The same model; its heads have changed their class and nothing else.

    Raises:
        ValueError: none of them is in it, one is that was subclassed (which takes the mixin `OneCall` itself), or its loss is
            no focal loss.
    """
    return patching.accelerate(model, _FAST, "model", "mmdet's RetinaHead, ATSSHead or FCOSHead", check_loss)


def restore(model: Model) -> Model:
    """Undoes `accelerate`."""
    return patching.restore(model, _FAST)
