"""A checkout in which nobody ran `pip install .`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "fastfocal"


def test_an_uninstalled_checkout_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "fastfocal", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # -S: without site-packages, where this environment has fastfocal. The answer may not depend on torch being there.
    command = [sys.executable, "-S", "-c", "import fastfocal"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: fastfocal is not installed: {tmp_path} holds its source alone; run `pip install .` there"
    )
    assert "PackageNotFoundError" not in done.stderr
