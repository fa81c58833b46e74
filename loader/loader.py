"""CoordinatedLoader: a DataLoader whose batches are prepared once for all jobs of a group on this node.

It puts the other modules together for one job. Who prepares what is decided by the broker.
"""

from __future__ import annotations

import os
import platform
import select
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from coordlfs_loader import payload, pinned, wire
from coordlfs_loader.announcer import Announcer, files_of
from coordlfs_loader.client import Client, Place
from coordlfs_loader.identity import identify
from coordlfs_loader.order import Order
from coordlfs_loader.randomness import epoch_seed, set_seeds, undisturbed
from coordlfs_loader.wire import LEAST_STAGE
from coordlfs_loader.worker import Preparer
from coordlfs_loader.workers import Workers
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

STAGE_BYTES = 2 << 30
_LONGEST_GROUP = 1000
_LOOK = 5.0  # seconds between looks at the clock while a batch is waited for
_COPIED = 0.002  # seconds between looks at what a device copies
# Samples of an epoch beyond which a sampler is taken for one without an end: where nothing has a length; else at least,
# and so many times the length.
_NO_LENGTH, _LEAST, _TIMES = 1 << 24, 1 << 22, 100


class CoordinatedLoader:
    """Loads data as torch.utils.data.DataLoader does, sharing the work with the other jobs of its group on this node.

    What the arguments before `group` mean is said there; they must be equal in all jobs of the group.

    Args:
        prefetch_factor, persistent_workers, in_order: Taken as DataLoader takes them, and without effect: `stage_bytes`
            bounds what is prepared ahead, workers live as long as the loader, and batches come in order.
        pin_memory_device: "" or "cuda": memory is pinned for CUDA.
        group: Name of the group; jobs of one user on one node with the same name share.
        seed: What the order and the randomness of samples derive from, together with the epoch (and the index).
        pin_memory: Register the stage with CUDA, so that `.to(device, non_blocking=True)` is asynchronous; does nothing
            where there is no CUDA. The tensors are then the stage itself: writing into them ends the process.
        stage_bytes: Bound of the memory that the group's prepared batches take up, in bytes; at least twice the
            largest batch.
        patience: Seconds for which the others wait for a job that is slower than they, before it leaves the
            group until its next epoch and prepares for itself. None: for ever.
        identity: What vouches for the samples: jobs with equal ones share without a look at their datasets. None: they
            share if what makes their samples is shown to be the same (docs/loader.md says what is compared).
        files: What leads from an index to its file, for hints to the coordlfs mount on which the files lie
            (docs/hints.md). None: what the dataset shows itself, as those of torchvision do.

    Raises:
        ValueError: Arguments that DataLoader would refuse, and iterable datasets.
        coordlfs_loader.Refused: The jobs of the group have other settings or another order; the message says which.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = False,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        group: str,
        seed: int = 0,
        stage_bytes: int = STAGE_BYTES,
        patience: float | None = None,
        identity: str | None = None,
        files: Sequence[str] | Callable[[int], str] | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(type(dataset), "__getitem__"):
            raise ValueError(
                f"CoordinatedLoader needs a map-style dataset, whose samples have indices; {type(dataset).__name__} "
                "is iterable, and which of its samples a batch has cannot be known before"
            )
        for name, text in (("group", group), ("identity", identity)):
            if not isinstance(text, str) and not (name == "identity" and text is None):
                raise ValueError(f"coordlfs: {name} must be text, not {text!r}. Write {name}={str(text)!r}")
        if not group or "\0" in group or len(group) > _LONGEST_GROUP:
            raise ValueError(
                f"coordlfs: group must be text of 1 to {_LONGEST_GROUP} characters without NUL, not {group[:40]!r}"
            )
        if num_workers == 0 and (prefetch_factor is not None or persistent_workers):
            raise ValueError(
                "prefetch_factor and persistent_workers are for workers, and num_workers is 0. "
                "Leave them out, or set num_workers"
            )
        if prefetch_factor is not None and prefetch_factor < 0:
            raise ValueError(f"prefetch_factor must not be negative, and is {prefetch_factor}")
        if pin_memory_device.partition(":")[0] not in ("", "cuda"):
            raise ValueError(
                f"coordlfs: pin_memory_device={pin_memory_device!r}: memory is pinned for CUDA only. Leave it out"
            )
        if num_workers < 0 or timeout < 0:
            raise ValueError("num_workers and timeout must not be negative")
        if stage_bytes < LEAST_STAGE or (patience is not None and patience < 0):
            raise ValueError(f"stage_bytes must be at least {LEAST_STAGE}, and patience not negative")
        # It checks the arguments, makes samplers of them, and says how many batches there are.
        self._like = DataLoader(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            generator=generator,
        )
        self.dataset = dataset
        self.batch_size = self._like.batch_size
        self.sampler = self._like.sampler
        self.batch_sampler = self._like.batch_sampler
        self.collate_fn = self._like.collate_fn
        self.drop_last = self._like.drop_last
        self.generator = generator
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.pin_memory_device = pin_memory_device
        self.in_order = in_order
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.group = group
        self.seed = seed
        self.stage_bytes = stage_bytes
        self.patience = patience
        self.identity = identity
        self._announcer: Announcer | None = None
        found = files if callable(files) else files.__getitem__ if files is not None else files_of(dataset)
        if found is not None:
            self._announcer = Announcer(group, found)
        self._epoch: int | None = None  # the next to begin
        self._session: _Session | None = None
        self._walk: weakref.ref[_Walk] | None = None  # it keeps the loader, and not the other way round
        self._place: Place | None = None  # where it is, or was
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._like)

    def __iter__(self) -> Iterator[Any]:
        """Begin the next epoch. An iterator that was there before ends."""
        with wire.descriptors():
            return self._begin()

    def _begin(self) -> _Walk:
        self._stop()
        if self._session is None or self._session.owner != os.getpid():
            self._session = _Session(self)
        resume, self._resume = self._resume, None
        epoch = self._session.client.enter(self._epoch if resume is None else int(resume["epoch"]))
        at = None if resume is None else (int(resume["start"]), int(resume["taken"]))
        batches = self._draw(epoch)
        if self._announcer is not None:  # first, since with `begin` workers begin to read
            self._announcer.begin(epoch, batches, *(at or (0, 0)))
        place = self._session.client.begin(Order(epoch, batches), _length(self.dataset) or 0, at)
        self._epoch = epoch + 1
        if self._announcer is not None and at is None and place.start:
            self._announcer.begin(epoch, batches, place.start, 0)  # it is late, and begins where the others are
        walk = _Walk(self, self._session, place)
        self._walk, self._place = weakref.ref(walk), place
        return walk

    def _stop(self) -> None:
        """End the iterator, if there is one."""
        walk = self._walk() if self._walk is not None else None
        if walk is not None:
            walk.close()
        self._walk = self._place = None

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch's. Without it a job begins with the epoch that its group is at."""
        self._epoch = epoch
        self._resume = None

    def _draw(self, epoch: int) -> list[Any]:
        """Draw the order of an epoch, as a DataLoader would whose generators are seeded with `epoch_seed`."""
        drawn = epoch_seed(self.seed, epoch)
        with undisturbed():
            set_seeds(drawn)
            samplers = (self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None))
            for one in (self, *samplers):
                generator = getattr(one, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(drawn)
            for sampler in samplers:
                set_epoch = getattr(sampler, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(epoch)
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # a DataLoader's seed for its workers
            return self._all(self._like._index_sampler)

    def _all(self, sampler: Iterable[Any]) -> list[Any]:
        """All batches that a sampler draws. Raises RuntimeError for one that does not end."""
        lengths = [n for each in (self.dataset, self.sampler) if (n := _length(each))]
        most = max(_LEAST, _TIMES * max(lengths)) if lengths else _NO_LENGTH
        batches, samples = [], 0
        try:
            for batch in sampler:
                batches.append(list(batch) if isinstance(batch, Iterator) else batch)
                samples += len(batch) if type(batch) is list else 1
                if samples > most:
                    break
            else:
                return batches
        except MemoryError:
            batches.clear()
        length = f", {samples // max(lengths):,} times the length" if lengths else ""
        name = " of ".join(
            type(each).__name__ for each in (sampler, getattr(sampler, "sampler", None)) if each is not None
        )
        raise RuntimeError(
            f"coordlfs: the sampler does not end: {name} gave {samples:,} samples{length}. "
            "CoordinatedLoader draws an epoch's order before it begins: give it a sampler that ends, such as "
            "itertools.islice of it, or use DataLoader with HintedSampler"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, to go on there: as torchdata's StatefulDataLoader does."""
        if self._resume is not None:
            return dict(self._resume)
        place = self._place
        if place is None or place.taken >= place.order.count:
            return {"epoch": self._epoch, "start": None, "taken": 0, "seed": self.seed}
        return {"epoch": place.order.epoch, "start": place.start, "taken": place.taken, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there with the next iteration. Raises ValueError for another seed's state."""
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of seed {state['seed']}, and this loader has seed {self.seed}")
        self._stop()
        self._epoch = state["epoch"]
        self._resume = dict(state) if state["taken"] else None

    def close(self) -> None:
        """End the workers and leave the group. Batches that were handed over stay valid."""
        self._stop()
        if self._announcer is not None:
            self._announcer.close()
        if self._session is not None:
            self._session.close()
            self._session = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_walk": None, "_place": None, "_announcer": None}

    def _profile(self) -> dict[str, Any]:
        """What the jobs of a group must agree on."""

        def name(thing: object) -> str:
            kind = thing if isinstance(thing, type | FunctionType | BuiltinFunctionType | MethodType) else type(thing)
            return f"{kind.__module__}.{kind.__qualname__}"

        settings = {
            "dataset": name(self.dataset),
            "dataset_length": _length(self.dataset),
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "sampler": name(self.sampler),
            "batch_sampler": name(self.batch_sampler),
            "collate_fn": name(self.collate_fn),
            "seed": self.seed,
            "stage_bytes": self.stage_bytes,
            "patience": self.patience,
            "identity": self.identity,
            "default_dtype": str(torch.get_default_dtype()),
            "default_device": str(torch.get_default_device()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "protocol": wire.PROTOCOL,
        }
        return settings if self.identity is not None else settings | self._content()

    def _content(self) -> dict[str, Any]:
        """What makes the samples, as it is now, when the workers begin to see it."""
        made_by = {"dataset": self.dataset, "collate_fn": self.collate_fn, "worker_init_fn": self.worker_init_fn}
        if self.collate_fn is default_collate:
            made_by["default_collate_fn_map"] = default_collate_fn_map
        found = identify(**made_by)
        return {"content": found.digest, "parts": found.parts, "unknown": found.unknown}


class _Session:
    """A loader's place in its group: the connection and the workers, ended with the loader at the latest."""

    def __init__(self, loader: CoordinatedLoader) -> None:
        self.owner = os.getpid()
        like = loader._like
        preparer = Preparer(loader.dataset, like.collate_fn, like._auto_collation, loader.seed)
        where = "in the process of the job itself"

        def prepare(fd: int, epoch: int, number: int) -> tuple[int, list[Any]]:
            with undisturbed():
                return preparer.prepare(fd, epoch, number, where)

        alone = loader.num_workers == 0
        pins = pinned.pins(loader.pin_memory)
        self.client = Client(loader.group, loader._profile(), loader.num_workers, prepare if alone else None, pins)
        context = loader.multiprocessing_context
        if context is None or isinstance(context, str):
            context = torch.multiprocessing.get_context(context)
        self.workers = Workers(
            loader.num_workers,
            context,
            preparer,
            loader.dataset,
            loader.worker_init_fn,
            wire.socket_path(loader.group),
            self.client.name,
        )
        self._watched: tuple[int, ...] = ()
        self._poll = select.poll()
        self._finalizer = weakref.finalize(loader, _end, self.client, self.workers, self.owner)

    def wait(self, timeout: float) -> list[int]:
        """Wait so many seconds for the broker to speak or a worker to end; the descriptors that can be read."""
        watched = self.client.fileno(), *self.workers.filenos()
        if watched != self._watched:
            self._watched, self._poll = watched, select.poll()
            for fd in watched:
                self._poll.register(fd, select.POLLIN)
        return [fd for fd, _ in self._poll.poll(timeout * 1000)]

    def close(self) -> None:
        """Leave the group and end the workers."""
        self._finalizer()


def _length(thing: Any) -> int | None:
    """How long it is, if it says."""
    try:
        return len(thing)
    except Exception:  # whatever one without a length raises
        return None


def _end(client: Client, workers: Workers, owner: int) -> None:
    if os.getpid() == owner:
        client.close()
        workers.close()


class _Walk(Iterator[Any]):
    """One epoch of one job. Keeps its loader, as long as there is something to come."""

    def __init__(self, loader: CoordinatedLoader, session: _Session, place: Place) -> None:
        self._loader: CoordinatedLoader | None = loader
        self._session: _Session | None = session
        self.place = place
        self._timeout = loader.timeout
        self._announcer = loader._announcer
        length = _length(loader._like)
        self._length = place.order.count if length is None else length

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> Any:
        session, place = self._session, self.place
        if session is None or place.taken >= place.order.count:
            self.close()
            raise StopIteration
        if self._announcer is not None:
            self._announcer.advance()
        self._wait(session)
        number, data, error = session.client.take()
        if data is None:
            raise RuntimeError(f"batch {number} of epoch {place.order.epoch} cannot be had: {error}")
        batch = payload.decode(data)
        if isinstance(batch, ExceptionWrapper):
            batch.reraise()
        return batch

    def _wait(self, session: _Session) -> None:
        client, workers = session.client, session.workers
        deadline = time.monotonic() + self._timeout if self._timeout else None
        while client.waiting:
            client.tell()
            copying = client.settle()
            client.work()
            ready, broker = session.wait(_COPIED if copying else _LOOK), client.fileno()
            if ready == [broker]:
                client.advance()
            elif ready:
                for name, why in workers.look():
                    client.lost(name, why)
            if deadline is not None and client.waiting and time.monotonic() > deadline:
                raise RuntimeError(f"CoordinatedLoader timed out after {self._timeout} seconds")

    def close(self) -> None:
        """Want no more of it."""
        session, self._session = self._session, None
        if session is not None and session.owner == os.getpid():
            if self._announcer is not None:
                self._announcer.end()
            session.client.end()
        self._loader = None  # last: it may go with this

    def __del__(self) -> None:
        self.close()
