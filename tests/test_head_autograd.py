"""A fused head in autograd: one node, work that is not needed, second backwards, checkpoints; and in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Backend, same_bits
from graph import nodes
from head_problems import (
    SOME,
    Calls,
    Layer,
    Problem,
    assert_near,
    differentiate,
    draw,
    fused_loss,
    leaves_of,
    plain_loss,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfocal
from fastfocal import FastFocalLoss

pytestmark = pytest.mark.usefixtures("one_thread")

CONV = Layer(kernel=(3, 3), options={"padding": 1}, cells=((4, 3), (2, 2)))
LINEAR = Layer(linear=True, anchors=1, classes=7, cells=((1, 11), (1, 4)))
both = pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
modes = pytest.mark.parametrize("mode", ["save", "recompute"])


# --- one node ---------------------------------------------------------------------------------------------------------


@modes
@both
def test_one_node(layer: Layer, mode: str, generator: torch.Generator) -> None:
    """Beside it those of a few numbers: the sum over levels and images."""
    problem = draw(layer, generator)
    loss = fused_loss(problem, leaves_of(problem), problem.labels(), grad_mode=mode)
    functions = [node for node in nodes(loss) if hasattr(type(node), "_forward_cls")]
    (ours,) = functions
    assert type(ours)._forward_cls.__module__.startswith("fastfocal.heads")
    leaves = [node for node in nodes(loss) if type(node).__name__ == "AccumulateGrad"]
    assert len(leaves) == len(problem.tensors())


@modes
@both
def test_a_backward_for_every_level_is_one_for_all(
    backend: Backend, layer: Layer, mode: str, generator: torch.Generator
) -> None:
    problem = draw(layer, generator, device=backend.device)
    leaves = leaves_of(problem)
    whole = differentiate(fused_loss(problem, leaves, problem.labels(), normalizer=5.0, grad_mode=mode), leaves)
    features, weights, biases = problem.parts(leaves)
    for x, labels in zip(features, problem.labels(), strict=True):
        function = fastfocal.linear_focal_loss if layer.linear else fastfocal.conv_focal_loss
        loss = function(
            x,
            weights[0],
            biases[0],
            labels,
            num_classes=problem.classes,
            normalizer=5.0,
            grad_mode=mode,
            **layer.options,
        )
        loss.backward()
    for got, want in zip(leaves, whole, strict=True):
        assert got.grad is not None
        assert_near(got.grad, want)


@pytest.mark.parametrize("reduction", ["sum", "image"])
@modes
@both
def test_a_second_backward(
    backend: Backend, layer: Layer, mode: str, reduction: str, generator: torch.Generator
) -> None:
    """The same bits, and what the first handed out stays as it was; without retain_graph torch's error."""
    problem = draw(layer, generator, device=backend.device)
    leaves = leaves_of(problem)
    loss = fused_loss(problem, leaves, problem.labels(), grad_mode=mode, reduction=reduction, chunk_bytes=300)
    incoming = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    kept = [t.clone() for t in first]
    other = torch.autograd.grad(loss, leaves, -incoming, retain_graph=True)
    last = torch.autograd.grad(loss, leaves, incoming)
    for a, b, c, d in zip(first, kept, other, last, strict=True):
        assert same_bits(a, b) and torch.equal(a, -c) and same_bits(a, d)  # an ignored anchor's 0 has a sign
    assert len({t.data_ptr() for t in (*first, *other, *last)}) == 3 * len(leaves)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, leaves, incoming)


@modes
@both
def test_gradients_are_added_to_what_is_there(layer: Layer, mode: str, generator: torch.Generator) -> None:
    problem = draw(layer, generator)
    leaves = leaves_of(problem)
    want = [
        a + 2 * b
        for a, b in zip(
            *(
                differentiate(plain_loss(problem, leaves, problem.labels(), normalizer=n), leaves)
                for n in (3.0, "positives")
            ),
            strict=True,
        )
    ]
    (fused_loss(problem, leaves, problem.labels(), normalizer=3.0, grad_mode=mode)).backward()
    held = [t.grad for t in leaves]
    (2 * fused_loss(problem, leaves, problem.labels(), grad_mode=mode, chunk_bytes=300)).backward()
    for t, grad, expected in zip(leaves, held, want, strict=True):
        assert grad is t.grad and grad is not None
        assert_near(grad, expected)


@modes
@both
def test_what_is_read_in_backward_may_not_be_written_to_before(
    layer: Layer, mode: str, generator: torch.Generator
) -> None:
    """With "save" nothing is read again: whatever is stepped in place before backward, the gradients are those of before."""
    problem = draw(layer, generator)
    leaves = leaves_of(problem)
    want = differentiate(fused_loss(problem, leaves, problem.labels()), leaves)
    loss = fused_loss(problem, leaves, problem.labels(), grad_mode=mode)
    with torch.no_grad():
        leaves[-1].add_(1.0)
        leaves[0].mul_(2.0)
    if mode == "recompute":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            differentiate(loss, leaves)
    else:
        for got, expected in zip(differentiate(loss, leaves), want, strict=True):
            assert_near(got, expected)


# --- work that is not needed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk, tiles", [(1, (24, 24)), (2**40, (1, 1)), (8 * 2 * 12 * 4, (4, 1))])
@modes
def test_work_of_a_convolution(mode: str, chunk: int, tiles: Sequence[int], generator: torch.Generator) -> None:
    """Every combination of what a gradient is wanted of: each tile's convolution, and one backward of it with just that."""
    problem = draw(Layer(anchors=3, classes=4, cells=((4, 3), (2, 2))), generator)
    labels = problem.labels()
    plain = leaves_of(problem)
    want = differentiate(plain_loss(problem, plain, labels), plain)
    for needs in itertools.product([False, True], repeat=4):
        leaves = leaves_of(problem, needs)
        of_levels, of_weight, of_bias = needs[:2], needs[2], needs[3]
        masks = [(needed, of_weight, of_bias) for needed in of_levels]
        expected = [mask for mask, count in zip(masks, tiles, strict=True) if any(mask) for _ in range(count)]
        with Calls() as forward:
            loss = fused_loss(problem, leaves, labels, chunk_bytes=chunk, grad_mode=mode)
        assert forward.count("convolution") == sum(tiles)
        saves = mode == "save" and any(needs)
        assert forward.masks == (expected if saves else [])
        assert forward.count("pyramid_loss_") == len(forward.masks)
        assert forward.count("pyramid_loss") == sum(tiles) - len(forward.masks)
        assert loss.requires_grad == any(needs)
        if not any(needs):
            continue
        with Calls() as backward:
            loss.backward()
        assert backward.masks == (expected if mode == "recompute" else [])
        assert backward.count("convolution") == len(backward.masks)
        for t, needed, gradient in zip(leaves, needs, want, strict=True):
            assert (t.grad is not None) == needed
            if t.grad is not None:
                assert_near(t.grad, gradient)


@pytest.mark.parametrize("chunk, tiles", [(2**40, 1), (8 * 2 * 7 * 3, 4)])
def test_work_of_a_linear_layer(chunk: int, tiles: int, generator: torch.Generator) -> None:
    problem = draw(Layer(linear=True, anchors=1, channels=5, classes=7, cells=((1, 12),)), generator)
    rows = 2 * 12 // tiles
    for needs in itertools.product([False, True], repeat=3):
        leaves = leaves_of(problem, needs)
        with Calls() as calls:
            loss = fused_loss(problem, leaves, problem.labels(), chunk_bytes=chunk)
            if loss.requires_grad:
                loss.backward()
        products = sorted(shape for shape in calls.products)
        expected = [(rows, 7)] * tiles + [(rows, 5)] * tiles * needs[0] + [(7, 5)] * tiles * needs[1]
        assert products == sorted(expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", ["auto", "save", "inplace", "recompute"])
def test_without_grad_there_is_no_gradient(context: Callable[[], Any], mode: str, generator: torch.Generator) -> None:
    problem = draw(CONV, generator)
    leaves = leaves_of(problem)
    want = plain_loss(problem, leaves, problem.labels())
    with context(), Calls() as calls:
        loss = fused_loss(problem, leaves, problem.labels(), grad_mode=mode, chunk_bytes=300)
    assert not loss.requires_grad and calls.masks == [] and calls.count("pyramid_loss_") == 0
    assert_near(loss, want)


def test_a_weight_per_level_is_frozen_alone(generator: torch.Generator) -> None:
    layer = Layer(weight_per_level=True, bias_per_level=True, cells=((4, 3), (2, 2)))
    problem = draw(layer, generator)
    needs = [True, False, False, True, True, False]  # features, weights, biases
    leaves = leaves_of(problem, needs)
    with Calls() as calls:
        loss = fused_loss(problem, leaves, problem.labels())
    assert calls.masks == [(True, False, True), (False, True, False)]
    loss.backward()
    assert [t.grad is not None for t in leaves] == needs


# --- what a tower before it, and what is around it, do ----------------------------------------------------------------


class Model(nn.Module):
    """A tower of one layer, and the head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.tower = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 6, 3, padding=1)
        self.criterion = FastFocalLoss(3)
        self.to(dtype)

    def features(self, image: Tensor) -> Tensor:
        return torch.relu(self.tower(image))

    def loss(self, x: Tensor, labels: Tensor, fused: bool = True) -> Tensor:
        if fused:
            return self.criterion.fused_with(self.head, [x], [labels], chunk_bytes=2**40)
        return self.criterion([self.head(x)], [labels])  # type: ignore[return-value]


def images_and_labels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64), torch.randint(
        -1, 4, (2, 40), generator=generator
    )


class HeadCalls(Calls):
    """How often the head's own convolution was called."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.heads += self.names[-1] == "convolution" and result.shape[1] == 6
        return result


@pytest.mark.parametrize("around", ["tower", "tower and loss", "loss"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, around: str, generator: torch.Generator) -> None:
    """The right gradients; and around the tower alone the head's convolution is computed once."""
    image, labels = images_and_labels(generator)
    model = Model()
    results = []
    counts = {}
    for fused in (False, True):
        x = image.clone().requires_grad_()
        with HeadCalls() as calls:
            if around == "tower":
                loss = model.loss(checkpoint(model.features, x, use_reentrant=reentrant), labels, fused)
            elif around == "loss":
                loss = checkpoint(model.loss, model.features(x), labels, fused, use_reentrant=reentrant)
            else:
                loss = checkpoint(
                    lambda t, f=fused: model.loss(model.features(t), labels, f), x, use_reentrant=reentrant
                )
            (2 * loss).backward()
        counts[fused] = calls.heads
        results.append([loss.detach(), x.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for want, got in zip(*results, strict=True):
        assert_near(got, want)
    assert counts[False] == (1 if around == "tower" else 2)
    # Without reentry hooks see what is saved, which has to be made of the inputs again: once more.
    assert counts[True] == (1 if around == "tower" else 2 if reentrant else 3)


def test_saved_tensor_hooks(generator: torch.Generator) -> None:
    """Whatever memory they give back; and what they were given is not written to."""
    for layer, chunk in itertools.product((CONV, LINEAR), SOME):
        problem = draw(layer, generator)
        leaves = leaves_of(problem)
        targets = problem.labels()
        plain = leaves_of(problem)
        want = differentiate(plain_loss(problem, plain, targets), plain, 2.0)
        seen: list[tuple[Tensor, Tensor]] = []

        def pack(t: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> Tensor:
            seen.append((t, t.clone()))
            return t

        def unpack(t: Tensor) -> Tensor:
            return t.transpose(0, -1).contiguous().transpose(0, -1)  # in another order

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = fused_loss(problem, leaves, targets, chunk_bytes=chunk)
        for _ in range(2):
            for got, expected in zip(torch.autograd.grad(2 * loss, leaves, retain_graph=True), want, strict=True):
                assert_near(got, expected)
        assert seen and all(same_bits(t, copy) if t.is_floating_point() else torch.equal(t, copy) for t, copy in seen)
    with torch.autograd.graph.save_on_cpu():
        loss = fused_loss(problem, leaves, targets)
    for got, expected in zip(differentiate(2 * loss, leaves), want, strict=True):
        assert_near(got, expected)


@modes
@pytest.mark.parametrize("reduction", ["sum", "level"])
def test_a_second_derivative_is_refused(mode: str, reduction: str, generator: torch.Generator) -> None:
    problem = draw(CONV, generator)
    leaves = leaves_of(problem)
    loss = fused_loss(problem, leaves, problem.labels(), grad_mode=mode, reduction=reduction).sum()
    with pytest.raises(
        RuntimeError, match=r"no second derivative \(create_graph=True\); call the layer, and the loss of"
    ):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_torch_func_is_refused(generator: torch.Generator) -> None:
    problem = draw(CONV, generator)
    labels = problem.labels()

    def of_weight(weight: Tensor) -> Tensor:
        return fused_loss(problem, [*problem.features, weight, *problem.biases], labels)  # type: ignore[no-any-return]

    def of_bias(bias: Tensor) -> Tensor:
        return fused_loss(problem, [*problem.features, *problem.weights, bias], labels)  # type: ignore[no-any-return]

    weight, bias = problem.weights[0], problem.biases[0]
    words = r"is not computed under torch\.func; call the layer, and the loss of its logits"
    for transform in (
        torch.func.grad(of_weight),
        torch.func.jacrev(of_weight),
        torch.func.functionalize(of_weight),
        lambda w: torch.func.jvp(of_weight, (w,), (w,)),
        lambda w: torch.func.vmap(of_weight)(torch.stack([w, w])),
        lambda w: torch.func.vmap(of_bias)(torch.stack([bias, bias])),
    ):
        with pytest.raises(RuntimeError, match=words):
            transform(weight)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace is not supported"):
        torch.jit.trace(of_weight, weight)


@pytest.mark.parametrize("needs", [False, True])
def test_forward_mode(needs: bool, generator: torch.Generator) -> None:
    """A tangent is never lost in silence: where gradients are made in forward, PyTorch refuses it."""
    problem = draw(CONV, generator)
    tangent = torch.randn_like(problem.weights[0])
    leaves = leaves_of(problem, [needs] * len(problem.tensors()))
    with torch.autograd.forward_ad.dual_level():
        given = list(leaves)
        given[2] = torch.autograd.forward_ad.make_dual(leaves[2], tangent)
        if needs:
            with pytest.raises(NotImplementedError, match="jvp"):
                fused_loss(problem, given, problem.labels())
            return
        found = torch.autograd.forward_ad.unpack_dual(fused_loss(problem, given, problem.labels())).tangent
    plain = leaves_of(problem)
    gradient = differentiate(plain_loss(problem, plain, problem.labels()), plain)[2]
    assert found is not None
    assert_near(found, (gradient * tangent).sum())


# --- dtypes -----------------------------------------------------------------------------------------------------------

LARGER = Layer(anchors=3, classes=8, channels=16, kernel=(3, 3), options={"padding": 1}, cells=((12, 10), (6, 5)))
LARGER_LINEAR = Layer(linear=True, anchors=1, classes=24, channels=16, cells=((1, 120), (1, 30)))
larger = pytest.mark.parametrize("layer", [LARGER, LARGER_LINEAR], ids=["conv", "linear"])
# Relative, of a whole gradient (its norm). float32: sums of thousands of terms of 6e-8 each, which partly cancel. 16-bit: the
# logits (spread 3, half of 2^-8 or 2^-11 each, times the loss's curvature), their gradients and the result are rounded.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def exact(problem: Problem, targets: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """In float64, of the numbers that the problem's dtype holds."""
    leaves = leaves_of(problem, dtype=torch.float64)
    loss = plain_loss(problem, leaves, targets, **options)
    return loss.detach(), differentiate(loss, leaves)


@pytest.mark.parametrize("reduction", ["sum", "image"])
@larger
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_dtypes(dtype: torch.dtype, layer: Layer, reduction: str, generator: torch.Generator) -> None:
    problem = draw(layer, generator, dtype=dtype)
    for normalizer, chunk in itertools.product(("positives", "positives_per_image"), (1000, 2**40)):
        options: dict[str, Any] = {"reduction": reduction, "normalizer": normalizer}
        want_loss, want = exact(problem, problem.labels(), **options)
        leaves = leaves_of(problem)
        loss = fused_loss(problem, leaves, problem.labels(), chunk_bytes=chunk, **options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(loss.detach(), want_loss) < RELATIVE[dtype]
        for got, expected in zip(differentiate(loss, leaves), want, strict=True):
            assert got.dtype == dtype
            assert error(got, expected) < RELATIVE[dtype]


@larger
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, features: torch.dtype, layer: Layer, generator: torch.Generator) -> None:
    """Parameters of float32 keep float32 gradients, features theirs; weights are cast once."""
    problem = draw(layer, generator, dtype=torch.float32)
    problem.features = [x.to(dtype).to(features) for x in problem.features]  # the numbers that are computed with
    problem.weights = [w.to(dtype).float() for w in problem.weights]
    problem.biases = [b.to(dtype).float() for b in problem.biases]
    want_loss, want = exact(problem, problem.labels())
    for mode in ("save", "recompute"):
        leaves = leaves_of(problem)
        with torch.autocast("cpu", dtype), Calls() as calls:
            loss = fused_loss(problem, leaves, problem.labels(), chunk_bytes=1000, grad_mode=mode)
        # Two levels of features, the weight and the bias, and what is small.
        assert len(calls.masks) > 4 or mode == "recompute" or layer.linear
        assert loss.dtype == torch.float32 and error(loss.detach(), want_loss) < RELATIVE[dtype]
        for got, expected, leaf in zip(differentiate(loss, leaves), want, leaves, strict=True):
            assert got.dtype == leaf.dtype
            assert error(got, expected) < max(RELATIVE[dtype], RELATIVE[features])
    assert torch.is_autocast_enabled("cpu") is False


def test_autocast_leaves_float64_alone(generator: torch.Generator) -> None:
    problem = draw(CONV, generator)
    leaves = leaves_of(problem)
    want_loss, want = exact(problem, problem.labels())
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_loss(problem, leaves, problem.labels())
    assert_near(loss, want_loss)
    for got, expected in zip(differentiate(loss, leaves), want, strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("normalizer", ["positives", "positives_per_image", 1e5, None])
def test_float16_sums_stay_finite(normalizer: Any) -> None:
    """Sums over 90,000 cells exceed 65504 before they are divided, where a loss scale could not help any more."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(1, 2, 300, 300, generator=generator) * 8).half()
    weight = (torch.randn(6, 2, 1, 1, generator=generator) * 0.05).half().requires_grad_()
    bias = torch.zeros(6).half().requires_grad_()
    labels = torch.randint(0, 4, (1, 300, 300, 2), generator=generator)
    options: dict[str, Any] = {"num_classes": 3, "normalizer": normalizer}
    if normalizer is None:
        options["loss_weight"] = 1e-5
    loss = fastfocal.conv_focal_loss(x, weight, bias, labels, **options)
    got = torch.autograd.grad(loss, (weight, bias))
    wide = [t.detach().double().requires_grad_() for t in (weight, bias)]
    logits = nn.functional.conv2d(x.double(), *wide)
    want = torch.autograd.grad(fastfocal.focal_loss(logits, labels, **options), wide)
    for mine, expected in zip(got, want, strict=True):
        # float16 rounds logits, their gradients and the results, the latter by 2^-11 each.
        assert error(mine.double(), expected) < 2e-3


def test_shapes_without_memory() -> None:
    layer = nn.Conv2d(4, 15, 1, padding=1, device="meta")
    features = torch.empty(2, 4, 3, 3, device="meta", requires_grad=True)
    labels = torch.zeros(2, 75, device="meta", dtype=torch.int64)
    loss = fastfocal.FastFocalLoss(5, alpha=[0.1] * 5).fused_with(layer, features, labels)
    loss.backward()
    assert loss.shape == () and loss.is_meta
    assert features.grad is not None and features.grad.shape == features.shape
    assert layer.weight.grad is not None and layer.weight.grad.shape == layer.weight.shape


def test_many_incoming_gradients_at_once() -> None:
    layer, features = nn.Conv2d(4, 15, 1), torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = fastfocal.FastFocalLoss(5).fused_with(layer, features, torch.zeros(2, 27, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"fastfocal: .*is_grads_batched"):
        torch.autograd.grad(loss, features, torch.ones(3), is_grads_batched=True)


def test_float16_with_a_loss_scale(generator: torch.Generator) -> None:
    """Thousands of positives divide gradients of 1e-6 out of float16's range; divided after the sums they are exact to 1e-3."""
    layer = Layer(anchors=9, classes=4, channels=16, cells=((48, 40), (24, 20)))
    problem = draw(layer, generator, dtype=torch.float16, positive=0.2)
    problem.weights = [w / 6 for w in problem.weights]
    problem.biases = [(b / 2 - 4.6).half() for b in problem.biases]  # p = 0.01, as training starts
    assert sum(((y >= 0) & (y < 4)).sum().item() for y in problem.labels()) > 5000
    # Few of them here, as many in the whole batch: the negatives' gradients are what moves the weight.
    few = draw(layer, torch.Generator().manual_seed(1), positive=0.0005)
    given = [5000.0, torch.tensor(5000.0), torch.tensor([4000.0, 7000.0])]
    scale = 65536.0
    for normalizer in ("positives", "positives_per_image", *given):
        counted = isinstance(normalizer, str)
        if not counted:
            problem.drawn = few.drawn
        _, want = exact(problem, problem.labels(), normalizer=normalizer)
        leaves = leaves_of(problem)
        loss = fused_loss(problem, leaves, problem.labels(), normalizer=normalizer, chunk_bytes=2**16)
        found = [g.double() / scale for g in torch.autograd.grad(loss * scale, leaves)]
        # 2^-11 is the result's own rounding; logits and their gradients are rounded too, without a bias.
        errors = [error(got, expected) for got, expected in zip(found, want, strict=True)]
        assert max(errors) < 1e-3, (normalizer, errors)
        if not counted:
            naive = divided_before_rounding(problem, normalizer)
            others = [error(got, expected) for got, expected in zip(naive, want, strict=True)]
            # Of the features, whose positives' are large, the weight and the bias.
            assert min(others[:2]) > 0.005 and others[2] > 0.03 and others[3] > 0.1, (normalizer, others)


@pytest.mark.parametrize("divisor", [0.0, float("inf")])
def test_float16_with_an_image_that_is_divided_by_no_number(divisor: float, generator: torch.Generator) -> None:
    """As without a fused head: that image's loss is infinite, or 0, and the other one's gradients are as ever."""
    problem = draw(Layer(), generator, dtype=torch.float16)
    normalizer = torch.tensor([divisor, 4.0])
    want_loss, _ = exact(problem, problem.labels(), normalizer=normalizer)
    _, want = exact(problem, problem.labels(), normalizer=4.0)
    leaves = leaves_of(problem)
    loss = fused_loss(problem, leaves, problem.labels(), normalizer=normalizer)
    if divisor == 0:
        assert loss.item() == want_loss.item() == float("inf")
    else:
        assert error(loss.detach(), want_loss) < RELATIVE[torch.float16]
    for got, expected in zip(differentiate(loss, leaves)[: len(problem.features)], want, strict=False):
        assert error(got[1], expected[1]) < RELATIVE[torch.float16]


def divided_before_rounding(problem: Problem, normalizer: Any) -> list[Tensor]:
    """What float16 gradients of a loss that is divided first come to, everything else exact."""
    rounded = leaves_of(problem)
    logits = [t.detach().requires_grad_() for t in problem.logits(*problem.parts(rounded))]
    loss = fastfocal.focal_loss(
        logits, problem.labels(), num_classes=problem.classes, normalizer=normalizer, grad_mode="save"
    )
    gradients = torch.autograd.grad(loss, logits)
    leaves = leaves_of(problem, dtype=torch.float64)
    again = problem.logits(*problem.parts(leaves))
    return list(torch.autograd.grad(again, leaves, [g.double() for g in gradients]))


def test_sums_over_tiles_are_float32(generator: torch.Generator) -> None:
    """A bfloat16 sum of many small parts would stand still: half of 2^-8 of it."""
    layer = Layer(linear=True, anchors=1, classes=4, channels=3, cells=((1, 2048),), images=1)
    problem = draw(layer, generator, dtype=torch.bfloat16, positive=0.0)
    problem.features = [x.abs() for x in problem.features]
    problem.biases = [torch.zeros_like(b) for b in problem.biases]
    _, want = exact(problem, problem.labels(), normalizer=None)
    leaves = leaves_of(problem)
    # Four rows at a time: 512 parts.
    found = differentiate(fused_loss(problem, leaves, problem.labels(), normalizer=None, chunk_bytes=32), leaves)
    for got, expected in zip(found, want, strict=True):
        assert error(got, expected) < RELATIVE[torch.bfloat16]
    # Classes one at a time: what is added to the features' gradient.
    layer = Layer(anchors=1, classes=1024, channels=3, cells=((1, 1),), images=1)
    problem = draw(layer, generator, dtype=torch.bfloat16, positive=0.0)
    problem.weights = [w.abs() for w in problem.weights]
    _, want = exact(problem, problem.labels(), normalizer=None)
    leaves = leaves_of(problem)
    found = differentiate(fused_loss(problem, leaves, problem.labels(), normalizer=None, chunk_bytes=4), leaves)
    assert error(found[0], want[0]) < RELATIVE[torch.bfloat16]


# --- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduction, needs",
    [("sum", (True, True, True, True)), ("image", (True, True, True, True)), ("sum", (False, True, False, True))],
    ids=["sum", "image", "some"],
)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@both
def test_compiled(layer: Layer, soft: bool, reduction: str, needs: Sequence[bool], generator: torch.Generator) -> None:
    """One graph, the same numbers, and a gradient of what needs one."""
    problem = draw(layer, generator)
    targets: Any = problem.labels()
    incoming = torch.tensor([2.0, -3.0]) if reduction == "image" else 2.0
    options: dict[str, Any] = {"reduction": reduction, "class_weight": [0.5 + i for i in range(problem.classes)]}
    if soft:
        logits = problem.logits(*problem.parts(problem.tensors()))
        targets, options["normalizer"] = [x.sigmoid() for x in logits], 3.0
    plain = leaves_of(problem)
    want_loss = plain_loss(problem, plain, targets, **options)
    want = differentiate(want_loss, plain, incoming)
    torch._dynamo.reset()
    leaves = leaves_of(problem, needs)
    compiled = torch.compile(
        lambda *ts: fused_loss(problem, ts, targets, chunk_bytes=300, **options), backend="aot_eager", fullgraph=True
    )
    loss = compiled(*leaves)
    assert_near(loss, want_loss)
    assert loss.requires_grad == any(needs)
    if loss.requires_grad:
        (loss * incoming).sum().backward()
    for t, need, gradient in zip(leaves, needs, want, strict=True):
        assert (t.grad is not None) == need
        if t.grad is not None:
            assert_near(t.grad, gradient)


def test_compiled_float16(generator: torch.Generator) -> None:
    """The scale of the loss goes in as it does without a compiler."""
    problem = draw(LARGER, generator, dtype=torch.float16)
    _, want = exact(problem, problem.labels())
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *ts: fused_loss(problem, ts, problem.labels(), chunk_bytes=1000), backend="aot_eager", fullgraph=True
    )
    leaves = leaves_of(problem)
    for got, expected in zip(differentiate(compiled(*leaves), leaves, 1024.0), want, strict=True):
        assert got.dtype == torch.float16
        assert error(got.double() / 1024, expected) < RELATIVE[torch.float16]
