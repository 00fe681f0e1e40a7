"""``python -m fastfocal``: its parts, and all of it in a few steps."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastfocal
from fastfocal import FastFocalLoss, reference
from fastfocal.__main__ import EXTRAS, OUT, choose_device, main

for module in EXTRAS:
    pytest.importorskip(module)

import matplotlib  # noqa: E402
from PIL import Image  # noqa: E402

from fastfocal import demo  # noqa: E402
from fastfocal.demo import detector, measure, picture, scenes, train  # noqa: E402

CPU = torch.device("cpu")
K = scenes.NUM_CLASSES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The work is small: on a busy machine threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> train.Data:
    return train.Data(seed=3, steps=2, device=CPU, progress=False)


# Scenes


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_are_the_seeds(held_out: bool) -> None:
    def make(seed: int, index: int) -> scenes.Scene:
        return scenes.SceneMaker(seed, held_out)(index)

    first, other_index, other_seed = make(5, 1), make(5, 2), make(6, 1)
    maker = scenes.SceneMaker(5, held_out)
    maker(7)  # what was asked for before makes no difference
    again = maker(1)
    assert (first.image == again.image).all()
    assert (first.boxes == again.boxes).all() and (first.labels == again.labels).all()
    assert (first.image != other_index.image).any() and (first.image != other_seed.image).any()
    assert (make(5, 1).image != scenes.SceneMaker(5, not held_out)(1).image).any()


def test_boxes_are_inside_and_apart() -> None:
    maker = scenes.SceneMaker(0)
    for index in range(50):
        scene = maker(index)
        assert scene.image.shape == (scenes.SIZE, scenes.SIZE, 3) and scene.image.dtype == "uint8"
        assert len(scene.boxes) == len(scene.labels) > 0
        assert (scene.boxes >= 0).all() and (scene.boxes <= scenes.SIZE).all()
        assert (scene.boxes[:, 2:] - scene.boxes[:, :2] >= 2).all()
        assert (scene.labels >= 0).all() and (scene.labels < K).all()
        boxes = torch.from_numpy(scene.boxes)
        assert (detector.box_iou(boxes, boxes) - torch.eye(len(boxes))).abs().max() < 1e-6


def test_held_out_scenes_share_nothing_with_training() -> None:
    training, held_out = scenes.SceneMaker(0), scenes.SceneMaker(0, held_out=True)
    whole = scenes.load_digits().images
    assert len(training.digits) + len(held_out.digits) == len(whole)
    assert (training.digits[-1] != held_out.digits[0]).any()
    for left, right, photo in zip(held_out.photos, training.photos, scenes.load_sample_images().images, strict=True):
        assert left.shape[1] + right.shape[1] == photo.shape[1]


# Detector


def test_labels_are_classes_background_or_ignored() -> None:
    anchors = torch.cat(detector.make_anchors(scenes.SIZE))
    scene = scenes.SceneMaker(0)(0)
    boxes, classes = torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels)
    labels, targets = detector.match(anchors, boxes, classes, K)
    iou = detector.box_iou(anchors, boxes)
    best, which = iou.max(1)
    assert labels.min() >= -1 and labels.max() == K  # K is background, -1 ignored
    sure = best >= detector.POSITIVE
    forced = (iou == iou.max(0).values).any(1)
    assert (labels[sure & ~forced] == classes[which[sure & ~forced]]).all()
    assert (labels[(best < detector.NEGATIVE) & ~forced] == K).all()
    assert (labels[(best >= detector.NEGATIVE) & ~sure & ~forced] == -1).all()
    positive = (labels >= 0) & (labels < K)
    assert (positive == (sure | forced)).all()
    # Every true box has an anchor of its class that decodes to it.
    decoded = detector.decode(anchors[positive], targets[positive])
    found = (detector.box_iou(boxes, decoded) > 0.999) & (classes[:, None] == labels[positive])
    assert found.any(1).all()


def test_no_true_box_is_all_background() -> None:
    anchors = torch.cat(detector.make_anchors(scenes.SIZE))
    labels, targets = detector.match(anchors, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), K)
    assert (labels == K).all() and not targets.any()


def test_levels_and_anchors_agree() -> None:
    model = train.new_model(0, CPU)
    class_logits, offsets = model(torch.rand(2, 3, scenes.SIZE, scenes.SIZE))
    anchors = detector.make_anchors(scenes.SIZE)
    assert len(class_logits) == len(offsets) == len(anchors) >= 3
    for logits, offset, of_level in zip(class_logits, offsets, anchors, strict=True):
        assert logits.shape[1] * logits.shape[2] * logits.shape[3] == len(of_level) * K
        assert offset.shape[1] * offset.shape[2] * offset.shape[3] == len(of_level) * 4
    assert 100_000 <= sum(p.numel() for p in model.parameters()) < 1_000_000


def test_nms_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 10, 9]])
    assert detector.nms(boxes) == [0, 2]


def test_each_true_box_is_found_once() -> None:
    scene = scenes.SceneMaker(0)(0)
    boxes, classes = torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels)
    twice = (torch.cat([boxes, boxes]), torch.cat([classes, classes]), torch.ones(2 * len(boxes)))
    hits = train.found(scene, twice)
    assert (hits.sum(1) == 1).all() and not hits[:, len(boxes) :].any()
    assert not train.found(scene, (boxes, (classes + 1) % K, torch.ones(len(boxes)))).any()


# Losses


def test_plain_loss_is_the_reference(data: train.Data) -> None:
    labels = data.batch(0).labels
    model = train.new_model(0, CPU).double()
    class_logits = model(data.batch(0).images.double())[0]
    got = train.plain_loss(K)(class_logits, labels)
    want = reference.focal_loss(class_logits, labels, num_classes=K)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)  # float64, sums of some 1e5 terms


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_gradient_question(data: train.Data, dtype: torch.dtype, bound: float) -> None:
    # float32: a batch norm's backward subtracts means, which magnifies the rounding of 1e-7 some hundred times.
    answer = measure.gradient_question(train.new_model(0, CPU), data.batch(0), FastFocalLoss(K), K, dtype)
    assert answer.per_level < bound and answer.fast < bound


def test_gradient_question_sees_a_wrong_gradient(data: train.Data) -> None:
    answer = measure.gradient_question(
        train.new_model(0, CPU), data.batch(0), FastFocalLoss(K, loss_weight=1.01), K, torch.float64
    )
    assert answer.fast > 1e-4 > answer.per_level


def test_same_seed_same_training(data: train.Data) -> None:
    curves = [train.train(train.plain_loss(K), data, 3, 2, "", progress=False).curve for _ in range(2)]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=0)
    fast = train.train(FastFocalLoss(K), data, 3, 2, "", progress=False).curve
    torch.testing.assert_close(fast, curves[0], rtol=1e-4, atol=0)  # one optimizer step apart in rounding


# Measuring


@pytest.mark.slow
@pytest.mark.parametrize("kind", measure.KINDS)
def test_cost(kind: str) -> None:
    levels = ((64, 64), (32, 32))
    cost = measure.cost(kind, CPU, seed=0, levels=levels)
    assert cost.failure is None and cost.median is not None and len(cost.seconds) >= 3
    if not sys.platform.startswith("linux"):
        return
    assert cost.memory is not None
    gradient = 4 * measure.IMAGES * measure.ANCHORS * measure.CLASSES * sum(h * w for h, w in levels)  # 28 MiB
    slack = gradient // 4  # of the resident set: workspaces, pages of code
    low, high = {"plain": (3, 100), "fast": (1, 1), "inplace": (0, 0)}[kind]
    assert low * gradient - slack <= cost.memory <= high * gradient + slack


# All of it


def test_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # The costs have their own test, above.
    monkeypatch.setattr(measure, "cost", lambda kind, device, seed: measure.Cost([0.5, 0.25, 1.0], 3 * 2**20))
    monkeypatch.setattr(demo, "HELD_OUT", 6)
    out = tmp_path / "picture.png"
    main(["--steps", "2", "--seed", "1", "--device", "cpu", "--out", str(out)])
    printed, bars = capsys.readouterr()
    assert (
        f"fastfocal {fastfocal.__version__}" in printed
        and "recall" in printed
        and "500 ms" in printed
        and "3.0 MiB" in printed
        and "plain and plain in float64" in printed
    )
    # Every step that takes seconds shows how far it is.
    for step in (
        *("composing scenes", "comparing gradients", "plain, per level", "FastFocalLoss", "plain, float64"),
        *("composing held-out scenes", "detecting, plain loss", "detecting, FastFocalLoss", "measuring"),
    ):
        assert re.search(rf"{step} *:", bars), step
    with Image.open(out) as image:
        assert image.size[0] == 1600
    assert out.stat().st_size < 700_000


def test_picture_without_measurements(tmp_path: Path) -> None:
    maker = scenes.SceneMaker(0, held_out=True)
    shown = [maker(i) for i in range(2)]
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    trained = train.Trained(train.new_model(0, CPU), torch.ones(3))
    costs = {kind: measure.Cost(failure="out of memory") for kind in measure.KINDS}
    out = tmp_path / "picture.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        picture.draw(trained, trained, 0.25, costs, shown, [nothing] * 2, train.Score(0, 0), "a CPU", out)
    text = out.read_text()
    assert text.count("not measured") == 2 * len(costs)
    # The two trainings' largest difference stands beside the one that rounding alone makes.
    assert "largest difference 0" in text and "by rounding alone 0.25" in text


GITIGNORE = Path(__file__).parent.parent / ".gitignore"


@pytest.mark.skipif(not GITIGNORE.exists(), reason="not a checkout")
def test_what_it_writes_is_ignored_by_git() -> None:
    assert any(fnmatch.fnmatch(OUT.name, pattern) for pattern in GITIGNORE.read_text().splitlines())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "banana"], "--device must be cpu, cuda or cuda:<index>, got banana"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:<index>, got meta"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seed", "-1"], "--seed at least 0"),
        (["--out", "picture.txt"], "--out must name a .jpg, .pdf, .png, .svg file"),
        (["--out", "no/such/folder/picture.png"], "in a folder that exists"),
    ],
)
def test_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert words in str(stopped.value) and "\n" not in str(stopped.value)


def test_default_device() -> None:
    usable = torch.cuda.is_available() and fastfocal.build_info()["cuda"]
    assert choose_device(None).type == ("cuda" if usable else "cpu")


@pytest.mark.parametrize("module", EXTRAS)
def test_missing_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert str(stopped.value) == f'python -m fastfocal needs {EXTRAS[module]}: pip install "fastfocal[demo]"'


def test_no_extra_at_all() -> None:
    """In a process that never had them: nothing imports them on the way, and --help needs none."""
    code = f"import sys; sys.path = {sys.path!r}; sys.modules.update(dict.fromkeys({list(EXTRAS)}))"
    code += "; from fastfocal.__main__ import main; main({})"
    done = subprocess.run([sys.executable, "-c", code.format("[]")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    names = ", ".join(EXTRAS.values())
    assert done.stderr.splitlines() == [f'python -m fastfocal needs {names}: pip install "fastfocal[demo]"']
    done = subprocess.run([sys.executable, "-c", code.format("['--help']")], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--steps", "--device", "--out", "--seed"):
        assert option in done.stdout
