"""The examples, run with the real libraries: they search, and nothing is left of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from mounts import PATIENCE, eventually, is_alive

pytest.importorskip("torch", reason="the examples need the extra `loader`")

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--samples", "480", "--epochs", "3"]

Run = Callable[..., str]


def _of(place: Path) -> list[int]:
    """The processes that have the directory in their environment, as all have that an example started."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with suppress(OSError):
                environment = Path(f"/proc/{entry}/environ").read_bytes()
                if os.fsencode(place) in environment and is_alive(int(entry)):
                    found.append(int(entry))
    return found


def _shared_memory() -> set[str]:
    """Ray's; other tests may run meanwhile and have files there as well."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("plasma", "ray"))}


@pytest.fixture
def run(place: Path) -> Iterator[Run]:
    """Runs an example by its name; what it printed. In the end no process, file or shared memory of it is left."""
    before = _shared_memory()
    sockets = place / "sockets"
    sockets.mkdir(mode=0o700)

    def run(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=place,
            env={
                **os.environ,
                "TMPDIR": str(place),
                "COORDLFS_RUNTIME_DIR": str(sockets),  # brokers of our own, whatever else runs on this machine
                "RAY_USAGE_STATS_ENABLED": "0",
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    yield run
    eventually(lambda: not _of(place), what="processes are left")
    assert not _shared_memory() - before
    files = [path for path in place.rglob("*") if not path.is_dir()]
    assert not files


def test_optuna_searches_with_pruned_trials_in_several_processes(run: Run) -> None:
    pytest.importorskip("optuna")
    printed = run("optuna_search", "--processes", "2", "--trials", "2", *SMALL)
    trials = re.findall(r"^trial \d: rate [\d.]+, (complete|pruned)$", printed, re.MULTILINE)
    assert len(trials) == 4
    assert "complete" in trials
    assert re.search(r"best of 4 trials: rate [\d.]+ with an accuracy of (0\.[5-9]|1\.)", printed)


def test_ray_tune_searches_with_early_stopping(run: Run, place: Path) -> None:
    pytest.importorskip("ray.tune")
    printed = run("ray_tune_search", "--trials", "4", "--at-once", "2", "--dir", str(place), *SMALL)
    epochs = [int(each) for each in re.findall(r"^rate [\d.]+: accuracy [\d.]+ after (\d) epochs$", printed, re.M)]
    assert len(epochs) == 4
    assert max(epochs) == 3
    assert "best of 4 trials" in printed
    assert "rrored" not in printed


def test_lightning_trains_as_with_any_loader(run: Run) -> None:
    pytest.importorskip("lightning")
    printed = run("lightning_search", "--rates", "0.01", "0.03", *SMALL)
    accuracies = re.findall(r"^rate [\d.]+: accuracy ([\d.]+) after 3 epochs$", printed, re.MULTILINE)
    assert len(accuracies) == 2, printed
    assert min(map(float, accuracies)) > 0.4  # of four kinds


def test_the_dali_example_says_what_it_needs() -> None:
    """DALI is too large for a test's environment; with it the example was run by hand."""
    if find_spec("nvidia") is not None:
        pytest.skip("DALI may be installed")
    done = subprocess.run([sys.executable, str(EXAMPLES / "dali_hints.py"), "/"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "this example needs DALI: pip install nvidia-dali-cuda120\n"
