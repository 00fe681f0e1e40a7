"""A last convolution that leaves its outputs unmade: the loss, and whatever else reads them, beside an ordinary convolution."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfocal
from fastfocal.compat import fused_head
from fastfocal.compat.fused_head import Unmade, UnmadeConv2d

ANCHORS, CLASSES, WIDTH = 3, 5, 6
SIZES = ((7, 9), (4, 5))
# float64, sums of some hundred terms in another order.
DOUBLE = 1e-12


class Head(nn.Module):
    """A tower and the last layer, called on each level."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU())
        options = {"kernel_size": 3, "padding": 1, **options}
        self.last = nn.Conv2d(WIDTH, ANCHORS * CLASSES, **options)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [self.last(self.tower(x)) for x in features]


def fuse(head: Head) -> Head:
    fused_head.check("last", head.last)
    head.last.__class__ = UnmadeConv2d
    return head


def build(**options: Any) -> Head:
    torch.manual_seed(0)
    return Head(**options).double()


def draw_features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, WIDTH, h, w, generator=generator, dtype=torch.float64).requires_grad_() for h, w in SIZES]


def draw_labels(logits: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(x.shape[0], ANCHORS * x.shape[2] * x.shape[3]) for x in logits]
    return [torch.randint(-1, CLASSES + 1, shape, generator=generator) for shape in shapes]


Reader = Callable[[list[Tensor]], Tensor]


def step(head: Head, read: Reader | None = None, forward: Callable[..., list[Tensor]] | None = None) -> list[Tensor]:
    """The loss, and the gradients of features and parameters; `read` adds something of its own to the loss."""
    features = draw_features()
    head.zero_grad()
    logits = (forward or head)(features)
    extra = 0 if read is None else read(logits)
    loss = fused_head.focal_loss(logits, draw_labels(logits), num_classes=CLASSES) + extra
    loss.backward()
    return [loss.detach(), *(t.grad for t in (*features, *head.parameters()) if t.grad is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=DOUBLE, atol=DOUBLE * float(expected.abs().max()))


@pytest.fixture
def no_reader() -> Iterator[None]:
    """Logits that are made are an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse_head=True")
        yield


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 1, "padding": 0},
        {"padding": "same", "dilation": 2},
        {"stride": 2, "bias": False},
        {"groups": 3},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_convolution(options: dict[str, Any], no_reader: None) -> None:
    head = build(**options)
    stock = step(head)
    assert_same(step(fuse(head)), stock)


def test_options_go_where_they_belong(no_reader: None) -> None:
    head, found = build(), []
    for _ in range(2):
        logits = head(draw_features())
        labels = draw_labels(logits)
        weight = [torch.rand(y.shape, generator=torch.Generator().manual_seed(3)).double() for y in labels]
        options = {"alpha": 0.3, "gamma": 1.5, "weight": weight, "normalizer": 7.0, "level_weights": [1.0, 0.5]}
        loss = fused_head.focal_loss(logits, labels, num_classes=CLASSES, reduction="level", **options)
        (gradient,) = torch.autograd.grad(loss @ torch.tensor([1.0, 2.0]).double(), head.last.weight)
        found.append([loss.detach(), gradient])
        fuse(head)
    assert_same(found[1], found[0])


def test_what_it_looks_like(no_reader: None) -> None:
    logits = fuse(build())(draw_features())
    for x, (h, w) in zip(logits, SIZES, strict=True):
        assert isinstance(x, Unmade) and x.requires_grad and x.is_contiguous() and x.dim() == 4
        assert (
            x.shape == (2, ANCHORS * CLASSES, h, w) and x.size(1) == ANCHORS * CLASSES and x.numel() == 2 * 15 * h * w
        )
        assert x.dtype == torch.float64 and x.device == torch.device("cpu")
        assert repr(x) == f"Unmade(shape=(2, 15, {h}, {w}), dtype=torch.float64, device='cpu')"
        assert x.made is None


def test_evaluation(no_reader: None) -> None:
    head = build().eval()
    stock = head(draw_features())
    for mine, expected in zip(fuse(head)(draw_features()), stock, strict=True):
        assert type(mine) is Tensor and torch.equal(mine, expected)


def test_frozen_parameters(no_reader: None) -> None:
    for frozen in (["last.weight"], ["last.bias"], ["last.weight", "last.bias"], ["tower.0.weight", "tower.0.bias"]):
        head = build()
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name not in frozen)
        stock = step(head)
        assert_same(step(fuse(head)), stock)


def test_everything_frozen(no_reader: None) -> None:
    head = fuse(build().requires_grad_(False))
    logits = head([x.detach() for x in draw_features()])
    loss = fused_head.focal_loss(logits, draw_labels(logits), num_classes=CLASSES)
    assert not logits[0].requires_grad and not loss.requires_grad and loss > 0


@pytest.mark.parametrize("loss_within", [True, False])
def test_autocast_is_that_of_the_convolution(loss_within: bool, no_reader: None) -> None:
    """Hosts compute their losses outside of it, too."""
    head, found = build().float(), []
    for _ in range(2):
        features = [x.detach().float() for x in draw_features()]
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(features)
            assert logits[0].dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=loss_within):
            loss = fused_head.focal_loss(logits, draw_labels(logits), num_classes=CLASSES)
        found.append([loss.detach(), torch.autograd.grad(loss, head.last.weight)[0]])
        fuse(head)
    assert found[1][0].dtype == found[0][0].dtype == torch.float32
    # The same bfloat16 logits; a tile's convolution may round a few of them otherwise (4e-3 of one logit).
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=0)
    # The logits' gradients are bfloat16 here and there.
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-2 * float(found[0][1].abs().max()))


@pytest.mark.parametrize("where", ["around", "head"])
def test_without_a_graph(where: str, no_reader: None) -> None:
    """Where no gradients are recorded for the head, its parameters get none from the loss."""
    head = fuse(build())
    with torch.no_grad():
        logits = head(draw_features())
    with torch.set_grad_enabled(where == "head"):
        loss = fused_head.focal_loss(logits, draw_labels(logits), num_classes=CLASSES)
    assert not loss.requires_grad and loss > 0
    assert_same([loss], step(build())[:1])


def test_features_that_were_changed_in_place(no_reader: None) -> None:
    """The convolution would have read what was there before."""
    head = fuse(build())
    features = [torch.randn(2, WIDTH, 4, 4).double()]
    logits = [head.last(x) for x in features]
    features[0].add_(1)
    for use in (lambda: fused_head.focal_loss(logits, draw_labels(logits), num_classes=CLASSES), logits[0].sum):
        with pytest.raises(
            RuntimeError, match=r"fuse_head=True: the features .* were changed in place between the head"
        ):
            use()


# --- readers ----------------------------------------------------------------------------------------------------------


def penalty(logits: list[Tensor]) -> Tensor:
    return sum(x.permute(0, 2, 3, 1).reshape(-1, CLASSES).square().mean() for x in logits)  # type: ignore[return-value]


def one_level(logits: list[Tensor]) -> Tensor:
    return torch.sigmoid(logits[1]).sum()


def log(logits: list[Tensor]) -> Tensor:
    with torch.no_grad():
        assert all(0 < float(torch.sigmoid(x).max()) < 1 for x in logits)
    assert [x.detach().numpy().shape for x in logits] == [(2, 15, h, w) for h, w in SIZES]
    return torch.zeros(())


class Twice(torch.autograd.Function):
    """What is handed an object that is no tensor sees a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def through_a_function(logits: list[Tensor]) -> Tensor:
    return torch.cat([Twice.apply(x).flatten() for x in logits]).square().sum()


@pytest.mark.parametrize("read", [penalty, one_level, log, through_a_function])
def test_readers_get_the_logits(read: Reader) -> None:
    head = build()
    stock = step(head, read)
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = step(fuse(head), read)
    assert_same(ours, stock)


def test_a_reader_after_the_loss() -> None:
    head = fuse(build())
    logits = head(draw_features())
    fused_head.focal_loss(logits, draw_labels(logits), num_classes=CLASSES).backward()
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        made = [x.detach() for x in logits]
    assert_same(made, [x.detach() for x in head.eval()(draw_features())])


def test_nobody_writes_to_them() -> None:
    logits = fuse(build())(draw_features())
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"fuse_head=True: aten.mul_.Tensor writes to the logits of a head"),
    ):
        logits[0].mul_(2)


@pytest.mark.parametrize("detached", [False, True])
def test_a_view_that_is_written_to(detached: bool) -> None:
    """The loss then reads what was written."""

    def write(logits: list[Tensor]) -> Tensor:
        for x in logits:
            (x.detach() if detached else x)[0].mul_(0.5)
        return torch.zeros(())

    head = build()
    stock = step(head, write)
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = step(fuse(head), write)
    assert_same(ours, stock)


# --- hooks, wrappers --------------------------------------------------------------------------------------------------


def test_hooks_that_read_nothing(no_reader: None) -> None:
    head, seen = build(), []
    head.last.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    head.last.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    stock = step(head)
    assert_same(step(fuse(head)), stock)
    assert seen[2:] == seen[:2] and len(seen) == 4


@pytest.mark.parametrize("kind", ["forward", "backward", "backward pre"])
def test_hooks_that_change_something(kind: str) -> None:
    head, calls = build(), []
    if kind == "forward":
        head.last.register_forward_hook(lambda module, args, output: (calls.append(1), 2 * output)[1])
    elif kind == "backward":
        head.last.register_full_backward_hook(lambda module, into, out: (calls.append(1), (3 * into[0],))[1])
    else:
        head.last.register_full_backward_pre_hook(lambda module, out: (calls.append(1), (3 * out[0],))[1])
    stock = step(head)
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = step(fuse(head))
    assert_same(ours, stock)
    assert len(calls) == 4


@pytest.mark.parametrize("kind", ["hook", "retained"])
def test_whoever_waits_for_the_gradient_of_the_logits_gets_it(kind: str) -> None:
    def wait(found: list[Tensor]) -> Reader:
        def read(logits: list[Tensor]) -> Tensor:
            if kind == "hook":
                logits[0].register_hook(lambda g: (found.append(g.clone()), 2 * g)[1])
            else:
                logits[0].retain_grad()
                found.append(logits[0])
            return torch.zeros(())

        return read

    seen: list[Tensor] = []
    head = build()
    stock = step(head, wait(seen))
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        ours = step(fuse(head), wait(seen))
    assert_same(ours, stock)
    first, second = [t.grad if kind == "retained" else t for t in seen]
    assert first is not None and second is not None
    assert_same([second], [first])


def test_levels_of_different_layers() -> None:
    torch.manual_seed(0)
    features = draw_features()
    layers = [nn.Conv2d(WIDTH, ANCHORS * CLASSES, 3, padding=n, dilation=n).double() for n in (1, 2)]
    want = fastfocal.focal_loss(
        [c(x) for c, x in zip(layers, features, strict=True)],
        labels := [torch.randint(-1, CLASSES + 1, (2, ANCHORS * h * w)) for h, w in SIZES],
        num_classes=CLASSES,
    )
    for layer in layers:
        layer.__class__ = UnmadeConv2d
    unmade = [c(x) for c, x in zip(layers, features, strict=True)]
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        loss = fused_head.focal_loss(unmade, labels, num_classes=CLASSES)
    assert_same([loss], [want])


def test_features_that_a_convolution_refuses() -> None:
    layer = nn.Conv2d(WIDTH, ANCHORS * CLASSES, 5).double()
    layer.__class__ = UnmadeConv2d
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        layer(torch.ones(1, WIDTH, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_head(reentrant: bool) -> None:
    """The reentrant one runs it without a graph, and puts its own node after it: its outputs are then made."""
    head = build()

    def forward(features: list[Tensor]) -> list[Tensor]:
        return [checkpoint(lambda x: head.last(head.tower(x)), x, use_reentrant=reentrant) for x in features]

    stock = step(head)
    fuse(head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(step(head, forward=forward), stock)
    assert any("reads a head's logits" in str(w.message) for w in caught) == reentrant


def test_checkpoint_of_the_tower(no_reader: None) -> None:
    head = build()
    stock = step(head)
    fuse(head)
    forward = lambda features: [head.last(checkpoint(head.tower, x, use_reentrant=False)) for x in features]  # noqa: E731
    assert_same(step(head, forward=forward), stock)


def test_a_weight_made_by_a_hook(no_reader: None) -> None:
    """torch.nn.utils.weight_norm of old: a weight of each call's own."""
    head = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(head.last)
    stock = step(head)
    assert_same(step(fuse(head)), stock)


def test_parametrized_later(no_reader: None) -> None:
    head = fuse(build())
    nn.utils.parametrizations.weight_norm(head.last)
    plain = copy.deepcopy(build())
    nn.utils.parametrizations.weight_norm(plain.last)
    assert_same(step(head), step(plain))
    with pytest.raises(ValueError, match="last: a ParametrizedUnmadeConv2d now; remove its parametrizations first"):
        fused_head.check_restorable(head)
    nn.utils.parametrize.remove_parametrizations(head.last, "weight")
    fused_head.check_restorable(head)
    fused_head.restore(head)
    assert type(head.last) is nn.Conv2d


# --- what is refused --------------------------------------------------------------------------------------------------


def test_layers_that_cannot_be() -> None:
    class Own(nn.Conv2d):
        pass

    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1))
    for layer in (Own(1, 1, 1), parametrized, nn.Linear(1, 1), nn.LazyConv2d(1, 1)):
        with pytest.raises(
            ValueError, match=f"x: fuse_head=True needs PyTorch's own nn.Conv2d.* got {type(layer).__name__}"
        ):
            fused_head.check("x", layer)
    with pytest.raises(ValueError, match="x: fuse_head=True needs padding_mode \"zeros\", got 'reflect'"):
        fused_head.check("x", nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match=r'x\.padding: "same" needs'):
        fused_head.check("x", nn.Conv2d(1, 1, 2, padding="same"))


@pytest.mark.parametrize("loss", [fastfocal.focal_loss, fastfocal.reference.focal_loss])
def test_other_losses_get_the_logits(loss: Callable[..., Tensor]) -> None:
    """Of a head of the user's own."""
    head = build()
    stock = step(head)
    logits = fuse(head)(draw_features())
    head.zero_grad()
    with pytest.warns(UserWarning, match="reads a head's logits in training"):
        found = loss(logits, draw_labels(logits), num_classes=CLASSES)
    found.backward()
    assert_same([found.detach(), *(p.grad for p in head.parameters())], [stock[0], *stock[-4:]])
