"""Buckets: cold epochs against obstore's own gets, warm ones against the bill, and one large object read in sequence.

The store is `coordlfs_tools.lab.buckets`, in a process of its own, with a delay added to each answer: what an object
store far away takes. It shares the machine with both sides, and so slows both down.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from coordlfs_tools.bench import dataset, reader
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.buckets import Bucket, StoredObject, serve
from coordlfs_tools.lab.errors import LabError

_FILES, _QUICK_FILES = 5_000, 500
_DIRECTORIES = 20
_SIZE = 110_000  # bytes
_LARGE, _QUICK_LARGE = 4 << 30, 64 << 20  # bytes
_DELAY, _FAR = 0.02, 0.1  # seconds to the first byte
_FAR_FILES = 2_000
_READERS, _HINTED = 8, 64  # of the library, against as many readers of a mount, and against one with hints
_ROUNDS = 3
_LIMIT = 300.0  # seconds
_MIB = 1 << 20

_GETS = """
import json, sys, threading, time
import obstore
from obstore.store import S3Store
given = json.load(sys.stdin)
store = S3Store("bucket", endpoint=given["endpoint"], skip_signature=True, client_options={"allow_http": True})
todo, lock = iter(given["parts"]), threading.Lock()
def run():
    while True:
        with lock:
            part = next(todo, None)
        if part is None:
            return
        key, first, end = part
        options = {"range": (first, end)} if end else None
        memoryview(obstore.get(store, key, options=options).bytes())
threads = [threading.Thread(target=run) for _ in range(given["threads"])]
begun, used = time.perf_counter(), time.process_time()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"seconds": time.perf_counter() - begun, "cpu": time.process_time() - used}))
"""

_HINTED_READS = """
import json, os, sys, time
from coordlfs_loader import HintedSampler
given = json.load(sys.stdin)
paths = given["paths"]
begun = time.perf_counter()
for index in HintedSampler(range(len(paths)), paths):
    file = os.open(paths[index], os.O_RDONLY)
    while os.read(file, 1 << 20): pass
    os.close(file)
print(json.dumps({"seconds": time.perf_counter() - begun}))
"""


class _Store:
    """A bucket that serves from a process of its own."""

    def __init__(self, endpoint: str, ours: Connection) -> None:
        self.endpoint = endpoint
        self._ours = ours

    def requests(self) -> dict[str, int]:
        """How many there were since this was asked last, by kind."""
        self._ours.send("requests")
        counts: dict[str, int] = self._ours.recv()
        return counts

    @property
    def options(self) -> list[str]:
        """For `coordlfs mount`."""
        given = (f"endpoint={self.endpoint}", "allow-http=true", "anonymous=true")
        return [word for option in given for word in ("--source-option", option)]


class _Periodic:
    """Bytes of which each 16 MiB are the same, that take up 32 MiB: ranges of up to 16 MiB can be had."""

    _PERIOD = 16 * _MIB

    def __init__(self, size: int) -> None:
        self._size = size
        self._twice = memoryview(random.Random(1).randbytes(self._PERIOD) * 2)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        first, end, _ = part.indices(self._size)
        at = first % self._PERIOD
        return self._twice[at : at + end - first]


def _serve(theirs: Connection, keys: list[str], size: int, delay: float) -> None:
    bucket = Bucket(delay=delay)
    data = random.Random(1).randbytes(min(size, 16 * _MIB))
    for key in keys:
        if size > len(data):
            bucket.objects[key] = StoredObject(_Periodic(size), etag='"periodic"')
        else:
            bucket.put(key, data)
    with serve(bucket):
        theirs.send(bucket.endpoint)
        while theirs.recv() == "requests":
            seen, bucket.requests = bucket.requests, []
            theirs.send({kind: sum(asked.kind == kind for asked in seen) for kind in ("LIST", "GET", "HEAD")})


@contextmanager
def _store(keys: list[str], size: int, delay: float) -> Iterator[_Store]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, keys, size, delay), daemon=True)
    process.start()
    try:
        if not ours.poll(_LIMIT):
            raise LabError("the store did not come up")
        yield _Store(ours.recv(), ours)
    finally:
        ours.send("end")
        process.join(10)


def _python(program: str, given: dict[str, Any]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(given), capture_output=True, text=True, timeout=_LIMIT
    )
    if done.returncode:
        raise LabError(f"a reader failed: {done.stderr.strip()[-500:]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def run(context: Context) -> list[Figure]:
    """Ratios of files/s, of processor time and of bytes/s, and requests by kind."""
    names = [f"{n % _DIRECTORIES:02}/{n:05}" for n in range(_QUICK_FILES if context.quick else _FILES)]
    figures = []
    with _store([f"set/{name}" for name in names], _SIZE, _DELAY) as store:
        figures += _cold(context, store, names)
        figures += _bill(context, store, names)
    far = names[: _QUICK_FILES // 2 if context.quick else _FAR_FILES]
    with _store([f"set/{name}" for name in far], _SIZE, _FAR) as store:
        figures += _hinted(context, store, far, _FAR)
    with _store([f"set/{name}" for name in names], _SIZE, 0.0) as store:
        figures += _processor_time(context, store, names)
    with _store(["set/large"], _QUICK_LARGE if context.quick else _LARGE, _DELAY) as store:
        figures += _large(context, store, _QUICK_LARGE if context.quick else _LARGE)
    return figures


def _listed(mount: mounts.Mount) -> None:
    for _ in os.walk(mount.point):
        pass


def _gets(store: _Store, names: list[str], threads: int) -> dict[str, float]:
    parts = [(f"set/{name}", 0, 0) for name in names]
    return _python(_GETS, {"endpoint": store.endpoint, "parts": parts, "threads": threads})


def _mounted(store: _Store, cache: int) -> Any:
    return mounts.coordlfs("s3://bucket/set", cache, options=store.options)


def _cold(context: Context, store: _Store, names: list[str]) -> list[Figure]:
    def readers(seed: int) -> float:
        with _mounted(store, 2 * _SIZE * len(names)) as mount:
            _listed(mount)
            return reader.read(mount.point, names, _READERS, seed).files_per_second

    sides = {f"obstore, {_READERS} threads": _library(store, names, _READERS), f"{_READERS} readers": readers}
    few, ours = alternate(context, context.rounds(_ROUNDS), sides).values()
    what = f"cold epoch of a bucket, {_DELAY * 1000:.0f} ms: {_READERS} readers ÷ obstore's {_READERS} threads, files/s"
    return [_compared(what, ours, few, 0.9), *_hinted(context, store, names, _DELAY)]


def _library(store: _Store, names: list[str], threads: int) -> Callable[[int], float]:
    return lambda seed: len(names) / _gets(store, names, threads)["seconds"]


def _hinted(context: Context, store: _Store, names: list[str], delay: float) -> list[Figure]:
    """Far away it shows whether hints hide the delay, and near what each object costs the processor."""
    used: list[float] = []

    def hinted(seed: int) -> float:
        order = random.Random(seed).sample(names, len(names))
        with _mounted(store, 2 * _SIZE * len(names)) as mount:
            _listed(mount)
            paths = [str(mount.point / name) for name in order]
            pids = [mount.status()["processes"]["server"], *mount.status()["processes"]["keepers"]]
            before = sum(map(_used, pids))
            seconds = _python(_HINTED_READS, {"paths": paths})["seconds"]
            used.append((sum(map(_used, pids)) - before) / len(names) * 1000)
            return len(names) / seconds

    sides = {f"obstore, {_HINTED} threads": _library(store, names, _HINTED), "1 reader, hints": hinted}
    many, ahead = alternate(context, context.rounds(_ROUNDS), sides).values()
    text = f"cold epoch of a bucket, {delay * 1000:.0f} ms: 1 reader with hints"
    return [
        _compared(f"{text} ÷ obstore's {_HINTED} threads, files/s", ahead, many, 0.9),
        Figure(f"{text}: processor time of server and keepers for each object, ms", used, None),
    ]


def _compared(what: str, ours: list[float], theirs: list[float], bound: float) -> Figure:
    sides = f"{median(ours):,.0f} ÷ {median(theirs):,.0f}"
    return Figure(what, ratios(ours, theirs), Bound(bound, at_least=True), sides)


def _bill(context: Context, store: _Store, names: list[str]) -> list[Figure]:
    store.requests()
    with _mounted(store, 2 * _SIZE * len(names)) as mount:
        _listed(mount)
        reader.read(mount.point, names, _READERS, 0)
        mount.settled()
        cold = store.requests()
        seconds = [reader.read(mount.point, names, _READERS, seed).seconds for seed in range(3)]
        warm = store.requests()
    return [
        Figure("the bill of a cold epoch: GETs ÷ files", [cold["GET"] / len(names)], Bound(1.0)),
        Figure(
            "… LISTs ÷ (keys ÷ 1000 + directories)",
            [cold["LIST"] / (len(names) / 1000 + _DIRECTORIES + 2)],
            Bound(1.0),
            f"{cold['LIST']} LIST, {cold['HEAD']} HEAD",
        ),
        Figure("the bill of three warm epochs: requests", [float(sum(warm.values()))], Bound(0)),
        Figure("warm epochs, files/s", [len(names) / each for each in seconds], None),
    ]


def _processor_time(context: Context, store: _Store, names: list[str]) -> list[Figure]:
    def library(seed: int) -> float:
        return _gets(store, names, _READERS)["cpu"] / len(names) * 1000

    local = dataset.equal(context.directory, len(names), _SIZE)
    local_names = sorted(os.listdir(local))

    def misses(mount: mounts.Mount, names: list[str], seed: int) -> float:
        _listed(mount)
        pid = mount.status()["processes"]["server"]
        before = _used(pid)
        reader.read(mount.point, names, _READERS, seed)
        return (_used(pid) - before) / len(names) * 1000

    def server(seed: int) -> float:
        with _mounted(store, 0) as mount:
            return misses(mount, names, seed)

    def directory(seed: int) -> float:
        for name in local_names:
            (local / name).read_bytes()  # from the page cache, from then on
        with mounts.coordlfs(local, 0) as mount:
            return misses(mount, local_names, seed)

    found = alternate(
        context, context.rounds(_ROUNDS), {"obstore": library, "server": server, "of a directory": directory}
    )
    theirs, ours, plain = found.values()
    sides = f"{median(ours):.3f} ÷ {median(theirs):.3f} ms"
    what = "no delay, no cache: the server's processor time ÷ obstore's own, for each object"
    least = [a + b for a, b in zip(theirs, plain, strict=True)]
    return [
        Figure(what, ratios(ours, theirs), Bound(1.5), sides),
        Figure("… a miss of a directory in the page cache, which is FUSE's part, and no GIL: ms", plain, None),
        Figure("… the least that it can be with obstore: both ÷ obstore's own", ratios(least, theirs), None),
    ]


def _used(pid: int) -> float:
    """Seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _large(context: Context, store: _Store, size: int) -> list[Figure]:
    def library(step: int, threads: int) -> Callable[[int], float]:
        parts = [("set/large", first, min(first + step, size)) for first in range(0, size, step)]
        given = {"endpoint": store.endpoint, "parts": parts, "threads": threads}
        return lambda seed: size / _MIB / _python(_GETS, given)["seconds"]

    def sequential(seed: int) -> float:
        with _mounted(store, 0) as mount, open(mount.point / "large", "rb", buffering=0) as large:
            begun = time.perf_counter()
            while large.read(_MIB):
                pass
            return size / _MIB / (time.perf_counter() - begun)

    sides = {"obstore, 8 × 8 MiB": library(8 * _MIB, 8), "mount, in sequence": sequential}
    theirs, ours = alternate(context, context.rounds(_ROUNDS), sides).values()
    return [
        _compared("a large object in sequence ÷ obstore's ranges, 8 at a time, MiB/s", ours, theirs, 0.85),
        *_random(context, store, size),
    ]


def _random(context: Context, store: _Store, size: int) -> list[Figure]:
    """Bytes that random reads of 128 KiB cost, by the items that they touch."""
    places = random.Random(3).sample(range(size // _MIB), min(24, size // _MIB // 4))
    with _mounted(store, 0) as mount, open(mount.point / "large", "rb", buffering=0) as large:
        os.posix_fadvise(large.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in places:
            large.seek(place * _MIB)
            large.read(128 << 10)
        received = mount.status()["source"]["requests"]["bytes"]
    items = len({place // 16 for place in places})
    what = "random reads of 128 KiB: bytes received ÷ bytes of the items touched"
    return [Figure(what, [received / (items * 16 * _MIB)], Bound(1.0))]
