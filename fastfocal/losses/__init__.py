"""The losses, one file each. A new one is a row here: it imports the file's `__all__`, a function and a module."""

import typing as _typing

from fastfocal.losses.asymmetric import *
from fastfocal.losses.bce import *
from fastfocal.losses.focal import *
from fastfocal.losses.focal_star import *
from fastfocal.losses.gaussian_focal import *
from fastfocal.losses.iou_aware_bce import *
from fastfocal.losses.loss import Member as Member
from fastfocal.losses.loss import members_of as _members_of
from fastfocal.losses.matchability_aware import *
from fastfocal.losses.quality_focal import *
from fastfocal.losses.softmax_focal import *
from fastfocal.losses.varifocal import *

LOSSES: tuple[Member, ...] = _members_of(globals())  # in the order of their numbers

# Type checkers follow the imports; of a list that is computed they would make an empty one.
if not _typing.TYPE_CHECKING:
    __all__ = sorted(name for member in LOSSES for name in (member.function.__name__, member.module.__name__))
