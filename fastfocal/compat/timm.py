"""timm's asymmetric loss of multi-label heads, computed by fastfocal.

    from fastfocal.compat.timm import FastAsymmetricLossMultiLabel, accelerate
    criterion = FastAsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)       # or accelerate(criterion)

Equivalent to timm.loss.AsymmetricLossMultiLabel (1.0.31) on multi-hot targets: the loss, float32 for logits of any dtype, and
its gradient, through the focusing weights or not (`disable_torch_grad_focal_loss`). Two things differ. timm clamps
probabilities at 1e-8 before the logarithm, beyond which a positive (logits under -18.4) has a constant loss and next to no
gradient, and so has a negative without `clip` (float32: from 17); here they have theirs. And a target between 0 and 1 is an
error: timm's exponent is then a mixture, which is no member here. `smoothing`, which makes such targets, is left to timm.

`restore` undoes `accelerate`. AsymmetricLossSingleLabel is a loss of softmax with smoothed labels, and is not here.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

import fastfocal
from fastfocal.compat import patching
from fastfocal.compat.conventions import require

Module = TypeVar("Module", bound=nn.Module)


class FastAsymmetricLossMultiLabel(AsymmetricLossMultiLabel):  # type: ignore[misc]
    """timm's AsymmetricLossMultiLabel: the same constructor, arguments and result."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            x: logits (N, K).
            y: multi-hot targets (N, K), of any dtype.

        Returns:
            float32: 0-d, or (N, K) with reduction "none".

        Raises:
            ValueError: a target that is neither 0 nor 1 (on CUDA: a device-side assertion).
        """
        if self.smoothing:
            loss: Tensor = super().forward(x, y)
            return loss
        if y.is_floating_point():
            require(((y == 0) | (y == 1)).all(), "y: expected targets 0 or 1, got others")
        else:
            y = y.to(x.dtype)
        each = self.reduction == "none"
        divisor = {"batchmean": len(x), "mean": x.numel()}.get(self.reduction)
        nothing = divisor == 0
        loss = fastfocal.asymmetric_loss(
            x.float() if each else x,
            y.float() if each else y,
            gamma_pos=float(self.gamma_pos),
            gamma_neg=float(self.gamma_neg),
            clip=float(self.clip or 0.0),
            detach_modulating_factor=self.disable_torch_grad_focal_loss,
            class_weight=self._class_weight(x.shape[-1]),
            normalizer=None if divisor is None or nothing else float(divisor),
            reduction="none" if each else "sum",
        )
        assert isinstance(loss, Tensor)
        return loss.float() * float("nan") if nothing else loss.float()  # the mean of nothing

    def _class_weight(self, classes: int) -> Tensor | None:
        """(2, K): of positives and of negatives."""
        if self.weight is None and self.pos_weight is None:
            return None
        buffer = self.weight if self.weight is not None else self.pos_weight
        rows = torch.ones(2, classes, dtype=torch.float32, device=buffer.device)
        if self.weight is not None:
            rows = rows * self.weight
        if self.pos_weight is not None:
            rows = torch.stack([rows[0] * self.pos_weight, rows[1]])
        return rows


_FAST: patching.Swaps = {AsymmetricLossMultiLabel: FastAsymmetricLossMultiLabel}


def accelerate(module: Module) -> Module:
    """Makes fastfocal compute every AsymmetricLossMultiLabel that `module` is or contains.

    Returns:
        The same module; its losses have changed their class and nothing else.

    Raises:
        ValueError: there is none in it, or one that was subclassed.
    """
    return patching.accelerate(module, _FAST, "module", "timm's AsymmetricLossMultiLabel")


def restore(module: Module) -> Module:
    """Undoes `accelerate`."""
    return patching.restore(module, _FAST)
