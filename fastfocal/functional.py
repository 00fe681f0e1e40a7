"""Focal loss as functions. They live in fastfocal.losses; this import path stays."""

from typing import Any

from fastfocal.checks import Levels
from fastfocal.losses.focal import FocalLossOptions, focal_loss
from fastfocal.losses.focal_star import FocalLossStarOptions, focal_loss_star
from fastfocal.options import CommonOptions as Options
from fastfocal.options import GradMode, Labels, Normalizer, Reduced
from fastfocal.sigmoid import entropy_dtype, sigmoid_focal_loss

__all__ = [
    "FocalLossOptions", "FocalLossStarOptions", "GradMode", "Labels", "Levels", "Normalizer", "Options", "Reduced",
    "entropy_dtype", "focal_loss", "focal_loss_star", "sigmoid_focal_loss",
]  # fmt: skip


class _Checked(tuple[Any, ...]):
    """What a module of version 0.1.0 had checked, within a module that was saved whole; it is dropped and checked anew."""

    def __new__(cls, *values: Any) -> "_Checked":
        return super().__new__(cls, values)


Formula = Settings = _Checked  # the names they were saved by
