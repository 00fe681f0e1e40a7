"""Plants small mistakes in the sources, one at a time, and runs the tests that should notice.

    python tests/mutate.py --mutants 100 --seed 1          # in a scratch copy under build/; stopped, it goes on where it was
    python tests/mutate.py --mutants 100 --seed 1 --table  # what is known by now
    python tests/mutate.py --kind fastfocal --only losses/ # in Python files of losses alone, beside the extension as it is here

A mistake is an operator, a bound, a sign, a comparison, a constant or a check that is changed or gone. C++ is compiled anew
with -O1 and without CUDA; a mistake that does not compile is no mistake, and another one takes its place. Kernels run on each
instruction set that this processor has. Which mistakes are planted depends on the seed and the sources alone. tests/README.md
has the last result, and what it says of the mistakes that were not found.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutants"
TREE = WORK / "tree"
TIMEOUT = 900  # seconds; an endless loop is noticed by it

KERNEL_TESTS = ["edges", "kernels", "options", "formula", "grad_modes", "star", "labels", "detached_factor", "determinism",
                "operator_checks", "errors", "properties", "scores", "losses", "softmax_focal", "fuzz"]  # fmt: skip
PYTHON_TESTS = ["errors", "module", "edges", "options", "grad_modes", "autograd", "torchvision_function", "star", "labels",
                "detached_factor", "properties", "fuzz", "bad_input", "losses", "softmax_focal", "shared_options", "scores",
                "registry", "compile"]  # fmt: skip
# Asked first, for files of these folders.
FOLDER_TESTS = {"losses": ["losses", "softmax_focal", "star", "shared_options", "module"],
                "heads": ["heads", "head_tiles", "head_autograd", "head_errors"]}  # fmt: skip
# Files compiled once for each instruction set.
BY_INSTRUCTION_SET = ("vec.h", "avx512.h", "avx2.h", "portable.h", "vec_math.h", "tiles.h", "tile_fast.h", "tile_dense.h",
                      "tile_generic.h", "tile_second.h", "tile_softmax.h", "pack_chunk.h", "packed_labels.h", "elementary.h",
                      "half.h", *(path.name for path in (ROOT / "csrc" / "losses").glob("*.h")))  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    start: int  # in the file
    before: str
    after: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.start}:{self.before}->{self.after}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.before!r} -> {self.after!r}"


# --- C++ --------------------------------------------------------------------------------------------------------------

# clang-format sets binary operators apart by spaces, and template brackets not.
SWAPS = [(" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" == ", " != "), (" != ", " == "),
         (" && ", " || "), (" || ", " && "), (" + ", " - "), (" - ", " + "), (" * ", " / "), (" / ", " * "),
         (" % ", " / "), (" += ", " -= "), (" |= ", " &= "), ("at_least(", "at_most("), ("at_most(", "at_least("),
         ("std::min", "std::max"), ("? ", "? !"), ("if (", "if (!"), ("return -", "return "), ("= -", "= "), ("(!", "("),
         ("STD_TORCH_CHECK(", "STD_TORCH_CHECK(true || "), ("true", "false"), ("false", "true"),
         ("= double(", "= float("), ("? double(", "? float("), ("canonical(", "("), ("INT16_MAX", "(INT16_MAX - 1)"),
         ("zero_where(", "second_of("), ("multiply_except(", "product_of("), ("weigh(", "simple_product("),
         ("select(", "swapped_select(")]  # fmt: skip
CALLS = {  # in the place of a function
    "swapped_select(": "([](auto m, auto a, auto b) { return select(m, b, a); })(",
    "simple_product(": "([](auto a, auto b) { return a * b; })(",
    "product_of(": "([](auto, auto a, auto b) { return a * b; })(",
    "second_of(": "([](auto, auto a) { return a; })(",
}
# What no test can notice: advice to the processor and to the system, sizes that only speed depends on, and the kernels'
# arithmetic for 16 bits on a GPU, which tests/cuda_on_host runs.
NOT_PLANTED = re.compile(
    r"__builtin_prefetch|kPrefetch|kAhead|madvise|MADV_|kPage|kTilesPerThread|kWorthwhile|kLabelsPerThread|shares|alignas"
    r"|static_assert|^\s*#|constexpr int k(Together|PerLine|ChunkAnchors|TileLogits|TileAlignment|MaxLevels|Most)|kSixteenBits"
    r"|exp_approximate|__builtin_cpu|getenv|strcmp|Fit|noexcept|template <"
)


def blanked(text: str) -> str:
    """C++ with comments, strings and what only nvcc sees replaced by spaces."""

    def spaces(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    text = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', spaces, text, flags=re.S)
    lines, kept = [], [True]
    for line in text.splitlines(keepends=True):
        word = line.strip()
        if word.startswith(("#ifdef", "#ifndef", "#if ")):
            device = re.search(r"__CUDA_ARCH__|__CUDACC__", word) is not None
            kept.append(not device or word.startswith("#ifndef"))
        elif word.startswith(("#else", "#elif")):
            kept[-1] = True
        elif word.startswith("#endif"):
            kept.pop()
        hidden = not all(kept) or NOT_PLANTED.search(line)
        lines.append(re.sub(r"[^\n]", " ", line) if hidden else line)
    return "".join(lines)


def cpp_mutants(file: str, text: str) -> Iterator[Mutant]:
    code = blanked(text)

    def at(start: int, before: str, after: str) -> Mutant:
        return Mutant(file, text.count("\n", 0, start) + 1, start, before, after)

    for before, after in SWAPS:
        for match in re.finditer(re.escape(before), code):
            yield at(match.start(), before, after)
    for match in re.finditer(r"(?<![\w.])\d+(?![\w.])", code):
        yield at(match.start(), match.group(), str(int(match.group()) + 1))
    for match in re.finditer(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?f?(?![\w.])", code):
        value, single = match.group().removesuffix("f"), match.group().endswith("f")
        changed = "1.0" if float(value) == 0 else repr(float(value) * 1.01)
        yield at(match.start(), match.group(), changed + ("f" if single else ""))
    for match in re.finditer(r"^ +\w[^\n{}]*;$", code, flags=re.M):  # a whole statement
        if re.match(
            r" +(return|using|const|int|auto|constexpr|case|static|struct|V|S|Vec|double|float|uint|break|continue)\b",
            match.group(),
        ):
            continue
        yield at(match.start(), match.group(), re.sub(r"\S.*", ";", match.group()))


# --- Python -----------------------------------------------------------------------------------------------------------

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in",
               ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is"}  # fmt: skip
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*"}


def python_mutants(file: str, text: str) -> Iterator[Mutant]:
    lines = text.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    data = text.encode()

    def where(node: ast.AST, end: bool = False) -> int:
        if end:
            return offsets[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return offsets[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def replaced(node: ast.AST, after: str) -> Mutant:
        start, end = where(node), where(node, True)
        before = data[start:end].decode()
        return Mutant(file, node.lineno, len(data[:start].decode()), before, after)  # type: ignore[attr-defined]

    def source(node: ast.AST) -> str:
        return data[where(node) : where(node, True)].decode()

    def walk(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, (ast.JoinedStr, ast.arg)):
            return  # words of an error, annotations
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = source(node.left), source(node.comparators[0])
            yield replaced(node, f"{left} {COMPARISONS[type(node.ops[0])]} {right}")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not isinstance(node.right, ast.Constant):
            yield replaced(node, f"{source(node.left)} {ARITHMETIC[type(node.op)]} {source(node.right)}")
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield replaced(node, "(" + word.join(source(value) for value in node.values) + ")")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield replaced(node, f"bool({source(node.operand)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield replaced(node, str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            yield replaced(node, repr(node.value + 1))
        if isinstance(node, (ast.If, ast.IfExp)):
            yield replaced(node.test, f"({source(node.test)}) and False")
            yield replaced(node.test, f"({source(node.test)}) or True")
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("any", "all", "min", "max")
        ):
            yield replaced(node.func, {"any": "all", "all": "any", "min": "max", "max": "min"}[node.func.id])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield replaced(node, "None")  # a check that is not called
        for name, child in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.AST):
                    yield from walk(each)

    yield from walk(ast.parse(text))


# --- running ----------------------------------------------------------------------------------------------------------


def python_files() -> list[Path]:
    return sorted(path for folder in ("", "losses", "heads") for path in (ROOT / "fastfocal" / folder).glob("*.py"))


def all_mutants() -> dict[str, list[Mutant]]:
    """By kind: what is in csrc/, and what is in fastfocal/."""
    found: dict[str, list[Mutant]] = {"csrc": [], "fastfocal": []}
    for path in sorted(path for path in (ROOT / "csrc").rglob("*.*") if "cuda" not in path.parts):
        found["csrc"] += cpp_mutants(str(path.relative_to(ROOT)), path.read_text())
    for path in python_files():
        if path.name not in ("__main__.py", "__init__.py", "reference.py"):
            found["fastfocal"] += python_mutants(str(path.relative_to(ROOT)), path.read_text())
    return found


def sample(seed: int, kind: str) -> Iterator[Mutant]:
    """Two of csrc/ for each of fastfocal/, each file as likely as its sites are many; or of one of them alone."""
    found = all_mutants()
    for mutants in found.values():
        random.Random(seed).shuffle(mutants)
    cpp, python = iter(found["csrc"]), iter(found["fastfocal"])
    while True:
        for source in {"csrc": (cpp,), "fastfocal": (python,)}.get(kind, (cpp, cpp, python)):
            mutant = next(source, None)
            if mutant is None:
                return
            yield mutant


def command(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=TREE, env=variables, text=True, timeout=TIMEOUT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


def build() -> bool:
    flags = "-O1 -fno-strict-aliasing -w"
    return (
        command(["setup.py", "-q", "build_ext", "--inplace"], FASTFOCAL_CUDA="0", FASTFOCAL_CXXFLAGS=flags).returncode
        == 0
    )


def run_tests(
    names: list[str], deselected: list[str], capability: str, *options: str
) -> subprocess.CompletedProcess[str]:
    files = [f"tests/test_{name}.py" for name in names if (TREE / "tests" / f"test_{name}.py").exists()]
    skipped = [f"--deselect={test}" for test in deselected]
    return command(
        ["-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-k", "not cuda", *options, *skipped, *files],
        FASTFOCAL_CPU_CAPABILITY=capability,
        HYPOTHESIS_STORAGE_DIRECTORY=str(WORK / "hypothesis"),
    )


def capabilities() -> list[str]:
    sets = {"AVX512": ["AVX512", "AVX2", "default"], "AVX2": ["AVX2", "default"], "default": ["default"]}
    code = "import fastfocal; print(fastfocal.build_info()['cpu_capability'])"
    return sets[command(["-c", code]).stdout.split()[-1]]


def prepare(kind: str) -> list[str]:
    """A fresh copy of the sources, built; the instruction sets of this processor.

    Mistakes in Python alone need no compiler: there the copy gets the extension that the checkout has, if it has one.
    """
    for name in ("csrc", "fastfocal", "tests"):
        shutil.rmtree(TREE / name, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split():
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)
    built = ROOT / "fastfocal" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if kind == "fastfocal" and built.exists():
        shutil.copy2(built, TREE / "fastfocal" / built.name)
    elif not build():
        sys.exit("the sources do not build without a mistake")
    (extension,) = (TREE / "fastfocal").glob("_C.*.so")
    shutil.copy2(extension, WORK / extension.name)
    return capabilities()


def failing(file: str, isa: str, log: Path) -> list[str]:
    """The tests of a file that fail without a mistake, and say nothing of one; asked once. The tree is as it was."""
    known = json.loads(log.read_text()) if log.exists() else {}
    key = f"{file} {isa}"
    if key not in known:
        known[key] = failures(run_tests([file], [], isa))
        log.write_text(json.dumps(known, indent=1))
    return list(known[key])


def failures(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.+?)?)(?: - .*)?$", done.stdout, flags=re.M)


def tests_of(path: Path) -> list[str]:
    if path.suffix != ".py":
        return KERNEL_TESTS
    return list(dict.fromkeys([*FOLDER_TESTS.get(path.parent.name, []), *PYTHON_TESTS]))


def try_mutant(mutant: Mutant, isas: list[str], baseline: Path) -> dict[str, object]:
    path = TREE / mutant.file
    text = path.read_text()
    assert text[mutant.start : mutant.start + len(mutant.before)] == mutant.before
    after = CALLS.get(mutant.after, mutant.after)
    planted = text[: mutant.start] + after + text[mutant.start + len(mutant.before) :]
    result: dict[str, object] = {**asdict(mutant), "key": mutant.key, "by": None}
    (clean,) = WORK.glob("_C.*.so")
    extension = TREE / "fastfocal" / clean.name
    wrong = WORK / "with_the_mistake.so"
    try:
        path.write_text(planted)
        if path.suffix != ".py" and not build():
            return {**result, "status": "does not compile"}
        shutil.copy2(extension, wrong)
        names = tests_of(path)
        for isa in isas if path.name in BY_INSTRUCTION_SET else isas[:1]:
            left_out: list[str] = []
            while True:
                done = run_tests(names, left_out, isa, "-x")
                if done.returncode == 0:
                    break
                [*_, test] = failures(done) or ["none"]
                file = re.sub(r"tests/test_(\w+)\.py.*", r"\1", test)
                if test == "none" or f"tests/test_{file}.py" in " ".join(left_out):
                    return {**result, "status": "found", "by": test if test != "none" else done.stdout.strip()[-200:]}
                path.write_text(text)
                shutil.copy2(clean, extension)
                known = failing(file, isa, baseline)
                path.write_text(planted)
                shutil.copy2(wrong, extension)
                if test not in known:
                    return {**result, "status": "found", "by": test}
                left_out += known
        return {**result, "status": "not found"}
    except subprocess.TimeoutExpired:
        return {**result, "status": "found", "by": "timeout"}
    finally:
        path.write_text(text)
        shutil.copy2(clean, extension)


def table(results: list[dict[str, object]]) -> None:
    tried = [r for r in results if r["status"] != "does not compile"]
    for r in tried:
        print(f"{r['status']:10} {r['file']}:{r['line']}  {r['before']!r} -> {r['after']!r}  {r['by'] or ''}")
    found = sum(r["status"] == "found" for r in tried)
    print(f"{found} of {len(tried)} found; {len(results) - len(tried)} more did not compile")


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=["csrc", "fastfocal"], default="", help="of one folder alone")
    parser.add_argument("--table", action="store_true", help="print what is known and stop")
    parser.add_argument(
        "--only", default="", help="regular expression that a mistake's file, line and change must match"
    )
    arguments = parser.parse_args()

    sources = sorted([*(ROOT / "csrc").rglob("*.*"), *python_files(), *(ROOT / "tests").glob("*.py")])
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources if path.suffix != ".so")).hexdigest()[:12]
    log = WORK / f"results-{state}-{arguments.seed}{arguments.kind}.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not arguments.table:
        isas, baseline = prepare(arguments.kind), WORK / f"baseline-{state}.json"
        known = {r["key"] for r in results}
        done = sum(r["status"] != "does not compile" for r in results)
        with tqdm(total=arguments.mutants, initial=done, unit=" mutants", mininterval=1) as bar:
            for mutant in sample(arguments.seed, arguments.kind):
                if bar.n >= arguments.mutants:
                    break
                if mutant.key in known or not re.search(arguments.only, str(mutant)):
                    continue
                result = try_mutant(mutant, isas, baseline)
                results.append(result)
                with log.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                if result["status"] != "does not compile":
                    bar.update()
                    bar.write(f"{result['status']:10} {mutant}  {result['by'] or ''}")
    table(results)


if __name__ == "__main__":
    main()
