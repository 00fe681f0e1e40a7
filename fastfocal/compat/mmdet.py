"""mmdet's focal losses by fastfocal: losses for its configs, and one call for all levels in its dense heads.

    import fastfocal.compat.mmdet                       # registers the losses below
    loss_cls = dict(type="FastFocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)   # in the config

    from fastfocal.compat.mmdet import accelerate
    model = accelerate(model)                           # every level in one call

    FocalLoss           FastFocalLoss           RetinaHead, ATSSHead, FCOSHead
    QualityFocalLoss    FastQualityFocalLoss    GFLHead, RTMDetHead, RTMDetSepBNHead
    VarifocalLoss       FastVarifocalLoss       VFNetHead
    GaussianFocalLoss                           CenterNetHead

The first alone changes the function: heads still permute every level. The second hands the head's raw outputs over. `restore`
undoes it. GaussianFocalLoss takes probabilities, so that only a head can hand over what they are made of: in training,
CenterNetHead's outputs are logits. With `accelerate(model, fuse_head=True)` the last convolution of RetinaHead, ATSSHead and
FCOSHead and their loss are one, and training makes no logits.

Equivalent to mmdet.models.losses (3.3.0): background K, anchors of weight 0 ignored, the mean over `avg_factor` plus the
float32 epsilon. Scores are not differentiated, as in every head. Here all of it runs in 16 bits too, and mmcv's compiled
operators are not needed for it.

Losses have the dtype of mmdet's own computation in PyTorch (py_sigmoid_focal_loss, which it uses without CUDA): float32 under
autocast; else what logits, weights and a tensor `avg_factor` promote to, and at least float32 for the varifocal loss. Sums are
float32 or float64 inside and rounded once.

Labels of anchors are 0..K; another one is an error of the kernels, a ValueError on the CPU (mmdet: an error there, or
background). An object's label is 0..K-1; the heads have a ValueError that names image and object for any other, where mmdet
trains the anchors of an object labelled K as background.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from mmdet.models.dense_heads import (
    ATSSHead,
    CenterNetHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RTMDetHead,
    RTMDetSepBNHead,
    VFNetHead,
)
from mmdet.models.losses import FocalLoss, GaussianFocalLoss, QualityFocalLoss, VarifocalLoss
from mmdet.registry import MODELS
from torch import Tensor, nn

import fastfocal
from fastfocal.compat import fused_head, patching
from fastfocal.compat.conventions import check_classes
from fastfocal.labels import NOTHING_IGNORED
from fastfocal.ops import accumulation_dtype
from fastfocal.sigmoid import entropy_dtype

# The label of an anchor of weight 0: none that an assigner gives, so that -1 among these is an error.
NOT_COUNTED = NOTHING_IGNORED
EPSILON = torch.finfo(torch.float32).eps
Model = TypeVar("Model", bound=nn.Module)
Fused = Callable[..., Any]


def _fused(loss: Any) -> Fused:
    """fastfocal's function with the numbers of one of mmdet's losses."""
    if isinstance(loss, FocalLoss):
        function: Fused = functools.partial(fastfocal.focal_loss, alpha=loss.alpha, gamma=loss.gamma)
    elif isinstance(loss, QualityFocalLoss):
        function = functools.partial(fastfocal.quality_focal_loss, beta=loss.beta, activated=loss.activated)
    else:
        numbers = {"alpha": loss.alpha, "gamma": loss.gamma, "iou_weighted": loss.iou_weighted}
        function = functools.partial(fastfocal.varifocal_loss, **numbers)
    return functools.partial(function, loss_weight=loss.loss_weight)


def _reduction(loss: Any, override: str | None, avg_factor: float | Tensor | None) -> str:
    reduction: str = override or loss.reduction
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction_override: expected 'none', 'mean', 'sum' or None, got {reduction!r}")
    if avg_factor is not None and reduction == "sum":
        raise ValueError('avg_factor can not be used with reduction="sum"')
    return reduction


def _loss(
    function: Fused,
    pred: Tensor,
    given: Tensor,
    weight: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
    dtype: torch.dtype,
    *,
    of_rows: bool = False,
    **scores: Tensor,
) -> Tensor:
    """What mmdet's weight_reduce_loss makes of elementwise losses, or of their sums over each row's classes.

    Args:
        function: as `_fused` gives it.
        pred: logits (n, K).
        given: labels (n,), or soft targets (n, K).
        weight: of n elements, one for each row, or of n * K.
    """
    rows = pred.reshape(-1, pred.shape[-1])
    count = len(rows) if of_rows else pred.numel()
    per_anchor = weight is not None and weight.numel() == len(rows)
    wide = accumulation_dtype(pred.dtype)
    anchor_weight = weight.reshape(-1).to(wide) if weight is not None and per_anchor else None
    per_element = weight if not per_anchor else None
    if reduction == "none" or per_element is not None:
        # Losses have the logits' dtype: 16 bits would be rounded before they are weighed or added.
        once = reduction == "none" and per_element is None and not of_rows
        rows = rows.to(dtype if once else wide)
    if given.is_floating_point():
        given = given.to(rows.dtype)
    options = {"ignore_index": NOTHING_IGNORED, "weight": anchor_weight, **scores}
    if reduction == "none" or per_element is not None:
        loss = _tensor(function(rows, given, normalizer=None, reduction="none", **options))
        loss = loss.sum(dim=1) if of_rows else loss.view(pred.shape)
        if per_element is not None:
            loss = loss * per_element.view(loss.shape)
        if reduction != "none":
            loss = loss.sum() / _divisor(reduction, avg_factor, count)
        return loss.to(dtype)
    of_nothing = count == 0 and avg_factor is None and reduction == "mean"
    divisor = None if of_nothing else _divisor(reduction, avg_factor, count)
    loss = _tensor(function(rows, given, normalizer=divisor, **options)).to(dtype)
    if isinstance(avg_factor, Tensor):
        loss = loss.reshape(avg_factor.shape)  # () or (1,)
    return loss * float("nan") if of_nothing else loss


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
        reduction = _reduction(self, reduction_override, avg_factor)
        soft = target.dim() == pred.dim()
        given = target.reshape(-1, pred.shape[-1]).to(accumulation_dtype(pred.dtype)) if soft else target.reshape(-1)
        dtype = _dtype(entropy_dtype(pred, pred), weight, avg_factor, reduction)
        return _loss(_fused(self), pred, given, weight, avg_factor, reduction, dtype)


@MODELS.register_module()  # type: ignore[misc]
class FastQualityFocalLoss(QualityFocalLoss):  # type: ignore[misc]
    """mmdet's QualityFocalLoss: the same constructor, arguments and result."""

    def forward(
        self,
        pred: Tensor,
        target: tuple[Tensor, Tensor] | Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of one level; rows are summed before they are weighted, and a "mean" is that of rows.

        Args:
            pred: logits (n, K); probabilities with `activated=True`.
            target: labels (n,), K for background, and scores (n,); or scores (n, K), 0 for a negative.
            weight: (n,).
            avg_factor: what a "mean" divides the sum by, instead of n.
            reduction_override: "none", "mean" or "sum" instead of the constructor's.

        Raises:
            ValueError: avg_factor together with "sum".
        """
        if pred.dim() != 2 or (weight is not None and weight.shape != pred.shape[:1]):
            loss: Tensor = super().forward(pred, target, weight, avg_factor, reduction_override)
            return loss
        reduction = _reduction(self, reduction_override, avg_factor)
        dtype = _dtype(entropy_dtype(pred, pred), weight, avg_factor, reduction)
        given, scores = (target, {}) if isinstance(target, Tensor) else (target[0], {"scores": target[1]})
        return _loss(_fused(self), pred, given, weight, avg_factor, reduction, dtype, of_rows=True, **scores)


@MODELS.register_module()  # type: ignore[misc]
class FastVarifocalLoss(VarifocalLoss):  # type: ignore[misc]
    """mmdet's VarifocalLoss: the same constructor, arguments and result."""

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of all levels.

        Args:
            pred: logits (n, K).
            target: scores (n, K), 0 for a negative.
            weight: (n, K) or (n, 1).
            avg_factor: what a "mean" divides the sum by, instead of n * K.
            reduction_override: "none", "mean" or "sum" instead of the constructor's.

        Raises:
            ValueError: avg_factor together with "sum".
        """
        if pred.dim() != 2 or (weight is not None and weight.shape not in (pred.shape, (len(pred), 1))):
            loss: Tensor = super().forward(pred, target, weight, avg_factor, reduction_override)
            return loss
        reduction = _reduction(self, reduction_override, avg_factor)
        dtype = _dtype(torch.promote_types(pred.dtype, torch.float32), weight, avg_factor, reduction)
        return _loss(_fused(self), pred, target, weight, avg_factor, reduction, dtype)


def _tensor(loss: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(loss, Tensor)
    return loss


def _divisor(reduction: str, avg_factor: float | Tensor | None, elements: int) -> float | Tensor:
    if reduction == "sum":
        return 1.0
    return float(elements) if avg_factor is None else avg_factor + EPSILON


def _dtype(
    dtype: torch.dtype, weight: Tensor | None, avg_factor: float | Tensor | None, reduction: str = "mean"
) -> torch.dtype:
    """Of elementwise losses of `dtype` times weights, over an average."""
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    if isinstance(avg_factor, Tensor) and reduction == "mean":
        average = avg_factor.dtype if avg_factor.is_floating_point() else torch.get_default_dtype()
        # A sum has no dimension: a divisor that has one decides.
        dtype = average if avg_factor.dim() > 0 else torch.promote_types(dtype, average)
    return dtype


def weights_of_peaks(loss: GaussianFocalLoss, classes: int) -> list[list[float]] | None:
    """Of positives and of negatives, as fastfocal takes them."""
    weights = [float(loss.pos_weight), float(loss.neg_weight)]
    return None if weights == [1, 1] else [[weight] * classes for weight in weights]


# --- heads ------------------------------------------------------------------------------------------------------------


class _Recorder(nn.Module):
    """Stands in for the head's loss: keeps what it is called with, and gives 1, to be multiplied by what the head does then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Tensor | None, Any]] = []

    def forward(self, pred: Tensor, target: Any, weight: Tensor | None = None, avg_factor: Any = None) -> Tensor:
        self.calls.append((target, weight, avg_factor))
        return torch.ones((), dtype=torch.float64)


def _blank(cls_scores: Sequence[Tensor], channels: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """One class in place of `channels`, that takes no memory."""
    return [
        torch.zeros((), dtype=dtype or x.dtype, device=x.device).expand(
            x.shape[0], x.shape[1] // channels, *x.shape[2:]
        )
        for x in cls_scores
    ]


class OneCall:
    """Mixin for a dense head: `class MyHead(OneCall, RetinaHead)`. Its `loss_by_feat` computes loss_cls in one call.

    This one is for heads with the FocalLoss; OneCallGFL, OneCallRTMDet and OneCallVFNet are for what their names say.
    """

    stock_losses: tuple[type[nn.Module], ...] = (FocalLoss, FastFocalLoss)
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
        shown, self.cls_out_channels = self.shown_to_the_head(cls_scores)
        self.loss_cls = recorder
        try:
            # The head assigns targets and computes the other losses.
            losses: dict[str, Any] = super().loss_by_feat(shown, *rest, **options)  # type: ignore[misc]
            targets, scores = self.targets_of(recorder.calls)
        finally:
            self.loss_cls, self.cls_out_channels = stock, channels
        anchors = [x.shape[1] // channels * x.shape[2] * x.shape[3] * x.shape[0] for x in cls_scores]
        labels = self._by_level(targets, anchors, cls_scores)
        wide = accumulation_dtype(cls_scores[0].dtype)
        more: dict[str, Any] = {}
        if scores is not None:
            more["scores"] = [score.to(wide) for score in self._by_level(scores, anchors, cls_scores)]
        weights = [weight for _, weight, _ in recorder.calls if weight is not None]
        if weights:
            by_level = self._by_level(weights, anchors, cls_scores)
            if self.train_cfg["pos_weight"] <= 0:  # then a weight is 0 or 1
                labels = [y.masked_fill(w == 0, NOT_COUNTED) for y, w in zip(labels, by_level, strict=True)]
            else:
                more["weight"] = [w.to(wide) for w in by_level]
        per_level = isinstance(losses["loss_cls"], (list, tuple))
        if per_level:
            more["level_weights"] = [float(factor) for factor in losses["loss_cls"]]
        function = _fused(stock)
        if isinstance(stock, FocalLoss):
            function = functools.partial(fused_head.focal_loss, **function.keywords)  # type: ignore[attr-defined]
        loss = _tensor(
            function(
                cls_scores,
                labels,
                num_classes=self.num_classes,
                ignore_index=NOT_COUNTED,
                normalizer=_divisor("mean", recorder.calls[0][2], 1),
                reduction="level" if per_level else "sum",
                **more,
            )
        ).to(_dtype(self.dtype_of(cls_scores[0]), *recorder.calls[0][1:]))
        losses["loss_cls"] = list(loss.unbind()) if per_level else loss
        return losses

    def shown_to_the_head(self, cls_scores: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """What the head computes everything else from, and how many classes these have."""
        return _blank(cls_scores, self.cls_out_channels), 1

    def targets_of(self, calls: Sequence[tuple[Any, Tensor | None, Any]]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Labels and scores from the targets that the head gave its loss."""
        return [target for target, _, _ in calls], None

    def dtype_of(self, cls_score: Tensor) -> torch.dtype:
        """That of the head's elementwise losses."""
        return entropy_dtype(cls_score, cls_score)

    @staticmethod
    def _by_level(values: Sequence[Tensor], anchors: list[int], cls_scores: list[Tensor]) -> list[Tensor]:
        """(N, M) a level, of what the head flattened: image by image within a level."""
        flat = torch.cat([v.reshape(-1) for v in values])
        return [v.view(x.shape[0], -1) for v, x in zip(flat.split(anchors), cls_scores, strict=True)]


class OneCallGFL(OneCall):
    """The same for a GFLHead, which weighs the boxes' losses with the likeliest class of each anchor."""

    stock_losses = (QualityFocalLoss, FastQualityFocalLoss)

    def shown_to_the_head(self, cls_scores: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        channels = self.cls_out_channels
        with torch.no_grad():
            return [x.unflatten(1, (-1, channels)).amax(dim=2) for x in cls_scores], 1

    def targets_of(self, calls: Sequence[tuple[Any, Tensor | None, Any]]) -> tuple[list[Tensor], list[Tensor] | None]:
        return [labels for (labels, _), _, _ in calls], [scores for (_, scores), _, _ in calls]


class OneCallRTMDet(OneCallGFL):
    """The same for a RTMDetHead, which assigns targets by the scores of all classes."""

    def shown_to_the_head(self, cls_scores: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        return [x.detach() for x in cls_scores], self.cls_out_channels

    def loss_by_feat_single(self, cls_score: Tensor, *rest: Any, **options: Any) -> Any:
        channels = self.cls_out_channels
        self.cls_out_channels = 1
        try:
            (blank,) = _blank([cls_score], channels)
            return super().loss_by_feat_single(blank, *rest, **options)  # type: ignore[misc]
        finally:
            self.cls_out_channels = channels


class OneCallVFNet(OneCall):
    """The same for a VFNetHead, which makes one dense target of labels and scores."""

    stock_losses = (VarifocalLoss, FastVarifocalLoss)
    _labels: list[Tensor] | None = None  # those assigned, while loss_by_feat runs

    def loss_by_feat(self, cls_scores: list[Tensor], *rest: Any, **options: Any) -> dict[str, Any]:
        self._labels = []
        try:
            return super().loss_by_feat(cls_scores, *rest, **options)
        finally:
            self._labels = None

    def get_targets(self, *given: Any, **options: Any) -> tuple[Any, ...]:
        labels, *rest = super().get_targets(*given, **options)  # type: ignore[misc]
        if self._labels is None:
            return (labels, *rest)
        self._labels = labels
        # To the head, an object's anchor has the one class there is.
        return ([torch.where(y == self.num_classes, y, y.clamp(max=0)) for y in labels], *rest)

    def shown_to_the_head(self, cls_scores: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        # The head puts the scores into a tensor of this dtype.
        return _blank(cls_scores, self.cls_out_channels, accumulation_dtype(cls_scores[0].dtype)), 1

    def targets_of(self, calls: Sequence[tuple[Any, Tensor | None, Any]]) -> tuple[list[Tensor], list[Tensor] | None]:
        assert self._labels is not None
        return self._labels, [target for target, _, _ in calls]

    def dtype_of(self, cls_score: Tensor) -> torch.dtype:
        return torch.promote_types(cls_score.dtype, torch.float32)


class FastRetinaHead(OneCall, RetinaHead):  # type: ignore[misc]
    """mmdet's RetinaHead."""


class FastATSSHead(OneCall, ATSSHead):  # type: ignore[misc]
    """mmdet's ATSSHead."""


class FastFCOSHead(OneCall, FCOSHead):  # type: ignore[misc]
    """mmdet's FCOSHead."""


class FastGFLHead(OneCallGFL, GFLHead):  # type: ignore[misc]
    """mmdet's GFLHead."""


class FastRTMDetHead(OneCallRTMDet, RTMDetHead):  # type: ignore[misc]
    """mmdet's RTMDetHead."""


class FastRTMDetSepBNHead(OneCallRTMDet, RTMDetSepBNHead):  # type: ignore[misc]
    """mmdet's RTMDetSepBNHead."""


class FastVFNetHead(OneCallVFNet, VFNetHead):  # type: ignore[misc]
    """mmdet's VFNetHead."""


class FastCenterNetHead(CenterNetHead):  # type: ignore[misc]
    """mmdet's CenterNetHead. In training `forward` gives logits of heatmaps; `loss_by_feat` and `predict_by_feat` take them."""

    stock_losses = (GaussianFocalLoss,)
    loss_center_heatmap: Any

    def forward_single(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.training:
            probabilities: tuple[Tensor, ...] = super().forward_single(x)
            return probabilities
        return self.heatmap_head(x), self.wh_head(x), self.offset_head(x)

    def predict_by_feat(self, center_heatmap_preds: list[Tensor], *rest: Any, **options: Any) -> Any:
        if self.training:
            center_heatmap_preds = [x.sigmoid() for x in center_heatmap_preds]
        return super().predict_by_feat(center_heatmap_preds, *rest, **options)

    def loss_by_feat(self, center_heatmap_preds: list[Tensor], *rest: Any, **options: Any) -> dict[str, Tensor]:
        """As the head's own."""
        check_loss(self)
        given = inspect.signature(super().loss_by_feat).bind(center_heatmap_preds, *rest, **options).arguments
        check_classes("gt_instances.labels", [x.labels for x in given["batch_gt_instances"]], self.num_classes)
        if not self.training:  # then these are probabilities
            losses: dict[str, Tensor] = super().loss_by_feat(center_heatmap_preds, *rest, **options)
            return losses
        stock, recorder = self.loss_center_heatmap, _Recorder()
        self.loss_center_heatmap = recorder
        try:
            blank = [x.new_zeros(()).expand(x.shape) for x in center_heatmap_preds]
            losses = super().loss_by_feat(blank, *rest, **options)
        finally:
            self.loss_center_heatmap = stock
        ((heatmap, _, avg_factor),) = recorder.calls
        (logits,) = center_heatmap_preds
        loss = _tensor(
            fastfocal.gaussian_focal_loss(
                logits,
                heatmap.to(logits.dtype),
                num_classes=self.num_classes,
                alpha=stock.alpha,
                gamma=stock.gamma,
                class_weight=weights_of_peaks(stock, self.num_classes),
                normalizer=_divisor("mean", avg_factor, 1),
                loss_weight=stock.loss_weight,
            )
        )
        # Probabilities of the logits' dtype, times weights of the heatmap's.
        dtype = torch.promote_types(logits.dtype, heatmap.dtype)
        losses["loss_center_heatmap"] = loss.to(_dtype(dtype, None, avg_factor))
        return losses


_FAST: patching.Swaps = {
    RetinaHead: FastRetinaHead,
    ATSSHead: FastATSSHead,
    FCOSHead: FastFCOSHead,
    GFLHead: FastGFLHead,
    RTMDetHead: FastRTMDetHead,
    RTMDetSepBNHead: FastRTMDetSepBNHead,
    VFNetHead: FastVFNetHead,
    CenterNetHead: FastCenterNetHead,
}


def check_loss(head: Any) -> None:
    """Raises ValueError where the head's classification loss is not the one that its fast class computes."""
    fast: Any = head if hasattr(head, "stock_losses") else _FAST[type(head)]
    name = "loss_cls" if hasattr(head, "loss_cls") else "loss_center_heatmap"
    loss = getattr(head, name)
    if type(loss) not in fast.stock_losses or getattr(loss, "activated", False) or loss.reduction != "mean":
        raise ValueError(
            f"{type(head).__name__}.{name}: expected mmdet's {fast.stock_losses[0].__name__} on logits, with reduction 'mean', "
            f"got {loss!r}"
        )


# Why a head's logits are there before its loss.
_NOT_FUSED: dict[type[nn.Module], str] = {
    GFLHead: "weighs its boxes' losses by its logits",
    RTMDetHead: "assigns targets by its logits",
    VFNetHead: "has the varifocal loss, and only the focal loss is fused",
    CenterNetHead: "has a target for each logit, as large as the logits",
}


def _last_layer(head: nn.Module) -> str:
    for kind, reason in _NOT_FUSED.items():  # first: most are a kind of ATSSHead
        if isinstance(head, kind):
            raise ValueError(
                f"{type(head).__name__}: {reason}, so that it is not accelerated with fuse_head=True; expected RetinaHead, "
                "ATSSHead or FCOSHead"
            )
    for kind, path in ((RetinaHead, "retina_cls"), (ATSSHead, "atss_cls")):
        if isinstance(head, kind):
            return path
    return "conv_cls"


def accelerate(model: Model, *, fuse_head: bool = False) -> Model:
    """Makes fastfocal compute the classification loss of every head of those above that `model` is or contains.

    Args:
        model: is or contains one.
        fuse_head: whether in training a head's last convolution is computed together with the loss, in tiles, so that no
            logits are made: for hundreds of classes and more, in RetinaHead, ATSSHead and FCOSHead. Where the loss is a list
            with one per level (the first two), backward computes the convolution a second time. What reads the logits in
            training all the same (a hook, `predict_by_feat`) gets them, and a warning. Calling it again with the other value
            switches.

    Returns:
        The same model; its heads (and with `fuse_head` their last convolutions) have changed their class and nothing else.

    Raises:
        ValueError: none of them is in it, one is that was subclassed (which takes the mixin `OneCall` itself), or its loss is
            another one; with `fuse_head`, a head that needs its logits before the loss, or whose last convolution is not
            PyTorch's own (mmdet's NormedConv2d).
    """
    heads = "mmdet's RetinaHead, ATSSHead, FCOSHead, GFLHead, RTMDetHead, VFNetHead or CenterNetHead"
    if fuse_head:
        heads = (
            "mmdet's RetinaHead, ATSSHead or FCOSHead (heads that assign targets by their logits, as with SimOTA, TOOD's or a "
            "Hungarian assigner, cannot have fuse_head=True)"
        )
    last_layer = _last_layer if fuse_head else None
    return patching.accelerate(model, _FAST, "model", heads, check_loss, last_layer=last_layer)


def restore(model: Model) -> Model:
    """Undoes `accelerate`."""
    return patching.restore(model, _FAST)
