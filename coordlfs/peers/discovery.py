"""Where nodes may be found: a static list, the name service, Slurm's host list, or etcd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from coordlfs.peers import settings

Found = Callable[[set[tuple[str, int]]], None]


def static(text: str) -> set[tuple[str, int]]:
    """The addresses of HOST:PORT,HOST:PORT…"""
    return {settings.address(entry) for entry in map(str.strip, text.split(",")) if entry}


async def watch(
    config: dict[str, Any], found: Found, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Call `found` with the addresses, now and whenever they change, until cancelled."""
    found(static(config["peers"]))
    task_status.started()
    await trio.sleep_forever()
