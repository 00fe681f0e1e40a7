"""tests/gpu.sh without a GPU: stand-ins for python, nvidia-smi, nvcc, ncu and compute-sanitizer answer as a test says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("bash", "timeout", "tar", "awk")), reason="needs bash and its tools"
)

# $STAND_IN/answers has a file for what a command line contains; the first that matches is run, with the command line. What no
# file answers prints a line and succeeds.
STAND_IN = """#!/bin/bash
line="$(basename "$0") $*"
echo "$line" >>"$STAND_IN/called"
case $line in
  *get_device_capability*) echo "${CAPABILITY-9.0}" ;;
  *--collect-only*) printf '%s\\n' tests/test_kernels.py::test_a tests/test_labels.py::test_b tests/test_cuda.py::test_c ;;
  *build_info*) echo "{'cuda_archs': ['9.0']}" ;;
esac
for answer in "$STAND_IN"/answers/*; do
  [ -e "$answer" ] || continue
  pattern=$(head -n 1 "$answer")
  case $line in *${pattern#\\# }*) . "$answer"; exit $? ;; esac
done
case $line in
  *"-m pytest"*--benchmark-json=*) echo '{}' >"$(sed 's/.*--benchmark-json=\\([^ ]*\\).*/\\1/' <<<"$line")"; echo "3 passed" ;;
  *"-m pytest"*) echo "12 passed, 3 skipped in 1.00s" ;;
  *benchmarks.report*)
    out=${line##*--out }
    mkdir -p "$out"
    printf '# Results\\n\\n## main\\n| row | 1 ms |\\n' >"$out/report.md"
    ;;
esac
exit 0
"""
TOOLS = ("python", "nvidia-smi", "nvcc", "ncu", "compute-sanitizer")
FAILURES = """
=================================== FAILURES ===================================
______________________ test_sizes[cuda-one_row-contiguous] ______________________
tests/test_kernels.py:95: in test_sizes
E   RuntimeError: CUDA error: an illegal memory access was encountered
______________________ test_sizes[cuda-one_row-3d] ______________________
E   the second one
=========================== short test summary info ============================
FAILED tests/test_kernels.py::test_sizes
2 failed, 5 passed in 3.00s
"""


@dataclass
class Run:
    rc: int
    printed: str
    out: Path
    called: list[str]
    seconds: float

    def steps(self, call: str) -> dict[str, str]:
        lines = (self.out / f"{call}.txt").read_text().splitlines()
        return {name: how.strip() for name, how in (line.split(":", 1) for line in lines)}

    def kept(self, call: str, name: str) -> str:
        with tarfile.open(self.out / f"{call}.tar.gz") as archive:
            member = archive.extractfile(f"./{name}")
            assert member is not None
            return member.read().decode()


def rehearse(folder: Path, *calls: str, answers: dict[str, str] | None = None, **environment: str) -> Run:
    """answers: part of a command line -> what a shell does instead of it."""
    stand_in, out = folder / "stand_in", folder / "out"
    (stand_in / "answers").mkdir(parents=True)
    (stand_in / "bin").mkdir()
    for tool in TOOLS:
        (stand_in / "bin" / tool).write_text(STAND_IN)
        (stand_in / "bin" / tool).chmod(0o755)
    for i, (pattern, what) in enumerate((answers or {}).items()):
        (stand_in / "answers" / f"{i:02}").write_text(f"# {pattern}\n{what}\n")
    variables = {
        **{name: value for name, value in os.environ.items() if name not in ("JOBS", "CALL_SECONDS", "ONLY")},
        **{"PATH": f"{stand_in / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(stand_in), "PYTHON": "python"},
        **{"OUT": str(out), "TMPDIR": str(folder)},
    }
    began = time.monotonic()
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "gpu.sh"), *calls],
        env=variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    called = (stand_in / "called").read_text().splitlines() if (stand_in / "called").exists() else []
    return Run(done.returncode, done.stdout, out, called, time.monotonic() - began)


def test_all_is_well(tmp_path: Path) -> None:
    run = rehearse(tmp_path)
    assert run.rc == 0, run.printed
    assert sorted(path.name for path in run.out.iterdir()) == sorted(
        f"{c}.{x}" for c in "ABCD" for x in ("tar.gz", "txt")
    )
    for call in "ABCD":
        assert all(re.fullmatch(r"ok \(\d+ s\)", how) for how in run.steps(call).values()), run.printed
    assert list(run.steps("A"))[:4] == ["machine", "build", "built", "collect"]
    assert set(run.steps("A")) >= {
        "kernels_float32",
        "kernels_bfloat16",
        "kernels_float16",
        "kernels_float64",
        "labels",
        "cuda",
    }
    assert list(run.steps("B"))[3:6] == ["ncu_fast_contiguous", "ncu_fast_channels_last", "ncu_others"]
    assert len(run.steps("D")) == 3 + 4 * 5
    assert "| row | 1 ms |" in run.printed and "# Results\n" not in run.printed
    assert "12 passed" in run.kept("A", "labels.txt")
    assert run.kept("C", "main_float32.json") == "{}\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")], "scratch folders are left"
    # Nothing is installed, and the build is for the card alone.
    assert not any(" pip " in line for line in run.called)


def test_the_build_is_for_the_card_alone(tmp_path: Path) -> None:
    seen = 'echo "$TORCH_CUDA_ARCH_LIST $FASTFOCAL_CUDA $FASTFOCAL_LINEINFO"'
    run = rehearse(tmp_path, "A", answers={"setup.py": seen}, CAPABILITY="8.6")
    assert run.kept("A", "build.txt") == "8.6 1 1\n"
    assert run.rc == 1 and run.steps("A")["built"].startswith("failed, no line matches"), (
        "9.0 is what the stand-in built"
    )


def test_nothing_runs_where_the_build_failed(tmp_path: Path) -> None:
    run = rehearse(tmp_path, "A", answers={"setup.py": "echo 'focal_loss.cu(3): error'; exit 1"})
    assert run.rc == 1
    assert list(run.steps("A")) == ["machine", "build"]
    assert run.printed.endswith("-- first failure: build\nfocal_loss.cu(3): error\n")


def test_a_failure_stops_no_other_step_and_is_printed_last(tmp_path: Path) -> None:
    answers = {"not float16 and not float64": f"cat <<'END'{FAILURES}END\nexit 1", "test_labels": "echo later; exit 1"}
    run = rehearse(tmp_path, "A", answers=answers)
    assert run.rc == 1
    steps = run.steps("A")
    assert steps["kernels_float32"].startswith("failed, rc 1") and steps["labels"].startswith("failed, rc 1")
    assert steps["cuda"].startswith("ok") and steps["kernels_float64"].startswith("ok")
    last = run.printed[run.printed.index("-- first failure: ") :].splitlines()
    assert last[0] == "-- first failure: kernels_float32"
    assert "test_sizes[cuda-one_row-contiguous]" in last[1]
    assert last[-1] == "E   RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "the second one" in run.kept("A", "kernels_float32.txt")


@pytest.mark.parametrize("said", ["30 skipped in 1.00s", "no tests ran in 0.10s", "0 passed, 3 skipped", ""])
def test_a_step_that_skips_everything_fails(tmp_path: Path, said: str) -> None:
    run = rehearse(tmp_path, "A", answers={"tests/test_labels.py": f"echo '{said}'"})
    assert run.rc == 1
    assert run.steps("A")["labels"].startswith("failed, no line matches [1-9][0-9]* passed")


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """What it measured before stays, and what it started does not."""
    hang = """
        json=$(sed 's/.*--benchmark-json=\\([^ ]*\\).*/\\1/' <<<"$line")
        sleep 1000 & echo $! >"$STAND_IN/child"
        trap 'echo saved >"$json"; exit 143' TERM
        echo "one row is done"
        wait
    """
    run = rehearse(tmp_path, "C", answers={"test_number_of_logits": hang}, CALL_SECONDS="4")
    assert run.rc == 1 and run.seconds < 20
    steps = run.steps("C")
    assert re.match(r"failed, ended at its limit of [1-4] s", steps["scaling"])
    assert steps["main_float32"].startswith("ok")
    assert steps["autotune"].startswith("not run, the call's time was up"), "the call's own limit holds"
    assert run.kept("C", "scaling.txt") == "one row is done\n"
    assert run.kept("C", "scaling.json") == "saved\n"
    child = int((tmp_path / "stand_in" / "child").read_text())
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        facts = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return facts.rsplit(")", 1)[1].split()[0] != "Z"  # a zombie, where nobody waits for orphans


def test_a_step_that_will_not_end_is_killed(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; echo here; while :; do sleep 0.1; done"
    run = rehearse(tmp_path, "C", answers={"800x1344-bfloat16": stubborn}, CALL_SECONDS="2", KILL_AFTER="1")
    assert run.rc == 1 and run.seconds < 15
    assert run.steps("C")["main_16_bit"].startswith("failed, ended at its limit of")
    assert run.kept("C", "main_16_bit.txt") == "here\n"


def test_some_steps_alone(tmp_path: Path) -> None:
    run = rehearse(tmp_path, "A", "C", "D", ONLY="bfloat16|huge|racecheck_other")
    always = ["machine", "build", "built"]
    assert list(run.steps("A")) == [*always, "collect", "kernels_bfloat16"]
    assert list(run.steps("C")) == [*always, "huge", "report"]
    assert [n for n in run.steps("D") if n not in always] == [
        *["memcheck_bfloat16", "racecheck_bfloat16", "racecheck_other"],
        *["initcheck_bfloat16", "synccheck_bfloat16"],
    ]


def test_steps_side_by_side(tmp_path: Path) -> None:
    """Never more than JOBS; the order of the summary is that of the start."""
    slow = """
        mkdir -p "$STAND_IN/now"; touch "$STAND_IN/now/$$"
        ls "$STAND_IN/now" | wc -l >>"$STAND_IN/counts"
        case $line in *bfloat16*) sleep 0.6 ;; *) sleep 0.2 ;; esac
        rm "$STAND_IN/now/$$"; echo "1 passed"
    """
    run = rehearse(tmp_path, "A", answers={"-m cuda -q": slow}, JOBS="3")
    assert run.rc == 0
    counts = [int(line) for line in (tmp_path / "stand_in" / "counts").read_text().split()]
    assert max(counts) == 3
    kernels = [name for name in run.steps("A") if name.startswith("kernels")]
    assert kernels == ["kernels_float32", "kernels_bfloat16", "kernels_float16", "kernels_float64"]


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """The largest first; what is left says so."""
    big = 'out=$(sed "s/.*--export \\([^ ]*\\).*/\\1/" <<<"$line"); head -c 300000 /dev/urandom >"$out.ncu-rep"'
    run = rehearse(tmp_path, "B", answers={"--export": big}, MOST_BYTES="100000")
    assert run.rc == 0
    assert (run.out / "B.tar.gz").stat().st_size <= 100000
    with tarfile.open(run.out / "B.tar.gz") as archive:
        names = archive.getnames()
    assert "./fast.ncu-rep" not in names and "./ncu_others.txt" in names
    assert run.kept("B", "left_out.txt") == "300000 fast.ncu-rep\n"


def test_results_are_packed_after_each_step(tmp_path: Path) -> None:
    """A call that is killed as a whole has lost the running step alone."""
    look = 'cp "$OUT/C.tar.gz" "$STAND_IN/before.tar.gz"; cp "$OUT/C.txt" "$STAND_IN/before.txt"'
    rehearse(tmp_path, "C", answers={"test_small_work": look})
    with tarfile.open(tmp_path / "stand_in" / "before.tar.gz") as archive:
        assert "./main_16_bit.json" in archive.getnames()
    assert "main_16_bit:" in (tmp_path / "stand_in" / "before.txt").read_text()


@pytest.mark.parametrize(
    ("calls", "environment", "rc", "words"),
    [
        (("A", "build"), {}, 2, "tests/gpu.sh: no call build: expected A, B, C or D\n"),
        (("A",), {"CAPABILITY": ""}, 1, "tests/gpu.sh: torch of python sees no CUDA device\n"),
    ],
    ids=["unknown_call", "no_device"],
)
def test_one_sentence(tmp_path: Path, calls: tuple[str, ...], environment: dict[str, str], rc: int, words: str) -> None:
    run = rehearse(tmp_path, *calls, **environment)
    assert (run.rc, run.printed) == (rc, words)
    assert not run.out.exists()


def test_a_file_that_does_not_import_is_a_failure(tmp_path: Path) -> None:
    """The others run all the same."""
    broken = "echo tests/test_labels.py::test_b; echo 'ERROR tests/test_star.py'; exit 2"
    run = rehearse(tmp_path, "A", answers={"--collect-only": broken})
    assert run.rc == 1 and run.steps("A")["collect"].startswith("failed, rc 2")
    assert run.steps("A")["labels"].startswith("ok")
    assert run.printed.endswith("ERROR tests/test_star.py\n")


def test_killed_before_its_limit_is_no_limit(tmp_path: Path) -> None:
    """As by the system, where memory is short."""
    run = rehearse(tmp_path, "A", answers={"tests/test_labels.py": "kill -KILL $$"})
    assert run.steps("A")["labels"].startswith("failed, rc 137")


def test_sanitizer_sees_every_part(tmp_path: Path) -> None:
    run = rehearse(tmp_path, "D", answers={"racecheck": 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING"'})
    calls = [line for line in run.called if line.startswith("compute-sanitizer")]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        parts = {line.rsplit(" ", 1)[1] for line in calls if f"--tool {tool} " in line}
        assert parts == {"float32", "float16", "bfloat16", "float64", "other"}
    assert all("--error-exitcode 9" in line for line in calls)
    assert run.kept("D", "racecheck_float16.txt") == "1\n"


# --- what the script starts, really ------------------------------------------------------------------------------------

# Not `python -m pytest`, which would import the checkout's fastfocal in place of an installed one.
PYTEST = [sys.executable, "-c", "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"]
FAKE_GPU = """
import types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: "model"
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(L2_cache_size=50 * 2**20)
"""


def pytest_of(*arguments: str, path: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    import fastfocal

    site = os.pathsep.join(filter(None, [path, str(Path(fastfocal.__file__).parent.parent)]))
    environment = {**os.environ, "PYTHONPATH": site}
    return subprocess.run(
        [*PYTEST, "-p", "no:cacheprovider", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_every_benchmark_is_in_one_group(tmp_path: Path) -> None:
    """The -k of each group, given to pytest's own parser, over the benchmarks that a GPU has."""
    from _pytest.mark.expression import Expression

    pytest.importorskip("pytest_benchmark")
    (tmp_path / "fake_gpu.py").write_text(FAKE_GPU)
    done = pytest_of("--benchmark-only", "-p", "fake_gpu", "--co", "-q", "--device=cuda", path=str(tmp_path))
    names = re.findall(r"^benchmarks/test_focal_loss\.py::(.+)$", done.stdout, re.MULTILINE)
    assert len(names) > 150, done.stdout + done.stderr
    script = (ROOT / "tests" / "gpu.sh").read_text()
    groups = re.search(r"^benchmark_groups=\(\n(.*?)^\)$", script, re.DOTALL | re.MULTILINE)
    assert groups is not None
    found = dict(re.findall(r'^  "(\w+) \d+ (.+)"$', groups[1], re.MULTILINE))
    of_group = {}
    for group, rows in found.items():
        expression = Expression.compile(rows)
        of_group[group] = [
            n for n in names if expression.evaluate(lambda word, n=n, **_: word in f"test_focal_loss.py::{n}")
        ]
    for name in names:
        homes = [group for group, members in of_group.items() if name in members]
        assert len(homes) == 1, f"{name} is in {homes}"
    assert all(of_group.values())
    tuned = [name for name in names if "max_autotune" in name]
    assert tuned == ["test_focal_loss[compile_per_level_max_autotune-800x1344-float32-nchw-2-save]"]


def test_a_lost_context_ends_the_run(tmp_path: Path) -> None:
    """After a sticky error the first failure stands alone; an ordinary one stops nothing."""
    tests = str(Path(__file__).parent)
    (tmp_path / "conftest.py").write_text(
        f"""
import importlib.util, sys
sys.path.insert(0, {tests!r})
import pytest, torch
spec = importlib.util.spec_from_file_location("conftest_of_the_suite", {tests!r} + "/conftest.py")
suite = importlib.util.module_from_spec(spec)
spec.loader.exec_module(suite)
pytest_runtest_makereport = suite.pytest_runtest_makereport
lost = False
def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.fixture
def kernel():
    global lost
    lost = True
"""
    )
    (tmp_path / "test_it.py").write_text(
        "def test_ordinary(): assert False\n"
        "def test_goes_on(): pass\n"
        "def test_sticky(kernel): assert False\n"
        "def test_never(): assert False\n"
    )
    done = pytest_of("-q", "--tb=line", cwd=tmp_path)
    assert "2 failed, 1 passed" in done.stdout
    assert "the CUDA context is lost since test_it.py::test_sticky" in done.stdout


def test_what_the_tools_watch_runs(tmp_path: Path) -> None:
    """tests/gpu/calls.py, on the CPU: the same calls as under ncu and compute-sanitizer."""
    import fastfocal

    environment = {**os.environ, "PYTHONPATH": str(Path(fastfocal.__file__).parent.parent)}
    program = [sys.executable, str(ROOT / "tests" / "gpu" / "calls.py"), "--device", "cpu"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.stdout == "150 calls on cpu\n", done.stderr
