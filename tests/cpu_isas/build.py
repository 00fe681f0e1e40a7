"""Compiles the CPU kernels for every instruction set and registers each one: torch.ops.fastfocal_{avx512,avx2,portable}.

AVX-512 is compiled with include/immintrin.h where the processor lacks it, so that every kernel runs on every machine.
"""

from __future__ import annotations

import platform
from pathlib import Path

import host_build
from host_build import CSRC, Source

import fastfocal

HERE = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")  # as in setup.py, and the next line
AVX512_FLAGS = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c")
EMULATED_FLAGS = (
    "-O0",  # sixteen loops a statement take long to optimize
    f"-I{HERE / 'include'}",
    *("-D__AVX512F__", "-D__AVX512DQ__", "-D__AVX512BW__", "-D__AVX512VL__", "-D__FMA__"),
    "-ffp-contract=off",  # a processor with fused multiply-adds of its own would put them where no intrinsic asks for one
)


def capability() -> str:
    """What the extension found: "AVX512", "AVX2" or "default"; FASTFOCAL_CPU_CAPABILITY lowers it."""
    return str(fastfocal.build_info()["cpu_capability"])


def build() -> Path:
    """Builds the operators, unless the same sources were built before."""
    flags = {
        "isa_avx512.cpp": AVX512_FLAGS if capability() == "AVX512" else EMULATED_FLAGS,
        "isa_avx2.cpp": AVX2_FLAGS,
    }
    skipped = {"library.cpp"} if X86 else {"library.cpp", "isa_avx2.cpp"}  # register.cpp takes its place
    kernels = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.name not in skipped]
    sources = [Source(path, flags.get(path.name, ())) for path in (*kernels, HERE / "register.cpp")]
    return host_build.build_operators("fastfocal_isas", sources, about=25)


def check_stand_in() -> None:
    """Parses the AVX-512 kernels with include/immintrin.h; raises CompileError for an intrinsic that it lacks."""
    command = [*host_build.compiler(), *host_build.FLAGS, *EMULATED_FLAGS, f"-I{CSRC}", "-fsyntax-only"]
    host_build.run([*command, str(CSRC / "cpu" / "isa_avx512.cpp")])


def load() -> None:
    """Makes the operators, building them first if need be."""
    host_build.load_operators(build)
