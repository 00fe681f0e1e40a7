"""Several Python threads that call the loss at once, under ThreadSanitizer. The gradients must be those of one thread."""

from __future__ import annotations

import sys
import threading

import torch

import fastfocal

THREADS, ROUNDS, CLASSES = 4, 6, 5


def step(seed: int) -> list[torch.Tensor]:
    """Every operator: labels and soft targets, saved, recomputed and in place, with the graph kept and without."""
    generator = torch.Generator().manual_seed(seed)
    # Larger than the 32768 logits that one thread does alone.
    inputs = [torch.randn(2, 2 * CLASSES, n, n, generator=generator).requires_grad_() for n in (64, 33, 3)]
    labels = [torch.randint(-1, CLASSES + 1, (2, 2 * n * n), generator=generator) for n in (64, 33, 3)]
    soft = [x.detach().sigmoid() for x in inputs]
    found = []
    for mode in ("save", "recompute", "inplace"):
        for gamma, targets, normalizer in ((2.0, labels, "positives_per_image"), (1.5, soft, 3.0)):
            given = [x * 1 for x in inputs] if mode == "inplace" else inputs
            loss = criteria[gamma](given, targets, normalizer=normalizer) if mode == "save" else fastfocal.focal_loss(
                given, targets, num_classes=CLASSES, gamma=gamma, normalizer=normalizer, grad_mode=mode
            )  # fmt: skip
            found.append(loss.detach().clone())
            for keep in (True, False):
                found += torch.autograd.grad(loss * (3.0 if keep else 1.0), inputs, retain_graph=keep)
    weight = [torch.rand(y.shape, generator=generator) for y in labels]
    losses = fastfocal.focal_loss(inputs, labels, num_classes=CLASSES, weight=weight, reduction="none")
    found += torch.autograd.grad([loss.sum() for loss in losses], inputs)
    return found


# Modules shared by all threads, as a server's or a data-parallel trainer's are.
criteria = {gamma: fastfocal.FastFocalLoss(CLASSES, gamma=gamma) for gamma in (2.0, 1.5)}


def main() -> None:
    # The first calls of all come from all threads at once: what is set up only once is then set up in a race.
    found: dict[int, list[torch.Tensor]] = {}
    start = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        start.wait()
        for _ in range(ROUNDS):
            found[thread] = step(thread)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(THREADS):
        assert all(torch.equal(a, b) for a, b in zip(found[n], step(n), strict=True)), (
            f"thread {n} computed something else"
        )
    print(f"{THREADS} threads, {ROUNDS} rounds each: the same bits as alone")


if __name__ == "__main__":
    sys.exit(main())
