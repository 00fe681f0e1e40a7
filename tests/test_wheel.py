"""What the compiled module asks of the system and of torch: that is what decides where a wheel of it runs.

Read with nm and readelf, of the binutils that every compiler needs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastfocal
import fastfocal._C

if sys.platform == "linux":
    pass
else:
    pytest.skip("ELF files are Linux's", allow_module_level=True)
if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent
EXTENSION = Path(fastfocal._C.__file__)

# torch's wheels ask for 2.28 (manylinux_2_28). What is newer here comes of the machine that compiled it, not of what the
# sources ask for: compiled on glibc 2.28, none of these would be. A name that is not here is one that the sources brought.
NEWER_THAN_TORCHS: dict[str, str] = {
    "exp": "2.29: the same function without an error handler of old; 2.2.5 has it too",
    "log": "2.29: as exp",
    "pow": "2.29: as exp",
    "exp2": "2.29: as exp",
    "log2": "2.29: as exp",
    "__libc_single_threaded": "2.32: libstdc++'s headers look at it in every shared_ptr, where glibc has it",
    **dict.fromkeys(("stat", "fstat", "lstat", "mknod"), "2.33: functions where they were inline"),
    **dict.fromkeys(("__isoc23_strtol", "__isoc23_strtoul", "__isoc23_strtoull", "__isoc23_sscanf"), "2.38: C23's"),
}  # fmt: skip
# 2.34 moved libpthread, libdl and librt into libc. Asked for by CUDA's static runtime, and dlopen to find torch's streams.
MOVED_IN_2_34 = re.compile(r"(pthread|dl|sem|shm)_?\w+")
LIBRARIES = re.compile(
    r"(libtorch_cpu|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-[\w-]+)\.so(\.\d+)?"
)
# Python's API; torch's C functions; parts of libstdc++ that libtorch_cpu has too, unversioned.
UNVERSIONED = re.compile(r"_?Py[A-Z_]\w*|aoti_torch_\w+|torch_\w+|_ZNK?St\w+")
# What the loader and the compiler's start files look for.
MAY_BE_MISSING = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}


def said(*command: str) -> str:
    return subprocess.run([*command, str(EXTENSION)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def undefined() -> list[tuple[str, str, str]]:
    """Name, version ("GLIBC_2.2.5" or nothing) and kind of every symbol that someone else has to have."""
    found = re.findall(r"^\s+([A-Za-z]) (\w+)(?:@+([\w.]+))?$", said("nm", "-D", "--undefined-only"), flags=re.M)
    assert len(found) > 100, "nm's table was not understood"
    return [(name, version, kind) for kind, name, version in found]


def test_every_symbol_is_of_a_stable_interface(undefined: list[tuple[str, str, str]]) -> None:
    """Nothing of torch but its C functions: a mangled c10:: or at:: name would tie the module to one version of torch."""
    strange = [
        name
        for name, version, kind in undefined
        if not re.match(r"(GLIBC|GLIBCXX|CXXABI|GCC)_\d", version)
        and not UNVERSIONED.fullmatch(name)
        and not (name in MAY_BE_MISSING and kind in "wv")
    ]
    assert not strange
    assert any(name.startswith("aoti_torch_") for name, _, _ in undefined)
    assert not [name for name, _, _ in undefined if re.search(r"3c10|2at6|5torch|8pybind11", name)]


def test_libraries() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said("readelf", "-W", "-d"))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if not LIBRARIES.fullmatch(name)]
    assert "RPATH" not in said("readelf", "-W", "-d")  # nor RUNPATH: whichever torch is imported is the one


def test_glibc(undefined: list[tuple[str, str, str]]) -> None:
    """Nothing newer than 2.28, where torch's own wheels run, but what is explained above."""
    newer = {}
    for name, version, _ in undefined:
        number = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", version)
        if number and (int(number[1]), int(number[2])) > (2, 28):
            newer[name] = version
    moved = {name for name, version in newer.items() if version == "GLIBC_2.34" and MOVED_IN_2_34.fullmatch(name)}
    assert not {name: version for name, version in newer.items() if name not in (*NEWER_THAN_TORCHS, *moved)}


def test_exports_nothing_but_the_module() -> None:
    """Two copies in one process (an editable one and an installed one) do not mix."""
    defined = re.findall(r"^[0-9a-f]+ [A-Z] (\w+)", said("nm", "-D", "--defined-only"), flags=re.M)
    ours = [name for name in defined if "fastfocal" in name]
    assert "PyInit__C" in defined and not ours


def test_paths_of_the_machine_that_built_it_are_not_in_it() -> None:
    """They would make two builds of the same sources differ, and name folders in errors that nobody else has."""
    content = EXTENSION.read_bytes()
    assert b"fastfocal/csrc/library.cpp" in content  # as errors of the operators' registration say
    assert not re.findall(rb"(?<![\w/.-])/[\w.-]+/[\w./-]+\.(?:h|hpp|cpp|cu|cuh)\b", content)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with 3.11")
def test_build_requirements_are_ranges() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for requirement in project["build-system"]["requires"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<\d+", requirement), (
            f"{requirement}: from which version on, and below which?"
        )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with 3.11")
def test_metadata_needs_no_build() -> None:
    """uv (and any resolver) would otherwise run setup.py, and fetch a torch for it, to learn a version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "dynamic" not in project
    assert project["version"] == fastfocal.__version__
