"""Prometheus: the figures of a mount (`coordlfs.processes.stats`) over HTTP, with prometheus-client.

The listening socket is made before anything is mounted and belongs to the supervisor, like everything that outlives
the server: the port is not lost while the server is replaced, and a scrape that comes meanwhile waits. Scrapes have
threads of their own, at most `_SCRAPES` at a time, which take turns with the data loop only while they format numbers.
It reads figures, and changes nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from coordlfs.errors import UserError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_SCRAPES = 4
_TIMEOUT = 10.0  # seconds that a client may be silent
_BACKLOG = 16
_ADDRESS = re.compile(r"(?:(?P<host>[^:\[\]]*):|\[(?P<six>[0-9a-fA-F:.]+)\]:)?(?P<port>\d{1,5})", re.ASCII)

# Where a figure is found in `Stats.collect()`, its name less `coordlfs_` (that of a counter gets `_total`), and what it
# says. Labels stand in braces. A figure that is None, as before the first epoch, is left out.
GAUGES = {
    "locked_memory.limit_bytes": ("locked_memory_limit_bytes", "Memory that a keeper may lock; missing: no limit."),
    "locked_memory.wanted_bytes": ("locked_memory_wanted_bytes", "Memory that a keeper must be allowed to lock."),
    "memory.limit_bytes": ("memory_limit_bytes", "Memory that may be pinned now, given what is available."),
    "revalidation.interval_seconds": ("revalidation_interval_seconds", "Within which a change is noticed."),
    "memory.available_bytes": ("memory_available_bytes", "Memory that could be had without swapping."),
    "started": ("start_time_seconds", "When this server started, in seconds since 1970."),
    "capacity_bytes": ("capacity_bytes", "Memory that may be pinned."),
    "pinned_bytes": ("pinned_bytes", "Memory that is pinned, in whole pages."),
    "fill": ("fill_ratio", "Pinned share of the capacity."),
    "pinned_items": ("pinned_items", "Items in the cache: files, or 16 MiB of a larger one."),
    "pending_items": ("pending_items", "Items on their way to be pinned."),
    "stash_bytes": ("stash_bytes", "Bytes held for pending items."),
    "dataset.items": ("dataset_items", "Items of a directory that is pinned, whether they are in memory or not."),
    "dataset.bytes": ("dataset_bytes", "Bytes of them."),
    "known_files": ("known_files", "Names that were looked up or listed."),
    "catalog_bytes": ("catalog_bytes", "Memory that knowing them takes."),
    "source.bytes_per_second": ("source_bytes_per_second", "Read from the source, over the last seconds."),
    "source.requests.in_flight": ("store_requests_in_flight", "Requests to the object store that it has not answered."),
    "source.requests.hidden_keys": ("store_hidden_keys", "Keys that no file system can show."),
    "hints.held_bytes": ("hint_held_bytes", "Held for readers that announce their order, on top of what is pinned."),
    "hints.bound_bytes": ("hint_bound_bytes", "What may be held for them."),
    "disk.size_bytes": ("disk_size_bytes", "What the disk tier may take of its file system."),
    "disk.taken_bytes": ("disk_taken_bytes", "What it takes."),
    "disk.held_bytes": ("disk_held_bytes", "Bytes of files in it, which a reboot keeps."),
    "disk.held_blocks": ("disk_held_blocks", "Blocks of files in it: small files, or 1 MiB of a larger one."),
    "disk.index_memory_bytes": ("disk_index_memory_bytes", "Memory of its hash index."),
    "disk.is_ready": ("disk_ready", "1 once it is known what it holds."),
    "disk.is_direct": ("disk_direct", "1 if it is read around the page cache."),
    "disk.waiting_blocks": ("disk_waiting_blocks", "Blocks that wait to be written."),
    "hit_rate": ("hit_ratio", "Share of hits, by bytes, of the last epoch that read nearly all it had to."),
}
COUNTERS = {
    "server_starts": ("server_starts", "Servers that this mount has had."),
    "memory.given_back_bytes": ("memory_given_back_bytes", "Memory released because too little was available."),
    "source.retries": ("source_retries", "Attempts at the source that were made again."),
    "requests.interrupted": ('requests{kind="interrupted"}', "Requests from the kernel, by who answers them."),
    "revalidation.passes": ("revalidation_passes", "Comparisons of all that is known with the source."),
    "revalidation.checked_files": ("revalidation_checked_files", "Names compared with the source."),
    "source.bytes": ("source_bytes", "Bytes read from the source."),
    "source.reads": ("source_reads", "Reads of the source."),
    "source.files": ("source_files", "Files that missed; again in a later epoch counts again."),
    "source.errors": ("source_errors", "Reads of the source that failed."),
    "source.changed_files": ("source_changed_files", "Files found in another version than the kernel has cached."),
    "source.requests.list": ('store_requests{kind="list"}', "Requests to the object store."),
    "source.requests.get": ('store_requests{kind="get"}', ""),
    "source.requests.head": ('store_requests{kind="head"}', ""),
    "source.requests.throttled": ("store_throttled", "Requests that the object store refused as too many."),
    "source.requests.errors": ("store_errors", "Requests to the object store that failed for good."),
    "requests.read": ('requests{kind="read"}', "Requests from the kernel, by who answers them."),
    "requests.name": ('requests{kind="name"}', ""),
    "requests.refused": ('requests{kind="refused"}', ""),
    "requests.ioctl": ('requests{kind="ioctl"}', ""),
    "requests.turns": ("data_loop_turns", "How often a thread of the data loop took the GIL to see to requests."),
    "requests.stash_bytes": ("stash_served_bytes", "Bytes answered from the stash."),
    "requests.memory_bytes": ("memory_served_bytes", "Bytes answered from a cache in private memory."),
    "admission.not_admitted": ("admission_not_admitted", "Items that had room and were not pinned."),
    "admission.retries": ("admission_retries", "Items pinned on a later attempt."),
    "admission.errors": ("admission_errors", "Items that could not be read."),
    "peers.bytes": ("peer_bytes", "Bytes got from other nodes."),
    "peers.reads": ("peer_reads", "Reads that other nodes answered."),
    "peers.refusals": ("peer_refusals", "Replies of other nodes that they do not cache it."),
    "peers.wrong_versions": ("peer_wrong_versions", "Replies of other nodes that have another version."),
    "peers.failures": ("peer_failures", "Requests to other nodes without a good reply."),
    "peers.bad_payloads": ("peer_bad_payloads", "Replies of other nodes whose checksum was wrong."),
    "peers.skipped": ("peer_skipped", "Requests not sent, since the other node failed before or was too busy."),
    "disk.bytes": ("disk_bytes", "Bytes given to readers from the disk tier."),
    "disk.reads": ("disk_reads", "Reads that it answered."),
    "disk.read_bytes": ("disk_read_bytes", "Bytes read from its disk."),
    "disk.written_bytes": ("disk_written_bytes", "Bytes added to it."),
    "disk.written_blocks": ("disk_written_blocks", "Blocks added to it."),
    "disk.not_admitted": ("disk_not_admitted", "Blocks that it could not keep up with."),
    "disk.bad_blocks": ("disk_bad_blocks", "Blocks that were not what had been written, and read again."),
    "hints.messages": ("hint_messages", "Messages of loaders about what they will read."),
    "hints.ignored_numbers": ("hint_ignored_numbers", "Numbers in them of no file that is known."),
    "hints.fetched_items": ("hint_fetched_items", "Items read ahead that were not to stay."),
    "epochs": ("epochs", "Epochs seen, the one that runs included."),
}
EPOCH = {
    "number": ("epoch_number", "Which epoch it is."),
    "misses": ("epoch_misses", "Items that missed in it."),
    "bytes": ("epoch_bytes", "Bytes it read from the source."),
    "memory_items": ("epoch_memory_items", "Items that memory had."),
    "memory_bytes": ("epoch_memory_bytes", "Bytes that memory had, if it ended now."),
    "disk_items": ("epoch_disk_items", "Items that the disk tier had."),
    "disk_bytes": ("epoch_disk_bytes", "Bytes that the disk tier gave."),
    "peer_bytes": ("epoch_peer_bytes", "Bytes that other nodes gave."),
    "requests.list": ("epoch_store_lists", "LIST requests to the object store."),
    "requests.get": ("epoch_store_gets", "GET requests to it."),
    "requests.head": ("epoch_store_heads", "HEAD requests to it."),
    "expected_bytes": ("epoch_expected_bytes", "Bytes that were not pinned when it began."),
    "items": ("epoch_items", "Items in the dataset, as far as it was read."),
    "hit_rate": ("epoch_hit_ratio", "Share of hits by bytes, if it ended now."),
}
JOB = {
    "epoch": ("job_epoch", "Epoch of a job that announces its order, as it counts."),
    "files": ("job_files", "Files in it."),
    "position": ("job_position_files", "Files of it that the job has asked for."),
    "hits": ("job_hits", "Files of those that were cached."),
    "misses": ("job_misses", "Files that were read from the source."),
    "bytes_read": ("job_read_bytes", "Bytes of them that were read from the source."),
}
NODE = {
    "memory_bytes": ("node_memory_bytes", "Size of the cache in memory of a node that shares its cache."),
    "pinned_bytes": ("node_pinned_bytes", "Bytes of it that are pinned."),
    "disk_size_bytes": ("node_disk_size_bytes", "Size of its disk tier."),
    "disk_held_bytes": ("node_disk_held_bytes", "Bytes of files in it."),
    "is_alive": ("node_alive", "Whether it answers."),
    "received_bytes": ("node_received_bytes", "Bytes received from it, since it was last found to live."),
    "served_bytes": ("node_served_bytes", "Bytes sent to it."),
}
_LABELLED = re.compile(r'(\w+)(?:\{(\w+)="(\w+)"\})?')


def address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", ":PORT" or "PORT"; loopback if no host is named. Raises UserError."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or int(match["port"]) > 65535:
        raise UserError(f"--metrics {text!r} is no address: write PORT, HOST:PORT or [IPV6]:PORT", 2)
    return match["six"] or match["host"] or LOOPBACK, int(match["port"])


def listen(text: str) -> socket.socket:
    """A socket that listens where `text` says (see `address`). Raises UserError, also if the library is missing."""
    host, port = address(text)
    if importlib.util.find_spec("prometheus_client") is None:
        raise UserError("--metrics needs the package prometheus-client: pip install 'coordlfs[metrics]'")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as e:
        raise UserError(f"--metrics {text}: {host} is no address of this machine ({e.strerror})") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError as e:
        sock.close()
        raise UserError(f"--metrics {text}: port {port} of {host} cannot be had ({e.strerror}): give another") from None
    return sock


def url(sock: socket.socket) -> str:
    """Where a listening socket serves."""
    host, port, *_ = sock.getsockname()
    return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"


def _at(figures: dict[str, Any], path: str) -> Any:
    value: Any = figures
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class MountCollector:
    """What `collect_figures` knows of a mount, as metrics; a collector of prometheus-client."""

    def __init__(
        self,
        collect_figures: Callable[[], dict[str, Any]],
        nodes: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        """`nodes`: those that share the cache, as `Sharing.table` tells."""
        self._figures = collect_figures
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        """Every figure; each carries the mountpoint, so that several mounts can share a dashboard."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        figures = self._figures()
        mountpoint = figures["mountpoint"]
        info = {"source": figures["source_path"], "version": figures["version"], "residence": figures["residence"]}
        family = GaugeMetricFamily("coordlfs_mount_info", "What is mounted, and how.", labels=["mountpoint", *info])
        family.add_metric([mountpoint, *map(_printable, info.values())], 1)
        yield family
        keepers = GaugeMetricFamily("coordlfs_keepers", "Processes that hold pins.", labels=["mountpoint"])
        keepers.add_metric([mountpoint], len(figures["processes"]["keepers"]))
        yield keepers
        for table, kind in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            yield from self._families(figures, mountpoint, table, kind)
        yield from self._epochs(figures, mountpoint)
        yield from self._families_of_nodes(mountpoint)

    def _families_of_nodes(self, mountpoint: str) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        rows = self._nodes()
        for key, (name, says) in NODE.items():
            family = GaugeMetricFamily(f"coordlfs_{name}", says, labels=["mountpoint", "node"])
            for row in rows:
                if key in row:  # this node has received nothing of itself
                    family.add_metric([mountpoint, row["name"]], row[key])
            yield family

    def _families(
        self, figures: dict[str, Any], mountpoint: str, table: dict[str, tuple[str, str]], kind: Any
    ) -> Iterator[Metric]:
        families: dict[str, Any] = {}
        for path, (written, says) in table.items():
            value = _at(figures, path)
            name, label, label_value = _LABELLED.fullmatch(written).groups()  # type: ignore[union-attr]
            if value is None:
                continue
            if name not in families:
                families[name] = kind(f"coordlfs_{name}", says, labels=["mountpoint", *([label] if label else [])])
            families[name].add_metric([mountpoint, *([label_value] if label else [])], value)
        yield from families.values()

    def _epochs(self, figures: dict[str, Any], mountpoint: str) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        shown = {"current": figures["epoch"], "last": (figures["epoch_history"] or [None])[-1]}
        for key, (name, says) in EPOCH.items():
            family = GaugeMetricFamily(f"coordlfs_{name}", says, labels=["mountpoint", "epoch"])
            for which, epoch in shown.items():
                if (value := _at(epoch or {}, key)) is not None:
                    family.add_metric([mountpoint, which], value)
            if family.samples:
                yield family
        for key, (name, says) in JOB.items():
            family = GaugeMetricFamily(f"coordlfs_{name}", says, labels=["mountpoint", "job", "user"])
            for job in figures["hints"]["jobs"]:
                family.add_metric([mountpoint, job["job"], str(job["user"])], job[key])
            yield family


def _printable(text: str) -> str:
    """A path may hold bytes that are not UTF-8, which HTTP cannot carry."""
    return text.encode(errors="replace").decode()


def serve(
    fd: int,
    collect_figures: Callable[[], dict[str, Any]],
    nodes: Callable[[], list[dict[str, Any]]] = list,
) -> None:
    """Answer scrapes that come to the listening socket `fd`, from daemon threads, until the process ends.

    The socket is never shut down: it is the next server's as well.
    """
    import prometheus_client.core  # noqa: F401 (that nothing is left to be imported by the first scrape)
    from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

    registry = CollectorRegistry()
    registry.register(MountCollector(collect_figures, nodes))
    ProcessCollector(registry=registry)  # of this server: process_cpu_seconds_total, process_resident_memory_bytes …
    server = _http_server(socket.socket(fileno=fd), make_wsgi_app(registry))
    threading.Thread(target=server.run, name="metrics", daemon=True).start()


def _http_server(sock: socket.socket, app: Any) -> Any:
    """Imported late: the HTTP server of the standard library takes longer to load than all of coordlfs."""
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Handler(WSGIRequestHandler):
        timeout = _TIMEOUT

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

        def __init__(self) -> None:
            super().__init__(("", 0), Handler, bind_and_activate=False)
            self.socket.close()  # made by the base class, for a port of its own
            self.socket = sock
            self.server_name, self.server_port = "coordlfs", sock.getsockname()[1]
            self.setup_environ()
            self.set_app(app)
            self._free = threading.BoundedSemaphore(_SCRAPES)

        def run(self) -> None:
            while True:
                self.handle_request()

        def get_request(self) -> tuple[socket.socket, Any]:
            try:
                return super().get_request()
            except OSError as e:  # EMFILE comes at once, again and again
                log.warning("a scrape could not be accepted: %s", e)
                time.sleep(1)
                raise

        def process_request(self, request: Any, client_address: Any) -> None:
            self._free.acquire()
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # there is no thread to be had
                self._free.release()
                raise

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self._free.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), OSError):  # a client that went away is none of our business
                log.warning("a scrape failed", exc_info=True)

    return Server()
