"""`coordlfs status`: the figures of a mount for people.

It knows the names of the figures, and not how they come about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from coordlfs.cache import residence
from coordlfs.commands import mounted
from coordlfs.errors import UserError
from coordlfs.kernel.paths import shown
from coordlfs.sizes import text

if TYPE_CHECKING:
    from rich.table import Table

_INTERVAL = 1.0


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _from_peers(s: dict[str, Any]) -> str:
    return f", {text(s['peers']['bytes'])} from peers" if "name" in s["peers"] else ""


def _on_disk(s: dict[str, Any]) -> str:
    disk = s.get("disk")
    return f", {text(disk['held_bytes'])} on disk" if disk else ""


def _peer_lines(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    peers = s["peers"]
    if "name" not in peers:
        return
    yield "read from peers", f"{text(peers['bytes'])} in {peers['reads']} reads; {peers['refusals']} refused"
    bad = peers["failures"] + peers["bad_payloads"] + peers["wrong_versions"]
    yield "peers", f"{peers['alive']} of {peers['known']} alive; {bad} failures, {peers['skipped']} skipped"
    epoch = s["epoch_history"][-1] if s["epoch_history"] else s["epoch"]
    if epoch:
        parts = (epoch["local_bytes"], epoch["peer_bytes"], epoch["bytes"])
        split = " / ".join(_share(part / max(1, sum(parts))) for part in parts)
        yield "local / peer / source", f"{split} in epoch {epoch['number']}"


def _residence_lines(s: dict[str, Any]) -> Iterator[str]:
    limits = s["locked_memory"]
    if limits["remedy"]:
        yield f"since only {text(limits['limit_bytes'])} may be locked (RLIMIT_MEMLOCK), and {residence.COST}"
        yield f"{text(limits['wanted_bytes'])} would do for the page cache: {limits['remedy']}; then mount anew"
    if s["umount_needs_coordlfs"]:
        yield "held in use, as user namespaces are forbidden: `coordlfs umount`, or `fusermount3 -u -z`"


def _job_lines(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    hints = s["hints"]
    for job in hints["jobs"]:
        done = f"{job['position']} of {job['files']} files ({_share(job['position'] / max(1, job['files']))})"
        counted = f"{job['hits']} hits, {job['misses']} misses, {text(job['bytes_read'])} read"
        yield f"job {job['job'][-4:]}", f"epoch {job['epoch']}, {done}: {counted}"
    if hints["jobs"]:
        yield "read ahead", f"{text(hints['held_bytes'])} of at most {text(hints['bound_bytes'])} held"


def _disk_lines(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    disk = s.get("disk")  # a server of version 0.2 says nothing of it
    if not disk:
        return
    yield (
        "on disk",
        f"{text(disk['held_bytes'])} of {text(disk['size_bytes'])} in {shown(disk['directory'])}, which a reboot keeps",
    )
    if disk["stopped"]:
        yield "", f"nothing more is kept there: {disk['stopped']}"
    if not disk["is_ready"]:
        yield "", "what it holds is being counted"
    yield "read from disk", f"{text(disk['bytes'])} in {disk['reads']} reads"
    if disk["bad_blocks"] or disk["not_admitted"]:
        yield "", f"{disk['bad_blocks']} damaged blocks, {disk['not_admitted']} that it could not keep up with"


def summary(s: dict[str, Any]) -> str:
    """One line."""
    return (
        f"{shown(s['source_path'])}: {text(s['pinned_bytes'])} of {text(s['capacity_bytes'])} cached in "
        f"{s['pinned_items']} items{_on_disk(s)}; {text(s['source']['bytes'])} read from the source{_from_peers(s)}; "
        f"{s['epochs']} epochs seen, hit rate {_share(s['hit_rate'])}"
    )


def epochs_table(s: dict[str, Any]) -> list[str]:
    """A line for each epoch."""
    rows = [*s["epoch_history"], *([s["epoch"]] if s["epoch"] else [])]
    return [
        f"  epoch {e['number']}: {e['misses']} of {e['items']} items missed, {text(e['bytes'])} read, "
        f"{_of_disk(e)}hit rate {_share(e['hit_rate'])}"
        for e in rows[-10:]
    ]


def _of_disk(epoch: dict[str, Any]) -> str:
    nbytes = epoch.get("disk_bytes")
    return f"{text(nbytes)} in {epoch['disk_items']} items from disk, " if nbytes else ""


def table(s: dict[str, Any]) -> Table:
    """A table, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    title = Text(shown(f"{s['source_path']} on {s['mountpoint']}"))  # whose brackets are no markup
    grid = Table(title=title, title_style="italic", show_header=False, title_justify="left")
    grid.add_column(style="bold")
    grid.add_column()
    source = s["source"]
    if places := mounted.other_places(s["mountpoint"]):
        grid.add_row("also mounted on", Text(shown(", ".join(places))))
    grid.add_row("cached", f"{text(s['pinned_bytes'])} of {text(s['capacity_bytes'])} ({_share(s['fill'])})")
    memory = s["memory"]
    if memory["limit_bytes"] < s["capacity_bytes"]:
        grid.add_row("memory is tight", f"no more than {text(memory['limit_bytes'])} may be cached for now")
    grid.add_row("items", f"{s['pinned_items']} pinned, {s['pending_items']} on their way")
    grid.add_row("residence", s["residence"])
    for line in _residence_lines(s):
        grid.add_row("", line)
    grid.add_row("read from source", f"{text(source['bytes'])} in {source['reads']} reads of {source['files']} files")
    for heading, line in _disk_lines(s):
        grid.add_row(heading, line)
    for heading, line in _peer_lines(s):
        grid.add_row(heading, line)
    grid.add_row("throughput", f"{text(source['bytes_per_second'])}/s from the source")
    grid.add_row("errors of source", f"{source['errors']}; {source['changed_files']} files changed")
    for heading, line in _job_lines(s):
        grid.add_row(heading, line)
    grid.add_row("epochs seen", str(s["epochs"]))
    grid.add_row("hit rate", _share(s["hit_rate"]))
    for line in epochs_table(s)[-5:]:
        grid.add_row("", line.strip())
    grid.add_row("how hits are known", s["hits_known_by"])
    processes = s["processes"]
    keepers = ", ".join(map(str, processes["keepers"])) or "none"
    grid.add_row("processes", f"supervisor {processes['supervisor']}, server {processes['server']}, keepers {keepers}")
    return grid


def show(mountpoints: list[str], *, as_json: bool, watch: bool) -> None:
    """Print the figures of the mounts given, or of all. Raises UserError."""
    chosen = mountpoints or mounted.all_mounts()
    if as_json:
        figures = list(_answers(chosen, named=bool(mountpoints)))
        print(json.dumps(figures[0] if mountpoints else figures, indent=2))
        return
    if not chosen:
        raise UserError("nothing is mounted: `coordlfs mount SRC MNT` mounts a dataset")
    from rich.console import Console, Group

    if not watch:
        console = Console()
        for m in chosen:
            try:
                console.print(table(mounted.stats(m)))
            except UserError as e:
                if mountpoints:
                    raise
                console.print(shown(str(e)), markup=False)
        return
    from rich.live import Live

    with Live(refresh_per_second=4) as live:
        while True:
            live.update(Group(*map(table, _answers(chosen, named=bool(mountpoints)))))
            time.sleep(_INTERVAL)


def _answers(mountpoints: list[str], *, named: bool) -> Iterator[dict[str, Any]]:
    """The figures of mounts; without those that do not answer, or may not be asked, unless they were named."""
    for mountpoint in mountpoints:
        try:
            yield mounted.stats(mountpoint)
        except UserError:
            if named:
                raise
