"""The last layer and the loss as one node: its numbers, those of the layer and the reference in float64.

Autograd, dtypes and errors are in test_head_autograd.py and test_head_errors.py, how logits are cut in test_head_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FORMS, IGNORED, Backend, arrange, draw_classes, encode, move
from head_problems import (
    CHUNKS,
    EXACT,
    SOME,
    Layer,
    Problem,
    assert_near,
    check,
    differentiate,
    draw,
)
from torch import Tensor, nn

import fastfocal
from fastfocal import reference
from fastfocal.heads import compute
from fastfocal.labels import CONVENTIONS
from fastfocal.losses import LOSSES, Member

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = torch.channels_last

CONVOLUTIONS: dict[str, Layer] = {
    "1x1": Layer(),
    "3x3, same": Layer(kernel=(3, 3), options={"padding": "same"}, cells=((7, 5), (4, 3), (1, 1))),
    "3x2, valid": Layer(kernel=(3, 2), options={"padding": "valid"}, cells=((7, 5), (3, 2))),
    "5x3, dilated, same": Layer(kernel=(5, 3), options={"padding": "same", "dilation": (1, 2)}),
    "3x3, stride": Layer(kernel=(3, 3), options={"padding": 1, "stride": (2, 1)}, cells=((7, 5), (4, 4))),
    "3x3, dilated": Layer(kernel=(3, 3), options={"padding": (2, 1), "dilation": (2, 1)}, cells=((5, 6), (1, 3))),
    "padding wider than the kernel": Layer(options={"padding": (1, 2)}, cells=((3, 2),)),
    "groups of anchors": Layer(anchors=4, classes=3, kernel=(3, 3), options={"padding": 1, "groups": 2}),
    "groups of an anchor": Layer(anchors=2, classes=5, channels=6, options={"groups": 2}),
    "groups of some classes": Layer(anchors=2, classes=6, channels=8, options={"groups": 4}),
    "groups of no whole anchors": Layer(anchors=3, classes=4, options={"groups": 2}),
    "depthwise": Layer(anchors=3, classes=4, channels=12, kernel=(3, 3), options={"padding": 1, "groups": 12}),
    "depthwise, multiplied": Layer(anchors=3, classes=4, channels=4, options={"groups": 4}),
    "channels_last": Layer(kernel=(3, 3), options={"padding": 1}, features_format=LAST),
    "channels_last weight": Layer(kernel=(3, 3), options={"padding": 1}, weight_format=LAST),
    "channels_last, both": Layer(features_format=LAST, weight_format=LAST, kernel=(3, 3), options={"padding": 1}),
    "channels_last, groups": Layer(anchors=4, classes=3, options={"groups": 2}, features_format=LAST),
    "a weight per level": Layer(channels=(4, 3, 6), weight_per_level=True, bias_per_level=True),
    "a weight per level, one bias": Layer(weight_per_level=True),
    "a bias per level": Layer(bias_per_level=True, kernel=(3, 3), options={"padding": 1}),
    "no bias": Layer(bias=False, kernel=(3, 3), options={"padding": 1}),
    "no bias, a weight per level": Layer(bias=False, weight_per_level=True),
    "one class": Layer(anchors=9, classes=1, kernel=(3, 3), options={"padding": 1}),
    "one anchor": Layer(anchors=1, classes=7),
    "one of each": Layer(anchors=1, classes=1, channels=1, images=1),
    "empty levels": Layer(cells=((0, 4), (3, 3), (2, 0), (2, 1))),
    "only empty levels": Layer(cells=((0, 4), (2, 0))),
    "no images": Layer(images=0, kernel=(3, 3), options={"padding": 1}),
    "five images": Layer(images=5, cells=((3, 4), (1, 2)), kernel=(3, 3), options={"padding": 1}),
}  # fmt: skip
LINEAR: dict[str, Layer] = {
    "linear": Layer(linear=True, anchors=1, classes=7, cells=((1, 11), (1, 4), (1, 1))),
    "linear, per level": Layer(
        linear=True, anchors=1, channels=(4, 3), cells=((1, 11), (1, 4)), weight_per_level=True, bias_per_level=True
    ),
    "linear, no bias": Layer(linear=True, anchors=1, bias=False, cells=((1, 9), (1, 9)), images=3),
    "linear, one class": Layer(linear=True, anchors=1, classes=1, cells=((1, 37),), images=1),
    "linear, nothing": Layer(linear=True, anchors=1, cells=((1, 0), (1, 5))),
    "linear, no images": Layer(linear=True, anchors=1, cells=((1, 4),), images=0),
}
LAYERS = CONVOLUTIONS | LINEAR


@pytest.mark.parametrize("order", ["images first", "channels first"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(
    backend: Backend, name: str, order: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both orders of the tiles; which one is taken is a matter of memory, and in float64 always the first."""
    asked = []

    def chosen(levels: list[Any], weight: Tensor, dtype: torch.dtype) -> bool:
        asked.append(len(levels))
        return bool(levels) and order == "channels first"

    monkeypatch.setattr(compute, "features_wait", chosen)
    problem = draw(LAYERS[name], generator, device=backend.device)
    check(problem, problem.labels(), CHUNKS, incoming=3.0)
    assert asked or 0 in problem.size.level_anchors() or not problem.layer.images


# --- labels -----------------------------------------------------------------------------------------------------------

SMALL = Layer(kernel=(3, 3), options={"padding": 1}, cells=((4, 3), (2, 2)))
SMALL_LINEAR = Layer(linear=True, anchors=1, classes=7, cells=((1, 11), (1, 4)))
both = pytest.mark.parametrize("layer", [SMALL, SMALL_LINEAR], ids=["conv", "linear"])


@both
@pytest.mark.parametrize("name", CONVENTIONS)
def test_label_conventions(backend: Backend, name: str, layer: Layer, generator: torch.Generator) -> None:
    convention = CONVENTIONS[name]
    problem = draw(layer, generator, device=backend.device)
    labels = problem.labels(convention.background, convention.ignored)
    check(problem, labels, SOME, labels=name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["planes", "channels_last"])
@pytest.mark.parametrize("form", [*FORMS, "nhw"])
def test_label_forms(
    backend: Backend, form: str, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    layer = Layer(anchors=1 if form == "nhw" else 3, cells=((4, 3), (2, 2)), features_format=memory_format)
    problem = draw(layer, generator, device=backend.device)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        labels = encode(problem.drawn, problem.classes, ignore=255)
        given = arrange([y.to(dtype) for y in labels], problem.size, form)
        check(problem, move(given, backend.device), SOME, ignore_index=255)


@both
def test_all_of_one_kind(backend: Backend, layer: Layer, generator: torch.Generator) -> None:
    """No positives, nothing but positives, nothing but ignored anchors."""
    for positive, ignored in ((0.0, 0.1), (1.0, 0.0), (0.0, 1.0)):
        problem = draw(layer, generator, device=backend.device)
        problem.drawn = draw_classes(problem.size, generator, positive=positive, ignored=ignored)
        check(problem, problem.labels(), SOME)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["planes", "channels_last"])
def test_ignored_anchors_may_have_any_logits(
    backend: Backend, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    """Finite features, so large that products overflow: logits are infinite or, where inf meets -inf, NaN."""
    problem = draw(Layer(channels=4, features_format=memory_format), generator, device=backend.device)
    problem.weights[0][::2, :2] = torch.tensor([7.0, -7.0], dtype=torch.float64, device=backend.device)[:, None, None]
    problem.weights[0][1::2, :2] = 9.0
    largest = torch.finfo(torch.float64).max
    for x, drawn in zip(problem.features, problem.drawn, strict=True):
        x[0, :2, 0, 0] = largest
        drawn[0, : problem.layer.anchors] = IGNORED
    logits = problem.logits(*problem.parts(problem.tensors()))[0][0, :, 0, 0]
    assert logits.isnan().any() and logits.isinf().any()
    check(problem, problem.labels(), SOME)
    check(problem, problem.labels(), SOME, reduction="image", incoming=torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("anchors", [1, 2])
def test_more_classes_than_16_bits_hold(backend: Backend, anchors: int, generator: torch.Generator) -> None:
    """Windows of classes below 32767, above, and across; a label that only int32 holds is none of those of a window below."""
    classes = 66000
    layer = Layer(
        anchors=anchors, classes=classes, channels=2, cells=((1, 3),), images=backend.sized(2, 1), features_format=LAST
    )
    problem = draw(layer, generator, device=backend.device)
    edges = [0, 32766, 32767, 32768, 65534, 65541]  # the last two are -2 and 5 in 16 bits
    flat = problem.drawn[0].view(-1)
    for i in range(len(flat)):
        flat[i] = edges[i % 6] if i % 8 < 6 else (IGNORED, -1)[i % 2]
    problem.drawn = [flat.view(problem.drawn[0].shape)]
    numbers = problem.drawn[0].numel()
    chunks = [8 * numbers * 4500] if backend.slow else [8 * numbers * 4500, 8 * 3 * 32767, 2**40]
    check(problem, problem.labels(), chunks)


@pytest.mark.parametrize("edge", range(-2, 3))
def test_classes_around_what_16_bits_hold(backend: Backend, edge: int, generator: torch.Generator) -> None:
    """The widths of packed labels, and of windows of them, change here."""
    if backend.slow and edge not in (0, 1):
        pytest.skip("32767 and 32768 are enough where each logit takes a microsecond")
    classes = 32767 + edge
    problem = draw(Layer(anchors=1, classes=classes, channels=1, cells=((1, 2),), images=1), generator)
    problem = draw(problem.layer, generator, device=backend.device)
    problem.drawn = [torch.tensor([[classes - 1, classes - 2]])]
    check(problem, problem.labels(), (2**40, 16 * (classes - 1), 16 * 17000))


# --- options ----------------------------------------------------------------------------------------------------------


def random(shape: Any, like: Tensor, seed: int = 3) -> Tensor:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.25 + drawn).to(like.device)


def anchor_weights(problem: Problem) -> list[Tensor]:
    return [random(y.shape, problem.features[0], i) for i, y in enumerate(problem.drawn)]


def mask(problem: Problem) -> Tensor:
    values = random((problem.size.images, problem.classes), problem.features[0]) > 0.6
    values[:, 0] = True
    return values


ALPHA = 0.1, 0.9, 0.4, 0.6, 0.25, 0.5, 0.75
# Of one problem, its options; those that focal loss star has not are marked by a star.
OPTIONS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "alpha None": lambda p: {"alpha": None},
    "alpha 0.9": lambda p: {"alpha": 0.9},
    "alpha per class": lambda p: {"alpha": list(ALPHA[: p.classes])},
    "alpha a tensor": lambda p: {"alpha": torch.tensor(ALPHA[: p.classes], device=p.features[0].device)},
    "gamma 1.5": lambda p: {"gamma": 1.5},
    "*gamma 0": lambda p: {"gamma": 0.0},
    "*label smoothing": lambda p: {"label_smoothing": 0.2},
    "*detached factor": lambda p: {"detach_modulating_factor": True},
    "class weight": lambda p: {"class_weight": [0.5 + i for i in range(p.classes)]},
    "class weight, two rows": lambda p: {"class_weight": random((2, p.classes), p.features[0])},
    "class mask": lambda p: {"class_mask": mask(p)},
    "weights of anchors": lambda p: {"anchor_weight": anchor_weights(p)},
    "weights of anchors, one tensor": lambda p: {"anchor_weight": torch.cat(anchor_weights(p), 1)},
    "level weights": lambda p: {"level_weights": [0.5, 3.0]},
    "a level of weight 0": lambda p: {"level_weights": [2.0, 0.0]},
    "loss weight": lambda p: {"loss_weight": -1.5},
    "by image": lambda p: {"normalizer": "positives_per_image"},
    "no normalizer": lambda p: {"normalizer": None},
    "a number": lambda p: {"normalizer": 7.5},
    "a tensor": lambda p: {"normalizer": torch.tensor(7.5, dtype=torch.float64, device=p.features[0].device)},
    "a tensor of images": lambda p: {"normalizer": random(p.size.images, p.features[0])},
    "everything": lambda p: {
        "alpha": list(ALPHA[: p.classes]),
        "gamma": 1.5,
        "class_weight": random((2, p.classes), p.features[0]),
        "class_mask": mask(p),
        "anchor_weight": anchor_weights(p),
        "level_weights": [0.5, 3.0],
        "loss_weight": 1.5,
        "normalizer": "positives_per_image",
    },
}


@both
@pytest.mark.parametrize("star", [False, True], ids=["focal", "star"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: Backend, name: str, star: bool, layer: Layer, generator: torch.Generator) -> None:
    if star and name.startswith("*"):
        pytest.skip("focal loss star has no such option")
    problem = draw(layer, generator, device=backend.device)
    check(problem, problem.labels(), SOME, star=star, **OPTIONS[name](problem))


def incoming_of(reduction: str, problem: Problem) -> Tensor | float:
    """What each loss gets back: another number, with signs and a zero among them."""
    if reduction == "level":
        return torch.tensor([-2.0, 0.5, 0.0][: len(problem.features)], device=problem.features[0].device)
    if reduction == "image":
        return torch.tensor([3.0, -0.25, 0.0][: problem.size.images], device=problem.features[0].device)
    return -2.5


@both
@pytest.mark.parametrize("star", [False, True], ids=["focal", "star"])
@pytest.mark.parametrize("mode", ["auto", "save", "inplace", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "level", "image", "mean"])
def test_reductions_and_modes(
    backend: Backend, reduction: str, mode: str, star: bool, layer: Layer, generator: torch.Generator
) -> None:
    layer = Layer(**{**layer.__dict__, "images": 3})
    problem = draw(layer, generator, device=backend.device)
    incoming = incoming_of(reduction, problem)
    for more in ({}, {"normalizer": "positives_per_image"} if reduction != "mean" else {"class_mask": mask(problem)}):
        options: dict[str, Any] = {"reduction": reduction, "grad_mode": mode, "star": star, **more}
        check(problem, problem.labels(), (300, 2**40), incoming=incoming, **options)
        check(problem, problem.labels(), (4000,), incoming=0.0, **options)


def soft_targets(problem: Problem) -> list[Tensor]:
    shapes = [x.shape for x in problem.logits(*problem.parts(problem.tensors()))]
    targets = [random(shape, problem.features[0], 5 + i).sub(0.25) for i, shape in enumerate(shapes)]
    for y in targets:
        y[y > 0.9] = 1.0
        y[y < 0.5] = 0.0
    return targets


@pytest.mark.parametrize("name", ["1x1", "3x3, same", "channels_last", "groups of anchors", "five images", "linear"])
@pytest.mark.parametrize("reduction", ["sum", "level", "image", "mean"])
def test_soft_targets(backend: Backend, reduction: str, name: str, generator: torch.Generator) -> None:
    problem = draw(LAYERS[name], generator, device=backend.device)
    targets = soft_targets(problem)
    incoming = torch.arange(1, 1 + problem.size.images) if reduction == "image" else 2.0
    transposed = [y.transpose(-1, -2).contiguous().transpose(-1, -2) for y in targets]
    for given in (targets, [y.float() for y in targets], transposed):
        options = {"class_weight": random((2, problem.classes), targets[0]), "anchor_weight": anchor_weights(problem)}
        check(problem, given, SOME, normalizer=3.0, reduction=reduction, incoming=incoming, **options)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [300, 2**40])
def test_queries_of_one_image_and_of_all_decoder_layers(
    backend: Backend, chunk: int, generator: torch.Generator
) -> None:
    """(M, C), one level and two; and (L, N, M, C)."""
    layer = Layer(linear=True, anchors=1, classes=7, cells=((1, 11), (1, 11)), images=2)
    problem = draw(layer, generator, device=backend.device)
    labels = problem.labels()
    weight, bias = problem.weights[0].requires_grad_(), problem.biases[0].requires_grad_()
    mask_of_all = mask(problem)
    for flat in (False, True):
        x = torch.stack(problem.features).requires_grad_()
        if flat:
            given, targets, of_classes = [t[0] for t in x.unbind(0)], [y[0] for y in labels], mask_of_all[0]
            levels: Any = given
        else:
            given, targets, of_classes = x, labels, mask_of_all
            levels = list(x.unbind(0))
        for function, plain in (
            (fastfocal.linear_focal_loss, reference.focal_loss),
            (fastfocal.linear_focal_loss_star, reference.focal_loss_star),
        ):
            options: dict[str, Any] = {"class_mask": of_classes, "reduction": "image"}
            loss = function(given, weight, bias, targets, chunk_bytes=chunk, **options)  # K is the weight's
            logits = [nn.functional.linear(t, weight, bias) for t in levels]
            want_loss = plain(logits, targets, **options)
            torch.testing.assert_close(loss, want_loss, rtol=EXACT, atol=0)
            incoming = torch.arange(1, 1 + len(loss), device=loss.device)
            found, want = (differentiate(value, [x, weight, bias], incoming) for value in (loss, want_loss))
            for got, expected in zip(found, want, strict=True):
                assert_near(got, expected)
    alone = problem.features[0][0].clone().requires_grad_()
    loss = fastfocal.linear_focal_loss(alone, weight, None, labels[0][0], chunk_bytes=chunk)
    want_loss = reference.focal_loss(alone @ weight.t(), labels[0][0])
    for got, expected in zip(
        [loss, *differentiate(loss, [alone, weight])],
        [want_loss, *differentiate(want_loss, [alone, weight])],
        strict=True,
    ):
        assert_near(got, expected)


# --- modules ----------------------------------------------------------------------------------------------------------


def heads_and_features(
    kind: str, channels: int, outputs: int, device: torch.device, generator: torch.Generator
) -> tuple[Any, list[Tensor]]:
    """kind: a layer for all levels, or one for each."""
    torch.manual_seed(3)
    make: Callable[[], nn.Module]
    if kind.startswith("conv"):
        make = lambda: nn.Conv2d(channels, outputs, 3, padding=1)  # noqa: E731
        shapes = [(2, channels, h, w) for h, w in ((4, 3), (2, 2))]
    else:
        make = lambda: nn.Linear(channels, outputs, bias=kind != "linear without bias")  # noqa: E731
        shapes = [(2, m, channels) for m in (11, 4)]
    head: Any = nn.ModuleList([make(), make()]) if kind.endswith("per level") else make()
    head = head.to(device, torch.float64)
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(4)
    return head, [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]


@pytest.mark.parametrize("kind", ["conv", "conv per level", "linear", "linear without bias", "linear per level"])
@pytest.mark.parametrize("member", LOSSES, ids=lambda m: m.parameters.name)
def test_modules(backend: Backend, member: Member, kind: str, generator: torch.Generator) -> None:
    """With scores where the loss takes them, and all that comes with a call."""
    classes, anchors = 4, 2 if kind.startswith("conv") else 1
    head, features = heads_and_features(kind, 3, anchors * classes, backend.device, generator)
    parameters = member.parameters
    counts = [x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3] * anchors for x in features]
    each = list(head) if isinstance(head, nn.ModuleList) else [head] * 2
    logits_of = lambda xs: [layer(x) for layer, x in zip(each, xs, strict=True)]  # noqa: E731
    options: dict[str, Any] = {"class_weight": [0.5, 1.0, 2.0, 1.5], "level_weights": [0.5, 2.0]}
    call: dict[str, Any] = {"weight": [random((2, m), features[0]) for m in counts]}
    targets: list[Tensor]
    if parameters.targets == "soft":
        targets = [random(x.shape, features[0], i).sub(0.25) for i, x in enumerate(logits_of(features))]
        for y in targets:
            y[y > 0.9] = 1.0
    else:
        last = classes - 1 if parameters.takes_anchors else classes
        targets = [torch.randint(-1, last + 1, (2, m), generator=generator).to(backend.device) for m in counts]
    if parameters.takes_scores:
        call["scores"] = [random((2, m), features[0], 7 + m).clamp(max=1) for m in counts]
    call["class_mask"] = torch.tensor([[True, False, True, True], [True, True, True, False]], device=backend.device)
    criterion = member.module(classes, **options)
    slow = getattr(reference, type(criterion).__name__.removeprefix("Fast"))(classes, **options)
    normalizers: list[Any] = [None, 3.0, "positives_per_image"]
    if parameters.takes_scores:
        normalizers.append("scores")
    if parameters.name == "asymmetric_loss":
        normalizers.pop()
    for normalizer in normalizers:
        results = []
        for chunk in (None, 300, 2**40):
            inputs = [x.clone().requires_grad_() for x in features]
            if chunk is None:
                loss = slow(logits_of(inputs), targets, normalizer=normalizer, **call)
            else:
                together = chunk > 300 and "scores" in call
                given = {**call, "scores": torch.cat(call["scores"], 1)} if together else call
                loss = criterion.fused_with(head, inputs, targets, normalizer=normalizer, chunk_bytes=chunk, **given)
            results.append([loss.detach(), *torch.autograd.grad(3 * loss, [*inputs, *head.parameters()])])
        for found in results[1:]:
            for got, want in zip(found, results[0], strict=True):
                assert_near(got, want)


def test_modules_take_what_their_constructors_kept(backend: Backend, generator: torch.Generator) -> None:
    """Options of classes, reductions, modes, conventions; eval as train."""
    head, features = heads_and_features("conv", 3, 8, backend.device, generator)
    labels = torch.cat(
        [torch.randint(-2, 4, (2, x.shape[2] * x.shape[3] * 2), generator=generator) for x in features], 1
    ).to(backend.device)
    options: dict[str, Any] = {
        "alpha": [0.1, 0.2, 0.7, 0.5], "gamma": 1.5, "label_smoothing": 0.1, "labels": "torchvision", "loss_weight": 2.0
    }  # fmt: skip
    for reduction in ("sum", "mean", "level", "image"):
        criterion = fastfocal.FastFocalLoss(4, reduction=reduction, grad_mode="recompute", **options)
        slow = reference.FocalLoss(4, reduction=reduction, **options)
        for module in (criterion, criterion.eval()):
            loss = module.fused_with(head, features, labels, chunk_bytes=200)
            want = slow([head(x) for x in features], labels)
            incoming = torch.tensor([1.0, -2.0], device=loss.device) if loss.dim() else 1.0
            parameters = list(head.parameters())
            results = ([v.detach(), *differentiate(v, parameters, incoming)] for v in (loss, want))
            for got, expected in zip(*results, strict=True):
                assert_near(got, expected)


@pytest.mark.parametrize("fused_grad", [True, False])
def test_a_running_normalizer(fused_grad: bool, generator: torch.Generator) -> None:
    """detectron2's: a step moves it, evaluation does not."""
    head, features = heads_and_features("conv", 3, 8, torch.device("cpu"), generator)
    labels = [torch.randint(-1, 5, (2, x.shape[2] * x.shape[3] * 2), generator=generator) for x in features]
    fast, plain = (fastfocal.FastFocalLoss(4, ema_momentum=0.9, ema_start=30.0) for _ in range(2))
    for step in range(4):
        training = step != 2
        fast.train(training), plain.train(training)
        with torch.set_grad_enabled(fused_grad or step != 1):
            loss = fast.fused_with(head, features, labels, chunk_bytes=300)
            want = plain([head(x) for x in features], labels)
        assert_near(loss, want)
        assert fast.ema_normalizer == plain.ema_normalizer
        if loss.requires_grad:
            for got, expected in zip(
                *(torch.autograd.grad(v, list(head.parameters())) for v in (loss, want)), strict=True
            ):
                assert_near(got, expected)
    assert fast.ema_normalizer != 30.0
