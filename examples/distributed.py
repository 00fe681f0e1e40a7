"""A small detector trained by several processes whose steps are those of one process with all the images.

    torchrun --nproc-per-node 2 examples/distributed.py

Images hold none, one or many bright squares, so ranks count different numbers of positives. Averaging their gradients, as
DistributedDataParallel does, is then not the gradient of the whole batch, unless each rank divides by what all of them count:
`sync_normalizer=True`. Runs on the CPU in seconds, on GPUs where there is one for each process.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastfocal import FastFocalLoss

CLASSES = 3  # red, green and blue squares
STRIDES = (4, 8, 16)
IMAGES = 4  # of each process


class Detector(nn.Module):
    """A backbone, and one classification head for every level: logits (N, CLASSES, H, W) of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.ReLU())
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()) for _ in STRIDES[1:]
        )
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
        nn.init.constant_(self.head[-1].bias, -2.0)  # type: ignore[union-attr, arg-type]

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = [self.stem(images)]
        for block in self.down:
            levels.append(block(levels[-1]))
        return [self.head(level) for level in levels]


def draw(objects: list[int], generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Images (N, 3, 64, 64), and for each level labels (N, H, W): 0, 1, 2, or CLASSES for background.

    objects: how many squares there are in each image.
    """
    images = 0.1 * torch.randn(len(objects), 3, 64, 64, generator=generator)
    labels = [torch.full((len(objects), 64 // s, 64 // s), CLASSES) for s in STRIDES]
    for image, count in enumerate(objects):
        for _ in range(count):
            kind, level = (int(torch.randint(3, (), generator=generator)) for _ in range(2))
            stride = STRIDES[level]
            row, column = torch.randint(64 // stride, (2,), generator=generator).tolist()
            images[image, kind, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] += 1
            labels[level][image, row, column] = kind
    return images, labels


def batch_of(rank: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """What one rank gets; the last one often without any object."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    last = rank == dist.get_world_size() - 1
    objects = [0] * IMAGES if last and step % 2 == 0 else torch.randint(9, (IMAGES,), generator=generator).tolist()
    images, labels = draw(objects, generator)
    return images.to(dtype), labels


def averaged_gradient(model: nn.Module, criterion: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Of one step of all processes."""
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    images, labels = batch_of(dist.get_rank(), 0, torch.float64)
    criterion(wrapped(images.to(device)), [y.to(device) for y in labels]).backward()
    return {name: p.grad for name, p in wrapped.module.named_parameters()}  # type: ignore[misc]


def gradient_of_one_process(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The same step, made here with every rank's images."""
    model = copy.deepcopy(model)
    batches = [batch_of(rank, 0, torch.float64) for rank in range(dist.get_world_size())]
    images = torch.cat([images for images, _ in batches]).to(device)
    labels = [torch.cat(level).to(device) for level in zip(*(labels for _, labels in batches), strict=True)]
    FastFocalLoss(CLASSES)(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


def largest_difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each parameter's gradient."""
    return max(((got[name] - g).abs().max() / g.abs().max()).item() for name, g in want.items())


def compare(model: nn.Module, device: torch.device) -> float:
    model = copy.deepcopy(model).double()
    want = gradient_of_one_process(model, device)
    synced = averaged_gradient(model, FastFocalLoss(CLASSES, sync_normalizer=True), device)
    alone = averaged_gradient(model, FastFocalLoss(CLASSES), device)
    difference = largest_difference(synced, want)
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} processes beside one with all the images, float64, largest difference of a gradient:"
        )
        print(f"  with sync_normalizer=True  {difference:.1e}")
        print(f"  without                    {largest_difference(alone, want):.1e}")
    return difference


def train(model: nn.Module, device: torch.device, steps: int) -> None:
    wrapped = DistributedDataParallel(model)
    criterion = FastFocalLoss(CLASSES, sync_normalizer=True)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.01)
    for step in range(steps):
        images, labels = batch_of(dist.get_rank(), step)
        loss = criterion(wrapped(images.to(device)), [y.to(device) for y in labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            mean = loss.detach().clone()  # the mean over ranks is the loss of the whole batch
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step:3d}  loss {mean.item() / dist.get_world_size():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run it with torchrun --nproc-per-node 2")
    parser.add_argument("--steps", type=int, default=41)
    arguments = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.exit(1, "run it with: torchrun --nproc-per-node 2 examples/distributed.py\n")
    local_rank, of_machine = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cuda = torch.cuda.device_count() >= of_machine
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    model = Detector().to(device)
    difference = compare(model, device)
    train(model, device, arguments.steps)
    dist.barrier()  # none takes its connections down while another is in its last sum
    dist.destroy_process_group()
    if difference > 1e-10:
        raise SystemExit("the gradients differ")


if __name__ == "__main__":
    main()
