"""`coordlfs status`: the figures of mounts and of pinned directories, for people.

It knows the names of the figures, and not how they come about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from coordlfs.cache import residence
from coordlfs.commands import mounted, pinned
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
    if disk["resting"]:
        yield "", f"the source is read instead for now: {disk['resting']}"
    if not disk["is_ready"]:
        yield "", "what it holds is being counted"
    yield "read from disk", f"{text(disk['bytes'])} in {disk['reads']} reads"
    if disk["bad_blocks"] or disk["not_admitted"]:
        yield "", f"{disk['bad_blocks']} damaged blocks, {disk['not_admitted']} that it could not keep up with"


def summary(s: dict[str, Any]) -> str:
    """One line."""
    if _is_pin(s):
        return (
            f"{shown(s['source_path'])}: {_pinned(s)} pinned; {text(s['source']['bytes'])} read from the disk for it;"
            f" {s['epochs']} epochs seen"
        )
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


def _is_pin(s: dict[str, Any]) -> bool:
    return s.get("mode") == "pin"  # servers of version 0.2 do not say


def _pinned(s: dict[str, Any]) -> str:
    return f"{text(s['pinned_bytes'])} of {text(s['capacity_bytes'])} ({_share(s['fill'])})"


def _pin_lines(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known, directories = s["dataset"], s["directories"]
    share = _share(min(1.0, s["pinned_bytes"] / known["bytes"])) if known["bytes"] else "–"
    so_far = "" if known["is_known"] else " so far"
    yield "pinned", _pinned(s)
    if left_out := s["locked_memory"]["left_out"]:
        yield "", left_out
    yield from _memory_lines(s)
    yield "items", f"{s['pinned_items']} pinned, {s['pending_items']} on their way"
    yield "dataset", f"{text(known['bytes'])} in {known['items']} items{so_far}, of which {share} are pinned"
    yield "residence", f"{s['residence']}, of the files themselves"
    giving_way = ", giving way to others that wait for a disk" if s["gives_way"] and s["fill"] < 1 else ""
    read = f"{text(s['source']['bytes'])} by the keepers, {text(s['source']['bytes_per_second'])}/s{giving_way}"
    yield "read from disk", read
    unwatched = f", {directories['unwatched']} could not be" if directories["unwatched"] else ""
    yield (
        "changes",
        f"{s['source']['changed_files']} files; {directories['watched']} directories are watched{unwatched}",
    )
    yield "epochs seen", f"{s['epochs']}, by openings of a few pinned files"
    yield "hit rate", s["hits_known_by"]


def _memory_lines(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (limit := s["memory"]["limit_bytes"]) < s["capacity_bytes"]:
        yield "memory is tight", f"no more than {text(limit)} may be cached for now"


def _processes(s: dict[str, Any]) -> str:
    processes = s["processes"]
    keepers = ", ".join(map(str, processes["keepers"])) or "none"
    return f"supervisor {processes['supervisor']}, server {processes['server']}, keepers {keepers}"


def _requests(requests: dict[str, int]) -> str:
    """The bill, and what of it went wrong."""
    return (
        f"{requests['list']} LIST, {requests['get']} GET, {requests['head']} HEAD; {requests['in_flight']} in flight,"
        f" {requests['retries']} made again, {requests['throttled']} throttled, {requests['errors']} failed"
    )


def table(s: dict[str, Any]) -> Table:
    """A table, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    place = "pinned" if _is_pin(s) else f"on {s['mountpoint']}"
    title = Text(shown(f"{s['source_path']} {place}"))  # whose brackets are no markup
    grid = Table(title=title, title_style="italic", show_header=False, title_justify="left")
    grid.add_column(style="bold")
    grid.add_column()
    if _is_pin(s):
        for heading, line in _pin_lines(s):
            grid.add_row(heading, line)
        grid.add_row("processes", _processes(s))
        return grid
    source = s["source"]
    if places := mounted.other_places(s["mountpoint"]):
        grid.add_row("also mounted on", Text(shown(", ".join(places))))
    grid.add_row("cached", _pinned(s))
    for heading, line in _memory_lines(s):
        grid.add_row(heading, line)
    grid.add_row("items", f"{s['pinned_items']} pinned, {s['pending_items']} on their way")
    grid.add_row("residence", s["residence"])
    for line in _residence_lines(s):
        grid.add_row("", line)
    grid.add_row("read from source", f"{text(source['bytes'])} in {source['reads']} reads of {source['files']} files")
    for heading, line in _disk_lines(s):
        grid.add_row(heading, line)
    for heading, line in _peer_lines(s):
        grid.add_row(heading, line)
    if requests := source.get("requests"):  # a server of before buckets says nothing of it
        grid.add_row("requests to the store", _requests(requests))
        if of_epoch := (s["epoch"] or {}).get("requests"):
            grid.add_row("", "of this epoch {list} LIST, {get} GET, {head} HEAD".format(**of_epoch))
    grid.add_row("throughput", f"{text(source['bytes_per_second'])}/s from the source")
    grid.add_row("errors of source", f"{source['errors']}; {source['changed_files']} files changed")
    for heading, line in _job_lines(s):
        grid.add_row(heading, line)
    grid.add_row("epochs seen", str(s["epochs"]))
    grid.add_row("hit rate", _share(s["hit_rate"]))
    for line in epochs_table(s)[-5:]:
        grid.add_row("", line.strip())
    grid.add_row("how hits are known", s["hits_known_by"])
    grid.add_row("processes", _processes(s))
    return grid


def show(places: list[str], *, as_json: bool, watch: bool) -> None:
    """Print the figures of the mounts and pinned directories given, or of all. Raises UserError."""
    chosen: list[Callable[[], dict[str, Any]]] = [partial(_stats, place) for place in places]
    if not places:
        chosen = _all()
    if as_json:
        figures = list(_answers(chosen, named=bool(places)))
        print(json.dumps(figures[0] if places else figures, indent=2))
        return
    if not chosen:
        raise UserError(
            "nothing is mounted, and nothing is pinned: `coordlfs mount SRC MNT` mounts a dataset, `coordlfs pin DIR`"
            " keeps one in memory as it is"
        )
    from rich.console import Console, Group

    if not watch:
        console = Console()
        for ask in chosen:
            try:
                console.print(_table(ask()))
            except UserError as e:
                if places:
                    raise
                console.print(shown(str(e)), markup=False)
        return
    from rich.live import Live

    with Live(refresh_per_second=4) as live:
        while True:
            live.update(Group(*_tables(_answers(chosen, named=bool(places)), named=bool(places))))
            time.sleep(_INTERVAL)


def _table(figures: dict[str, Any]) -> Table:
    """`table` of what somebody answered who may be no pinner, or one of another version. Raises UserError."""
    try:
        return table(figures)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError("a control socket answers what are no figures: `ss -xlp` shows whose it is") from None


def _tables(answers: Iterable[dict[str, Any]], *, named: bool) -> Iterator[Table]:
    for figures in answers:
        try:
            yield _table(figures)
        except UserError:
            if named:
                raise


def _stats(place: str) -> dict[str, Any]:
    return pinned.stats(place) if pinned.is_pinned(place) else mounted.stats(place)


def _all() -> list[Callable[[], dict[str, Any]]]:
    return [*(partial(mounted.stats, mountpoint) for mountpoint in mounted.all_mounts()), *pinned.everything()]


def _answers(chosen: list[Callable[[], dict[str, Any]]], *, named: bool) -> Iterator[dict[str, Any]]:
    """The figures; without those that do not answer, or may not be asked, unless they were named."""
    for ask in chosen:
        try:
            yield ask()
        except UserError:
            if named:
                raise
