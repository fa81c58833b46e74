"""What a soak does to a mount, its source and its machine: a thread for each kind of fault, until it is stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from coordlfs_tools.lab import damage
from coordlfs_tools.lab.cgroups import Cgroup
from coordlfs_tools.lab.faulty_fs import Faulty
from coordlfs_tools.lab.mounts import command
from coordlfs_tools.soak.dataset import Dataset, Fate, fate, name
from coordlfs_tools.soak.ledger import ANY, Ledger
from coordlfs_tools.soak.target import Target

from coordlfs.commands import client
from coordlfs.errors import UserError

KINDS = ("kills", "restarts", "changes", "errors", "memory", "caches", "disk")
NOTICED = 5.0  # seconds after `coordlfs refresh` in which what it found has reached every reader
_NOTICED_WITHIN = 60.0  # seconds in which a refresh must succeed, whoever is killed meanwhile
_SELDOM, _OFTEN = 2.0, 20.0  # times a second that files are changed
_HARD = (errno.EIO, errno.EACCES, errno.ENOMEM, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODATA)
_PASSING = (errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)

_STORE = frozenset({"index", "names", "data"})  # the files that are damaged

_HOG = """
import sys, time
held = []
for _ in range(int(sys.argv[1])):
    held.append(b"x" * (8 << 20))
    time.sleep(0.1)
time.sleep(3)
"""


class Faults:
    """The threads. `counts` says how often each thing was done; `problems` what failed that may not."""

    def __init__(
        self,
        targets: Sequence[Target],
        ledger: Ledger,
        dataset: Dataset,
        faulty: Faulty | None,
        group: tuple[Cgroup, int] | None,
        tiers: Path | None,
        kinds: Sequence[str],
        seed: int,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._targets = targets
        self._ledger = ledger
        self._dataset = dataset
        self._faulty = faulty
        self._group = group
        self._tiers = tiers
        self._kinds = kinds
        self._seed = seed
        self._stop = threading.Event()
        bodies: dict[str, Callable[[Random], None]] = {
            "kills": self._kills,
            "changes": self._changes,
            "errors": self._errors,
            "memory": self._memory,
            "caches": self._caches,
            "disk": self._disk,
        }
        self._threads = [
            threading.Thread(target=self._run, args=(kind, body), name=kind)
            for kind, body in bodies.items()
            if kind in kinds
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, and undo what was done."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, kind: str, body: Callable[[Random], None]) -> None:
        try:
            body(Random(f"{kind} {self._seed}"))
        except Exception as e:
            self.problems.append(f"{kind}: {''.join(traceback.format_exception(e, limit=-2)).strip()}")

    # -- processes ----------------------------------------------------------------------------------------------

    def _kills(self, random: Random) -> None:
        while not self._stop.wait(random.expovariate(1 / random.choice([0.1, 1.0, 2.0]))):
            target = random.choice(self._targets)
            what = random.choices(["server", "keeper", "both", "restart"], [60, 25, 10, 5])[0]
            if what == "restart":
                if "restarts" in self._kinds:
                    command("restart", target.point)
                    self.counts["restarts"] += 1
                continue
            for victim in ("keeper", "server"):
                if what in (victim, "both"):
                    self._kill(target, victim)

    def _kill(self, target: Target, victim: str) -> None:
        for pid in target.processes(victim):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.counts[f"kills of {victim}s"] += 1

    # -- the source ---------------------------------------------------------------------------------------------

    def _changes(self, random: Random) -> None:
        rate = _OFTEN if set(self._kinds) <= {"changes", "kills"} else _SELDOM
        while not self._stop.wait(random.expovariate(rate)):
            files = [self._dataset.change() for _ in range(random.randrange(1, 4))]
            self.counts["changes"] += len(files)
            for target in self._targets:
                self._notice(target, files, random)
            for file in files:
                self._ledger.settle(file, NOTICED)

    def _notice(self, target: Target, files: list[int], random: Random) -> None:
        """Have a mount told: of these files or of everything."""
        deadline = time.monotonic() + _NOTICED_WITHIN
        everything = random.random() < 0.5
        while True:
            try:
                client.refresh(str(target.point), [] if everything else [str(target.point / name(f)) for f in files])
            except UserError as e:
                said = e
            else:
                if "kills" in self._kinds and random.random() < 0.4:
                    time.sleep(random.uniform(0, 0.05))  # what was promised is about to be done
                    self._kill(target, "server")
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"refresh of {target.point}: {said}")
            everything = True  # a file that was deleted has no path any more
            self.counts["refreshes again"] += 1
            time.sleep(0.1)

    def _errors(self, random: Random) -> None:
        """Errors that readers are to see, errors that they must not see, delays, and a file system that goes away."""
        assert self._faulty is not None
        failing = [f for f in range(self._dataset.count) if fate(f) is Fate.FAILING]
        steady = [f for f in range(self._dataset.count) if fate(f) is Fate.STEADY]
        while not self._stop.wait(random.expovariate(1.0)):
            what = random.choices(["hard", "passing", "delay", "gone"], [10, 10, 5, 1])[0]
            if what == "hard":
                file, code = random.choice(failing), random.choice(_HARD)
                self._ledger.fail(file, code)
                self._faulty.set(f"{random.choice(['read', 'open', 'lookup'])} {name(file)}", errno=code)
                self._stop.wait(random.uniform(0.5, 2))
                self._faulty.clear()
                self._ledger.mend(file, NOTICED)
                failing.append(failing.pop(failing.index(file)))  # the ledger knows one error of a file at a time
            elif what == "passing":
                verb = random.choice(["read", "open", "lookup"])
                self._faulty.set(f"{verb} {name(random.choice(steady))}", errno=random.choice(_PASSING), times=2)
                self._stop.wait(1)
                self._faulty.clear()
            elif what == "delay":
                self._faulty.set(f"read {name(random.choice(steady))}", delay=3)
                self._stop.wait(1)
                self._faulty.clear()
            else:
                self._go_away()
            self.counts[f"source: {what}"] += 1

    def _go_away(self) -> None:
        assert self._faulty is not None
        for file in range(self._dataset.count):
            self._ledger.fail(file, ANY)
        self._faulty.kill()
        self._stop.wait(0.5)
        self._faulty.detach()
        self._stop.wait(0.5)
        self._faulty.restart()
        for file in range(self._dataset.count):
            self._ledger.mend(file, NOTICED)
        self._stop.wait(NOTICED)

    # -- the machine --------------------------------------------------------------------------------------------

    def _memory(self, random: Random) -> None:
        """Another process of the mounts' memory cgroup takes memory, step by step, so that the cache has to give."""
        assert self._group is not None
        group, spare = self._group
        while not self._stop.wait(random.uniform(5, 15)):
            steps = int(spare * random.uniform(0.6, 1)) >> 23
            hog = subprocess.Popen([sys.executable, "-c", _HOG, str(steps)], preexec_fn=group.enter)
            try:
                while hog.poll() is None and not self._stop.wait(0.1):
                    pass
            finally:
                hog.kill()
                hog.wait()
            self.counts["memory pressure"] += 1
            if hog.returncode not in (0, -signal.SIGKILL) or (hog.returncode and not self._stop.is_set()):
                self.problems.append(f"who took memory beside the cache ended with {hog.returncode}")

    def _caches(self, random: Random) -> None:
        while not self._stop.wait(random.expovariate(1 / 4)):
            Path("/proc/sys/vm/drop_caches").write_text(random.choice("123"))
            self.counts["caches dropped"] += 1

    def _disk(self, random: Random) -> None:
        """The file system of the disk tiers is damaged, filled up and emptied, under the mounts."""
        assert self._tiers is not None
        while not self._stop.wait(random.expovariate(1 / 2)):
            what = random.choices(["damaged", "full", "cut", "removed"], [10, 3, 2, 2])[0]
            if what == "full":
                self._fill(self._tiers.parent / "others", random)
            elif files := [file for file in self._tiers.glob("*/*") if file.name in _STORE]:
                with suppress(FileNotFoundError):
                    self._harm(what, files, random)
            self.counts[f"disk: {what}"] += 1

    @staticmethod
    def _harm(what: str, files: list[Path], random: Random) -> None:
        if what == "damaged":
            for _ in range(10):
                random.choice(damage.INSIDE)(random.choice(files), random)
        elif what == "cut":
            random.choice(damage.ENDS)(random.choice(files), random)
        else:  # the next server makes a new store
            for file in random.choice(files).parent.iterdir():
                file.unlink()

    def _fill(self, file: Path, random: Random) -> None:
        """Somebody else takes all the room that is there, for a while."""
        try:
            with open(file, "wb", buffering=0) as f, suppress(OSError):
                while not self._stop.is_set():
                    f.write(bytes(1 << 20))
            self._stop.wait(random.uniform(1, 5))
        finally:
            file.unlink()
