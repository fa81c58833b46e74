"""`python -m coordlfs_tools.bench NAME`: arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from coordlfs_tools.bench import (
    analyser,
    cluster,
    dataset,
    epochs,
    first_epoch,
    handover,
    hint_cost,
    hints,
    hits,
    loader,
    misses,
    objects,
    ownership,
    peers,
    pin,
    startup,
    tasks,
    tensorsocket,
    tiers,
    tree,
)
from coordlfs_tools.bench.report import Context, Figure, table
from coordlfs_tools.lab.errors import LabError

_BENCHMARKS: dict[str, tuple[Callable[[Context], list[Figure]], str]] = {
    "hits": (hits.run, "cached files against the warm page cache"),
    "guarded-hits": (
        hits.run_guarded,
        "cached files of a mount that looks after itself, against the same, stopped",
    ),
    "epochs": (epochs.run, "bytes read in steady epochs against D − C, and against the page cache alone"),
    "misses": (misses.run, "a slow disk through the mount and directly; a warm source against bindfs and rclone"),
    "first-epoch": (first_epoch.run, "filling the cache against reading directly"),
    "pin": (pin.run, "pinning a directory against the page cache, vmtouch and a mount; a million small files"),
    "hints": (hints.run, "epochs of a DataLoader with hints and without, from a slow disk, with as much compute"),
    "hint-cost": (hint_cost.run, "CPU of a hint, by ioctl, by the names of attributes, and file by file"),
    "objects": (objects.run, "a bucket 20 ms away: cold epochs against obstore, the bill, a large object in sequence"),
    "peers": (peers.run, "nodes that share their caches, against each alone, and peer hits against a bare loop"),
    "cluster": (cluster.run, "nodes as one cache: cold epochs, two tiers, a node that dies, warm --cluster"),
    "ownership": (ownership.measure, "the shares of a million items, and what a node that leaves moves"),
    "tiers": (tiers.run, "memory and disk as one cache: the law, the first epoch, a restart"),
    "tree": (tree.run, "listing a million files, and the server's memory for them"),
    "analyser": (analyser.run, "the stall analyser on jobs whose truth is known"),
    "predictions": (analyser.predictions, "epochs that the analyser predicts against real ones on a mount"),
    "tasks": (tasks.run, "the stalls of three training tasks with 35 %% cached, page cache and coordlfs"),
    "startup": (startup.run, "the command, and from mount to first byte"),
    "loader": (
        loader.measure,
        "jobs that share their prep against jobs that do their own; one alone; one killed",
    ),
    "handover": (handover.measure, "batches that cost nothing to prepare, handed to 4 jobs, against memcpy"),
    "tensorsocket": (tensorsocket.measure, "jobs that share their prep, against TensorSocket; what each survives"),
}
_WITHOUT_ROOT = {"loader", "handover", "ownership", "tensorsocket"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m coordlfs_tools.bench",
        description="Benchmarks of coordlfs. The exit status is 1 if a bound is not kept, 2 if it cannot be measured.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, text) in [*_BENCHMARKS.items(), ("all", (None, "every one of them"))]:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--dir",
            type=Path,
            default=Path("/var/tmp/coordlfs-bench"),
            help="where the data lies, made if it is missing; on the disk to be measured (default: %(default)s)",
        )
        command.add_argument("--rounds", type=int, help="how often the sides take turns")
        command.add_argument("--quick", action="store_true", help="little data: shows that it works, measures nothing")
        command.add_argument("--clean", action="store_true", help="remove the data in the end")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if os.geteuid() and arguments.name not in _WITHOUT_ROOT:
        raise LabError("mounting, cgroups and emptying the page cache need root: run as root")
    context = Context(arguments.dir, quick=arguments.quick, rounds=arguments.rounds)
    if context.quick:
        context.say("A quick run shows that the benchmarks work: what it measures says nothing.")
    kept = True
    try:
        for name in _BENCHMARKS if arguments.name == "all" else [arguments.name]:
            run, text = _BENCHMARKS[name]
            context.console.print(f"{name}: {text}", style="bold")
            figures = run(context)
            context.console.print(table(f"{name}: {text}", figures))
            kept = kept and all(figure.passes for figure in figures)
    finally:
        if arguments.clean:
            dataset.clean(arguments.dir)
    return 0 if kept else 1


def main() -> int:
    """Run what the command line names; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays mounted
    try:
        return _run(_parser().parse_args())
    except LabError as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
