"""Bad input: which exception, what its message names, and that nothing was written before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_names, same_bits
from torch import Tensor

from fastfocal import FastFocalLoss, focal_loss

N, K, A = 2, 4, 2
CELLS = ((3, 5), (2, 2))
EITHER = (TypeError, ValueError)  # the contract says one of them; where it says which, the case does too


def logits(device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(N, A * K, h, w, generator=generator).to(device) for h, w in CELLS]


def labels() -> list[Tensor]:
    return [torch.arange(N * h * w * A).view(N, -1) % (K + 1) for h, w in CELLS]


def soft() -> list[Tensor]:
    return [x.sigmoid() for x in logits()]


def rows(classes: int = K) -> list[Tensor]:
    return [torch.zeros(N, h * w * A, classes) for h, w in CELLS]


def replaced(values: list[Tensor], level: int, value: Any) -> list[Any]:
    return [value if i == level else entry for i, entry in enumerate(values)]


# id -> logits, targets, options, exception, what the message must name: argument, level, what came, what was expected.
CASES: dict[str, tuple[Any, Any, dict[str, Any], Any, tuple[object, ...]]] = {
    # logits
    "no_levels": ([], [], {}, ValueError, ("logits", "empty")),
    "logits_a_number": (3.0, labels(), {}, TypeError, ("logits", "float")),
    "logits_level_a_number": (replaced(logits(), 1, 3.0), labels(), {}, TypeError, ("logits", "level 1", "float")),
    "logits_integer": (
        replaced(logits(), 1, logits()[1].long()),
        labels(),
        {},
        EITHER,
        ("logits", "level 1", "int64", "float32"),
    ),
    "logits_complex": (
        [x.to(torch.complex64) for x in logits()],
        labels(),
        {},
        EITHER,
        ("logits", "complex64", "float32"),
    ),
    "mixed_dtypes": (
        replaced(logits(), 1, logits()[1].double()),
        labels(),
        {},
        EITHER,
        ("logits", "level 1", "float64", "float32"),
    ),
    "mixed_devices": (
        replaced(logits(), 1, logits()[1].to("meta")),
        labels(),
        {},
        EITHER,
        ("logits", "level 1", "meta", "cpu"),
    ),
    "mixed_ranks": (replaced(logits(), 1, rows()[1]), labels(), {}, ValueError, ("logits", "level 1", "(2, 8, 4)", 4)),
    "rank_5": ([x[None] for x in logits()], labels(), {}, ValueError, ("logits", "(1, 2, 8, 3, 5)", "(N, M, K)")),
    "too_many_images": (
        torch.empty(2**62, 0, K),
        torch.empty(2**62, 0, dtype=torch.int64),
        {},
        ValueError,
        ("logits", "2^31 images", 2**62),
    ),
    "rank_1": ([x.flatten() for x in logits()], labels(), {}, ValueError, ("logits", "(240,)", "(N, M, K)")),
    "mixed_batch": (replaced(logits(), 1, logits()[1][:1]), labels(), {}, ValueError, ("logits", "level 1", 1, 2)),
    "channels_not_divisible": (
        replaced(logits(), 1, torch.zeros(N, 9, 2, 2)),
        labels(),
        {},
        ValueError,
        ("logits", "level 1", 9, 4),
    ),
    "no_num_classes": (logits(), labels(), {"num_classes": None}, EITHER, ("num_classes",)),
    "num_classes_disagrees": (rows(), labels(), {"num_classes": 7}, ValueError, ("classes", 7, 4)),
    "num_classes_zero": (logits(), labels(), {"num_classes": 0}, ValueError, ("num_classes", 0)),
    "num_classes_negative": (logits(), labels(), {"num_classes": -4}, ValueError, ("num_classes", -4)),
    "num_classes_float": (logits(), labels(), {"num_classes": 4.5}, EITHER, ("num_classes", "4.5")),
    "mixed_classes": (
        replaced(rows(), 1, torch.zeros(N, 8, 6)),
        labels(),
        {"num_classes": None},
        ValueError,
        ("logits", "level 1", 6, 4),
    ),
    # targets
    "targets_none": (logits(), None, {}, TypeError, ("targets", "None")),
    "targets_numbers": (logits(), [[1, 2], [3]], {}, TypeError, ("targets", "list")),
    "too_few_targets": (logits(), labels()[:1], {}, ValueError, ("targets", 1, 2)),
    "too_many_targets": (logits(), labels() * 2, {}, ValueError, ("targets", 4, 2)),
    "label_shape": (
        logits(),
        replaced(labels(), 1, torch.zeros(N, 7, dtype=torch.int64)),
        {},
        ValueError,
        ("targets", "level 1", 7, 8),
    ),
    "label_grid": (
        logits(),
        [torch.zeros(N, 3, 5, A, dtype=torch.int64), torch.zeros(N, 2, 3, A, dtype=torch.int64)],
        {},
        ValueError,
        ("targets", "level 1", 3, 2),
    ),
    "label_grid_transposed": (  # (N, A, H, W) holds the right number of labels in the wrong order
        logits(),
        [torch.zeros(N, A, 3, 5, dtype=torch.int64), torch.zeros(N, 2, 2, A, dtype=torch.int64)],
        {},
        ValueError,
        ("targets", 3, 5),
    ),
    "label_grid_without_anchors": (
        logits(),
        [torch.zeros(N, h, w, dtype=torch.int64) for h, w in CELLS],
        {},
        ValueError,
        ("targets", 3, 5, 2),
    ),
    "label_total": (logits(), torch.zeros(N, 37, dtype=torch.int64), {}, ValueError, ("targets", 37, 38)),
    "label_batch": (logits(), torch.zeros(3, 38, dtype=torch.int64), {}, ValueError, ("targets", 3, 2)),
    "label_flat": (logits(), torch.zeros(76, dtype=torch.int64), {}, ValueError, ("targets", 76)),
    "label_bool": (logits(), [y > 0 for y in labels()], {}, TypeError, ("targets", "bool")),
    "label_mixed_dtypes": (
        logits(),
        replaced(labels(), 1, labels()[1].int()),
        {},
        EITHER,
        ("targets", "level 1", "int32", "int64"),
    ),
    "label_device": (logits(), [y.to("meta") for y in labels()], {}, EITHER, ("targets", "meta", "cpu")),
    "soft_shape": (
        logits(),
        replaced(soft(), 1, soft()[1][:, :4]),
        {"normalizer": 1.0},
        ValueError,
        ("targets", "level 1", 4, 8),
    ),
    "soft_beside_labels": (logits(), replaced(soft(), 1, labels()[1]), {"normalizer": 1.0}, EITHER, ("targets",)),
    "soft_device": (
        logits(),
        [y.to("meta") for y in soft()],
        {"normalizer": 1.0},
        EITHER,
        ("targets", "meta", "cpu"),
    ),
    "soft_requires_grad": (
        logits(),
        [y.requires_grad_() for y in soft()],
        {"normalizer": 1.0},
        ValueError,
        ("targets", "requires_grad"),
    ),
    "soft_positives": (logits(), soft(), {}, ValueError, ("normalizer", "positives", "number")),
    "soft_per_image": (
        logits(),
        soft(),
        {"normalizer": "positives_per_image"},
        ValueError,
        ("normalizer", "positives_per_image", "number"),
    ),
    # numbers
    "gamma_negative": (logits(), labels(), {"gamma": -0.5}, ValueError, ("gamma", "-0.5", "0")),
    "gamma_nan": (logits(), labels(), {"gamma": float("nan")}, ValueError, ("gamma", "nan", "0")),
    "gamma_text": (logits(), labels(), {"gamma": "2"}, TypeError, ("gamma", "str")),
    "gamma_true": (logits(), labels(), {"gamma": True}, TypeError, ("gamma", "bool")),
    "alpha_true": (logits(), labels(), {"alpha": True}, TypeError, ("alpha", "True")),
    "alpha_complex": (logits(), labels(), {"alpha": torch.ones(4) * 1j}, TypeError, ("alpha", "complex64")),
    "alpha_above_1": (logits(), labels(), {"alpha": 1.5}, ValueError, ("alpha", "1.5", "[0, 1]")),
    "alpha_nan": (logits(), labels(), {"alpha": float("nan")}, ValueError, ("alpha", "nan", "[0, 1]")),
    "alpha_text": (logits(), labels(), {"alpha": "0.25"}, TypeError, ("alpha", "'0.25'")),
    "alpha_too_short": (logits(), labels(), {"alpha": [0.5, 0.5, 0.5]}, ValueError, ("alpha", 3, 4)),
    "alpha_tensor_too_long": (logits(), labels(), {"alpha": torch.full((5,), 0.5)}, ValueError, ("alpha", 5, 4)),
    "alpha_entry": (logits(), labels(), {"alpha": [0.5, 0.5, 1.5, 0.5]}, ValueError, ("alpha", "1.5", "[0, 1]")),
    "alpha_requires_grad": (
        logits(),
        labels(),
        {"alpha": torch.full((4,), 0.5, requires_grad=True)},
        ValueError,
        ("alpha", "requires_grad"),
    ),
    "smoothing_negative": (logits(), labels(), {"label_smoothing": -0.1}, ValueError, ("label_smoothing", "-0.1")),
    "detach_a_number": (
        logits(),
        labels(),
        {"detach_modulating_factor": 1},
        TypeError,
        ("detach_modulating_factor", "1"),
    ),
    "smoothing_above_1": (logits(), labels(), {"label_smoothing": 1.5}, ValueError, ("label_smoothing", "1.5")),
    # names
    "reduction": (logits(), labels(), {"reduction": "median"}, ValueError, ("reduction", "median", "level", "sum")),
    "normalizer_name": (
        logits(),
        labels(),
        {"normalizer": "anchors"},
        ValueError,
        ("normalizer", "anchors", "positives_per_image"),
    ),
    "grad_mode": (logits(), labels(), {"grad_mode": "fast"}, ValueError, ("grad_mode", "fast", "recompute", "inplace")),
    # conventions
    "background_is_ignore": (
        logits(),
        labels(),
        {"background_index": -1},
        ValueError,
        ("background_index", "ignore_index", "-1"),
    ),
    "default_background_is_ignore": (
        logits(),
        labels(),
        {"ignore_index": 4},
        ValueError,
        ("background_index", "ignore_index", 4),
    ),
    "background_is_a_class": (logits(), labels(), {"background_index": 2}, ValueError, ("background_index", 2)),
    "background_is_the_last_class": (logits(), labels(), {"background_index": 3}, ValueError, ("background_index", 3)),
    "ignore_none": (logits(), labels(), {"ignore_index": None}, TypeError, ("ignore_index", "None")),
    "ignore_beyond_64_bits": (logits(), labels(), {"ignore_index": 2**70}, ValueError, ("ignore_index", 2**70)),
    "background_beyond_64_bits": (
        logits(),
        labels(),
        {"background_index": 2**70},
        ValueError,
        ("background_index", 2**70),
    ),
    # weights
    "weight_shape": (
        logits(),
        labels(),
        {"weight": [torch.ones(N, 30), torch.ones(N, 9)]},
        ValueError,
        ("weight", "level 1", 9, 8),
    ),
    "weight_total": (logits(), labels(), {"weight": torch.ones(N, 39)}, ValueError, ("weight", 39, 38)),
    "weight_levels": (logits(), labels(), {"weight": [torch.ones(N, 30)]}, ValueError, ("weight", 1, 2)),
    "weight_integer": (logits(), labels(), {"weight": labels()}, EITHER, ("weight", "int64")),
    "weight_device": (
        logits(),
        labels(),
        {"weight": torch.ones(N, 38, device="meta")},
        EITHER,
        ("weight", "meta", "cpu"),
    ),
    "weight_requires_grad": (
        logits(),
        labels(),
        {"weight": torch.ones(N, 38, requires_grad=True)},
        ValueError,
        ("weight", "requires_grad"),
    ),
    "level_weights_length": (
        logits(),
        labels(),
        {"level_weights": [1.0, 1.0, 1.0]},
        ValueError,
        ("level_weights", 3, 2),
    ),
    "level_weights_text": (logits(), labels(), {"level_weights": "12"}, EITHER, ("level_weights", "'12'")),
    "level_weights_words": (logits(), labels(), {"level_weights": ["a", "b"]}, EITHER, ("level_weights", "'a'")),
    "level_weights_none": (logits(), labels(), {"level_weights": [1.0, None]}, TypeError, ("level_weights", "None")),
    "level_weights_a_number": (logits(), labels(), {"level_weights": 3}, TypeError, ("level_weights", "3")),
    # normalizer
    "normalizer_list": (logits(), labels(), {"normalizer": [1]}, TypeError, ("normalizer", "[1]")),
    "normalizer_true": (logits(), labels(), {"normalizer": True}, TypeError, ("normalizer", "True")),
    "normalizer_zero": (logits(), labels(), {"normalizer": 0}, ValueError, ("normalizer", 0)),
    "normalizer_negative": (logits(), labels(), {"normalizer": -1.5}, ValueError, ("normalizer", "-1.5")),
    "normalizer_nan": (logits(), labels(), {"normalizer": float("nan")}, ValueError, ("normalizer", "nan")),
    "normalizer_length": (logits(), labels(), {"normalizer": torch.ones(3)}, ValueError, ("normalizer", 3, 2)),
    "normalizer_rank": (logits(), labels(), {"normalizer": torch.ones(2, 2)}, ValueError, ("normalizer", "(2, 2)")),
    "normalizer_requires_grad": (
        logits(),
        labels(),
        {"normalizer": torch.ones((), requires_grad=True)},
        ValueError,
        ("normalizer", "requires_grad"),
    ),
    "normalizer_device": (
        logits(),
        labels(),
        {"normalizer": torch.ones((), device="meta")},
        EITHER,
        ("normalizer", "meta", "cpu"),
    ),
}
MODULE_ARGUMENTS = ("alpha", "gamma", "background_index", "ignore_index", "level_weights", "label_smoothing",
                    "detach_modulating_factor", "normalizer", "reduction", "grad_mode")  # fmt: skip


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    """In the mode that writes to the logits: they must keep their bits."""
    given, targets, options, exception, facts = CASES[name]
    options = {"num_classes": K, "grad_mode": "inplace", **options}
    if isinstance(given, list) and all(isinstance(x, Tensor) and x.is_floating_point() for x in given):
        given = [x.clone().requires_grad_().clone() for x in given]
    watched = [x for x in tensors((given, targets, options)) if x.device.type == "cpu"]
    before = [x.detach().clone() for x in watched]
    with pytest.raises(exception) as caught:
        focal_loss(given, targets, **options)
    assert_names(str(caught.value), *facts)
    assert all(torch.equal(x.detach(), copy) for x, copy in zip(watched, before, strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if set(case[2]) & set(MODULE_ARGUMENTS)])
def test_bad_input_of_the_module(name: str) -> None:
    """When it is made or when it is called, in the same words."""
    given, targets, options, exception, facts = CASES[name]
    with pytest.raises(exception) as caught:
        FastFocalLoss(K, **options)(given, targets)
    assert_names(str(caught.value), *facts)


def test_inplace_on_a_leaf_raises() -> None:
    """A leaf's values are the caller's parameters: overwriting them is never meant."""
    inputs = [x.requires_grad_() for x in logits()]
    before = [x.detach().clone() for x in inputs]
    with pytest.raises(ValueError) as caught:
        focal_loss(inputs, labels(), num_classes=K, grad_mode="inplace")
    assert_names(str(caught.value), "logits", "leaf", "inplace")
    second = [inputs[0].clone(), inputs[1]]
    with pytest.raises(ValueError) as caught:
        focal_loss(second, labels(), num_classes=K, grad_mode="inplace")
    assert_names(str(caught.value), "logits", "level 1", "leaf")
    assert all(same_bits(x, copy) for x, copy in zip([*inputs, second[0]], [*before, before[0]], strict=True))


def test_messages_give_whole_shapes() -> None:
    """What came and what was expected, as the user would print them."""
    wrong = replaced(labels(), 1, torch.zeros(N, 7, dtype=torch.int64))
    with pytest.raises(ValueError) as caught:
        focal_loss(logits(), wrong, num_classes=K)
    assert_names(str(caught.value), "(2, 7)", "(2, 8)")
