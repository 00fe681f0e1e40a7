"""The loss of kuangliu/pytorch-retinanet, over concatenated predictions or the heads' raw outputs.

    from fastfocal.compat.kuangliu import FocalLoss
    criterion = FocalLoss(num_classes=20)
    loss = criterion(loc_preds, loc_targets, cls_preds, cls_targets)

Equivalent to loss.FocalLoss of that repository (2d7c663): smooth L1 over the boxes of positives plus focal loss star (gamma 2,
beta 1, alpha 0.25), both divided by the number of positives. Targets: 0 is background, 1..K are classes, -1 is ignored. Two
things differ, on purpose: a batch without positives is divided by 1 and not by 0, and nothing is printed at every step. A label
that is none of these is an error of the kernels, a ValueError on the CPU. As there, the loss is at least float32: targets are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastfocal
from fastfocal.options import Normalizer


class FocalLoss(nn.Module):
    """Box and classification loss of a RetinaNet with K classes.

    Args:
        num_classes: K.
        star: the classification loss of `forward`: focal loss star, as that repository has it, or the plain focal loss.
    """

    def __init__(self, num_classes: int = 20, star: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.star = star

    def focal_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed focal loss (gamma 2) of logits (M, K) and targets (M,)."""
        return self._classification(x, y, None, star=False)

    def focal_loss_alt(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed focal loss star (gamma 2, beta 1) of logits (M, K) and targets (M,)."""
        return self._classification(x, y, None, star=True)

    def forward(
        self,
        loc_preds: Tensor | Sequence[Tensor],
        loc_targets: Tensor,
        cls_preds: Tensor | Sequence[Tensor],
        cls_targets: Tensor,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            loc_preds: (N, M, 4) over the anchors of all levels; or what the box head gives for each level, (N, A*4, H, W).
            loc_targets: (N, M, 4).
            cls_preds: (N, M, K); or what the classification head gives for each level, (N, A*K, H, W), which are read in
                place and neither permuted nor concatenated.
            cls_targets: (N, M) integers.

        Returns:
            A 0-d tensor, (boxes + classes) / positives.

        Raises:
            ValueError: a label is outside -1..K (on CUDA: a device-side assertion).
        """
        positive = cls_targets > 0  # the classes are 1..K
        count = positive.sum().clamp(min=1)
        boxes = nn.functional.smooth_l1_loss(as_rows(loc_preds, 4)[positive], loc_targets[positive], reduction="sum")
        return boxes / count + self._classification(cls_preds, cls_targets, "positives", self.star)

    def _classification(
        self, logits: Tensor | Sequence[Tensor], labels: Tensor, normalizer: Normalizer, star: bool
    ) -> Tensor:
        function = fastfocal.focal_loss_star if star else fastfocal.focal_loss
        loss = function(
            logits,
            labels,
            num_classes=self.num_classes,
            labels="kuangliu",
            normalizer=normalizer,
        )
        assert isinstance(loss, Tensor)
        return loss


def as_rows(levels: Tensor | Sequence[Tensor], width: int) -> Tensor:
    """(N, A*width, H, W) of every level to (N, M, width), as the network itself would."""
    if isinstance(levels, Tensor):
        return levels
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width)) for x in levels], dim=1)
