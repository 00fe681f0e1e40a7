"""Options of the benchmarks, what is known about the machine, and which folder a bare `pytest` runs."""

from __future__ import annotations

import os
import platform
import signal
from typing import Any

import pytest
import torch

import fastfocal
from benchmarks.machine import cpu


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastfocal benchmarks")
    group.addoption("--all-cases", action="store_true", help="every case, and every implementation in each")
    group.addoption("--device", default=None, help="where to measure; default: cuda if there is one, else cpu")
    group.addoption("--keep-memory", action="store_true", help="malloc keeps what is released; default: fresh memory")
    group.addoption("--largest", type=float, default=3e7, help="logits up to which time is measured; default 3e7")


def pytest_configure(config: pytest.Config) -> None:
    # testpaths names both folders, so that this file is read: `pytest` runs the tests, `pytest --benchmark-only` these.
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args[:] = ["benchmarks" if config.getoption("benchmark_only", False) else "tests"]
    if config.getoption("benchmark_only", False):
        # Ended by `timeout`, a run still saves what it has measured, as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def keep_memory(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("keep_memory"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    name, flags = cpu()
    on_cuda = torch.cuda.is_available()
    machine_info["fastfocal"] = {
        **fastfocal.build_info(),
        "cpu_name": name,
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "keep_memory": config.getoption("keep_memory"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if on_cuda else None,
        "gpu_capability": list(torch.cuda.get_device_capability()) if on_cuda else None,
        "python": platform.python_version(),
    }
