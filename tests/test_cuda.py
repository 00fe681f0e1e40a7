"""What only a GPU shows: nothing waits for it, a step can be captured and replayed, any stream, any device, 2^31 logits.

Every body but that of two devices runs on the CPU too, without what is CUDA's own in it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    NATIVE,
    Size,
    arrange,
    assert_close,
    compare,
    draw_classes,
    draw_levels,
    encode,
    expect,
    loss_function,
    move,
    same_bits,
    tolerance,
    total,
)
from torch import Tensor

from fastfocal import FastFocalLoss, focal_loss

SIZE = Size(2, 3, 5, ((9, 13), (4, 7), (1, 1), (0, 3)))  # odd, shorter than a vector, one cell, empty
ANCHORS = sum(SIZE.level_anchors())
ALPHA = [0.1, 0.2, 0.3, 0.4, 0.5]
Result = tuple[Any, list[Tensor]]

# Beside arguments of focal_loss: dtype, layout and form of the labels; `soft`, the dtype of soft targets; `tensors`, of which
# each replay has others; `module`, called through FastFocalLoss.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "channels_last": {"layout": "channels_last"},
    "flattened": {"layout": "3d"},
    "copied_to_be_read": {"layout": "width_slice"},
    "labels_by_level": {"form": "nhwa"},
    "labels_strided": {"form": "one_transposed"},
    "save": {"grad_mode": "save"},
    "recompute": {"grad_mode": "recompute"},
    "inplace": {"grad_mode": "inplace"},
    "gamma": {"gamma": 1.5},
    "gamma_0": {"gamma": 0.0},
    "no_alpha": {"alpha": None},
    "alpha_by_class": {"alpha": ALPHA},
    "alpha_tensor": {"tensors": ("alpha",)},
    "background_0": {"background_index": 0},
    "other_indices": {"background_index": -1, "ignore_index": -2},
    "weight": {"tensors": ("weight",)},
    "level_weights": {"level_weights": [1.0, 0.5, 2.0, 1.0]},
    "label_smoothing": {"label_smoothing": 0.1},
    "detached_factor": {"detach_modulating_factor": True},
    "loss_weight": {"loss_weight": 2.0},
    "positives_per_image": {"normalizer": "positives_per_image"},
    "no_normalizer": {"normalizer": None},
    "number": {"normalizer": 7.0},
    "number_in_a_cpu_tensor": {"normalizer": torch.tensor(7.0)},
    "normalizer_on_the_device": {"tensors": ("normalizer",)},
    "normalizer_by_image": {"tensors": ("normalizer_by_image",)},
    "by_level": {"reduction": "level"},
    "by_image": {"reduction": "image"},
    "mean": {"reduction": "mean"},
    "unreduced": {"reduction": "none"},
    "unreduced_saved": {"reduction": "none", "grad_mode": "save"},
    "soft": {"soft": torch.float32, "normalizer": 7.0},
    "soft_16_bit": {"soft": torch.bfloat16, "dtype": torch.bfloat16, "normalizer": None},
    "star": {"gamma": 2.0, "beta": 1.0},
    "star_weighted": {"gamma": 2.0, "beta": 1.0, "tensors": ("weight",)},
    "module": {"module": True, "alpha": ALPHA, "gamma": 1.5},
}


@dataclass
class Problem:
    """Inputs of a step on one device; `load` puts others in the same memory."""

    leaves: list[Tensor]
    targets: Tensor | list[Tensor]
    options: dict[str, Any]
    scale: Tensor  # the incoming gradient
    criterion: FastFocalLoss | None

    def tensors(self) -> list[Tensor]:
        targets = [self.targets] if isinstance(self.targets, Tensor) else self.targets
        chosen = [x for x in self.options.values() if isinstance(x, Tensor) and x.device == self.scale.device]
        return [*self.leaves, *targets, *chosen, self.scale]

    def load(self, other: Problem) -> None:
        with torch.no_grad():
            for mine, its in zip(self.tensors(), other.tensors(), strict=True):
                mine.copy_(its)

    def step(self) -> Result:
        """Loss, and gradients of the scaled sum of its parts."""
        in_place = self.options.get("grad_mode") == "inplace"
        given = [x * 1 for x in self.leaves] if in_place else self.leaves
        if self.criterion is not None:
            loss = self.criterion(given, self.targets)
        else:
            loss = loss_function(self.options)(given, self.targets, num_classes=SIZE.classes, **self.options)
        return loss, list(torch.autograd.grad(total(loss) * self.scale, self.leaves))

    def check(self, result: Result) -> None:
        """Against the oracle at the promised accuracy; what was saved in 16 bits is rounded once more when it is scaled."""
        loss, grads = result
        scale = float(self.scale)
        expected = expect(self.leaves, self.targets, num_classes=SIZE.classes, **self.options)
        relative = tolerance(self.leaves[0].dtype, float(self.options.get("gamma", 2.0)))
        compare(loss, grads, expected, relative, scale=scale, roundings=1 + scale, flushed=scale)


def problem(name: str, device: torch.device, seed: int) -> Problem:
    chosen = dict(OPTIONS[name])
    dtype, layout = chosen.pop("dtype", torch.float32), chosen.pop("layout", "contiguous")
    form = chosen.pop("form", "one")
    soft, tensors, module = chosen.pop("soft", None), chosen.pop("tensors", ()), chosen.pop("module", False)
    generator = torch.Generator().manual_seed(seed)
    levels = move(draw_levels(SIZE, generator, dtype=dtype, layout=layout), device)
    labels = encode(
        draw_classes(SIZE, generator), SIZE.classes, chosen.get("background_index"), chosen.get("ignore_index", -1)
    )
    targets: Any = arrange(labels, SIZE, form)
    if soft is not None:
        targets = [torch.rand(x.shape, generator=generator).to(soft) for x in levels]
    drawn = {
        "alpha": torch.rand(SIZE.classes, generator=generator, dtype=torch.float64),
        "weight": torch.rand(SIZE.images, ANCHORS, generator=generator),
        "normalizer": 1 + 9 * torch.rand((), generator=generator),
        "normalizer_by_image": 1 + 9 * torch.rand(SIZE.images, generator=generator),
    }
    for which in tensors:
        chosen["normalizer" if which == "normalizer_by_image" else which] = drawn[which].to(device)
    criterion = FastFocalLoss(SIZE.classes, **chosen).to(device) if module else None
    scale = torch.tensor(1.0 if seed % 2 == 0 else 3.0, device=device)
    leaves = [x.requires_grad_() for x in levels]
    return Problem(leaves, move(targets, device), chosen, scale, criterion)


@pytest.fixture(params=NATIVE)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    device = torch.device(request.param)
    yield device
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- no synchronisation, and graphs -----------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_waiting_is_noticed() -> None:
    """Or the next test shows nothing."""
    x = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_is_an_error(x.device):
        x.sum().item()


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_waits_for_the_device(device: torch.device, name: str) -> None:
    given = problem(name, device, 1)
    given.step()  # what is kept from the first call on, such as an alpha for each class, may be copied there
    with waiting_is_an_error(device):
        result = given.step()
    given.check(result)


def captured(step: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """The step as a CUDA graph, which leaves its results in the same memory each time."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads kernels and asks for their attributes, which a capture may not
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            result = step()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own
        raise

    def replay() -> Result:
        graph.replay()
        return result

    return replay


@pytest.mark.parametrize("name", OPTIONS)
def test_a_captured_step_sees_changed_inputs(device: torch.device, name: str) -> None:
    """Forward and backward in one graph: logits, targets, what else lies on the device, and the incoming gradient."""
    given = problem(name, device, 0)
    replay = captured(given.step, device)
    for seed in (0, 1, 2):
        given.load(problem(name, device, seed))
        given.check(replay())


def test_a_captured_backward_into_grad(device: torch.device) -> None:
    """As a training loop is captured: `.grad` is made in the capture, and filled anew by each replay."""
    given = problem("plain", device, 0)

    def step() -> Result:
        for x in given.leaves:
            x.grad = None
        loss = focal_loss(given.leaves, given.targets, num_classes=SIZE.classes)
        (loss * given.scale).backward()
        return loss, [x.grad for x in given.leaves]  # type: ignore[misc]

    replay = captured(step, device)
    for seed in (1, 2):
        given.load(problem("plain", device, seed))
        given.check(replay())


@pytest.mark.parametrize("grad_mode", ["save", "recompute"])
def test_reduce_overhead(device: torch.device, grad_mode: str) -> None:
    """torch.compile with its CUDA graphs: recorded in the second call, replayed from the third on."""
    from torch._inductor import cudagraph_trees

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion = FastFocalLoss(SIZE.classes, grad_mode=grad_mode)
    compiled = torch.compile(lambda xs, y: criterion(xs, y) * 3, mode="reduce-overhead", fullgraph=True)
    given = problem("plain", device, 1)  # an incoming gradient of 3
    for seed in (1, 3, 5, 7):
        given.load(problem("plain", device, seed))
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(given.leaves, given.targets)
        grads = [g.clone() for g in torch.autograd.grad(loss, given.leaves)]
        given.check((loss.detach() / 3, grads))
    if device.type == "cuda":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["save", "recompute", "inplace", "soft", "weight", "unreduced", "by_image"])
def test_a_side_stream(device: torch.device, name: str) -> None:
    """Inputs that come late on the current stream: a kernel on another one would read what was there before."""
    given, fresh = problem(name, device, 0), problem(name, device, 1)
    given.step()
    if device.type != "cuda":
        given.load(fresh)
        given.check(given.step())
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        given.step()  # so that memory is there, which the driver may give only when the device is idle
        torch.cuda._sleep(100_000_000)  # 50 ms and more
        given.load(fresh)
        result = given.step()
    assert not side.query(), "the host has waited"
    side.synchronize()
    given.check(result)


@pytest.mark.parametrize("name", ["plain", "weight"])
def test_two_streams_share_nothing(device: torch.device, name: str) -> None:
    """Calls side by side: each has a workspace of its own, and the bits of the call alone."""
    problems = [problem(name, device, seed) for seed in (0, 1)]
    alone = [given.step() for given in problems]
    if device.type != "cuda":
        together = [given.step() for given in problems * 2]
    else:
        streams = [torch.cuda.Stream() for _ in problems]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        together = []
        for turn in range(40):
            with torch.cuda.stream(streams[turn % 2]):
                together.append(problems[turn % 2].step())
        torch.cuda.synchronize()
    for turn, (loss, grads) in enumerate(together):
        expected_loss, expected_grads = alone[turn % 2]
        assert same_bits(loss, expected_loss)
        assert all(same_bits(g, e) for g, e in zip(grads, expected_grads, strict=True))


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("name", ["save", "recompute", "inplace", "unreduced"])
def test_two_devices(name: str) -> None:
    """The tensors' device computes, whichever is current; and that one stays current, for torch and beneath it."""

    def both() -> None:
        for current in (0, 1, 0):
            with torch.cuda.device(current):
                for index in (1, 0, 1, 1, 0):
                    given = problem(name, torch.device("cuda", index), 1)
                    result = given.step()
                    assert torch.cuda.current_device() == current
                    assert torch.ones(3, device="cuda").sum().item() == 3  # a launch of torch's own
                    given.check(result)
                    assert {g.device.index for g in result[1]} == {index}

    both()
    failures: list[BaseException] = []

    def in_a_thread() -> None:  # where no device has been made current yet
        try:
            both()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_tensors_on_two_devices_are_refused() -> None:
    levels = [torch.zeros(1, 5, 2, 2, device=f"cuda:{i}") for i in range(2)]
    with pytest.raises(ValueError, match=r"logits\[1\]: expected the device of level 0, cuda:0, got cuda:1"):
        focal_loss(levels, torch.zeros(1, 8, dtype=torch.int64, device="cuda:0"), num_classes=5)


# --- more than 2^31 logits --------------------------------------------------------------------------------------------

CLASSES = 3
# 3 times 715827883 logits are 2^31 + 1 of them. They and their gradients take 4 GiB each, labels, packed and not, 2.
MANY = 715_827_883
MANY_BYTES = 14 * 2**30


@pytest.mark.parametrize("layout", ["nchw", "flattened"])
@pytest.mark.parametrize(
    "options", [{}, {"gamma": 1.5}, {"alpha": [0.25] * 3}], ids=["gamma_2", "any_gamma", "alpha_by_class"]
)
def test_more_than_2_to_the_31_logits(device: torch.device, layout: str, options: dict[str, Any]) -> None:
    """All alike, and special anchors on both sides of 2^31, at both ends and in the middle."""
    anchors = 4099
    if device.type == "cuda":
        anchors = MANY
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < MANY_BYTES:
            pytest.skip(f"needs {MANY_BYTES >> 30} GiB of free memory")
    shape = (1, CLASSES, anchors, 1) if layout == "nchw" else (1, anchors, CLASSES)
    x = torch.full(shape, -2.0, dtype=torch.bfloat16, device=device)
    labels = torch.full((1, anchors), CLASSES, dtype=torch.uint8, device=device)
    by_anchor = x.view(CLASSES, anchors).t() if layout == "nchw" else x.view(anchors, CLASSES)
    # The last logit lies at 2^31, and one of the anchors half way: in NCHW each class has a plane of its own.
    special = torch.tensor([0, 1, anchors // 3, anchors // 2, 2 * anchors // 3, anchors - 2, anchors - 1])
    drawn = torch.linspace(-6, 5, CLASSES * len(special)).reshape(-1, CLASSES).to(torch.bfloat16)
    kinds = torch.tensor([0, 1, 255, 2, CLASSES, 1, 2], dtype=torch.uint8)
    at = special.to(device)
    by_anchor[at] = drawn.to(device)
    labels[0, at] = kinds.to(device)

    x.requires_grad_()
    loss = focal_loss(x, labels, num_classes=CLASSES, ignore_index=255, normalizer=1.0, **options)
    (loss * 2).backward()  # exact in every format

    relative = tolerance(torch.bfloat16, float(options.get("gamma", 2.0)))
    settings = {"ignore_index": 255, "normalizer": 1.0, **options}
    expected = expect([drawn], [kinds], **settings)
    ordinary = expect([torch.full((1, CLASSES), -2.0)], [torch.tensor([CLASSES])], **settings)
    # Sums are of float32 sums of sixteen losses at the most: an error of their own far below `relative`.
    assert_close(loss.detach(), expected.loss + (anchors - len(special)) * ordinary.loss, relative, what="loss")
    assert x.grad is not None
    gradient = x.grad.view(CLASSES, anchors).t() if layout == "nchw" else x.grad.view(anchors, CLASSES)
    assert_close(gradient[at], 2 * expected.grads[0], relative, what="gradient at the special anchors")
    one = gradient[2]
    assert_close(one, 2 * ordinary.grads[0][0], relative, what="gradient of a background anchor")
    assert len(one.unique()) == 1
    alike = sum(int((piece == one[0]).sum()) for piece in x.grad.view(-1).split(2**28))
    assert alike == x.numel() - CLASSES * len(special) + int((gradient[at] == one[0]).sum())


def test_the_size_is_what_it_says() -> None:
    assert CLASSES * MANY == 2**31 + 1
