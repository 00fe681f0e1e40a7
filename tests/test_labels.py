"""Labels that are none of foreground, background and ignore: the CPU says which and where, a device asserts."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from cases import Backend, assert_names, encode, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfocal
from fastfocal import FastFocalLoss, focal_loss
from fastfocal.labels import CONVENTIONS, NoBackground

N, K, A = 2, 4, 2
CELLS = ((3, 5), (2, 2))


def logits(device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(N, A * K, h, w, generator=generator).to(device) for h, w in CELLS]


def labels() -> list[Tensor]:
    return [torch.arange(N * h * w * A).view(N, -1) % (K + 1) for h, w in CELLS]


# As int16, 2^16 + 2 would be class 2 and 65535 would be ignore_index -1; as int32, 2^32 + 2 and 2^32 - 1 likewise.
BAD_LABELS = {
    "above_background": (5, torch.int64),
    "below_ignore": (-2, torch.int64),
    "far": (1_000_000, torch.int32),
    "wraps_to_a_class_in_16_bits": (2**16 + 2, torch.int32),
    "wraps_to_ignore_in_16_bits": (65535, torch.int32),
    "wraps_to_a_class_in_32_bits": (2**32 + 2, torch.int64),
    "wraps_to_ignore_in_32_bits": (2**32 - 1, torch.int64),
    "wraps_in_64_bits": (-(2**63), torch.int64),
    "byte_255_is_not_minus_one": (255, torch.uint8),
    "int8_minimum": (-128, torch.int8),
}


def bad_labels(value: int, dtype: torch.dtype, form: str) -> Tensor | list[Tensor]:
    """A bad label at image 1, anchor 6 of level 1."""
    per_level = [y.to(dtype) for y in labels()]
    per_level[1][1, 6] = value
    return torch.cat(per_level, dim=1) if form == "one" else per_level


@pytest.mark.parametrize("mode", ["save", "recompute", "inplace"])
@pytest.mark.parametrize("form", ["list", "one"])
@pytest.mark.parametrize("name", BAD_LABELS)
def test_label_out_of_range_on_cpu(name: str, form: str, mode: str) -> None:
    value, dtype = BAD_LABELS[name]
    targets = bad_labels(value, dtype, form)
    given = [x.requires_grad_().clone() for x in logits()]
    with pytest.raises(ValueError) as caught:
        focal_loss(given, targets, num_classes=K, grad_mode=mode)
    position = "[1, 36]" if form == "one" else "[1, 6]"  # in the tensor that was given: 30 anchors are level 0's
    assert_names(str(caught.value), "targets", "level 1", "image 1", position, value)
    assert all(same_bits(x, y) for x, y in zip(given, logits(), strict=True))


@pytest.mark.parametrize("backend", ["cuda_on_host"], indirect=True)
@pytest.mark.parametrize("form", ["list", "one"])
@pytest.mark.parametrize("name", BAD_LABELS)
def test_label_out_of_range_in_the_cuda_kernels(backend: Backend, name: str, form: str) -> None:
    value, dtype = BAD_LABELS[name]
    with pytest.raises(RuntimeError, match="device-side assert"):
        focal_loss(logits(), bad_labels(value, dtype, form), num_classes=K)


# Not on a real device: there the assertion ends the process's context, so it has a test with a process of its own.
@pytest.mark.parametrize("backend", ["cpu", "cuda_on_host"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
def test_label_out_of_range_is_found_anywhere(backend: Backend, layout: str) -> None:
    """First anchor, last anchor, each level; K + 1 is one too many where the foreground is 1..K."""
    exception, words = (RuntimeError, "device-side assert") if backend.slow else (ValueError, rf"\b{K + 1}\b")
    for level in range(2):
        for anchor in (0, -1):
            given = logits(backend.device)
            if layout == "channels_last":
                given = [x.contiguous(memory_format=torch.channels_last) for x in given]
            elif layout == "3d":
                given = [torch.zeros(N, h * w * A, K) for h, w in CELLS]
            targets = [torch.full_like(y, 1) for y in labels()]
            focal_loss(given, targets, num_classes=K, background_index=0)
            targets[level][-1, anchor] = K + 1
            with pytest.raises(exception, match=words):
                focal_loss(given, targets, num_classes=K, background_index=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("value", [5, -2, 2**16 + 2, 2**32 - 1])
def test_label_out_of_range_on_cuda(value: int) -> None:
    """In a process of its own: after the assertion the context is lost."""
    program = f"""
        import fastfocal
        import torch

        x = torch.zeros(1, 4, 3, 3, device="cuda")
        y = torch.zeros(1, 9, dtype=torch.int64, device="cuda")
        y[0, 7] = {value}
        fastfocal.focal_loss(x, y, num_classes=4)
        torch.cuda.synchronize()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "device-side assert" in done.stderr


def test_ignored_labels_are_not_checked_as_classes(backend: Backend) -> None:
    """The far end of an int64 may be the ignore label."""
    targets = [torch.full_like(y, -(2**62)).to(backend.device) for y in labels()]
    loss = focal_loss(logits(backend.device), targets, num_classes=K, ignore_index=-(2**62))
    assert loss.item() == 0


# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS = {
    "torchvision": (-1, -2),
    "effdet": (-1, -2),
    "detectron2": (None, -1),
    "mmdet": (None, -1),
    "kuangliu": (0, -1),
    "segmentation": (None, 255),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_two_indices(preset: str) -> None:
    assert set(CONVENTIONS) == set(PRESETS)
    background, ignored = PRESETS[preset]
    drawn = [torch.randint(-2, K, y.shape, generator=torch.Generator().manual_seed(i)) for i, y in enumerate(labels())]
    given = encode(drawn, K, background, ignored)
    options: dict[str, Any] = {"background_index": background, "ignore_index": ignored}
    for name in ("focal_loss", "focal_loss_star"):
        for owner in (fastfocal, fastfocal.reference):
            function = getattr(owner, name)
            want = function(logits(), given, num_classes=K, **options)
            assert same_bits(function(logits(), given, num_classes=K, labels=preset), want)
    for name in ("FastFocalLoss", "FastFocalLossStar"):
        for owner in (fastfocal, fastfocal.reference):
            module = getattr(owner, name)
            want = module(K, **options)(logits(), given)
            assert same_bits(module(K, labels=preset)(logits(), given), want)


@pytest.mark.parametrize("options", [{"background_index": 0}, {"ignore_index": 255}])
def test_a_preset_beside_an_index_is_refused(options: dict[str, int]) -> None:
    (name,) = options
    for call in (
        lambda: focal_loss(logits(), labels(), num_classes=K, labels="mmdet", **options),
        lambda: FastFocalLoss(K, labels="mmdet", **options),
    ):
        with pytest.raises(
            ValueError, match=rf"labels: 'mmdet' says what {name} says; expected one of the two, got both"
        ):
            call()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: expected one of 'torchvision', .*, got 'coco'"):
        focal_loss(logits(), labels(), num_classes=K, labels="coco")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "value, preset",
    [(-2, 'It is ignored by labels="torchvision" or "effdet"'), (255, 'It is ignored by labels="segmentation"')],
)
def test_the_error_names_the_preset_that_would_fit(value: int, preset: str) -> None:
    with pytest.raises(ValueError, match=re.escape(preset)):
        focal_loss(logits(), bad_labels(value, torch.int64, "list"), num_classes=K)


def test_the_error_names_no_preset_where_none_fits() -> None:
    with pytest.raises(ValueError) as caught:
        focal_loss(logits(), bad_labels(1000, torch.int64, "list"), num_classes=K)
    assert "labels=" not in str(caught.value)


@pytest.mark.parametrize("shape", ["nhwa", "nm"])
def test_the_position_is_that_in_the_tensor_that_was_given(shape: str) -> None:
    given = bad_labels(1000, torch.int64, "list")
    if shape == "nhwa":
        given = [y.reshape(N, h, w, A) for y, (h, w) in zip(given, CELLS, strict=True)]
    with pytest.raises(
        ValueError, match=r"targets\[1\]: label 1000 at " + re.escape("[1, 1, 1, 0]" if shape == "nhwa" else "[1, 6]")
    ):
        focal_loss(logits(), given, num_classes=K)


# --- -1 for background under the default ------------------------------------------------------------------------------


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastfocal.labels, "no_background", NoBackground())


def warned(targets: list[Tensor], **options: Any) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            focal_loss(logits(), targets, num_classes=K, **options)
    return sum("labels are -1, which means ignored here" in str(w.message) for w in caught)


@pytest.mark.usefixtures("watching")
def test_background_that_counts_as_ignored_is_warned_of_once() -> None:
    mostly_minus_one = [torch.where(y > 2, y.clamp(max=K - 1), -1) for y in labels()]
    assert warned(mostly_minus_one) == 1


@pytest.mark.usefixtures("watching")
@pytest.mark.parametrize(
    "options", [{"labels": "torchvision"}, {"background_index": -5}, {"ignore_index": 255, "background_index": -1}]
)
def test_whoever_says_what_minus_one_is_hears_nothing(options: dict[str, Any]) -> None:
    assert warned([torch.where(y > 2, y.clamp(max=K - 1), -1) for y in labels()], **options) == 0


@pytest.mark.usefixtures("watching")
def test_labels_with_background_are_not_warned_of() -> None:
    with_background = [torch.where(y > 2, y, -1) for y in labels()]
    assert any(bool((y == K).any()) for y in with_background)
    assert warned(with_background) == 0


@pytest.mark.usefixtures("watching")
def test_few_ignored_are_not_warned_of() -> None:
    assert warned([torch.where(y == 0, -1, y.clamp(max=K - 1)) for y in labels()]) == 0


# --- labels that are no ordinary tensors ------------------------------------------------------------------------------


@pytest.mark.usefixtures("watching")
def test_fake_labels_are_not_looked_at() -> None:
    mode = FakeTensorMode()
    loss = focal_loss([mode.from_tensor(x) for x in logits()], [mode.from_tensor(y) for y in labels()], num_classes=K)
    assert loss.shape == ()


def test_a_bad_label_made_within_torch_func_is_named() -> None:
    def loss(x: Tensor) -> Tensor:
        return focal_loss(x, torch.full((3,), 77) + 0 * x[:, 0].long())

    with pytest.raises(ValueError, match=r"label 77 at \[0\] \(level 0, image 0\)"):
        torch.func.grad(loss)(torch.randn(3, K))


@pytest.mark.parametrize("classes", [255, 256, 300])
def test_segmentation_with_more_classes_than_it_has_labels(classes: int) -> None:
    words = rf"labels: 'segmentation' ignores 255, which is a class or background with num_classes {classes}"
    with pytest.raises(ValueError, match=words):
        FastFocalLoss(classes, labels="segmentation")
    with pytest.raises(ValueError, match=words):
        focal_loss(
            torch.zeros(1, classes, 2, 2), torch.zeros(1, 2, 2).long(), num_classes=classes, labels="segmentation"
        )
