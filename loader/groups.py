"""`coordlfs groups`: the groups on this node, as their brokers tell. Needs no torch.

It asks brokers, and changes nothing.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordlfs_loader import wire

if TYPE_CHECKING:
    from rich.console import Group

_INTERVAL = 1.0
_ANSWER = 2.0  # seconds


def figures() -> list[dict[str, Any]]:
    """The figures of each group of this user, or of all users for root. A broker that does not answer is left out."""
    found = []
    for path in _sockets():
        try:
            sock = wire.connect(path)
        except (OSError, RuntimeError):
            continue
        with sock:
            sock.settimeout(_ANSWER)
            try:
                wire.send(sock, {"verb": "stats"})
                answer = wire.receive(sock)
            except (OSError, ValueError):
                continue
        if answer is not None and isinstance(answer[0].get("stats"), dict):
            found.append(answer[0]["stats"])
    return sorted(found, key=lambda f: str(f.get("group")))


def _sockets() -> list[Path]:
    named = os.environ.get("COORDLFS_RUNTIME_DIR")
    whose = "*" if os.geteuid() == 0 else str(os.geteuid())
    directories = [Path(named)] if named else Path("/tmp").glob(f"coordlfs-{whose}")
    return sorted(path for directory in directories for path in directory.glob("*.sock"))


def _row(job: dict[str, Any]) -> list[str]:
    if job["left"]:
        state = "has left, holds tensors"
    elif job["epoch"] is None:
        state = "between epochs"
    elif job["fallen_out"]:
        state = "has fallen out"
    else:
        state = "waits" if job["waits"] else "trains"
    epoch = "–" if job["epoch"] is None else f"{job['epoch']}: {job['taken']} of {job['batches']}"
    lag = "–" if job["lag"] is None else str(job["lag"])
    return [str(job["pid"]), str(job["workers"]), epoch, lag, _size(job["held_bytes"]), state]


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def view(f: dict[str, Any]) -> Group:
    """A group, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    caption = "no job has joined yet"
    if "stage" in f:
        stage = f["stage"]
        saved = f["samples_saved"] / max(1, f["samples_delivered"])
        caption = (
            f"stage: {_size(stage['used_bytes'])} of {_size(stage['bytes'])}, {_size(stage['held_bytes'])} held; "
            f"{f['workers']} workers prepare {f['samples_per_second']:.0f} samples/s\n"
            f"{f['samples_prepared']} samples prepared for {f['samples_delivered']} delivered: {saved:.0%} saved"
        )
    grid = Table(title=f"group {f['group']} (broker {f['pid']})", title_justify="left")
    for heading in ("job (pid)", "workers", "epoch: batches", "lag", "holds", ""):
        grid.add_column(heading)
    for job in f["jobs"]:
        grid.add_row(*_row(job))
    return Group(grid, caption)


def show(*, as_json: bool, watch: bool) -> None:
    """Print the groups."""
    if as_json:
        print(json.dumps(figures(), indent=2))
        return
    from rich.console import Console, Group

    if not watch:
        found = figures()
        if not found:
            print("no group is at work on this node")
        for f in found:
            Console().print(view(f))
        return
    from rich.live import Live

    with Live(refresh_per_second=4) as live:
        while True:
            live.update(Group(*map(view, figures())))
            time.sleep(_INTERVAL)
