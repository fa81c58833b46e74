"""A soak from beginning to end: mounts, readers, faults, someone who watches for hangs, and the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from coordlfs_tools.lab.cgroups import cgroup
from coordlfs_tools.lab.disks import file_system
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.faulty_fs import served
from coordlfs_tools.lab.machine import disk_of
from coordlfs_tools.lab.mounts import command
from coordlfs_tools.lab.processes import doing
from coordlfs_tools.soak import readers
from coordlfs_tools.soak.dataset import Dataset
from coordlfs_tools.soak.faults import Faults
from coordlfs_tools.soak.ledger import Ledger
from coordlfs_tools.soak.target import Target, end, mounted

_BESIDE_CACHE = 400 << 20  # bytes of the memory cgroup for processes, and for pages that readers brought
_DISK_SHARE = 0.3  # of the dataset, for a disk tier: so something is left that is in neither
_BESIDE_TIERS = 32 << 20  # bytes of their file system for itself, and for others
_WORKERS = 2  # of the DataLoader
_TELL = 15.0  # seconds
_ENOUGH = 50  # reads that went wrong, after which there is no use in going on
# Of a log: all that no kill explains. That processes keep dying is said of those that are killed.
_WORRYING = re.compile(
    r"level=CRITICAL(?!.*(keepers keep dying|cannot be kept running))|Traceback|exception=|ended with status [1-9]"
)


@dataclass(frozen=True, slots=True)
class Options:
    """See `python -m coordlfs_tools.soak --help`. A limit of None is none."""

    directory: Path
    minutes: float | None
    kills: int | None
    seed: int
    faults: tuple[str, ...]
    files: int
    readers: int
    loader: bool
    hang: float  # seconds

    @property
    def kept(self) -> Path:
        """A file that takes, a line of JSON each, all that is to be known of reads that went wrong."""
        return self.directory / f"coordlfs-soak-{self.seed}.jsonl"


@dataclass(slots=True)
class Outcome:
    """What was done and seen. `problems` is empty if all went well."""

    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    epochs: int = 0
    files: int = 0
    nbytes: int = 0
    wrong: int = 0
    errors: int = 0
    expected: int = 0  # errors that a fault explains
    hangs: int = 0
    longest: float = 0.0
    source_per_epoch: dict[str, float] = field(default_factory=dict)  # bytes, by mount
    from_disk: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # bytes and damaged blocks, by mount with a tier
    dataset: int = 0
    cache: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether no job would have noticed anything."""
        return not (self.wrong or self.errors or self.hangs or self.problems)


class Soak:
    """One run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.outcome = Outcome()
        self._readers: list[subprocess.Popen[bytes]] = []

    def run(self) -> Outcome:
        """Do all of it. Raises LabError where the machine lacks something."""
        o = self.options
        with ExitStack() as stack:
            place = Path(tempfile.mkdtemp(prefix="coordlfs-soak-", dir=o.directory)).resolve()
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            for directory in ("source", "beside"):
                (place / directory).mkdir()
            per_mount = o.readers + (_WORKERS + 1 if o.loader else 0)
            ledger = Ledger(place / "ledger", o.files, 2 * per_mount)
            dataset = Dataset(place / "source", place / "beside", o.files, ledger, o.seed)
            self.outcome.dataset = dataset.make()
            self.outcome.cache = cache = int(self.outcome.dataset * 0.6)
            group = None
            if "memory" in o.faults:
                memory = 2 * cache + _BESIDE_CACHE
                group = stack.enter_context(cgroup(disk_of(place), memory=memory)), cache + _BESIDE_CACHE // 2
            faulty = None
            sources = [place / "source"]
            if "errors" in o.faults:
                faulty = stack.enter_context(served(place / "source", place))
                sources.append(faulty.path)
            tiers, disk = None, int(self.outcome.dataset * _DISK_SHARE)
            if "disk" in o.faults:
                tiers = (
                    stack.enter_context(file_system(place / "tiers", "ext4", len(sources) * disk + _BESIDE_TIERS))
                    / "cache"
                )
            have_tier = _by_lot(len(sources), o.seed)
            targets = [
                stack.enter_context(
                    mounted(
                        source,
                        place / f"mount{number}",
                        cache,
                        ["--revalidate", "5s", "--metrics", "0"],
                        fails=number > 0,
                        group=group and group[0],
                        tier=(tiers, disk) if tiers is not None and number in have_tier else None,
                    )
                )
                for number, source in enumerate(sources)
            ]
            faults = Faults(targets, ledger, dataset, faulty, group, tiers, o.faults, o.seed)
            self._soak(targets, ledger, faults, place)
            self._finish(targets, ledger, faults)
        return self.outcome

    def _soak(self, targets: list[Target], ledger: Ledger, faults: Faults, place: Path) -> None:
        began = told = time.monotonic()
        with self._reading(targets, ledger, place):
            faults.start()
            try:
                while not self._enough(time.monotonic() - began, faults) and not faults.problems:
                    time.sleep(0.2)
                    if self._looks_bad(targets, ledger):
                        break
                    if time.monotonic() - told > _TELL:
                        told = time.monotonic()
                        self._tell(told - began, ledger, faults)
            finally:
                faults.stop()
            ledger.stop()
            deadline = time.monotonic() + self.options.hang
            while any(r.poll() is None for r in self._readers) and time.monotonic() < deadline:
                if self._looks_bad(targets, ledger):
                    break
                time.sleep(0.05)
        self.outcome.seconds = time.monotonic() - began

    def _enough(self, seconds: float, faults: Faults) -> bool:
        o, done = self.options, faults.counts
        killed = o.kills is not None and done["kills of servers"] >= o.kills and done["kills of keepers"] >= o.kills / 4
        return killed or (o.minutes is not None and seconds > o.minutes * 60)

    @contextmanager
    def _reading(self, targets: list[Target], ledger: Ledger, place: Path) -> Iterator[None]:
        o = self.options
        index = 0
        per_mount = o.readers + (_WORKERS + 1 if o.loader else 0)
        for target in targets:
            for number in range(o.readers + o.loader):
                workers = _WORKERS if number == o.readers else 0
                settings = readers.Settings(
                    *(str(target.point), str(place / "ledger"), o.files, len(targets) * per_mount, index, o.seed),
                    *(target.fails, o.hang, workers, str(target.log), str(o.kept)),
                )
                argv = [sys.executable, "-m", readers.__name__, json.dumps(asdict(settings))]
                self._readers.append(subprocess.Popen(argv, start_new_session=True))
                index += 1 + workers
        try:
            yield
        finally:
            for process in self._readers:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
            for process in self._readers:
                process.wait()

    def _looks_bad(self, targets: list[Target], ledger: Ledger) -> bool:
        """Whether a reader hangs or has died; what it does is told, and the mounts are ended."""
        bad = False
        for index, file, seconds in ledger.waiting():
            if seconds > self.options.hang:
                self.outcome.hangs += 1
                self.outcome.problems.append(f"reader {index} has waited for file {file:04} for {seconds:.0f} s")
                bad = True
        for process in self._readers:
            if process.poll():
                self.outcome.errors += 1
                self.outcome.problems.append(f"a reader ended with {process.returncode}")
                bad = True
        if ledger.total("wrong") + ledger.total("errors") > _ENOUGH:
            bad = True
        if self.outcome.hangs:
            self.outcome.problems += [
                f"process {pid}: {doing(pid)}"
                for t in targets
                for pid in (*t.processes("server"), *t.processes("keeper"))
            ]
            for target in targets:
                end(target.supervisor, target.point)
        return bad

    def _tell(self, seconds: float, ledger: Ledger, faults: Faults) -> None:
        done = ", ".join(f"{count} {what}" for what, count in sorted(faults.counts.items()))
        print(
            f"{seconds:5.0f} s: {ledger.total('epochs')} epochs, {ledger.total('files')} files read,"
            f" {ledger.total('wrong')} wrong, {ledger.total('errors')} errors, longest {ledger.longest():.1f} s;"
            f" {done}",
            flush=True,
        )

    def _finish(self, targets: list[Target], ledger: Ledger, faults: Faults) -> None:
        """Count, and see that the mounts are as good as ever."""
        out = self.outcome
        out.counts, out.problems = dict(faults.counts), out.problems + faults.problems
        for figure in ("epochs", "files", "wrong", "expected"):
            setattr(out, figure, ledger.total(figure))
        out.nbytes, out.longest = ledger.total("bytes"), ledger.longest()
        out.errors += ledger.total("errors")
        if out.hangs:
            return
        for target in targets:
            try:
                self._see(target, ledger)
            except (LabError, subprocess.TimeoutExpired) as e:
                out.problems.append(str(e))
            log = target.log.read_text(errors="replace")
            out.problems += [f"log of {target.point}: {line}" for line in log.splitlines() if _WORRYING.search(line)]

    def _see(self, target: Target, ledger: Ledger) -> None:
        command("refresh", target.point)
        time.sleep(1)
        figures = target.status()
        epochs = ledger.total("epochs") / (2 if self.options.faults and "errors" in self.options.faults else 1)
        if epochs:
            self.outcome.source_per_epoch[target.point.name] = figures["source"]["bytes"] / epochs
        if tier := figures["disk"]:
            self.outcome.from_disk[target.point.name] = tier["bytes"], tier["bad_blocks"]
            if tier["taken_bytes"] > target.disk:
                self.outcome.problems.append(f"a disk tier of {target.disk} bytes takes {tier['taken_bytes']}")
        command("verify", target.point)
        command("umount", target.point)
        if target.is_mounted():
            self.outcome.problems.append(f"{target.point} is still mounted")


def _by_lot(mounts: int, seed: int) -> set[int]:
    """Which mounts have a disk tier: one at least."""
    random = Random(f"tiers {seed}")
    return {random.randrange(mounts), *(number for number in range(mounts) if random.random() < 0.5)}
