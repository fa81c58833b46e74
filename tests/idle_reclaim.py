"""A plugin of pytest: a test that counts pages is run again if it counted wrong while the machine took some of them.

Where the machine takes back memory that looks idle (see `coordlfs_tools.lab.idle_reclaim`), a test may have counted
rightly and still fail: seen here at one page of a mount in 26 runs of a test that kills a keeper and wants nothing read
again. The kernel says which pages were taken; a test that failed without that has failed.

It needs root and tracefs. Without them, or without DAMON, tests fail as they do.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from coordlfs_tools.lab.idle_reclaim import Watch, watched


class PagesTaken(Exception):
    """A test failed, and pages of its mounts were taken as it ran: it is run again (`--only-rerun` names this)."""


_WATCH = pytest.StashKey[Watch | None]()


@pytest.fixture(scope="session", autouse=True)
def _idle_reclaim_is_watched(pytestconfig: pytest.Config) -> Iterator[None]:
    with watched() as watch:
        pytestconfig.stash[_WATCH] = watch
        yield
        pytestconfig.stash[_WATCH] = None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What was taken before does not concern this test."""
    if watch := item.config.stash.get(_WATCH, None):
        watch.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Says so where pages were taken from a test that did not find what it counted."""
    try:
        return (yield)
    except AssertionError as e:
        watch = item.config.stash.get(_WATCH, None)
        if watch and (taken := watch.taken_from_fuse()):
            raise PagesTaken(f"the machine took pages of mounts {taken} times while this ran") from e
        raise
