"""FastFocalLoss: the function with its options kept, and the package's other public names."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import Size, draw_classes, draw_levels, encode, leaves, same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastfocal
from fastfocal import FastFocalLoss, FastFocalLossStar, focal_loss, focal_loss_star, prepare
from fastfocal.prepare import quotient

SIZE = Size(2, 2, 5, ((5, 3), (2, 1)))
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "alpha_off": {"alpha": None},
    "alpha_list": {"alpha": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "alpha_tensor": {"alpha": torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])},
    "gamma": {"gamma": 1.5},
    "labels": {"background_index": 0, "ignore_index": 255},
    "level_weights": {"level_weights": [1.0, 3.0]},
    "smoothing": {"label_smoothing": 0.1},
    "detached": {"detach_modulating_factor": True},
    "normalizer_none": {"normalizer": None},
    "normalizer_number": {"normalizer": 7.5},
    "normalizer_tensor": {"normalizer": torch.tensor([2.0, 5.0])},
    "per_image": {"normalizer": "positives_per_image"},
    "level": {"reduction": "level"},
    "mean": {"reduction": "mean"},
    "recompute": {"grad_mode": "recompute"},
    "loss_weight": {"loss_weight": 2.5},
}


def problem(**options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    levels = draw_levels(SIZE, generator)
    drawn = draw_classes(SIZE, generator)
    return levels, encode(drawn, SIZE.classes, options.get("background_index"), options.get("ignore_index", -1))


@pytest.mark.parametrize("name", OPTIONS)
def test_module_equals_function(name: str) -> None:
    options = OPTIONS[name]
    levels, labels = problem(**options)
    results = []
    for call in (FastFocalLoss(SIZE.classes, **options), lambda x, y: focal_loss(x, y, num_classes=5, **options)):
        inputs = leaves(levels)
        loss = call(inputs, labels)
        results.append([loss, *torch.autograd.grad(loss.sum(), inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    plain = focal_loss(*problem(), num_classes=5)
    if name not in ("defaults", "labels", "recompute", "detached"):
        assert results[0][0].shape != plain.shape or results[0][0].item() != plain.item()  # the option does something


def test_weight_and_normalizer_per_call() -> None:
    """The call's normalizer goes before the constructor's; None stands for the constructor's."""
    levels, labels = problem()
    weight = [torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) for y in labels]
    criterion = FastFocalLoss(5, normalizer=3.0)
    for given, used in ((None, 3.0), (7.0, 7.0), ("positives", "positives"), (torch.tensor(2.0), 2.0)):
        got = criterion(levels, labels, weight, given)
        assert same_bits(got, focal_loss(levels, labels, num_classes=5, weight=weight, normalizer=used))
    assert same_bits(criterion(levels, labels), focal_loss(levels, labels, num_classes=5, normalizer=3.0))


def test_a_single_tensor() -> None:
    levels, labels = problem()
    assert same_bits(FastFocalLoss(5)(levels[0], labels[0]), focal_loss(levels[0], labels[0], num_classes=5))


def test_module_is_an_ordinary_module() -> None:
    """It copies, pickles, moves and prints; nothing of it is learned, so a checkpoint gains no keys."""
    criterion = FastFocalLoss(5, alpha=[0.1, 0.2, 0.3, 0.4, 0.5], gamma=1.5)
    assert isinstance(criterion, nn.Module) and not list(criterion.parameters()) and not criterion.state_dict()
    levels, labels = problem()
    want = criterion(levels, labels)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), saved]
    for twin in (*copies, criterion.eval(), criterion.half()):
        assert same_bits(twin(levels, labels), want)
    assert repr(criterion).startswith("FastFocalLoss(")


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options])
def test_an_attribute_set_later_counts(name: str) -> None:
    """A schedule may set gamma, say: the next call takes it."""
    options = OPTIONS[name]
    levels, labels = problem(**options)
    criterion = FastFocalLoss(SIZE.classes)
    criterion(*problem())
    for attribute, value in options.items():
        setattr(criterion, attribute, value)
    assert same_bits(criterion(levels, labels), focal_loss(levels, labels, num_classes=5, **options))


def test_level_weights_changed_in_place_count() -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(5, level_weights=[1.0, 1.0])
    criterion(levels, labels)
    assert criterion.level_weights is not None
    criterion.level_weights[1] = 3.0
    assert same_bits(criterion(levels, labels), focal_loss(levels, labels, num_classes=5, level_weights=[1.0, 3.0]))


@pytest.mark.parametrize(
    "attribute, value, named",
    [
        ("num_classes", 0, "num_classes"),
        ("alpha", 1.5, "alpha"),
        ("alpha", [0.5], "alpha"),
        ("gamma", -1.0, "gamma"),
        ("gamma", float("nan"), "gamma"),
        ("gamma", torch.tensor([1.0, 2.0]), "gamma"),
        ("gamma", "2", "gamma"),
        ("label_smoothing", 2.0, "label_smoothing"),
        ("detach_modulating_factor", "yes", "detach_modulating_factor"),
        ("detach_modulating_factor", 0, "detach_modulating_factor"),  # equal to what was there
        ("num_classes", 5.0, "num_classes"),
        ("background_index", 2, "background_index"),
        ("ignore_index", 5, "ignore_index"),
        ("level_weights", [1.0], "level_weights"),
        ("level_weights", [1.0, float("inf")], "level_weights"),
        ("reduction", "average", "reduction"),
        ("grad_mode", "fast", "grad_mode"),
        ("loss_weight", float("inf"), "loss_weight"),
        ("normalizer", 0.0, "normalizer"),
        ("normalizer", "negatives", "normalizer"),
    ],
)
def test_an_attribute_set_later_is_checked(attribute: str, value: Any, named: str) -> None:
    criterion = FastFocalLoss(5)
    criterion(*problem())
    for _ in range(2):  # when it is set or when it is used, and it stays wrong
        with pytest.raises((TypeError, ValueError), match=rf"^{named}"):
            setattr(criterion, attribute, value)
            criterion(*problem())


PER_CLASS = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("first", [0.25, None, PER_CLASS], ids=["one", "none", "per_class"])
@pytest.mark.parametrize("then", [0.9, None, PER_CLASS[::-1], torch.tensor(PER_CLASS[::-1])], ids=str)
def test_alpha_set_later_counts(first: Any, then: Any) -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(5, alpha=first)
    criterion(levels, labels)
    criterion.alpha = then
    assert same_bits(criterion(levels, labels), focal_loss(levels, labels, num_classes=5, alpha=then))
    expected = then if then is None or isinstance(then, float) else torch.as_tensor(then, dtype=torch.float64)
    assert criterion.alpha is then or torch.allclose(criterion.alpha, expected)


def test_alpha_is_copied() -> None:
    alpha = torch.tensor(PER_CLASS, dtype=torch.float64)
    levels, labels = problem()
    criterion = FastFocalLoss(5, alpha=alpha)
    before = criterion(levels, labels)
    alpha.fill_(0.9)
    assert same_bits(criterion(levels, labels), before)
    criterion.num_classes = 4
    with pytest.raises(ValueError, match=r"^alpha: expected one number per class, 4 of them, got 5"):
        criterion([torch.randn(2, 4, 3, 3)], [torch.zeros(2, 9, dtype=torch.int64)])


def test_star_attributes_set_later() -> None:
    levels, labels = problem()
    criterion = FastFocalLossStar(5)
    criterion(levels, labels)
    criterion.gamma, criterion.beta = 1.5, 0.5
    assert same_bits(criterion(levels, labels), focal_loss_star(levels, labels, num_classes=5, gamma=1.5, beta=0.5))
    criterion.beta = float("inf")
    with pytest.raises(ValueError, match=r"^beta"):
        criterion(levels, labels)


def test_float64_alpha_survives() -> None:
    """0.3 given as Python numbers is not rounded to float32 on the way to float64 logits."""
    levels, labels = problem()
    double = [x.double() for x in levels]
    one = FastFocalLoss(5, alpha=0.3)(double, labels)
    each = FastFocalLoss(5, alpha=[0.3] * 5)(double, labels)
    torch.testing.assert_close(each, one, rtol=1e-14, atol=0)


@pytest.mark.parametrize("option", [{"sync_normalizer": True}, {"ema_momentum": 0.9}], ids=str)
def test_what_comes_later_says_so(option: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        FastFocalLoss(5, **option)


def test_signatures() -> None:
    """Names, defaults and which arguments are by keyword alone: what callers may rely on."""
    empty = inspect.Parameter.empty
    common = {"alpha": 0.25, "gamma": 2.0, "labels": None, "background_index": None, "ignore_index": -1}
    late = {
        "label_smoothing": 0.0,
        "detach_modulating_factor": False,
        "normalizer": "positives",
        "reduction": "sum",
        "grad_mode": "auto",
        "loss_weight": 1.0,
    }
    common["class_weight"] = None
    function = {"num_classes": None, **common, "weight": None, "class_mask": None, "level_weights": None, **late}
    module = {**common, "level_weights": None, **late, "sync_normalizer": False, "ema_momentum": None}
    for owner in (fastfocal, fastfocal.reference):
        parameters = inspect.signature(owner.focal_loss).parameters
        assert {n: p.default for n, p in parameters.items()} == {"logits": empty, "targets": empty, **function}
        assert all(parameters[name].kind == inspect.Parameter.KEYWORD_ONLY for name in function)
    parameters = inspect.signature(FastFocalLoss).parameters
    assert {n: p.default for n, p in parameters.items()} == {"num_classes": empty, **module}
    forward = inspect.signature(FastFocalLoss.forward).parameters
    assert list(forward) == ["self", "logits", "targets", "weight", "normalizer", "class_mask"]
    assert all(forward[name].default is None for name in ("weight", "normalizer", "class_mask"))
    assert forward["class_mask"].kind == inspect.Parameter.KEYWORD_ONLY


def test_representation_shows_what_is_not_the_default() -> None:
    assert repr(FastFocalLoss(80)) == "FastFocalLoss(num_classes=80)"
    for name, options in OPTIONS.items():
        shown = repr(FastFocalLoss(5, **options))
        for option, value in options.items():
            assert f"{option}=" in shown, name
            if not isinstance(value, (torch.Tensor, list)):
                assert f"{option}={value!r}" in shown
        assert shown.count("=") == 1 + len(options)
    assert "alpha=[0.1, 0.2, 0.3, 0.4, ...]" in repr(FastFocalLoss(5, **OPTIONS["alpha_list"]))
    assert repr(FastFocalLossStar(3, beta=0.5)) == "FastFocalLossStar(num_classes=3, beta=0.5)"
    shown = repr(FastFocalLoss(80, labels="torchvision"))
    assert shown == "FastFocalLoss(num_classes=80, background_index=-1, ignore_index=-2)"


def test_public_names() -> None:
    for name in ("focal_loss", "FastFocalLoss", "sigmoid_focal_loss", "build_info", "reference", "__version__"):
        assert hasattr(fastfocal, name), name


def test_build_info() -> None:
    info = fastfocal.build_info()
    assert set(info) == {"version", "torch_built_for", "torch", "cuda", "cuda_archs", "cpu_capability", "compiler"}
    assert info["torch"] == torch.__version__ and info["version"] == fastfocal.__version__
    info["torch"] = "changed"
    assert fastfocal.build_info()["torch"] == torch.__version__  # each call gives a fresh dict


def test_package_is_typed() -> None:
    from importlib.resources import files

    assert files("fastfocal").joinpath("py.typed").is_file()


# --- alpha for each class, whatever happens to the module -------------------------------------------------------------

ALPHA = [0.1, 0.2, 0.3, 0.4, 0.5]


def through_meta(criterion: FastFocalLoss) -> nn.Module:
    return criterion.to("meta").to_empty(device="cpu")


def as_fully_sharded(criterion: FastFocalLoss) -> nn.Module:
    """As FSDP gives memory to modules made on the meta device: each by itself, then `reset_parameters` where there is one."""
    for module in nn.Sequential(criterion.to("meta")).modules():
        module.to_empty(device="cpu", recurse=False)
        getattr(module, "reset_parameters", lambda: None)()
    return criterion


MOVES: dict[str, Any] = {
    "to_empty": through_meta,
    "fully_sharded": as_fully_sharded,
    "half": lambda criterion: criterion.half(),
    "double": lambda criterion: criterion.double(),
    "to": lambda criterion: criterion.to("cpu", torch.bfloat16),
    "apply": lambda criterion: criterion.apply(lambda module: None),
    "deepcopy": copy.deepcopy,
    "deepcopy_of_meta": lambda criterion: copy.deepcopy(criterion.to("meta")).to_empty(device="cpu"),
    "pickle": lambda criterion: pickle.loads(pickle.dumps(criterion)),
    "share_memory": lambda criterion: criterion.share_memory(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("given", ["list", "tensor", "buffer", "parameter", "numpy"])
def test_alpha_for_each_class_is_what_was_given(given: str, move: str) -> None:
    values = torch.tensor(ALPHA)
    alpha: Any = {
        "list": ALPHA,
        "tensor": values,
        "buffer": nn.Buffer(values),
        "parameter": nn.Parameter(values, requires_grad=False),
        "numpy": values.numpy(),
    }[given]
    criterion = MOVES[move](FastFocalLoss(5, alpha=alpha))
    levels, labels = problem()
    want = focal_loss(levels, labels, num_classes=5, alpha=ALPHA if given == "list" else values)
    assert same_bits(criterion(levels, labels), want)
    assert criterion.alpha.dtype == torch.float64 and not criterion.state_dict()
    assert not list(criterion.parameters())


@pytest.mark.parametrize("kind", [torch.tensor, nn.Buffer, lambda x: nn.Parameter(x, requires_grad=False)])
def test_alpha_set_later(kind: Any) -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(5)
    for alpha in (ALPHA, ALPHA[::-1]):
        values = torch.tensor(alpha)
        criterion.alpha = values if kind is torch.tensor else kind(values)
        assert same_bits(criterion(levels, labels), focal_loss(levels, labels, num_classes=5, alpha=values))
        assert not list(criterion.parameters()) and len(list(criterion.buffers())) == 1
    criterion.alpha = 0.5
    assert same_bits(criterion(levels, labels), focal_loss(levels, labels, num_classes=5, alpha=0.5))
    assert not list(criterion.buffers())


@pytest.mark.parametrize("where", ["constructor", "attribute"])
def test_alpha_that_requires_a_gradient_is_refused(where: str) -> None:
    learned = nn.Parameter(torch.tensor(ALPHA))
    with pytest.raises(ValueError, match="alpha: is not differentiated, expected requires_grad=False"):
        if where == "constructor":
            FastFocalLoss(5, alpha=learned)
        else:
            FastFocalLoss(5).alpha = learned


def test_alpha_without_data_is_refused() -> None:
    with torch.device("meta"):
        FastFocalLoss(5, alpha=ALPHA)  # numbers are numbers
    with pytest.raises(ValueError, match=r"alpha: expected numbers, got a tensor without data \(device meta\)"):
        FastFocalLoss(5, alpha=torch.tensor(ALPHA, device="meta"))


def test_numpy_numbers_are_numbers() -> None:
    levels, labels = problem()
    for kind in (np.float32, np.float64, np.float16):
        options: dict[str, Any] = {"alpha": kind(0.5), "gamma": kind(1.5), "label_smoothing": kind(0.25)}
        options |= {
            "level_weights": np.array([1.0, 2.0], dtype=kind),
            "loss_weight": kind(2.0),
            "normalizer": kind(4.0),
        }
        plain = {name: float(value) for name, value in options.items() if name != "level_weights"}
        want = focal_loss(levels, labels, num_classes=5, level_weights=[1.0, 2.0], **plain)
        assert same_bits(focal_loss(levels, labels, num_classes=np.int64(5), **options), want)
        assert same_bits(FastFocalLoss(np.int32(5), **options)(levels, labels), want)
    indices = {"background_index": np.int64(5), "ignore_index": np.int16(-1)}
    assert same_bits(focal_loss(levels, labels, num_classes=5, **indices), focal_loss(levels, labels, num_classes=5))
    star = focal_loss_star(levels, labels, num_classes=5, gamma=np.float32(2), beta=np.float32(1))
    assert same_bits(star, focal_loss_star(levels, labels, num_classes=5, gamma=2.0, beta=1.0))


# --- nothing is copied from the host ----------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Records tensors that are made on the host while others are on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.from_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        got = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "meta" for t in got) and any(t.device.type == "cpu" for t in given):
            self.from_host.append(func.name())
        return out


@pytest.mark.parametrize("normalizer", [torch.tensor(3.0), torch.tensor(3)], ids=str)
def test_a_normalizer_on_the_host_is_not_copied(normalizer: torch.Tensor) -> None:
    """A copy from the host waits for it, and a CUDA graph that is captured refuses it. The device here is "meta"."""
    levels, labels = problem()
    with Copies() as copies:
        focal_loss([x.to("meta") for x in levels], [y.to("meta") for y in labels], num_classes=5, normalizer=normalizer)
    assert "aten::_to_copy" in copies.from_host  # those of logits and labels: it sees them
    with Copies() as copies:
        on_device = [x.to("meta") for x in levels], [y.to("meta") for y in labels]
        copies.from_host.clear()
        focal_loss(*on_device, num_classes=5, normalizer=normalizer)
    assert copies.from_host == []


def test_numbers_for_each_class_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    make = prepare.make_class_weights

    def counted(*args: Any) -> torch.Tensor:
        copied.append(args)
        return make(*args)

    monkeypatch.setattr(prepare, "make_class_weights", counted)
    levels, labels = problem()
    alpha = [0.12, 0.34, 0.56, 0.78, 0.9]
    for _ in range(3):
        focal_loss(levels, labels, num_classes=5, alpha=alpha)
    assert len(copied) == 1
    focal_loss([x.double() for x in levels], labels, num_classes=5, alpha=alpha)
    assert len(copied) == 2


def test_a_normalizer_on_the_host_divides_as_a_tensor_does() -> None:
    """On another device than the logits it is a number; 0, inf and NaN divide as they do in a tensor."""
    for value in (4.0, 0.0, -0.0, float("inf"), float("nan"), -2.0):
        for weight in (3.0, 0.0, -1.0):
            want = torch.tensor(weight, dtype=torch.float64) / torch.tensor(value, dtype=torch.float64)
            got = torch.tensor(quotient(weight, value), dtype=torch.float64)
            assert torch.equal(got.isnan(), want.isnan()) and (got.isnan() or torch.equal(got, want))


def test_alpha_remembered_is_not_mixed_up() -> None:
    """Kept by value and dtype, ordinary whatever mode it was first made in."""
    levels, labels = problem()
    alpha = [0.11, 0.22, 0.33, 0.44, 0.55]
    with torch.inference_mode():
        focal_loss(levels, labels, num_classes=5, alpha=alpha)
    for dtype in (torch.float32, torch.float64, torch.float16):
        inputs = [x.to(dtype).requires_grad_() for x in levels]
        loss = focal_loss(inputs, labels, num_classes=5, alpha=alpha, grad_mode="recompute")
        loss.backward()
        tensor = focal_loss(inputs, labels, num_classes=5, alpha=torch.tensor(alpha, dtype=torch.float64))
        assert same_bits(loss, tensor)
    with FakeTensorMode():
        focal_loss(
            [torch.empty(2, 10, 5, 3)], torch.zeros(2, 30).long(), num_classes=5, alpha=[0.2, 0.2, 0.2, 0.2, 0.3]
        )
    alpha = [0.2, 0.2, 0.2, 0.2, 0.3]
    assert same_bits(
        focal_loss(levels, labels, num_classes=5, alpha=alpha),
        focal_loss(levels, labels, num_classes=5, alpha=torch.tensor(alpha, dtype=torch.float64)),
    )


def test_alpha_remembered_under_a_transform_is_an_ordinary_tensor() -> None:
    levels, labels = problem()
    for i, transform in enumerate((torch.func.grad, torch.func.functionalize)):
        alpha = [0.21 + i / 10, 0.22, 0.33, 0.44, 0.55]

        def loss(x: torch.Tensor, alpha: list[float] = alpha) -> torch.Tensor:
            return focal_loss([x, levels[1]], labels, num_classes=5, alpha=alpha)

        transform(loss)(levels[0])
        torch.func.grad(lambda x, loss=loss: torch.func.vjp(loss, x)[0])(levels[0])
        inputs = leaves(levels)
        loss(inputs[0]).backward()
        twin = leaves(levels)
        tensor = torch.tensor(alpha, dtype=torch.float64)
        focal_loss([twin[0], levels[1]], labels, num_classes=5, alpha=tensor).backward()
        assert type(inputs[0].grad) is torch.Tensor and same_bits(inputs[0].grad, twin[0].grad)


def test_logits_without_data_leave_a_module_as_it_is() -> None:
    levels, labels = problem()
    criterion = FastFocalLoss(5, alpha=ALPHA)
    want = criterion(levels, labels)
    criterion([x.to("meta") for x in levels], [y.to("meta") for y in labels])
    assert same_bits(criterion(levels, labels), want)
    with FakeTensorMode(allow_non_fake_inputs=True):
        criterion([torch.empty(2, 10, 5, 3, device="cuda")], torch.zeros(2, 30, dtype=torch.int64, device="cuda"))
    assert same_bits(criterion(levels, labels), want)


def test_alpha_changed_in_place_stays_changed() -> None:
    criterion = FastFocalLoss(5, alpha=ALPHA).half()
    assert isinstance(criterion.alpha, torch.Tensor)
    criterion.alpha[0] = 0.9
    assert criterion.half().to("cpu").alpha[0] == 0.9
    assert criterion.share_memory().alpha.is_shared()


@pytest.mark.parametrize("wrong", [True, 2.0, "a", [0.1, 0.2], nn.Parameter(torch.tensor(ALPHA))])
def test_an_alpha_that_is_refused_changes_nothing(wrong: Any) -> None:
    for alpha in (0.25, ALPHA):
        criterion = FastFocalLoss(5, alpha=alpha)
        before = repr(criterion)
        with pytest.raises((TypeError, ValueError), match="alpha"):
            criterion.alpha = wrong
        assert repr(criterion) == before


def test_numpy_numbers_of_a_module_compile() -> None:
    torch._dynamo.reset()
    levels, labels = problem()
    options = {
        "alpha": np.float64(0.3),
        "gamma": np.float32(1.5),
        "label_smoothing": np.float64(0.1),
        "loss_weight": np.float64(2),
    }
    criterion = FastFocalLoss(5, **options)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(levels, labels), criterion(levels, labels))


def test_a_module_of_an_earlier_version_is_read() -> None:
    criterion = FastFocalLoss(5, alpha=ALPHA)
    state = {name: value for name, value in dict(criterion.__dict__).items() if name != "_given_alpha"}
    read = FastFocalLoss.__new__(FastFocalLoss)
    read.__setstate__(copy.deepcopy(state))
    levels, labels = problem()
    assert same_bits(read.half()(levels, labels), criterion(levels, labels))


def test_representation_of_odd_values() -> None:
    criterion = FastFocalLoss(5, level_weights=[1.0, 2.0])
    criterion.level_weights = np.array([1.0, 2.0])  # type: ignore[assignment]
    assert "level_weights=[1, 2]" in repr(criterion)
    with FakeTensorMode():
        assert "without data" in repr(FastFocalLoss(5, alpha=ALPHA))
