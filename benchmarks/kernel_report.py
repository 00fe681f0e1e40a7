"""What the compiler made of the main CUDA kernels, without a GPU: registers, spills, occupancy, instructions.

    python -m benchmarks.kernel_report [--arch 80 90 100] [--all] [--mix]

Needs nvcc, and nvdisasm: that of the CUDA toolkit, or the one inside the triton package.

Instructions per element: the SASS instructions that a warp issues on the loop's cheapest way round, divided by the
elements that it stores. The way round is found in the control flow graph: of all cycles that pass a 16-byte store, the
one with the fewest instructions for each 16 bytes stored (an unrolled loop stores several times). That is the path of a
vector in which nothing is rare: aligned, inside its level, all background. Predicated instructions count, as they are
issued; positives, ignored anchors and edges are branches or loops off it, and do not. Kernels that read packed labels in
more than one way (K-contiguous logits: one label for the vector; NCHW: a vector of labels) have a line for each.
Instruction counts bound the time from below; they are no time.
"""

from __future__ import annotations

import argparse
import heapq
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Of a multiprocessor: registers, shared memory in KiB, warps, blocks.
LIMITS = {75: (65536, 64, 32, 16), 80: (65536, 164, 64, 32), 86: (65536, 100, 48, 16), 89: (65536, 100, 48, 24)}
LIMITS |= {90: (65536, 228, 64, 32), 100: (65536, 228, 64, 32), 120: (65536, 100, 48, 24)}
CALL_COST = 200  # a division of 64-bit integers, say: the cheapest way round does not pass one
ELEMENT_BYTES = {"float": 4, "double": 8}  # others: 2


# --- tools --------------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str:
    """On the PATH, in the CUDA toolkit, or inside triton."""
    import importlib.util

    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    folders.append(Path("/usr/local/cuda/bin"))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    if found is None:
        sys.exit(f"{name} was not found: install the CUDA toolkit" + (" or triton" if name == "nvdisasm" else ""))
    return found


def compile_cubin(nvcc: str, source: Path, arch: int, out: Path) -> str:
    """ptxas's report."""
    command = [nvcc, f"-arch=sm_{arch}", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v"]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return done.stdout + done.stderr


def demangle(name: str) -> str:
    """`fast_kernel<Half, FocalStar<float, kSixteenBits>, kLossAndGradient>`: enumerators by name, namespaces left out."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    sources = "\n".join(path.read_text() for path in sorted(CSRC.rglob("*.h")))
    for kind, names in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", sources):
        names = [n.split("=")[0].strip() for n in re.sub(r"//.*", "", names).split(",")]
        text = re.sub(rf"\((?:\w+::)*{kind}\)(\d+)", lambda m, names=names: names[int(m[1])], text)
    text = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", text)
    return re.sub(r"\(\w*\)$", "", text)


# --- ptxas's report -----------------------------------------------------------------------------------------------


@dataclass
class Resources:
    registers: int
    shared: int
    stack: int
    spills: int


def resources(report: str) -> dict[str, Resources]:
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, stores, loads, registers, rest in re.findall(pattern, report, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
    return found


def threads_per_block() -> int:
    match = re.search(r"constexpr int kThreads = (\d+)", (CSRC / "cuda" / "launch.h").read_text())
    return int(match[1]) if match else 256


def warps_resident(use: Resources, arch: int, threads: int) -> tuple[int, int]:
    """Warps of this kernel on a multiprocessor at once, and its limit. Registers go to warps in units of 256."""
    registers, shared, most_warps, most_blocks = LIMITS[arch]
    warps = -(-threads // 32)
    by_registers = registers // (-(-use.registers * 32 // 256) * 256) // 4 * 4 // warps  # four schedulers
    by_shared = shared * 1024 // (-(-(use.shared + 1024) // 128) * 128)  # each block takes 1 KiB more
    return min(by_registers, by_shared, most_warps // warps, most_blocks) * warps, most_warps


# --- the loop -----------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Instructions without a branch in or out."""

    instructions: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)  # names of the blocks that may follow

    @property
    def cost(self) -> int:
        return sum(CALL_COST if op.startswith("CALL") else 1 for op in self.instructions)

    @property
    def stores(self) -> int:
        return sum(op.startswith("STG") and ".128" in op for op in self.instructions)

    @property
    def narrow_loads(self) -> tuple[str, ...]:
        """Loads from global memory of fewer than 16 bytes: of packed labels."""
        return tuple(sorted(op for op in self.instructions if op.startswith("LDG") and ".128" not in op))


def functions(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of each kernel in nvdisasm's output."""
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":\n")
        yield name, body.split("\t.section")[0].splitlines()


def blocks_of(lines: Iterable[str]) -> dict[str, Block]:
    """The control flow graph."""
    blocks: dict[str, Block] = {}
    current = blocks["entry"] = Block()

    def begin(name: str, falls_through: bool) -> None:
        nonlocal current
        new = blocks.setdefault(name, Block())
        if falls_through:
            current.next.append(name)
        current = new

    falls_through = True
    for line in lines:
        label = re.match(r"(\.L_\w+):", line)
        if label:
            begin(label[1], falls_through)
            falls_through = True
        match = re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", line)
        if not match:
            continue
        address, guard, op, operands = match.groups()
        if not falls_through or (current.instructions and current.instructions[-1].startswith("BRA")):
            begin(address, falls_through)
            falls_through = True
        if op == "NOP":
            continue
        if op.startswith("CALL") and "`(.L_" in operands:  # sm_80 leaves some loops in this way: a jump, no function
            op = "BRA.CALL"
        current.instructions.append(op)
        if op.startswith("BRA"):
            target = re.search(r"`\((\.L_\w+)\)", operands)
            if target:
                current.next.append(target[1])
            # `BRA P1, target` has a second condition.
            falls_through = guard is not None or re.search(r"U?P\d", operands.split("`")[0]) is not None
        elif op.startswith(("EXIT", "RET", "BRX", "JMP")):
            falls_through = guard is not None
    return blocks


def loops_without_stores(blocks: dict[str, Block]) -> set[str]:
    """Blocks of natural loops inside which nothing wide is stored: the repairs and edges, logit by logit."""
    before: dict[str, list[str]] = {name: [] for name in blocks}
    for name, block in blocks.items():
        for follower in block.next:
            before[follower].append(name)
    dominators = {name: set(blocks) for name in blocks}
    dominators["entry"] = {"entry"}
    changed = True
    while changed:
        changed = False
        for name in blocks:
            if before[name]:
                new = {name} | set.intersection(*(dominators[b] for b in before[name]))
                changed |= new != dominators[name]
                dominators[name] = new
    found: set[str] = set()
    for name, block in blocks.items():
        for head in set(block.next) & dominators[name]:  # name -> head goes back
            loop, stack = {head}, [name]
            while stack:
                b = stack.pop()
                if b not in loop:
                    loop.add(b)
                    stack += before[b]
            if not any(blocks[b].stores for b in loop):
                found |= loop
    return found


def cheapest_cycle(blocks: dict[str, Block]) -> tuple[int, int, tuple[str, ...]] | None:
    """Instructions, 16-byte stores and blocks of the cycle with the fewest instructions a store."""
    storing = [name for name, block in blocks.items() if block.stores]
    best: tuple[float, int, int, tuple[str, ...]] | None = None
    for start in storing:
        # Dijkstra over (block, storing blocks passed).
        queue: list[tuple[int, str, frozenset[str], tuple[str, ...]]] = [(0, start, frozenset(), ())]
        done: set[tuple[str, frozenset[str]]] = set()
        while queue:
            cost, name, passed, path = heapq.heappop(queue)
            if name == start and path:
                stores = sum(blocks[b].stores for b in passed)
                if best is None or cost / stores < best[0]:
                    best = (cost / stores, cost, stores, path)
                continue
            if (name, passed) in done:
                continue
            done.add((name, passed))
            block = blocks[name]
            passed = passed | {name} if block.stores else passed
            for follower in block.next:
                if follower in blocks and (follower == start or follower not in passed):
                    heapq.heappush(queue, (cost + block.cost, follower, passed, (*path, name)))
    return None if best is None else best[1:]


def ways_round(blocks: dict[str, Block]) -> list[tuple[int, int, tuple[str, ...], str]]:
    """The cheapest cycle for each way of reading packed labels, and how they are read."""
    found = {}
    aside = loops_without_stores(blocks)
    blocks = {name: block for name, block in blocks.items() if name not in aside}
    kinds = {block.narrow_loads for block in blocks.values()}
    for kind in sorted(kinds):
        kept = {name: block for name, block in blocks.items() if block.narrow_loads in ((), kind)}
        cycle = cheapest_cycle(kept)
        if cycle is not None:
            loads = Counter(op for name in cycle[2] for op in blocks[name].instructions if op.startswith("LDG"))
            found[cycle[2]] = (*cycle, " ".join(f"{n}x{op[4:]}" for op, n in sorted(loads.items())))
    return list(found.values())


# --- the table ----------------------------------------------------------------------------------------------------


def report(sources: list[Path], archs: list[int], every: bool, mix: bool) -> Iterator[str]:
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    yield "| arch | kernel | registers | spills, B | shared, B | warps | loads a turn | instructions / element | MUFU |"
    yield "|--:|---|--:|--:|--:|--:|---|--:|--:|"
    for arch in archs:
        for source in sources:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernels.cubin"
                used = resources(compile_cubin(nvcc, source, arch, cubin))
                command = [nvdisasm, "-c", str(cubin)]
                listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for mangled, lines in sorted(functions(listing)):
                name = demangle(mangled)
                if mangled not in used or not (every or "kLossAndGradient" in name):
                    continue
                use = used[mangled]
                warps, most = warps_resident(use, arch, threads_per_block())
                start = f"| sm_{arch} | `{name}` | {use.registers} | {use.spills} | {use.shared} | {warps} of {most} |"
                blocks = blocks_of(lines)
                ways = ways_round(blocks)
                if not ways:
                    yield f"{start} | | |"
                kind = re.search(r"<(\w+)", name)
                elements = 16 // ELEMENT_BYTES.get(kind[1] if kind else "", 2)
                for cost, stores, path, loads in sorted(ways):
                    special = sum(op.startswith("MUFU") for b in path for op in blocks[b].instructions)
                    each = stores * elements
                    yield f"{start} {loads} | {cost / each:.1f} | {special / each:.2g} |"
                    if mix:
                        count = Counter(op.split(".")[0] for b in path for op in blocks[b].instructions)
                        yield "<!-- " + ", ".join(f"{op} {n / each:.2f}" for op, n in count.most_common()) + " -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(LIMITS))
    parser.add_argument("--sources", default="loss_fast_*.cu", help="which files of csrc/cuda")
    parser.add_argument("--all", action="store_true", help="also the kernels that make only the gradient or the loss")
    parser.add_argument("--mix", action="store_true", help="also each opcode's share of the instructions per element")
    arguments = parser.parse_args()
    sources = sorted((CSRC / "cuda").glob(arguments.sources))
    for line in report(sources, arguments.arch, arguments.all, arguments.mix):
        print(line, flush=True)


if __name__ == "__main__":
    main()
