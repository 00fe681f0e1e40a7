"""The modules. They live in fastfocal.losses; this import path stays, which modules that were saved whole name."""

from fastfocal.losses.focal import FastFocalLoss
from fastfocal.losses.focal_star import FastFocalLossStar

__all__ = ["FastFocalLoss", "FastFocalLossStar"]
