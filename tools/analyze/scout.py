"""The first, short run of a command: what its loader is, where and how large its data is, how long an iteration takes.

Raises UserError where there is nothing in the command that could be measured.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from coordlfs_tools.analyze.hook.coordlfs_stall_hook.config import Section
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.sources import TorchLoader
from coordlfs_tools.analyze.hook.coordlfs_stall_hook.watch import LOADERS
from coordlfs_tools.analyze.runs import Ran, Tick, run
from coordlfs_tools.storage.files import File, drop, listed, resident_bytes
from coordlfs_tools.storage.measure import mounted_on

from coordlfs.errors import UserError

_SECTION = Section("scout", skip=2, count=10, last=True)
_FEW = 10  # files: what they weigh tells more than how many they are
_SETTINGS = 1 << 20  # bytes: a few files with less than that are not what a job trains on
_WEIGHTS = {".safetensors", ".ckpt", ".gguf", ".onnx"}  # of models
_MOST = 0.9  # of the files that were opened: the directory that has so many of them has the data
_NEAR = 0.1  # what the page cache got and what the opened files have are the same then
_ALL = 0.05  # as many files as samples, but for this share: one file is one sample


@dataclass(frozen=True, slots=True)
class Scouted:
    """The measured loader, as rank 0 has it, all loaders, and the data."""

    kind: str
    workers: int
    queue: int
    again: bool  # it can be begun again with the same samples
    batch: int
    batches: int | None  # in an epoch of one process
    samples: int | None  # the same
    seconds: float  # of one iteration
    startup: float
    ranks: int
    processes: int  # on this machine
    loaders: list[dict[str, Any]]
    versions: dict[str, str]
    directory: Path | None
    files: list[File]
    sample_bytes: float  # 0: unknown
    notes: list[str]


def scout(command: Sequence[str], data: Path | None, loader: int | None, tick: Tick) -> Scouted:
    """Run the command for a few iterations."""
    found: list[str] = []
    if data is None:
        ran = run(command, [_SECTION], loader=loader, opens=True, tick=tick)
        check(ran, [_SECTION])
        data, files = where_opened(ran, found)
    else:
        data = data.resolve()
        files = listed(data)
    if data is not None:
        not_a_mount(data)
        # Only the page cache tells what native code reads, and of a large file: it must not have it before.
        dropped = drop(files).cold
        ran = run(command, [_SECTION], data=data, loader=loader, opens=True, tick=tick)
    result = check(ran, [_SECTION])
    source, section = result["source"], result["sections"][_SECTION.name]
    batch = source["batch"] or max(round(section["samples"] / section["iterations"]), 1)
    notes = _notes(ran, result) + found
    read = sum(r["handed"] * batch for r in ran.measured)
    seen = resident_bytes(files) if data and dropped else None
    samples = source["samples"] and source["samples"] * result["ranks"]
    size = _sample_bytes(data, files, ran, seen, read, samples, notes)
    if size and not source["exact"]:
        notes.append("what the loader read ahead is counted with the samples that it handed out: they may be smaller")
    seconds = section["seconds"] / section["iterations"]
    return Scouted(
        kind=result["kind"],
        workers=source["workers"],
        queue=source["queue"],
        again=source["again"],
        batch=batch,
        batches=source["batches"],
        samples=source["samples"],
        seconds=seconds,
        startup=max(ran.seconds - seconds * result["handed"], 0.0),
        ranks=result["ranks"],
        processes=len(ran.measured),
        loaders=result["loaders"],
        versions=result["versions"],
        directory=data,
        files=files,
        sample_bytes=size,
        notes=notes,
    )


def check(ran: Ran, sections: Sequence[Section]) -> dict[str, Any]:
    """The result of the first rank whose loader was measured. Raises UserError if one lacks a section, or is odd."""
    for result in ran.results:
        if result.get("exhausted"):
            raise UserError(
                f"the dataset is smaller than a measurement needs: the loader ended after {result['handed']} "
                f"minibatches, in the part {result['exhausted']!r}; give fewer --iterations or more data"
            )
        if any(2 * section["measured"] < section["iterations"] for section in result.get("sections", {}).values()):
            raise UserError(
                "the command begins its loader anew for almost every minibatch, so that no loop can be timed: "
                "mark it with coordlfs_tools.analyze.analyzer.iteration()"
            )
    if not ran.results:
        why = "" if ran.hooked else " (no Python started in it, or one with -I, -E or -S)"
        raise UserError(
            f"the command used no loader{why}; looked for: {', '.join(LOADERS)}. Have it iterate over another one "
            "with coordlfs_tools.analyze.analyzer.batches(LOADER)"
        )
    if not any(result["measured"] for result in ran.results):
        seen = [seen for result in ran.results for seen in result["loaders"]]
        names = ", ".join(f"{each['number']} ({each['dataset'] or each['kind']})" for each in seen)
        raise UserError(f"no loader was used for training, with gradients, or as --loader says; there were: {names}")
    if not ran.measured or any(section.name not in r["sections"] for r in ran.measured for section in sections):
        handed = max((result.get("handed", 0) for result in ran.results), default=0)
        wanted = sum(section.skip + section.count for section in sections if not section.drain)
        raise UserError(
            f"the command ended by itself after {handed} of the {wanted} iterations that are needed: "
            "let it train longer, or give fewer --iterations"
        )
    return ran.measured[0]


def _notes(ran: Ran, result: dict[str, Any]) -> list[str]:
    notes = []
    if result["kind"] != TorchLoader.KIND:
        notes.append(f"the loop is measured as {result['kind']}")
    if len(ran.measured) < result["ranks"]:
        notes.append(f"{len(ran.measured)} of the {result['ranks']} ranks were measured: the others had no loader here")
    return notes


def not_a_mount(data: Path) -> None:
    """Raises UserError for data on a coordlfs mount: what it keeps in memory cannot be made cold."""
    fstype, source = mounted_on(data)
    if fstype == "fuse.coordlfs":
        raise UserError(
            f"the data in {data} is on a coordlfs mount, whose cache stays warm: "
            f"give the source and have the command read it: --data {source}",
            2,
        )


def where_opened(ran: Ran, notes: list[str]) -> tuple[Path | None, list[File]]:
    """The deepest directory that has almost all of the files which were opened; of the bytes, if there are few files.

    Those that are open or mapped count, too, for native code opens files without a word.
    """
    packages = tuple({package for result in ran.results for package in result.get("packages", ())})
    opened = {path for path in ran.opened if not path.startswith(packages)} | ran.held
    sizes = {Path(path): os.path.getsize(path) for path in opened if os.path.isfile(path)}
    data = {path: size for path, size in sizes.items() if path.suffix not in _WEIGHTS} or sizes
    few = len(data) < _FEW
    weights = data if few else dict.fromkeys(data, 1)
    counts: Counter[Path] = Counter()
    for path, weight in weights.items():
        for parent in path.parents:
            counts[parent] += weight
    found = [parent for parent, count in counts.items() if count >= _MOST * sum(weights.values())]
    best = max(found, key=lambda parent: len(parent.parts), default=Path("/"))
    settings_only = few and sum(data.values()) < _SETTINGS
    if settings_only or best in (Path("/"), Path("/tmp"), Path("/var/tmp"), Path.home(), Path(gettempdir())):
        notes.append("where the data lies was not seen: give it with --data DIR to have storage measured")
        return None, []
    notes.append(f"the data was seen to lie in {best} (no --data was given)")
    return best, listed(best)


def _sample_bytes(
    data: Path | None,
    files: Sequence[File],
    ran: Ran,
    seen: int | None,
    read: int,
    samples: int | None,
    notes: list[str],
) -> float:
    """Bytes that one of the `read` samples is; `seen` are those that were read, if the page cache could be asked.

    Whole files, if what was opened is what was read. Never so much that the `samples` of an epoch were more than the
    directory has. Raises UserError if nothing of `data` was read.
    """
    if data is None:
        return 0.0
    total = sum(file.size for file in files)
    opened = _identities(ran.opened)
    named = [file for file in files if _identity(file.path) in opened]
    whole = sum(file.size for file in named)
    if not whole and not seen and not ran.held:
        raise UserError(f"the command read nothing from {data}: give the directory that it trains from")
    one_each = samples and len(named) == read and abs(len(files) - samples) <= _ALL * samples
    if seen and abs(seen - whole) > _NEAR * seen:
        notes.append("what a sample is read as is not what the files weigh that were opened: the page cache tells")
        size = seen / read
    elif one_each and not ran.held:
        size = total / len(files)  # better than a few of them
    elif ran.held and not seen and samples:
        notes.append("what is read of files that stay open could not be seen: an epoch is taken to read all of them")
        size = total / samples
    else:
        size = whole / read
    if samples and size * samples > total:
        size = total / samples  # of a mapped file, readahead; of samples that share files, the same bytes again
    return min(size, float(total))


def _identity(path: str) -> tuple[int, int] | None:
    """Of the file, whatever name it is called by; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _identities(paths: Iterable[str]) -> set[tuple[int, int]]:
    return {identity for path in set(paths) if (identity := _identity(path))}
