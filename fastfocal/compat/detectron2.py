"""detectron2's RetinaNet and FCOS with their classification loss computed by fastfocal.

    from fastfocal.compat.detectron2 import accelerate
    model = accelerate(build_model(cfg))

In training the head's raw outputs of every level go to one call; detectron2 transposes all levels, concatenates them, and makes
a dense target. Loss dict, the logged number of positives, state_dict and inference stay as they are. The running mean of the
number of positives, which divides the losses, stays on the device. `restore` undoes it. With `fuse_head=True` the head's last
convolution and the loss are one, and training makes no logits.

Equivalent to RetinaNet.losses and FCOS.losses of detectron2.modeling.meta_arch (02b5c4e): background K, ignored -1 (RetinaNet
alone), normalizer `0.9 * before + 0.1 * max(positives, 1)`, which starts at 100 (RetinaNet) or 300 (FCOS). The classification
loss is float32 for logits of any dtype, as fvcore computes it. Unlike there, an object whose class is outside 0..K-1 is a
ValueError that names it: detectron2 silently takes K for background. -1 in RetinaNet stays what it is there, an object whose
anchors are ignored.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch import fcos, retinanet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from fastfocal.compat import fused_head, patching
from fastfocal.compat.conventions import IGNORED, check_classes

Model = TypeVar("Model", bound=nn.Module)


def _running_mean(model: Any, positives: Tensor, initial: float) -> Tensor:
    """DenseDetector._ema_update on the device: a 0-d float64 tensor, kept where detectron2 keeps its number."""
    before = getattr(model, "loss_normalizer", initial)
    model.loss_normalizer = 0.9 * before + 0.1 * positives.clamp(min=1).double()
    return torch.as_tensor(model.loss_normalizer)


def _log_positives(positives: Tensor, images: int) -> None:
    """What detectron2 logs; it waits for the device, so it comes after everything else."""
    get_event_storage().put_scalar("num_pos_anchors", positives.item() / images)


def _classification_loss(model: Any, logits: list[Tensor], labels: Tensor, normalizer: Tensor) -> Tensor:
    loss = fused_head.focal_loss(
        logits,
        labels,
        num_classes=model.num_classes,
        alpha=model.focal_loss_alpha,
        gamma=model.focal_loss_gamma,
        normalizer=normalizer,
    )
    return loss.float()


def _over(loss: Tensor, normalizer: Tensor) -> Tensor:
    """Their quotient in the loss' dtype, as detectron2's division by a Python number has it; the normalizer is float64."""
    return (loss / normalizer).to(loss.dtype)


class FastRetinaNet(retinanet.RetinaNet):  # type: ignore[misc]
    """detectron2's RetinaNet; only `forward_training` differs."""

    def forward_training(self, images: Any, features: Any, predictions: Any, gt_instances: Any) -> dict[str, Tensor]:
        classes = [x.gt_classes for x in gt_instances]
        check_classes("gt_classes", classes, self.num_classes, ignored=IGNORED)
        logits, deltas = predictions
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        labels = torch.stack(gt_labels)
        positive = (labels >= 0) & (labels != self.num_classes)
        count = positive.sum()
        normalizer = _running_mean(self, count, 100.0)
        boxes = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            [permute_to_N_HWA_K(x, 4) for x in deltas],
            gt_boxes,
            positive,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        losses = {
            "loss_cls": _classification_loss(self, logits, labels, normalizer),
            "loss_box_reg": _over(boxes, normalizer),
        }
        _log_positives(count, len(gt_labels))
        return losses


class FastFCOS(fcos.FCOS):  # type: ignore[misc]
    """detectron2's FCOS; only `forward_training` differs."""

    def forward_training(self, images: Any, features: Any, predictions: Any, gt_instances: Any) -> dict[str, Tensor]:
        check_classes("gt_classes", [x.gt_classes for x in gt_instances], self.num_classes)
        logits, deltas, centerness = predictions
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        labels = torch.stack(gt_labels)
        positive = labels != self.num_classes
        count = positive.sum()
        normalizer = _running_mean(self, count, 300.0)
        boxes = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            [permute_to_N_HWA_K(x, 4) for x in deltas],
            gt_boxes,
            positive,
            box_reg_loss_type="giou",
        )
        centers = torch.cat([permute_to_N_HWA_K(x, 1) for x in centerness], dim=1).squeeze(dim=2)
        center = nn.functional.binary_cross_entropy_with_logits(
            centers[positive], self.compute_ctrness_targets(anchors, gt_boxes)[positive], reduction="sum"
        )
        losses = {
            "loss_fcos_cls": _classification_loss(self, logits, labels, normalizer),
            "loss_fcos_loc": _over(boxes, normalizer),
            "loss_fcos_ctr": _over(center, normalizer),
        }
        _log_positives(count, len(gt_labels))
        return losses


_FAST: patching.Swaps = {retinanet.RetinaNet: FastRetinaNet, fcos.FCOS: FastFCOS}


def _last_layer(module: nn.Module) -> str:
    return "head.cls_score"


def accelerate(model: Model, *, fuse_head: bool = False) -> Model:
    """Makes fastfocal compute the classification loss of every RetinaNet and FCOS that `model` is or contains.

    Args:
        model: contains one.
        fuse_head: whether in training the head's last convolution is computed together with the loss, in tiles, so that no
            logits are made: for hundreds of classes and more. What reads them in training all the same (a hook on the head, a
            `losses` that is called with them) gets them, and a warning. Calling it again with the other value switches.

    Returns:
        The same model; its detectors (and with `fuse_head` their last convolutions) have changed their class and nothing else.

    Raises:
        ValueError: neither is in it, or one is that was subclassed; with `fuse_head`, a `head.cls_score` that is not PyTorch's
            own convolution (detectron2's, which has a norm and an activation, is another).
    """
    last_layer = _last_layer if fuse_head else None
    return patching.accelerate(model, _FAST, "model", "detectron2's RetinaNet or FCOS", last_layer=last_layer)


def restore(model: Model) -> Model:
    """Undoes `accelerate`; the running mean goes on as a number."""
    for module in model.modules():
        mean = getattr(module, "loss_normalizer", None)
        if type(module) in _FAST.values() and isinstance(mean, Tensor):
            module.loss_normalizer = mean.item()  # type: ignore[assignment]
    return patching.restore(model, _FAST)
