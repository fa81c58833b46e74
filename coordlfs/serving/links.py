"""Files with several names (hard links): one whose name is gone goes by another."""

from __future__ import annotations

from contextlib import suppress

from coordlfs.catalogue.catalog import Catalog
from coordlfs.kernel import paths
from coordlfs.sources.contract import Source


def use_other_name(catalog: Catalog, source: Source, record: int) -> bool:
    """Have a file whose name is gone read by another hard link of it; False if none is known."""
    inode = catalog.version(record).inode
    for parent, name in catalog.other_names(record):
        directory = catalog.directory_path(parent)
        with suppress(OSError):
            if source.lstat(paths.join(directory, name)).st_ino == inode:
                catalog.move(record, parent, name)
                return True
    return False
