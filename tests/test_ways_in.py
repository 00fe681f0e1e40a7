"""One training step through every way that PyTorch offers: the reference's gradient, or an error that says what to do.

A new version of PyTorch runs this first. The loss is never alone: `other` keeps `backward` running where the gradient of the
loss was lost, so that a silent zero shows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastfocal
from fastfocal import FastFocalLoss, focal_loss

CLASSES, ANCHORS = 3, 2
CELLS = ((4, 3), (2, 2))
BACKENDS = ("eager", "aot_eager", "inductor")
MODES = ("save", "recompute", "inplace")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "recompute": {"grad_mode": "recompute"},
    "inplace": {"grad_mode": "inplace"},
    "alpha_per_class": {"alpha": [0.2, 0.5, 0.9], "gamma": 1.5},
    "level": {"reduction": "level"},
    "image": {"reduction": "image", "normalizer": "positives_per_image"},
    "none": {"reduction": "none"},
    "mean": {"reduction": "mean"},
    "smoothed": {"label_smoothing": 0.1, "level_weights": [1.0, 2.0]},
}


class Step(nn.Module):
    """Features -> a shared head -> the loss of two levels, and a second loss beside it."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, ANCHORS * CLASSES, 1)
        self.beside = nn.Conv2d(2, 1, 1)
        self.criterion = criterion

    def forward(self, features: list[Tensor], labels: Tensor) -> Tensor:
        loss = self.criterion([self.head(x) for x in features], labels)
        parts = loss if isinstance(loss, list) else [loss]
        other = sum(self.beside(x).abs().mean() for x in features)
        return sum(part.sum() for part in parts) + other  # type: ignore[no-any-return]


def inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(2, 2, h, w, generator=generator).to(memory_format=torch.channels_last) for h, w in CELLS]
    anchors = sum(h * w for h, w in CELLS) * ANCHORS
    return features, torch.randint(-1, CLASSES + 1, (2, anchors), generator=generator)


def built(criterion: Any) -> Step:
    torch.manual_seed(5)
    return Step(criterion).to(memory_format=torch.channels_last)


def made(**options: Any) -> Step:
    return built(FastFocalLoss(CLASSES, **options))


def expected(**options: Any) -> dict[str, Tensor]:
    """By the reference, in float64."""
    options.pop("grad_mode", None)
    model = built(lambda x, y: fastfocal.reference.focal_loss(x, y, num_classes=CLASSES, **options)).double()
    features, labels = inputs()
    model([x.double() for x in features], labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


def compare(got: dict[str, Tensor], want: dict[str, Tensor], relative: float = 2e-5) -> None:
    """Sums of some fifty terms of float32 in another order and size: 50 roundings of 6e-8, relative to the largest entry."""
    assert set(got) == set(want)
    for name, g in got.items():
        worst = (g.double() - want[name]).abs().max() / want[name].abs().max()
        assert worst <= relative, f"{name} is off by {worst:.3g}"


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- eager, compiled, exported ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_eager(name: str) -> None:
    model = made(**OPTIONS[name])
    model(*inputs()).backward()
    compare(named(model), expected(**OPTIONS[name]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model = made(**OPTIONS[name])
    torch.compile(model, backend=backend, fullgraph=True)(*inputs()).backward()
    compare(named(model), expected(**OPTIONS[name]))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model = made()
    torch.compile(model, backend="inductor", fullgraph=True)(*inputs()).backward()
    compare(named(model), expected())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_exported(name: str, strict: bool) -> None:
    """The exported module trains: every parameter's gradient is that of the module it was made from."""
    torch._dynamo.reset()
    model = made(**OPTIONS[name])
    exported = torch.export.export(model, inputs(), strict=strict).module()
    exported(*inputs()).backward()
    compare(named(exported), expected(**OPTIONS[name]))


def test_exported_without_gradients_and_trained_all_the_same() -> None:
    """An export under no_grad holds a call that makes no gradient; whoever differentiates it gets the true one."""
    torch._dynamo.reset()
    with torch.no_grad():
        exported = torch.export.export(made(), inputs()).module()
    exported(*inputs()).backward()
    compare(named(exported), expected())


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    """A compiled package gives the loss without Python's part of the package."""
    torch._dynamo.reset()
    model = made(alpha=[0.2, 0.5, 0.9])
    with torch.no_grad():
        want = model(*inputs())
        exported = torch.export.export(model, inputs())
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "step.pt2"))
        got = torch._inductor.aoti_load_package(package)(*inputs())
    # Convolutions and means by other code: a hundred roundings.
    torch.testing.assert_close(got, want, rtol=6e-6, atol=0)


def test_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model = made()
    want = expected()
    names = [name for name, _ in model.named_parameters()]
    given = inputs()

    def step(*parameters: Tensor) -> tuple[Tensor, ...]:
        loss = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), given)
        return torch.autograd.grad(loss, parameters)

    parameters = list(model.parameters())
    found = make_fx(step)(*parameters)(*parameters)
    compare(dict(zip(names, found, strict=True)), want)


def test_trace_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.trace is not supported; use torch.export or torch.compile"):
        torch.jit.trace(made(), inputs())


# --- torch.func and forward mode --------------------------------------------------------------------------------------


def of_parameters(model: Step, **options: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: torch.func.functional_call(model, parameters, inputs())  # type: ignore[no-any-return]


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def by_grad(f: Any, x: Any) -> Any:
    return torch.func.grad(f)(x)


def by_vjp(f: Any, x: Any) -> Any:
    value, pull = torch.func.vjp(f, x)
    return pull(torch.ones_like(value))[0]


def by_jacrev(f: Any, x: Any) -> Any:
    return torch.func.jacrev(f)(x)


def by_jacfwd(f: Any, x: Any) -> Any:
    return torch.func.jacfwd(f)(x)


TRANSFORMS = {"grad": by_grad, "vjp": by_vjp, "jacrev": by_jacrev}


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_reverse_mode_of_torch_func(transform: str, backend: str | None) -> None:
    torch._dynamo.reset()
    for name in ("default",) if backend == "inductor" else OPTIONS:
        model = made(**OPTIONS[name])
        f = of_parameters(model)

        def step(x: Any, f: Any = f) -> Any:
            return TRANSFORMS[transform](f, x)

        try:
            found = (torch.compile(step, backend=backend) if backend else step)(detached(model))
            compare(found, expected(**OPTIONS[name]))
        except AssertionError:
            if backend and not pytorch_is_right(transform, backend):
                pytest.skip(
                    f"PyTorch {torch.__version__} gives a wrong gradient of its own softplus here, or fails too"
                )
            raise


def pytorch_is_right(transform: str, backend: str) -> bool:
    """Whether the same way gives the gradient of a loss that is PyTorch's own."""
    torch._dynamo.reset()
    model = built(lambda logits, _: sum(nn.functional.softplus(x).sum() for x in logits))
    f = of_parameters(model)
    model(*inputs()).backward()
    try:
        compare(torch.compile(lambda x: TRANSFORMS[transform](f, x), backend=backend)(detached(model)), named(model))
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_forward_mode(backend: str | None) -> None:
    """The tangent is the gradient's dot product with the direction."""
    torch._dynamo.reset()
    for name in ("default",) if backend == "inductor" else OPTIONS:
        model = made(**OPTIONS[name])
        want = expected(**OPTIONS[name])
        generator = torch.Generator().manual_seed(8)
        direction = {k: torch.randn(p.shape, generator=generator) for k, p in model.named_parameters()}
        f = of_parameters(model)

        def step(x: Any, f: Any = f, direction: Any = direction) -> Tensor:
            return torch.func.jvp(f, (x,), (direction,))[1]  # type: ignore[no-any-return]

        found = (torch.compile(step, backend=backend) if backend else step)(detached(model))
        parts = torch.stack([(want[k] * direction[k].double()).sum() for k in want])
        # Products of float32, summed in another order, beside the sizes that cancel in the sum.
        assert abs(found.double() - parts.sum()) <= 2e-5 * parts.abs().sum()


@pytest.mark.parametrize("compiled", ["no", "around", "within"])
def test_dual_numbers(compiled: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 6, CLASSES, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 1, 2, 3, -1, 0], [3, 3, 1, 0, 2, 2]])

    def loss(logits: Tensor) -> Tensor:
        found = focal_loss(logits, labels)
        assert isinstance(found, Tensor)
        return found

    def tangent(logits: Tensor, function: Any = loss) -> Tensor:
        with forward_ad.dual_level():
            out = function(forward_ad.make_dual(logits, torch.ones_like(logits)))
            found = forward_ad.unpack_dual(out).tangent
        assert found is not None
        return found

    leaf = x.double().requires_grad_()
    loss(leaf).backward()
    want = leaf.grad.sum()  # type: ignore[union-attr]
    if compiled == "around":
        found = torch.compile(tangent, backend="eager")(x)
    elif compiled == "within":
        found = tangent(x, torch.compile(loss, backend="eager"))
    else:
        found = tangent(x)
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=0)  # a sum of 36 products that partly cancel


def test_jacobians_by_level_and_image() -> None:
    """More than one result: a row for each, in reverse and in forward mode."""
    x = torch.randn(2, 6, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 3, -1, 0], [3, 3, 1, 0, 2, 2]])
    for reduction in ("level", "image", "none"):
        options: dict[str, Any] = {"reduction": reduction, "normalizer": None}
        want = torch.autograd.functional.jacobian(
            lambda t, o=options: fastfocal.reference.focal_loss(t, labels, **o), x
        )
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            if jacobian is torch.func.jacfwd:
                with pytest.raises(RuntimeError, match="vmap over the focal loss is not supported"):
                    torch.vmap(lambda t, o=options: focal_loss(t, labels[0], **o))(x)
            found = jacobian(lambda t, o=options: focal_loss(t, labels, **o))(x)
            torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-300)  # float64: a dozen roundings


SECOND: dict[str, Callable[[Any, Tensor], Any]] = {
    "create_graph": lambda f, x: torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0].sum().backward(),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "grad_of_grad": lambda f, x: torch.func.grad(lambda t: torch.func.grad(f)(t).sum())(x),
    "backward_of_func_grad": lambda f, x: torch.func.grad(f)(x.requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_never_vanish(way: str, backend: str | None) -> None:
    """An error in every way there is until they are there; whose words it is depends on who stands between."""
    torch._dynamo.reset()
    x = torch.randn(2, 6, CLASSES, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(2, 6, dtype=torch.int64)

    def step(x: Tensor) -> Any:
        return SECOND[way](lambda t: focal_loss(t, labels), x)

    said = "second derivative|create_graph|forward mode over|double backward|not have been used|not require grad|PyNode"
    with pytest.raises(Exception, match=f"(?i){said}"):
        (torch.compile(step, backend=backend) if backend else step)(x)


def test_forward_over_forward() -> None:
    """The second tangent is a second derivative; the tangent of a tangent by its direction is a first one."""
    x = torch.randn(2, 6, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.zeros(2, 6, dtype=torch.int64)
    ones = torch.ones_like(x)

    def tangent(logits: Tensor, direction: Tensor) -> Tensor:
        return torch.func.jvp(lambda t: focal_loss(t, labels), (logits,), (direction,))[1]  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.jvp(lambda t: tangent(t, ones), (x,), (ones,))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.jacfwd(lambda t: tangent(t, ones))(x)
    linear = torch.func.jvp(lambda direction: tangent(x, direction), (2 * ones,), (ones,))[1]
    torch.testing.assert_close(linear, tangent(x, ones), rtol=1e-12, atol=0)  # float64: a dozen roundings
    assert linear.abs() > 1e-3


def test_vmap_says_what_to_do() -> None:
    x = torch.randn(4, 2, 6, CLASSES)
    labels = torch.zeros(2, 6, dtype=torch.int64)
    for f in (lambda t: focal_loss(t, labels), torch.func.grad(lambda t: focal_loss(t, labels))):
        with pytest.raises(RuntimeError, match=r"torch\.vmap over the focal loss is not supported; call it once"):
            torch.vmap(f)(x)
        with pytest.raises(Exception, match=r"torch\.vmap over the focal loss is not supported"):
            torch.compile(torch.vmap(f), backend="eager")(x)
    with pytest.raises(RuntimeError, match=r"torch\.vmap over the focal loss"):
        torch.vmap(lambda y: focal_loss(x[0], y))(torch.zeros(4, 2, 6, dtype=torch.int64))


@pytest.mark.parametrize("mode", MODES)
def test_batched_gradients_say_what_to_do(mode: str) -> None:
    x = torch.randn(2, 6, CLASSES, requires_grad=True)
    loss = focal_loss(x * 1, torch.zeros(2, 6, dtype=torch.int64), grad_mode=mode)
    with pytest.raises(RuntimeError, match="is_grads_batched=True is not supported"):
        torch.autograd.grad(loss, x, torch.ones(3), is_grads_batched=True)


# --- a direct call of the operator ------------------------------------------------------------------------------------


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The arguments of the main operator."""

    def __init__(self) -> None:
        super().__init__()
        self.args: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fastfocal.pyramid_loss.default:
            self.args = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [[], [1, 1], [1, 0]], ids=["none_made", "all_made", "one_made"])
@pytest.mark.parametrize("reduction", ["sum", "level", "image", "none"])
def test_the_operator_has_the_true_derivative(reduction: str, flags: list[int]) -> None:
    """Whatever gradients the call was told to make: those that are missing are made in backward."""
    generator = torch.Generator().manual_seed(3)
    levels = [torch.randn(2, m, CLASSES, generator=generator, dtype=torch.float64) for m in (5, 3)]
    labels = [torch.randint(-1, CLASSES + 1, (2, m), generator=generator) for m in (5, 3)]
    with Recorded() as recorded:
        focal_loss(levels, labels, reduction=reduction)
    logits = [x.clone().requires_grad_() for x in levels]
    losses, _ = torch.ops.fastfocal.pyramid_loss(logits, *recorded.args[1:-1], flags)
    incoming = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in losses]
    torch.autograd.backward(losses, incoming)
    twins = [x.clone().requires_grad_() for x in levels]
    want = fastfocal.reference.focal_loss(twins, labels, reduction=reduction)
    torch.autograd.backward(want if isinstance(want, list) else [want], incoming)
    for got, twin in zip(logits, twins, strict=True):
        torch.testing.assert_close(got.grad, twin.grad, rtol=1e-12, atol=1e-300)  # float64: a dozen roundings


def test_operators_that_write_refuse_what_needs_a_gradient() -> None:
    x = torch.randn(2, 6, CLASSES)
    with Recorded() as recorded:
        focal_loss(x, torch.zeros(2, 6, dtype=torch.int64))
    logits, before = x.clone().requires_grad_() * 1, x.clone()
    with pytest.raises(RuntimeError, match="pyramid_loss_ writes over tensors that require grad"):
        torch.ops.fastfocal.pyramid_loss_([logits], [torch.zeros(())], *recorded.args[1:-1], [1])
    assert torch.equal(logits.detach(), before)
    torch.ops.fastfocal.scale_gradients_([logits], torch.full((), 2.0), 0)
    assert torch.equal(logits.detach(), 2 * before)
    with pytest.raises(RuntimeError, match="second derivative"):
        logits.sum().backward()


# --- hooks and checkpoints --------------------------------------------------------------------------------------------


def test_a_hook_that_loses_the_memory_order() -> None:
    """Labels were put in channels_last order; the logits come back contiguous."""
    x = torch.randn(1, 4, 1, 2, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([[0, 1, 2, 2]])
    want = x.double().requires_grad_()
    fastfocal.reference.focal_loss([want], labels, num_classes=2).backward()
    for offload in (
        torch.autograd.graph.save_on_cpu(pin_memory=False),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t),
    ):
        leaf = x.clone().requires_grad_()
        with offload:
            loss = focal_loss([leaf], labels, num_classes=2, grad_mode="recompute")
        loss.backward()
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=2e-6, atol=0)  # type: ignore[union-attr]


def unfold(t: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([t, t], dim=-1)[..., 0]


HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "contiguous": (lambda t: t.contiguous(), lambda t: t),
    "clone": (lambda t: t.clone(), lambda t: t.clone()),
    "numpy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "gaps": (unfold, lambda t: t),
    "identity": (lambda t: t, lambda t: t),
    "transposed_back": (
        lambda t: t.transpose(-1, -2).contiguous() if t.dim() > 1 else t,
        lambda t: t.transpose(-1, -2) if t.dim() > 1 else t,
    ),
}


def soft_step(mode: str, layout: torch.memory_format, **options: Any) -> tuple[list[Tensor], Any]:
    generator = torch.Generator().manual_seed(4)
    levels = [torch.randn(2, ANCHORS * CLASSES, h, w, generator=generator).to(memory_format=layout) for h, w in CELLS]
    soft = [torch.rand(x.shape, generator=generator).to(memory_format=layout) for x in levels]
    labels = [torch.randint(-1, CLASSES + 1, (2, h * w * ANCHORS), generator=generator) for h, w in CELLS]
    weight = [torch.rand(y.shape, generator=generator) for y in labels]
    name = options.pop("what")
    common: dict[str, Any] = {"num_classes": CLASSES, "grad_mode": mode, **options}
    if name == "soft":
        return levels, lambda xs, f: f.focal_loss(xs, soft, normalizer=2.0, **common)
    if name == "weights":
        return levels, lambda xs, f: f.focal_loss(xs, labels, weight=weight, alpha=[0.2, 0.5, 0.9], **common)
    if name == "star":
        return levels, lambda xs, f: f.focal_loss_star(xs, labels, **common)
    return levels, lambda xs, f: f.focal_loss(xs, labels, normalizer=torch.tensor([2.0, 3.0]), **common)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["labels", "soft", "weights", "star"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_may_give_back_other_memory(hook: str, what: str, mode: str, layout: torch.memory_format) -> None:
    for reduction in ("sum", "none") if what == "labels" and mode != "inplace" else ("sum",):
        levels, step = soft_step(mode, layout, what=what, reduction=reduction)
        results = []
        for hooks in (None, HOOKS[hook]):
            leaves = [x.clone().requires_grad_() for x in levels]
            given = [x * 1 for x in leaves]
            if hooks is None:
                loss = step(given, fastfocal)
            else:
                with torch.autograd.graph.saved_tensors_hooks(*hooks):
                    loss = step(given, fastfocal)
            parts = loss if isinstance(loss, list) else [loss]
            torch.autograd.backward([part.sum() * 3 for part in parts])
            results.append([x.grad for x in leaves])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)  # type: ignore[arg-type]
            assert got.stride() == want.stride()  # type: ignore[union-attr]


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.double() if t.is_floating_point() else t,
    "shape": lambda t: t[:1],
    "device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", BROKEN)
def test_hooks_that_give_back_something_else_are_refused(how: str, mode: str) -> None:
    levels, step = soft_step(mode, torch.contiguous_format, what="labels")
    leaves = [x.clone().requires_grad_() for x in levels]
    with torch.autograd.graph.saved_tensors_hooks(BROKEN[how], lambda t: t):
        loss = step([x * 1 for x in leaves], fastfocal)
    with pytest.raises(RuntimeError, match="saved tensor 0 came back from a saved-tensor hook as"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_what_a_hook_keeps_is_not_written_to(mode: str) -> None:
    """A hook may hand out the same memory again; scaling by the incoming gradient must not reach it."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    levels, step = soft_step(mode, torch.contiguous_format, what="labels")
    leaves = [x.clone().requires_grad_() for x in levels]
    given = [x * 1 for x in leaves]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step(given, fastfocal)
    before = [t.clone() for t in kept]
    (3 * loss).backward()
    assert kept and all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_checkpoint(mode: str, reentrant: bool) -> None:
    """The head and the loss are computed twice, the second time within backward."""
    model = made(grad_mode=mode)
    features, labels = inputs()
    given = [x.requires_grad_() for x in features]
    # Reentrant checkpoints see no tensors within a list: the list is opened.
    loss = torch.utils.checkpoint.checkpoint(lambda a, b: model([a, b], labels), *given, use_reentrant=reentrant)
    loss.backward()
    compare(named(model), expected())


def test_tensor_hooks_change_the_gradient() -> None:
    levels, step = soft_step("save", torch.contiguous_format, what="labels")
    leaves = [x.clone().requires_grad_() for x in levels]
    plain = [x.clone().requires_grad_() for x in levels]
    step(plain, fastfocal).backward()
    given = [x * 1 for x in leaves]
    for x in given:
        x.register_hook(lambda g: 2 * g)
    step(given, fastfocal).backward()
    for a, b in zip(leaves, plain, strict=True):
        assert torch.equal(a.grad, 2 * b.grad)  # type: ignore[arg-type, operator]


def test_compiled_autograd() -> None:
    torch._dynamo.reset()
    model = made()
    loss = model(*inputs())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    compare(named(model), expected())


# --- modes, subclasses, processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any) -> None:
    want = made()(*inputs())
    with context():
        got = made()(*inputs())
    assert torch.equal(got, want.detach()) and not got.requires_grad


def test_anomaly_mode_and_deterministic_algorithms() -> None:
    model = made()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            model(*inputs()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    compare(named(model), expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The head's 16-bit logits are read as they come; the loss is float32."""
    model = made()
    with torch.autocast("cpu", dtype=dtype):
        loss = model.criterion([model.head(x) for x in inputs()[0]], inputs()[1])
        assert loss.dtype == torch.float32
        (loss + sum(model.beside(x).float().abs().mean() for x in inputs()[0])).backward()
    # Half an ulp of the logits and of each gradient, in sums of some fifty.
    compare(named(model), expected(), relative=0.02)


class Named(torch.Tensor):
    """As MONAI's MetaTensor: something beside the numbers, and every result of a function is one too."""


class Wrapped(torch.Tensor):
    """A subclass that takes operators into its own hands."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastfocal" or func is torch.ops.aten.new_empty.default:
            raise RuntimeError("Wrapped: no such operator")
        unwrapped = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        out = func(*unwrapped[0], **unwrapped[1])
        return torch.utils._pytree.tree_map_only(Tensor, Wrapped, out)


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_subclasses_that_add_to_a_tensor(mode: str) -> None:
    levels, step = soft_step(mode, torch.channels_last, what="labels")
    plain = [x.clone().requires_grad_() for x in levels]
    step([x * 1 for x in plain], fastfocal).backward()
    leaves = [x.clone().as_subclass(Named).requires_grad_() for x in levels]
    given = [x * 1 for x in leaves]
    assert all(type(x) is Named for x in given)
    loss = step(given, fastfocal)
    loss.backward()
    for a, b in zip(leaves, plain, strict=True):
        assert torch.equal(a.grad.as_subclass(Tensor), b.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_a_subclass_that_fails_has_not_been_written_to(mode: str) -> None:
    inner = torch.randn(2, 6, CLASSES)
    before = inner.clone()
    logits = Wrapped(inner).requires_grad_()
    with pytest.raises((TypeError, RuntimeError), match="Wrapped"):
        focal_loss(
            logits * 1 if mode != "inplace" else logits.view(2, 6, CLASSES), torch.zeros(2, 6).long(), grad_mode=mode
        )
    assert torch.equal(inner, before)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="needs torch.distributed")
def test_distributed_data_parallel(one_process: Any) -> None:
    model = made()
    torch.nn.parallel.DistributedDataParallel(model)(*inputs()).backward()
    compare(named(model), expected())


@pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="needs torch.distributed")
def test_distributed_tensors_say_what_to_do(one_process: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    logits = distribute_tensor(torch.randn(2, 6, CLASSES, requires_grad=True), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"logits: expected a local tensor, got a DTensor; pass .*to_local\(\)"):
        focal_loss(logits, torch.zeros(2, 6, dtype=torch.int64))
    labels = distribute_tensor(torch.zeros(2, 6, dtype=torch.int64), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"targets\[0\]: expected a local tensor, got a DTensor"):
        focal_loss([torch.randn(2, 6, CLASSES)], [labels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_deepcopy_and_pickle_in_the_middle_of_training(dtype: torch.dtype) -> None:
    model = made(alpha=[0.2, 0.5, 0.9])
    model(*inputs()).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(*inputs()).backward()
    compare(named(twin), expected(alpha=[0.2, 0.5, 0.9]))


# --- in place ---------------------------------------------------------------------------------------------------------


def test_in_place_on_a_view_is_found_by_autograd_grad() -> None:
    """A view has another grad_fn once its memory was written to: the node points to that one."""
    generator = torch.Generator().manual_seed(6)
    leaf = torch.randn(8, 6, CLASSES, generator=generator, requires_grad=True)
    labels = torch.randint(0, CLASSES + 1, (4, 6), generator=generator)
    want = leaf.detach()[:4].clone().requires_grad_()
    focal_loss(want, labels).backward()
    whole = leaf * 1
    view = whole[:4]
    loss = focal_loss(view, labels, grad_mode="inplace")
    (found,) = torch.autograd.grad(loss, view, retain_graph=True)
    assert torch.equal(found, want.grad)  # type: ignore[arg-type]
    loss.backward()
    assert torch.equal(leaf.grad[:4], want.grad) and not leaf.grad[4:].any()  # type: ignore[index, arg-type]


def test_in_place_on_one_of_many_views_is_refused_before_it_is_written() -> None:
    whole = torch.randn(8, 6, CLASSES, requires_grad=True) * 1
    view = whole.chunk(2)[0]
    before = view.detach().clone()
    with pytest.raises(RuntimeError, match="multiple views"):
        focal_loss(view, torch.zeros(4, 6, dtype=torch.int64), grad_mode="inplace")
    assert torch.equal(view.detach(), before)
