"""Detection scenes with known truth: scikit-learn's handwritten digits pasted over its sample photographs.

Nothing is downloaded: both data sets are files inside the scikit-learn package. Training and held-out scenes share
neither digits nor photograph areas (the left and the right part of each photograph).
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits, load_sample_images

SIZE = 96
NUM_CLASSES = 10
_TRAIN_DIGITS = 1400  # of 1797; the rest is for held-out scenes
_HELD_OUT_WIDTH = 0.4  # of each photograph, from the left; the rest is for training scenes


@dataclass
class Scene:
    image: NDArray[np.uint8]  # [SIZE, SIZE, 3]
    boxes: NDArray[np.float32]  # [T, 4], x1 y1 x2 y2 in pixels
    labels: NDArray[np.int64]  # [T], the digit


class SceneMaker:
    """``maker(i)`` composes scene ``i``: the same scene for the same seed, in whatever order they are asked for."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.entropy = (seed, int(held_out))
        digits = load_digits()
        part = slice(_TRAIN_DIGITS, None) if held_out else slice(_TRAIN_DIGITS)
        self.digits, self.classes = digits.images[part], digits.target[part]
        self.photos = []
        for photo in load_sample_images().images:
            border = int(photo.shape[1] * _HELD_OUT_WIDTH)
            self.photos.append(photo[:, :border] if held_out else photo[:, border:])

    def __call__(self, index: int) -> Scene:
        rng = np.random.default_rng((*self.entropy, index))
        image = self._background(rng)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(rng.integers(4, 9)):
            which = int(rng.integers(len(self.digits)))
            height = round(float(np.exp(rng.uniform(np.log(15), np.log(52)))))  # every octave equally often
            ink = _ink(self.digits[which], height)
            box = _free_place(rng, ink.shape, boxes)
            if box is None:  # the scene is full
                continue
            _paint(rng, image, ink, box)
            boxes.append(box)
            labels.append(int(self.classes[which]))
        return Scene(
            image.round().astype(np.uint8),
            np.asarray(boxes, np.float32).reshape(-1, 4),
            np.asarray(labels, np.int64),
        )

    def _background(self, rng: np.random.Generator) -> NDArray[np.float32]:
        photo = self.photos[rng.integers(len(self.photos))]
        side = int(rng.integers(SIZE * 5 // 4, min(photo.shape[:2]) + 1))
        y, x = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        image = np.asarray(crop, np.float32)
        return (image[:, ::-1] if rng.random() < 0.5 else image).copy()


def _ink(digit: NDArray[np.float64], height: int) -> NDArray[np.float32]:
    """Opacity in [0, 1] of one 8x8 digit at ``height`` pixels, cropped to its strokes so that its shape is its box."""
    scaled = Image.fromarray(digit.astype(np.float32) / 16).resize((height, height), Image.Resampling.BICUBIC)
    opacity = np.clip(
        (np.asarray(scaled, dtype=np.float32) - np.float32(0.15)) / np.float32(0.6), 0, 1
    )  # sharpen the blur of the enlargement into an edge
    rows, columns = np.flatnonzero(opacity.max(1) > 0.3), np.flatnonzero(opacity.max(0) > 0.3)
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(
    rng: np.random.Generator, shape: tuple[int, ...], taken: list[tuple[int, int, int, int]], gap: int = 2
) -> tuple[int, int, int, int] | None:
    h, w = shape
    for _ in range(20):
        x, y = int(rng.integers(SIZE - w + 1)), int(rng.integers(SIZE - h + 1))
        if all(
            x >= right + gap or x + w + gap <= left or y >= bottom + gap or y + h + gap <= top
            for left, top, right, bottom in taken
        ):
            return x, y, x + w, y + h
    return None


def _paint(
    rng: np.random.Generator, image: NDArray[np.float32], ink: NDArray[np.float32], box: tuple[int, int, int, int]
) -> None:
    x1, y1, x2, y2 = box
    # Bright ink with a dark rim, like a sticker: readable on any part of a photograph.
    rim = max(1, round(len(ink) / 16))
    margin = 2 * rim
    shade = Image.fromarray((np.pad(ink, margin) * 255).astype(np.uint8))
    for _ in range(rim):
        shade = shade.filter(ImageFilter.MaxFilter(3))
    shade = shade.filter(ImageFilter.GaussianBlur(rim / 2))
    top, left = max(0, y1 - margin), max(0, x1 - margin)  # the rim may lie outside the box, but not outside the scene
    around = image[top : y2 + margin, left : x2 + margin]
    inside = np.asarray(shade, np.float32)[top - (y1 - margin) :, left - (x1 - margin) :]
    around *= 1 - 0.9 / 255 * inside[: around.shape[0], : around.shape[1], None]
    colour = np.asarray(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.55), 1.0), np.float32) * 255
    image[y1:y2, x1:x2] += ink[..., None] * (colour - image[y1:y2, x1:x2])
