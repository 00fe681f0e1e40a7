"""The losses, one file each. A new one is imported here, has its public names in `__all__` and its row in `LOSSES`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fastfocal.losses.asymmetric import AsymmetricLoss, FastAsymmetricLoss, asymmetric_loss
from fastfocal.losses.bce import BCELoss, FastBCELoss, bce_loss
from fastfocal.losses.focal import FastFocalLoss, FocalLoss, focal_loss
from fastfocal.losses.focal_star import FastFocalLossStar, FocalLossStar, focal_loss_star
from fastfocal.losses.gaussian_focal import FastGaussianFocalLoss, GaussianFocalLoss, gaussian_focal_loss
from fastfocal.losses.iou_aware_bce import FastIoUAwareBCELoss, IoUAwareBCELoss, iou_aware_bce_loss
from fastfocal.losses.loss import Loss, Module
from fastfocal.losses.matchability_aware import (
    FastMatchabilityAwareLoss,
    MatchabilityAwareLoss,
    matchability_aware_loss,
)
from fastfocal.losses.quality_focal import FastQualityFocalLoss, QualityFocalLoss, quality_focal_loss
from fastfocal.losses.softmax_focal import FastSoftmaxFocalLoss, SoftmaxFocalLoss, softmax_focal_loss
from fastfocal.losses.varifocal import FastVarifocalLoss, VarifocalLoss, varifocal_loss

__all__ = [
    "FastAsymmetricLoss",
    "FastBCELoss",
    "FastFocalLoss",
    "FastFocalLossStar",
    "FastGaussianFocalLoss",
    "FastIoUAwareBCELoss",
    "FastMatchabilityAwareLoss",
    "FastQualityFocalLoss",
    "FastSoftmaxFocalLoss",
    "FastVarifocalLoss",
    "asymmetric_loss",
    "bce_loss",
    "focal_loss",
    "focal_loss_star",
    "gaussian_focal_loss",
    "iou_aware_bce_loss",
    "matchability_aware_loss",
    "quality_focal_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]


class Member(NamedTuple):
    """A loss: the reference makes its own function and module of it."""

    parameters: type[Loss]
    function: Callable[..., Any]
    module: type[Module]


LOSSES = (
    Member(FocalLoss, focal_loss, FastFocalLoss),
    Member(FocalLossStar, focal_loss_star, FastFocalLossStar),
    Member(VarifocalLoss, varifocal_loss, FastVarifocalLoss),
    Member(QualityFocalLoss, quality_focal_loss, FastQualityFocalLoss),
    Member(MatchabilityAwareLoss, matchability_aware_loss, FastMatchabilityAwareLoss),
    Member(IoUAwareBCELoss, iou_aware_bce_loss, FastIoUAwareBCELoss),
    Member(BCELoss, bce_loss, FastBCELoss),
    Member(GaussianFocalLoss, gaussian_focal_loss, FastGaussianFocalLoss),
    Member(AsymmetricLoss, asymmetric_loss, FastAsymmetricLoss),
    Member(SoftmaxFocalLoss, softmax_focal_loss, FastSoftmaxFocalLoss),
)
