"""The partitioned cache: nodes in network namespaces, each with a disk of 30 MB/s and a link of 10 Gbit/s.

All nodes read the same directory, each through a cgroup of its own, which is its disk. Every epoch is shuffled anew and
dealt to the nodes, as a DistributedSampler does. What a node takes alone, with the same memory, is measured on one of
them, since the kernel has one page cache and would not keep the nodes apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from coordlfs_tools.bench import reader
from coordlfs_tools.bench.dataset import Images
from coordlfs_tools.bench.report import Bound, Context, Figure, alternate, ratios
from coordlfs_tools.cluster_sim import Cluster, deal
from coordlfs_tools.lab import mounts
from coordlfs_tools.lab.cgroups import Cgroup, cgroup
from coordlfs_tools.lab.errors import LabError
from coordlfs_tools.lab.machine import drop_caches, drop_pages
from coordlfs_tools.lab.network import Host, network

from coordlfs.catalogue.catalog import node_of_path
from coordlfs.peers.ownership import Node

_DISK = 30_000_000  # bytes per second
_LINK = "10gbit"
_PORT = 7070
_READERS = 8
_FILES = 6_000  # of the data set: the page cache's epochs take long enough
_JOB_MEMORY = 40_000_000  # bytes, on top of the cache
_SHARE = 0.55  # of the dataset that each of the nodes can cache
_SHORT = 0.60  # of the dataset that all of them can cache together, where it is too little
_EPOCHS = 3  # that are measured
_SETTLING = 3  # epochs before them
_HIT_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node: its network, the cgroups of its servers and of its job, and its mount."""

    host: Host
    servers: Cgroup
    job: Cgroup
    mount: mounts.Mount

    @property
    def name(self) -> str:
        """By which the others know it."""
        return f"{self.host.address}:{_PORT}"


def run(context: Context) -> list[Figure]:
    """Storage, time, peer hits, and what the simulator predicts."""
    data = context.images()
    if not context.quick:
        data = data.part(_FILES)
    figures: list[Figure] = []
    for nodes in (2, 4):
        figures += _shared(context, data, nodes, _SHARE)
    figures += _too_little(context, data, 2)
    figures += _hits(context, data)
    return figures


@contextmanager
def cluster(
    context: Context,
    data: Images,
    capacities: Sequence[int],
    disk: int | None = _DISK,
    options_of: Callable[[int], list[str]] = lambda number: [],
) -> Iterator[list[ClusterNode]]:
    """Nodes that know each other, each with a cache and a disk of so many bytes, and bytes a second."""
    with ExitStack() as stack:
        hosts = stack.enter_context(network(len(capacities), _LINK))
        peers = ",".join(f"{host.address}:{_PORT}" for host in hosts)
        key = stack.enter_context(_key())
        made = []
        for number, (host, capacity) in enumerate(zip(hosts, capacities, strict=True)):
            servers = stack.enter_context(cgroup(context.disk, bytes_per_second=disk))
            job = stack.enter_context(cgroup(context.disk, memory=_JOB_MEMORY, bytes_per_second=disk))
            options = ["--listen", f"{host.address}:{_PORT}", "--peers", peers, "--cluster-key-file", str(key)]
            options += options_of(number)
            mount = stack.enter_context(mounts.coordlfs(data.root, capacity, servers, options=options, host=host))
            made.append(ClusterNode(host, servers, job, mount))
        for node in made:
            node.mount.wait_for_peers(len(made) - 1)
        yield made


@contextmanager
def _key() -> Iterator[Path]:
    import tempfile

    with tempfile.NamedTemporaryFile("w", prefix="coordlfs-bench-") as file:
        file.write("a key for a benchmark and for nothing else\n")
        file.flush()
        yield Path(file.name)


def epoch(nodes: list[ClusterNode], data: Images, seed: int) -> tuple[float, list[int]]:
    """Every node reads its part of an epoch, all at once; the seconds of the slowest, and bytes of each one's disk."""
    askers, order = deal(len(data.paths), len(nodes), seed)
    before = [node.servers.disk_bytes() + node.job.disk_bytes() for node in nodes]

    def read(number: int) -> float:
        paths = [data.paths[i] for i in order if askers[i] == number]
        return reader.read(nodes[number].mount.point, paths, _READERS, seed, nodes[number].job).seconds

    with ThreadPoolExecutor(len(nodes)) as pool:
        seconds = max(pool.map(read, range(len(nodes))))
    after = [node.servers.disk_bytes() + node.job.disk_bytes() for node in nodes]
    return seconds, [a - b for a, b in zip(after, before, strict=True)]


def from_source(nodes: list[ClusterNode]) -> list[int]:
    """Bytes that each has read from its source so far."""
    return [node.mount.status()["source"]["bytes"] for node in nodes]


def _settle(nodes: list[ClusterNode], data: Images) -> None:
    for seed in range(_SETTLING):
        drop_caches()  # and not at the end: names and inodes are no part of what is measured
        epoch(nodes, data, 1000 + seed)
        for node in nodes:
            node.mount.settled()


def _shared(context: Context, data: Images, count: int, share: float) -> Iterator[Figure]:
    """Numbers 1 and 2: storage and time of steady epochs, and the time that a node takes alone."""
    capacity = int(data.allocated * share)
    epochs = context.rounds(_EPOCHS)
    with cluster(context, data, [capacity] * count) as nodes:
        _settle(nodes, data)
        ours, stored, disk = [], [], []
        before = from_source(nodes)
        for seed in range(epochs):
            seconds, read = epoch(nodes, data, seed)
            after = from_source(nodes)
            ours.append(seconds)
            stored.append(max(a - b for a, b in zip(after, before, strict=True)))
            disk.append(sum(read))
            before = after
            context.say(f"  {count} nodes, epoch {seed + 1}: {seconds:.2f} s, {disk[-1] / 1e6:.3f} MB from disks")
        figures = [node.mount.status() for node in nodes]
    kinds = ("refusals", "failures", "bad_payloads", "skipped")
    trouble = ", ".join(f"{sum(f['peers'][kind] for f in figures)} {kind}" for kind in kinds)
    yield Figure(
        f"{count} nodes of {share:.0%} each: MB of files that a node reads from storage in a steady epoch",
        [nbytes / 1e6 for nbytes in stored],
        Bound(0),
        f"{median(disk) / 1e6:.3f} MB from all disks, with metadata; {trouble}",
    )
    alone = _alone(context, data, count, capacity, epochs, cached=True)
    page_cache = _alone(context, data, count, capacity, epochs, cached=False)
    for name, theirs, bound in (
        ("each node's coordlfs alone", alone, None),
        ("page cache of the same memory", page_cache, Bound(8, at_least=True) if count == 2 else None),
    ):
        yield Figure(
            f"{count} nodes: epoch time with the {name} ÷ shared",
            ratios(theirs, ours),
            bound,
            f"{median(theirs):.2f} s, {median(ours):.2f} s",
        )


def _alone(context: Context, data: Images, count: int, capacity: int, epochs: int, *, cached: bool) -> list[float]:
    """Seconds of the epochs of one of `count` nodes that knows no other."""
    drop_caches()

    def part(seed: int) -> list[str]:
        askers, order = deal(len(data.paths), count, seed)
        return [data.paths[i] for i in order if askers[i] == 0]

    memory = _JOB_MEMORY if cached else _JOB_MEMORY + capacity
    with ExitStack() as stack:
        servers = stack.enter_context(cgroup(context.disk, bytes_per_second=_DISK))
        job = stack.enter_context(cgroup(context.disk, memory=memory, bytes_per_second=_DISK))
        root = data.root
        if cached:
            mount = stack.enter_context(mounts.coordlfs(data.root, capacity, servers))
            reader.read(mount.point, data.paths, _READERS, 0, job)  # and not `warm`: the directory holds more files
            mount.settled()
            root = mount.point
        else:
            for seed in range(_SETTLING):
                reader.read(root, part(1000 + seed), _READERS, seed, job)
        times = []
        for seed in range(epochs):
            times.append(reader.read(root, part(seed), _READERS, seed, job).seconds)
            context.say(f"  alone, {'coordlfs' if cached else 'page cache'}, epoch {seed + 1}: {times[-1]:.2f} s")
        return times


def _too_little(context: Context, data: Images, count: int) -> Iterator[Figure]:
    """Number 4: storage bytes of each node against the simulator's."""
    capacity = int(data.allocated * _SHORT / count)
    with cluster(context, data, [capacity] * count) as nodes:
        paths = [str(path).encode() for path in data.paths]
        keys = np.array([node_of_path(path) for path in paths], np.uint64)
        sizes = np.array([(data.root / path).stat().st_size for path in data.paths], np.int64)
        order = sorted(nodes, key=lambda node: node.name)
        capacities = [node.mount.status()["capacity_bytes"] for node in order]
        simulated = Cluster([Node(n.name, c) for n, c in zip(order, capacities, strict=True)], keys, sizes)
        _settle(order, data)
        for seed in range(_SETTLING):
            simulated.epoch(*deal(len(keys), count, 1000 + seed))
        values, said = [], []
        for seed in range(context.rounds(_EPOCHS)):
            before = [node.mount.status()["source"]["bytes"] for node in order]
            epoch(order, data, seed)
            after = [node.mount.status()["source"]["bytes"] for node in order]
            predicted = simulated.epoch(*deal(len(keys), count, seed)).source
            read = [a - b for a, b in zip(after, before, strict=True)]
            values.append(max(abs(r / p - 1) for r, p in zip(read, predicted, strict=True)))
            said.append((mean(read), float(np.mean(predicted))))
            context.say(f"  epoch {seed + 1}: read {[r // 10**6 for r in read]} MB, simulated {predicted // 10**6} MB")
            for node in order:
                node.mount.settled()
            drop_caches()  # what a small dataset leaves in the page cache would hit; it is not what is simulated
    yield Figure(
        f"{count} nodes with {_SHORT:.0%} of the dataset: read from storage, off the simulator's prediction by",
        values,
        Bound(0.03),
        f"{median(r for r, _ in said) / 1e6:.1f} MB, {median(p for _, p in said) / 1e6:.1f} MB a node",
    )


def _hits(context: Context, data: Images) -> Iterator[Figure]:
    """Number 3: peer hits of one asker and of two, against the bare loop."""
    with cluster(context, data, [0, 0, int(data.allocated * 1.1)], None) as (one, two, owner):
        reader.read(owner.mount.point, data.paths, _READERS, 0)
        owner.mount.settled()
        for node in (one, two):
            reader.read(node.mount.point, data.paths, _READERS, 0)  # names are known, checksums as well
        with _bare_server(owner) as port:

            def asker(node: ClusterNode, seed: int) -> float:
                return reader.read(node.mount.point, data.paths, _READERS, seed).files_per_second

            def ours(seed: int) -> float:
                drop_pages()
                before = one.mount.status()["source"]["bytes"]
                rate = asker(one, seed)
                if one.mount.status()["source"]["bytes"] != before:
                    context.say("  some were read from the source")
                return rate

            def both(seed: int) -> float:
                drop_pages()
                with ThreadPoolExecutor(2) as pool:
                    return sum(pool.map(lambda node: asker(node, seed), (one, two)))

            def bare(seed: int) -> float:
                return _bare(one, owner, port, data)

            found = alternate(
                context, context.rounds(_HIT_ROUNDS), {"peer hits": ours, "two askers": both, "bare loop": bare}
            )
    size = sum((data.root / path).stat().st_size for path in data.paths[:500]) / 500
    sides = f"{median(found['peer hits']):,.0f} files/s ({median(found['peer hits']) * size / 1e6:,.0f} MB/s), "
    sides += f"{median(found['bare loop']):,.0f} files/s"
    yield Figure(
        "peer hits of one asker ÷ bare loop", ratios(found["peer hits"], found["bare loop"]), Bound(0.6, True), sides
    )
    yield Figure(
        "peer hits of two askers together ÷ one",
        ratios(found["two askers"], found["peer hits"]),
        None,
        f"{median(found['two askers']):,.0f} files/s together",
    )


@contextmanager
def _bare_server(owner: ClusterNode) -> Iterator[int]:
    port = _PORT + 1
    command = [sys.executable, str(Path(__file__).with_name("bare.py")), "serve"]
    argv = owner.host.inside([*command, str(owner.mount.point), owner.host.address, str(port)])
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise LabError("the bare loop's server did not start")
        yield port
    finally:
        process.kill()
        process.communicate()


def _bare(asker: ClusterNode, owner: ClusterNode, port: int, data: Images) -> float:
    command = [sys.executable, str(Path(__file__).with_name("bare.py")), "fetch"]
    argv = asker.host.inside([*command, owner.host.address, str(port), str(_READERS)])
    done = subprocess.run(argv, input="\n".join(data.paths), capture_output=True, text=True, timeout=300, check=True)
    said = json.loads(done.stdout)
    return float(said["files"] / said["seconds"])
