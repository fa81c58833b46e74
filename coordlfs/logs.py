"""Where messages go, and in what form: the terminal, a file of key=value lines, the journal with fields, or syslog.

Whatever repeats is told a few times a minute and then counted: a source that fails for a night must not fill the disk.
It does not know what is logged.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from coordlfs.kernel import systemd
from coordlfs.kernel.paths import shown

LIMIT, INTERVAL = 10, 60.0  # messages of one kind, in so many seconds
_LATE = 1.0  # seconds after the end of an interval by which its timer has told of it, if there is one
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_BARE = re.compile(r"[^\s\"=\\]+")  # a value that needs no quotes


def configure(target: str | None, process: str = "", mountpoint: str = "", source: str = "") -> None:
    """`target`: "stderr", a file's path, or None for the journal, else syslog (nowhere if there is neither).

    The rest says of whom the messages are: "server", and the mount's two paths.
    """
    context = {"process": process, "mountpoint": mountpoint, "source": source}
    handler: logging.Handler
    if target == "stderr" and not systemd.stderr_is_journal():
        handler = logging.StreamHandler()
        handler.setFormatter(Plain("%(asctime)s coordlfs[%(process)d] %(levelname)s: %(message)s"))
    elif target and target != "stderr":
        handler = _File(target)
        handler.setFormatter(KeyValue(context))
    elif os.path.exists(systemd.JOURNAL):
        handler = Journal(context)
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(Plain("coordlfs[%(process)d] %(levelname)s: %(message)s"))
    else:
        handler = logging.NullHandler()
    handler.addFilter(RateLimit(handler.handle))
    logging.raiseExceptions = False  # a log that cannot be written stops nobody
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


class _File(logging.handlers.WatchedFileHandler):
    """A file that logrotate may move away."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; a directory that is gone is no reason to fail."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


class Plain(logging.Formatter):
    """As it stands, but one line but for a trace: names that a message holds end no line and move no cursor."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message among what surrounds it."""
        record.message = shown(record.message)
        return super().formatMessage(record)


class KeyValue(logging.Formatter):
    """One line an event, `time=… level=ERROR … msg="…"` (logfmt); values with spaces are quoted as in JSON."""

    def __init__(self, context: dict[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {"time": f"{seconds}.{record.msecs:03.0f}Z", "level": record.levelname, "pid": str(record.process)}
        fields |= self._context | {"msg": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items() if value)


def _quoted(value: str) -> str:
    value = "".join(
        shown(c) if "\ud800" <= c <= "\udfff" else c for c in value
    )  # paths may hold bytes that are no text
    if value.isprintable() and _BARE.fullmatch(value):
        return value
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(value, ensure_ascii=False))


class Journal(logging.Handler):
    """systemd's journal, with fields to select by: `journalctl COORDLFS_MOUNTPOINT=/mnt/cached`."""

    def __init__(self, context: dict[str, str], path: str = systemd.JOURNAL) -> None:
        super().__init__()
        self._fields = {f"COORDLFS_{key.upper()}": value for key, value in context.items() if value}
        self._path = path
        self.setFormatter(Plain())

    def emit(self, record: logging.LogRecord) -> None:
        """Send an entry; one that the journal does not take at once is lost."""
        fields: dict[str, object] = {
            "MESSAGE": self.format(record),
            "PRIORITY": _PRIORITIES.get(record.levelno, 6),
            "SYSLOG_IDENTIFIER": "coordlfs",
            "SYSLOG_PID": record.process or 0,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName or "",
            "LOGGER": record.name,
        }
        systemd.to_journal(fields | self._fields, self._path)


@dataclass(slots=True)
class _Window:
    ends: float
    passed: int = 0
    suppressed: int = 0


class RateLimit(logging.Filter):
    """Lets `limit` messages of one template pass in `interval` seconds; then says how many more there were.

    A template is a message before its arguments are filled in. `tell` is given the record that says so, once the
    interval is over, by a thread that lives until then.
    """

    def __init__(
        self,
        tell: Callable[[logging.LogRecord], object],
        limit: int = LIMIT,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._tell = tell
        self._limit = limit
        self._interval = interval
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record passes."""
        if getattr(record, "summary", False):
            return True
        key = (record.name, record.levelno, str(record.msg))
        now = self._clock()
        self._summarize_late(now)
        with self._lock:
            window = self._windows.get(key)
            if window is None or (window.ends <= now and not window.suppressed):
                self._windows = {k: w for k, w in self._windows.items() if w.ends > now or w.suppressed}
                window = self._windows[key] = _Window(now + self._interval)
            if window.passed < self._limit:
                window.passed += 1
                return True
            window.suppressed += 1
            first = window.suppressed == 1
        if first:
            timer = threading.Timer(max(0.0, window.ends - now), self.summarize, (key,))
            timer.daemon = True
            # Where there is no thread to be had, the next record that comes once the interval is over tells of it.
            with suppress(RuntimeError):
                timer.start()
        return False

    def _summarize_late(self, now: float) -> None:
        with self._lock:
            late = [key for key, window in self._windows.items() if window.suppressed and window.ends + _LATE < now]
        for key in late:
            self.summarize(key)

    def summarize(self, key: tuple[str, int, str]) -> None:
        """End the interval of a template, and tell how many of it were suppressed."""
        with self._lock:
            window = self._windows.pop(key, None)
        if window is not None and window.suppressed:
            name, level, template = key
            text = "suppressed %d similar: %s"
            record = logging.LogRecord(name, level, __file__, 0, text, (window.suppressed, template), None)
            record.summary = True
            self._tell(record)
