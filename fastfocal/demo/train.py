"""Trains the detector, with the class loss left open: that is the only thing the two trainings differ in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .detector import Detector, box_iou, box_loss, detect, make_anchors, match
from .scenes import NUM_CLASSES, SIZE, Scene, SceneMaker

ClassLoss = Callable[[Sequence[Tensor], Tensor], Tensor]  # (class logits of every level, labels (N, sum M)) -> scalar

BATCH = 8
LEARNING_RATE = 2e-3
BOX_WEIGHT = 0.2


def plain_level_losses(class_logits: Sequence[Tensor], labels: Tensor, num_classes: int) -> list[Tensor]:
    """The focal loss of each level as it is usually written: permute, one-hot, elementwise steps, sum."""
    positives = ((labels >= 0) & (labels < num_classes)).sum().clamp(min=1)
    losses, start = [], 0
    for x in class_logits:
        n, channels, h, w = x.shape
        x = x.view(n, channels // num_classes, num_classes, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, num_classes)
        y = labels[:, start : start + x.shape[1]]
        start += x.shape[1]
        target = (y[..., None] == torch.arange(num_classes, device=y.device)).to(x.dtype)
        p = torch.sigmoid(x)
        p_t = p * target + (1 - p) * (1 - target)
        alpha_t = 0.25 * target + 0.75 * (1 - target)
        loss = alpha_t * (1 - p_t) ** 2 * F.binary_cross_entropy_with_logits(x, target, reduction="none")
        losses.append(torch.where(y < 0, 0.0, loss.sum(-1)).sum() / positives)
    return losses


def plain_loss(num_classes: int) -> ClassLoss:
    return lambda class_logits, labels: torch.stack(plain_level_losses(class_logits, labels, num_classes)).sum()


def plain_loss_in_float64(num_classes: int) -> ClassLoss:
    """The same loss with other rounding: shows how far rounding alone drives two trainings apart."""
    plain = plain_loss(num_classes)
    return lambda class_logits, labels: plain([x.double() for x in class_logits], labels).float()


@dataclass
class Batch:
    images: Tensor  # (N, 3, S, S), [0, 1]
    labels: Tensor  # (N, sum M)
    box_targets: Tensor  # (N, sum M, 4)


class Data:
    """Training scenes, composed and matched once, so that both trainings see the same tensors in the same order."""

    def __init__(self, seed: int, steps: int, device: torch.device, scenes: int = 1200, progress: bool = True) -> None:
        self.device = device
        anchors = torch.cat(make_anchors(SIZE))
        maker = SceneMaker(seed)
        images, labels, box_targets = [], [], []
        for i in tqdm(range(min(scenes, steps * BATCH)), desc="composing scenes", disable=not progress, leave=False):
            scene = maker(i)
            images.append(torch.from_numpy(scene.image).permute(2, 0, 1))
            y, b = match(anchors, torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels), NUM_CLASSES)
            labels.append(y)
            box_targets.append(b)
        self.images, self.labels = torch.stack(images), torch.stack(labels)
        self.box_targets = torch.stack(box_targets)
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps * BATCH // len(images))
        self.order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])

    def batch(self, step: int) -> Batch:
        i = self.order[step * BATCH : (step + 1) * BATCH]
        images = self.images[i].to(self.device).float() / 255
        return Batch(images, self.labels[i].to(self.device), self.box_targets[i].to(self.device))


@dataclass
class Trained:
    model: Detector
    curve: Tensor  # [steps], the class loss of each step


def new_model(seed: int, device: torch.device) -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Detector(NUM_CLASSES).to(device)


def train(
    class_loss: ClassLoss,
    data: Data,
    seed: int,
    steps: int,
    name: str,
    progress: bool = True,
) -> Trained:
    """``name``: of the progress bar."""
    model = new_model(seed, data.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    warmup = max(1, steps // 10)

    def rate(step: int) -> float:  # linear warm-up, then half a cosine
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    curve = []
    bar = tqdm(range(steps), desc=name, disable=not progress, unit="step")
    for step in bar:
        batch = data.batch(step)
        class_logits, offsets = model(batch.images)
        class_part = class_loss(class_logits, batch.labels)
        box_part = torch.stack(box_loss(offsets, batch.box_targets, batch.labels, NUM_CLASSES)).sum()
        optimizer.zero_grad()
        (class_part + BOX_WEIGHT * box_part).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        curve.append(class_part.detach())
        if step % 10 == 9:  # reading the loss waits for the device, so not in every step
            bar.set_postfix_str(f"loss {class_part.item():.3f}")
    return Trained(model, torch.stack(curve).cpu())


@dataclass
class Score:
    recall: float  # share of the true boxes found: right class, IoU >= 0.5, each by its own detection
    precision: float  # share of the detections that found one


Detection = tuple[Tensor, Tensor, Tensor]  # boxes [D, 4], classes [D], scores [D]


def evaluate(
    model: Detector, scenes: Sequence[Scene], device: torch.device, name: str, progress: bool = True
) -> tuple[Score, list[Detection]]:
    """``name``: of the progress bar."""
    anchors = torch.cat(make_anchors(SIZE)).to(device)
    detections: list[Detection] = []
    for start in tqdm(range(0, len(scenes), 25), desc=name, disable=not progress, leave=False):
        images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in scenes[start : start + 25]])
        detections += detect(model, images.to(device).float() / 255, anchors)
    correct = sum(int(found(scene, d).sum()) for scene, d in zip(scenes, detections, strict=False))
    total = sum(len(scene.labels) for scene in scenes)
    return Score(correct / max(1, total), correct / max(1, sum(len(d[0]) for d in detections))), detections


def found(scene: Scene, detection: Detection) -> Tensor:
    """``[T, D]``, true where detection d is the one that finds true box t. Detections come best first."""
    boxes, classes, _ = detection
    truth = torch.from_numpy(scene.boxes)
    right = (box_iou(truth, boxes) >= 0.5) & (torch.from_numpy(scene.labels)[:, None] == classes)
    taken = torch.zeros_like(right)
    for d in range(len(boxes)):
        for t in right[:, d].nonzero().flatten().tolist():
            if not taken[t].any():
                taken[t, d] = True
                break
    return taken
