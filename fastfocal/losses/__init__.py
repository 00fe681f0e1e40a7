"""The losses, one file each. A new one is imported here, has its public names in `__all__` and its row in `LOSSES`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fastfocal.losses.focal import FastFocalLoss, FocalLoss, focal_loss
from fastfocal.losses.focal_star import FastFocalLossStar, FocalLossStar, focal_loss_star
from fastfocal.losses.loss import Loss, Module
from fastfocal.losses.softmax_focal import FastSoftmaxFocalLoss, SoftmaxFocalLoss, softmax_focal_loss

__all__ = [
    "FastFocalLoss",
    "FastFocalLossStar",
    "FastSoftmaxFocalLoss",
    "focal_loss",
    "focal_loss_star",
    "softmax_focal_loss",
]


class Member(NamedTuple):
    """A loss: the reference makes its own function and module of it."""

    parameters: type[Loss]
    function: Callable[..., Any]
    module: type[Module]


LOSSES = (
    Member(FocalLoss, focal_loss, FastFocalLoss),
    Member(FocalLossStar, focal_loss_star, FastFocalLossStar),
    Member(SoftmaxFocalLoss, softmax_focal_loss, FastSoftmaxFocalLoss),
)
