"""What `coordlfs doctor s3://…` says of a bucket: whether it can be listed and read, and what a request takes.

It asks for one small object a few hundred times, and for nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING

from coordlfs.commands import buckets
from coordlfs.commands.check import Check, State
from coordlfs.errors import UserError
from coordlfs.kernel import paths
from coordlfs.sources.address import Address, Options

if TYPE_CHECKING:
    from coordlfs.sources.objects.names import Entry
    from coordlfs.sources.objects.source import ObjectSource

_ALONE = 5  # requests one after the other
_AT_A_TIME = (8, 32, 128)
_ROUNDS = 3  # requests of each of them
_LARGEST = 1 << 20  # bytes of an object that are asked for
_DEEPEST = 16  # directories on the way to an object
_HELPS = 1.2  # times as many requests a second, for more of them to be worth it


def examine(address: Address, options: Options) -> Iterator[Check]:
    """What was found, one thing after the other, as far as it goes."""
    name = str(address)
    try:
        buckets.check(address, options)
        source = buckets.opened(address, options, tried_for=0.0)
    except UserError as e:
        yield Check(name, State.MISSING, str(e), "it cannot be mounted", "as it says", True)
        return
    yield Check(name, State.OK, "can be listed")
    try:
        found = _first_object(source)
        if found is None:
            yield Check("reading an object", State.WARNING, "there is none on the way to the first directories")
            return
        path, entry = found
        seconds = [_get(source, path, entry) for _ in range(_ALONE)]
    except OSError as e:
        remedy = "give these credentials the right to get objects, and not only to list them"
        yield Check("reading an object", State.MISSING, e.strerror or str(e), "nothing can be read", remedy, True)
        return
    size = min(entry.size, _LARGEST)
    yield Check("reading an object", State.OK, f"{median(seconds) * 1000:.0f} ms for {size:,} bytes, one at a time")
    yield _in_flight(source, path, entry, 1 / median(seconds))


def _first_object(source: ObjectSource) -> tuple[bytes, Entry] | None:
    """The first object with bytes that is met on the way down."""
    path = b""
    for _ in range(_DEEPEST):
        directory, below = source.tree.directory(path), None
        for name in directory.names:
            entry = directory.find(name)
            assert entry is not None
            inside = paths.join(path, name)
            if entry.size > 0:
                return inside, entry
            if entry.is_directory:
                below = below or inside
        if below is None:
            return None
        path = below
    return None


def _get(source: ObjectSource, path: bytes, entry: Entry) -> float:
    """Seconds that the beginning of an object takes. Raises OSError."""
    begun = time.perf_counter()
    source.store.get(source.tree.key(path), entry, 0, min(entry.size, _LARGEST))
    return time.perf_counter() - begun


def _in_flight(source: ObjectSource, path: bytes, entry: Entry, alone: float) -> Check:
    rates = {1: alone}
    for count in _AT_A_TIME:
        with ThreadPoolExecutor(count) as pool:
            begun = time.perf_counter()
            try:
                for done in [pool.submit(_get, source, path, entry) for _ in range(_ROUNDS * count)]:
                    done.result()
            except OSError as e:
                found = f"{count} at a time are refused: {e.strerror}"
                return Check(
                    "requests in flight", State.WARNING, found, "a slower first epoch", "ask the store for more"
                )
            rates[count] = _ROUNDS * count / (time.perf_counter() - begun)
    most = 1
    for count, rate in rates.items():
        if rate > _HELPS * rates[most]:
            most = count
    told = ", ".join(f"{count}: {rate:,.0f}" for count, rate in rates.items())
    return Check(
        "requests in flight", State.OK, f"more than {most} at a time do not help (requests/s by number: {told})"
    )
