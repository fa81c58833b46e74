"""The demonstration: its photographs are photographs, it says what it needs, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mounts import NOBODY, PATIENCE, eventually, mountpoints

pytest.importorskip("PIL", reason="the demonstration needs the extra `tools`")
pytest.importorskip("torch", reason="the demonstration needs the extra `loader`")

from coordlfs_tools.lab import photos
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "tools" / "demo.sh"
COMMAND = [sys.executable, "-m", "coordlfs_tools.demo", "--files", "120"]


def test_photographs_decode_and_weigh_what_photographs_weigh(tmp_path: Path) -> None:
    written = list(photos.write(tmp_path / "a", 40))
    assert len({path.parent for path in written}) == photos.CLASSES
    for path in written:
        assert 40_000 < path.stat().st_size < 250_000
        with Image.open(path) as image:
            assert image.format == "JPEG"
            # Detail at every scale: neighbours are alike, but not the same, and far points are not alike.
            grey = np.asarray(image.convert("L")).astype(float)
            assert 0 < np.abs(np.diff(grey)).mean() < grey.std()


def test_photographs_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again, other = (
        [path.read_bytes() for path in photos.write(tmp_path / name, 10, seed)]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_without_root_it_says_what_it_needs() -> None:
    with SCRIPT.open() as script:
        done = subprocess.run(["sh"], stdin=script, capture_output=True, text=True, user=NOBODY, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs root" in done.stderr
    assert "Traceback" not in done.stderr


def _nothing_is_left(place: Path) -> bool:
    mounted = [path for path in mountpoints() if path.startswith(bytes(place))]
    return not mounted and not list(place.iterdir())


@pytest.mark.usefixtures("_may_mount")
def test_it_trains_on_both_sides_and_leaves_nothing(place: Path) -> None:
    done = subprocess.run([*COMMAND, "--dir", place], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"epoch [123]: [\d.]+ s, \d+ images/s", done.stdout)) == 2 + 3 + 3
    rates = [float(rate) for rate in re.findall(r" MB +([\d.]+)% *$", done.stdout, re.MULTILINE)]
    assert len(rates) == 3 + 3
    assert rates[-1] > 50  # at least what is pinned: so few files fit into the memory that the job has to spare
    assert "times as fast" in done.stdout
    assert _nothing_is_left(place)


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("phase", ["writing", "Training on the mount"])
def test_interrupted_it_leaves_nothing(place: Path, phase: str) -> None:
    """Ctrl-C goes to every process of the terminal's foreground."""
    command = [*COMMAND, "--files", "48", "--dir", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stdout
        assert any(phase in line for line in process.stdout)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    eventually(lambda: _nothing_is_left(place), what="the demonstration left something behind")
