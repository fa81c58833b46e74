"""What an examination finds: one thing at a time, what it costs if it is not as it should be, and how to mend that."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """What a check says; `missing` of something that coordlfs cannot do without is `required` as well."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was examined: what was found, and if it is not all right what that costs and how to mend it."""

    name: str
    state: State
    found: str
    cost: str = ""
    remedy: str = ""
    required: bool = False  # without it coordlfs cannot work at all


def good(name: str, found: str) -> Check:
    """It is as it should be."""
    return Check(name, State.OK, found)


def reason(e: OSError) -> str:
    """What the system says."""
    return e.strerror or errno.errorcode.get(e.errno or 0, "unknown error")
