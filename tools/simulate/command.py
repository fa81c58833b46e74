"""`coordlfs simulate`: its arguments, its table and its plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from coordlfs_tools.simulate import policies, traces
from coordlfs_tools.simulate.run import Outcome, run
from rich.console import Console
from rich.progress import track
from rich.table import Table

from coordlfs.errors import UserError
from coordlfs.kernel.memory import Memory
from coordlfs.sizes import cache_size, text

_LABELS = {"minio": "MinIO (coordlfs)", "lru": "LRU", "kernel": "kernel, two lists", "optimal": "optimal (Belady)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `coordlfs simulate` takes."""
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a recorded one (`coordlfs analyze --trace FILE`)")
    parser.add_argument("--items", type=_positive, default=10_000, metavar="N", help="in the dataset (default: 10000)")
    parser.add_argument("--item-size", default="110K", metavar="SIZE", help="on average (default: 110K)")
    parser.add_argument("--epochs", type=_positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="at once on the same data (default: 1)")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="that share each epoch (default: 1)")
    parser.add_argument(
        "--cache",
        default="20%,40%,60%,80%,100%",
        metavar="SIZES",
        help="of each node, separated by commas: shares of the dataset or sizes (default: %(default)s)".replace(
            "%,", "%%,"
        ).replace("%)", "%%)"),
    )
    parser.add_argument(
        "--disk-cache", metavar="SIZE", help="a second tier of each node on a disk, of that size or share"
    )
    parser.add_argument("--policy", action="append", choices=policies.NAMES, help="only these (may be repeated)")
    parser.add_argument("--seed", type=int, default=0, help="of the random orders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures; - prints them instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture: .svg, .png or .pdf")


def _positive(words: str) -> int:
    number = int(words)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "number"


def command(arguments: argparse.Namespace) -> int:
    """Simulate, and show it; the exit status."""
    trace = _trace(arguments)
    capacities = [_capacity(word, trace.dataset) for word in arguments.cache.split(",")]
    console = Console(stderr=arguments.json == Path("-"))
    chosen = [name for name in policies.NAMES if not arguments.policy or name in arguments.policy]
    disk = _capacity(arguments.disk_cache, trace.dataset, "--disk-cache") if arguments.disk_cache else 0
    cases = [
        (name, capacity, partitioned, on_disk)
        for capacity in capacities
        for name in chosen
        for partitioned in ([False, True] if arguments.nodes > 1 and name == "minio" else [False])
        for on_disk in ([0, disk] if disk and name == "minio" else [0])
    ]
    outcomes = [
        (partitioned, run(trace, name, capacity, arguments.nodes, partitioned=partitioned, disk=on_disk))
        for name, capacity, partitioned, on_disk in track(cases, "simulating", console=console, transient=True)
    ]
    figures = [_figures(outcome, partitioned, trace) for partitioned, outcome in outcomes]
    result = {"version": 1, "dataset_bytes": trace.dataset, "items": len(trace.sizes), "results": figures}
    if arguments.json == Path("-"):
        print(json.dumps(result, indent=2))
    else:
        console.print(_table(trace, outcomes, arguments))
    try:
        if arguments.json and arguments.json != Path("-"):
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        if arguments.plot:
            _plot(arguments.plot, trace, outcomes)
    except OSError as e:
        raise UserError(f"{e.filename} cannot be written: {e.strerror}") from e
    return 0


def _trace(arguments: argparse.Namespace) -> traces.Trace:
    if arguments.trace:
        return traces.read(arguments.trace)
    mean, _ = cache_size(arguments.item_size, Memory(1 << 62, 1 << 62))
    if not mean:
        raise UserError(f"--item-size {arguments.item_size} is nothing: give the size of a file", 2)
    return traces.random_epochs(arguments.items, mean, arguments.epochs, jobs=arguments.jobs, seed=arguments.seed)


def _capacity(word: str, dataset: int, option: str = "--cache") -> int:
    try:
        return cache_size(word, Memory(dataset, dataset) if word.strip().endswith("%") else Memory(1 << 62, 1 << 62))[0]
    except UserError:
        raise UserError(f"{option} {word!r} is not a size: write 20% (of the dataset) or 200G", 2) from None


def _name(outcome: Outcome, partitioned: bool) -> str:
    on_disk = f", {text(outcome.disk)} on disk" if outcome.disk else ""
    return _LABELS[outcome.policy] + (", partitioned" if partitioned else "") + on_disk


def _figures(outcome: Outcome, partitioned: bool, trace: traces.Trace) -> dict[str, object]:
    return {
        "policy": outcome.policy,
        "partitioned": partitioned,
        "cache_bytes": outcome.capacity,
        "disk_cache_bytes": outcome.disk,
        "cache_share": outcome.capacity / trace.dataset,
        "hit_rate": outcome.hit_rate,
        "storage_bytes": outcome.storage_bytes,
        "remote_bytes": outcome.remote_bytes,
        "disk_bytes": outcome.disk_bytes,
        "epochs": [
            {
                "hit_rate": e.hit_rate,
                "storage_bytes": e.storage_bytes,
                "remote_bytes": e.remote_bytes,
                "disk_bytes": e.disk_bytes,
            }
            for e in outcome.epochs
        ],
    }


def _table(trace: traces.Trace, outcomes: Sequence[tuple[bool, Outcome]], arguments: argparse.Namespace) -> Table:
    cluster = f", {arguments.nodes} nodes" if arguments.nodes > 1 else ""
    jobs = f", {arguments.jobs} jobs" if arguments.jobs > 1 and not arguments.trace else ""
    table = Table(
        title=f"{len(trace.sizes):,} items, {text(trace.dataset)}, {len(trace.epochs)} epochs{jobs}{cluster}; "
        "an epoch after the first",
        title_justify="left",
    )
    for column in ("cache" + (" a node" if cluster else ""), "policy", "hits", "from storage", "÷ best"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    if cluster:
        table.add_column("from other nodes", justify="right")
    if arguments.disk_cache:
        table.add_column("from disk", justify="right")
    last = None
    for partitioned, outcome in outcomes:
        if outcome.capacity != last:
            table.add_section()
        best = min(o.storage_bytes for _, o in outcomes if o.capacity == outcome.capacity)
        cells = [
            f"{text(outcome.capacity)} ({outcome.capacity / trace.dataset:.0%})" if outcome.capacity != last else "",
            _name(outcome, partitioned),
            f"{outcome.hit_rate:.1%}",
            text(outcome.storage_bytes),
            f"{outcome.storage_bytes / best:.2f}" if best else "–" if outcome.storage_bytes else "1.00",
        ]
        cells += [text(outcome.remote_bytes)] if cluster else []
        cells += [text(outcome.disk_bytes)] if arguments.disk_cache else []
        table.add_row(*cells)
        last = outcome.capacity
    return table


def _plot(path: Path, trace: traces.Trace, outcomes: Sequence[tuple[bool, Outcome]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.7), layout="constrained")
    axes = figure.add_subplot(xlabel="cache (% of the dataset)", ylabel="read in an epoch (% of the dataset)")
    lines: dict[str, list[tuple[float, float]]] = {}
    for partitioned, outcome in outcomes:
        point = (100 * outcome.capacity / trace.dataset, 100 * outcome.storage_bytes / trace.dataset)
        lines.setdefault(_name(outcome, partitioned), []).append(point)
    # Lines on each other, as those of MinIO and the optimal policy are, must all be seen: the first on top, thinnest.
    for rank, ((name, points), marker) in enumerate(zip(lines.items(), "osD^v", strict=False)):
        width = 1.5 + 0.8 * rank
        axes.plot(
            *zip(*sorted(points), strict=True),
            label=name,
            marker=marker,
            markersize=4 + 1.5 * rank,
            linewidth=width,
            zorder=3 - 0.1 * rank,
        )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except ValueError as e:
        raise UserError(f"--plot {path}: {e}", 2) from e
