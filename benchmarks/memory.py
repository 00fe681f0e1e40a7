"""Peak extra memory of a call: the most it holds at once beyond what was there before it.

On CUDA: torch.cuda.max_memory_allocated, which counts what tensors take, to the byte.

On the CPU: the resident set. Linux keeps its high-water mark (VmHWM) and resets it on request, so the mark after a call
minus the resident set before it is what the call added, whoever allocated it: torch, a kernel's own workspace, or the
compiler's generated code. torch.profiler's memory events see only what goes through torch's allocator. Memory freed
earlier is handed back to the system first (malloc_trim), else a call could take it unseen. A first call has loaded code
and started threads before. It repeats to about 0.1 MiB where blocks are large. Other systems have no
such mark: nothing is reported there.

    python -m benchmarks.memory

measures every row of the main case, each in a process of its own: nothing an earlier row did can hide in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import mmap
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # of mallopt in malloc.h
_MMAP_MAX_DEFAULT, _INT_MAX = 65536, 2**31 - 1


def fix_allocator(largest: int, keep: bool = False) -> None:
    """Settles for all rows alike whether their blocks are fresh memory; glibc would decide by what ran before.

    Args:
        largest: bytes of all levels. From 32 MiB up, blocks of more than 1 MiB are mapped when they are allocated and
            unmapped when they are released, as glibc does by itself with blocks of more than 32 MiB unless something has
            left a hole that they fit in. Below, everything comes from a heap that stays warm, as with glibc after a while.
        keep: that heap for blocks of all sizes, as with MALLOC_MMAP_MAX_=0 in the environment.
    """
    threshold, kept = (1, 16 * MIB) if largest >= 32 * MIB else (32, 256 * MIB)
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0 if keep else _MMAP_MAX_DEFAULT)
        libc.mallopt(_MMAP_THRESHOLD, threshold * MIB)
        libc.mallopt(_TRIM_THRESHOLD, _INT_MAX if keep else kept)
        libc.malloc_trim(0)
        _fill_holes(libc, threshold * MIB if threshold == 1 and not keep else None)
    except (AttributeError, OSError):
        pass  # no glibc


_fillings: list[int] = []
_MOST_FILLINGS = 4096  # of 1 MiB; another malloc, loaded before glibc's, has no such headers


def _fill_holes(libc: ctypes.CDLL, size: int | None) -> None:
    """Takes what the heap has free in blocks of `size`, the mapping threshold, until one is mapped; None: gives it back.

    The heap comes first: a hole that something large left there would serve a block again and again, and no page be fresh.
    Nothing is written to the fillings, so they are addresses and no memory.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    while _fillings:
        libc.free(_fillings.pop())
    while size is not None and len(_fillings) < _MOST_FILLINGS:
        block = libc.malloc(size)
        mapped = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2  # in a chunk's header
        if mapped:
            libc.free(block)
            return
        _fillings.append(block)


def touch_memory(size: int) -> None:
    """Writes to that much fresh memory once, and gives it back.

    A virtual machine may have no memory of its host's behind its pages yet: their first touch ever then takes fifty times as
    long as later ones do (3 ms a MiB seen), and it would be timed with whatever happens to run first.
    """
    block = mmap.mmap(-1, max(mmap.PAGESIZE, size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(block), mmap.PAGESIZE):
        block[at] = 1
    block.close()


def _resident() -> tuple[int, int]:
    """Bytes: now, and at the highest."""
    with open("/proc/self/status") as file:
        facts = dict(line.split(":", 1) for line in file)
    return tuple(int(facts[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """None where it cannot be measured. What the call leaves behind counts; what was there before does not."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark becomes the resident set
    except (AttributeError, OSError):
        return None
    before = _resident()[0]
    call()
    return max(0, _resident()[1] - before)


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once: what a device's memory holds of them, workspaces aside.

    `now` and `peak` are of the tensors made within the context, `given` and views of them not among them. Also of tensors
    without memory (FakeTensorMode), so that a case needs no machine that it fits into.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._given = [t.untyped_storage() for t in given]  # kept, so that no new storage gets their address
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._given}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def available_bytes(device: torch.device) -> int:
    """What can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 * 2**30


def _measure(name: str, device: torch.device) -> int | None:
    """One row of the main case, in this process."""
    from benchmarks.cases import MAIN, Case, draw
    from benchmarks.implementations import ROWS

    case = Case("main", MAIN)
    fix_allocator(case.logit_bytes)
    call = ROWS[name].make(case, [draw(case, device)])
    for _ in range(2):
        call.prepare(1)
        call()
        call.release()
    call.prepare(1)
    return peak_extra_bytes(call, device)


def main() -> None:
    from benchmarks.cases import MAIN, Case
    from benchmarks.implementations import rows_of

    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--row", help="one implementation, in this process; prints bytes")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.row:
        print(json.dumps(_measure(arguments.row, device)))
        return
    case = Case("main", MAIN)
    print(f"{case.name} on {device}: logits {case.pyramid.logits * 4 / MIB:.2f} MiB\n")
    print("| implementation | peak extra MiB |\n|---|--:|")
    for row in rows_of(case, every=True, cuda=device.type == "cuda"):
        if row.missing():
            continue
        command = [sys.executable, "-m", "benchmarks.memory", "--device", str(device), "--row", row.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured = json.loads(output.splitlines()[-1])
        print(f"| {row.name} | {'not measured' if measured is None else f'{measured / MIB:.2f}'} |", flush=True)


if __name__ == "__main__":
    main()
