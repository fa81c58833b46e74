"""`coordlfs cache`: the stores of disk caches in a directory, whether or not they are mounted.

It knows how they are shown. What they are is known by `coordlfs.disk`.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from coordlfs.disk import places, survey
from coordlfs.disk.places import Place
from coordlfs.errors import UserError
from coordlfs.kernel.paths import shown
from coordlfs.sizes import text
from coordlfs.sources import address


def show(directory: str) -> None:
    """Print which stores there are, and what each holds."""
    for place in _stores(directory, None):
        with places.opened(directory, place) as fd:
            try:
                found = survey.contents(fd)
                holds = f"{text(found.bytes)} in {found.blocks} blocks, {text(places.taken(fd))} on disk"
            except (ValueError, OSError) as e:
                holds = f"nothing that can be used: {e}"
        where = f"last used {_when(place.used)}"
        if place.mounted is not None:
            where = f"mounted on {shown(place.mounted)}" if place.mounted else "in use by another process"
        print(f"{shown(place.source)}: {holds}; {where}")


def verify(directory: str, source: str | None) -> bool:
    """Check every byte against its checksum; whether all is good."""
    are_good = True
    for place in _stores(directory, source):
        with places.locked(directory, place) as fd:
            try:
                found = survey.verify(fd)
            except (ValueError, OSError) as e:
                print(f"{shown(place.source)}: nothing that can be used: {e}")
                are_good = False
                continue
        bad = found.bad_blocks + found.bad_rows
        what = f"{bad} damaged, which will be read from the source again" if bad else "all good"
        print(f"{shown(place.source)}: {found.blocks} blocks, {text(found.bytes)} checked: {what}")
        are_good = are_good and not bad
    return are_good


def clear(directory: str, source: str | None) -> None:
    """Remove the stores, or that of one source."""
    for place in _stores(directory, source):
        places.clear(directory, place)
        print(f"the disk cache of {shown(place.source)} is removed")


def _stores(directory: str, source: str | None) -> list[Place]:
    """The stores in a directory, or that of a source. Raises UserError if there is none."""
    found = places.stores(directory)
    if source is not None:
        wanted = os.fsencode(address.canonical(source))
        found = [place for place in found if place.source == wanted]
    if not found:
        of_it = f" of {source}" if source is not None else ""
        raise UserError(f"{directory} holds no disk cache{of_it}: give the DIR of --disk-cache")
    return found


def _when(seconds: float) -> str:
    with suppress(ValueError, OverflowError, OSError):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    return "at an unknown time"
