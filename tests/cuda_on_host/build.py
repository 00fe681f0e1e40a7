"""Compiles the CUDA kernels for the host and registers them as torch.ops.fastfocal_on_host: see README.md."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",  # lines in a debugger's backtrace
    "-fPIC",
    "-pthread",
    # No symbol may meet its namesake of the real extension in the same process.
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    # nvcc lets a vector be loaded from an array of its elements.
    "-fno-strict-aliasing",
)
# What a GPU refuses, or does differently, and a CPU does silently. scheduler.cpp has the entry points that this needs.
SANITIZE = (
    "-fsanitize=alignment,null,bounds,signed-integer-overflow,shift-exponent,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)


class CompileError(RuntimeError):
    """Carries the command and everything the compiler said."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def default_directory() -> Path:
    """A folder of the user's own: what lies there is loaded into the process."""
    directory = Path(tempfile.gettempdir()) / f"fastfocal-cuda-on-host-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user; set TMPDIR")
    return directory


def build_library(
    name: str,
    sources: Sequence[Path],
    directory: Path,
    *,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    depends: str = "",
) -> Path:
    """Compiles `sources` (C++ or .cu) and the scheduler into `directory`, and says where the library is.

    Files are compiled side by side. Each object is kept under a hash of all it was made from: source, flags, compiler,
    the project's headers, and `depends` for what else it depends on.
    """
    include = (HERE / "include", *include)  # first, so that <cuda_runtime.h> and <assert.h> are the stand-ins
    flags = (*FLAGS, *flags, *(f"-I{path}" for path in include))
    shared = _hash(_run([*compiler(), "--version"]), repr(flags), depends, *_headers(include))

    def compile_one(source: Path) -> Path:
        kernels = source.suffix == ".cu"
        own = (*flags, *SANITIZE) if kernels else flags
        out = directory / f"{source.stem}-{_hash(shared, str(source), source.read_bytes(), repr(own))}.o"
        if not out.exists():
            _make(out, [*compiler(), *own, "-x", "c++", "-c", str(source)])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [HERE / "scheduler.cpp", *sources]))
    library = directory / f"{name}-{_hash(*(path.name for path in objects), repr(link))}.so"
    if not library.exists():
        _make(library, [*compiler(), "-shared", "-pthread", *map(str, objects), *link, "-Wl,-z,defs"])
    return library


def build(directory: Path | None = None) -> Path:
    """Builds the operators, unless the same sources were built before."""
    import torch

    root = Path(torch.__file__).parent
    # context.cpp is what register.cpp replaces: it asks torch for the CUDA stream and device.
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "register.cpp"]
    return build_library(
        "fastfocal_on_host",
        sources,
        directory or default_directory(),
        include=(CSRC, root / "include", root / "include" / "torch" / "csrc" / "api" / "include"),
        flags=("-DTORCH_TARGET_VERSION=0x020A000000000000",),
        depends=torch.__version__,
        link=(f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    )


def load(directory: Path | None = None) -> None:
    """Makes torch.ops.fastfocal_on_host, building it first if need be."""
    failure = _load_once(directory)
    if failure:
        raise CompileError(failure)


@cache
def _load_once(directory: Path | None) -> str:
    """A failure is kept too: a thousand tests should not compile the same mistake a thousand times."""
    import torch

    try:
        torch.ops.load_library(build(directory))  # type: ignore[no-untyped-call]
    except CompileError as error:
        return str(error)
    return ""


def _headers(include: Iterable[Path]) -> list[bytes]:
    """The headers an object may depend on, but for torch's, which its version stands for."""
    own = [path for path in include if path.is_relative_to(HERE) or path.is_relative_to(CSRC)]
    files = sorted(file for path in own for file in path.rglob("*") if file.suffix in {".h", ".cuh", ".inc"})
    return [file.read_bytes() for file in files]


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _make(out: Path, command: Sequence[str]) -> None:
    """Runs the command into a file of its own first: another process may be making the same one."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        _run([*command, "-o", str(made)])
        made.replace(out)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        raise CompileError(f"no C++ compiler: {command[0]} not found (CXX chooses another)") from None
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\nfailed:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    print(build())
