"""`HintedSampler`: an ordinary sampler that tells coordlfs what it is about to hand out.

It changes neither the samples nor their order.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from coordlfs_loader.hints import Drawn, Hints, files_in
from torch.utils.data import Sampler

log = logging.getLogger(__name__)

_LOOK_AT = 16  # files, in search of the mount
_KNOWN = 1 << 24  # indices below it have their file's number remembered, 8 bytes each
_ordinals = count()

Path = str | bytes | os.PathLike[str]


def _shared_job(ordinal: int) -> int | None:
    """A name that the ranks of a distributed job have in common for their sampler number `ordinal`, if this is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    text = " ".join([*(os.environ.get(name, "") for name in names), str(ordinal)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class HintedSampler(Sampler[Any]):
    """Wraps any sampler or batch sampler: the same indices in the same order, and hints for those who can use them.

    `files` leads from an index to the path of its file: a sequence or a function. Where the files do not lie on a
    coordlfs mount nothing else happens, and nothing is drawn ahead; else at most 4,096 files are, as far as that takes
    no time. The sampler need not have a length or an end.

        sampler = HintedSampler(RandomSampler(dataset), [path for path, _ in dataset.samples])
        loader = DataLoader(dataset, batch_size=256, sampler=sampler, num_workers=6)
    """

    def __init__(self, sampler: Any, files: Sequence[Path] | Callable[[int], Path]) -> None:
        self.sampler = sampler
        self._path: Callable[[int], Path] = files if callable(files) else files.__getitem__
        self._ordinal = next(_ordinals)
        self._epoch = -1
        self._next_epoch = 0
        self._hints: Hints | None = None
        self._looked = False
        self._seen = 0  # files that were looked at
        self._numbers: array[int] = array("Q")  # by index, 0 while it is not known

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        # `batch_size`, `drop_last`, `generator`, `num_replicas` …: whoever asks means the sampler.
        if name == "sampler" or name.startswith("__") or name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __getstate__(self) -> dict[str, Any]:
        # For workers that are spawned, which have no use for hints.
        return self.__dict__ | {"_hints": None, "_looked": True}

    def set_epoch(self, epoch: int) -> None:
        """As DistributedSampler has it."""
        self._next_epoch = max(self._next_epoch, epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        self._epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        order, hints = Drawn(self.sampler), None
        # Looked for file by file: where there is no mount, nothing is drawn before it is asked for.
        while not self._looked and hints is None and (files := order.peek()):
            hints = self._look(files)
            if hints is None:
                yield next(order)
        if hints is None and self._hints is None:
            yield from order
            return
        hints = self._begin(order)
        try:
            for drawn in order:
                if hints is not None:
                    self._advance(hints, len(files_in(drawn)))
                yield drawn
        finally:
            if hints is not None:
                self._end(hints)

    def _look(self, files: Sequence[Any]) -> Hints | None:
        """Look for the mount that these files lie on, unless enough were looked at."""
        try:
            look_at = _LOOK_AT - self._seen
            self._hints = Hints.for_files(map(self._path, files), _shared_job(self._ordinal), look_at=look_at)
        except KeyboardInterrupt:
            raise
        except BaseException:  # a path that cannot be had, an index of another kind: the job need not know
            log.debug("no hints", exc_info=True)
            self._seen = _LOOK_AT
        self._seen += len(files)
        self._looked = self._hints is not None or self._seen >= _LOOK_AT
        return self._hints

    def _begin(self, order: Drawn) -> Hints | None:
        """Announce an epoch; None where there is nobody to be told."""
        try:
            if self._hints is not None:
                self._hints.begin(self._epoch, order, self._number, order.taken)
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.debug("no hints", exc_info=True)
            self._hints = None
        return self._hints

    def _end(self, hints: Hints) -> None:
        try:
            hints.end()
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.debug("no hints", exc_info=True)

    def _advance(self, hints: Hints, count: int) -> None:
        try:
            hints.advance(count)
        except KeyboardInterrupt:
            raise
        except BaseException:  # as above, of an index further on
            log.debug("no hints", exc_info=True)
            hints.close()

    def _number(self, index: Any) -> int:
        assert self._hints is not None
        at = index if isinstance(index, int) and 0 <= index < _KNOWN else -1
        if at < 0:
            return self._hints.number(self._path(index))
        if at >= len(self._numbers):
            self._numbers.frombytes(bytes(8 * (max(at + 1, 2 * len(self._numbers)) - len(self._numbers))))
        if not self._numbers[at]:
            self._numbers[at] = self._hints.number(self._path(index))
        return self._numbers[at]
