"""`ema_momentum`: detectron2's running normalizer, kept on the device."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import NATIVE, same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastfocal
from fastfocal import FastFocalLoss, focal_loss, reference
from fastfocal.losses import LOSSES

CLASSES = 3
MODULES: list[Any] = [FastFocalLoss, reference.FocalLoss]


class Detectron2:
    """`_ema_update` of detectron2/modeling/meta_arch/dense_detector.py, word for word; and how its RetinaNet calls it."""

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        if hasattr(self, name):  # noqa: SIM108
            old = getattr(self, name)
        else:
            old = initial_value
        new = old * momentum + value * (1 - momentum)
        setattr(self, name, new)
        return new  # type: ignore[no-any-return]

    def normalizer(self, labels: list[Tensor], initial_value: float) -> float:
        gt_labels = torch.cat(labels, dim=1)
        pos_mask = (gt_labels >= 0) & (gt_labels != CLASSES)
        num_pos_anchors = pos_mask.sum().item()
        return self._ema_update("loss_normalizer", max(num_pos_anchors, 1), initial_value)


def logits(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(2, m, CLASSES, generator=generator) for m in (12, 5)]


def labels(generator: torch.Generator, lowest: int = -1) -> list[Tensor]:
    return [torch.randint(lowest, CLASSES + 1, (2, m), generator=generator) for m in (12, 5)]


def value(criterion: nn.Module) -> float:
    found = criterion.ema_normalizer
    assert isinstance(found, Tensor) and found.dtype == torch.float64 and found.dim() == 0
    return found.item()


def gradients(call: Callable[..., Tensor], levels: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in levels]
    call(leaves, *args, **options).backward()
    return [x.grad for x in leaves]  # type: ignore[misc]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("start", [100, 300])
def test_detectron2s_numbers(module: Any, start: int, generator: torch.Generator) -> None:
    """The same 64 bits, step after step; every fourth without a positive."""
    host, criterion = Detectron2(), module(CLASSES, ema_momentum=0.9, ema_start=start)
    for step in range(40):
        x, y = logits(generator), labels(generator, CLASSES if step % 4 == 0 else -1)
        want = host.normalizer(y, start)
        loss = criterion(x, y)
        assert value(criterion) == want
        plain = focal_loss(x, y, num_classes=CLASSES, normalizer=want)
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)  # float32: a division before or after the sum
    assert want < start / 2


@pytest.mark.parametrize("member", LOSSES, ids=lambda member: member.module.__name__)
def test_every_module_has_it(member: Any) -> None:
    criterion = member.module(CLASSES, ema_momentum=0.5, ema_start=8.0, normalizer="positives", sync_normalizer=False)
    assert criterion.ema_momentum == 0.5 and value(criterion) == 8.0
    assert "ema_momentum=0.5, ema_start=8.0" in repr(criterion)
    assert list(criterion.state_dict()) == ["ema_normalizer"] and not list(criterion.parameters())
    assert not member.module(CLASSES).state_dict()


def test_a_tensor_goes_in_as_it_is(generator: torch.Generator) -> None:
    """The sum of soft targets, say; float32, and on the way to it half of what it was."""
    x = logits(generator)
    soft = [t.sigmoid() for t in x]
    total = torch.stack([t.sum() for t in soft]).sum()
    criterion = FastFocalLoss(CLASSES, ema_momentum=0.5, ema_start=10.0)
    loss = criterion(x, soft, normalizer=total)
    want = 10.0 * 0.5 + total.item() * 0.5
    assert value(criterion) == want
    torch.testing.assert_close(loss, focal_loss(x, soft, normalizer=want), rtol=1e-6, atol=0)  # float32, as above


@pytest.mark.parametrize("module", MODULES)
def test_only_training_goes_on_with_it(module: Any, generator: torch.Generator) -> None:
    """Without gradients or in evaluation a call divides by what it is."""
    x, y = logits(generator), labels(generator)
    criterion = module(CLASSES, ema_momentum=0.9)
    criterion(x, y)
    before = value(criterion)
    want = focal_loss(x, y, num_classes=CLASSES, normalizer=before)
    with torch.no_grad():
        found = [criterion(x, y)]
    with torch.inference_mode():
        found.append(criterion(x, y))
    found.append(criterion.eval()(x, y))
    for loss in found:
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # float32, as above
    assert value(criterion) == before
    criterion.train()(x, y)
    assert value(criterion) < before


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
def test_gradient_accumulation(mode: str, generator: torch.Generator) -> None:
    """Each call goes on by itself, and divides by what it then was: also where all backwards come last."""
    batches = [(logits(generator), labels(generator)) for _ in range(3)]
    host = Detectron2()
    want = [
        gradients(focal_loss, x, y, num_classes=CLASSES, normalizer=host.normalizer(y, 100), grad_mode="save")
        for x, y in batches
    ]
    criterion = FastFocalLoss(CLASSES, ema_momentum=0.9, grad_mode=mode)
    leaves = [[t.clone().requires_grad_() for t in x] for x, _ in batches]
    losses = [criterion([t * 1 for t in x], y) for x, (_, y) in zip(leaves, batches, strict=True)]
    criterion.eval()([t * 1 for t in leaves[0]], batches[0][1]).backward()  # of the last value, which is then kept
    for t in leaves[0]:
        t.grad = None
    criterion.train()(*batches[0])
    for loss in losses:
        loss.backward()
    for got, expected in zip(leaves, want, strict=True):
        for t, g in zip(got, expected, strict=True):
            torch.testing.assert_close(t.grad, g, rtol=1e-6, atol=0)  # float32: one division, before or after a product


class Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(4, CLASSES)
        self.criterion = criterion

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.head(features), targets)  # type: ignore[no-any-return]


def steps(call: Callable[[Tensor, Tensor], Tensor], model: Model, generator: torch.Generator) -> list[Any]:
    found: list[Any] = []
    for step in range(3):
        features = torch.randn(2, 9 + step, 4, generator=generator)
        targets = torch.randint(-1, CLASSES + 1, (2, 9 + step), generator=generator)
        model.zero_grad()
        call(features, targets).backward()
        assert model.head.weight.grad is not None
        found.append((value(model.criterion), model.head.weight.grad.clone()))
    return found


def same_steps(got: list[Any], want: list[Any]) -> None:
    for (a, g), (b, h) in zip(got, want, strict=True):
        assert a == b
        torch.testing.assert_close(g, h, rtol=2e-6, atol=1e-9)  # float32: products summed in another order


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend: str) -> None:
    """One graph, that writes to the buffer; sizes change from step to step."""
    torch._dynamo.reset()
    plain = Model(FastFocalLoss(CLASSES, ema_momentum=0.9))
    want = steps(plain, plain, torch.Generator().manual_seed(1))
    model = Model(FastFocalLoss(CLASSES, ema_momentum=0.9))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    same_steps(steps(compiled, model, torch.Generator().manual_seed(1)), want)
    model.eval()
    last = value(model.criterion)
    compiled(torch.ones(2, 9, 4), torch.zeros(2, 9, dtype=torch.int64))
    assert value(model.criterion) == last


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict: bool) -> None:
    """The exported program goes on with what it holds, which is the module's own buffer."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 9, 4, generator=generator), torch.randint(-1, CLASSES + 1, (2, 9), generator=generator)
    model = Model(FastFocalLoss(CLASSES, ema_momentum=0.9))
    exported: Any = torch.export.export(copy.deepcopy(model), inputs, strict=strict).module()
    for _ in range(3):
        torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-6, atol=0)  # a division, before or after
        assert exported.criterion.ema_normalizer.item() == value(model.criterion)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_checkpoint(mode: str, reentrant: bool) -> None:
    """Computed twice, gone on with once; the gradient is that of a step without checkpoint."""
    plain = Model(FastFocalLoss(CLASSES, ema_momentum=0.9, grad_mode=mode))
    want = steps(plain, plain, torch.Generator().manual_seed(1))
    model = Model(FastFocalLoss(CLASSES, ema_momentum=0.9, grad_mode=mode))

    def call(features: Tensor, targets: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
            model, features.requires_grad_(), targets, use_reentrant=reentrant
        )

    same_steps(steps(call, model, torch.Generator().manual_seed(1)), want)


class NoNumberIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "item", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", NATIVE)
def test_the_host_reads_nothing(device: str, generator: torch.Generator) -> None:
    x = [t.to(device).requires_grad_() for t in logits(generator)]
    y = [t.to(device) for t in labels(generator)]
    criterion = FastFocalLoss(CLASSES, ema_momentum=0.9)
    criterion(x, y)  # moves the buffer
    assert criterion.ema_normalizer.device == x[0].device  # type: ignore[union-attr]
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoNumberIsRead():
            criterion(x, y).backward()
            criterion.eval()(x, y).backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    host = Detectron2()
    host.normalizer(y, 100)
    assert value(criterion) == host.normalizer(y, 100)


# --- its state --------------------------------------------------------------------------------------------------------


def advanced(generator: torch.Generator, module: Any = FastFocalLoss) -> Any:
    criterion = module(CLASSES, ema_momentum=0.9)
    criterion(logits(generator), labels(generator))
    assert value(criterion) != 100
    return criterion


def saved_whole(criterion: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def through_state(criterion: Any, assign: bool = False) -> nn.Module:
    twin = type(criterion)(CLASSES, ema_momentum=0.9)
    assert not any(twin.load_state_dict(criterion.state_dict(), assign=assign))
    return twin  # type: ignore[no-any-return]


KEPT: dict[str, Callable[[Any], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda criterion: pickle.loads(pickle.dumps(criterion)),
    "torch.save": saved_whole,
    "state_dict": through_state,
    "state_dict assigned": lambda criterion: through_state(criterion, assign=True),
    "half": lambda criterion: criterion.half(),
    "float": lambda criterion: criterion.float(),
    "bfloat16": lambda criterion: criterion.to("cpu", torch.bfloat16),
    "to_empty": lambda criterion: criterion.to_empty(device="cpu"),
    "share_memory": lambda criterion: criterion.share_memory(),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("how", KEPT)
def test_it_is_kept(how: str, module: Any, generator: torch.Generator) -> None:
    """Float64, whatever the module is cast to; a copy goes on by itself."""
    criterion = advanced(generator, module)
    before = value(criterion)
    twin = KEPT[how](criterion)
    assert value(twin) == before
    y = labels(generator)
    twin(logits(generator), y)
    host = Detectron2()
    host.loss_normalizer = before  # type: ignore[attr-defined]
    assert value(twin) == host.normalizer(y, 100)
    assert twin is criterion or value(criterion) == before or "assigned" in how


def test_a_state_from_before_it_was_there(generator: torch.Generator) -> None:
    """A checkpoint of a model without it loads, strictly, and leaves it; what else is missing is said."""
    old, model = Model(FastFocalLoss(CLASSES)), Model(FastFocalLoss(CLASSES, ema_momentum=0.9))
    assert "criterion.ema_normalizer" not in old.state_dict()
    assert not any(model.load_state_dict(old.state_dict()))
    assert value(model.criterion) == 100
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"criterion.ema_normalizer"'):
        old.load_state_dict(model.state_dict())
    sixteen = {name: t.half() for name, t in model.state_dict().items()}
    model.load_state_dict(sixteen, assign=True)
    assert value(model.criterion) == 100


def test_memory_without_data_starts_anew() -> None:
    criterion = FastFocalLoss(CLASSES, ema_momentum=0.9, ema_start=50.0).to("meta")
    assert criterion.ema_normalizer.is_meta  # type: ignore[union-attr]
    assert value(criterion.to_empty(device="cpu")) == 50
    with torch.device("meta"):
        criterion = FastFocalLoss(CLASSES, ema_momentum=0.9, ema_start=50.0)
    for module in nn.Sequential(criterion.to("meta")).modules():  # as FSDP does
        module.to_empty(device="cpu", recurse=False)
    assert value(criterion) == 50


def test_logits_without_data_leave_it(generator: torch.Generator) -> None:
    criterion = advanced(generator)
    before = value(criterion)
    criterion([t.to("meta") for t in logits(generator)], [t.to("meta") for t in labels(generator)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        criterion(torch.empty(2, 9, CLASSES), torch.zeros(2, 9, dtype=torch.int64))
    assert value(criterion) == before


def test_set_later(generator: torch.Generator) -> None:
    x, y = logits(generator), labels(generator)
    criterion = FastFocalLoss(CLASSES)
    criterion(x, y)
    criterion.ema_momentum = 0.9
    criterion(x, y)
    first = value(criterion)
    assert first != 100
    criterion.ema_momentum = 0.5  # another momentum, the same mean
    assert value(criterion) == first
    criterion.ema_momentum = None
    assert same_bits(criterion(x, y), focal_loss(x, y, num_classes=CLASSES)) and not criterion.state_dict()


def test_a_module_of_an_earlier_version(generator: torch.Generator) -> None:
    for module in MODULES:
        criterion = module(CLASSES)
        state = copy.deepcopy(criterion.__dict__)
        for name in ("sync_normalizer", "ema_start", "_process_group", "_ema_momentum"):
            del state[name]
        assert "ema_normalizer" not in state["_buffers"]
        read = module.__new__(module)
        read.__setstate__(state)
        x, y = logits(generator), labels(generator)
        assert same_bits(read(x, y), criterion(x, y)) and read.ema_momentum is None and read.process_group is None


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "momentum above 1": ({"ema_momentum": 1.5}, r"ema_momentum: expected a number in \[0, 1\], got 1.5"),
    "momentum NaN": ({"ema_momentum": float("nan")}, r"ema_momentum: expected a number in \[0, 1\]"),
    "momentum True": ({"ema_momentum": True}, "ema_momentum: expected a number, got bool"),
    "start 0": ({"ema_start": 0.0}, "ema_start: expected a finite number > 0, got 0.0"),
    "start infinite": ({"ema_start": float("inf")}, "ema_start: expected a finite number > 0"),
    "start text": ({"ema_start": "100"}, "ema_start: expected a number, got str"),
    "mean": ({"ema_momentum": 0.9, "reduction": "mean"}, 'ema_momentum: reduction "mean" has no normalizer'),
    "per image": (
        {"ema_momentum": 0.9, "normalizer": "positives_per_image"},
        "normalizer: ema_momentum expects one count for all images, .*; got 'positives_per_image'",
    ),
    "constant": ({"ema_momentum": 0.9, "normalizer": 3.0}, "normalizer: ema_momentum expects .*; got 3.0"),
    "none": ({"ema_momentum": 0.9, "normalizer": None}, "normalizer: ema_momentum expects .*; got None"),
    "tensor": (
        {"ema_momentum": 0.9, "normalizer": torch.ones(2)},
        r"normalizer: ema_momentum expects .*; got a tensor of shape \(2,\)",
    ),
    "sync of a constant": ({"sync_normalizer": True, "normalizer": 3.0}, "normalizer: sync_normalizer expects what adds up"),
    "sync of nothing": ({"sync_normalizer": True, "normalizer": None}, "normalizer: sync_normalizer expects .*; got None"),
    "sync of images": ({"sync_normalizer": True, "normalizer": torch.ones(2)}, "normalizer: sync_normalizer expects"),
    "sync 1": ({"sync_normalizer": 1}, "sync_normalizer: expected True or False, got 1"),
    "group": ({"sync_normalizer": True, "process_group": "gloo"}, "process_group: expected a torch.distributed.ProcessGroup"),
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, module: Any, generator: torch.Generator) -> None:
    options, words = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        module(CLASSES, **options)
    per_call = options.get("normalizer")
    if per_call is not None:
        criterion = module(CLASSES, **{n: v for n, v in options.items() if n != "normalizer"})
        for called in (criterion, copy.deepcopy(criterion).eval()):
            with pytest.raises(ValueError, match=f"^{words}"):
                called(logits(generator), labels(generator), normalizer=per_call)
        if "ema_momentum" in options:
            assert value(criterion) == 100


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_torch_func(backend: str | None, generator: torch.Generator) -> None:
    """A write to what is not an argument: refused, by our words or by PyTorch's. As it is it may be used."""
    torch._dynamo.reset()
    x, y = torch.randn(2, 9, CLASSES, generator=generator), torch.randint(-1, CLASSES + 1, (2, 9), generator=generator)
    criterion = FastFocalLoss(CLASSES, ema_momentum=0.9)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: criterion(t, y))(x)  # type: ignore[no-any-return]

    words = "ema_momentum: is not supported within torch.func; compute the normalizer outside"
    with pytest.raises(Exception, match=words if backend is None else "."):
        (torch.compile(gradient, backend=backend, fullgraph=True) if backend else gradient)(x)
    assert value(criterion) == 100
    criterion.eval()
    torch._dynamo.reset()
    got = (torch.compile(gradient, backend=backend, fullgraph=True) if backend else gradient)(x)
    (want,) = gradients(focal_loss, [x], y, normalizer=100.0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # float32, as above


def test_what_is_not_for_functions(generator: torch.Generator) -> None:
    for name in fastfocal.distributed.MODULE_DEFAULTS:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            focal_loss(logits(generator), labels(generator), num_classes=CLASSES, **{name: None})  # type: ignore[call-overload]
