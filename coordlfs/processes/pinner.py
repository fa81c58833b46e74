"""The pinner: what a server is to a mount, for a directory that is pinned as it is. It answers no reader.

It puts together the files of the directory, what watches them, and the cache. It may be killed at any moment: keepers,
catalogue and control socket belong to the supervisor, which starts another. It decides nothing: the rules stand in what
it puts together.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import trio

from coordlfs import logs
from coordlfs.cache.announcements import Announcements
from coordlfs.cache.epochs import Epoch, Epochs
from coordlfs.cache.fetch_ahead import FetchAhead
from coordlfs.cache.governor import Governor
from coordlfs.cache.memory_watch import MemoryWatch
from coordlfs.cache.minio import MinIO
from coordlfs.cache.pin_admission import PinAdmission
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.kernel import disks, pages, paths, process, threads
from coordlfs.kernel.inotify import CHANGES
from coordlfs.pinning.dataset import Dataset, Wanted
from coordlfs.pinning.filling import Filling
from coordlfs.pinning.pace import Pace
from coordlfs.pinning.watching import Directories, Watching
from coordlfs.processes import exporter
from coordlfs.processes.control_socket import ControlSocket, Verb
from coordlfs.processes.pin_stats import DiskBytes, PinStats
from coordlfs.processes.server import exit_with_thread, fails_at_once
from coordlfs.processes.supervisor_link import SupervisorLink
from coordlfs.serving.revalidation import Revalidation
from coordlfs.sources import numbering
from coordlfs.sources.directory import DirectorySource

log = logging.getLogger(__name__)

_TICK = 0.5  # seconds
_LOOK_EVERY = 2.0  # seconds between looks whether the directory is there still


def serve(config: dict[str, Any]) -> None:
    """Pin until the supervisor ends. `config` is what `coordlfs.processes.pin_supervisor` passes."""
    path, fstype = os.fsencode(config["source"]), os.fsencode(config["fstype"] or "")
    source = DirectorySource(config["root"], path, is_remote=config["is_remote"], fstype=fstype or None)
    catalog = Catalog(config["records"], config["names"], numbering=source.numbering)
    counters = Counters(catalog.counters)
    epochs = Epochs(Epoch(counters["epochs_before"]))
    policy = MinIO(config["capacity"] // pages.PAGE)
    link = SupervisorLink(config["link"])
    announcements = Announcements(catalog, policy, epochs, counters)  # to which nobody adds
    has_inodes = not numbering.are_made_up(fstype)
    admission = PinAdmission(
        *(catalog, policy, epochs, counters, link.want_keeper),
        announced=announcements,
        has_inodes=lambda _: has_inodes,
    )
    memory_watch = MemoryWatch(Governor(config["capacity"]), admission, counters)
    changes = Directories(CHANGES)
    dataset = Dataset(catalog, source, admission, Wanted(map(paths.from_text, config["paths"])), changes.add)
    filling = Filling(catalog, dataset, admission, Pace(), disks.waiting(source.root), config["most"] // pages.PAGE)
    revalidation = Revalidation(catalog, source, dataset, counters)
    watching = Watching(catalog, source, changes, dataset, filling, revalidation.refresh)
    ahead = FetchAhead(catalog, admission, announcements, counters, memory_watch)
    of_mount = (config, catalog, admission, epochs, counters, memory_watch, source, ahead, None)
    stats = PinStats(*of_mount, filling=filling, watching=watching)
    disk = DiskBytes(counters)

    async def tick() -> None:
        while True:
            disk.look(admission.keeper_pids)
            stats.tick()
            counters.set("epochs_before", epochs.current.number)
            await trio.sleep(_TICK)

    with ExitStack() as stack, fails_at_once(link):
        for keeper in config["keepers"]:
            admission.add_keeper(keeper["index"], keeper["pid"], socket.socket(fileno=keeper["socket"]))
        if counters["server_starts"]:
            admission.recover()
        counters.add("server_starts")
        clock = threading.Thread(target=admission.run, name="admission")
        clock.start()
        stack.callback(clock.join)
        stack.callback(admission.close)
        if config["metrics"] is not None:
            exporter.serve(config["metrics"], stats.collect)
        end = partial(_end, config["parent"])
        control = ControlSocket(socket.socket(fileno=config["control"]), _verbs(stats, revalidation, end))
        background = [memory_watch.run, filling.run, watching.run, control.run, tick]
        background.append(partial(_end_with, source.root, end))
        if config["revalidate"]:
            background.append(lambda: revalidation.run(config["revalidate"]))
        trio.run(_tasks, link, admission, background)


def _verbs(stats: PinStats, revalidation: Revalidation, end_all: Callable[[], None]) -> dict[str, Verb]:
    """What may be asked for at the control socket."""

    async def figures(request: dict[str, Any]) -> dict[str, Any]:
        return stats.collect()

    async def refresh(request: dict[str, Any]) -> dict[str, Any]:
        checked, changed = await revalidation.refresh({paths.from_text(path) for path in request["paths"]})
        return {"checked": checked, "changed": changed}

    async def end(request: dict[str, Any]) -> dict[str, Any]:
        end_all()
        return {}

    return {"stats": figures, "refresh": refresh, "end": end}


def _end(supervisor: int) -> None:
    """Have the supervisor end, and all with it. One that is dead has left this process to another parent."""
    if os.getppid() == supervisor:
        os.kill(supervisor, signal.SIGTERM)


async def _end_with(root: int, end_all: Callable[[], None]) -> None:
    """Wait until a directory is removed, as nobody could name it to unpin it any more, and end."""
    while await threads.run(partial(_is_linked, root), abandon_on_cancel=True):
        await trio.sleep(_LOOK_EVERY)
    log.info("the directory was removed: nothing stays pinned")
    end_all()


def _is_linked(root: int) -> bool:
    try:
        return os.fstat(root).st_nlink > 0
    except OSError as e:
        return e.errno != errno.ESTALE


async def _tasks(link: SupervisorLink, admission: PinAdmission, background: list[Any]) -> None:
    async with trio.open_nursery() as nursery:

        def orphaned() -> None:
            log.error("the supervisor died: nothing stays pinned")
            nursery.cancel_scope.cancel()

        nursery.start_soon(link.run, admission, None, orphaned)
        for task in background:
            nursery.start_soon(task)
        try:
            link.ready()
        except OSError:
            orphaned()


def main() -> None:
    """`python -m coordlfs.processes.pinner JSON`, started by the supervisor."""
    config = json.loads(sys.argv[1])
    process.set_name("coordlfs-pinner")
    process.raise_limits()
    threading.stack_size(threads.STACK)
    logs.configure(config["log"], "pinner", config["mountpoint"], config["source"])
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to handle
    threading.excepthook = exit_with_thread
    with fails_at_once(SupervisorLink(config["link"])):
        serve(config)
    os._exit(0)  # a thread may wait for a source that never answers


if __name__ == "__main__":
    main()
