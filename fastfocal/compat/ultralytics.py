"""ultralytics' classification losses, computed by fastfocal: RT-DETR's criterion, and YOLO's from v8 on.

    from fastfocal.compat.ultralytics import accelerate
    model.add_callback("on_train_start", lambda trainer: accelerate(trainer.model))     # model: a YOLO or a RTDETR
    criterion = accelerate(ultralytics.models.utils.loss.RTDETRDetectionLoss(nc=80, use_vfl=True))

Written from the formulas of the papers and from what the package computes (8.4); its code is AGPL and none of it is here.
`restore` undoes it.

RT-DETR, all decoder layers in one call. Focal: `FL(p_t)` with alpha and gamma, over the number of objects. Varifocal (Zhang et
al. 2020, arXiv:2008.13367, equation 2): a negative costs `alpha p^gamma` times its cross entropy, a positive with score q `q`
times its cross entropy with the target q. Each is a module too, FastFocalLoss and FastVarifocalLoss, with the mean over the
second dimension and the sum over the others.

YOLO: binary cross entropy with the table of scores that its assigner makes, class weights, summed; in detection, segmentation,
pose and oriented boxes, and both heads of those without NMS.

An object of a batch whose class is outside 0..nc-1 is a ValueError that names image and object (ultralytics: an index out of
range, background for nc where the matches are given, and in YOLO class 0 for -1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from ultralytics.models.utils import loss as host_criterion
from ultralytics.utils import loss as host

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.conventions import check_classes, require
from fastfocal.sigmoid import entropy_dtype

Criterion = TypeVar("Criterion")

# --- RT-DETR ----------------------------------------------------------------------------------------------------------


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
        targets = label if label.is_floating_point() else label.to(pred.dtype)
        alpha = self.weight(pred.shape[-1])
        # One alpha takes elements as they come, one for each class takes rows.
        logits, soft = (t.reshape(-1, pred.shape[-1] if isinstance(alpha, Tensor) else 1) for t in (pred, targets))
        loss = fastfocal.focal_loss(logits, soft, alpha=alpha, gamma=self.gamma, normalizer=None)
        assert isinstance(loss, Tensor)
        return (loss / pred.shape[1]).to(entropy_dtype(targets, targets))

    def weight(self, classes: int) -> float | Tensor | None:
        """alpha as fastfocal takes it."""
        if self.alpha.device.type != "cpu":  # ultralytics has moved it: a wait for the device, once
            self.alpha = self.alpha.cpu()
        if self.alpha.numel() == 1:
            return float(self.alpha) if self.alpha > 0 else None
        return self.alpha.expand(classes) if (self.alpha > 0).any() else None


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
        scores = gt_score.gather(-1, k.unsqueeze(-1)).squeeze(-1)
        loss = fastfocal.varifocal_loss(
            pred_score,
            torch.where(has > 0, k, pred_score.shape[-1]),
            scores=_wide(scores),
            alpha=self.alpha,
            gamma=self.gamma,
            normalizer=float(max(1, pred_score.shape[1])),
        )
        assert isinstance(loss, Tensor)
        return loss


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


class _Layer(NamedTuple):
    """What one decoder layer's classification loss is computed from."""

    logits: Tensor  # (N, queries, nc)
    labels: Tensor  # (N, queries), nc for background
    scores: Tensor  # (N, queries)
    objects: int


def _check_batch(criterion: host_criterion.DETRLoss, batch: dict[str, Any]) -> None:
    """The classes of a batch's objects, in the order of its images."""
    check_classes('batch["cls"]', batch["cls"].split(batch["gt_groups"]), criterion.nc)


class FastDETRLoss(host_criterion.DETRLoss):  # type: ignore[misc]
    """ultralytics' DETRLoss; the classes' loss of all layers in one call."""

    _layers: list[_Layer] | None = None  # those that are waiting, while forward runs

    def forward(
        self,
        pred_bboxes: Tensor,
        pred_scores: Tensor,
        batch: dict[str, Any],
        postfix: str = "",
        *rest: Any,
        **options: Any,
    ) -> Any:
        _check_batch(self, batch)
        layers: list[_Layer] = []
        self._layers = layers
        try:
            losses = super().forward(pred_bboxes, pred_scores, batch, postfix, *rest, **options)
        finally:
            self._layers = None
        of_layers = self._classification(layers)
        losses[f"loss_class{postfix}"] = of_layers[0]
        if self.aux_loss:
            losses[f"loss_class_aux{postfix}"] = of_layers[1:].sum().float()  # added up in float32, as theirs
        return losses

    def _get_loss_class(
        self, pred_scores: Tensor, targets: Tensor, gt_scores: Tensor, num_gts: int, postfix: str = ""
    ) -> dict[str, Tensor]:
        layer = _Layer(pred_scores, targets, gt_scores, num_gts)
        if self._layers is None:
            return {f"loss_class{postfix}": self._classification([layer])[0]}
        self._layers.append(layer)
        return {f"loss_class{postfix}": pred_scores.new_zeros(())}

    def _classification(self, layers: list[_Layer]) -> Tensor:
        """(layers,) by one of the three losses that the criterion may have."""
        logits, labels = [layer.logits for layer in layers], [layer.labels for layer in layers]
        objects, gain = layers[0].objects, float(self.loss_gain["class"])
        queries = logits[0].shape[1]  # which the cross entropy is a mean over
        given: dict[str, Any] = {
            "reduction": "level",
            "normalizer": float(max(objects if self.fl else queries, 1)),
            "loss_weight": gain,
        }
        scores = [layer.scores for layer in layers]
        if not self.fl:
            found = fastfocal.bce_loss(logits, labels, scores=scores, **given)
        elif objects and self.vfl:
            numbers = {"alpha": self.vfl.alpha, "gamma": self.vfl.gamma}
            found = fastfocal.varifocal_loss(logits, labels, scores=scores, **numbers, **given)
        else:
            alpha = FastFocalLoss.weight(self.fl, logits[0].shape[-1])
            found = fastfocal.focal_loss(logits, labels, alpha=alpha, gamma=self.fl.gamma, **given)
        assert isinstance(found, Tensor)
        return found.float()


class FastRTDETRDetectionLoss(host_criterion.RTDETRDetectionLoss, FastDETRLoss):  # type: ignore[misc]
    """ultralytics' RTDETRDetectionLoss; the classes' loss of all layers in one call, and of all of the denoising ones."""


# --- YOLO -------------------------------------------------------------------------------------------------------------


class SummedBCE(nn.Module):
    """In place of v8DetectionLoss.bce: what that criterion makes of its elementwise result, the weighted sum.

    Args:
        class_weights: (nc,), or None.
    """

    def __init__(self, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.class_weights = class_weights

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """A 0-d tensor, float32 or float64.

        Args:
            pred: logits (N, anchors, nc).
            target: scores in [0, 1], shaped alike.
        """
        loss = fastfocal.bce_loss(pred, target, class_weight=self.class_weights, normalizer=None)
        assert isinstance(loss, Tensor)
        return loss


class _FastYOLO:
    """Mixin of the criteria below: `bce` gives the sum, and the objects' classes are checked first."""

    nc: int

    def loss(self, preds: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
        classes = batch["cls"].view(-1)
        images = batch["batch_idx"].view(-1)
        within = range(int(images.max()) + 1) if images.device.type == "cpu" and len(images) else ()
        # The device's are all checked at once, where no image and object could be named anyway.
        of_images = [classes[images == image] for image in within] or [classes]
        check_classes('batch["cls"]', of_images, self.nc)
        return super().loss(preds, batch)  # type: ignore[misc]


class FastDetectionLoss(_FastYOLO, host.v8DetectionLoss):  # type: ignore[misc]
    """ultralytics' v8DetectionLoss."""


class FastSegmentationLoss(_FastYOLO, host.v8SegmentationLoss):  # type: ignore[misc]
    """ultralytics' v8SegmentationLoss."""


class FastSegmentLoss26(_FastYOLO, host.SegmentLoss26):  # type: ignore[misc]
    """ultralytics' SegmentLoss26."""


class FastPoseLoss(_FastYOLO, host.v8PoseLoss):  # type: ignore[misc]
    """ultralytics' v8PoseLoss."""


class FastPoseLoss26(_FastYOLO, host.PoseLoss26):  # type: ignore[misc]
    """ultralytics' PoseLoss26."""


class FastOBBLoss(_FastYOLO, host.v8OBBLoss):  # type: ignore[misc]
    """ultralytics' v8OBBLoss."""


_YOLO: dict[type, type] = {
    host.v8DetectionLoss: FastDetectionLoss,
    host.v8SegmentationLoss: FastSegmentationLoss,
    host.SegmentLoss26: FastSegmentLoss26,
    host.v8PoseLoss: FastPoseLoss,
    host.PoseLoss26: FastPoseLoss26,
    host.v8OBBLoss: FastOBBLoss,
}
_STOCK_YOLO = {fast: stock for stock, fast in _YOLO.items()}


def _yolo_criteria(root: Any) -> Iterator[Any]:
    """Those that `root` is or has: in the pair of an end-to-end head, or around that of prompts. They are no modules."""
    if isinstance(root, host.v8DetectionLoss):
        yield root
    elif type(root).__module__ == host.__name__ and not isinstance(root, nn.Module):
        for part in vars(root).values():
            yield from _yolo_criteria(part)


def _swap_yolo(criterion: Any) -> None:
    if type(criterion) in _STOCK_YOLO:
        return
    weights = criterion.class_weights
    criterion.bce = SummedBCE(None if weights is None else weights.reshape(-1))
    criterion.class_weights = None  # they are in there
    criterion.__class__ = _YOLO[type(criterion)]


def _restore_yolo(criterion: Any) -> None:
    if type(criterion) not in _STOCK_YOLO:
        return
    weights = criterion.bce.class_weights
    criterion.class_weights = None if weights is None else weights.view(1, 1, -1)
    criterion.bce = nn.BCEWithLogitsLoss(reduction="none")
    criterion.__class__ = _STOCK_YOLO[type(criterion)]


# --- the swap ---------------------------------------------------------------------------------------------------------

_FAST: patching.Swaps = {host.FocalLoss: FastFocalLoss, host.VarifocalLoss: FastVarifocalLoss}
_AROUND: patching.Swaps = {
    host_criterion.DETRLoss: FastDETRLoss,
    host_criterion.RTDETRDetectionLoss: FastRTDETRDetectionLoss,
}


def _models(root: Any) -> list[Any]:
    """ultralytics' models in `root`, which make their criterion when they first need it."""
    modules = root.modules() if isinstance(root, nn.Module) else ()
    return [module for module in modules if hasattr(module, "init_criterion")]


def accelerate(criterion: Criterion) -> Criterion:
    """Makes fastfocal compute the classification losses of a criterion, or of the one that a model has or makes.

    Args:
        criterion: a criterion of YOLO (v8DetectionLoss and what derives from it, E2ELoss around them) or of RT-DETR
            (RTDETRDetectionLoss), its focal losses alone, or a model, such as a trainer's.

    Returns:
        The same; its losses have changed their class, and those of YOLO their `bce` and `class_weights`, and nothing else.

    Raises:
        ValueError: there is none in it, or one that was subclassed.
    """
    models = _models(criterion)
    for model in models:
        if getattr(model, "criterion", None) is None:
            model.criterion = model.init_criterion()
    for root in [model.criterion for model in models] or [criterion]:
        found = list(_yolo_criteria(root))
        for yolo in found:
            if type(yolo) not in _YOLO and type(yolo) not in _STOCK_YOLO:
                raise ValueError(
                    "criterion: expected ultralytics' v8DetectionLoss or what ultralytics derives from it, found the subclass "
                    f"{type(yolo).__name__}"
                )
        if found:
            for yolo in found:
                _swap_yolo(yolo)
        elif isinstance(root, nn.Module):
            what = "ultralytics' FocalLoss, VarifocalLoss or v8DetectionLoss"
            patching.accelerate(root, _FAST, "criterion", what, around=_AROUND)
        else:
            raise ValueError(
                f"criterion: expected one with ultralytics' v8DetectionLoss, found none in a {type(root).__name__}"
            )
    return criterion


def restore(criterion: Criterion) -> Criterion:
    """Undoes `accelerate`; a model keeps its criterion."""
    for root in [getattr(model, "criterion", None) for model in _models(criterion)] or [criterion]:
        for yolo in _yolo_criteria(root):
            _restore_yolo(yolo)
        if isinstance(root, nn.Module):
            patching.restore(root, {**_FAST, **_AROUND})
    return criterion
