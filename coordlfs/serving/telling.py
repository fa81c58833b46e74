"""What follows from a change that a pass has found: the kernel is told, and what was cached of the past is dropped.

It decides no version itself: `namespace` and `reading` do. It implements `revalidation.Consequences` for a mount.
"""

from __future__ import annotations

import os

from coordlfs.catalogue.catalog import DIRECTORY, SUPERSEDED, Catalog, kind_of
from coordlfs.serving.namespace import Namespace
from coordlfs.serving.reading import Reader
from coordlfs.sources.versions import Version


class Telling:
    """Has the kernel told what changed. Blocks while it looks names up: not for the threads that answer."""

    def __init__(self, catalog: Catalog, namespace: Namespace, reader: Reader) -> None:
        self._catalog = catalog
        self._namespace = namespace
        self._reader = reader

    def is_old(self, record: int) -> None:
        """A reader has met the change of a record; the kernel may not know yet."""
        self._reader.lead_elsewhere(record)

    def use_other_name(self, record: int) -> bool:
        """Whether a file whose name is gone is read by another one from now on."""
        return self._reader.use_other_name(record)

    def vanished(self, record: int) -> None:
        """The name of a record is gone."""
        self._reader.vanished(record)
        self._reader.lead_elsewhere(record)

    def changed(self, record: int, st: os.stat_result) -> None:
        """The name of a record leads to what has the attributes `st`."""
        if self._catalog.flags(record) & kind_of(st) & DIRECTORY:
            self._catalog.set_version(record, Version.of(st))
        elif self._namespace.enter(*self._catalog.entry(record), st) != record:
            self._catalog.supersede(record)
        if self._catalog.flags(record) & SUPERSEDED:
            self._reader.lead_elsewhere(record)
        else:
            self._reader.announce(record)
