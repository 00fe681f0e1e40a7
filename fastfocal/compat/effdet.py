"""effdet's DetectionLoss with its classification loss computed by fastfocal.

    from fastfocal.compat.effdet import accelerate
    bench = accelerate(effdet.DetBenchTrain(model))

effdet loops over the levels: each is permuted, cast to float32, one-hot encoded, and passed over several times. Here the head's
outputs of all levels go to one call, which reads them in place. Box loss, total and state_dict stay as they are. `restore`
undoes it.

Equivalent to effdet.loss.loss_fn (0.4.1), its focal loss with label smoothing and its "legacy" one: classes 0..K-1, background
-1, ignored -2, all levels divided by the number of positives + 1; all three losses are float32 for outputs of any dtype.

Objects' classes, in the target that a DetBenchTrain labels anchors with, are 1..K, and negative for padding. Others are a
ValueError that names image and object: effdet takes 0 for background silently, and has an error of an index for K + 1.
"""

from __future__ import annotations

from typing import Any, TypeVar

import effdet.bench
import effdet.loss
import torch
from torch import Tensor, nn

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.conventions import check_classes

Model = TypeVar("Model", bound=nn.Module)


class FastDetectionLoss(effdet.loss.DetectionLoss):  # type: ignore[misc]
    """effdet.loss.DetectionLoss: the same constructor, arguments and results."""

    def forward(
        self,
        cls_outputs: list[Tensor],
        box_outputs: list[Tensor],
        cls_targets: list[Tensor],
        box_targets: list[Tensor],
        num_positives: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Total, classification and box loss.

        Args:
            cls_outputs: (N, A*K, H, W) a level.
            box_outputs: (N, A*4, H, W) a level.
            cls_targets: (N, H, W, A) integers a level.
            box_targets: (N, H, W, A*4) a level.
            num_positives: of each image; any shape.
        """
        divisor = (num_positives.sum() + 1.0).float()
        cls_loss = fastfocal.focal_loss(
            cls_outputs,
            cls_targets,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            labels="effdet",
            label_smoothing=0.0 if self.legacy_focal else self.label_smoothing,
            normalizer=divisor,
        )
        assert isinstance(cls_loss, Tensor)
        cls_loss = cls_loss.float()
        boxes = [
            effdet.loss._box_loss(outputs.permute(0, 2, 3, 1).float(), targets, divisor, delta=self.delta)
            for outputs, targets in zip(box_outputs, box_targets, strict=True)
        ]
        box_loss = torch.stack(boxes).sum()
        return cls_loss + self.box_loss_weight * box_loss, cls_loss, box_loss


class CheckedDetBenchTrain(effdet.bench.DetBenchTrain):  # type: ignore[misc]
    """effdet.DetBenchTrain; `forward` checks the objects' classes first, where it is the bench that labels the anchors."""

    def forward(self, x: Tensor, target: dict[str, Any]) -> dict[str, Tensor]:
        if self.anchor_labeler is not None:
            padding_is_legal = [classes.masked_fill(classes < 0, 1) for classes in target["cls"]]
            check_classes('target["cls"]', padding_is_legal, self.num_classes, first=1)
        losses: dict[str, Tensor] = super().forward(x, target)
        return losses


_FAST: patching.Swaps = {effdet.loss.DetectionLoss: FastDetectionLoss}
_AROUND: patching.Swaps = {effdet.bench.DetBenchTrain: CheckedDetBenchTrain}


def accelerate(model: Model) -> Model:
    """Makes fastfocal compute the classification loss of every effdet DetectionLoss inside `model`, such as a DetBenchTrain.

    Returns:
        The same model; its losses, and a DetBenchTrain around them, have changed their class and nothing else.

    Raises:
        ValueError: no DetectionLoss of effdet is in it, or one is that was subclassed.
    """
    return patching.accelerate(model, _FAST, "model", "effdet's DetectionLoss", around=_AROUND)


def restore(model: Model) -> Model:
    """Undoes `accelerate`."""
    return patching.restore(model, {**_FAST, **_AROUND})
