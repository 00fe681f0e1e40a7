"""RF-DETR's criterion with its classification loss computed by fastfocal, all decoder layers and groups of queries in one call.

    from fastfocal.compat.rfdetr import accelerate
    module = accelerate(rfdetr.training.RFDETRModelModule(model_config, train_config))     # or a SetCriterion

Final, auxiliary and encoder outputs are the levels of one call, and what is matched are labels: rfdetr makes two dense weights
and some ten tensors more for every layer, or for all of them stacked. Loss dict, boxes' losses, logged numbers and state_dict
stay as they are. `restore` undoes it.

Equivalent to rfdetr.models.criterion.SetCriterion (1.11) with its IoU-aware binary cross entropy (`ia_bce_loss=True`, what it
trains with), its varifocal loss or its focal loss; the position-supervised loss is left to rfdetr. Targets padded to a fixed
size are taken as there. Losses are float32, or float64 for float64 logits.

The boxes' losses are rfdetr's own: of all layers stacked, where it could stack them itself on CUDA, and compiled if it was told
to (`enable_compiled_detection_losses`); else layer by layer.

An object whose label is no class is a ValueError that names image and object (rfdetr: an index out of range).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from rfdetr.models import criterion as host
from rfdetr.models.math import accuracy
from rfdetr.utilities import box_ops
from torch import Tensor, nn

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.conventions import check_classes
from fastfocal.compat.matching import Layer, fit_one_call, labels_and_scores

Module = TypeVar("Module", bound=nn.Module)
Targets = list[dict[str, Tensor]]
Indices = list[tuple[Tensor, Tensor]]


class _Call(NamedTuple):
    """One layer's classification loss, as the criterion asked for it."""

    outputs: dict[str, Any]
    indices: Indices


def _overlap(predicted: Tensor, matched: Tensor) -> Tensor:
    overlap: Tensor = box_ops.elementwise_box_iou(*(box_ops.box_cxcywh_to_xyxy(box) for box in (predicted, matched)))[0]
    return overlap


class FastSetCriterion(host.SetCriterion):  # type: ignore[misc]
    """rfdetr's SetCriterion: the same constructor, arguments and results."""

    _later: list[_Call] | None = None  # while forward runs: the layers whose classification loss is computed at its end

    def forward(
        self, outputs: dict[str, Any], targets: Targets, num_boxes: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """All losses of a step, as rfdetr's.

        Raises:
            ValueError: an object's label is no class (on CUDA: a device-side assertion).
        """
        self._check_objects(outputs["pred_logits"], targets)
        if type(self) is not FastSetCriterion:  # what a subclass does with its losses is not known
            return super().forward(outputs, targets, num_boxes)  # type: ignore[no-any-return]
        if num_boxes is None:
            num_boxes = self.num_boxes_for_targets(outputs, targets)
        num_boxes = torch.as_tensor(num_boxes, dtype=torch.float32, device=outputs["pred_logits"].device)
        calls: list[_Call] = []
        self._later = calls
        try:
            losses: dict[str, Tensor] = super().forward(outputs, targets, num_boxes)
        finally:
            self._later = None
        if calls:
            names = [name for name in losses if name.startswith("loss_ce")]
            losses.update(zip(names, self._classification(calls, targets, num_boxes), strict=True))
        return losses

    def loss_labels(
        self,
        outputs: dict[str, Any],
        targets: Targets,
        indices: Indices,
        num_boxes: Tensor,
        log: bool = True,
        matched_targets: Any = None,
    ) -> dict[str, Tensor]:
        """Classification loss of one layer, and the share of matched queries whose class is not the likeliest.

        Args:
            outputs: "pred_logits" (N, queries, K), "pred_boxes" (N, queries, 4) as centre and size.
            targets: an image each: "labels" (T,), "boxes" (T, 4), and "valid" (T,), which are not padding, if there is any.
            indices: an image each: which queries are matched, and with which targets.
            num_boxes: what the sum is divided by.
            log: whether to give the share.
            matched_targets: what rfdetr has gathered of the targets already; not needed here.

        Raises:
            ValueError: an object's label is no class (on CUDA: a device-side assertion).
        """
        padded = bool(targets) and "valid" in targets[0]
        if self._left_to_rfdetr() or (padded and not self.ia_bce_loss):  # the second is an error of rfdetr's
            given = (outputs, targets, indices, num_boxes, log, matched_targets)
            return super().loss_labels(*given)  # type: ignore[no-any-return]
        call = _Call(outputs, indices)
        if self._later is None:
            self._check_objects(outputs["pred_logits"], targets)
            losses = {"loss_ce": self._classification([call], targets, num_boxes)[0]}
        else:
            self._later.append(call)
            losses = {"loss_ce": outputs["pred_logits"].new_zeros(())}  # its place in the dict
        if log:
            losses["class_error"] = self._class_error(outputs["pred_logits"], targets, indices)
        return losses

    def _left_to_rfdetr(self) -> bool:
        return bool(self.use_position_supervised_loss and not self.ia_bce_loss)

    @staticmethod
    def _check_objects(logits: Tensor, targets: Targets) -> None:
        """Padding may have any label."""
        real = [t["labels"].masked_fill(~t["valid"].bool(), 0) if "valid" in t else t["labels"] for t in targets]
        check_classes("labels", real, logits.shape[-1])

    def _classification(self, calls: Sequence[_Call], targets: Targets, num_boxes: Tensor | float) -> list[Tensor]:
        """The loss of each layer: one call, or one for each layer where they do not fit."""
        ready = [Layer(c.outputs["pred_logits"], self._boxes(c.outputs), c.indices) for c in calls]
        parts = [ready] if fit_one_call(ready) else [[layer] for layer in ready]
        divisor = num_boxes.reshape(()) if isinstance(num_boxes, Tensor) else float(num_boxes)
        losses: list[Tensor] = []
        for layers in parts:
            losses += self._fused(layers, targets, divisor).unbind()
        return losses

    def _boxes(self, outputs: dict[str, Any]) -> Tensor | None:
        boxes: Tensor | None = outputs["pred_boxes"] if self.ia_bce_loss or self.use_varifocal_loss else None
        return boxes

    def _fused(self, layers: Sequence[Layer], targets: Targets, num_boxes: Tensor | float) -> Tensor:
        """(layers,), float32 or float64, which is what rfdetr's quotient with a float32 tensor has too."""
        classes = layers[0].logits.shape[-1]
        # A query matched with padding is one of the unmatched.
        objects = [
            t["labels"].masked_fill(~t["valid"].bool(), classes) if "valid" in t else t["labels"] for t in targets
        ]
        labels, scores = labels_and_scores(layers, objects, [t["boxes"] for t in targets], _overlap)
        logits = [layer.logits for layer in layers]
        if self.ia_bce_loss:
            numbers = {"alpha": self.focal_alpha, "gamma": 2.0}
            found = fastfocal.iou_aware_bce_loss(
                logits, labels, scores=scores, normalizer=num_boxes, reduction="level", **numbers
            )
        elif self.use_varifocal_loss:
            assert scores is not None
            labels = labels.masked_fill(scores <= 0, classes)  # rfdetr: an overlap of 0 is a negative
            numbers = {"alpha": 1.0 - self.focal_alpha, "gamma": 2.0}
            found = fastfocal.varifocal_loss(
                logits, labels, scores=scores, normalizer=num_boxes, reduction="level", **numbers
            )
        else:
            alpha = None if self.focal_alpha < 0 else self.focal_alpha
            found = fastfocal.focal_loss(
                logits, labels, alpha=alpha, gamma=2.0, normalizer=num_boxes, reduction="level"
            )
        assert isinstance(found, Tensor)
        return found

    def _class_error(self, logits: Tensor, targets: Targets, indices: Indices) -> Tensor:
        matched = logits[self._get_src_permutation_idx(indices)]
        labels = torch.cat([target["labels"][found] for target, (_, found) in zip(targets, indices, strict=True)])
        valid = self._matched_valid_mask(targets, indices)
        if valid is None:
            error: Tensor = 100 - accuracy(matched, labels)[0]
            return error
        correct = (matched.argmax(dim=-1) == labels).to(valid.dtype)
        return 100 - 100 * (correct * valid).sum() / valid.sum().clamp(min=1)

    # --- rfdetr's own stack of all layers, for what is not classification ---

    def _can_batch_detection_losses(self, matched_outputs: list[dict[str, Any]], matched_targets: list[Any]) -> bool:
        if self._later is None or not self.ia_bce_loss or self.losses != ["labels", "boxes", "cardinality"]:
            return False

        def of(layer: dict[str, Any], matched: Any) -> tuple[object, ...]:
            kinds = [(t.shape, t.dtype, t.device) for t in (layer["pred_logits"], layer["pred_boxes"])]
            return *kinds, matched.labels.shape

        kinds = {of(*given) for given in zip(matched_outputs, matched_targets, strict=True)}
        return len(matched_outputs) > 1 and len(kinds) == 1

    def _get_batched_detection_losses(
        self,
        matched_outputs: list[dict[str, Any]],
        targets: Targets,
        all_indices: list[Indices],
        matched_targets: list[Any],
        num_boxes: Tensor,
    ) -> list[dict[str, Tensor]]:
        """rfdetr's, on one class in place of K: the largest logit of each query, which the logged cardinality takes."""
        with torch.no_grad():
            one_class = [
                {**layer, "pred_logits": layer["pred_logits"].amax(dim=-1, keepdim=True)} for layer in matched_outputs
            ]
        of_that_class = [matched._replace(labels=torch.zeros_like(matched.labels)) for matched in matched_targets]
        found: list[dict[str, Tensor]] = super()._get_batched_detection_losses(
            one_class, targets, all_indices, of_that_class, num_boxes
        )
        assert self._later is not None
        self._later += [_Call(outputs, indices) for outputs, indices in zip(matched_outputs, all_indices, strict=True)]
        error = self._class_error(matched_outputs[0]["pred_logits"], targets, all_indices[0])
        # In the order of the losses of layers one by one.
        found[0] = {"loss_ce": found[0]["loss_ce"], "class_error": error, **{**found[0], "class_error": error}}
        return found

    def _resolve_batched_detection_losses(self, device: torch.device) -> Callable[..., Any]:
        if not self._compile_batched_detection_losses:
            return host._batched_detection_loss_tensors  # type: ignore[no-any-return]
        return super()._resolve_batched_detection_losses(device)  # type: ignore[no-any-return]


_FAST: patching.Swaps = {host.SetCriterion: FastSetCriterion}


def _check(criterion: Any) -> None:
    if criterion.use_position_supervised_loss and not criterion.ia_bce_loss:
        raise ValueError(
            f"{type(criterion).__name__}.use_position_supervised_loss: expected the IoU-aware binary cross entropy, the "
            "varifocal or the focal loss, got True: the position-supervised loss is rfdetr's alone"
        )


def accelerate(module: Module) -> Module:
    """Makes fastfocal compute the classification loss of every SetCriterion that `module` is or contains.

    Returns:
        The same module; its criteria have changed their class and nothing else.

    Raises:
        ValueError: there is none in it, one that was subclassed, or one with the position-supervised loss.
    """
    return patching.accelerate(module, _FAST, "module", "rfdetr's SetCriterion", _check)


def restore(module: Module) -> Module:
    """Undoes `accelerate`."""
    return patching.restore(module, _FAST)
