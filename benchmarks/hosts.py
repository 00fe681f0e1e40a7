"""What fastfocal.compat gains in each host: time and memory of the host's own loss and of the swapped one.

    pip install ".[test]" -r tests/hosts.txt
    python -m benchmarks.hosts --out benchmarks/results
    python -m benchmarks.hosts --calls --out benchmarks/results      # counts of the DETRs' criteria instead of times

detectron2 is not on PyPI: a checkout of it on PYTHONPATH.
A row is one loss with its backward, down to the gradients of what the network gives. Both are run in turn, in one process;
medians. malloc is as it is: were large blocks mapped afresh for both, as in the other benchmarks, the hosts' losses, which
allocate many times as much, would take two to four times as long (kornia's 286 ms instead of 64, ours 4.8 instead of 2.0).
torchvision's RetinaNet has a whole training run of its own, in torchvision_training.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import detr
from benchmarks.machine import describe
from benchmarks.memory import MIB, peak_extra_bytes

Step = Callable[[], Any]
CELLS = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4))  # P3-P7 of 512x512


def levels(images: int, channels: int, cells: tuple[tuple[int, int], ...]) -> list[Tensor]:
    return [(torch.randn(images, channels, h, w) - 3).requires_grad_() for h, w in cells]


def labels(shape: tuple[int, ...], classes: int, background: int, first: int = 0) -> Tensor:
    """Half a percent of the anchors is positive."""
    return torch.where(torch.rand(shape) < 0.005, torch.randint(first, first + classes, shape), background)


def step(leaves: list[Tensor], loss: Callable[..., Tensor], *given: Any) -> Step:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*given).backward()

    return run


def effdet() -> Iterator[tuple[str, Step, Step]]:
    from effdet.loss import DetectionLoss

    from fastfocal.compat.effdet import FastDetectionLoss

    classes, anchors, images = 90, 9, 2
    logits, boxes = levels(images, anchors * classes, CELLS), levels(images, anchors * 4, CELLS)
    targets = [labels((images, h, w, anchors), classes, -1) for h, w in CELLS]
    box_targets = [torch.randn(*t.shape, 4).mul((t >= 0).unsqueeze(-1)).flatten(3) for t in targets]
    positives = torch.tensor([float((t >= 0).sum()) for t in targets]).sum()
    numbers = {"alpha": 0.25, "gamma": 1.5, "delta": 0.1, "box_loss_weight": 50.0, "label_smoothing": 0.0}
    config = SimpleNamespace(num_classes=classes, legacy_focal=False, jit_loss=False, **numbers)

    def total(criterion: nn.Module) -> Tensor:
        loss: Tensor = criterion(logits, boxes, targets, box_targets, positives)[0]
        return loss

    theirs, ours = (step([*logits, *boxes], total, loss(config)) for loss in (DetectionLoss, FastDetectionLoss))
    yield f"effdet DetectionLoss, 512x512, N={images}, A={anchors}, K={classes}", theirs, ours


def kuangliu() -> Iterator[tuple[str, Step, Step]]:
    from fastfocal.compat.kuangliu import FocalLoss, as_rows

    cells, classes, images = ((75, 75), (38, 38), (19, 19), (10, 10), (5, 5)), 20, 2
    logits = levels(images, 9 * classes, cells)
    targets = torch.cat([labels((images, h * w * 9), classes, 0, first=1) for h, w in cells], 1)

    def formula() -> Tensor:  # with today's one-hot: the repository itself needs a PyTorch of 2017
        x = as_rows(logits, classes)
        t = nn.functional.one_hot(targets, classes + 1)[..., 1:].float()
        x_t = x * (2 * t - 1)
        weight = 0.25 * t + 0.75 * (1 - t)
        return (-weight * (2 * x_t + 1).sigmoid().log() / 2).sum()

    theirs, ours = step(logits, formula), step(logits, FocalLoss(classes).focal_loss_alt, logits, targets)
    yield f"kuangliu FocalLoss (classes), 600x600, N={images}, A=9, K={classes}", theirs, ours


BOXES = ((30.0, 40.0, 200.0, 240.0), (220.0, 60.0, 480.0, 500.0), (10.0, 300.0, 90.0, 380.0))  # of every image


def detectron2() -> Iterator[tuple[str, Step, Step]]:
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import Backbone
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch.retinanet import RetinaNet
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from fastfocal.compat.detectron2 import accelerate

    classes, images = 80, 2
    strides = [512 // h for h, _ in CELLS]

    class Nothing(Backbone):  # the head's outputs are given
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {}

        def output_shape(self) -> dict[str, ShapeSpec]:
            return {}

    logits, deltas = levels(images, 9 * classes, CELLS), levels(images, 9 * 4, CELLS)
    instances = Instances((512, 512), gt_boxes=Boxes(torch.tensor(BOXES)), gt_classes=torch.tensor([1, 40, 79]))
    sizes = [[4 * stride * 2 ** (i / 3) for i in range(3)] for stride in strides]
    found = []
    for swap in (lambda model: model, accelerate):
        model = RetinaNet(
            backbone=Nothing(),
            head=nn.Identity(),
            head_in_features=[],
            anchor_generator=DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=strides),
            box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
            anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
            num_classes=classes,
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
        )

        def total(model: nn.Module) -> Tensor:
            with EventStorage():
                losses = model.forward_training(None, logits, (logits, deltas), [instances] * images)  # type: ignore[operator]
            return torch.stack(list(losses.values())).sum()

        found.append(step([*logits, *deltas], total, swap(model)))
    yield f"detectron2 RetinaNet, all losses and matching, 512x512, N={images}, A=9, K={classes}", found[0], found[1]


def mmdet() -> Iterator[tuple[str, Step, Step]]:
    from unittest.mock import MagicMock

    sys.modules.setdefault("mmcv._ext", MagicMock())  # mmcv-lite has no compiled part, and none of it is called here
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    from fastfocal.compat.mmdet import accelerate

    register_all_modules()
    classes, images = 80, 2
    assigner = {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": 0.5,
        "neg_iou_thr": 0.4,
        "min_pos_iou": 0,
        "ignore_iof_thr": -1,
    }
    anchors = {
        "octave_base_scale": 4,
        "scales_per_octave": 3,
        "ratios": [0.5, 1.0, 2.0],
        "strides": [512 // h for h, _ in CELLS],
    }
    config = ConfigDict(
        type="RetinaHead",
        num_classes=classes,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        loss_cls={"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
        anchor_generator={"type": "AnchorGenerator", **anchors},
        train_cfg={"assigner": assigner, "sampler": {"type": "PseudoSampler"}, "allowed_border": -1, "pos_weight": -1},
    )
    logits, deltas = levels(images, 9 * classes, CELLS), levels(images, 9 * 4, CELLS)
    objects = [InstanceData(bboxes=torch.tensor(BOXES), labels=torch.tensor([1, 40, 79]))] * images
    metas = [{"img_shape": (512, 512), "pad_shape": (512, 512)}] * images

    def total(head: nn.Module) -> Tensor:
        losses = head.loss_by_feat(logits, deltas, objects, metas)  # type: ignore[operator]
        return torch.stack([*losses["loss_cls"], *losses["loss_bbox"]]).sum()

    theirs, ours = (
        step([*logits, *deltas], total, h) for h in (MODELS.build(config), accelerate(MODELS.build(config)))
    )
    yield f"mmdet RetinaHead, all losses and matching, 512x512, N={images}, A=9, K={classes}", theirs, ours

    from mmdet.models.losses import QualityFocalLoss, VarifocalLoss

    from fastfocal.compat.mmdet import FastQualityFocalLoss, FastVarifocalLoss

    rows = images * sum(h * w for h, w in CELLS)
    pred, label = (torch.randn(rows, classes) - 3).requires_grad_(), labels((rows,), classes, classes)
    score = torch.rand(rows) * (label < classes)
    dense = nn.functional.one_hot(label, classes + 1)[:, :classes] * score.unsqueeze(1)
    for stock, fast, target in (
        (QualityFocalLoss, FastQualityFocalLoss, (label, score)),
        (VarifocalLoss, FastVarifocalLoss, dense),
    ):
        theirs, ours = (step([pred], kind(), pred, target) for kind in (stock, fast))
        yield f"mmdet {stock.__name__}, the function alone, 512x512, N={images}, A=1, K={classes}", theirs, ours


def transformers() -> Iterator[tuple[str, Step, Step]]:
    from transformers.loss.loss_for_object_detection import sigmoid_focal_loss

    from fastfocal.compat.transformers import mean_focal_loss

    for queries in (300, 13294):
        logits = (torch.randn(2, queries, 91) - 3).requires_grad_()
        targets = (torch.rand(2, queries, 91) < 1e-3).float()
        theirs, ours = (step([logits], f, logits, targets, 12.0) for f in (sigmoid_focal_loss, mean_focal_loss))
        yield f"transformers sigmoid_focal_loss, N=2, {queries} queries, K=91", theirs, ours

    yield from classification_of(detr.transformers)


def classification_of(host: Callable[[], Iterator[detr.Case]]) -> Iterator[tuple[str, Step, Step]]:
    """The classification losses of all decoder layers, the matches given; or the whole criterion."""
    for found in host():
        if found.stock_alone is None or found.our_alone is None:
            yield f"{found.name}, whole criterion", *(step(found.leaves, s) for s in (found.stock, found.ours))
        else:
            yield f"{found.name}, classes", *(step(found.leaves, s) for s in (found.stock_alone, found.our_alone))


def rfdetr() -> Iterator[tuple[str, Step, Step]]:
    yield from classification_of(detr.rfdetr)


def torchvision() -> Iterator[tuple[str, Step, Step]]:
    from torchvision.ops import sigmoid_focal_loss

    import fastfocal

    shape = (2, 9 * sum(h * w for h, w in CELLS), 91)
    logits, targets = (torch.randn(shape) - 3).requires_grad_(), (torch.rand(shape) < 5e-5).float()
    functions = (sigmoid_focal_loss, fastfocal.sigmoid_focal_loss)
    theirs, ours = (step([logits], f, logits, targets, 0.25, 2.0, "sum") for f in functions)
    yield "torchvision sigmoid_focal_loss, the function alone, 512x512, N=2, A=9, K=91", theirs, ours


def segmentation() -> Iterator[tuple[str, Step, Step]]:
    from kornia.losses import binary_focal_loss_with_logits
    from monai.losses import FocalLoss as MonaiFocalLoss
    from segmentation_models_pytorch.losses import FocalLoss

    import fastfocal

    classes = 21
    logits, labels = (torch.randn(4, classes, 256, 256) - 1).requires_grad_(), torch.randint(classes, (4, 256, 256))
    masks = (torch.rand_like(logits) < 0.1).float()
    options = {"num_classes": classes, "reduction": "mean"}
    case = f"N=4, K={classes}, 256x256"
    theirs = step([logits], FocalLoss("multiclass", alpha=0.25), logits, labels)
    yield (
        f"segmentation-models-pytorch FocalLoss, multiclass, {case}",
        theirs,
        step([logits], lambda: fastfocal.focal_loss(logits, labels, **options)),
    )
    theirs = step([logits], lambda: binary_focal_loss_with_logits(logits, masks, 0.25, 2.0, "mean"))
    yield (
        f"kornia binary_focal_loss_with_logits, {case}",
        theirs,
        step([logits], lambda: fastfocal.sigmoid_focal_loss(logits, masks, reduction="mean")),
    )
    theirs = step([logits], MonaiFocalLoss(to_onehot_y=True), logits, labels.unsqueeze(1))
    yield (
        f"MONAI FocalLoss, {case}",
        theirs,
        step([logits], lambda: fastfocal.focal_loss(logits, labels, alpha=None, **options)),
    )


def ultralytics() -> Iterator[tuple[str, Step, Step]]:
    from ultralytics.utils.loss import FocalLoss, VarifocalLoss

    from fastfocal.compat.ultralytics import FastFocalLoss, FastVarifocalLoss

    logits = (torch.randn(4, 300, 80) - 3).requires_grad_()
    one_hot = nn.functional.one_hot(labels((4, 300), 80, 80), 81)[..., :-1]
    score = torch.rand(4, 300, 1) * one_hot
    theirs, ours = (step([logits], loss(), logits, one_hot.float()) for loss in (FocalLoss, FastFocalLoss))
    yield "ultralytics FocalLoss, N=4, 300 queries, K=80", theirs, ours
    theirs, ours = (step([logits], loss(), logits, score, one_hot) for loss in (VarifocalLoss, FastVarifocalLoss))
    yield "ultralytics VarifocalLoss, N=4, 300 queries, K=80", theirs, ours
    yield from classification_of(detr.ultralytics)

    from fastfocal.compat.ultralytics import SummedBCE

    logits = (torch.randn(4, 8400, 80) - 5).requires_grad_()
    table = nn.functional.one_hot(labels((4, 8400), 80, 80), 81)[..., :-1] * torch.rand(4, 8400, 1)
    entropy = nn.BCEWithLogitsLoss(reduction="none")
    theirs, ours = step([logits], lambda: entropy(logits, table).sum()), step([logits], SummedBCE(), logits, table)
    yield "ultralytics v8DetectionLoss's entropy, 640x640, N=4, K=80", theirs, ours


def timm() -> Iterator[tuple[str, Step, Step]]:
    from timm.loss import AsymmetricLossMultiLabel

    from fastfocal.compat.timm import FastAsymmetricLossMultiLabel

    logits, multi_hot = (torch.randn(64, 9605) - 3).requires_grad_(), (torch.rand(64, 9605) < 1e-3).float()
    kinds = (AsymmetricLossMultiLabel, FastAsymmetricLossMultiLabel)
    theirs, ours = (step([logits], kind(), logits, multi_hot) for kind in kinds)
    yield "timm AsymmetricLossMultiLabel, N=64, K=9605", theirs, ours


def measure(steps: tuple[Step, Step], seconds: float) -> tuple[list[float], list[float]]:
    """Medians in seconds, and peak extra MiB."""
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + seconds
    for run in steps:
        run()
    while time.perf_counter() < until or len(times[0]) < 5:
        for run, spent in zip(steps, times, strict=True):
            started = time.perf_counter()
            run()
            spent.append(time.perf_counter() - started)
    memory = [(peak_extra_bytes(run, torch.device("cpu")) or 0) / MIB for run in steps]
    return [statistics.median(t) for t in times], memory


def write_calls(out: Path | None) -> None:
    packages = describe(torch.device("cpu"), "transformers", "rfdetr", "ultralytics")
    lines = [
        "# Operator calls and autograd nodes of the DETRs' criteria, stock and swapped",
        "",
        f"{packages} · `python -m benchmarks.hosts --calls`",
        "",
        f"{detr.IMAGES} images of {detr.OBJECTS} objects. Calls are of forward and backward, without views.",
        "",
    ]
    for line in detr.table():
        lines.append(line)
        print(line, flush=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "hosts_calls.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--calls", action="store_true", help="counts of the DETRs' criteria, in hosts_calls.md")
    parser.add_argument("--out", type=Path, help="folder for hosts.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.calls:
        write_calls(arguments.out)
        return
    packages = ("torchvision", "detectron2", "mmdet", "effdet", "transformers", "rfdetr", "ultralytics", "timm")
    segmenters = ("segmentation-models-pytorch", "kornia", "monai")
    lines = [
        "# fastfocal.compat: loss and backward, the host's own and the swapped one",
        "",
        f"{describe(torch.device('cpu'), *packages, *segmenters)} · "
        f"`python -m benchmarks.hosts --seconds {arguments.seconds:g}`",
        "",
        "| | host | fastfocal | faster | peak extra memory |",
        "|---|--:|--:|--:|--:|",
    ]
    hosts = (torchvision, detectron2, mmdet, effdet, kuangliu, transformers, rfdetr, ultralytics, timm, segmentation)
    for rows in hosts:
        package = {kuangliu: "torch", segmentation: "monai"}.get(rows, rows.__name__)
        if importlib.util.find_spec(package) is None:
            lines.append(f"| {rows.__name__}: not installed | | | | |")
            continue
        for name, theirs, ours in rows():
            (slow, fast), (much, little) = measure((theirs, ours), arguments.seconds)
            lines.append(
                f"| {name} | {slow * 1e3:.3g} ms | {fast * 1e3:.3g} ms | {slow / fast:.1f} | {much:.0f} MiB, {little:.0f} MiB |"
            )
            print(lines[-1])
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "hosts.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
