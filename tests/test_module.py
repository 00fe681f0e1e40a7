"""FastFocalLoss: the function with its options kept, and the package's other public names."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from cases import Size, draw_classes, draw_levels, encode, leaves, same_bits
from torch import nn

import fastfocal
from fastfocal import FastFocalLoss, FastFocalLossStar, focal_loss, focal_loss_star

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
    with pytest.raises(ValueError, match=r"^alpha: expected one number a class, 4 of them, got 5"):
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
    common = {"alpha": 0.25, "gamma": 2.0, "background_index": None, "ignore_index": -1}
    late = {
        "label_smoothing": 0.0,
        "detach_modulating_factor": False,
        "normalizer": "positives",
        "reduction": "sum",
        "grad_mode": "auto",
        "loss_weight": 1.0,
    }
    function = {"num_classes": None, **common, "weight": None, "level_weights": None, **late}
    module = {**common, "level_weights": None, **late, "sync_normalizer": False, "ema_momentum": None}
    for owner in (fastfocal, fastfocal.reference):
        parameters = inspect.signature(owner.focal_loss).parameters
        assert {n: p.default for n, p in parameters.items()} == {"logits": empty, "targets": empty, **function}
        assert all(parameters[name].kind == inspect.Parameter.KEYWORD_ONLY for name in function)
    parameters = inspect.signature(FastFocalLoss).parameters
    assert {n: p.default for n, p in parameters.items()} == {"num_classes": empty, **module}
    forward = inspect.signature(FastFocalLoss.forward).parameters
    assert list(forward) == ["self", "logits", "targets", "weight", "normalizer"]
    assert forward["weight"].default is None and forward["normalizer"].default is None


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
