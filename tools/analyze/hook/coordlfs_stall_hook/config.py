"""What the analyser asks of the processes it hooks. Both sides read it; it travels in the environment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

ENVIRONMENT = "COORDLFS_ANALYZE"


@dataclass(frozen=True)
class Section:
    """A stretch of iterations: `skip` of them are left out, then `count` are measured.

    With `restart` the samples that were drawn before are made once more. With `drain` they are not handed out, so that
    the loader alone is timed; with `ready` the same few, made beforehand, are handed out over and over. With `last` the
    loader makes nothing beyond this section, so that what it read is exactly what it handed out; and the section is as
    long as it takes for every worker to have made one minibatch before the measured ones and two of them.
    """

    name: str
    skip: int
    count: int
    restart: bool = False
    drain: bool = False
    ready: bool = False
    last: bool = False


@dataclass(frozen=True)
class Config:
    """`out` is the directory for results; `loader` the number of the loader to measure (None: the first that trains).

    With `opens` the names of the files that are opened are written down: those below `data`, or, if that is None, all
    that could be data. No sections: observe only.
    """

    out: str
    sections: tuple[Section, ...] = ()
    loader: int | None = None
    opens: bool = False
    data: str | None = None

    def dumps(self) -> str:
        """For the environment."""
        return json.dumps(asdict(self))


def loads(words: str) -> Config:
    """From the environment."""
    fields = json.loads(words)
    fields["sections"] = tuple(Section(**section) for section in fields["sections"])
    return Config(**fields)
