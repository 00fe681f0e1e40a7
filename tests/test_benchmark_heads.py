"""benchmarks/heads.py: what it counts, what it checks, and that it goes on where it was stopped."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import heads, heads_report
from benchmarks.heads import HEAD_ROWS, Budget, HeadCase, HeadRow, Results
from benchmarks.memory import MIB, TensorBytes

CASE = HeadCase(64, 64, 2, 2, 3, torch.float32)
WHERE = "a CPU"


@pytest.mark.parametrize("fake", [False, True])
def test_tensor_bytes_counts_what_lives(fake: bool) -> None:
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode())
        given = torch.zeros(1000)
        counted = stack.enter_context(TensorBytes([given]))
        view = given.view(10, 100)
        assert counted.now == 0
        first = view + 1
        assert counted.now == 4000
        again = first[2:]  # no memory of its own
        del first
        assert counted.now == 4000
        second = again * 2
        del again
        assert (counted.now, counted.peak) == (8 * 400, 4000 + 8 * 400)
        del second, view
        assert counted.now == 0


def test_tensor_bytes_sees_into_backward() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with TensorBytes([x]) as counted:
        x.exp().sum().backward()  # exp keeps its output; the gradient of it is expanded; that of x is left
    assert counted.now == 4000
    assert 8000 <= counted.peak <= 8000 + 3 * 4  # two at a time, and the sum and its gradient


def test_the_tensors_of_a_head() -> None:
    """By hand, of two images of 512x512: the logits once or twice, and what the convolution's backward adds."""
    case = HeadCase(512, 512, 2, 9, 80, torch.float32)
    logits = case.logit_bytes
    assert logits == 2 * (4096 + 1024 + 256 + 64 + 16) * 720 * 4
    weight = (720 * 256 * 9 + 720) * 4
    features = 2 * (4096 + 1024 + 256 + 64 + 16) * 256 * 4
    assert case.gradient_bytes == features + weight
    found = {name: heads.tensor_bytes(case, loss) for name, loss in heads.BYTES_ROWS.items()}
    assert found["stock"] > 8 * logits  # its formula alone has eight tensors of the logits' size alive at once
    assert 2 * logits <= found["save"] < 2 * logits + case.gradient_bytes
    # A level's weight gradient is there beside the sum of the others, to which it is added.
    assert logits + weight <= found["inplace"] < logits + case.gradient_bytes + weight
    # What is kept, a tile, and its contributions to the gradients of P3's features and of the weight.
    tile = MIB
    smaller = heads.tensor_bytes(case, heads.fused(tile))
    assert case.gradient_bytes + tile // 2 < smaller < case.gradient_bytes + tile + features + weight
    assert smaller < found["fused"] < found["inplace"] + features


def test_every_row_is_right_and_a_wrong_one_is_seen() -> None:
    drawn = heads.draw(CASE)
    right = heads.answer(CASE, drawn)
    for row in HEAD_ROWS.values():
        heads.check(CASE, row, drawn, right)

    def wrong(case: HeadCase, drawn: heads.Drawn) -> torch.Tensor:
        loss = HEAD_ROWS["fused"].loss(case, drawn)
        return loss + 1e-3 * (drawn.layer.weight - drawn.layer.weight.detach()).sum()  # the same loss, another gradient

    with pytest.raises(AssertionError, match="gradient 5 of 7"):
        heads.check(CASE, HeadRow("wrong", wrong, (0, 0)), drawn, right)
    with pytest.raises(AssertionError, match="loss"):
        heads.check(CASE, HeadRow("double", lambda c, d: 2 * HEAD_ROWS["save"].loss(c, d), (0, 0)), drawn, right)


def test_keys_name_their_cases() -> None:
    found = heads.cases_of(list(heads.SIZES), list(heads.CLASSES), list(heads.DTYPES))
    assert len(found) == 20 and [HeadCase.of(case.key) for case in found] == found
    assert {(case.height, case.images) for case in found if case.classes > 1000} == {(512, 2), (800, 1)}
    assert heads.cases_of([(800, 1344)], [80], [torch.float32])[0].logit_bytes == 32_256_000 * 4


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """Peaks are there already; of the rounds one is, without the last row."""
    names = ["save", "inplace", "fused"]
    results = Results(tmp_path / "heads.json", WHERE)
    found = results.case(CASE.key)
    found["peaks"] = {name: {"bytes": MIB, "seconds": 0.01} for name in names}
    found["rounds"].append({"save": [1.0, 1.0], "inplace": [0.5, 0.5]})
    found["load"].append(0.0)
    results.save()
    said: list[str] = []
    assert not heads.measure(CASE, names, 2, Results(results.path, WHERE), spent(), 1, said.append)
    assert said == []

    again = Results(results.path, WHERE)
    assert heads.measure(CASE, names, 2, again, Budget(60.0), 1, said.append)
    rounds = again.case(CASE.key)["rounds"]
    assert rounds[0] == {"save": [1.0, 1.0], "inplace": [0.5, 0.5]}
    assert [set(r) for r in rounds[1:]] == [{"save", "inplace", "fused"}, {"save", "fused"}]
    assert all(seconds > 0 for r in rounds for times in r.values() for seconds in times)
    assert Results(results.path, WHERE).data == again.data
    with pytest.raises(SystemExit, match="another CPU"):
        Results(results.path, "another CPU")


def spent() -> Budget:
    budget = Budget(0.0)
    budget.first = False
    return budget


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "available_bytes", lambda _: 1 * MIB)
    results = Results(tmp_path / "heads.json", WHERE)
    said: list[str] = []
    assert heads.measure(CASE, ["save", "fused"], 1, results, Budget(60.0), 1, said.append)
    results.save()
    assert len(said) == 2 and set(results.case(CASE.key)["left_out"]) == {"save", "fused"}
    assert "left out: needs about" in (tmp_path / "heads.md").read_text()


DATA: dict[str, Any] = {
    "where": WHERE,
    "tensor_bytes": {"800x1344-N2-A9-K80-bfloat16": {"stock": MIB, "save": MIB, "inplace": MIB, "fused": MIB}},
    "cases": {
        f"512x512-N2-A{a}-K{k}-float32": {
            "gradient_bytes": 10 * MIB,
            "peaks": {
                "stock": {"bytes": 1000 * MIB, "seconds": 1},
                "save": {"bytes": 200 * MIB, "seconds": 1},
                "fused": {"bytes": peak * MIB, "seconds": 1},
            },
            "left_out": {"checkpoint": "needs about 1.0 GiB, 0.1 GiB were free"},
            "rounds": [{"save": [2.0, 4.0], "fused": [wall, 4.0]} for wall in (1.0, 2.2, 8.0)],
            "load": [0.5, 0.7, 0.6],
        }
        for k, a, peak in ((20, 9, 300), (80, 9, 115), (1203, 9, 116), (13204, 1, 50))
    },
}


def test_the_table_says_what_is_missed() -> None:
    text = "\n".join(heads_report.table(DATA))
    missed = [line for line in text.splitlines() if line.startswith("* ")]
    assert [line.split(", float32: ")[1] for line in missed] == [
        "peak 300 MiB, aim 115",
        "time 1.10 x `FastFocalLoss`, aim 1.05",
        "peak 116 MiB, aim 115",
        "time 1.10 x `FastFocalLoss`, aim 1",
        "time 1.10 x `FastFocalLoss`, aim 1",
    ]
    assert "| **`fused_with`** | 300 | 1.10 (0.50 - 4.00) | 1.00 |" in text
    fast = copy.deepcopy(DATA)
    for case in fast["cases"].values():
        case["rounds"] = [{"save": [2.0, 4.0], "fused": [1.9, 4.0]}]
        case["peaks"]["fused"]["bytes"] = 115 * MIB
    assert "None is missed" in "\n".join(heads_report.table(fast))


def test_the_page_is_made_of_the_data(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    docs, out = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    out.mkdir()
    page = docs / "many_classes.md"
    page.write_text((heads_report.DOCS / "many_classes.md").read_text())
    heads_report.write_docs(DATA, out, docs)
    first = page.read_text()
    assert "| 512 x 512, N = 2, A = 9, K = 1203, float32 | 10 | 1,000 |  | 200 |  | 116 | 1.10 |" in first
    assert (docs / "many_classes.png").stat().st_size > 10_000
    heads_report.write_docs(DATA, out, docs)
    assert page.read_text() == first
    page.write_text("no place for them")
    with pytest.raises(SystemExit, match="two comments"):
        heads_report.write_docs(DATA, out, docs)


def test_labels_are_spread_over_the_classes() -> None:
    for module in ("sklearn", "PIL", "tqdm"):
        pytest.importorskip(module)
    from benchmarks.torchvision_training import spread

    digits = torch.arange(10).repeat(2000)
    found = spread(digits, 1203, 7)
    assert torch.equal(found % 10, digits) and int(found.max()) == 1202 and len(found.unique()) == 1203
    assert torch.equal(found, spread(digits, 1203, 7)) and not torch.equal(found, spread(digits, 1203, 8))
