"""fastfocal.compat.torchvision against the real torchvision: losses, every parameter's gradient, detections."""

from __future__ import annotations

import copy
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import Backend
from precision import Precision, check, every_precision
from torch import Tensor, nn
from watch import Shapes, peak_bytes

pytest.importorskip("torchvision", exc_type=Exception)  # it does not load beside a CPU build of torch

from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fastfocal.compat import torchvision as compat
from fastfocal.heads import tiles

CLASSES = 7


class Backbone(nn.Module):
    """Three levels, of an odd size each for the images below."""

    out_channels = 32  # FCOS normalizes in 32 groups

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=8, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(32, 32, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = [torch.relu(self.stem(x))]
        for conv in self.down:
            levels.append(torch.relu(conv(levels[-1])))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


SIZE = {"min_size": 88, "max_size": 120}


def tiny_retinanet() -> nn.Module:
    sizes = tuple((s, int(s * 1.26), int(s * 1.59)) for s in (16, 32, 64))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3)
    return detection.RetinaNet(Backbone(), CLASSES, anchor_generator=generator, **SIZE)


def tiny_fcos() -> nn.Module:
    generator = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return detection.FCOS(Backbone(), CLASSES, anchor_generator=generator, **SIZE)


def factory(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **SIZE)


both_heads = pytest.mark.parametrize("fuse_head", [False, True])
TINY = {"retinanet": tiny_retinanet, "fcos": tiny_fcos}
REAL = {n: factory(n) for n in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")}


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return TINY[request.param]()


def images(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h, w, generator=generator).to(dtype) for h, w in ((88, 120), (120, 88), (96, 96))]


def targets(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """The second image has no objects; the first two objects share a place, and class 0 is used as any other."""
    boxes = [
        [[10, 10, 40, 44], [12, 10, 41, 43], [50, 20, 110, 80]],
        [],
        [[5, 40, 25, 56]],
    ]
    labels = [[0, 6, 3], [], [6]]
    return [
        {"boxes": torch.tensor(b, dtype=dtype).reshape(-1, 4), "labels": torch.tensor(k, dtype=torch.int64)}
        for b, k in zip(boxes, labels, strict=True)
    ]


def step(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and the gradient of every parameter."""
    model.to(dtype).train()
    model.zero_grad()
    losses = model(images(dtype), targets(dtype))
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def assert_same(
    ours: tuple[dict[str, Tensor], dict[str, Tensor]], theirs: tuple[dict[str, Tensor], dict[str, Tensor]], rtol: float
) -> None:
    """Each loss, and each parameter's gradient against its own largest element.

    A bias in front of FCOS's group norm has gradient 0, but for rounding: below 1e-2 of `rtol` times the largest
    gradient of all, nothing is compared. With SINGLE that is 1e-6 of it, eight roundings of float32 (one was too few: both
    gradients are such noise, of half a rounding each and more).
    """
    for mine, stock in zip(ours, theirs, strict=True):
        assert list(mine) == list(stock)
        largest = max((t.abs().max().item() for t in stock.values()), default=0.0)
        for name in stock:
            error = (mine[name].double() - stock[name].double()).abs().max().item()
            assert error <= rtol * (stock[name].abs().max().item() + 1e-2 * largest), name


@pytest.fixture
def watched_matches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the adapter was told the anchors are matched to."""
    seen: list[Tensor] = []
    real = compat.labels_of_matches

    def watch(matches: Any, *rest: Any, **options: Any) -> Tensor:
        seen.extend(matches)
        return real(matches, *rest, **options)

    monkeypatch.setattr(compat, "labels_of_matches", watch)
    return seen


# --- same numbers -----------------------------------------------------------------------------------------------------

# float64: the softmax-free formulas agree to some 1e-15; torchvision's own 1 - p_t loses two digits at its prior of 0.01.
DOUBLE = 1e-10


@both_heads
def test_same_losses_and_gradients_in_float64(tiny: nn.Module, watched_matches: list[Tensor], fuse_head: bool) -> None:
    stock = step(tiny, torch.float64)
    ours = step(compat.accelerate(tiny, fuse_head=fuse_head), torch.float64)
    assert_same(ours, stock, DOUBLE)
    matches = torch.stack(watched_matches)
    assert (matches[1] == -1).all() and (matches[0] >= 0).any()
    if isinstance(tiny, detection.RetinaNet):
        assert (matches == -2).any()  # some anchors lie between the thresholds


@pytest.mark.parametrize("name", REAL)
def test_same_losses_and_gradients_of_the_real_models(name: str) -> None:
    torch.manual_seed(0)
    model = REAL[name]()
    stock = step(model, torch.float64)
    for fuse_head in (False, True):
        assert_same(step(compat.accelerate(model, fuse_head=fuse_head), torch.float64), stock, DOUBLE)


@both_heads
def test_as_close_in_float32_as_torchvision_is(tiny: nn.Module, fuse_head: bool) -> None:
    """Against float64, the fused loss is at most as far off as torchvision's own float32 computation, or 1e-6."""
    double = copy.deepcopy(tiny)
    exact = step(double, torch.float64)
    stock = step(tiny)
    ours = step(compat.accelerate(tiny, fuse_head=fuse_head))
    for mine, theirs, true in zip(ours, stock, exact, strict=True):
        for name, value in true.items():
            scale = max(value.abs().max(), 1e-6 * max(t.abs().max() for t in exact[1].values()))
            error, reference = ((t[name] - value).abs().max() / scale for t in (mine, theirs))
            # Convolutions' own rounding, alike in both, leaves a few 1e-6; twice that for the luck of the rounding.
            assert error <= 2 * reference + 1e-6, name


def test_the_classification_loss_is_fused(tiny: nn.Module) -> None:
    model = compat.accelerate(tiny).train()
    loss = model(images(), targets())["classification"]
    assert type(loss.grad_fn).__name__ == "PyramidLossFunctionBackward"
    assert len([f for f, _ in loss.grad_fn.next_functions if f is not None]) == 3  # the levels' convolutions


def test_no_logits_are_concatenated_in_training(tiny: nn.Module) -> None:
    model = compat.accelerate(tiny).train()
    head = model.head.classification_head
    raw = head([torch.zeros(1, 32, 5, 7), torch.zeros(1, 32, 3, 4)])
    assert [t.shape[2:] for t in raw] == [(5, 7), (3, 4)]


# --- the last convolution and the loss as one -------------------------------------------------------------------------


def shapes_of_logits(model: nn.Module) -> set[tuple[int, ...]]:
    channels = model.head.classification_head.cls_logits.out_channels
    with torch.no_grad():
        batch, _ = model.transform(images(), targets())
        levels = model.backbone(batch.tensors).values()
    return {(x.shape[0], channels, *x.shape[2:]) for x in levels}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.AUTO_BYTES, "cpu", 1024)  # less than one level's logits in float32


def test_training_makes_no_logits(tiny: nn.Module, small_tiles: None) -> None:
    logits = shapes_of_logits(tiny)
    assert len(logits) == 3
    with Shapes() as unfused:
        stock = step(compat.accelerate(tiny))
    with Shapes() as fused:
        ours = step(compat.accelerate(tiny, fuse_head=True))
    assert_same(ours, stock, SINGLE)
    assert logits <= unfused.seen
    assert not logits & fused.seen
    # Nor those of a band of rows: a tile is some channels of the whole level.
    (channels,) = {shape[1] for shape in logits}
    assert not any(len(shape) == 4 and shape[1] == channels and shape[0] == 3 for shape in fused.seen)


@pytest.mark.parametrize("kind", TINY)
def test_peak_memory_of_many_classes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last convolution and loss, forward and backward: the gradients of features and weight, and a tile."""
    classes, width, tile = 400, 32, 2**18
    monkeypatch.setitem(tiles.AUTO_BYTES, "cpu", tile)
    torch.manual_seed(0)
    heads = {
        "retinanet": detection.retinanet.RetinaNetClassificationHead,
        "fcos": detection.fcos.FCOSClassificationHead,
    }
    features = [torch.randn(1, width, n, n, requires_grad=True) for n in (64, 32)]
    cells = sum(x.shape[2] * x.shape[3] for x in features)
    labels = torch.full((1, cells), classes)
    peaks = []
    for fuse_head in (False, True):
        head = compat.accelerate(heads[kind](width, 1, classes), fuse_head=fuse_head)
        head.conv = nn.Identity()
        wanted = [*features, *head.cls_logits.parameters()]

        def body(head: nn.Module = head, wanted: list[Tensor] = wanted) -> tuple[Tensor, ...]:
            loss = compat.fused_head.focal_loss(head(features), labels, num_classes=classes)
            return torch.autograd.grad(loss, wanted)

        body()
        peaks.append(peak_bytes(Backend("cpu", torch.device("cpu")), body))
    logits, gradients = 4 * classes * cells, 4 * width * (cells + 9 * classes)
    assert peaks[0] > logits
    # Twice, as a part is added to what is there; the tile; and the labels.
    assert peaks[1] < 2 * gradients + tile + 2**19 < logits / 2


@pytest.mark.parametrize(
    "frozen",
    [
        ("backbone",),
        ("head.classification_head.cls_logits.weight",),
        ("head.classification_head.cls_logits",),
        ("head.classification_head.conv",),
        ("backbone", "head.classification_head"),
    ],
    ids=str,
)
def test_frozen_parameters_of_a_fused_head(tiny: nn.Module, frozen: tuple[str, ...]) -> None:
    for name, parameter in tiny.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    stock = step(tiny, torch.float64)
    assert len(stock[1]) < len(list(tiny.parameters()))
    assert_same(step(compat.accelerate(tiny, fuse_head=True), torch.float64), stock, DOUBLE)


def test_a_fused_head_without_objects(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = [{"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.int64)} for _ in range(3)]
    monkeypatch.setitem(globals(), "targets", lambda dtype: copy.deepcopy(empty))
    stock = step(tiny, torch.float64)
    ours = step(compat.accelerate(tiny, fuse_head=True), torch.float64)
    assert stock[0]["classification"] > 0
    assert_same(ours, stock, DOUBLE)


def test_gradients_of_a_fused_head_accumulate(tiny: nn.Module) -> None:
    """Two batches; the second is a part of the first, and the retained graph of the first is gone through twice."""
    found = []
    for model in (copy.deepcopy(tiny), compat.accelerate(tiny, fuse_head=True)):
        model.double().train()
        for part, twice in ((slice(0, 3), True), (slice(2, 3), False)):
            losses = model(images(torch.float64)[part], targets(torch.float64)[part])
            total = torch.stack(list(losses.values())).sum()
            if twice:
                total.backward(retain_graph=True)
            total.backward()
        found.append(({}, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(found[1], found[0], DOUBLE)


def test_loss_of_a_fused_head_without_gradients(tiny: nn.Module) -> None:
    """As is done for a validation loss."""
    tiny.double().train()
    with torch.no_grad():
        stock = tiny(images(torch.float64), targets(torch.float64))
        ours = compat.accelerate(tiny, fuse_head=True)(images(torch.float64), targets(torch.float64))
    assert_same((ours, {}), (stock, {}), DOUBLE)
    assert not any(loss.requires_grad for loss in ours.values())


def test_what_reads_the_logits_of_a_fused_head_gets_them(tiny: nn.Module) -> None:
    """A hook on the head with a loss of its own, written for raw outputs."""

    def hook(module: Any, args: Any, raw: list[Tensor]) -> None:
        penalties.append(sum(x.sigmoid().square().mean() for x in raw))

    tiny.double().train()
    compat.accelerate(tiny)
    tiny.head.classification_head.register_forward_hook(hook)
    found = []
    for fuse_head in (False, True):
        penalties: list[Any] = []
        compat.accelerate(tiny, fuse_head=fuse_head).zero_grad()
        warned = pytest.warns(UserWarning, match="reads a head's logits in training") if fuse_head else nullcontext()
        with warned:
            losses = tiny(images(torch.float64), targets(torch.float64))
        (torch.stack(list(losses.values())).sum() + penalties[0]).backward()
        gradients = {n: p.grad for n, p in tiny.named_parameters() if p.grad is not None}
        found.append(({n: loss.detach() for n, loss in losses.items()}, gradients))
    assert_same(found[1], found[0], DOUBLE)


def test_a_hook_on_the_last_convolution_of_a_fused_head(tiny: nn.Module) -> None:
    calls = []
    tiny.head.classification_head.cls_logits.register_forward_hook(lambda *_: calls.append(1))
    stock = step(tiny, torch.float64)
    assert_same(step(compat.accelerate(tiny, fuse_head=True), torch.float64), stock, DOUBLE)
    assert len(calls) == 6


def test_a_last_convolution_that_cannot_be_fused(tiny: nn.Module) -> None:
    head = tiny.head.classification_head
    own = type("Own", (nn.Conv2d,), {})
    head.cls_logits.__class__ = own
    types = [type(m) for m in tiny.modules()]
    with pytest.raises(ValueError, match=r"ClassificationHead\.cls_logits: fuse_head=True needs .* got Own"):
        compat.accelerate(tiny, fuse_head=True)
    assert [type(m) for m in tiny.modules()] == types
    head.cls_logits.__class__ = nn.Conv2d
    nn.utils.parametrizations.weight_norm(head.cls_logits)
    with pytest.raises(ValueError, match=r"cls_logits: fuse_head=True needs .* got ParametrizedConv2d"):
        compat.accelerate(tiny, fuse_head=True)


# --- 16 bits and autocast ---------------------------------------------------------------------------------------------


def rows(levels: list[Tensor]) -> Tensor:
    """(N, M, K) as torchvision's heads hand over."""
    return torch.cat([x.unflatten(1, (-1, CLASSES)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], dim=1)


def head_losses(kind: str, fast: bool) -> Callable[[Tensor], Tensor]:
    """The classification loss of one head alone, a function of two levels' logits in one tensor; one image, two objects."""
    anchors = 9 if kind == "retinanet" else 1
    cells, width = ((60, 50), (16, 16)), anchors * CLASSES
    m = anchors * sum(h * w for h, w in cells)
    matches = torch.full((m,), -1)
    matches[5] = 1
    target = {"labels": torch.tensor([0, CLASSES - 1]), "boxes": torch.tensor([[0.0, 0, 9, 9], [0, 0, 8, 7]])}

    def loss(x: Tensor) -> Tensor:
        parts = x.split([width * h * w for h, w in cells])
        levels = [t.view(1, width, h, w) for t, (h, w) in zip(parts, cells, strict=True)]
        outputs: dict[str, Any] = {"cls_logits": levels if fast else rows(levels)}
        if kind == "retinanet":
            head = detection.retinanet.RetinaNetClassificationHead(8, anchors, CLASSES)
            if fast:
                head.__class__ = compat.FastRetinaNetClassificationHead
            return head.compute_loss([target], outputs, [matches])
        head = detection.fcos.FCOSHead(32, anchors, CLASSES)
        if fast:
            head.__class__ = compat.FastFCOSHead
        outputs.update(bbox_regression=torch.ones(1, m, 4), bbox_ctrness=torch.zeros(1, m, 1))
        boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(m, 4)
        return head.compute_loss([target], outputs, [boxes], [matches])["classification"]

    return loss


@pytest.mark.parametrize("kind", TINY)
@every_precision
def test_precision_of_the_heads(kind: str, precision: Precision) -> None:
    """One positive, so that the sum, which is more than float16 has, is not divided."""
    generator = torch.Generator().manual_seed(4)
    size = CLASSES * (9 if kind == "retinanet" else 1) * (60 * 50 + 16 * 16)
    spread = 4 if kind == "retinanet" else 20
    x = (spread * torch.randn(size, generator=generator, dtype=torch.float64)).clamp(-27, 27)
    ours, theirs = head_losses(kind, True), head_losses(kind, False)
    # In float64 theirs loses what 1 - p_t cancels: at 27 all but five digits of the smallest terms. These are nothing in the
    # sum, but have gradients of their own. The fused kernels' float64 is held to the oracle elsewhere.
    loss = check(ours, theirs, ours, x, precision)
    true = theirs(x.to(precision.logits).double())
    assert true > 65504
    torch.testing.assert_close(ours(x.to(precision.logits).double()), true, rtol=1e-9, atol=0)
    assert loss.isinf() == (loss.dtype == torch.float16)


@both_heads
@every_precision
def test_precision_of_a_training_step(tiny: nn.Module, precision: Precision, fuse_head: bool) -> None:
    """Every loss has the dtype it had, the model itself being in 16 bits or not, and the gradients are finite."""
    tiny.to(precision.logits).train()
    found = []
    for model in (copy.deepcopy(tiny), compat.accelerate(tiny, fuse_head=fuse_head)):
        with precision.context():
            losses = model(images(precision.logits), targets(precision.logits))
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        (total * (1 if precision.logits == torch.float16 else 65536)).backward()
        found.append((losses, [p.grad for p in model.parameters() if p.grad is not None]))
    (stock, gradients), (ours, mine) = found
    assert {name: loss.dtype for name, loss in ours.items()} == {name: loss.dtype for name, loss in stock.items()}
    for name, loss in ours.items():
        # Theirs computes in 16 bits: a few roundings of 4e-3 (bfloat16) or 5e-4. FCOS in float16 has no center-ness loss.
        torch.testing.assert_close(loss, stock[name], rtol=5e-2, atol=0, equal_nan=True)
    assert ours["classification"].isfinite()
    for gradient, theirs in zip(mine, gradients, strict=True):
        assert gradient.isfinite().all() or not theirs.isfinite().all()


# --- labels that are no class -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("label", [CLASSES, -1, CLASSES + 5, -7])
def test_a_label_that_is_no_class(tiny: nn.Module, label: int, frozen: bool) -> None:
    compat.accelerate(tiny).train()
    tiny.head.classification_head.train(not frozen)
    wrong = targets()
    wrong[2]["labels"][0] = label
    with pytest.raises(
        ValueError, match=rf"labels: image 2, object 0 has label {label}; expected .*0\.\.{CLASSES - 1} "
    ):
        tiny(images(), wrong)


@pytest.mark.parametrize("kind", TINY)
def test_one_class_labelled_1(kind: str) -> None:
    """The commonest mistake; it trained as pure background."""
    torch.manual_seed(0)
    generator = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    model = {"retinanet": detection.RetinaNet, "fcos": detection.FCOS}[kind](
        Backbone(), 1, anchor_generator=generator, **SIZE
    )
    compat.accelerate(model).train()
    batch = [{**t, "labels": torch.ones_like(t["labels"])} for t in targets()]
    with pytest.raises(ValueError, match=r"labels: image 0, object 0 has label 1; expected 0, the one class"):
        model(images(), batch)
    losses = model(images(), [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets()])
    assert losses["classification"] > 0


# --- same everything else ---------------------------------------------------------------------------------------------


@both_heads
def test_bit_identical_detections(tiny: nn.Module, fuse_head: bool) -> None:
    tiny.score_thresh = 0.0
    tiny.eval()
    with torch.no_grad():
        stock = tiny(images())
        ours = compat.accelerate(tiny, fuse_head=fuse_head)(images())
    assert sum(len(d["scores"]) for d in stock) > 0
    for theirs, mine in zip(stock, ours, strict=True):
        assert all(torch.equal(theirs[key], mine[key]) for key in theirs)


@both_heads
def test_state_dict_is_unchanged(tiny: nn.Module, fuse_head: bool) -> None:
    before = {name: t.clone() for name, t in tiny.state_dict().items()}
    after = compat.accelerate(tiny, fuse_head=fuse_head).state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    tiny.load_state_dict(before)
    copied = copy.deepcopy(tiny)
    assert [type(m) for m in copied.modules()] == [type(m) for m in tiny.modules()]


@both_heads
def test_restore(tiny: nn.Module, fuse_head: bool) -> None:
    types = [type(m) for m in tiny.modules()]
    stock = step(tiny)
    assert [type(m) for m in compat.accelerate(tiny, fuse_head=fuse_head).modules()] != types
    restored = compat.restore(tiny)
    assert restored is tiny and [type(m) for m in tiny.modules()] == types
    assert_same(step(tiny), stock, 0.0)
    compat.restore(tiny)


@both_heads
def test_accelerate_twice_is_accelerate_once(tiny: nn.Module, fuse_head: bool) -> None:
    once = step(compat.accelerate(tiny, fuse_head=fuse_head))
    assert_same(step(compat.accelerate(tiny, fuse_head=fuse_head)), once, 0.0)


def test_the_fused_head_is_switched_on_and_off(tiny: nn.Module) -> None:
    plain = [type(m) for m in compat.accelerate(tiny).modules()]
    fused = [type(m) for m in compat.accelerate(tiny, fuse_head=True).modules()]
    assert sum(a is not b for a, b in zip(plain, fused, strict=True)) == 1
    assert [type(m) for m in compat.accelerate(tiny).modules()] == plain


@both_heads
def test_a_frozen_head_keeps_working(tiny: nn.Module, fuse_head: bool) -> None:
    """Its part of the model is in evaluation mode while the rest trains."""
    stock = step(tiny)
    compat.accelerate(tiny, fuse_head=fuse_head).train()
    tiny.head.classification_head.eval()
    losses = tiny(images(), targets())
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), stock[0][name])


def test_hooks_stay(tiny: nn.Module) -> None:
    calls = []
    tiny.head.classification_head.register_forward_hook(lambda *_: calls.append(1))
    step(compat.accelerate(tiny))
    assert calls == [1]


def test_a_model_without_such_a_head() -> None:
    with pytest.raises(ValueError, match=r"model: expected one with torchvision's .* found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))


def test_a_subclassed_head_is_left_alone(tiny: nn.Module) -> None:
    head = tiny.head.classification_head
    own = type("Own", (type(head),), {})
    head.__class__ = own
    types = [type(m) for m in tiny.modules()]
    with pytest.raises(ValueError, match="found the subclass Own"):
        compat.accelerate(tiny)
    assert [type(m) for m in tiny.modules()] == types


# --- the function alone -----------------------------------------------------------------------------------------------


def test_function_swap(tiny: nn.Module) -> None:
    from torchvision.models.detection import fcos, retinanet
    from torchvision.ops import sigmoid_focal_loss

    stock = step(tiny, torch.float64)
    with compat.fused_function():
        assert retinanet.sigmoid_focal_loss is not sigmoid_focal_loss
        ours = step(tiny, torch.float64)
    assert retinanet.sigmoid_focal_loss is fcos.sigmoid_focal_loss is sigmoid_focal_loss
    assert_same(ours, stock, DOUBLE)


def test_function_swap_is_undone_by_an_error() -> None:
    from torchvision.models.detection import retinanet
    from torchvision.ops import sigmoid_focal_loss

    with pytest.raises(KeyError), compat.fused_function():
        raise KeyError
    assert retinanet.sigmoid_focal_loss is sigmoid_focal_loss


# --- compiled and distributed -----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Float32 sums in another order; FCOS's group norm cancels most of a gradient that is rounded before it.
SINGLE = 1e-4


@pytest.mark.filterwarnings("error:fuse_head")  # no logits are made
@both_heads
@pytest.mark.parametrize("order", ["accelerate then compile", "compile then accelerate"])
def test_compiled(tiny: nn.Module, order: str, fuse_head: bool, fresh_dynamo: None) -> None:
    stock = step(tiny)
    if order.startswith("accelerate"):
        compat.accelerate(tiny, fuse_head=fuse_head)
    # The graphs are what is tested; inductor's kernels for the convolutions are not.
    compiled = torch.compile(tiny, backend="aot_eager")
    if order.startswith("compile"):
        compat.accelerate(compiled, fuse_head=fuse_head)
    losses, gradients = step(compiled)
    assert_same((losses, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}), stock, SINGLE)


def rank_step(rank: int, port: int, name: str, fuse_head: bool, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = compat.accelerate(nn.parallel.DistributedDataParallel(TINY[name]()), fuse_head=fuse_head)
    model.train()
    losses = model(images()[rank : rank + 1], targets()[rank : rank + 1])
    torch.stack(list(losses.values())).sum().backward()
    if rank == 0:
        results.put({n: p.grad.numpy() for n, p in model.module.named_parameters() if p.grad is not None})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@both_heads
@pytest.mark.parametrize("name", TINY)
def test_distributed(name: str, fuse_head: bool) -> None:
    """Two processes, one image each (the second without objects): the mean of what stock models give for each alone."""
    torch.manual_seed(0)
    model = TINY[name]().train()
    expected: dict[str, Tensor] = {}
    for rank in range(2):
        model.zero_grad()
        losses = model(images()[rank : rank + 1], targets()[rank : rank + 1])
        torch.stack(list(losses.values())).sum().backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                expected[n] = expected.get(n, 0) + p.grad / 2
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=rank_step, args=(rank, port, name, fuse_head, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = {n: torch.from_numpy(g) for n, g in results.get().items()}
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert_same(({}, found), ({}, expected), SINGLE)
