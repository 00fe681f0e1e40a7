"""The autograd node: gradcheck, the question of several losses, one node whatever the number of levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Size,
    arrange,
    draw_classes,
    draw_levels,
    encode,
    leaves,
)
from torch import Tensor, nn
from watch import Recorder

import fastfocal
from fastfocal import FastFocalLoss, focal_loss

# --- gradcheck --------------------------------------------------------------------------------------------------------

TINY = Size(2, 2, 3, ((2, 1), (1, 1)))


def tiny(
    generator: torch.Generator, layout: str = "contiguous", size: Size = TINY
) -> tuple[list[Tensor], list[Tensor]]:
    levels = draw_levels(size, generator, dtype=torch.float64, layout=layout)
    return levels, encode(draw_classes(size, generator, positive=0.3), size.classes)


GRADCHECKS: dict[str, dict[str, Any]] = {
    "sum": {"normalizer": None, "gamma": 0.5},
    "level": {"normalizer": 2.5, "gamma": 2.0, "label_smoothing": 0.1},
    "image": {"normalizer": torch.tensor([3.0, 0.5]), "gamma": 3.3, "alpha": [0.2, 0.5, 0.9]},
    "mean": {"gamma": 1.0, "level_weights": [1.0, 2.0], "loss_weight": 2.0, "normalizer": None},
    "none": {"normalizer": torch.tensor(2.5), "gamma": 0.0, "alpha": None, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("reduction", GRADCHECKS)
@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_gradcheck(targets: str, reduction: str, mode: str, generator: torch.Generator) -> None:
    """gradcheck perturbs every logit and takes every result's gradient alone, so each reduction's path is walked."""
    levels, labels = tiny(generator, size=Size(2, 2, 3, ((2, 1), (0, 1), (1, 1))) if reduction == "sum" else TINY)
    given = labels if targets == "labels" else [torch.rand(x.shape, generator=generator).double() for x in levels]

    def loss(*xs: Tensor) -> Any:
        options = {"num_classes": 3, "reduction": reduction, "grad_mode": mode, **GRADCHECKS[reduction]}
        out = focal_loss(list(xs), given, **options)
        return tuple(out) if isinstance(out, list) else out

    assert torch.autograd.gradcheck(loss, leaves(levels))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "3d", "3d_transposed"])
@pytest.mark.parametrize("normalizer", ["positives", "positives_per_image"])
def test_gradcheck_with_counted_normalizers(normalizer: str, layout: str, generator: torch.Generator) -> None:
    levels, labels = tiny(generator, layout)
    weight = [torch.rand(y.shape, generator=generator) for y in labels]
    options: dict[str, Any] = {"num_classes": 3, "normalizer": normalizer, "weight": weight}
    assert torch.autograd.gradcheck(lambda *xs: focal_loss(list(xs), labels, **options), leaves(levels))


# --- the question people ask: L backwards, one backward of the sum, or one fused loss? --------------------------------

PYRAMID = Size(2, 3, 4, ((8, 8), (4, 4), (2, 2)))


class Detector(nn.Module):
    """A trunk that feeds every level, a top-down path (so that levels share features), and one head or one per level."""

    def __init__(self, *, shared_head: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(6, 6, 3, stride=2, padding=1) for _ in range(2))
        self.lateral = nn.ModuleList(nn.Conv2d(6, 5, 1) for _ in range(3))
        head = PYRAMID.anchors * PYRAMID.classes
        self.heads = nn.ModuleList(nn.Conv2d(5, head, 3, padding=1) for _ in range(1 if shared_head else 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        bottom_up = [self.stem(images).tanh()]
        for down in self.down:
            bottom_up.append(down(bottom_up[-1]).tanh())
        features = [lateral(x) for lateral, x in zip(self.lateral, bottom_up, strict=True)]
        for i in (1, 0):
            features[i] = features[i] + nn.functional.interpolate(features[i + 1], scale_factor=2.0)
        return [self.heads[i % len(self.heads)](x) for i, x in enumerate(features)]


def plain_loss(x: Tensor, labels: Tensor, normalizer: float) -> Tensor:
    """What a detector's own code does for one level: permute, one-hot, focal loss; gamma 2, alpha 0.25."""
    n, _, h, w = x.shape
    x = x.view(n, PYRAMID.anchors, PYRAMID.classes, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, PYRAMID.classes)
    kept = labels >= 0
    y = nn.functional.one_hot(labels.clamp(min=0), PYRAMID.classes + 1)[..., :-1].to(x.dtype)
    p = x.sigmoid()
    ce = nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    missed = p * (1 - y) + (1 - p) * y
    return ((0.25 * y + 0.75 * (1 - y)) * missed**2 * ce * kept[..., None]).sum() / normalizer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared_head", "head_per_level"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_backwards_one_backward_and_the_fused_loss_agree(
    dtype: torch.dtype, shared_head: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Detector(shared_head=shared_head).to(dtype=dtype, memory_format=memory_format)
    images = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype).contiguous(memory_format=memory_format)
    labels = encode(draw_classes(PYRAMID, generator), PYRAMID.classes)
    one_tensor = arrange(labels, PYRAMID, "one")
    positives = float(sum(((y >= 0) & (y < PYRAMID.classes)).sum() for y in labels))
    criterion = FastFocalLoss(num_classes=PYRAMID.classes)
    per_level = FastFocalLoss(num_classes=PYRAMID.classes, reduction="level")

    def gradients(backward: Any) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        backward(model(images))
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]

    def each_level_alone(outputs: list[Tensor]) -> None:
        for x, y in zip(outputs, labels, strict=True):
            plain_loss(x, y, positives).backward(retain_graph=True)

    def sum_of_levels(outputs: list[Tensor]) -> None:
        torch.stack([plain_loss(x, y, positives) for x, y in zip(outputs, labels, strict=True)]).sum().backward()

    def fused_each_level_alone(outputs: list[Tensor]) -> None:
        for loss in per_level(outputs, one_tensor):
            loss.backward(retain_graph=True)

    ways = {
        "each level alone": gradients(each_level_alone),
        "sum of levels": gradients(sum_of_levels),
        "fused": gradients(lambda outputs: criterion(outputs, one_tensor).backward()),
        "fused, list of labels": gradients(lambda outputs: criterion(outputs, labels).backward()),
        "fused, each level alone": gradients(fused_each_level_alone),
    }
    wanted = ways.pop("each level alone")
    assert all(g.abs().max() > 0 for g in wanted.values())
    # Sums over some hundred terms in another order: a hundred roundings of the format, relative to the largest entry.
    relative = 100 * torch.finfo(dtype).eps
    for way, got in ways.items():
        for name, want in wanted.items():
            worst = (got[name] - want).abs().max() / want.abs().max()
            assert worst <= relative, f"{way}: gradient of {name} is off by {worst:.3g}"


# --- one node ---------------------------------------------------------------------------------------------------------


def nodes(root: Any) -> set[Any]:
    seen: set[Any] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("levels", [1, 5, 20])
def test_one_node_runs_one_backward_and_one_operator(levels: int, mode: str, generator: torch.Generator) -> None:
    size = Size(2, 2, 3, tuple((1 + i % 3, 2) for i in range(levels)))
    inputs = leaves(draw_levels(size, generator))
    labels = encode(draw_classes(size, generator), 3)
    loss = focal_loss(inputs, labels, num_classes=3, grad_mode=mode)
    assert loss.grad_fn is not None and "PyramidLoss" in loss.grad_fn.name()
    graph = nodes(loss.grad_fn)
    assert len(graph) == 1 + levels  # and one AccumulateGrad a leaf
    assert sum("FocalLoss" in node.name() for node in graph) == 1
    runs: list[int] = []
    loss.grad_fn.register_hook(lambda grad_inputs, grad_outputs: runs.append(len(grad_inputs)))
    with Recorder() as recorder:
        torch.autograd.grad(loss, inputs)
    assert len(runs) == 1
    assert len(recorder.calls) == 1, [call.name for call in recorder.calls]
    # Ones to start with, views, the operator: nothing is done level by level.
    assert len(recorder.names) < 8, recorder.names


@pytest.mark.parametrize("reduction", ["sum", "mean", "level", "image"])
def test_forward_calls_do_not_grow_with_the_levels(reduction: str, generator: torch.Generator) -> None:
    counts = []
    for levels in (2, 12):
        size = Size(2, 2, 3, tuple((1 + i % 3, 2) for i in range(levels)))
        inputs = leaves(draw_levels(size, generator))
        labels = arrange(encode(draw_classes(size, generator), 3), size, "one")
        with Recorder() as recorder:
            focal_loss(inputs, labels, num_classes=3, reduction=reduction)
        counts.append([call.name for call in recorder.calls])
        assert 1 <= len(recorder.calls) <= 2  # the loss, and before it the count of positives
    assert counts[0] == counts[1]


def test_reference_is_never_called(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """The slow path is not taken behind the user's back, even for strides that the kernels cannot read."""
    levels, labels = tiny(generator, "width_slice")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    for name in ("focal_loss", "FastFocalLoss", "sigmoid_focal_loss"):
        monkeypatch.setattr(fastfocal.reference, name, fail)
    focal_loss(leaves(levels), labels, num_classes=3).backward()
    FastFocalLoss(3)(leaves(levels), labels).backward()
    fastfocal.sigmoid_focal_loss(leaves(levels)[0], torch.zeros_like(levels[0])).sum().backward()


# --- what cannot be differentiated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "save", "recompute", "inplace"])
@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_create_graph_raises(targets: str, mode: str, generator: torch.Generator) -> None:
    """A clear error until second derivatives are there, never a graph that lacks them."""
    levels, labels = tiny(generator)
    given = labels if targets == "labels" else [x.sigmoid() for x in levels]
    inputs = leaves(levels)
    loss = focal_loss([x * 1 for x in inputs], given, num_classes=3, normalizer=1.0, grad_mode=mode)
    with pytest.raises(RuntimeError, match=r"(?i)create_graph|double|second"):
        torch.autograd.grad(loss, inputs, create_graph=True)


def test_frozen_logits_give_a_loss_without_history(generator: torch.Generator) -> None:
    levels, labels = tiny(generator)
    loss = focal_loss(levels, labels, num_classes=3)
    assert not loss.requires_grad and loss.grad_fn is None
    unreduced = focal_loss(levels, labels, num_classes=3, reduction="none")
    assert not any(part.requires_grad for part in unreduced)
