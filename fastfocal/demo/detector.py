"""A small RetinaNet: backbone, feature pyramid (FPN) with three levels, heads shared by the levels. Plain torch.

Layouts are RetinaNet's: a level's class logits are ``(N, A*K, H, W)`` with channel ``a*K + k``, its box offsets
``(N, A*4, H, W)``, and its anchors come in the order h, w, a. A label of ``K`` is background, ``-1`` is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16)
ANCHOR_SCALES = (4.25, 6.0)  # anchor height / stride: two steps per octave
ANCHOR_RATIOS = (0.45, 0.75)  # width / height: handwritten digits are taller than wide
NUM_ANCHORS = len(ANCHOR_SCALES) * len(ANCHOR_RATIOS)
POSITIVE, NEGATIVE = 0.6, 0.4  # an anchor with an IoU of at least / below this is foreground / background
PRIOR = 0.01  # probability of foreground that every logit starts from (RetinaNet, section 4.1)
BOX_STD = (0.1, 0.1, 0.2, 0.2)  # brings the box targets to about unit size


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Detector(nn.Module):
    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32, 2)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(conv_bn(32, 64), nn.MaxPool2d(2), conv_bn(64, 64)),
                nn.Sequential(nn.MaxPool2d(2), conv_bn(64, 96)),
                nn.Sequential(nn.MaxPool2d(2), conv_bn(96, 128)),
            ]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in (64, 96, 128))
        self.smooth = nn.ModuleList(conv_bn(width, width) for _ in STRIDES)
        # One convolution each, shared by the levels. RetinaNet has five; one learns in the few steps there are here.
        self.class_head = nn.Conv2d(width, NUM_ANCHORS * num_classes, 3, padding=1)
        self.box_head = nn.Conv2d(width, NUM_ANCHORS * 4, 3, padding=1)
        for head in (self.class_head, self.box_head):
            nn.init.normal_(head.weight, std=0.01)
            assert head.bias is not None
            nn.init.zeros_(head.bias)
        assert self.class_head.bias is not None
        nn.init.constant_(self.class_head.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``(N, 3, S, S)`` in [0, 1] -> class logits and box offsets, each a list with one tensor per level."""
        x = self.stem(images * 4 - 2)
        features = []
        for stage, lateral in zip(self.stages, self.lateral, strict=False):
            x = stage(x)
            features.append(lateral(x))
        for level in range(len(features) - 2, -1, -1):  # the top-down path
            features[level] = features[level] + F.interpolate(features[level + 1], scale_factor=2.0, mode="nearest")
        features = [smooth(f) for smooth, f in zip(self.smooth, features, strict=False)]
        return [self.class_head(f) for f in features], [self.box_head(f) for f in features]


def make_anchors(size: int) -> list[Tensor]:
    """Per level the anchors ``(H*W*A, 4)`` of a ``size`` x ``size`` image, x1 y1 x2 y2, in the order h, w, a."""
    levels = []
    for stride in STRIDES:
        shapes = torch.tensor([(s * stride * r, s * stride) for s in ANCHOR_SCALES for r in ANCHOR_RATIOS])  # [A, 2]
        line = (torch.arange(size // stride) + 0.5) * stride
        centres = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 1, 2)  # [H*W, 1, 2]
        levels.append(torch.cat([centres - shapes / 2, centres + shapes / 2], -1).reshape(-1, 4))
    return levels


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """``[I, 4]``, ``[J, 4]`` -> ``[I, J]``."""
    overlap = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    shared = overlap.clamp(min=0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return shared / (area_a[:, None] + area_b[None, :] - shared)


def encode(anchors: Tensor, boxes: Tensor) -> Tensor:
    size, box_size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (anchors[:, :2] + anchors[:, 2:]) / 2
    shift = ((boxes[:, :2] + boxes[:, 2:]) / 2 - shift) / size
    return torch.cat([shift, (box_size / size).log()], -1) / anchors.new_tensor(BOX_STD)


def decode(anchors: Tensor, offsets: Tensor) -> Tensor:
    offsets = offsets * anchors.new_tensor(BOX_STD)
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + offsets[:, :2] * size
    half = size * offsets[:, 2:].clamp(-2, 2).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def match(anchors: Tensor, boxes: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels ``[M]`` and box targets ``[M, 4]`` of one image.

    IoU of ``POSITIVE`` with a true box: its class. Below ``NEGATIVE`` with all of them: background (``num_classes``).
    Between: -1, ignored. The best anchors of a true box take its class in any case, so that no box goes without.
    """
    if len(boxes) == 0:
        return anchors.new_full((len(anchors),), num_classes, dtype=torch.long), torch.zeros_like(anchors)
    iou = box_iou(anchors, boxes)
    best, which = iou.max(1)
    labels = classes[which]
    labels[best < POSITIVE] = -1
    labels[best < NEGATIVE] = num_classes
    anchor, box = (iou >= iou.max(0).values - 1e-6).nonzero(as_tuple=True)
    labels[anchor], which[anchor] = classes[box], box
    return labels, encode(anchors, boxes[which])


def box_loss(offsets: Sequence[Tensor], targets: Tensor, labels: Tensor, num_classes: int) -> list[Tensor]:
    """Smooth L1 of the positive anchors, summed per level and divided by the number of positives of all levels."""
    positive = (labels >= 0) & (labels < num_classes)
    count = positive.sum().clamp(min=1)
    losses, start = [], 0
    for x in offsets:
        n, _, h, w = x.shape
        part = slice(start, start + h * w * NUM_ANCHORS)
        start = part.stop
        x = x.view(n, NUM_ANCHORS, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
        loss = F.smooth_l1_loss(x, targets[:, part], reduction="none", beta=0.5)
        losses.append((loss * positive[:, part, None]).sum() / count)
    return losses


def nms(boxes: Tensor, threshold: float = 0.4) -> list[int]:
    """Indices kept of ``boxes``, which come best first."""
    iou, kept = box_iou(boxes, boxes), []
    alive = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if alive[i]:
            kept.append(i)
            alive &= iou[i] <= threshold
    return kept


@torch.no_grad()
def detect(
    model: Detector, images: Tensor, anchors: Tensor, threshold: float = 0.3, limit: int = 100
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes ``[D, 4]``, classes ``[D]`` and scores ``[D]`` per image, on the CPU, best first."""
    training = model.training
    model.eval()
    class_logits, offsets = model(images)
    model.train(training)

    def flat(levels: list[Tensor], depth: int) -> Tensor:
        n = len(images)
        return torch.cat(
            [x.reshape(n, NUM_ANCHORS, depth, -1).permute(0, 3, 1, 2).reshape(n, -1, depth) for x in levels], 1
        )

    num_classes = class_logits[0].shape[1] // NUM_ANCHORS
    scores, classes = flat(class_logits, num_classes).sigmoid().max(-1)
    results = []
    for score, label, offset in zip(scores, classes, flat(offsets, 4), strict=False):
        # One digit has one class, so suppression goes over all classes together.
        score, order = score.sort(descending=True)
        order = order[: min(limit, int((score >= threshold).sum()))]
        boxes = decode(anchors[order], offset[order]).clamp(0, images.shape[-1]).cpu()
        keep = nms(boxes)
        results.append((boxes[keep], label[order].cpu()[keep], score[: len(order)].cpu()[keep]))
    return results
