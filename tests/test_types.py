"""What type checkers and `help()` say of the public functions."""

from __future__ import annotations

import importlib.util
import json
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastfocal

CALLS = Path(__file__).with_name("typed_calls.py")
ROOT = CALLS.parent.parent


def expected() -> list[int]:
    return [i for i, line in enumerate(CALLS.read_text().splitlines(), 1) if line.endswith("# error")]


@pytest.mark.slow
def test_mypy_tells_right_calls_from_wrong_ones() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed (pip install '.[lint]')")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--output=json", "--cache-dir=/dev/null"]
    said = subprocess.run([*command, str(CALLS)], cwd=ROOT, capture_output=True, text=True)
    messages = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    found = sorted({m["line"] for m in messages if m["severity"] == "error" and Path(m["file"]).name == CALLS.name})
    assert found == expected(), said.stdout + said.stderr


def test_pyright_tells_right_calls_from_wrong_ones() -> None:
    if importlib.util.find_spec("pyright") is None or shutil.which("node") is None:
        pytest.skip("pyright, or the Node.js it runs in, is not installed (pip install '.[lint]')")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(CALLS)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    messages = json.loads(said.stdout[said.stdout.index("{") :])["generalDiagnostics"]
    found = sorted({m["range"]["start"]["line"] + 1 for m in messages if m["severity"] == "error"})
    assert found == expected(), said.stdout + said.stderr


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_know_every_public_name(checker: str, tmp_path: Path) -> None:
    """`__all__` is computed, which they cannot follow: they have the names, and their types, from the imports."""
    if importlib.util.find_spec(checker) is None or (checker == "pyright" and shutil.which("node") is None):
        pytest.skip(f"{checker} is not installed (pip install '.[lint]')")
    names = sorted(fastfocal.__all__)
    source = tmp_path / "names.py"
    # What is imported and is no int is an error in its line; what is not known is one in the import, or has any type.
    wrong = [f"is_{i}: int = {name}" for i, name in enumerate(names)]
    source.write_text("\n".join([f"from fastfocal import {', '.join(names)}", *wrong]) + "\n")
    options = ["--strict", "--cache-dir=/dev/null"] if checker == "mypy" else ["--pythonpath", sys.executable]
    said = subprocess.run(
        [sys.executable, "-m", checker, *options, str(source)], cwd=ROOT, capture_output=True, text=True
    )
    found = {int(line) for line in re.findall(r"names\.py:(\d+)(?::\d+)?(?: -|:) error", said.stdout)}
    assert found == set(range(2, len(names) + 2)), said.stdout + said.stderr


@pytest.mark.parametrize("name", ["focal_loss", "focal_loss_star", "FastFocalLoss", "FastFocalLossStar"])
def test_help_shows_types(name: str) -> None:
    shown = pydoc.render_doc(getattr(fastfocal, name), renderer=pydoc.plaintext)
    assert "'Levels'" not in shown and "'Tensor" not in shown
    assert "Tensor | collections.abc.Sequence[torch.Tensor]" in shown.replace("torch.Tensor |", "Tensor |")
    assert "'sum', 'level', 'image', 'mean'" in shown
