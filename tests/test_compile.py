"""torch.library.opcheck on real calls of the operators, and torch.compile against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import (
    Size,
    arrange,
    assert_close,
    draw_classes,
    draw_levels,
    encode,
    leaves,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from watch import Call, Recorder

from fastfocal import FastFocalLoss, focal_loss, sigmoid_focal_loss
from fastfocal.losses import LOSSES, Member

SIZE = Size(2, 2, 5, ((5, 3), (3, 1)))


def problem(
    dtype: torch.dtype = torch.float32, layout: str = "contiguous", size: Size = SIZE
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return draw_levels(size, generator, dtype=dtype, layout=layout), encode(draw_classes(size, generator), size.classes)


# --- opcheck ----------------------------------------------------------------------------------------------------------

# Every way through the operators: both target forms, every reduction, normalizer and gradient mode, optional tensors.
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "channels_last": {"layout": "channels_last"},
    "one_label_tensor": {"form": "one_transposed"},
    "three_dimensional": {"layout": "3d"},
    "save_scaled": {"grad_mode": "save", "scale": 3.0},
    "save_twice": {"grad_mode": "save", "scale": 3.0, "backwards": 2},
    "recompute": {"grad_mode": "recompute", "scale": 3.0},
    "inplace": {"grad_mode": "inplace", "scale": 3.0},
    "inplace_twice": {"grad_mode": "inplace", "scale": 3.0, "backwards": 2},
    "by_level": {"reduction": "level"},
    "by_image": {"reduction": "image", "normalizer": "positives_per_image"},
    "unreduced": {"reduction": "none"},
    "mean": {"reduction": "mean"},
    "number": {"normalizer": 7.0, "alpha": None, "gamma": 1.5},
    "tensors": {
        "normalizer": torch.tensor([1.0, 2.0]),
        "alpha": [0.1, 0.2, 0.3, 0.4, 0.5],
        "level_weights": [1.0, 2.0],
    },
    "weighted": {"weight": True, "label_smoothing": 0.1},
    "soft": {"soft": True, "normalizer": None},
    "soft_recompute": {"soft": True, "normalizer": 2.0, "grad_mode": "recompute"},
    "without_gradient": {"no_grad": True},
    "some_levels": {"some": True},
    "second": {"second": True, "grad_mode": "save", "scale": 3.0},
    "second_by_image": {"second": True, "reduction": "image", "layout": "channels_last"},
    "second_unreduced": {"second": True, "reduction": "none", "soft": True, "normalizer": None},
    "second_of_some_levels": {"second": True, "some": True, "reduction": "level"},
}


def calls_of(
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    form: str = "nm",
    scale: float = 1.0,
    weight: bool = False,
    soft: bool = False,
    no_grad: bool = False,
    some: bool = False,
    backwards: int = 1,
    second: bool = False,
    **options: Any,
) -> list[Call]:
    levels, labels = problem(dtype, layout)
    targets = [x.float().sigmoid().to(dtype) for x in levels] if soft else arrange(labels, SIZE, form)
    given = [x.clone() for x in leaves(levels)]
    if some:
        given[0] = given[0].detach()
    if weight:
        options["weight"] = [torch.full(y.shape, 0.5) for y in labels]
    with Recorder() as recorder, torch.set_grad_enabled(not no_grad):
        loss = focal_loss(given, targets, num_classes=SIZE.classes, **options)
        if not no_grad:
            parts = loss if isinstance(loss, list) else [loss]
            wanted = [x for x in given if x.requires_grad]
            for left in reversed(range(backwards)):
                incoming = [torch.full_like(part, scale) for part in parts]
                grads = torch.autograd.grad(parts, wanted, incoming, retain_graph=left > 0, create_graph=second)
                if second:
                    torch.autograd.grad(grads, wanted, [torch.ones_like(g) for g in grads])
    return recorder.calls


HEADS: dict[str, dict[str, Any]] = {
    "head": {},
    "head_recompute": {"grad_mode": "recompute"},
    "head_by_image": {"reduction": "image", "normalizer": "positives_per_image"},
    "head_float16": {"dtype": torch.float16},
    "head_linear_soft": {"linear": True, "normalizer": 3.0},
    "head_frozen": {"frozen": True},
}


def calls_of_head(
    *, dtype: torch.dtype = torch.float32, linear: bool = False, frozen: bool = False, **options: Any
) -> list[Call]:
    """Those of a fused head, which calls operators of its own where a compiler is at work."""
    generator = torch.Generator().manual_seed(0)
    layer = (nn.Linear(4, 3) if linear else nn.Conv2d(4, 6, 3, padding=1)).to(dtype)
    shapes = [(2, 5, 4), (2, 2, 4)] if linear else [(2, 4, 5, 3), (2, 4, 1, 2)]
    features = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    layer.weight.requires_grad_(not frozen)
    criterion = FastFocalLoss(3, **options)
    targets: list[Tensor] = [torch.randint(-1, 4, (2, n), generator=generator) for n in (30, 4)]
    if linear:
        targets = [torch.rand(*shape[:2], 3, generator=generator).to(dtype) for shape in shapes]
    with Recorder() as recorder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastfocal.heads.loss.is_compiling", lambda: True)
        criterion.fused_with(layer, features, targets, chunk_bytes=100).sum().backward()
    return recorder.calls


def describe(call: Call) -> str:
    """What a fake function can see: a second call that looks the same teaches nothing."""
    seen = torch.utils._pytree.tree_map_only(Tensor, lambda x: (x.shape, x.stride(), x.dtype), (call.args, call.kwargs))
    return f"{call.name} {seen}"


@pytest.fixture(scope="module")
def checked() -> set[str]:
    return set()


@pytest.mark.parametrize("name", [*STEPS, *HEADS])
def test_opcheck(name: str, checked: set[str]) -> None:
    """Schemas tell the truth about writes and aliases, fake functions about shapes, dtypes and strides."""
    calls = calls_of(**STEPS[name]) if name in STEPS else calls_of_head(**HEADS[name])
    assert calls, "no operator of fastfocal was called"
    for call in calls:
        if (signature := describe(call)) not in checked:
            checked.add(signature)
            torch.library.opcheck(call.operator, call.args, call.kwargs)


def test_opcheck_covers_every_operator() -> None:
    """An operator that no step above reaches would go unchecked."""
    calls = [call for step in STEPS.values() for call in calls_of(**step)]
    calls += [call for head in HEADS.values() for call in calls_of_head(**head)]
    called = {call.operator.name().split(".")[0] for call in calls}
    registered = {
        name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastfocal::")
    }
    assert registered - called == set()


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compare_with_eager(
    step: Callable[..., Any], backend: str, levels: list[Tensor], targets: Any, *, relative: float = 1e-6
) -> None:
    """Loss and gradients of the compiled step; the logits come from a multiplication, as from a network."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (step, compiled):
        inputs = [x.detach().clone().requires_grad_() for x in levels]
        loss = function(inputs, targets)
        parts = list(loss) if isinstance(loss, (list, tuple)) else [loss]
        torch.autograd.backward([part.sum() for part in parts])
        results.append([*parts, *(x.grad for x in inputs)])
    # The kernel is the same, and doubling the logits is exact; what is around the loss may be fused: 6e-8 each time.
    for eager, got in zip(*results, strict=True):
        assert got.dtype == eager.dtype and got.stride() == eager.stride()
        want = eager.detach().double().numpy()
        assert_close(got, want, relative)


MODULES: dict[str, dict[str, Any]] = {
    "default": {},
    "save": {"grad_mode": "save"},
    "recompute": {"grad_mode": "recompute"},
    "recompute_options": {
        "grad_mode": "recompute",
        "alpha": [0.1, 0.2, 0.3, 0.4, 0.5],
        "gamma": 1.5,
        "reduction": "image",
    },
    "inplace": {"grad_mode": "inplace"},
    "level": {"reduction": "level"},
    "image": {"reduction": "image", "normalizer": "positives_per_image"},
    "none": {"reduction": "none"},
    "mean": {"reduction": "mean"},
    "options": {"alpha": [0.1, 0.2, 0.3, 0.4, 0.5], "gamma": 1.5, "level_weights": [1.0, 2.0], "label_smoothing": 0.1},
    "voc_labels": {"background_index": 0, "ignore_index": 255, "normalizer": 3.0},
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_step_equals_eager(name: str) -> None:
    options = MODULES[name]
    criterion = FastFocalLoss(SIZE.classes, **options)
    levels, _ = problem(layout="channels_last" if name == "default" else "contiguous")
    drawn = draw_classes(SIZE, torch.Generator().manual_seed(4))
    labels = encode(drawn, SIZE.classes, options.get("background_index"), options.get("ignore_index", -1))
    one = arrange(labels, SIZE, "one")
    compare_with_eager(lambda xs, y: criterion([2 * x for x in xs], y), "aot_eager", levels, one)


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_compiled_step_with_logits_that_are_copied_to_be_read(mode: str) -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(SIZE.classes, grad_mode=mode)
    strided = [torch.stack([x, x], dim=-1) for x in levels]
    compare_with_eager(lambda xs, y: criterion([x[..., 0] for x in xs], y), "aot_eager", strided, labels)


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_compiled_step_with_soft_targets_and_weights(mode: str) -> None:
    levels, labels = problem()
    soft = [x.sigmoid() for x in levels]
    weight = [torch.full(y.shape, 0.5) for y in labels]
    criterion = FastFocalLoss(SIZE.classes, normalizer=2.0, alpha=[0.1, 0.2, 0.3, 0.4, 0.5], grad_mode=mode)
    compare_with_eager(lambda xs, y: criterion([2 * x for x in xs], y, weight), "aot_eager", levels, soft)


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("form", ["list", "one", "columns", "wide", "expanded"])
@pytest.mark.parametrize("member", [m for m in LOSSES if m.parameters.takes_scores], ids=lambda m: m.parameters.name)
def test_compiled_step_with_scores(member: Member, form: str, mode: str) -> None:
    """One graph, whatever the scores are like; also of a program that was exported with others."""
    levels, labels = problem()
    columns = sum(SIZE.level_anchors())
    rows = torch.rand(SIZE.images, columns + 3, generator=torch.Generator().manual_seed(5))
    forms: dict[str, Any] = {
        "list": list(rows[:, :columns].split(SIZE.level_anchors(), 1)),
        "one": rows[:, :columns].contiguous(),
        "columns": rows[:, :columns].t().contiguous().t(),
        "wide": rows[:, :columns],
        "expanded": rows[:1, :columns].expand(SIZE.images, columns),
    }
    scores = forms[form]
    criterion = member.module(SIZE.classes, normalizer="scores", grad_mode=mode)
    compare_with_eager(lambda xs, y: criterion([2 * x for x in xs], y, scores=scores), "aot_eager", levels, labels)
    if form != "one" or mode != "save":
        return

    class Loss(nn.Module):
        def forward(self, xs: list[Tensor], y: list[Tensor], given: Tensor) -> Tensor:
            return criterion(xs, y, scores=given)  # type: ignore[no-any-return]

    for strict in (True, False):
        exported = torch.export.export(Loss(), (levels, labels, scores), strict=strict).module()
        for other in (scores, forms["columns"], forms["wide"]):
            torch.testing.assert_close(exported(levels, labels, other), criterion(levels, labels, scores=scores))


def test_compiled_step_with_a_normalizer_on_the_device() -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(SIZE.classes)

    def step(xs: list[Tensor], y: list[Tensor]) -> Tensor:
        count = sum(((part >= 0) & (part < SIZE.classes)).sum() for part in y)
        return criterion([2 * x for x in xs], y, normalizer=count.clamp(min=1).float()) * 3  # type: ignore[union-attr]

    compare_with_eager(step, "aot_eager", levels, labels)


def test_one_graph_serves_another_size() -> None:
    """Images of another size make the shapes symbolic; two levels grow by different amounts."""
    torch._dynamo.reset()
    criterion = FastFocalLoss(SIZE.classes)
    compiled = torch.compile(lambda xs, y: criterion([2 * x for x in xs], y), fullgraph=True, backend="aot_eager")
    for cells in (((5, 3), (3, 2)), ((6, 4), (4, 3)), ((9, 7), (5, 4))):
        size = Size(2, 2, 5, cells)
        levels, labels = problem(size=size)
        inputs = leaves(levels)
        loss = compiled(inputs, labels)
        loss.backward()
        twin = leaves(levels)
        eager = criterion([2 * x for x in twin], labels)
        eager.backward()
        assert_close(loss.detach(), eager.item(), 1e-6)
        for got, want in zip(inputs, twin, strict=True):
            assert_close(got.grad, want.grad.double().numpy(), 1e-6)  # type: ignore[arg-type, union-attr]


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    """Once through code generation, with operators around the loss that inductor fuses."""
    levels, labels = problem()
    criterion = FastFocalLoss(SIZE.classes)
    compare_with_eager(lambda xs, y: criterion([2 * x + 1 for x in xs], y) * 3, "inductor", levels, labels)


# --- other tracers ----------------------------------------------------------------------------------------------------


def test_shapes_alone_go_through_forward_and_backward() -> None:
    """As a memory estimate of a training step runs it: no data anywhere."""
    with FakeTensorMode():
        logits = [torch.empty(2, 15, 5, 3, requires_grad=True)]
        focal_loss(logits, torch.zeros(2, 45, dtype=torch.int64), num_classes=5).backward()
    assert logits[0].grad is not None and logits[0].grad.shape == logits[0].shape


def test_a_traced_training_step_gives_the_same() -> None:
    """make_fx records what a call runs, backward included; nothing may depend on a number in a tensor."""
    levels, labels = problem()

    def step(*logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(focal_loss(list(logits), labels, num_classes=5), logits)

    inputs = leaves(levels)
    for found, expected in zip(make_fx(step)(*inputs)(*inputs), step(*inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["loss_weight", "alpha", "gamma"])
def test_a_number_that_changes_compiles_whole(name: str) -> None:
    """A schedule: the second value is compiled for any number."""
    torch._dynamo.reset()  # which compiles a function no more than eight times
    levels, labels = problem()
    criterion = FastFocalLoss(5)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for value in (0.5, 0.25, 0.75):
        setattr(criterion, name, value)
        assert torch.equal(compiled(levels, labels), focal_loss(levels, labels, num_classes=5, **{name: value}))


def test_dynamic_shapes_compile_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FastFocalLoss(5), backend="aot_eager", fullgraph=True, dynamic=True)
    for cells in (((5, 3), (3, 1)), ((4, 7), (2, 2))):
        levels, labels = problem(size=Size(2, 2, 5, cells))
        assert torch.equal(compiled(levels, labels), focal_loss(levels, labels, num_classes=5))


def test_alpha_for_each_class_without_data() -> None:
    with FakeTensorMode():
        criterion = FastFocalLoss(5, alpha=[0.1, 0.2, 0.3, 0.4, 0.5])
        logits = [torch.empty(2, 15, 5, 3, requires_grad=True)]
        criterion(logits, torch.zeros(2, 45, dtype=torch.int64)).backward()
    assert logits[0].grad is not None and logits[0].grad.shape == logits[0].shape
    with torch.device("meta"):
        FastFocalLoss(5, alpha=[0.1, 0.2, 0.3, 0.4, 0.5])
    levels, labels = problem()
    criterion = FastFocalLoss(5, alpha=[0.1, 0.2, 0.3, 0.4, 0.5])

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(criterion(list(given), labels), given)

    inputs = leaves(levels)
    for found, expected in zip(make_fx(step)(*inputs)(*inputs), step(*inputs), strict=True):
        assert torch.equal(found, expected)


SIZES: dict[str, Any] = {
    "sigmoid_mean": lambda x, y: sigmoid_focal_loss(x, x.detach().sigmoid(), reduction="mean"),
    "per_image": lambda x, y: focal_loss(x, y, normalizer="positives_per_image"),
    "soft_mean": lambda x, y: focal_loss(x, x.detach().sigmoid(), reduction="mean"),
    "positives": lambda x, y: focal_loss(x, y),
}


@pytest.mark.parametrize("name", SIZES)
def test_batch_sizes_compile_twice_at_the_most(name: str) -> None:
    """A size that is divided by would be compiled in as a number, for each batch anew."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = SIZES[name]
    compiled = torch.compile(step, backend=counter)
    for n in range(2, 9):
        x = torch.randn(n, 7, 5, generator=torch.Generator().manual_seed(n))
        y = torch.randint(0, 6, (n, 7), generator=torch.Generator().manual_seed(n))
        assert torch.allclose(compiled(x, y), step(x, y), rtol=1e-6, atol=0)
    assert counter.frame_count <= 2
