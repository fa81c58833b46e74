"""The data that is measured: image-sized files in directories like ImageNet's, photographs, a tree of a million names.

They are made once and kept for the next run; what says that they are complete is a file beside them, written last.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from coordlfs_tools.lab.machine import drop_files

_PER_CLASS = 1000
_MEAN = 110_000  # bytes of a file
_SPREAD = 0.45  # standard deviation of the size's logarithm, as with photographs
_SIZES = (4_000, 700_000)  # bytes; nothing is smaller or larger
_KINDS = ("images", "names", "small", "equal", "photos", "large")
LARGE, _PIECE = "large.bin", 1 << 24
FIRST = "first-byte"  # the one file of the tree of names that is not empty


@dataclass(frozen=True, slots=True)
class Images:
    """`paths` are relative to `root`; `allocated` is what they take up in whole pages, the dataset's size D."""

    root: Path
    paths: list[str]
    allocated: int

    def forget(self) -> None:
        """Have the page cache hold nothing of the files, but for what is pinned."""
        drop_files(self.root / path for path in self.paths)

    def part(self, files: int) -> Images:
        """As many of the files, spread over all directories."""
        chosen = sorted(np.random.default_rng(files).permutation(len(self.paths))[:files])
        return _measure(self.root, [self.paths[i] for i in chosen])


def _measure(root: Path, paths: Sequence[str]) -> Images:
    return Images(root, list(paths), sum(os.stat(root / path).st_blocks * 512 for path in paths))


def _path(index: int) -> str:
    name = f"n{1_440_764 + index // _PER_CLASS * 137:08}"
    return f"train/{name}/{name}_{index % _PER_CLASS}.JPEG"


def images(directory: Path, files: int) -> Images:
    """`files` incompressible files of 110 kB on average below `directory`, made if they are not there."""
    root = directory / f"images-{files}"
    paths = [_path(i) for i in range(files)]
    _make(root, {"files": files, "mean": _MEAN}, lambda: _write_images(root, paths))
    return _measure(root, paths)


def _write_images(root: Path, paths: Sequence[str]) -> None:
    random = np.random.default_rng(len(paths))
    sizes = random.lognormal(0, _SPREAD, len(paths))
    sizes = np.clip(sizes * (_MEAN / sizes.mean()), *_SIZES).astype(int)
    for path in dict.fromkeys(os.path.dirname(p) for p in paths):
        (root / path).mkdir(parents=True)
    for path, size in zip(paths, sizes, strict=True):
        (root / path).write_bytes(random.bytes(int(size)))
    os.sync()  # blocks are allocated when they are written


def equal(directory: Path, files: int, size: int) -> Path:
    """`files` files of `size` bytes each in one directory, made if they are not there."""
    root = directory / f"equal-{files}"
    _make(root, {"files": files, "size": size}, lambda: _write_equal(root, files, size))
    return root


def _write_equal(root: Path, files: int, size: int) -> None:
    root.mkdir()
    random = np.random.default_rng(files)
    for i in range(files):
        (root / f"{i:06}.bin").write_bytes(random.bytes(size))
    os.sync()


def photographs(directory: Path, files: int) -> Path:
    """`files` JPEG files that decode as photographs do, made if they are not there. Needs the extra `tools`."""
    from coordlfs_tools.lab import photos  # Pillow is not needed for anything else here

    root = directory / f"photos-{files}"
    _make(root, {"files": files}, lambda: list(photos.write(root, files)))
    return root


def names(directory: Path, files: int) -> Path:
    """A tree of `files` empty files in directories of a thousand, and of one that is not, made if it is not there."""
    root = directory / f"names-{files}"
    _make(root, {"files": files}, lambda: _write_names(root, files))
    return root


def _write_names(root: Path, files: int) -> None:
    root.mkdir()
    (root / FIRST).write_bytes(b"first byte\n")
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_directory, [root / f"class-{i:04}" for i in range(files // _PER_CLASS)], chunksize=8))


def _write_directory(directory: Path) -> None:
    directory.mkdir()
    for i in range(_PER_CLASS):
        os.mknod(directory / f"sample-{i:04}.jpg", stat.S_IFREG | 0o644)


def small(directory: Path, files: int, size: int) -> Path:
    """A tree of `files` files of `size` bytes each, in directories of a thousand, made if it is not there."""
    root = directory / f"small-{files}"
    _make(root, {"files": files, "size": size}, lambda: _write_small(root, files, size))
    return root


def _write_small(root: Path, files: int, size: int) -> None:
    root.mkdir()
    with ProcessPoolExecutor() as pool:
        directories = [root / f"class-{i:04}" for i in range(files // _PER_CLASS)]
        list(pool.map(_fill_directory, directories, [size] * len(directories), chunksize=8))
    os.sync()


def _fill_directory(directory: Path, size: int) -> None:
    directory.mkdir()
    for i in range(_PER_CLASS):
        (directory / f"sample-{i:04}.bin").write_bytes(os.urandom(size))


def large(directory: Path, size: int) -> Path:
    """A directory with one incompressible file of `size` bytes, `LARGE`, made if it is not there."""
    root = directory / f"large-{size}"
    _make(root, {"size": size}, lambda: _write_large(root, size))
    return root


def _write_large(root: Path, size: int) -> None:
    root.mkdir()
    random = np.random.default_rng(size)
    with open(root / LARGE, "wb") as f:
        for at in range(0, size, _PIECE):
            f.write(random.bytes(min(_PIECE, size - at)))
    os.sync()


def _make(root: Path, is_: dict[str, int], write: Callable[[], object]) -> None:
    complete = root.with_suffix(".json")
    if complete.exists() and json.loads(complete.read_text()) == is_ and root.is_dir():
        return
    complete.unlink(missing_ok=True)
    if root.exists():
        shutil.rmtree(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {root}", flush=True)
    write()
    complete.write_text(json.dumps(is_))


def clean(directory: Path) -> None:
    """Remove what was made below `directory`, and nothing else."""
    for complete in [path for kind in _KINDS for path in directory.glob(f"{kind}-*.json")]:
        complete.unlink()
    for root in [path for kind in _KINDS for path in directory.glob(f"{kind}-*")]:
        shutil.rmtree(root)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
