"""The DETRs' criteria on made-up outputs of the sizes that they train with: what benchmarks.hosts times and counts.

A criterion gets the outputs of all decoder layers, with denoising queries and the encoder's where it has them, and objects of
four images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

IMAGES, OBJECTS = 4, 8
Step = Callable[[], Tensor]  # the forward of a step: its loss


class Case(NamedTuple):
    """One criterion: a step of the stock one and of ours, with all losses, and with the classification loss alone."""

    name: str
    stock: Step
    ours: Step
    stock_alone: Step | None  # with the matches given; None where the criterion has no such switch
    our_alone: Step | None
    leaves: list[Tensor]


def layer(queries: int, classes: int, names: tuple[str, str] = ("logits", "pred_boxes")) -> dict[str, Any]:
    logits = (torch.randn(IMAGES, queries, classes) - 3).requires_grad_()
    boxes = (0.2 + 0.3 * torch.rand(IMAGES, queries, 4)).requires_grad_()
    return dict(zip(names, (logits, boxes), strict=True))


def objects(classes: int, name: str = "class_labels") -> list[dict[str, Tensor]]:
    return [
        {name: torch.randint(classes, (OBJECTS,)), "boxes": 0.2 + 0.3 * torch.rand(OBJECTS, 4)} for _ in range(IMAGES)
    ]


def tensors(outputs: Any) -> list[Tensor]:
    """Those that need a gradient, in nested outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.requires_grad else []
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (list, tuple)) else ()
    found = {id(t): t for value in values for t in tensors(value)}
    return list(found.values())


class Remembered(nn.Module):
    """A matcher that answers what it was asked before, in that order, so that a step is without it."""

    def __init__(self, matcher: nn.Module) -> None:
        super().__init__()
        self.matcher, self.answers, self.next = matcher, [], 0  # type: ignore[var-annotated]

    def forward(self, *given: Any, **options: Any) -> Any:
        if self.next == len(self.answers):
            self.answers.append(self.matcher(*given, **options))
        self.next += 1
        return self.answers[self.next - 1]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([loss.sum().float() for loss in losses.values() if loss.requires_grad]).sum()


def case(
    name: str,
    make: Callable[[], Any],
    outputs: Any,
    targets: Any,
    classification: list[str],
    swap: Callable[[Any], Any],
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Case:
    def step(criterion: Any, alone: bool, within: Callable[[], AbstractContextManager[object]]) -> Step:
        if alone:
            criterion.losses = classification
            criterion.matcher = Remembered(criterion.matcher)

        def run() -> Tensor:
            if alone:
                criterion.matcher.next = 0
            with within():
                return total(criterion(outputs, targets))

        return run

    steps = [
        step(criterion, alone, within)
        for alone in (False, True)
        for criterion, within in ((make(), nullcontext), (swap(make()), context))
    ]
    return Case(name, *steps, tensors(outputs))


def transformers() -> Iterator[Case]:
    from transformers import Deimv2Config, RTDetrConfig
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
    from transformers.loss.loss_deimv2 import Deimv2Loss
    from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
    from transformers.loss.loss_rt_detr import RTDetrLoss

    from fastfocal.compat.transformers import fused_functions

    classes, groups = 80, 5

    def with_denoising() -> dict[str, Any]:
        """300 queries of six layers and the encoder, and as many layers of 200 denoising queries."""
        outputs = layer(300, classes)
        outputs["auxiliary_outputs"] = [layer(300, classes) for _ in range(6)]
        outputs["dn_auxiliary_outputs"] = [layer(200, classes) for _ in range(6)]
        within = 2 * OBJECTS * torch.arange(groups).view(-1, 1) + torch.arange(OBJECTS)
        outputs["denoising_meta_values"] = {"dn_positive_idx": [within.flatten()] * IMAGES, "dn_num_group": groups}
        return outputs

    def unchanged(criterion: Any) -> Any:
        return criterion

    for name, kind, config, classification in (
        ("RT-DETR, D-FINE", RTDetrLoss, RTDetrConfig, "vfl"),
        ("DEIMv2", Deimv2Loss, Deimv2Config, "mal"),
    ):

        def make(kind: Any = kind, config: Any = config, classification: str = classification) -> Any:
            criterion = kind(config(num_labels=classes))
            criterion.losses = [classification, "boxes"]
            return criterion

        given = with_denoising(), objects(classes), [classification], unchanged, fused_functions
        yield case(f"transformers {name}: 7 layers of 300 queries, 6 of 200, K={classes}", make, *given)

    def lw_detr() -> Any:
        return LwDetrImageLoss(LwDetrHungarianMatcher(), 91, 0.25, ["labels", "boxes", "cardinality"], group_detr=13)

    outputs = layer(3900, 91)
    outputs["auxiliary_outputs"] = [layer(3900, 91) for _ in range(2)]
    outputs["enc_outputs"] = layer(3900, 91)
    name = "transformers LW-DETR, RF-DETR: 4 layers of 13 groups of 300 queries, K=91"
    yield case(name, lw_detr, outputs, objects(91), ["labels"], unchanged, fused_functions)

    def deformable() -> Any:
        matcher = DeformableDetrHungarianMatcher()
        return DeformableDetrImageLoss(matcher, 91, 0.25, ["labels", "boxes", "cardinality"])

    outputs = layer(300, 91)
    outputs["auxiliary_outputs"] = [layer(300, 91) for _ in range(5)]
    name = "transformers Deformable DETR: 6 layers of 300 queries, K=91"
    yield case(name, deformable, outputs, objects(91), ["labels"], unchanged, fused_functions)

    def grounding() -> Any:
        return GroundingDinoImageLoss(GroundingDinoHungarianMatcher(), 0.25, ["labels", "boxes", "cardinality"])

    tokens, phrases = 256, 20
    outputs = layer(900, tokens)
    outputs["auxiliary_outputs"] = [layer(900, tokens) for _ in range(5)]
    maps = torch.zeros(phrases, tokens)
    maps[torch.arange(2 * phrases) // 2, torch.arange(2 * phrases)] = 1
    mask = (torch.arange(tokens) < 60).expand(IMAGES, 900, tokens).contiguous()
    for one in (outputs, *outputs["auxiliary_outputs"]):
        one.update(text_mask=mask, label_maps=[maps] * IMAGES)
    name = "transformers Grounding DINO: 6 layers of 900 queries, 60 of 256 tokens"
    yield case(name, grounding, outputs, objects(phrases), ["labels"], unchanged, fused_functions)


def rfdetr() -> Iterator[Case]:
    """rfdetr layer by layer, and as it stacks all layers (which it does on CUDA, and compiled)."""
    from rfdetr.models.criterion import SetCriterion
    from rfdetr.models.matcher import HungarianMatcher

    from fastfocal.compat.rfdetr import accelerate

    classes, queries = 91, 3900

    class Stacked(SetCriterion):  # type: ignore[misc]
        """As rfdetr is on CUDA, but not compiled."""

        def _can_batch_detection_losses(self, *given: Any) -> bool:
            return True

    def make(kind: type[nn.Module] = SetCriterion) -> Any:
        losses = ["labels", "boxes", "cardinality"]
        return kind(classes, HungarianMatcher(), {}, 0.25, losses, group_detr=13, ia_bce_loss=True)

    names = ("pred_logits", "pred_boxes")
    outputs = layer(queries, classes, names)
    outputs["aux_outputs"] = [layer(queries, classes, names) for _ in range(2)]
    outputs["enc_outputs"] = layer(queries, classes, names)
    targets = objects(classes, "labels")
    for name, stock, alone in (("layer by layer", SetCriterion, True), ("layers stacked, eager", Stacked, False)):
        theirs = case("", lambda stock=stock: make(stock), outputs, targets, ["labels"], lambda criterion: criterion)
        ours = case("", make, outputs, targets, ["labels"], accelerate)
        found = Case(
            f"rfdetr SetCriterion, {name}: 4 layers of 13 groups of 300 queries, K={classes}",
            theirs.stock,
            ours.ours,
            theirs.stock_alone if alone else None,
            ours.our_alone if alone else None,
            ours.leaves,
        )
        yield found


def ultralytics() -> Iterator[Case]:
    from ultralytics.models.utils.loss import RTDETRDetectionLoss

    from fastfocal.compat.ultralytics import accelerate

    classes = 80
    boxes = (0.2 + 0.3 * torch.rand(7, IMAGES, 300, 4)).requires_grad_()
    logits = (torch.randn(7, IMAGES, 300, classes) - 3).requires_grad_()
    batch = {
        "cls": torch.randint(classes, (IMAGES * OBJECTS,)),
        "bboxes": 0.2 + 0.3 * torch.rand(IMAGES * OBJECTS, 4),
        "gt_groups": [OBJECTS] * IMAGES,
    }

    def make() -> Any:
        return RTDETRDetectionLoss(nc=classes, use_vfl=True)

    found = case(
        f"ultralytics RT-DETR: 7 layers of 300 queries, K={classes}", make, (boxes, logits), batch, [], accelerate
    )
    yield found._replace(stock_alone=None, our_alone=None)


# --- counts -----------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Operators that autograd has called, or backward; views, which start nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


def count(step: Step, leaves: list[Tensor]) -> tuple[int, int]:
    """Operator calls of forward and backward, and nodes of autograd's graph without the leaves' own."""
    torch.autograd.grad(step(), leaves, allow_unused=True)  # what is made once, and the matches
    with Calls() as calls:
        loss = step()
        seen: set[Any] = set()
        todo = [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        torch.autograd.grad(loss, leaves, allow_unused=True)
    return calls.count, sum(type(node).__name__ != "AccumulateGrad" for node in seen)


def table() -> Iterator[str]:
    """Lines of Markdown, one for each criterion as it is done."""
    yield "| criterion, forward and backward | operator calls | autograd nodes | classification alone: calls | nodes |"
    yield "|---|--:|--:|--:|--:|"
    for host in (transformers, rfdetr, ultralytics):
        if importlib.util.find_spec(host.__name__) is None:
            yield f"| {host.__name__}: not installed | | | | |"
            continue
        for found in host():
            cells = []
            for stock, ours in ((found.stock, found.ours), (found.stock_alone, found.our_alone)):
                if stock is None or ours is None:
                    cells += ["", ""]
                    continue
                (calls, nodes), (fewer, less) = count(stock, found.leaves), count(ours, found.leaves)
                cells += [f"{calls} to {fewer}", f"{nodes} to {less}"]
            yield f"| {found.name} | {' | '.join(cells)} |"
