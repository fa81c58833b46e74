"""`coordlfs peers`: the nodes that share a mount's cache, for people and for programs.

It asks the mount on this node, and no other node.
"""

from __future__ import annotations

import json
from typing import Any

from coordlfs.commands import client, mounted
from coordlfs.errors import UserError
from coordlfs.kernel.paths import shown
from coordlfs.sizes import text


def show(mountpoint: str, *, as_json: bool) -> None:
    """Print a line for every node. Raises UserError."""
    asking = client.Client(mountpoint)
    try:
        rows: list[dict[str, Any]] = asking.ask("peers")["nodes"]
    finally:
        asking.close()
    if not rows:
        raise UserError(f"{mountpoint} shares its cache with nobody: mount it with --peers")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"nodes that share the cache of {shown(mounted.find(mountpoint).source)}"))
    has_disks = any(row["disk_size_bytes"] for row in rows)
    on_disk = ["on disk"] if has_disks else []
    for heading in ("node", "state", "in memory", *on_disk, "share", "received from", "served to", "latency"):
        left = heading in ("node", "state")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "node")
    for row in rows:
        here = row["self"]
        latency = None if here else row["latency_seconds"]
        table.add_row(
            escape(row["name"]),
            "this node" if here else row["state"] + (f": {escape(row['problem'])}" if row["problem"] else ""),
            f"{text(row['pinned_bytes'])} of {text(row['memory_bytes'])}",
            *([f"{text(row['disk_held_bytes'])} of {text(row['disk_size_bytes'])}"] if has_disks else []),
            f"{row['share']:.1%}",
            "" if here else text(row["received_bytes"]),
            "" if here else text(row["served_bytes"]),
            "" if latency is None else f"{latency * 1e3:.1f} ms",
        )
    Console().print(table)
