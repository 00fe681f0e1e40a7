"""`sync_normalizer`: real processes, started by torchrun. What they do is in distributed_steps.py."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfocal import FastFocalLoss, focal_loss, reference

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 3

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name != "posix", reason="this torch has no torch.distributed"
)


def torchrun(processes: int, script: Path, *args: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    found = subprocess.run(
        [*command, str(script), *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    # PyTorch's own: on a busy machine a program with gloo, without fastfocal too, may abort as it exits. What it printed until
    # then is what the tests look at.
    aborted_at_exit = "terminate called without an active exception" in found.stdout and "failed\n" not in found.stdout
    assert found.returncode == 0 or aborted_at_exit, found.stdout[-8000:]
    return found.stdout


def checks() -> list[str]:
    lines = (ROOT / "tests" / "distributed_steps.py").read_text().splitlines()
    return [line.removeprefix("def ").split("(")[0] for line in lines if line.startswith("def check_")]


def every_check_was_fine(output: str, processes: int) -> None:
    for name in checks():
        assert f"{name}: fine on {processes} ranks" in output, output[-8000:]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_of_many_processes_is_that_of_one(processes: int) -> None:
    every_check_was_fine(torchrun(processes, ROOT / "tests" / "distributed_steps.py", "cpu"), processes)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_of_many_gpus_is_that_of_one(processes: int) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    every_check_was_fine(torchrun(processes, ROOT / "tests" / "distributed_steps.py", "cuda"), processes)


@pytest.mark.slow
def test_the_example() -> None:
    """The gradients are equal with sync_normalizer and not without, and the loss falls."""
    output = torchrun(2, ROOT / "examples" / "distributed.py")
    words = [line.split() for line in output.splitlines() if line and line[-1].isdigit()]
    lines = {" ".join(line[:-1]): float(line[-1]) for line in words}
    assert lines["with sync_normalizer=True"] < 1e-12 < 1e-2 < lines["without"], output
    assert lines["step 40 loss"] < 0.5 * lines["step 0 loss"], output


def test_the_example_says_how_it_is_run() -> None:
    found = subprocess.run([sys.executable, ROOT / "examples" / "distributed.py"], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "run it with: torchrun --nproc-per-node 2 examples/distributed.py\n"


# --- one process ------------------------------------------------------------------------------------------------------


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 9, CLASSES, generator=generator), torch.randint(-1, CLASSES + 1, (2, 9), generator=generator)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module", [FastFocalLoss, reference.FocalLoss])
def test_without_a_process_group(module: Any) -> None:
    """Made before there is one, as models are; called, it says what is missing."""
    criterion = module(CLASSES, sync_normalizer=True)
    with pytest.raises(
        RuntimeError, match=r"^sync_normalizer: expected an initialised process group, got none.*init_process"
    ):
        criterion(*problem())
    with pytest.raises(RuntimeError, match="sync_normalizer: expected an initialised process group"):
        torch._dynamo.reset()
        torch.compile(criterion, backend="eager")(*problem())
    assert torch.equal(criterion.eval()(*problem()), module(CLASSES)(*problem()))


NORMALIZERS: dict[str, dict[str, Any]] = {
    "positives": {},
    "positives_per_image": {"normalizer": "positives_per_image"},
    "mean": {"reduction": "mean"},
    "ema": {"ema_momentum": 0.9},
}


@pytest.mark.parametrize("module", [FastFocalLoss, reference.FocalLoss])
@pytest.mark.parametrize("lowest", [-1, CLASSES], ids=["positives", "background"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_one_rank_is_the_whole_batch(one_process: None, name: str, lowest: int, module: Any) -> None:
    options = NORMALIZERS[name]
    x, y = problem()
    y = y.clamp(min=lowest)
    got = module(CLASSES, sync_normalizer=True, **options)(x, y)
    torch.testing.assert_close(got, module(CLASSES, **options)(x, y), rtol=1e-6, atol=0)  # float32: the divisor's place


def test_a_tensor_given_is_not_written_to(one_process: None) -> None:
    x, _ = problem()
    total = x.sigmoid().sum(dtype=torch.float64)
    before = total.clone()
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True)
    loss = criterion(x, x.sigmoid(), normalizer=total)
    assert torch.equal(total, before)
    torch.testing.assert_close(loss, focal_loss(x, x.sigmoid(), normalizer=total), rtol=1e-6, atol=0)  # float32


def test_a_process_group_is_shared_by_copies(one_process: None) -> None:
    group = torch.distributed.group.WORLD
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True, process_group=group)
    assert copy.deepcopy(criterion).process_group is group and copy.copy(criterion).process_group is group
    with pytest.raises(TypeError, match=r"^process_group: a process group cannot be pickled; set it to None"):
        pickle.dumps(criterion)
    criterion.process_group = None
    assert pickle.loads(pickle.dumps(criterion)).sync_normalizer is True
    with pytest.raises(TypeError, match=r"^process_group: expected a torch.distributed.ProcessGroup or None, got str"):
        criterion.process_group = "gloo"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^process_group: expected sync_normalizer=True beside it, got False"):
        FastFocalLoss(CLASSES, process_group=group)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(TypeError, match=r"^process_group: .* got DeviceMesh \(its get_group\(\) is one\)"):
        FastFocalLoss(CLASSES, sync_normalizer=True, process_group=mesh)  # type: ignore[arg-type]
    FastFocalLoss(CLASSES, sync_normalizer=True, process_group=mesh.get_group())(*problem())


def test_torch_func_is_refused(one_process: None) -> None:
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True)
    x, y = problem()
    words = r"sync_normalizer: is not supported within torch\.func; compute the normalizer outside"
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.vjp(f, x), torch.func.functionalize):
        with pytest.raises(RuntimeError, match=words):
            transform(lambda t: criterion(t, y))(x)
    # What it says: the normalizer, made outside.
    count = ((y >= 0) & (y < CLASSES)).sum()
    found = torch.func.grad(lambda t: FastFocalLoss(CLASSES)(t, y, normalizer=count))(x)
    leaf = x.clone().requires_grad_()
    criterion(leaf, y).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad, rtol=1e-6, atol=0)  # float32: the divisor's place
