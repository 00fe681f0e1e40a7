"""The backends a test body runs on: the CPU kernels, the CUDA kernels, and the CUDA kernels compiled for the host."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterator

import host_build
import pytest
import torch
from cases import NATIVE, Backend

import fastfocal

registered = {"fastfocal"}  # namespaces whose operators have their shape functions


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there
def pytest_configure(config: pytest.Config) -> None:
    """Tests that compile for a minute say so, whether or not output is captured."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    if terminal is None or capture is None:  # a worker of pytest-xdist
        return

    def announce(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(text)
            terminal.flush()

    host_build.announce = announce


@pytest.fixture
def use_operators(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points fastfocal at the operators of another namespace, for one test."""

    def use(namespace: str) -> None:
        if namespace not in registered:
            fastfocal.registration.register(namespace)
            registered.add(namespace)
        monkeypatch.setattr(fastfocal.ops, "operators", getattr(torch.ops, namespace))

    return use


@pytest.fixture(params=[*NATIVE, "cuda_on_host"])
def backend(request: pytest.FixtureRequest, use_operators: Callable[[str], None]) -> Iterator[Backend]:
    if request.param == "cuda_on_host":
        importlib.import_module("cuda_on_host.build").load()
        use_operators("fastfocal_on_host")
        yield Backend("cuda_on_host", torch.device("cpu"), slow=True)
        return
    yield Backend(request.param, torch.device(request.param))
    if request.param == "cuda":
        torch.cuda.synchronize()  # what went wrong in a kernel shows here, and not in a later test


def context_is_lost() -> bool:
    """Whether an error has ended the process' CUDA context: each later call would give that error again."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and context_is_lost():
        item.session.shouldstop = f"the CUDA context is lost since {item.nodeid}"
    return report


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small layers: two threads wait for each other longer than either computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """Every test draws from the same seed, so that a failure repeats alone."""
    return torch.Generator().manual_seed(20170807)
