"""fastfocal: focal loss and its gradient over every FPN level in one pass, in fused C++ and CUDA kernels.

>>> from fastfocal import FastFocalLoss
>>> criterion = FastFocalLoss(num_classes=80)
>>> loss = criterion(cls_logits, labels)  # every level at once
>>> loss.backward()
"""

import typing as _typing
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path
from pkgutil import extend_path as _extend_path

# In a checkout that was installed with `pip install .`, Python finds this folder first and the compiled module elsewhere.
__path__ = _extend_path(__path__, __name__)
try:
    __version__ = _version("fastfocal")
except _PackageNotFoundError:
    raise ImportError(
        f"fastfocal is not installed: {_Path(__file__).resolve().parent.parent} holds its source alone; "
        "run `pip install .` there"
    ) from None

from fastfocal import losses
from fastfocal import reference as reference
from fastfocal.heads.functions import conv_focal_loss as conv_focal_loss
from fastfocal.heads.functions import conv_focal_loss_star as conv_focal_loss_star
from fastfocal.heads.functions import linear_focal_loss as linear_focal_loss
from fastfocal.heads.functions import linear_focal_loss_star as linear_focal_loss_star
from fastfocal.losses import *  # the functions and modules of every loss
from fastfocal.ops import build_info as build_info
from fastfocal.sigmoid import sigmoid_focal_loss as sigmoid_focal_loss

if not _typing.TYPE_CHECKING:  # as in losses/__init__.py
    __all__ = [
        "build_info",
        "conv_focal_loss",
        "conv_focal_loss_star",
        "linear_focal_loss",
        "linear_focal_loss_star",
        "reference",
        "sigmoid_focal_loss",
        *losses.__all__,
    ]
