"""python -m fastfocal: the short way through, its data, and its words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfocal.__main__ import main

for extra in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason='the demo needs pip install "fastfocal[demo]"')

from fastfocal.demo.scenes import NUM_CLASSES, SceneMaker  # noqa: E402


def test_scenes_repeat_from_the_seed_and_boxes_lie_inside() -> None:
    one, again, other = (
        SceneMaker(0, held_out=False)(3),
        SceneMaker(0, held_out=False)(3),
        SceneMaker(1, held_out=False)(3),
    )
    assert torch.equal(torch.as_tensor(one.image), torch.as_tensor(again.image))
    assert not torch.equal(torch.as_tensor(one.image), torch.as_tensor(other.image))
    boxes, labels = torch.as_tensor(one.boxes), torch.as_tensor(one.labels)
    size = max(torch.as_tensor(one.image).shape)
    assert len(boxes) == len(labels) > 0
    assert boxes.min() >= 0 and boxes.max() <= size and (boxes[:, 2:] > boxes[:, :2]).all()
    assert labels.min() >= 0 and labels.max() < NUM_CLASSES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "abacus"], ("--device", "abacus")),
        (["--steps", "0"], ("--steps", "at least 1")),
        (["--out", "/nowhere/at/all.png"], ("--out", "/nowhere/at/all.png")),
    ],
    ids=["device", "steps", "out"],
)
def test_one_sentence_for_a_bad_option(arguments: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_missing_extra_is_one_sentence(tmp_path: Path) -> None:
    hide = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'sklearn' else find(name, *rest)"
    )
    code = f"{hide}; sys.argv = ['fastfocal']; import runpy; runpy.run_module('fastfocal', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        'python -m fastfocal needs scikit-learn: pip install "fastfocal[demo]"'
    )
