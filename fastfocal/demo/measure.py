"""Three measurements: do the gradients agree, how long does a loss take, and how much memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from .detector import Detector, box_loss
from .train import Batch, ClassLoss, plain_level_losses, plain_loss

# P3-P7 of an 800 x 1344 image, as RetinaNet on COCO has them.
LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
IMAGES, ANCHORS, CLASSES = 2, 9, 80


# One backward for each level, or one for all?


@dataclass
class GradientAnswer:
    dtype: torch.dtype
    per_level: float  # L backward calls, against one backward of the sum
    fast: float  # FastFocalLoss, against one backward of the sum


def gradient_question(
    model: Detector, batch: Batch, fast_loss: ClassLoss, num_classes: int, dtype: torch.dtype
) -> GradientAnswer:
    """Largest difference over every parameter's ``.grad``, relative to the largest gradient."""
    model = copy.deepcopy(model).to(dtype)
    images, box_targets = batch.images.to(dtype), batch.box_targets.to(dtype)

    def gradients(backward: Callable[[list[Tensor], list[Tensor]], None]) -> Tensor:
        model.zero_grad()
        class_logits, offsets = model(images)
        backward(class_logits, box_loss(offsets, box_targets, batch.labels, num_classes))
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def one_per_level(class_logits: list[Tensor], box_losses: list[Tensor]) -> None:
        losses = plain_level_losses(class_logits, batch.labels, num_classes)
        for class_part, box_part in zip(losses, box_losses, strict=True):
            (class_part + box_part).backward(retain_graph=True)  # accumulates in .grad

    def one_of_the_sum(class_logits: list[Tensor], box_losses: list[Tensor]) -> None:
        losses = plain_level_losses(class_logits, batch.labels, num_classes)
        (torch.stack(losses).sum() + torch.stack(box_losses).sum()).backward()

    def fast(class_logits: list[Tensor], box_losses: list[Tensor]) -> None:
        (fast_loss(class_logits, batch.labels) + torch.stack(box_losses).sum()).backward()

    expected = gradients(one_of_the_sum)
    scale = expected.abs().max()
    answers = [((gradients(way) - expected).abs().max() / scale).item() for way in (one_per_level, fast)]
    return GradientAnswer(dtype, *answers)


# Time and memory of loss + backward down to the logits


@dataclass
class Cost:
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None  # bytes at the peak beyond what was there before
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None


KINDS = ("plain", "fast", "inplace")


def cost(kind: str, device: torch.device, seed: int, levels: Sequence[tuple[int, int]] | None = None) -> Cost:
    """Runs in a fresh process, so that memory freed earlier cannot be taken again unseen."""
    arguments = (kind, str(device), seed, tuple(levels or LEVELS), torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_cost, *arguments).result()
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
            return Cost(failure="out of memory")
        except RuntimeError as error:  # what torch's allocator for the CPU raises
            if "can't allocate memory" not in str(error):
                raise
            return Cost(failure="out of memory")


def _cost(kind: str, device_name: str, seed: int, levels: Sequence[tuple[int, int]], threads: int) -> Cost:
    from fastfocal import FastFocalLoss

    torch.set_num_threads(threads)
    device = torch.device(device_name)
    losses: dict[str, ClassLoss] = {
        "plain": plain_loss(CLASSES),
        "fast": FastFocalLoss(CLASSES),
        "inplace": FastFocalLoss(CLASSES, grad_mode="inplace"),
    }
    class_loss = losses[kind]

    def inputs(levels: Sequence[tuple[int, int]]) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(IMAGES, ANCHORS * CLASSES, h, w) for h, w in levels]
        values = [torch.randn(shape, generator=generator, device=device).sub_(4.6) for shape in shapes]
        anchors = sum(h * w * ANCHORS for h, w in levels)
        labels = torch.full((IMAGES, anchors), CLASSES, device=device)  # background, but for one anchor in 500
        labels[:, ::500] = torch.randint(CLASSES, labels[:, ::500].shape, generator=generator, device=device)
        labels[:, 1::200] = -1
        return values, labels

    # The logits are the outputs of an operation, as in a model: that is what "inplace" needs, and each run has its own.
    trunk = torch.zeros((), device=device, requires_grad=True)

    def run(logits: list[Tensor], labels: Tensor) -> float:
        _synchronize(device)
        start = time.perf_counter()
        loss = class_loss(logits, labels)
        gradients = torch.autograd.grad(loss, logits)
        _synchronize(device)
        seconds = time.perf_counter() - start
        del gradients
        return seconds

    # A small run first: the code is loaded and the threads are started before anything is measured.
    values, labels = inputs([(8, 8)] * len(levels))
    run([v + trunk for v in values], labels)

    values, labels = inputs(levels)
    logits = [v + trunk for v in values]
    before = _start_of_peak(device)
    run(logits, labels)
    peak = _peak(device)
    result = Cost(memory=None if peak is None or before is None else max(0, peak - before))

    started = time.perf_counter()
    while len(result.seconds) < 3 or (time.perf_counter() - started < 2 and len(result.seconds) < 20):
        del logits
        logits = [v + trunk for v in values]
        result.seconds.append(run(logits, labels))
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_of_peak(device: torch.device) -> int | None:
    """Memory in use now, from where a new peak is counted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        # What was freed but kept in the heap would be taken again without a trace.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets the high-water mark to what is resident now
        except OSError:
            pass  # then the mark is that of the process so far, of which the inputs are the latest and largest part
        return _linux_status("VmRSS")
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # not ru_maxrss: a child process begins with its parent's
        return _linux_status("VmHWM")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _linux_status(key: str) -> int | None:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None
