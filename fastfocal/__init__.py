"""fastfocal: focal loss and its gradient over every FPN level in one pass, in fused C++ and CUDA kernels.

>>> from fastfocal import FastFocalLoss
>>> criterion = FastFocalLoss(num_classes=80)
>>> loss = criterion(cls_logits, labels)  # every level at once
>>> loss.backward()
"""

from importlib.metadata import version as _version

__version__ = _version("fastfocal")

from fastfocal import reference
from fastfocal.functional import focal_loss, sigmoid_focal_loss
from fastfocal.module import FastFocalLoss
from fastfocal.ops import build_info

__all__ = ["FastFocalLoss", "build_info", "focal_loss", "reference", "sigmoid_focal_loss"]
