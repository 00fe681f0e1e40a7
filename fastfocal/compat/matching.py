"""From what a DETR's matcher found, over all decoder layers, to one table of labels and one of scores.

The layers are the levels of one call: (N, queries, K) each. Groups of queries, as Group DETR has them, are queries like others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastfocal.ops import accumulation_dtype

Overlap = Callable[[Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """What one decoder layer predicts, and what it is matched with."""

    logits: Tensor  # (N, queries, K)
    boxes: Tensor | None  # (N, queries, 4); None where the loss takes no scores
    matches: Sequence[tuple[Tensor, Tensor]]  # for each image: queries, and the objects that these are matched with


def fit_one_call(layers: Sequence[Layer]) -> bool:
    """Whether they may be the levels of one call: images, classes, dtype and device are those of the first."""

    def of(layer: Layer) -> tuple[object, ...]:
        logits = layer.logits
        return logits.dim(), logits.shape[0], logits.shape[-1], logits.dtype, logits.device, layer.boxes is None

    return all(of(layer) == of(layers[0]) for layer in layers)


def labels_and_scores(
    layers: Sequence[Layer], classes: Sequence[Tensor], boxes: Sequence[Tensor], overlap: Overlap
) -> tuple[Tensor, Tensor | None]:
    """Labels and scores (N, queries of all layers): the matched objects' class and their overlap; K and 0 elsewhere.

    Args:
        layers: of the same N and K, on one device.
        classes: for each image ``(objects,)``, integers in 0..K-1.
        boxes: for each image ``(objects, 4)``, as the layers' boxes are.
        overlap: from predicted boxes (n, 4) and matched ones (n, 4) to scores (n,).
    """
    logits = layers[0].logits
    images, device = logits.shape[0], logits.device
    queries = [layer.logits.shape[1] for layer in layers]
    total = sum(queries)
    first_query = [0, *accumulate(queries)]
    first_object = [0, *accumulate(len(of_image) for of_image in classes)]
    labels = torch.full((images * total,), logits.shape[-1], dtype=torch.int64, device=device)
    with_scores = layers[0].boxes is not None
    scores = torch.zeros(images * total, dtype=accumulation_dtype(logits.dtype), device=device) if with_scores else None

    # Matchers give indices on the host, denoising queries have theirs on the device: each kind goes over at once.
    found: dict[torch.device, list[tuple[Tensor, Tensor, int, int]]] = {}
    for layer, first in zip(layers, first_query, strict=False):
        for image, (matched, objects) in enumerate(layer.matches):
            found.setdefault(matched.device, []).append((matched, objects, image * total + first, first_object[image]))
    rows, targets = [], []
    for place, parts in found.items():
        lengths = torch.tensor([len(matched) for matched, *_ in parts])
        shifts = torch.tensor([shift for *_, shift in parts]), torch.tensor([shift for *_, shift, _ in parts])
        by_object, by_row = (shift.repeat_interleave(lengths).to(place) for shift in shifts)
        rows.append((torch.cat([matched for matched, *_ in parts]) + by_row).to(device))
        targets.append((torch.cat([objects for _, objects, *_ in parts]) + by_object).to(device))
    if rows:
        row, target = (index[0] if len(index) == 1 else torch.cat(index) for index in (rows, targets))
        labels[row] = torch.cat(tuple(classes))[target].to(labels.dtype)
        if scores is not None:
            predicted = torch.cat([layer.boxes.detach() for layer in layers if layer.boxes is not None], dim=1)
            with torch.no_grad():
                scores[row] = overlap(predicted.view(-1, 4)[row], torch.cat(tuple(boxes))[target]).to(scores.dtype)
    return labels.view(images, total), None if scores is None else scores.view(images, total)


def corners(boxes: Tensor) -> Tensor:
    """(n, 4) of centre and size to those of two corners."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=1)


def intersection_over_union(predicted: Tensor, matched: Tensor) -> Tensor:
    """Of each pair of boxes (n, 4), centre and size; float32, or float64 for float64 boxes."""
    a, b = (corners(box.to(accumulation_dtype(box.dtype))) for box in (predicted, matched))
    inside = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    areas = [(box[:, 2:] - box[:, :2]).prod(dim=1) for box in (a, b)]
    return inside / (areas[0] + areas[1] - inside)
