"""Time of every loss's forward and backward. `pytest --benchmark-only` runs this; `python -m benchmarks.losses` prints a table.

By default our own rows, a copy, and the focal loss over the same kind of targets; with --all-cases also the code of the
projects that train with the losses, eager and compiled.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import losses
from benchmarks.cases import Case
from benchmarks.implementations import Row
from benchmarks.test_focal_loss import clock_of, measure

_cases: dict[str, Case] = {}
_rows: dict[tuple[str, str], Row] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    every = config.getoption("all_cases")
    wanted = config.getoption("device")
    cuda = torch.cuda.is_available() if wanted is None else wanted.startswith("cuda")
    pairs = []
    for case in losses.all_cases():
        _cases[case.key] = case
        for row in losses.rows_of(case):
            if row.slow and (cuda or not every):  # the projects' inputs are made on the CPU
                continue
            _rows[row.name, case.key] = row
            marks = pytest.mark.benchmark(group=case.name, timer=clock_of(case, cuda))
            pairs.append(pytest.param(row.name, case.key, id=f"{row.name}-{case.key}", marks=marks))
    metafunc.parametrize("row_name, case_key", pairs)


def test_loss(
    benchmark: BenchmarkFixture, row_name: str, case_key: str, device: torch.device, keep_memory: bool
) -> None:
    measure(benchmark, _cases[case_key], _rows[row_name, case_key], device, keep_memory)
