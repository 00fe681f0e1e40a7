"""The backends a test body runs on: the CPU kernels, the CUDA kernels, and the CUDA kernels compiled for the host."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import NATIVE, Backend

import fastfocal


registered: set[str] = set()  # namespaces whose operators have their shape functions


@pytest.fixture(params=[*NATIVE, "cuda_on_host"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param == "cuda_on_host":
        importlib.import_module("cuda_on_host.build").load()
        monkeypatch.setattr(fastfocal.ops, "library", torch.ops.fastfocal_on_host)
        if "fastfocal_on_host" not in registered:
            fastfocal.ops.register_shapes("fastfocal_on_host")
            registered.add("fastfocal_on_host")
        return Backend("cuda_on_host", torch.device("cpu"), slow=True)
    return Backend(request.param, torch.device(request.param))


@pytest.fixture
def generator() -> torch.Generator:
    """Every test draws from the same seed, so that a failure repeats alone."""
    return torch.Generator().manual_seed(20170807)
