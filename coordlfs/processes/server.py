"""The server of a mount: puts loops, policy and source together, and ends when the kernel says it is unmounted.

It may be killed at any moment: whatever has to outlive it (the FUSE device, the catalogue's memory, the keepers)
belongs to the supervisor, which starts another. It decides nothing: the rules stand in what it puts together.
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
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from coordlfs import logs
from coordlfs.cache import items
from coordlfs.cache.admission import Admission
from coordlfs.cache.announcements import Announcements
from coordlfs.cache.epochs import Epoch, Epochs
from coordlfs.cache.fetch_ahead import PROTOCOL, FetchAhead
from coordlfs.cache.governor import Governor
from coordlfs.cache.memory_watch import MemoryWatch
from coordlfs.cache.minio import MinIO
from coordlfs.cache.stash import Stash
from coordlfs.catalogue.catalog import Catalog
from coordlfs.catalogue.metrics import Counters
from coordlfs.catalogue.records import Records
from coordlfs.kernel import fuse, mounts, pages, process, threads
from coordlfs.kernel.notifier import Notifier
from coordlfs.peers.wishes import Exchange
from coordlfs.processes import attachment, exporter
from coordlfs.processes.control import Control
from coordlfs.processes.disk import size as disk_size
from coordlfs.processes.fetching import Fetching
from coordlfs.processes.stats import Stats
from coordlfs.processes.supervisor_link import SupervisorLink
from coordlfs.serving.data_loop import DataLoop
from coordlfs.serving.entries import Entries
from coordlfs.serving.inventory import Inventory
from coordlfs.serving.listings import Listings
from coordlfs.serving.namespace import Namespace
from coordlfs.serving.namespace_loop import TASKS, NamespaceLoop
from coordlfs.serving.reading import Reader
from coordlfs.serving.revalidation import Revalidation
from coordlfs.serving.telling import Telling
from coordlfs.serving.waits import Waits
from coordlfs.sources.address import Address, Options
from coordlfs.sources.contract import Source
from coordlfs.sources.directory import DirectorySource, holds_elsewhere

if TYPE_CHECKING:
    from coordlfs.cache.disk_tier import DiskTier
    from coordlfs.peers.placement import Placement
    from coordlfs.peers.sharing import Sharing
    from coordlfs.peers.warming import Warming

log = logging.getLogger(__name__)

_NAME_MESSAGE = 1 << 21
_WRITER_ENDS_WITHIN = 5.0  # seconds
_STORE_OPENS_WITHIN = 20.0  # seconds: its index is read, at hundreds of megabytes a second
_STASH_LEAST, _STASH_MOST = 8 * items.CHUNK, 16 * items.CHUNK


def _attach_pyfuse3(names: NamespaceLoop, init: bytes) -> tuple[socket.socket, socket.socket]:
    """Give pyfuse3 a socket in place of /dev/fuse; the data loop's end, and pyfuse3's.

    The INIT that the supervisor answered is played to it, and its reply thrown away.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NAME_MESSAGE)
    pyfuse3.init(names, f"/dev/fd/{theirs.fileno()}", {"fsname=coordlfs"})
    ours.send(init)
    return ours, theirs


def _relay(names: socket.socket, device: int, answered: Callable[[int], None]) -> None:
    """Carry the namespace loop's replies to the kernel, but for the first, which answers the INIT played to it."""
    first = True
    with suppress(OSError):
        while reply := names.recv(_NAME_MESSAGE):
            if first:
                first = False
                continue
            answered(fuse.OUT_HEADER.unpack_from(reply)[2])
            with suppress(OSError):  # ENOENT: the caller gave up waiting
                os.write(device, reply)


def serve(config: dict[str, Any]) -> None:
    """Serve until unmounted. `config` is what `coordlfs.processes.supervisor` passes."""
    device: int = config["device"]
    source, path = _source(config)
    catalog = Catalog(config["records"], config["names"], numbering=source.numbering)
    counters = Counters(catalog.counters)
    epochs = Epochs(Epoch(counters["epochs_before"]))
    policy = MinIO(config["capacity"] // pages.PAGE)
    link = SupervisorLink(config["link"])
    notifier = Notifier(device)
    waits = Waits()
    announcements = Announcements(catalog, policy, epochs, counters)
    placement = _placement(config, catalog, policy) if config["peers"] else None
    tier = _tier(config, catalog, source, policy, counters, placement) if config.get("disk") else None
    admission = _admission(
        *(config, catalog, policy, epochs, counters, link.want_keeper),
        announced=announcements,
        awaited=waits,
        invalidator=notifier,
        owners=placement,
        disk=tier,
    )
    if tier is not None:
        tier.writer.on_completed = admission.completed
    exchange = Exchange()
    sharing = None if placement is None else _share(config, catalog, placement, admission, counters, exchange, tier)
    reader = Reader(catalog, source, admission, counters, notifier, sharing, tier)
    memory_watch = MemoryWatch(Governor(config["capacity"]), admission, counters)
    expect = _expect(catalog, source, tier, placement)
    ahead = FetchAhead(catalog, admission, announcements, counters, memory_watch, expect)
    stats = Stats(config, catalog, admission, epochs, counters, memory_watch, source, ahead, sharing, tier)
    namespace = Namespace(catalog, source, reader, counters)
    records = Records(catalog)
    listings = Listings(namespace, Entries(records, namespace, counters))
    names = NamespaceLoop(catalog, source, namespace, *([] if tier is None else [tier.held]))
    revalidation = Revalidation(catalog, source, Telling(catalog, namespace, reader), counters)
    fetching = Fetching(catalog, namespace, admission, tier, expect)
    warming = None if placement is None else _warming(source, placement, exchange, fetching)
    control = Control(
        *(catalog, source, admission, fetching, revalidation, link.replace, sharing, warming, tier),
    )
    names.root_xattrs = {b"stats": stats.encode, b"control": control.name.encode, b"hint": lambda: PROTOCOL}

    with ExitStack() as stack, fails_at_once(link):
        for keeper in config["keepers"]:
            admission.add_keeper(keeper["index"], keeper["pid"], socket.socket(fileno=keeper["socket"]))
        ours, _theirs = _attach_pyfuse3(names, bytes.fromhex(config["init"]))
        if counters["server_starts"]:
            admission.recover()
            reader.recover()
            if config["resend"]:
                os.write(device, fuse.resend())
        counters.add("server_starts")
        loop = DataLoop(device, ours, records, reader, namespace, listings, ahead, counters, waits)
        threads = [
            threading.Thread(target=_relay, args=(ours, device, loop.name_answered), name="relay"),
            threading.Thread(target=admission.run, name="admission"),
        ]
        if sharing is not None:
            threads.append(threading.Thread(target=sharing.run, name="sharing"))
            threads.append(threading.Thread(target=sharing.watch, name="peer watch"))
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(admission.close)
        if tier is not None:
            # A daemon: its disk may never answer.
            writer = threading.Thread(target=tier.writer.run, name="disk writer", daemon=True)
            writer.start()
            stack.callback(writer.join, _WRITER_ENDS_WITHIN)
            stack.callback(tier.writer.close)
        if sharing is not None:
            stack.callback(sharing.close)
        if path is not None:  # else what is mounted there hides the mount, and not the source
            threading.Thread(target=_watch_mounts, args=(path, loop), name="mounts", daemon=True).start()
        notifier.start()
        stack.callback(notifier.close)
        background: list[Callable[[], Awaitable[None]]] = [
            control.run,
            memory_watch.run,
            ahead.run,
            partial(_tick, stats, loop, ahead, epochs, counters),
            partial(pyfuse3.main, max_tasks=TASKS),
        ]
        if warming is not None:
            background.append(warming.run)
        if config["revalidate"]:
            background.append(partial(revalidation.run, config["revalidate"]))
        if tier is not None:
            checks = config["revalidate"] is not None
            background.append(Inventory(tier, catalog, source, namespace, admission, checks=checks).run)
        if config["metrics"] is not None:
            exporter.serve(config["metrics"], stats.collect, list if sharing is None else sharing.table)
        trio.run(_tasks, config["mountpoint"], config.get("mount_device"), loop, link, admission, sharing, background)
        with suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)


def _source(config: dict[str, Any]) -> tuple[Source, bytes | None]:
    """What is mounted, and the path of a directory that is not hidden by its own mount."""
    if "bucket" in config:
        from coordlfs.sources.objects.source import ObjectSource  # here, since obstore is loaded for a bucket only

        bucket, options = config["bucket"]
        return ObjectSource(Address(*bucket), Options(*options), lasts=config["revalidate"]), None
    path = None if config["source"] == config["mountpoint"] else os.fsencode(config["source"])
    fstype = None if config["fstype"] is None else os.fsencode(config["fstype"])
    about = {"is_remote": config["is_remote"], "fstype": fstype, "since": config.get("mounted")}
    return DirectorySource(config["root"], path, **about), path


def _expect(
    catalog: Catalog, source: Source, tier: DiskTier | None, placement: Placement | None
) -> Callable[[int], None] | None:
    """How a source is told of a file that will be read soon; None for one that gains nothing by it."""
    if source.root >= 0:
        return None

    def expect(record: int) -> None:
        item = items.item_at(record, 0)
        is_own = placement is None or placement.owns(item)  # else its owner is asked
        if is_own and (tier is None or not tier.holds(item)):
            source.expect(catalog.path(record))

    return expect


def _watch_mounts(path: bytes, loop: DataLoop) -> None:
    """Notice when something that may never answer is mounted beneath the source."""
    with suppress(OSError):  # what cannot be seen is taken to have happened
        mounts.until(lambda: holds_elsewhere(path))
    loop.expect_waits()


def _admission(
    config: dict[str, Any],
    catalog: Catalog,
    policy: MinIO,
    epochs: Epochs,
    counters: Counters,
    more_keepers: Callable[[], None],
    **others: Any,
) -> Admission:
    if config["memory"] is not None:
        from coordlfs.cache.store import Store  # here, since few mounts need it
        from coordlfs.cache.store_admission import StoreAdmission

        store = Store(config["memory"], policy.capacity, lambda item: catalog.stamp(items.record_of(item)))
        return StoreAdmission(catalog, policy, store, epochs, counters, more_keepers, **others)
    stash = Stash(min(_STASH_MOST, max(_STASH_LEAST, config["capacity"] // 8)))
    return Admission(catalog, policy, stash, epochs, counters, more_keepers, **others)


def _placement(config: dict[str, Any], catalog: Catalog, policy: MinIO) -> Placement:
    from coordlfs.peers.ownership import Node  # here, since a node that stands alone needs none of it
    from coordlfs.peers.placement import Placement

    return Placement(Node(config["peers"]["name"], config["capacity"] + disk_size(config)), catalog, policy)


def _tier(
    config: dict[str, Any],
    catalog: Catalog,
    source: Source,
    policy: MinIO,
    counters: Counters,
    owners: Placement | None,
) -> DiskTier | None:
    from coordlfs.cache.disk_tier import DiskTier  # here, since few mounts need it
    from coordlfs.cache.disk_writer import DiskWriter
    from coordlfs.disk.store import Store

    disk = config["disk"]
    try:
        # A server that is started while the disk hangs must not hang as well.
        store = threads.in_time(
            lambda: Store(disk["directory"], bytes.fromhex(disk["identity"]), disk["size"]), _STORE_OPENS_WITHIN
        )
    except OSError as e:
        log.warning("there is no disk cache, as %s cannot be used: %s", disk["path"], e.strerror)
        return None
    return DiskTier(store, DiskWriter(store, catalog, source, policy, counters), catalog, counters, owners)


def _share(
    config: dict[str, Any],
    catalog: Catalog,
    placement: Placement,
    admission: Admission,
    counters: Counters,
    exchange: Exchange,
    tier: DiskTier | None,
) -> Sharing:
    from coordlfs.peers.sharing import Sharing  # as above

    sharing = Sharing(config["peers"], catalog, placement, admission, counters, exchange, tier)
    sharing.attach(config["peer_server"]["pid"], socket.socket(fileno=config["peer_server"]["socket"]))
    return sharing


def _warming(source: Source, placement: Placement, exchange: Exchange, fetching: Fetching) -> Warming:
    from coordlfs.peers.warming import Warming  # as above

    async def fetch(named: list[bytes]) -> tuple[int, bool]:
        done = await fetching.fetch(named)
        return done.cached_bytes, done.is_full

    return Warming(source, placement, exchange, fetch)


@contextmanager
def fails_at_once(link: SupervisorLink) -> Iterator[None]:
    """A failure ends the process there and then: no thread is left to hang on to it, or waited for."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, OSError) and e.errno == errno.ENODEV:
            os._exit(0)  # it was unmounted while this server came up
        log.exception("the server ends")
        while isinstance(e, BaseExceptionGroup):  # of trio
            e = e.exceptions[0]
        link.failed(e)
        os._exit(1)


def exit_with_thread(failure: threading.ExceptHookArgs) -> None:
    """A thread that ends by mistake takes the server with it: the next one begins anew."""
    log.critical("a thread of the server ended", exc_info=failure.exc_value)
    os._exit(1)


async def _tasks(
    mountpoint: str,
    device: int | None,  # an older supervisor does not say
    loop: DataLoop,
    link: SupervisorLink,
    admission: Admission,
    sharing: Sharing | None,
    background: list[Callable[[], Awaitable[None]]],
) -> None:
    token = trio.lowlevel.current_trio_token()
    async with trio.open_nursery() as nursery:

        def unmounted() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(nursery.cancel_scope.cancel)

        def orphaned() -> None:
            log.error("the supervisor died: unmounting %s", mountpoint)
            # Nobody is to wait any more for a process that cannot end: one with a thread that waits for the source.
            if device is not None:
                attachment.detach_all([m for m in mounts.table() if m.device == device], abort=True)
            else:
                with suppress(OSError):
                    attachment.detach(os.fsencode(mountpoint), lazy=True, abort=True)
            nursery.cancel_scope.cancel()

        loop.on_end = unmounted
        loop.start()
        nursery.start_soon(link.run, admission, sharing, orphaned)
        for task in background:
            nursery.start_soon(task)
        try:
            link.ready()
        except OSError:
            orphaned()
        sys.meta_path.insert(0, _LateImports())


class _LateImports:
    """Says so where something is imported while the server serves: where that fails, requests do."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Leave it to the others."""
        log.warning("%s is imported only now: it belongs to what is imported before the server serves", name)


async def _tick(stats: Stats, loop: DataLoop, ahead: FetchAhead, epochs: Epochs, counters: Counters) -> None:
    while True:
        stats.tick()
        loop.look_at_waits()
        ahead.receive()  # should so many of the loop wait for the source that nobody listens to the keepers
        counters.set("epochs_before", epochs.current.number)
        await trio.sleep(0.5)


def main() -> None:
    """`python -m coordlfs.processes.server JSON`, started by the supervisor."""
    config = json.loads(sys.argv[1])
    process.set_name("coordlfs-server")
    process.raise_limits()
    process.keep_freed_memory(_STASH_MOST)
    threading.stack_size(threads.STACK)
    if config["memory"] is not None:
        process.be_killed_first()  # as the keeper: between them they hold the cache
    logs.configure(config["log"], "server", config["mountpoint"], config["source"])
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to handle
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # see `kernel.leases`
    threading.excepthook = exit_with_thread
    with fails_at_once(SupervisorLink(config["link"])):
        serve(config)
    os._exit(0)  # data loop threads may wait for a source that never answers


if __name__ == "__main__":
    main()
