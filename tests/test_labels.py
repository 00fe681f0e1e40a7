"""Labels that are none of foreground, background and ignore: the CPU says which and where, a device asserts."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from cases import Backend, assert_names, same_bits
from torch import Tensor

from fastfocal import focal_loss

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
    assert_names(str(caught.value), "targets", "level 1", 1, 6, value)
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
