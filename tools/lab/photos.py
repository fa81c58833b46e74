"""The sample dataset: JPEG files that look, and so weigh and decode, like photographs. The same for the same seed.

A photograph has detail at every scale, the less of it the finer: here, a grid of random colours is blown up again and
again, a finer one laid thinly over it each time; then come shapes and a sensor's noise. Every class has a colour of its
own, so that a network has something to learn. It does not know who reads them.
"""

from __future__ import annotations

import colorsys
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

CLASSES = 10
_SCALES = (4, 8, 16, 32, 64, 128, 256)  # cells along a side of the picture
_DETAIL = 0.14  # how much of a grid shows
_SHAPES = 6
_NOISE = (6, 30)  # how far a pixel's brightness may be off, of 255: the range it is drawn from
_QUALITY = (88, 98)


def write(root: Path, count: int, seed: int = 0) -> Iterator[Path]:
    """Write `count` photographs into a directory for each class below `root`, on all cores; each as it is done."""
    for kind in range(CLASSES):
        (root / f"class-{kind}").mkdir(parents=True)
    # Ctrl-C is for the process that asked for the photographs, which ends these.
    with ProcessPoolExecutor(initializer=partial(signal.signal, signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.map(partial(_write, root, seed), range(count), chunksize=16)


def _write(root: Path, seed: int, number: int) -> Path:
    random = np.random.default_rng((seed, number))
    kind = number % CLASSES
    path = root / f"class-{kind}" / f"photo-{number:05}.jpg"
    photo(random, kind).save(path, quality=int(random.integers(*_QUALITY)))
    return path


def photo(random: np.random.Generator, kind: int) -> Image.Image:
    """A photograph of class `kind`, about 500 × 375 pixels large, a quarter of them upright."""
    size = int(random.integers(440, 540)), int(random.integers(330, 410))
    if random.random() < 0.25:
        size = size[::-1]
    picture = Image.new("RGB", (1, 1), _colour(kind, random))
    for scale in _SCALES:
        grid = Image.fromarray(random.integers(0, 256, (scale, scale, 3), np.uint8))
        picture = Image.blend(picture.resize(grid.size, Image.Resampling.BICUBIC), grid, _DETAIL)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    _draw_shapes(random, picture, kind)
    return _with_noise(random, picture)


def _with_noise(random: np.random.Generator, picture: Image.Image) -> Image.Image:
    strength = int(random.integers(*_NOISE))
    grains = random.integers(0, 2 * strength + 1, (picture.height, picture.width), np.uint8)
    return ImageChops.add(picture, Image.fromarray(grains).convert("RGB"), offset=-strength)


def _colour(kind: int, random: np.random.Generator) -> tuple[int, int, int]:
    hue = kind / CLASSES + random.normal(0, 0.03)
    r, g, b = colorsys.hsv_to_rgb(hue % 1, random.uniform(0.5, 1), random.uniform(0.5, 1))
    return int(r * 255), int(g * 255), int(b * 255)


def _draw_shapes(random: np.random.Generator, picture: Image.Image, kind: int) -> None:
    draw = ImageDraw.Draw(picture)
    for _ in range(_SHAPES):
        x, y = random.uniform(0, picture.width), random.uniform(0, picture.height)
        width, height = random.uniform(10, 90, 2)
        draw.ellipse((x, y, x + width, y + height), _colour(kind, random))
