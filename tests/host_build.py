"""Compiles C++ for the tests and keeps what it made: what cuda_on_host/build.py and cpu_isas/build.py share."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

# Where a long compilation is announced: conftest.py sets it to the terminal, past what pytest captures.
announce: Callable[[str], None] = lambda text: None  # noqa: E731

FLAGS = (
    "-std=c++17",
    "-O1",  # nothing here is measured, and -O3 takes twice as long to compile
    "-fPIC",
    "-pthread",
    # No symbol may meet its namesake of the real extension in the same process.
    "-fvisibility=hidden",
    "-fno-gnu-unique",
)


class CompileError(RuntimeError):
    """Carries the command and everything the compiler said."""


@dataclass(frozen=True)
class Source:
    path: Path
    flags: tuple[str, ...] = ()  # after those of the library


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def default_directory() -> Path:
    """A folder of the user's own: what lies there is loaded into the process."""
    directory = Path(tempfile.gettempdir()) / f"fastfocal-tests-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user; set TMPDIR")
    return directory


def build_library(
    name: str,
    sources: Iterable[Source],
    directory: Path,
    *,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    depends: str = "",
    about: float = 0,
) -> Path:
    """Compiles `sources` into `directory`, and says where the library is.

    What takes `about` so many seconds of CPU time, if nothing is kept, is announced; 0: it takes no time to speak of.

    Files are compiled side by side. Each object is kept under a hash of all it was made from: source, flags, compiler,
    the project's headers, and `depends` for what else it depends on.
    """
    flags = (*FLAGS, *flags, *(f"-I{path}" for path in include))
    shared = _hash(run([*compiler(), "--version"]), repr(flags), depends, *_headers(include))

    def object_of(source: Source) -> Path:
        key = _hash(shared, str(source.path), source.path.read_bytes(), repr(source.flags))
        return directory / f"{source.path.stem}-{key}.o"

    def compile_one(source: Source, out: Path) -> None:
        if not out.exists():
            _make(out, [*compiler(), *flags, *source.flags, "-c", str(source.path)])

    sources = list(sources)
    objects = [object_of(source) for source in sources]
    missing = sum(not out.exists() for out in objects)
    if missing and about:
        share = about * missing / len(objects)
        announce(
            f"compiling {missing} of {len(objects)} files of {name} for the tests, about {share:.0f} s of one core; "
            f"kept in {directory} for the next run"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = directory / f"{name}-{_hash(*(path.name for path in objects), repr(link))}.so"
    if not library.exists():
        _make(library, [*compiler(), "-shared", "-pthread", *map(str, objects), *link, "-Wl,-z,defs"])
    return library


def build_operators(
    name: str, sources: Iterable[Source], *, about: float, include: Sequence[Path] = (), flags: Sequence[str] = ()
) -> Path:
    """A library that registers operators: with csrc/ and torch's stable ABI, in the default folder."""
    import torch

    root = Path(torch.__file__).parent
    return build_library(
        name,
        sources,
        default_directory(),
        include=(*include, CSRC, root / "include", root / "include" / "torch" / "csrc" / "api" / "include"),
        flags=("-DTORCH_TARGET_VERSION=0x020A000000000000", *flags),
        depends=torch.__version__,
        link=(f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        about=about,
    )


def load_operators(build: Callable[[], Path]) -> None:
    """Loads what `build` makes, once per process."""
    failure = _load_once(build)
    if failure:
        raise CompileError(failure)


@cache
def _load_once(build: Callable[[], Path]) -> str:
    """A failure is kept too: a thousand tests should not compile the same mistake a thousand times."""
    import torch

    try:
        torch.ops.load_library(build())  # type: ignore[no-untyped-call]
    except CompileError as error:
        return str(error)
    return ""


def _headers(include: Iterable[Path]) -> list[bytes]:
    """The headers an object may depend on, but for torch's, which its version stands for."""
    own = [path for path in include if path.is_relative_to(TESTS) or path.is_relative_to(CSRC)]
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
        run([*command, "-o", str(made)])
        made.replace(out)


def run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        raise CompileError(f"no C++ compiler: {command[0]} not found (CXX chooses another)") from None
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\nfailed:\n{done.stdout}")
    return done.stdout
