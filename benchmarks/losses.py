"""Each loss of the package beside the focal loss, a copy, and the code of the projects that train with it.

    pip install ".[test]" -r tests/hosts.txt
    python -m benchmarks.losses --out benchmarks/results

The standard case of README.md. "x focal loss" is the ratio of two medians whose rounds alternate, in one process, with the
same kind of targets: labels, or dense ones beside the focal loss's soft targets. Beside the wall's clock stands the processor's
(all threads), which other programs on the machine disturb less. The projects' functions are imported, never copied, and given
their best: flattened and concatenated only where their own heads do so, a dense target made within the call only where they
need one and ours does not. Where no project can be imported, the formula of `fastfocal.reference` stands in.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import MAIN, MEMBERS, Case, Inputs, flatten
from benchmarks.implementations import (
    Call,
    Copy,
    LossFunction,
    Row,
    compiled,
    divide,
    fast,
    fast_call,
    package_reference,
)
from benchmarks.implementations import plain as eager
from benchmarks.machine import describe
from benchmarks.memory import MIB, fix_allocator, peak_extra_bytes, touch_memory

# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """What a loss is to take at the most, times what the focal loss takes with the same kind of targets."""

    loss: str
    targets: str
    times: float


AIMS = (
    Aim("varifocal_loss", "labels", 1.15),
    Aim("quality_focal_loss", "labels", 1.15),
    Aim("matchability_aware_loss", "labels", 1.15),
    Aim("iou_aware_bce_loss", "labels", 1.15),
    Aim("bce_loss", "labels", 1.15),
    Aim("gaussian_focal_loss", "heatmap", 1.3),
    Aim("asymmetric_loss", "labels", 1.5),
    Aim("asymmetric_loss", "multi-hot", 1.5),
    Aim("softmax_focal_loss", "classes", 2.0),
)


def case_of(aim: Aim, dtype: torch.dtype = torch.float32, layout: str = "nchw") -> Case:
    # "save" also for float16, whose gradients are multiplied by a loss scale here
    return Case("losses", MAIN, dtype=dtype, layout=layout, targets=aim.targets, loss=aim.loss)


def all_cases() -> list[Case]:
    return [case_of(aim) for aim in AIMS if aim.loss in MEMBERS]


# --- the projects' code -------------------------------------------------------------------------------------------


def concatenate(case: Case, levels: list[Tensor]) -> Tensor:
    """(N, sum M, K), as the dense heads and every loss over queries have it."""
    return torch.cat([flatten(level, case.pyramid.classes) for level in levels], dim=1)


def dense_scores(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(N, sum M, K): each positive's score at its class, and 1 there. As VFNet's head makes it."""
    assert inputs.scores is not None
    target, one_hot = torch.zeros_like(logits), torch.zeros_like(logits)
    image, anchor = ((inputs.labels >= 0) & (inputs.labels < logits.shape[-1])).nonzero(as_tuple=True)
    at = (image, anchor, inputs.labels[image, anchor])
    target[at] = inputs.scores[image, anchor].to(target.dtype)
    one_hot[at] = 1
    return target, one_hot


def import_mmdet() -> None:
    sys.modules.setdefault("mmcv._ext", MagicMock())  # mmcv-lite has no compiled part, and none of it is called here


def mmdet_varifocal(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    import_mmdet()
    from mmdet.models.losses.varifocal_loss import varifocal_loss

    logits = concatenate(case, levels).flatten(0, 1)
    target, _ = dense_scores(logits.view(*inputs.labels.shape, -1), inputs)
    return divide(varifocal_loss(logits, target.flatten(0, 1), reduction="sum"), case, inputs)


def ultralytics_varifocal(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    from ultralytics.utils.loss import VarifocalLoss

    logits = concatenate(case, levels)
    target, one_hot = dense_scores(logits, inputs)
    return divide(
        VarifocalLoss()(logits, target, one_hot) * logits.shape[1], case, inputs
    )  # it takes the anchors' mean


def mmdet_quality_focal(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    import_mmdet()
    from mmdet.models.losses.gfocal_loss import quality_focal_loss

    assert inputs.scores is not None
    logits = concatenate(case, levels).flatten(0, 1)
    target = (inputs.labels.flatten(), inputs.scores.flatten())
    return divide(quality_focal_loss(logits, target, reduction="sum"), case, inputs)


class Matched:
    """What a DETR's criterion is given beside logits: matches, and boxes whose overlap is the score. Made beforehand."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        assert inputs.scores is not None
        self.positives = inputs.positives
        self.boxes = torch.zeros(*inputs.labels.shape, 4)
        self.boxes[..., :2], self.boxes[..., 3] = 0.5, 1.0
        self.boxes[..., 2] = inputs.scores  # as wide as that, inside of a box of width 1
        self.indices: list[tuple[Tensor, Tensor]] = []
        self.targets: list[dict[str, Tensor]] = []
        for labels in inputs.labels:
            (queries,) = ((labels >= 0) & (labels < case.pyramid.classes)).nonzero(as_tuple=True)
            self.indices.append((queries, torch.arange(len(queries))))
            boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(queries), 1)
            self.targets.append({"class_labels": labels[queries], "labels": labels[queries], "boxes": boxes})


def over_matched(
    loss: Callable[[Case, Tensor, Matched], Tensor],
) -> Callable[[Case, list[Inputs]], LossFunction]:
    def make(case: Case, sets: list[Inputs]) -> LossFunction:
        matched = Matched(case, sets[0])
        return lambda case, levels, _: loss(case, concatenate(case, levels), matched)

    return make


def transformers_matchability(case: Case, logits: Tensor, matched: Matched) -> Tensor:
    from transformers import Deimv2Config
    from transformers.loss.loss_deimv2 import Deimv2Loss

    criterion = Deimv2Loss(Deimv2Config(num_labels=case.pyramid.classes))
    criterion.mal_alpha, criterion.gamma = None, 1.5
    outputs = {"logits": logits, "pred_boxes": matched.boxes}
    found: Tensor = criterion.loss_labels_mal(outputs, matched.targets, matched.indices, matched.positives)["loss_mal"]
    return found


def transformers_iou_aware(case: Case, logits: Tensor, matched: Matched) -> Tensor:
    from transformers.loss.loss_lw_detr import LwDetrImageLoss

    criterion = LwDetrImageLoss(None, case.pyramid.classes, 0.25, ["labels"], 1)
    outputs = {"logits": logits, "pred_boxes": matched.boxes}
    found: Tensor = criterion.loss_labels(outputs, matched.targets, matched.indices, matched.positives)["loss_ce"]
    return found


def rfdetr_iou_aware(case: Case, logits: Tensor, matched: Matched) -> Tensor:
    from rfdetr.models.criterion import SetCriterion

    criterion = SetCriterion(case.pyramid.classes, None, {}, 0.25, ["labels"], ia_bce_loss=True)
    outputs = {"pred_logits": logits, "pred_boxes": matched.boxes}
    given = (outputs, matched.targets, matched.indices, matched.positives)
    found: Tensor = criterion.loss_labels(*given, log=False)["loss_ce"]
    return found


def torch_bce(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    """What ultralytics' v8DetectionLoss calls, as it calls it."""
    logits = concatenate(case, levels)
    target, _ = dense_scores(logits, inputs)
    return divide(torch.nn.BCEWithLogitsLoss(reduction="none")(logits, target).sum(), case, inputs)


def mmdet_gaussian(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    import_mmdet()
    from mmdet.models.losses.gaussian_focal_loss import gaussian_focal_loss

    assert inputs.soft is not None
    pairs = zip(levels, inputs.soft, strict=True)
    sums = [gaussian_focal_loss(x.sigmoid(), y, reduction="sum") for x, y in pairs]
    return divide(torch.stack(sums).sum(), case, inputs)


def timm_asymmetric(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    from timm.loss import AsymmetricLossMultiLabel

    criterion = AsymmetricLossMultiLabel(reduction="sum")
    if inputs.soft is not None:
        sums = [criterion(x, y) for x, y in zip(levels, inputs.soft, strict=True)]
    else:
        logits = concatenate(case, levels)
        sums = [criterion(logits, (inputs.labels.unsqueeze(-1) == torch.arange(logits.shape[-1])).float())]
    return divide(torch.stack(sums).sum(), case, inputs)


def maps_of_classes(case: Case, levels: list[Tensor], inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Each level as (N*A, K, H, W), without a copy, and its labels as (N*A, H, W): what a segmentation's loss takes."""
    a, k = case.pyramid.anchors, case.pyramid.classes
    per_level = inputs.labels.split(case.pyramid.level_anchors, dim=1)
    for x, labels in zip(levels, per_level, strict=True):
        n, _, h, w = x.shape
        yield x.view(n * a, k, h, w), labels.reshape(n, h, w, a).permute(0, 3, 1, 2).reshape(n * a, h, w)


def kornia_softmax(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    from kornia.losses import focal_loss

    sums = [focal_loss(x, y, None, 2.0, "sum") for x, y in maps_of_classes(case, levels, inputs)]
    return divide(torch.stack(sums).sum(), case, inputs)


def monai_softmax(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    from monai.losses import FocalLoss

    criterion = FocalLoss(to_onehot_y=True, use_softmax=True, reduction="none")  # "sum" is one of means over the cells
    sums = [criterion(x, y.unsqueeze(1)).sum() for x, y in maps_of_classes(case, levels, inputs)]
    return divide(torch.stack(sums).sum(), case, inputs)


@dataclass(frozen=True)
class Host:
    """A project's function; `make` is made of a case and its inputs where something is prepared beforehand."""

    name: str
    package: str
    loss: LossFunction | None = None
    make: Callable[[Case, list[Inputs]], LossFunction] | None = None

    def loss_function(self, case: Case, sets: list[Inputs]) -> LossFunction:
        if self.make is not None:
            return self.make(case, sets)
        assert self.loss is not None
        return self.loss


HOSTS: dict[str, tuple[Host, ...]] = {
    "varifocal_loss": (
        Host("mmdet varifocal_loss", "mmdet", mmdet_varifocal),
        Host("ultralytics VarifocalLoss", "ultralytics", ultralytics_varifocal),
    ),
    "quality_focal_loss": (Host("mmdet quality_focal_loss", "mmdet", mmdet_quality_focal),),
    "matchability_aware_loss": (
        Host(
            "transformers Deimv2Loss.loss_labels_mal",
            "transformers",
            make=over_matched(transformers_matchability),
        ),
    ),
    "iou_aware_bce_loss": (
        Host("transformers LwDetrImageLoss.loss_labels", "transformers", make=over_matched(transformers_iou_aware)),
        Host("rfdetr SetCriterion.loss_labels", "rfdetr", make=over_matched(rfdetr_iou_aware)),
    ),
    "bce_loss": (Host("torch BCEWithLogitsLoss, as ultralytics' YOLO calls it", "torch", torch_bce),),
    "gaussian_focal_loss": (Host("mmdet gaussian_focal_loss", "mmdet", mmdet_gaussian),),
    "asymmetric_loss": (Host("timm AsymmetricLossMultiLabel", "timm", timm_asymmetric),),
    "softmax_focal_loss": (
        Host("kornia focal_loss", "kornia", kornia_softmax),
        Host("MONAI FocalLoss", "monai", monai_softmax),
    ),
}
REFERENCE = Host("fastfocal.reference", "torch", package_reference)


def focal_call(case: Case, sets: list[Inputs]) -> Call:
    """The focal loss with the same kind of targets: what a loss's time is compared with."""
    of_focal = replace(case, loss="focal_loss", targets="soft" if case.is_dense else "labels")
    return Call(of_focal, [for_focal_loss(case, inputs) for inputs in sets], fast(of_focal))


def for_focal_loss(case: Case, inputs: Inputs) -> Inputs:
    """The same logits and targets; but where every anchor has a class, as many positives as a detector's focal loss has."""
    labels = inputs.labels
    if case.targets == "classes":
        generator = torch.Generator(labels.device).manual_seed(0)
        kind = torch.rand(labels.shape, generator=generator, device=labels.device)
        labels = torch.where(kind < cases.POSITIVE, labels, case.pyramid.classes)
    return replace(inputs, labels=labels, scores=None)


def rows_of(case: Case) -> list[Row]:
    """fastfocal's own, a copy, and every project's code, eager and compiled; the reference's in place of no project at all."""
    found = [Row("fastfocal", fast_call, memory=4), Row("copy", Copy, memory=4, checked=False)]
    found.append(Row("fastfocal focal_loss", focal_call, memory=4, checked=False))  # test_focal_loss.py checks it
    hosts = HOSTS[case.loss]
    if all(importlib.util.find_spec(host.package) is None for host in hosts):
        hosts = (*hosts, REFERENCE)
    for host in hosts:

        def make(case: Case, sets: list[Inputs], host: Host = host) -> Any:
            return eager(host.loss_function(case, sets))(case, sets)

        def make_compiled(case: Case, sets: list[Inputs], host: Host = host) -> Any:
            # Some of them look at values or at the context, where the graph breaks.
            return compiled(host.loss_function(case, sets), fullgraph=False)(case, sets)

        found.append(Row(host.name, make, memory=80, slow=True, needs=(host.package,)))
        found.append(Row(f"{host.name}, torch.compile", make_compiled, memory=40, slow=True, needs=(host.package,)))
    return found


# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    wall: list[float]
    processor: list[float]

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.wall) * 1e3

    def over(self, other: Times) -> tuple[float, float]:
        """The ratios of the medians, of either clock."""
        return (
            statistics.median(self.wall) / statistics.median(other.wall),
            statistics.median(self.processor) / statistics.median(other.processor),
        )


def alternate(calls: Iterable[Any], rounds: int) -> list[Times]:
    """One call of each in turn, that many times. Each begins by releasing what its last one left."""
    calls = list(calls)
    times = [Times([], []) for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times, strict=True):
            processor, wall = time.process_time(), time.perf_counter()
            call()
            spent.wall.append(time.perf_counter() - wall)
            spent.processor.append(time.process_time() - processor)
            call.release()
    return times


def checked_call(row: Row, case: Case, inputs: Inputs, answer: cases.Answer) -> Any:
    """Made, called once or twice, and right."""
    call = row.make(case, [inputs])
    call()
    loss, gradients = call.result()
    cases.check(row.name, loss, gradients, case, inputs, answer)
    del loss, gradients
    call.release()
    return call


def mib(call: Any, times: int = 1) -> str:
    peaks = []
    for _ in range(times):
        peaks.append(peak_extra_bytes(call, torch.device("cpu")))
        call.release()
    known = [peak for peak in peaks if peak is not None]
    return f"{min(known) / MIB:.0f}" if known else ""


def measure(case: Case, aim: Aim, rounds: int, host_rounds: int, keep: bool, log: Callable[[str], None]) -> None:
    device = torch.device("cpu")
    fix_allocator(case.logit_bytes, keep)
    inputs = cases.draw(case, device)
    ours, _, of_focal, *others = rows_of(case)
    answer = cases.answer(case, inputs)
    call = checked_call(ours, case, inputs, answer)
    focal = of_focal.make(case, [inputs])
    focal()
    focal.release()
    copy = Copy(case, [inputs])
    touch_memory(8 * case.logit_bytes)
    fix_allocator(case.logit_bytes, keep)
    times, of_focal_loss, of_copy = alternate((call, focal, copy), rounds)
    wall, processor = times.over(of_focal_loss)
    said = f"{times.milliseconds:.3g} | {times.over(of_copy)[0]:.2f}"
    verdict = "" if wall <= aim.times else f" (aim {aim.times:g})"
    log(
        f"| `{case.loss}`, {targets_in_words(case)} | {said} | {wall:.2f}{verdict} | {processor:.2f} | {mib(call, 3)} | |"
    )
    for row in others if host_rounds else ():
        label = f"| &nbsp;&nbsp;{row.name}"
        if (missing := row.missing()) is not None:
            log(f"{label}: {missing} is not installed | | | | | |")
            continue
        try:
            other = checked_call(row, case, inputs, answer)
        except AssertionError as error:  # its own arithmetic: said, and not timed
            log(f"{label}: not timed, {error} | | | | | |")
            continue
        fix_allocator(case.logit_bytes, keep)
        beside, again, of_copy = alternate((other, call, copy), host_rounds)
        faster = statistics.median(beside.wall) / statistics.median(again.wall)
        log(f"{label} | {beside.milliseconds:.3g} | {beside.over(of_copy)[0]:.2f} | | | {mib(other)} | {faster:.1f} |")
        del other


def targets_in_words(case: Case) -> str:
    scored = MEMBERS[case.loss].parameters.takes_scores
    return (
        "labels and scores" if scored else {"heatmap": "heatmaps", "multi-hot": "multi-hot"}.get(case.targets, "labels")
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="of a loss beside the focal loss")
    parser.add_argument("--host-rounds", type=int, default=3, help="of a project's code beside ours; 0: leave it out")
    parser.add_argument("--losses", nargs="+", choices=sorted(HOSTS), default=sorted(HOSTS), help="some of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", choices=("nchw", "channels_last", "flattened"), default="nchw")
    parser.add_argument(
        "--keep-memory", action="store_true", help="malloc keeps what is released; default: fresh memory"
    )
    parser.add_argument("--out", type=Path, help="folder for losses.md (losses_kept_memory.md with --keep-memory)")
    arguments = parser.parse_args()
    packages = ("mmdet", "ultralytics", "transformers", "rfdetr", "timm", "kornia", "monai")
    words = [f"--rounds {arguments.rounds}", f"--host-rounds {arguments.host_rounds}"]
    words += [] if arguments.losses == sorted(HOSTS) else ["--losses", *arguments.losses]
    words += [] if arguments.dtype == "float32" else [f"--dtype {arguments.dtype}"]
    words += [] if arguments.layout == "nchw" else [f"--layout {arguments.layout}"]
    words += ["--keep-memory"] if arguments.keep_memory else []
    lines = [
        "# The losses beside the focal loss, and beside the code of the projects that train with them",
        "",
        f"{describe(torch.device('cpu'), *packages)} · `{' '.join(['python -m benchmarks.losses', *words])}`",
        "",
        f"{MAIN.name}, {arguments.dtype}, {arguments.layout}: {MAIN.logits:,} logits. Forward and backward, medians. "
        + ("malloc keeps what is released." if arguments.keep_memory else "Large blocks are fresh memory.")
        + " x focal loss: with the same kind of targets, in turn with it.",
        "",
        "| | ms | x copy | x focal loss | of processor time | peak extra MiB | ours is faster by |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    print(*lines, sep="\n", flush=True)

    def log(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    for aim in AIMS:
        if aim.loss not in arguments.losses:
            continue
        if aim.loss not in MEMBERS:
            log(f"| `{aim.loss}`: not in this version | | | | | | |")
            continue
        case = case_of(aim, getattr(torch, arguments.dtype), arguments.layout)
        measure(case, aim, arguments.rounds, arguments.host_rounds, arguments.keep_memory, log)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = "losses_kept_memory.md" if arguments.keep_memory else "losses.md"
        (arguments.out / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
