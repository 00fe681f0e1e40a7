"""What hosts share: their label conventions, and the way from an anchor matcher's result to labels.

fastfocal's own convention is background K, ignored -1; detectron2's and mmdet's too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -1


class Convention(NamedTuple):
    """The labels that are no class."""

    background: int
    ignored: int


# effdet and apex: classes 0..K-1, background -1, ignored -2
NEGATIVE_BACKGROUND = Convention(background=-1, ignored=-2)
# kuangliu/pytorch-retinanet: classes 1..K, background 0, ignored -1
ZERO_BACKGROUND = Convention(background=0, ignored=-1)


def labels_of_matches(
    matches: Sequence[Tensor], classes: Sequence[Tensor], num_classes: int, ignored: int | None = None
) -> Tensor:
    """(N, M) int64 labels of all anchors.

    Args:
        matches: for each image ``(M,)``, the index of the object that the anchor is matched to; negative for none.
        classes: for each image ``(objects,)``, the class 0..K-1 of every object; there may be none.
        num_classes: K, which is the label of background.
        ignored: the match that means neither object nor background; None where the host has no such thing.
    """
    rows = []
    for match, of_object in zip(matches, classes, strict=True):
        row = torch.full_like(match, num_classes)
        if len(of_object) > 0:
            row = torch.where(match >= 0, of_object[match.clamp(min=0)], row)
        rows.append(row if ignored is None else row.masked_fill(match == ignored, IGNORED))
    return torch.stack(rows)
