"""Focal loss and focal loss star give the bits that are recorded: code may move, its results may not."""

from __future__ import annotations

import importlib
import itertools
import shutil
from collections.abc import Callable

import host_build
import pytest
from cpu_isas import build as cpu_isas
from recorded import record

pytestmark = pytest.mark.skipif(shutil.which(host_build.compiler()[0]) is None, reason="no C++ compiler")


def load(backend: str, use_operators: Callable[[str], None]) -> None:
    if backend == "cuda_on_host":
        importlib.import_module("cuda_on_host.build").load()
        use_operators("fastfocal_on_host")
    elif backend != "extension":
        cpu_isas.load()
        use_operators(f"fastfocal_{backend}")


@pytest.mark.parametrize("backend", record.BACKENDS)
def test_bits(backend: str, use_operators: Callable[[str], None], request: pytest.FixtureRequest) -> None:
    """Skipped where anything is different that the bits may depend on beside the code."""
    recorder = request.config.pluginmanager.get_plugin(record.Recorder.NAME)
    conditions = record.conditions(backend)
    recorded = {"conditions": conditions} if recorder is not None else record.read()[backend]
    different = [
        f"{name}: recorded with {then}, here {conditions.get(name)}"
        for name, then in recorded["conditions"].items()
        if conditions.get(name) != then
    ]
    if different:
        pytest.skip("; ".join(different))

    load(backend, use_operators)
    bits = record.compute_bits()
    if recorder is not None:
        recorder.found[backend] = {"conditions": conditions, "bits": bits}
        return
    assert bits.keys() == recorded["bits"].keys(), "the cases are not those recorded: see recorded/record.py"
    wrong = [
        f"{name}: {' and '.join(p for p, a, b in zip(('losses', 'gradients'), then, bits[name], strict=True) if a != b)}"
        for name, then in recorded["bits"].items()
        if bits[name] != then
    ]
    if wrong:  # a list, where an assertion would show both records
        pytest.fail(
            f"{len(wrong)} of {len(bits)} cases have other bits than recorded:\n" + "\n".join(wrong), pytrace=False
        )


def test_every_two_choices_meet_in_a_case() -> None:
    """But for a layout and a variant: half of those."""
    choices = (record.LAYOUTS, record.VARIANTS, record.TYPES, record.REDUCTIONS, record.GRAD_MODES, record.INCOMING)
    fields = ("layout", "variant", "dtype", "reduction", "grad_mode", "incoming")
    cases = list(record.all_cases())
    for (one, first), (other, second) in itertools.combinations(zip(fields, choices, strict=True), 2):
        met = {(getattr(case, one), getattr(case, other)) for case in cases}
        if (one, other) == ("layout", "variant"):
            assert 2 * len(met) >= len(first) * len(second)
            continue
        refused = itertools.product(record.NOT_DENSE, ("inplace",)) if (one, other) == ("layout", "grad_mode") else ()
        assert met == set(itertools.product(first, second)) - set(refused), (one, other)
