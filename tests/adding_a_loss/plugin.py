"""A pytest plugin: fastfocal calls the CPU's portable kernels, compiled from the checkout that it lies in.

They are torch.ops.fastfocal_walkthrough. tests/test_adding_a_loss.py loads it in a copy of the checkout, whose csrc/ has a loss
that the installed module lacks.
"""

from __future__ import annotations

from pathlib import Path

import host_build
import pytest
import torch
from host_build import CSRC, Source

import fastfocal

HERE = Path(__file__).resolve().parent
KERNELS = ("isa_portable.cpp", "pack_labels.cpp", "pyramid_loss.cpp", "scale_gradients.cpp")


def build() -> Path:
    sources = [Source(path) for path in (*(CSRC / "cpu" / name for name in KERNELS), HERE / "register.cpp")]
    return host_build.build_operators("fastfocal_walkthrough", sources, about=15)


@pytest.hookimpl
def pytest_configure() -> None:
    assert Path(fastfocal.__file__).is_relative_to(HERE.parent.parent), fastfocal.__file__
    host_build.load_operators(build)
    fastfocal.registration.register("fastfocal_walkthrough")
    fastfocal.ops.operators = torch.ops.fastfocal_walkthrough
