"""Calls as users write them, for type checkers alone: lines marked `# error` must be refused, all others accepted."""

from torch import Tensor

import fastfocal
from fastfocal import FastFocalLoss, FastFocalLossStar, focal_loss, focal_loss_star


def right(x: Tensor, xs: list[Tensor], y: Tensor, ys: list[Tensor]) -> None:
    focal_loss(xs, y, num_classes=80).backward()
    focal_loss(x, ys, num_classes=80, alpha=[0.5] * 80, gamma=1.5, labels="torchvision").backward()
    focal_loss(xs, ys, reduction="level", weight=ys, level_weights=[1.0, 2.0]).sum().backward()
    focal_loss(xs, ys, reduction="mean", label_smoothing=0.1, detach_modulating_factor=True).item()
    focal_loss(x, y, reduction="none").sum().backward()
    for part in focal_loss(xs, y, reduction="none", normalizer=None):
        part.sum().backward()
    focal_loss_star(xs, y, beta=1.0, normalizer=x, grad_mode="inplace").backward()
    loss: Tensor = FastFocalLoss(80, alpha=None, normalizer="positives_per_image")(xs, ys)
    loss.backward()
    FastFocalLossStar(20, beta=0.0, background_index=0)(xs, ys).backward()
    FastFocalLoss(80, sync_normalizer=True, process_group=None, ema_momentum=0.9, ema_start=300)(xs, ys).backward()
    fastfocal.sigmoid_focal_loss(x, y, reduction="sum").backward()


def wrong(x: Tensor, xs: list[Tensor], y: Tensor) -> None:
    focal_loss(xs, y, reduction="batchmean")  # error
    focal_loss(xs, y, reduction="none").backward()  # error
    focal_loss(xs, y, grad_mode="fast")  # error
    focal_loss(xs, y, labels="coco")  # error
    focal_loss(xs, y, normalizer="boxes")  # error
    focal_loss(xs, y, beta=1.0)  # error
    focal_loss(xs, y, gama=2.0)  # error
    focal_loss(xs, y, gamma="2")  # error
    focal_loss([1.0], y)  # error
    focal_loss_star(xs, y, label_smoothing=0.1)  # error
    FastFocalLoss(num_classes="80")  # error
    FastFocalLoss(80, reduction="batchmean")  # error
    FastFocalLoss(80, sync_normalizer="yes")  # error
    FastFocalLoss(80, process_group="gloo")  # error
    focal_loss(xs, y, ema_momentum=0.9)  # error
    FastFocalLoss()  # error
