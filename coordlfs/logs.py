"""Where messages go: standard error in the foreground, else a file that was named, else syslog."""

from __future__ import annotations

import logging
import logging.handlers
import os


def configure(target: str | None) -> None:
    """`target`: "stderr", a file's path, or None for syslog (nowhere if there is none)."""
    handler: logging.Handler
    if target == "stderr":
        handler = logging.StreamHandler()
    elif target:
        handler = logging.FileHandler(target)
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON)
    else:
        handler = logging.NullHandler()
    stamp = "" if isinstance(handler, logging.handlers.SysLogHandler) else "%(asctime)s "
    handler.setFormatter(logging.Formatter(f"{stamp}coordlfs[%(process)d] %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
