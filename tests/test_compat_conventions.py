"""fastfocal.compat.conventions: the check of objects' classes, which every adapter shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfocal.compat.conventions import check_classes, check_rows


def labels(*images: list[int], dtype: torch.dtype = torch.int64) -> list[Tensor]:
    return [torch.tensor(image, dtype=dtype) for image in images]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_classes(dtype: torch.dtype) -> None:
    check_classes("labels", labels([0, 6], [], [3], dtype=dtype), 7)
    check_classes("labels", labels([1, 7], [], dtype=dtype), 7, first=1)
    check_classes("labels", labels([], [], dtype=dtype), 7)
    check_classes("labels", [], 7)


@pytest.mark.parametrize(
    "images, options, message",
    [
        (
            [[0, 6], [], [3, 7]],
            {},
            r"^labels: image 2, object 1 has label 7; expected one of the classes 0..6 \(num_classes is 7\)$",
        ),
        ([[-1], [9]], {}, r"^labels: image 0, object 0 has label -1; expected one of the classes 0..6 "),
        ([[1], [2, 0]], {"first": 1}, r"^labels: image 1, object 1 has label 0; expected one of the classes 1..7 "),
        (
            [[-1], [-2]],
            {"ignored": -1},
            r"^labels: image 1, object 0 has label -2; expected .* or -1 for an object that is ignored$",
        ),
        ([[2**40]], {"first_image": 4}, r"^labels: image 4, object 0 has label 1099511627776; "),
    ],
)
def test_a_label_that_is_no_class(images: list[list[int]], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_classes("labels", labels(*images), 7, **options)


def test_an_ignored_object() -> None:
    check_classes("labels", labels([-1, 0], [6]), 7, ignored=-1)


def test_rows() -> None:
    check_rows("target", torch.tensor([0, 6, -1, -100]), 7)
    with pytest.raises(
        ValueError, match=r"^target: row 1 has label 7; expected one of the classes 0..6 .*, or a negative number"
    ):
        check_rows("target", torch.tensor([0, 7]), 7)


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_synchronisation_with_a_device() -> None:
    """Tensors without values stand for those of a device: whoever asks for one on the host gets an error."""
    x = torch.empty(3, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):
        bool((x < 0).any())
    with Called() as called:
        check_classes("labels", [x, x[:0]], 7, ignored=-1)
        check_rows("target", x, 7)
    assert called.operators.count("aten._assert_async.msg") == 2
    assert not {name for name in called.operators if "_local_scalar_dense" in name or "nonzero" in name}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_in_a_compiled_graph(backend: str) -> None:
    """It does not break the graph, and is in it: an error names the range."""
    torch._dynamo.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def step(x: Tensor, classes: list[Tensor]) -> Tensor:
        check_classes("labels", classes, 7)
        return 2 * x

    x = torch.ones(3)
    assert torch.equal(step(x, labels([0, 6], [2])), 2 * x)
    with pytest.raises(
        RuntimeError, match=r"labels: a label is no class; expected one of the classes 0\.\.6 \(num_classes is 7\)"
    ):
        step(x, labels([0, 7], [2]))
    torch._dynamo.reset()
