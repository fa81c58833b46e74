"""Jobs for the tests of the loader: real processes that say what they were given, and what they should have been."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from coordlfs_loader import CoordinatedLoader, Seeded, epoch_seed, wire
from coordlfs_tools.lab.processes import is_alive
from torch.utils.data import DataLoader, Dataset

Batch = tuple[tuple[int, ...], str]


class Noise(Dataset[Any]):
    """Random images of different labels, as slow to make as is asked for. Some indices do worse."""

    def __init__(self, length: int, seconds: float = 0.0, side: int = 8, bad: dict[int, str] | None = None) -> None:
        self.length = length
        self.seconds = seconds
        self.side = side
        self.bad = bad or {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        time.sleep(self.seconds)
        kind = self.bad.get(index)
        if kind == "raise":
            raise LookupError(f"sample {index} is rotten")
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "eat":
            self.eaten = b"x" * (1 << 30)
        return torch.rand(3, self.side, self.side), {"index": index, "name": f"sample {index}"}


def digest(batch: Any) -> Batch:
    """The indices of a batch of `Noise`, and a hash of all its bytes."""
    images, about = batch
    hashed = hashlib.blake2b(images.numpy().tobytes() + repr(about["name"]).encode(), digest_size=8)
    return tuple(about["index"].tolist()), hashed.hexdigest()


def plain(dataset: Any, seed: int, epoch: int, **arguments: Any) -> list[Any]:
    """What a plain DataLoader gives for an epoch, seeded as is documented."""
    generator = arguments.get("generator")
    if generator is not None:
        generator.manual_seed(epoch_seed(seed, epoch))
    torch.manual_seed(epoch_seed(seed, epoch))
    return list(DataLoader(Seeded(dataset, seed, epoch), **arguments))


def expected(arguments: dict[str, Any], epoch: int) -> list[Batch]:
    """The batches of an epoch of a `Job`."""
    dataset = Noise(arguments.get("length", 60), side=arguments.get("side", 8))
    size = arguments.get("batch_size", 4)
    return [digest(b) for b in plain(dataset, 0, epoch, batch_size=size, shuffle=True)]


class Job:
    """A process that runs epochs and tells each batch. Its standard input lets it go on, if it is to `step`."""

    def __init__(self, group: str, **arguments: Any) -> None:
        self.arguments = arguments
        ends = [os.pipe() for _ in range(3)]
        # Forked, since importing torch takes longer than most of these tests.
        self.process = multiprocessing.get_context("fork").Process(
            target=_be, args=({"group": group, **arguments}, ends[0][0], ends[1][1], ends[2][1])
        )
        self.process.start()
        for fd in (ends[0][0], ends[1][1], ends[2][1]):
            os.close(fd)
        self.stdin, self.stdout = os.fdopen(ends[0][1], "w"), os.fdopen(ends[1][0])
        self.stderr = os.fdopen(ends[2][0])
        self.batches: dict[int, list[Batch]] = {}
        self.events: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        """The process."""
        assert self.process.pid is not None
        return self.process.pid

    def until(self, event: str, count: int = 1) -> dict[str, Any]:
        """Read on until so many events of a kind have come; the last."""
        for line in self.stdout:
            found: dict[str, Any] = json.loads(line)
            self.events.append(found)
            if found["event"] == "batch":
                self.batches.setdefault(found["epoch"], []).append((tuple(found["indices"]), found["hash"]))
            if found["event"] == event:
                count -= 1
                if not count:
                    return found
        raise AssertionError(f"the job ended: {self.stderr.read()}")

    def go_on(self, steps: int = 1) -> None:
        """Let it take so many batches more."""
        self.stdin.write("x\n" * steps)
        self.stdin.flush()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, signum)

    def finish(self) -> str:
        """Read to the end, which must be a good one; what it logged."""
        self.until("end")
        said = self.stderr.read()
        self.process.join()
        assert self.process.exitcode == 0, said
        return said

    def check(self, *epochs: int) -> None:
        """It was given these epochs, each batch once, in the order of a plain DataLoader but for where it began."""
        for epoch in epochs:
            want, got = expected(self.arguments, epoch), self.batches[epoch]
            assert sorted(got) == sorted(want), f"epoch {epoch}"
            start = want.index(got[0])
            assert got == want[start:] + want[:start], f"epoch {epoch}"

    def end(self) -> None:
        """Whatever it does, it ends."""
        self.process.kill()
        self.process.join()
        self.process.close()
        for file in (self.stdin, self.stdout, self.stderr):
            with suppress(BrokenPipeError):
                file.close()


def broker_pid(group: str) -> int | None:
    """The broker of a group, if there is one."""
    try:
        sock = wire.connect(wire.socket_path(group))
    except OSError:
        return None
    with sock:
        return wire.peer(sock)[0]


def eventually(true: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait for something to become true; what it then is."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)
    return value


def workers_of(pid: int) -> list[int]:
    """The worker processes of a job."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in map(int, children):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()  # empty for one that is ending
            if command and b"coordlfs_loader.broker" not in command and b"resource_tracker" not in command:
                found.append(child)
        except OSError:
            pass
    return list(filter(is_alive, found))


def tell(**event: Any) -> None:
    """Tell the test."""
    print(json.dumps(event), flush=True)


def _steps(arguments: dict[str, Any]) -> Iterator[None]:
    while True:
        if arguments.get("step"):
            sys.stdin.readline()
        yield


def main(arguments: dict[str, Any]) -> None:
    """Be a job."""
    bad = {int(index): kind for index, kind in arguments.get("bad", {}).items()}
    dataset = Noise(arguments.get("length", 60), arguments.get("prepare", 0.0), arguments.get("side", 8), bad)
    names = ("stage_bytes", "patience", "num_workers")
    loader = CoordinatedLoader(
        dataset,
        arguments.get("batch_size", 4),
        shuffle=True,
        group=arguments["group"],
        identity="noise",  # the samples are the same, though some jobs fail at some of them
        **{name: arguments[name] for name in names if name in arguments},
    )
    steps = _steps(arguments)
    kept = []
    for _ in range(arguments.get("epochs", 1)):
        batches = iter(loader)
        tell(event="begin", epoch=loader.state_dict()["epoch"])
        while True:
            next(steps)
            epoch = loader.state_dict()["epoch"]
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as e:
                tell(event="raised", type=type(e).__name__, text=str(e))
                continue
            waited = time.monotonic() - began
            indices, hashed = digest(batch)
            if arguments.get("spoil"):
                batch[0].fill_(-1)  # a job may do with its tensors what it likes
            if arguments.get("keep"):
                kept.append((batch, hashed))
            tell(event="batch", epoch=epoch, indices=indices, hash=hashed, waited=waited)
            time.sleep(arguments.get("train", 0.0))
    if not arguments.get("spoil"):
        assert all(digest(batch)[1] == hashed for batch, hashed in kept)
    loader.close()
    tell(event="end")


def _be(arguments: dict[str, Any], *fds: int) -> None:
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    for handler in logging.root.handlers[:]:
        logging.root.removeHandler(handler)  # pytest's
    torch.set_num_threads(1)
    if "cgroup" in arguments:
        Path(arguments["cgroup"], "cgroup.procs").write_text("0")
    main(arguments)
    sys.stdout.flush()
