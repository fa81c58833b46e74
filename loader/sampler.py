"""`HintedSampler`: an ordinary sampler that tells coordlfs what it is about to hand out."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from coordlfs_loader.hints import Hints
from torch.utils.data import Sampler

log = logging.getLogger(__name__)

_KNOWN = 1 << 27  # indices below it have their file's number remembered, 8 bytes each
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
    coordlfs mount nothing else happens. The order of an epoch is drawn from the sampler as a whole when the epoch
    begins (a sampler without a length is passed through without hints).

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
        if not hasattr(self.sampler, "__len__"):
            yield from self.sampler
            return
        order = list(self.sampler)
        hints = self._begin(order)
        if hints is None:
            yield from order
            return
        try:
            for drawn in order:
                self._advance(hints, len(drawn) if isinstance(drawn, (list, tuple)) else 1)
                yield drawn
        finally:
            hints.end()

    def _begin(self, order: list[Any]) -> Hints | None:
        """Announce an epoch; None where there is nobody to be told."""
        try:
            indices = [i for drawn in order for i in (drawn if isinstance(drawn, (list, tuple)) else (drawn,))]
            if not self._looked:
                self._looked = True
                self._hints = Hints.for_files(map(self._path, indices), _shared_job(self._ordinal))
            if self._hints is not None:
                self._hints.begin(self._epoch, indices, self._number)
        except Exception:  # a path that cannot be had, an index of another kind: the job need not know
            log.debug("no hints", exc_info=True)
            self._hints = None
        return self._hints

    def _advance(self, hints: Hints, count: int) -> None:
        try:
            hints.advance(count)
        except Exception:  # as above, of an index further on
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
