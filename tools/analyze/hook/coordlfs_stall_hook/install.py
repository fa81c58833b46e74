"""Puts the hook into this process, if the environment asks for it."""

from __future__ import annotations

import atexit
import os
from contextlib import suppress

from . import opens, runtime, watch
from .config import ENVIRONMENT, loads


def install() -> None:
    """Once, at the interpreter's start."""
    words = os.environ.get(ENVIRONMENT)
    if not words or runtime.active is not None:
        return
    config = loads(words)
    if not os.path.isdir(config.out):
        return  # a process that outlived its measurement
    active = runtime.active = runtime.Runtime(config)
    with suppress(FileExistsError):
        os.close(os.open(f"{config.out}/started", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    watch.install()
    if config.opens:
        opens.write_down(f"{config.out}/opens", config.data)
    atexit.register(active.write)
