"""setup.py: its sentences about what it cannot do, the headers it takes, and the architectures it chooses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# setup.py is run here without pip, which would install what pyproject.toml asks for.
pytest.importorskip("setuptools", minversion="77")
needs_build_requirements = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ninja", "pybind11")), reason="no ninja or no pybind11"
)


def build(folder: Path, *sources: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` on a copy that has these sources of csrc and every header; without any it compiles nothing."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")] if sources else []
    for name in (*headers, *sources):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for package in ("fastfocal", "fastfocal/demo"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTFOCAL_", "CUDA_", "TORCH_CUDA_", "CXX"))}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FASTFOCAL_CUDA": "1", "CUDA_HOME": "/nowhere"}, ("FASTFOCAL_CUDA=1", "nvcc was not found", "CUDA_HOME")),
        ({"FASTFOCAL_CUDA": "yes"}, ("FASTFOCAL_CUDA", "expected 0 or 1", "'yes'")),
        ({"FASTFOCAL_CUDA": "0", "CXX": "no-such-compiler"}, ("no C++ compiler", "'no-such-compiler'", "CXX")),
    ],
    ids=["no_nvcc", "switch", "no_compiler"],
)
def test_one_sentence(tmp_path: Path, environment: dict[str, str], words: tuple[str, ...]) -> None:
    result = build(tmp_path, **environment)
    assert result.returncode != 0
    said = result.stderr.strip().splitlines()
    assert said[-1].startswith("fastfocal: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in said[-1]


def test_torch_too_old(tmp_path: Path) -> None:
    old = tmp_path / "site" / "torch"
    (old / "include").mkdir(parents=True)
    (old / "__init__.py").touch()
    (old / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    project = tmp_path / "project"
    project.mkdir()
    result = build(project, PYTHONPATH=str(old.parent))
    assert result.returncode != 0
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("fastfocal: torch 2.9.1+cu128 is too old") and "2.10" in sentence


@pytest.mark.parametrize("there", [True, False])
def test_torch_is_fetched_only_where_there_is_none(tmp_path: Path, there: bool) -> None:
    """What pip asks of an isolated build. Fetching torch is said, as it is the large part of an installation."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; import sys; sys.stdout = sys.__stderr__; "
    code += "needs = build_meta.get_requires_for_build_wheel(); sys.__stdout__.write(' '.join(needs))"
    if not there:
        hidden = "lambda name, *rest, **more: None if name == 'torch' else find(name, *rest, **more)"
        code = f"from importlib.machinery import PathFinder as P; find = P.find_spec; P.find_spec = {hidden}; {code}"
    for package in ("fastfocal", "fastfocal/compat", "fastfocal/demo", "fastfocal/heads", "fastfocal/losses"):
        (tmp_path / package).mkdir()
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("" if there else "torch>=2.10")
    assert ("`pip install torch` first" in result.stderr) == (not there)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_torch(folder: Path) -> Path:
    """The installed torch's headers, but for pybind11's: torch 2.11 brings one that stops wherever the stable ABI is used."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    real, torch = Path(spec.origin).parent, folder / "torch"
    (torch / "include" / "pybind11").mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '2.11.0'\n")
    (torch / "lib").symlink_to(real / "lib")
    for path in (real / "include").iterdir():
        if path.name != "pybind11":
            (torch / "include" / path.name).symlink_to(path)
    guarded = """
        #ifdef TORCH_TARGET_VERSION
        #error "this header is not part of the stable ABI"
        #endif
        """
    (torch / "include" / "pybind11" / "pybind11.h").write_text(guarded)
    return folder


@needs_build_requirements
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_pybind11_is_its_own(tmp_path: Path) -> None:
    """library.cpp, preprocessed with the flags of a build, sees pybind11's headers and not those that torch brings."""
    preprocess = """for last; do :; done
        case " $* " in *" -shared "*) for word; do case $previous in -o) : >"$word" ;; esac; previous=$word; done ;;
        *) exec c++ -E "$@" ;; esac"""
    compiler = executable(tmp_path / "bin" / "preprocess", preprocess)
    project = tmp_path / "project"
    project.mkdir()
    site = fake_torch(tmp_path / "site")
    result = build(project, "csrc/library.cpp", PYTHONPATH=str(site), FASTFOCAL_CUDA="0", CXX=str(compiler))
    assert result.returncode == 0, result.stdout + result.stderr
    (text,) = [path.read_text() for path in project.rglob("library.cpp.o")]
    used = set(re.findall(r'^# \d+ "([^"]+/pybind11/pybind11\.h)"', text, re.MULTILINE))
    assert len(used) == 1 and not used.pop().startswith(str(site))
    assert '/torch/csrc/stable/library.h"' in text  # whole, then


@needs_build_requirements
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_compiles_in_any_folder(tmp_path: Path) -> None:
    """nvcc splits what it hands on to the host's compiler at commas, and its shell at spaces."""
    project = tmp_path / "a project, b"
    project.mkdir()
    sources = ("csrc/library.cpp", "csrc/cuda/scale_gradients.cu")
    result = build(project, *sources, FASTFOCAL_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert list(project.rglob("scale_gradients.cu.o")), result.stdout + result.stderr


def fake_nvcc(folder: Path) -> Path:
    """A CUDA_HOME whose nvcc answers setup.py's questions as CUDA 13.0's does, and compiles nothing."""
    known = "75 80 86 87 88 89 90 100 110 103 120 121"
    answers = f"""case "$*" in
        --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
        --list-gpu-arch) for n in {known}; do echo compute_$n; done ;;
        *-dryrun*) echo "#\\$ INCLUDES=\\"-I{folder}/include\\"" >&2; echo "#\\$ LIBRARIES=\\"-L{folder}/lib\\"" >&2 ;;
        *) exit 1 ;;
        esac"""
    executable(folder / "bin" / "nvcc", answers)
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart_static.a").touch()
    return folder


@needs_build_requirements
@pytest.mark.parametrize(
    ("machine", "chosen", "archs"),
    [
        ("x86_64", "", "7.5 8.0 8.6 8.9 9.0 10.0 11.0 12.0+PTX"),
        ("aarch64", "", "7.5 8.0 8.6 8.7 8.9 9.0 10.0 11.0 12.0+PTX"),
        ("aarch64", "9.0;8.7+PTX", "9.0 8.7+PTX"),
    ],
)
def test_architectures(tmp_path: Path, machine: str, chosen: str, archs: str) -> None:
    """Orin (8.7) is an ARM board. Thor (11.0) runs neither the machine code nor the PTX of 12.0."""
    site, project = tmp_path / "site", tmp_path / "project"
    site.mkdir()
    project.mkdir()
    (site / "sitecustomize.py").write_text(f"import platform\nplatform.machine = lambda: {machine!r}\n")
    environment = {"TORCH_CUDA_ARCH_LIST": chosen} if chosen else {}
    result = build(project, PYTHONPATH=str(site), CUDA_HOME=str(fake_nvcc(tmp_path / "cuda")), **environment)
    assert f"and CUDA 13.0 for {archs}\n" in result.stdout
    (rules,) = project.rglob("build.ninja")
    flags = set(re.findall(r"-gencode=arch=compute_(\d+),code=sm_\1", rules.read_text()))
    assert flags == {arch.removesuffix("+PTX").replace(".", "") for arch in archs.split()}


@needs_build_requirements
@pytest.mark.parametrize("wish", ["", "0", "1", "yes"])
def test_line_numbers_for_a_profiler(tmp_path: Path, wish: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    result = build(project, CUDA_HOME=str(fake_nvcc(tmp_path / "cuda")), FASTFOCAL_LINEINFO=wish)
    if wish == "yes":
        assert result.stderr.strip().splitlines()[-1] == "fastfocal: FASTFOCAL_LINEINFO: expected 0 or 1, got 'yes'"
        return
    (rules,) = project.rglob("build.ninja")
    (flags,) = [line for line in rules.read_text().splitlines() if line.startswith("cuda_flags = ")]
    assert ("-lineinfo" in flags.split()) == (wish == "1")


# --- tests/matrix.sh, with stand-ins for python and pip ---------------------------------------------------------------

# `python -m venv` makes a folder of further stand-ins, and `pip wheel` a wheel; $STAND_IN/called has what was called.
STAND_IN = """
name=$(basename "$0")
echo "$name $*" | sed "s|$TMPDIR/[^ ]*/||g" >>"$STAND_IN/called"
case "$name $*" in
  *" -m venv "*) shift 2; mkdir -p "$1/bin"; for tool in pip python pytest; do cp "$0" "$1/bin/$tool"; done ;;
  "pip wheel"*) while [ "$1" != -w ]; do shift; done; echo wheel >"$2/fastfocal-0-$RANDOM.whl" ;;
  pytest*) echo "5 passed" ;;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("there", ["on_the_path", "pyenv", "broken_shim", "none"])
def test_matrix(tmp_path: Path, there: str) -> None:
    """Python 3.12's half is found where it is, and its absence said and counted as a failure."""
    bin_folder, pyenv = tmp_path / "bin", tmp_path / "pyenv"
    executable(bin_folder / "python3", STAND_IN)
    if there == "on_the_path":
        executable(bin_folder / "python3.12", STAND_IN)
    elif there == "pyenv":
        executable(pyenv / "versions" / "3.12.7" / "bin" / "python3", STAND_IN)
    elif there == "broken_shim":
        executable(bin_folder / "python3.12", "exit 127")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "matrix.sh", tmp_path / "tests")
    tools = {
        name: shutil.which(name)
        for name in ("bash", "sed", "basename", "dirname", "mktemp", "mkdir", "cp", "rm", "tail")
    }
    for name, path in (tools | {"sha256sum": shutil.which("sha256sum"), "sh": shutil.which("sh")}).items():
        assert path is not None
        (bin_folder / name).symlink_to(path)
    environment = {
        "PATH": str(bin_folder),
        "PYENV_ROOT": str(pyenv),
        "STAND_IN": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [str(tools["bash"]), str(tmp_path / "tests" / "matrix.sh")], env=environment, capture_output=True, text=True
    )
    called = (tmp_path / "called").read_text().splitlines()
    installed = [line.split()[3] for line in called if line.startswith("pip install -q torch")]
    first = ["torch==2.13.0", "torch==2.10.0", "torch==2.11.0", "torch==2.13.0", "torch"]  # built against, run with
    if there in ("on_the_path", "pyenv"):
        assert done.returncode == 0, done.stderr
        assert installed == [*first, "torch==2.11.0", "torch==2.11.0"]
        assert done.stdout.count("5 passed") == 5 and sum(line.startswith("pip wheel") for line in called) == 2
    else:
        assert done.returncode == 1 and installed == first
        assert done.stderr.splitlines()[-1] == "tests/matrix.sh: not run under Python 3.12, as there is none"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")]
