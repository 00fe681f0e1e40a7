"""host_build.py: what it compiles is kept, and a compilation that takes a minute is announced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import host_build
import pytest

import fastfocal

needs_compiler = pytest.mark.skipif(shutil.which(host_build.compiler()[0]) is None, reason="no C++ compiler")


@needs_compiler
def test_a_long_compilation_is_announced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(host_build, "announce", said.append)
    paths = [tmp_path / "one.cpp", tmp_path / "two.cpp"]
    for path in paths:
        path.write_text(f"int {path.stem}() {{ return 1; }}\n")
    sources = [host_build.Source(path) for path in paths]
    library = host_build.build_library("numbers", sources, tmp_path, about=60)
    assert library.exists()
    (line,) = said
    assert line.startswith("compiling 2 of 2 files of numbers") and "about 60 s" in line and str(tmp_path) in line
    assert host_build.build_library("numbers", sources, tmp_path, about=60) == library
    assert len(said) == 1  # all of it was kept
    paths[1].write_text("int two() { return 2; }\n")
    host_build.build_library("numbers", sources, tmp_path, about=60)
    assert "compiling 1 of 2 files of numbers" in said[1] and "about 30 s" in said[1]
    paths[1].write_text("int two() { return 3; }\n")
    host_build.build_library("numbers", sources, tmp_path)  # takes no time to speak of
    assert len(said) == 2


def test_an_announcement_is_seen_without_s(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import host_build, pytest\n\n"
        "@pytest.fixture\ndef compiled():\n    print('captured')\n    host_build.announce('compiling for a minute')\n\n"
        "def test_it(compiled):\n    pass\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(fastfocal.__file__).parent.parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiling for a minute" in done.stdout.splitlines()
    assert "captured" not in done.stdout
