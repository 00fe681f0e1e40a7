"""What several processes do together, and what one does that has the whole batch. Run by torchrun (test_distributed.py):

    torchrun --nproc-per-node 2 tests/distributed_steps.py cpu

Every rank knows the batches of all, draws the same weights, and computes the step of one process by itself: from the
reference's losses of each image, in float64, divided by counts taken from the labels.
"""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastfocal
from fastfocal import FastFocalLoss, reference
from fastfocal.losses.bce import BCELoss
from fastfocal.losses.loss import Loss, ScoredModule

CLASSES, ANCHORS = 3, 2
DEVICE = torch.device("cpu")
# float64: sums of some hundred terms in another order and by other convolutions, a thousand roundings of 1e-16.
TOLERANCE = 1e-10


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


# --- the batch --------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What one rank gets."""

    images: Tensor
    labels: list[Tensor]  # (N, M) a level

    def positives(self) -> Tensor:
        return sum(((y >= 0) & (y < CLASSES)).sum(1) for y in self.labels)  # type: ignore[return-value]

    def scores(self) -> list[Tensor]:
        """Made of the labels' places, so that everyone has the same."""
        return [(torch.arange(y.numel(), device=y.device).view(y.shape) % 7 + 1) / 8.0 for y in self.labels]

    def soft(self) -> list[Tensor]:
        """Of the logits' shapes."""
        n, _, h, w = self.images.shape
        shapes = [(n, ANCHORS * CLASSES, h >> i, w >> i) for i in range(2)]
        counts = [torch.Size(shape).numel() for shape in shapes]
        return [
            (torch.arange(c, device=self.images.device, dtype=torch.float64) % 5 / 5).view(s)
            for c, s in zip(counts, shapes, strict=True)
        ]


def part(index: int, images: int, height: int, width: int, lowest: int = -1) -> Part:
    """lowest: the least label there is; -1 is ignored, 3 background."""
    generator = torch.Generator().manual_seed(100 + index)
    pixels = torch.randn(images, 2, height, width, generator=generator, dtype=torch.float64)
    anchors = [(height >> i) * (width >> i) * ANCHORS for i in range(2)]
    labels = [torch.randint(lowest, CLASSES + 1, (images, m), generator=generator) for m in anchors]
    return Part(pixels.to(DEVICE), [y.to(DEVICE) for y in labels])


def ignored(index: int) -> Part:
    found = part(index, 2, 8, 8)
    return Part(found.images, [torch.full_like(y, -1) for y in found.labels])


BATCHES: dict[str, Callable[[], list[Part]]] = {
    "even": lambda: [part(r, 2, 8, 8) for r in range(size())],
    "last rank without positives": lambda: [
        part(r, 2, 8, 8, CLASSES if r == size() - 1 else -1) for r in range(size())
    ],
    "no positives at all": lambda: [part(r, 2, 8, 8, CLASSES) for r in range(size())],
    "sizes and numbers of images differ": lambda: [part(r, 1 + r, 8 + 2 * r, 12 - 2 * r) for r in range(size())],
    "last rank without images": lambda: [part(r, 0 if r == size() - 1 else 2, 8, 8) for r in range(size())],
    "last rank ignored": lambda: [ignored(r) if r == size() - 1 else part(r, 2, 8, 8) for r in range(size())],
}


# --- the model --------------------------------------------------------------------------------------------------------


class Bce(Loss):
    """Binary cross entropy, positives by their score: the operators' own."""

    kind, name, takes_scores = BCELoss.kind, "bce", True

    def parameters(self) -> list[float]:
        return [0.0]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        return nn.functional.softplus(x) - torch.where(y > 0, score, 0.0) * x


class FastBce(ScoredModule):
    parameters_of_loss = Bce

    def __init__(self, num_classes: int, *, normalizer: Any = "positives", sync_normalizer: bool = False) -> None:
        super().__init__(num_classes, normalizer=normalizer, sync_normalizer=sync_normalizer)


class Head(nn.Module):
    """Two levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.classes = nn.Conv2d(4, ANCHORS * CLASSES, 1)
        self.to(DEVICE, torch.float64)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = torch.relu(self.stem(images))
        return [self.classes(first), self.classes(torch.relu(self.down(first)))]


class Detector(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.head = Head()
        self.criterion = criterion

    def forward(self, images: Tensor, *targets: Any, **others: Any) -> Tensor:
        return self.criterion(self.head(images), *targets, **others)  # type: ignore[no-any-return]


class FusedDetector(Detector):
    """The same, of which the logits are never there."""

    def forward(self, images: Tensor, *targets: Any, **others: Any) -> Tensor:
        first = torch.relu(self.head.stem(images))
        features = [first, torch.relu(self.head.down(first))]
        criterion: Any = self.criterion
        # Some classes of an anchor at a time.
        return criterion.fused_with(self.head.classes, features, *targets, chunk_bytes=800, **others)  # type: ignore[no-any-return]


@dataclass
class Way:
    """How a step is made, and what one process makes of the whole batch."""

    criterion: Callable[[], nn.Module]
    divisor: Callable[[list[Part]], Any]  # one for all, or of each part one for each of its images
    function: Any = reference.focal_loss
    options: Any = None  # of the function, besides
    given: Callable[[Part], dict[str, Any]] = lambda part: {}  # to both
    targets: Callable[[Part], Any] = lambda part: part.labels
    normalizer: Callable[[Part], Tensor | None] = lambda part: None

    def call(self, model: Any, own: Part) -> Tensor:
        normalizer = self.normalizer(own)
        others = {} if normalizer is None else {"normalizer": normalizer}
        return model(own.images, self.targets(own), **self.given(own), **others)  # type: ignore[no-any-return]

    def of_whole_batch(self, batch: list[Part]) -> tuple[Tensor, dict[str, Tensor]]:
        head = Head()
        divisor = self.divisor(batch)
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for i, each in enumerate(batch):
            if len(each.images):
                of_images = self.function(
                    head(each.images), self.targets(each), num_classes=CLASSES, reduction="image", normalizer=None,
                    **(self.options or {}), **self.given(each),
                )  # fmt: skip
                total = total + (of_images / (divisor[i] if isinstance(divisor, list) else divisor)).sum()
        total.backward()
        return total.detach(), {f"head.{n}": p.grad for n, p in head.named_parameters()}  # type: ignore[misc]


def positives(batch: list[Part]) -> float:
    return max(1.0, sum(each.positives().sum().item() for each in batch))


def positives_per_image(batch: list[Part]) -> list[Tensor]:
    images = max(1, sum(len(each.images) for each in batch))
    return [each.positives().clamp(min=1).double() * images for each in batch]


def logits_that_count(batch: list[Part]) -> float:
    return max(1.0, sum(int((y != -1).sum()) * CLASSES for each in batch for y in each.labels))


def sum_of_scores(batch: list[Part]) -> float:
    chosen = [
        s[(y >= 0) & (y < CLASSES)].sum().item()
        for each in batch
        for s, y in zip(each.scores(), each.labels, strict=True)
    ]
    return max(1.0, sum(chosen))


def bce_by_image(logits: list[Tensor], labels: Any, reduction: str, **options: Any) -> Tensor:
    arguments = fastfocal.pyramid.sort_keywords(Bce, logits, labels, reduction, options)
    return reference.pyramid_loss(*arguments)  # type: ignore[return-value]


def fast(**options: Any) -> Callable[[], nn.Module]:
    return lambda: FastFocalLoss(CLASSES, sync_normalizer=True, **options)


def weights(own: Part) -> dict[str, Any]:
    return {"weight": [s + 0.5 for s in own.scores()]}


ALPHA = [0.2, 0.5, 0.9]
WAYS = {
    "positives": Way(fast(), positives),
    "positives, recompute": Way(fast(grad_mode="recompute"), positives),
    "positives, weighted": Way(fast(alpha=ALPHA), positives, options={"alpha": ALPHA}, given=weights),
    "positives of the reference": Way(lambda: reference.FocalLoss(CLASSES, sync_normalizer=True), positives),
    "positives_per_image": Way(fast(normalizer="positives_per_image"), positives_per_image),
    "positives_per_image of the reference": Way(
        lambda: reference.FocalLoss(CLASSES, sync_normalizer=True, normalizer="positives_per_image"), positives_per_image
    ),
    "mean": Way(fast(reduction="mean"), logits_that_count),
    "mean of the reference": Way(
        lambda: reference.FocalLoss(CLASSES, sync_normalizer=True, reduction="mean"), logits_that_count
    ),
    "mean of soft targets": Way(
        fast(reduction="mean"), lambda batch: max(1, sum(y.numel() for each in batch for y in each.soft())), targets=Part.soft
    ),
    "soft targets by their sum": Way(
        fast(), lambda batch: sum(float(y.sum()) for each in batch for y in each.soft()),
        targets=Part.soft, normalizer=lambda own: torch.stack([y.sum() for y in own.soft()]).sum(),
    ),
    "scores": Way(
        lambda: FastBce(CLASSES, normalizer="scores", sync_normalizer=True), sum_of_scores, bce_by_image,
        given=lambda own: {"scores": own.scores()},
    ),
}  # fmt: skip


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    assert set(got) == set(want), (what, set(got), set(want))
    for name, g in got.items():
        largest = want[name].abs().max()
        worst = (g - want[name]).abs().max() / largest
        assert largest > 0 and worst <= TOLERANCE, f"{what}: {name} is off by {worst:.3g}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        g = p.grad
        assert g is not None, name
        found[name.removeprefix("module.")] = g.full_tensor() if hasattr(g, "full_tensor") else g
    return found


def mean_over_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / size()


def by_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def by_fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(DEVICE.type, (size(),))
    fully_shard(model.head.stem, mesh=mesh)  # type: ignore[union-attr, arg-type]
    return fully_shard(model, mesh=mesh)


# --- the checks -------------------------------------------------------------------------------------------------------


def check_every_normalizer_and_batch() -> None:
    for batch_name, made in BATCHES.items():
        batch = made()
        for name, way in WAYS.items():
            want_loss, want = way.of_whole_batch(batch)
            model = by_ddp(Detector(way.criterion()))
            loss = way.call(model, batch[rank()])
            loss.backward()
            compare(gradients(model), want, f"{name}, {batch_name}")
            torch.testing.assert_close(mean_over_ranks(loss), want_loss, rtol=TOLERANCE, atol=0)


def check_fused_heads() -> None:
    """Its node is what hands DistributedDataParallel the gradients of the head's parameters."""
    for batch_name, made in BATCHES.items():
        batch = made()
        for name, way in WAYS.items():
            if "reference" in name:
                continue
            want_loss, want = way.of_whole_batch(batch)
            model = by_ddp(FusedDetector(way.criterion()))
            loss = way.call(model, batch[rank()])
            loss.backward()
            compare(gradients(model), want, f"fused, {name}, {batch_name}")
            torch.testing.assert_close(mean_over_ranks(loss), want_loss, rtol=TOLERANCE, atol=0)


def check_fused_heads_by_fsdp() -> None:
    """The head is in the root's group, whose parameters are whole while the loss is computed; the stem in one of its own."""
    for batch_name in ("last rank without positives", "sizes and numbers of images differ"):
        batch = BATCHES[batch_name]()
        for name in ("positives", "positives, recompute", "positives_per_image"):
            _, want = WAYS[name].of_whole_batch(batch)
            model = by_fsdp(FusedDetector(WAYS[name].criterion()))
            WAYS[name].call(model, batch[rank()]).backward()
            compare(gradients(model), want, f"FSDP, fused, {name}, {batch_name}")


def check_a_sharded_head_is_an_error() -> None:
    """In a group of its own its parameters are shards, as it is not called: said, not computed."""
    own = BATCHES["even"]()[rank()]
    model = FusedDetector(FastFocalLoss(CLASSES, sync_normalizer=True))
    fully_shard(model.head.classes, mesh=init_device_mesh(DEVICE.type, (size(),)))
    try:
        model(own.images, own.labels)
    except (TypeError, ValueError) as error:
        assert str(error).startswith("head"), error
    else:
        raise AssertionError("a head whose parameters are shards was computed")


def check_fused_running_normalizer() -> None:
    criterion, plain = (
        FastFocalLoss(CLASSES, sync_normalizer=True, ema_momentum=0.9, ema_start=30.0) for _ in range(2)
    )
    fused, ordinary = by_ddp(FusedDetector(criterion)), by_ddp(Detector(plain))
    for step in range(3):
        own = [part(10 * step + r, 2, 8, 8, CLASSES if r == step else -1) for r in range(size())][rank()]
        for model in (fused, ordinary):
            model.zero_grad()
            model(own.images, own.labels).backward()
        compare(gradients(fused), gradients(ordinary), f"fused, running, step {step}")
        assert criterion.ema_normalizer == plain.ema_normalizer != 30


def check_the_expected_step_is_that_of_one_module() -> None:
    batch = BATCHES["even"]()
    whole = Part(
        torch.cat([each.images for each in batch]),
        [torch.cat(level) for level in zip(*(each.labels for each in batch), strict=True)],
    )
    for name in ("positives", "positives_per_image", "mean"):
        options = {"reduction": "mean"} if name == "mean" else {"normalizer": name}
        model = Detector(FastFocalLoss(CLASSES, **options))
        model(whole.images, whole.labels).backward()
        compare(gradients(model), WAYS[name].of_whole_batch(batch)[1], name)


def check_without_it_the_step_is_another() -> None:
    batch = BATCHES["last rank without positives"]()
    _, want = WAYS["positives"].of_whole_batch(batch)
    model = by_ddp(Detector(FastFocalLoss(CLASSES)))
    model(batch[rank()].images, batch[rank()].labels).backward()
    try:
        compare(gradients(model), want, "without")
    except AssertionError:
        return
    raise AssertionError("a step without sync_normalizer was taken for the right one")


def check_fsdp() -> None:
    for batch_name in ("last rank without positives", "sizes and numbers of images differ"):
        batch = BATCHES[batch_name]()
        for name in ("positives", "positives_per_image"):
            _, want = WAYS[name].of_whole_batch(batch)
            model = by_fsdp(Detector(WAYS[name].criterion()))
            WAYS[name].call(model, batch[rank()]).backward()
            compare(gradients(model), want, f"FSDP, {name}, {batch_name}")


def check_the_loss_outside_of_the_wrapped_model() -> None:
    batch = BATCHES["last rank without positives"]()
    _, want = WAYS["positives"].of_whole_batch(batch)
    head, criterion = by_ddp(Head()), FastFocalLoss(CLASSES, sync_normalizer=True)
    criterion(head(batch[rank()].images), batch[rank()].labels).backward()
    compare({f"head.{name}": g for name, g in gradients(head).items()}, want, "outside")


def check_a_group_of_its_own() -> None:
    """Pairs of ranks that train apart from each other."""
    batch = BATCHES["sizes and numbers of images differ"]()
    groups = [dist.new_group(list(range(i, i + 2))) for i in range(0, size(), 2)]
    group, first = groups[rank() // 2], rank() // 2 * 2
    _, want = WAYS["positives"].of_whole_batch(batch[first : first + 2])
    criterion = copy.deepcopy(FastFocalLoss(CLASSES, sync_normalizer=True, process_group=group))
    assert criterion.process_group is group
    model = DistributedDataParallel(Detector(criterion), process_group=group)
    model(batch[rank()].images, batch[rank()].labels).backward()
    compare(gradients(model), want, "group")
    alone = dist.new_group([0])
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True, process_group=alone)
    own = batch[rank()]
    try:
        loss = criterion(Head()(own.images), own.labels)
    except RuntimeError as error:
        assert rank() != 0 and "process_group" in str(error), error
    else:
        assert rank() == 0
        assert torch.equal(loss, FastFocalLoss(CLASSES)(Head()(own.images), own.labels))


def check_compiled() -> None:
    """One graph for the criterion, whole; DistributedDataParallel within a graph of its own."""
    for name in ("positives", "positives_per_image", "mean", "soft targets by their sum"):
        batch = BATCHES["sizes and numbers of images differ"]()
        _, want = WAYS[name].of_whole_batch(batch)
        torch._dynamo.reset()
        criterion = torch.compile(WAYS[name].criterion(), backend="aot_eager", fullgraph=True)
        model = by_ddp(Detector(criterion))
        WAYS[name].call(model, batch[rank()]).backward()
        got = {n.replace("_orig_mod.", ""): g for n, g in gradients(model).items()}
        compare(got, want, f"compiled {name}")
    torch._dynamo.reset()
    _, want = WAYS["positives"].of_whole_batch(batch)
    group = dist.new_group(list(range(size())))
    inner = by_ddp(Detector(FastFocalLoss(CLASSES, sync_normalizer=True, process_group=group)))
    torch.compile(inner, backend="aot_eager")(batch[rank()].images, batch[rank()].labels).backward()
    compare(gradients(inner), want, "compiled around DistributedDataParallel")


def check_checkpointed() -> None:
    """The loss is computed again within backward, and so is the sum over ranks."""
    batch = BATCHES["last rank without positives"]()
    own = batch[rank()]
    _, want = WAYS["positives"].of_whole_batch(batch)
    for reentrant in (False, True):
        model = Detector(FastFocalLoss(CLASSES, sync_normalizer=True))
        images = own.images.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(model, images, own.labels, use_reentrant=reentrant).backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= size()
        compare(gradients(model), want, f"checkpoint, reentrant {reentrant}")


class Events(TorchDispatchMode):
    """What is called, in order; the sum over ranks among it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.summed: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def events() -> Iterator[Events]:
    original, seen = dist.all_reduce, Events()

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.summed.append(tensor)
        assert kwargs.get("async_op") is True
        work = original(tensor, *args, **kwargs)

        class Work:
            def wait(self) -> None:
                seen.names.append("waited for")
                work.wait()

        seen.names.append("started")
        return Work()

    dist.all_reduce = all_reduce
    try:
        with seen:
            yield seen
    finally:
        dist.all_reduce = original


def check_the_sum_overlaps() -> None:
    """One sum, of one number, begun right after the labels are packed; what needs none of it comes before the wait."""
    own = BATCHES["even"]()[rank()]
    logits = [x.detach() for x in Head()(own.images)]
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True, alpha=ALPHA)
    with events() as seen:
        criterion(logits, own.labels, **weights(own))
    (summed,) = seen.summed
    assert summed.numel() == 1 and summed.dtype == torch.float64
    names = seen.names
    begun = names.index("started")
    waited = names.index("waited for")
    assert names.index("pack_labels") < begun < waited < names.index("pyramid_loss"), names
    assert "copy_" not in names[:begun] and "copy_" in names[begun:waited], names  # the weights, made flat
    # Nothing but the collective itself between the count and the sum.
    between = names[names.index("pack_labels") + 1 : begun]
    assert all("allreduce" in name.replace("_", "") for name in between), between


def check_evaluation_needs_no_one_else() -> None:
    own = BATCHES["even"]()[rank()]
    logits = [x.detach() for x in Head()(own.images)]
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True, ema_momentum=0.9).eval()
    plain = FastFocalLoss(CLASSES, sync_normalizer=True).eval()
    if rank() == 0:
        hundred = FastFocalLoss(CLASSES, normalizer=100.0)(logits, own.labels)
        torch.testing.assert_close(criterion(logits, own.labels), hundred, rtol=1e-14, atol=0)
        assert torch.equal(plain(logits, own.labels), FastFocalLoss(CLASSES)(logits, own.labels))
    assert criterion.ema_normalizer == 100


def check_running_normalizer() -> None:
    """detectron2's, of the ranks' mean count: that of one process which starts at as many times as much as there are ranks."""
    for compiled in (False, True):
        torch._dynamo.reset()
        criterion = FastFocalLoss(CLASSES, sync_normalizer=True, ema_momentum=0.9, ema_start=30.0)
        called = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compiled else criterion
        model = by_ddp(Detector(called))
        running = 30.0
        for step in range(3):
            batch = [part(10 * step + r, 2, 8, 8, CLASSES if r == step else -1) for r in range(size())]
            mean = positives(batch) / size()
            running = running * 0.9 + mean * (1 - 0.9)
            way = Way(fast(), lambda batch, running=running: running * size())  # type: ignore[misc]
            _, want = way.of_whole_batch(batch)
            model.zero_grad()
            model(batch[rank()].images, batch[rank()].labels).backward()
            compare(gradients_of_original(model), want, f"running, step {step}")
            assert criterion.ema_normalizer.item() == running


def gradients_of_original(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): g for name, g in gradients(model).items()}


def check_no_host_synchronisation() -> None:
    """Meaningful with nccl: any copy to the host would raise."""
    if DEVICE.type != "cuda":
        return
    own = BATCHES["even"]()[rank()]
    logits = [x.detach().requires_grad_() for x in Head()(own.images)]
    for options in ({}, {"normalizer": "positives_per_image"}, {"reduction": "mean"}, {"ema_momentum": 0.9}):
        criterion = FastFocalLoss(CLASSES, sync_normalizer=True, alpha=ALPHA, **options)  # type: ignore[arg-type]
        criterion(logits, own.labels).backward()  # copies its alphas, makes the communicator
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(logits, own.labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> int:
    global DEVICE
    cuda = sys.argv[1] == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    if cuda:
        DEVICE = torch.device("cuda", rank())
        torch.cuda.set_device(DEVICE)
    for check in CHECKS:
        try:
            check()
        except BaseException:
            print(f"rank {rank()}: {check.__name__} failed\n{traceback.format_exc()}", flush=True)
            return 1
        if rank() == 0:
            print(f"{check.__name__}: fine on {size()} ranks", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
