"""What is no input at all, for every argument of every public function: a TypeError or ValueError that names the argument.

`test_errors.py` has the near misses; here is what a caller passes by mistake: another library's arrays, other layouts of
memory, containers, text, numbers beyond all floats. Nothing may be computed or written before the error.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastfocal
from fastfocal import FastFocalLoss, FastFocalLossStar, focal_loss, focal_loss_star, sigmoid_focal_loss

N, K = 2, 3
CELLS = ((2, 3), (1, 2))


def logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(N, K, h, w, generator=generator) for h, w in CELLS]


def labels() -> list[Tensor]:
    return [torch.arange(N * h * w).view(N, h * w) % (K + 1) for h, w in CELLS]


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([part.reshape(-1)[: 2 + i] for i, part in enumerate(x)])


def sparse(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    def convert(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = x.reshape(x.shape[0], -1) if layout == torch.sparse_csr else x
            return flat.to_sparse(layout=layout)

    return convert


# Tensors that are none to the kernels, made of the tensor that belongs there.
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.numpy(),
    "sparse_coo": sparse(torch.sparse_coo),
    "sparse_csr": sparse(torch.sparse_csr),
    "nested": nested,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
}
# And what is no tensor.
OTHERS: dict[str, Any] = {
    "dict": {"a": 1},
    "text": "2.0",
    "bytes": b"2",
    "none": None,
    "object": object(),
    "function": len,
    "nan_list": [None],
    "complex_number": 1j,
    "huge": 10**400,
    "set": {0.5},
}
ERRORS = (TypeError, ValueError)


def every_tensor(values: list[Tensor], convert: Callable[[Tensor], Any], level: int | None) -> list[Any]:
    return [convert(x) if level is None or i == level else x for i, x in enumerate(values)]


def refused(argument: str, call: Callable[[], Any], watched: list[Tensor]) -> None:
    """The error names the argument first, as "argument: ..." or "argument[level]: ..."; nothing that was passed has changed."""
    before = [t.detach().clone() for t in watched]
    with pytest.raises(ERRORS) as caught:
        call()
    assert re.match(rf"(fastfocal: )?{argument}(\[\d+\])?: \S", str(caught.value)), str(caught.value)
    for phrase in ("file an issue", "INTERNAL ASSERT", "Could not run 'aten", "API call failed"):
        assert phrase not in str(caught.value)
    assert all(torch.equal(t.detach(), copy) for t, copy in zip(watched, before, strict=True))


FUNCTIONS = {"focal_loss": focal_loss, "focal_loss_star": focal_loss_star}
MODULES = {"FastFocalLoss": FastFocalLoss, "FastFocalLossStar": FastFocalLossStar}
WAYS = [*FUNCTIONS, *MODULES]


def call(way: str, x: Any, y: Any, **options: Any) -> Any:
    """In the mode that overwrites the logits. weight, normalizer and class_mask go to the module's call."""
    options = {"num_classes": K, "grad_mode": "inplace", **options}
    if way in FUNCTIONS:
        return FUNCTIONS[way](x, y, **options)
    per_call = {name: options.pop(name) for name in ("weight", "normalizer", "class_mask") if name in options}
    return MODULES[way](**options)(x, y, **per_call)


def overwritable() -> list[Tensor]:
    return [x.requires_grad_().clone() for x in logits()]


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [None, 1], ids=["every_level", "level_1"])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("way", WAYS)
def test_logits_of_another_kind(way: str, kind: str, level: int | None) -> None:
    given = overwritable()
    watched = [x for i, x in enumerate(given) if level is not None and i != level]
    bad = every_tensor(given, lambda x: TENSORS[kind](x.detach()), level)
    # With every level on the meta device it is the targets that are on another one.
    argument = "(logits|targets)" if kind == "meta" and level is None else "logits"
    refused(argument, lambda: call(way, bad, labels()), watched)


@pytest.mark.parametrize("level", [None, 1], ids=["every_level", "level_1"])
@pytest.mark.parametrize("form", ["labels", "soft"])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("way", WAYS)
def test_targets_of_another_kind(way: str, kind: str, form: str, level: int | None) -> None:
    given = overwritable()
    targets = labels() if form == "labels" else [x.sigmoid() for x in logits()]
    options = {} if form == "labels" else {"normalizer": 1.0}
    refused("targets", lambda: call(way, given, every_tensor(targets, TENSORS[kind], level), **options), given)


@pytest.mark.parametrize("level", [None, 1], ids=["every_level", "level_1"])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_another_kind(way: str, kind: str, level: int | None) -> None:
    given = overwritable()
    weight = [torch.ones(N, h * w) for h, w in CELLS]
    refused("weight", lambda: call(way, given, labels(), weight=every_tensor(weight, TENSORS[kind], level)), given)


@pytest.mark.parametrize("kind", [kind for kind in TENSORS if kind not in ("numpy",)])
@pytest.mark.parametrize("way", WAYS)
def test_normalizers_of_another_kind(way: str, kind: str) -> None:
    given = overwritable()
    normalizer = TENSORS[kind](torch.ones(N, 1) if kind in ("nested", "sparse_csr") else torch.ones(N))
    refused("normalizer", lambda: call(way, given, labels(), normalizer=normalizer), given)


@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested", "quantized", "complex"])
@pytest.mark.parametrize("way", WAYS)
def test_alphas_of_another_kind(way: str, kind: str) -> None:
    given = overwritable()
    alpha = TENSORS[kind](torch.full((K, 1) if kind in ("nested", "sparse_csr") else (K,), 0.5))
    refused("alpha", lambda: call(way, given, labels(), alpha=alpha), given)


# --- what is no tensor ------------------------------------------------------------------------------------------------

# Where these mean something.
ALLOWED = {
    ("alpha", "none"), ("weight", "none"), ("level_weights", "none"), ("normalizer", "none"), ("background_index", "none"),
    ("labels", "none"), ("class_weight", "none"), ("class_mask", "none"),
}  # fmt: skip
NUMBERS = (
    "alpha",
    "gamma",
    "beta",
    "label_smoothing",
    "loss_weight",
    "num_classes",
    "background_index",
    "ignore_index",
)
ARGUMENTS = ("logits", "targets", "weight", "class_weight", "class_mask", "labels", "level_weights", "normalizer", "reduction",
             "grad_mode", "detach_modulating_factor", *NUMBERS)  # fmt: skip


def takes(way: str, argument: str) -> bool:
    per_call = ("logits", "targets", "weight", "class_mask") if way in MODULES else ()
    return argument in per_call or argument in inspect.signature(FUNCTIONS.get(way) or MODULES[way]).parameters


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_no_input_at_all(way: str, argument: str, kind: str) -> None:
    if (argument, kind) in ALLOWED or not takes(way, argument):
        return
    given, value = overwritable(), OTHERS[kind]
    if argument == "logits":
        refused("logits", lambda: call(way, value, labels()), [])
        refused("logits", lambda: call(way, [given[0], value], labels()), given)
    elif argument == "targets":
        refused("targets", lambda: call(way, given, value), given)
        refused("targets", lambda: call(way, given, [labels()[0], value]), given)
    else:
        refused(argument, lambda: call(way, given, labels(), **{argument: value}), given)


@pytest.mark.parametrize("argument", [*NUMBERS, "normalizer"])
@pytest.mark.parametrize(
    "value", [np.ones(2), np.array(["a"]), np.complex64(1), np.datetime64(1, "s"), [1.0, [2.0]]], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_arrays_for_numbers(way: str, argument: str, value: Any) -> None:
    if not takes(way, argument):
        return
    given = overwritable()
    refused(argument, lambda: call(way, given, labels(), **{argument: value}), given)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)], ids=lambda v: str(v)[:6]
)
@pytest.mark.parametrize(
    "argument", [name for name in ("gamma", "beta", "loss_weight", "label_smoothing", "normalizer", "level_weights")]
)
@pytest.mark.parametrize("way", WAYS)
def test_numbers_that_are_not_finite(way: str, argument: str, value: float) -> None:
    if not takes(way, argument):
        return
    given = overwritable()
    passed = [1.0, value] if argument == "level_weights" else value
    refused(argument, lambda: call(way, given, labels(), **{argument: passed}), given)


# --- numbers of numpy, which torchvision takes too ---------------------------------------------------------------------

NUMPY_NUMBERS = {
    "alpha": (np.float32(0.25), np.float64(0.25)),
    "gamma": (np.float32(2), np.float64(2), np.int64(2), np.int32(2)),
    "beta": (np.float32(1), np.int64(1)),
    "label_smoothing": (np.float32(0.125),),
    "loss_weight": (np.float32(0.5), np.int64(2)),
    "num_classes": (np.int64(K), np.int32(K), np.uint8(K)),
    "background_index": (np.int64(K), np.int32(K)),
    "ignore_index": (np.int64(-1), np.int8(-1)),
    "normalizer": (np.float32(3), np.float64(3), np.int64(3)),
    "level_weights": ([np.float32(0.5), np.int64(1)], np.array([0.5, 1.0]), (np.float64(0.5), 1)),
}


def as_python(value: Any) -> Any:
    return (
        [as_python(entry) for entry in value]
        if isinstance(value, (list, tuple))
        else value.tolist()
        if hasattr(value, "tolist")
        else value
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [(name, value) for name, values in NUMPY_NUMBERS.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("way", WAYS)
def test_numpy_numbers(way: str, argument: str, value: Any) -> None:
    if not takes(way, argument):
        return
    options = {"grad_mode": "save"}
    got = call(way, logits(), labels(), **{**options, argument: value})
    assert torch.equal(got, call(way, logits(), labels(), **{**options, argument: as_python(value)}))


@pytest.mark.parametrize(
    "alpha",
    [[np.float32(0.5)] * K, (np.float64(0.5),) * K, [np.float32(0.5), 0.5, np.float64(0.5)], np.full(K, 0.5)],
    ids=["float32", "float64", "mixed", "array"],
)
@pytest.mark.parametrize("way", WAYS)
def test_numpy_alpha_per_class(way: str, alpha: Any) -> None:
    got = call(way, logits(), labels(), alpha=alpha, grad_mode="save")
    assert torch.equal(got, call(way, logits(), labels(), alpha=[0.5] * K, grad_mode="save"))


# --- sigmoid_focal_loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*TENSORS, *OTHERS])
@pytest.mark.parametrize("argument", ["inputs", "targets"])
def test_tensors_of_sigmoid_focal_loss(argument: str, kind: str) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    bad = TENSORS[kind](x.sigmoid()) if kind in TENSORS else OTHERS[kind]
    given = {"inputs": x, "targets": x.sigmoid(), argument: bad}
    if kind == "meta":  # one device for both is ordinary; a mixture is not
        refused("(inputs|targets)", lambda: sigmoid_focal_loss(**given), [])
        return
    refused(argument, lambda: sigmoid_focal_loss(**given), [])


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("argument", ["alpha", "gamma", "reduction"])
def test_options_of_sigmoid_focal_loss(argument: str, kind: str) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    words = {
        "alpha": "(alpha|Invalid alpha value)",
        "gamma": "gamma",
        "reduction": "(reduction|Invalid Value for arg 'reduction')",
    }
    refused(words[argument], lambda: sigmoid_focal_loss(x, x.sigmoid(), **{argument: OTHERS[kind]}), [])


@pytest.mark.parametrize("alpha", [np.float32(0.25), np.float64(-1), np.int64(1)], ids=str)
@pytest.mark.parametrize("gamma", [np.float64(2), np.int32(2)], ids=str)
def test_numpy_numbers_of_sigmoid_focal_loss(alpha: Any, gamma: Any) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    got = sigmoid_focal_loss(x, x.sigmoid(), alpha=alpha, gamma=gamma)
    assert torch.equal(got, sigmoid_focal_loss(x, x.sigmoid(), alpha=alpha.item(), gamma=gamma.item()))


# --- in the order a caller meets them ----------------------------------------------------------------------------------


def test_every_argument_is_swept() -> None:
    """A new argument has to be added above."""
    later = {"sync_normalizer", "ema_momentum"}
    for way in WAYS:
        assert set(inspect.signature(FUNCTIONS.get(way) or MODULES[way]).parameters) <= {*ARGUMENTS, *later}
    assert set(inspect.signature(fastfocal.sigmoid_focal_loss).parameters) == {
        "inputs", "targets", "alpha", "gamma", "reduction",
    }  # fmt: skip
