"""A plugin of pytest for CI: a test that is skipped has failed, so that what no longer runs is seen.

`.ci/run` loads it (`-p tests.no_skips`); on other machines a test may skip what the machine cannot do.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import pytest

ALLOWED: tuple[str, ...] = ()  # what a reason to skip may begin with even in CI

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skipped itself, or that a mark skipped."""
    return _without_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skipped itself."""
    return _without_skip((yield))


def _without_skip(report: Report) -> Report:
    if not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report
