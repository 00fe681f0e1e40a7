"""Compiles the CUDA kernels for the host and registers them as torch.ops.fastfocal_on_host: see README.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import host_build
from host_build import CSRC, Source

HERE = Path(__file__).resolve().parent
INCLUDE = (HERE / "include",)  # <cuda_runtime.h> and <assert.h> are the stand-ins

FLAGS = (
    "-g1",  # lines in a debugger's backtrace
    # nvcc lets a vector be loaded from an array of its elements.
    "-fno-strict-aliasing",
)
# What a GPU refuses, or does differently, and a CPU does silently. scheduler.cpp has the entry points that this needs.
SANITIZE = (
    "-fsanitize=alignment,null,bounds,signed-integer-overflow,shift-exponent,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)


def with_scheduler(sources: Iterable[Path]) -> list[Source]:
    """The kernels (.cu) and C++ files of a library, and the scheduler that runs the kernels."""
    return [
        Source(path, (*SANITIZE, "-x", "c++") if path.suffix == ".cu" else ())
        for path in (HERE / "scheduler.cpp", *sources)
    ]


def build_kernels(name: str, sources: Iterable[Path], directory: Path) -> Path:
    """A library of kernels that need no torch."""
    return host_build.build_library(name, with_scheduler(sources), directory, include=INCLUDE, flags=FLAGS)


def build() -> Path:
    """Builds the operators, unless the same sources were built before."""
    # context.cpp is what register.cpp replaces: it asks torch for the CUDA stream and device.
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "register.cpp"]
    return host_build.build_operators(
        "fastfocal_on_host", with_scheduler(sources), about=20, include=INCLUDE, flags=FLAGS
    )


def load() -> None:
    """Makes torch.ops.fastfocal_on_host, building it first if need be."""
    host_build.load_operators(build)
