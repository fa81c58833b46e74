"""What the hook knows in one process of the program: its loaders, the one that is measured, and the result."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from . import device, held, opens, ranks
from .config import Config
from .plan import Handout, Plan
from .seen import Seen
from .sources import Source


class Runtime:
    """One for each process; processes that this one forks (a loader's workers) have nothing to do with it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.plan: Plan | None = None
        self._pid = os.getpid()
        self._seen: list[tuple[Callable[[], Any], Seen]] = []
        self._measured: Seen | None = None
        self._meetings = ranks.Meetings(config.out)
        self._written = False

    def meet(self, owner: Any, kind: str) -> Seen:
        """The record of a loader that the program begins to iterate over."""
        seen = next((seen for known, seen in self._seen if known() is owner), None)
        if seen is None:
            dataset = getattr(owner, "dataset", None)
            name = type(dataset).__name__ if dataset is not None else None
            seen = Seen(len(self._seen) + 1, kind, name, device.training())
            self._seen.append((_reference(owner), seen))
        seen.begin()
        return seen

    def measures(self, seen: Seen) -> bool:
        """Whether this loader is the one that is measured."""
        if not self.config.sections or not self.is_here():
            return False
        chosen = self.config.loader
        if self._measured is None and (seen.training if chosen is None else seen.number == chosen):
            self._measured = seen
        return self._measured is seen

    def is_here(self) -> bool:
        """Whether this is the process that was hooked, and none that it forked."""
        return os.getpid() == self._pid

    def handout(self, make: Callable[[], Source]) -> Handout:
        """What the program iterates over instead of the measured loader."""
        if self.plan is None:
            self.plan = self.plan_for(make())
        else:
            self.plan.came_back()
        return Handout(self.plan)

    def plan_for(self, source: Source) -> Plan:
        """The plan of this process."""
        return Plan(source, self.config.sections, self._meetings.meet, self.finish)

    def write(self) -> None:
        """What was found in this process, to its file."""
        if self._written or not self.is_here() or not self._seen:
            return
        self._written = True
        result: dict[str, Any] = {
            "rank": ranks.rank(),
            "ranks": ranks.world(),
            "loaders": [seen.figures() for _, seen in self._seen],
            "measured": self._measured.number if self._measured else None,
            "versions": device.versions(),
            "held": self._held() if self.config.opens else [],
            "packages": opens.packages() if self.config.opens else [],
        }
        if self.plan:
            result["kind"] = self.plan.source.kind
            result["source"] = self.plan.source.figures()
            result["sections"] = self.plan.results
            result["exhausted"] = self.plan.exhausted
            result["handed"] = self.plan.handed
            result["notes"] = self.plan.notes
        path = f"{self.config.out}/result-{self._pid}"
        with open(f"{path}.tmp", "w") as f:
            json.dump(result, f)
        os.rename(f"{path}.tmp", f"{path}.json")

    def _held(self) -> list[str]:
        """What this process and those that load for it have open or mapped."""
        found: set[str] = set()
        pids = {os.getpid()}
        with suppress(Exception):
            pids.update(self.plan.source.loading(self.plan.open()) if self.plan else [])
        for pid in pids:
            found |= held.held(pid)
        return sorted(found)

    def finish(self) -> None:
        """Everything is measured: end the process, without the program's further doing."""
        with suppress(OSError):
            self.write()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        # A rank that ends before the others have measured would have them fail.
        with suppress(Exception):
            self._meetings.meet("end")
        os._exit(0)


def _reference(owner: Any) -> Callable[[], Any]:
    """Does not keep the loader alive, whose workers end with it; where it must, it does."""
    try:
        reference: Callable[[], Any] = weakref.ref(owner)
    except TypeError:
        return lambda: owner
    return reference


active: Runtime | None = None
