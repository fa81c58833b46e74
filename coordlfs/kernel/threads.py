"""Threads where there may be none to be had: a pids cgroup, `ulimit -u`, `ulimit -v`. What needs one waits for it."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")
_AGAIN = 0.1  # seconds until a thread that could not be had is tried again
STACK = 1 << 20  # bytes, whatever `ulimit -s` says: one of 64 KiB is too small for the interpreter


def start(thread: threading.Thread) -> bool:
    """Start a thread; False if there is none to be had."""
    try:
        thread.start()
    except RuntimeError:  # "can't start new thread"
        log.warning("no thread can be started, so that requests wait: is `ulimit -u` or a pids cgroup too small?")
        return False
    return True


def in_time(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns or raises, called by a thread that goes on if that takes longer: TimeoutError."""
    ended: Future[T] = Future()

    def call() -> None:
        try:
            ended.set_result(function())
        except BaseException as e:
            ended.set_exception(e)

    if not start(threading.Thread(target=call, daemon=True)):
        call()
    try:
        return ended.result(seconds)
    except TimeoutError as e:
        raise (e if e.args else TimeoutError(errno.ETIMEDOUT, f"it has not answered for {seconds:.0f} s")) from None


async def run(
    function: Callable[[], T], *, limiter: trio.CapacityLimiter | None = None, abandon_on_cancel: bool = False
) -> T:
    """What `function` returns, called by a thread; where there is none to be had, it is waited for."""
    began = False

    def call() -> T:
        nonlocal began
        began = True
        return function()

    while True:
        try:
            return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=abandon_on_cancel)
        except RuntimeError:
            if began:  # it is the function's own
                raise
        await trio.sleep(_AGAIN)
