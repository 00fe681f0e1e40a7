"""CONTRIBUTING.md's walkthrough, executed: its blocks make a working loss of a copy of the sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import host_build
import pytest
from test_host_build import needs_compiler

import fastfocal

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Adding a loss\n")[1].split("\n## ")[0]


@dataclass(frozen=True)
class Block:
    path: str  # from the checkout's root
    language: str
    text: str


def read_blocks(section: str) -> list[Block]:
    """A line with nothing but a file's name and a colon opens the blocks of that file, which follow it at once."""
    blocks: list[Block] = []
    heading = r"^`([\w./-]+)`:\n"
    for found in re.finditer(heading + r"((?:\n```\w+\n.*?^```\n)+)", section + "\n", re.DOTALL | re.MULTILINE):
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", found[2], re.DOTALL | re.MULTILINE):
            blocks.append(Block(found[1], language, text))
    return blocks


BLOCKS = read_blocks(SECTION)


def change(text: str, diff: str, where: str) -> str:
    """The text with one hunk applied; its context has to be there exactly once."""
    lines = diff.splitlines(keepends=True)
    assert all(line[0] in " +-" for line in lines), f"{where}: a diff's lines begin with a space, + or -"
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    found = len(re.findall(f"^{re.escape(before)}", text, re.MULTILINE))
    assert found == 1, f"{where}: {found} places have these lines, expected one\n{before}"
    return re.sub(f"^{re.escape(before)}", lambda _: after, text, flags=re.MULTILINE)


def apply(block: Block, root: Path) -> None:
    path = root / block.path
    if block.language == "diff":
        path.write_text(change(path.read_text(), block.text, block.path))
    else:
        assert not path.exists(), f"{block.path}: is there already"
        path.write_text(block.text)


def copy_sources(target: Path) -> None:
    """What a checkout has for building and testing; the compiled module is the one that is installed."""
    for folder in ("csrc", "fastfocal", "tests"):
        shutil.copytree(
            ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "_C*.so"), dirs_exist_ok=True
        )
    shutil.copy(ROOT / "pyproject.toml", target)  # pytest's markers
    compiled = Path(fastfocal.ops._C.__file__)
    (target / "fastfocal" / compiled.name).symlink_to(compiled)


def test_the_walkthrough_says_how_much_it_changes() -> None:
    """Two files for the loss, one for its test, and rows."""
    new = [block.path for block in BLOCKS if block.language != "diff"]
    assert new == ["csrc/losses/poly1_focal.h", "fastfocal/losses/poly1_focal.py", "tests/test_poly1_focal.py"]
    added = [line for block in BLOCKS if block.language == "diff" for line in block.text.splitlines() if line[0] == "+"]
    (said,) = re.findall(r"To existing files it adds (\d+) lines", SECTION)
    assert int(said) == len(added) == 3  # an #include and a name in C++, an import in Python
    # Every block of code has a file's name before it, but for the commands.
    assert len(re.findall(r"^```\w+$", SECTION, re.MULTILINE)) == len(BLOCKS) + SECTION.count("```sh\n")


def test_a_context_that_is_not_there_once_is_an_error() -> None:
    assert change("a\nb\n", " a\n+c\n", "f") == "a\nc\nb\n"
    for text in ("b\n", "a\na\n", "xa\n"):
        with pytest.raises(AssertionError, match="f: "):
            change(text, " a\n+c\n", "f")


@pytest.mark.parametrize("language, command", [("cpp", "clang-format"), ("python", "ruff")])
def test_the_blocks_are_formatted(language: str, command: str, tmp_path: Path) -> None:
    executable = shutil.which(command, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if executable is None:
        pytest.skip(f"{command}: part of the lint extra")
    shutil.copy(ROOT / ".clang-format", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    options = ["--dry-run", "--Werror"] if language == "cpp" else ["format", "--check"]
    blocks = [block for block in BLOCKS if block.language == language]
    assert blocks
    for block in blocks:
        path = tmp_path / block.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        done = subprocess.run([executable, *options, str(path)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, f"{block.path}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the walkthrough followed, in a folder named by what they are: what is compiled is kept."""
    staged = tmp_path_factory.mktemp("staged")
    copy_sources(staged)
    for block in BLOCKS:
        apply(block, staged)
    digest = hashlib.sha256()
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(staged)).encode() + b"\0" + path.read_bytes())
    kept = host_build.default_directory() / f"adding-a-loss-{digest.hexdigest()[:16]}"
    if not kept.exists():
        try:
            staged.replace(kept)
        except OSError:  # another file system, or another process was first
            if not kept.exists():
                shutil.copytree(staged, kept, symlinks=True)
        host_build.announce("compiling the loss that CONTRIBUTING.md adds; kept for the next run")
    return kept


def run_its_test(checkout: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "tests/test_poly1_focal.py"]
    path = os.pathsep.join([str(checkout), str(checkout / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 20 and "skipped" not in done.stdout, done.stdout
    return done.stdout


@needs_compiler
@pytest.mark.slow
def test_the_walkthrough_gives_a_working_loss(checkout: Path) -> None:
    """Its own test, on the CPU's portable kernels: the only ones that are compiled for it."""
    run_its_test(checkout, "-p", "adding_a_loss.plugin", "-k", "not cuda")


def test_the_walkthrough_has_what_every_file_of_a_loss_has(checkout: Path) -> None:
    """In a process of its own: the loss is exported, in the reference too, and the last member."""
    code = """if True:
        import fastfocal
        from fastfocal.losses import LOSSES
        assert LOSSES[-1].parameters.kind == len(LOSSES) - 1 and LOSSES[-1].function is fastfocal.poly1_focal_loss
        assert {"FastPoly1FocalLoss", "poly1_focal_loss"} < set(fastfocal.__all__)
        assert fastfocal.reference.poly1_focal_loss and fastfocal.reference.Poly1FocalLoss
        print("exported from", fastfocal.__file__)
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"exported from {checkout}" in done.stdout, done.stderr


@needs_compiler
@pytest.mark.slow
def test_a_wrong_derivative_is_noticed(checkout: Path, tmp_path: Path) -> None:
    """The walkthrough's test can fail: the sign of a term in the header is turned, and nothing else."""
    wrong = tmp_path / "wrong"
    shutil.copytree(checkout, wrong, symlinks=True)
    header = wrong / "csrc" / "losses" / "poly1_focal.h"
    right = "fused_multiply_add(V(epsilon) * p, q, q)"
    assert header.read_text().count(right) == 1
    header.write_text(header.read_text().replace(right, "fused_multiply_add(V(-epsilon) * p, q, q)"))
    with pytest.raises(AssertionError, match="test_accuracy"):
        run_its_test(wrong, "-p", "adding_a_loss.plugin", "-k", "not cuda")
