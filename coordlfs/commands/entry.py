"""Where the commands begin: `coordlfs`, `python -m coordlfs` and `mount.coordlfs`.

What the rest imports is imported only once the process depends on nothing inherited.
"""

from __future__ import annotations

from coordlfs.processes import interpreter


def coordlfs(words: list[str] | None = None) -> int:
    """The command `coordlfs`; with `words` for its arguments it is part of another program, left as it is."""
    if words is None:
        interpreter.isolate("coordlfs")
    from coordlfs.commands import cli

    return cli.main(words)


def mount_coordlfs() -> int:
    """The command `mount.coordlfs`."""
    interpreter.isolate("coordlfs.commands.mount_helper")
    from coordlfs.commands import mount_helper

    return mount_helper.main()
