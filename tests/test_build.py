"""setup.py says in one sentence what it cannot do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# setup.py is run here without pip, which would install what pyproject.toml asks for.
pytest.importorskip("setuptools", minversion="77")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` on a copy that has no sources: it must stop before it compiles."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
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
