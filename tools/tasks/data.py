"""Synthetic files of realistic sizes for the tasks: photographs, with and without boxes, and recordings."""

from __future__ import annotations

import json
import shutil
import signal
import wave
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from coordlfs_tools.lab import photos
from PIL import ImageDraw

from coordlfs.kernel.writeback import write_back

CLASSES = 10
RATE = 16_000  # samples a second of a recording, which has one channel of 16 bits
_SECONDS = 30  # that a recording lasts
_COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "white", "brown", "black")


def _photo(path: Path, number: int) -> None:
    """About 110 KB, as in ImageNet; the class is the directory's."""
    random = np.random.default_rng((1, number))
    photos.photo(random, number % CLASSES).save(path.with_suffix(".jpg"), quality=int(random.integers(88, 98)))


def _scene(path: Path, number: int) -> None:
    """A larger photograph, about 300 KB as in Open Images, with one to four ellipses and the boxes around them."""
    random = np.random.default_rng((2, number))
    picture = photos.photo(random, number % CLASSES)
    picture = picture.resize((picture.width * 2, picture.height * 2))
    draw = ImageDraw.Draw(picture)
    boxes = []
    for _ in range(random.integers(1, 5)):
        kind, width, height = int(random.integers(CLASSES)), *random.uniform(0.1, 0.4, 2)
        x, y = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
        box = (x, y, x + width, y + height)  # as shares of the picture
        draw.ellipse([side * (picture.width, picture.height)[i % 2] for i, side in enumerate(box)], _COLOURS[kind])
        boxes.append([*map(float, box), kind])
    picture.save(path.with_suffix(".jpg"), quality=int(random.integers(94, 98)))
    path.with_suffix(".json").write_text(json.dumps(boxes))


def _recording(path: Path, number: int) -> None:
    """A chord of the class's pitch in noise, half a minute: 960 KB."""
    random = np.random.default_rng((3, number))
    time = np.arange(RATE * _SECONDS) / RATE
    pitch = 110 * 2 ** (number % CLASSES / 5)
    sound = sum(np.sin(2 * np.pi * pitch * n * time + random.uniform(0, 6)) / n for n in (1, 2, 3))
    sound = 6000 * sound + random.normal(0, 3000, time.size)
    with wave.open(str(path.with_suffix(".wav")), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.clip(-32768, 32767).astype("<i2").tobytes())


_WRITERS: dict[str, Callable[[Path, int], None]] = {"images": _photo, "detection": _scene, "audio": _recording}


def write(task: str, root: Path, count: int) -> Path:
    """The directory with `count` samples for a task, in a folder for each class; made if it is not there."""
    directory = root / f"{task}-{count}"
    if not directory.exists():
        part = root / f"{task}-{count}.part"
        shutil.rmtree(part, ignore_errors=True)
        for kind in range(CLASSES):
            (part / f"class-{kind}").mkdir(parents=True)
        with ProcessPoolExecutor(initializer=partial(signal.signal, signal.SIGINT, signal.SIG_IGN)) as pool:
            list(pool.map(partial(_write, task, part), range(count), chunksize=8))
        write_back(part)
        part.rename(directory)
    return directory


def _write(task: str, root: Path, number: int) -> None:
    _WRITERS[task](root / f"class-{number % CLASSES}" / f"{number:05}", number)
