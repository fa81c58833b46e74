"""Times the loaders of a program that knows nothing of it, and feeds the program as a measurement wants it.

Runs in the user's Python, before the user's program, and therefore needs nothing but Python. What to do is in the
environment (COORDLFS_ANALYZE, a JSON object; see `Plan`), what was found goes to a file for each process.

Without a plan (`observe`) the program runs as it is, and only the time in and between its loaders' `__next__` is taken.
With one, the loader that is measured hands out minibatches section by section: as the real pipeline makes them, those
that it made before once more (drawing the same samples from what is now the warm page cache), as fast as it can with
the program's computing left out ("drained"), or the same few prepared ones over and over. Then the process ends, there
and then: what follows an epoch, such as saving a model, never runs.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import islice
from types import ModuleType
from typing import Any

ENVIRONMENT = "COORDLFS_ANALYZE"
_READY = 8  # minibatches that are kept and handed out over and over
_clock = time.perf_counter_ns
_NOT_DATA = (".py", ".pyc", ".so", ".pth", ".pyi")


class Seen:
    """One loader of the program, and the times in nanoseconds that were spent in its `__next__` and between."""

    def __init__(self, number: int, kind: str, owner: Any, training: bool) -> None:
        self.number = number
        self.kind = kind
        self.owner = owner  # also keeps its id from being used again
        self.training = training
        self.passes = 0
        self.waits = array("q")
        self.computes = array("q")
        self.last = 0

    def figures(self) -> dict[str, Any]:
        """As the file has it; seconds."""
        dataset = getattr(self.owner, "dataset", None)
        return {
            "number": self.number,
            "kind": self.kind,
            "dataset": type(dataset).__name__ if dataset is not None else None,
            "training": self.training,
            "passes": self.passes,
            "iterations": len(self.waits),
            "wait": sum(self.waits) / 1e9,
            "compute": sum(self.computes) / 1e9,
        }


class Source:
    """A loader that is measured: begun with `start`, by and by asked for minibatches, and ended with `stop`."""

    kind = "iterable"
    workers = 0
    queue = 0  # minibatches that may be prepared ahead

    def __init__(self, begin: Callable[[], Iterator[Any]], owner: Any, samples: int | None = None) -> None:
        self._begin = begin
        self.owner = owner
        self.batch = samples

    def start(self, again: bool) -> Iterator[Any]:
        """An iterator; with `again` over what was handed out before."""
        return self._begin()

    def stop(self, iterator: Iterator[Any]) -> None:
        """End what the iterator runs."""

    def cpu(self, iterator: Iterator[Any]) -> float:
        """Seconds of CPU that loading has taken so far."""
        return time.process_time()

    def samples(self, batch: Any) -> int:
        """How many samples the minibatch has."""
        return self.batch or _first_length(batch)

    def figures(self) -> dict[str, Any]:
        """What is known of it."""
        return {"workers": self.workers, "queue": self.queue, "batch": self.batch, **_lengths(self.owner)}


def _lengths(owner: Any) -> dict[str, int | None]:
    lengths: dict[str, int | None] = {"batches": None, "samples": None}
    with suppress(Exception):
        lengths["batches"] = len(owner)
    with suppress(Exception):
        lengths["samples"] = len(owner.dataset)
    return lengths


def _first_length(batch: Any) -> int:
    """The length of the first thing in the minibatch that has one, which is the batch by PyTorch's custom."""
    while isinstance(batch, (list, tuple, dict)) and batch:
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        if (
            isinstance(batch, (list, tuple))
            and not isinstance(first, (list, tuple, dict))
            and not hasattr(first, "shape")
        ):
            return len(batch)
        batch = first
    shape = getattr(batch, "shape", None)
    return int(shape[0]) if shape is not None and len(shape) else 1


class TorchSource(Source):
    """A torch DataLoader. Its sampler is written along, so that the same samples can be asked for again."""

    kind = "torch.utils.data.DataLoader"

    def __init__(self, loader: Any) -> None:
        super().__init__(loader._get_iterator, loader)
        self.workers = loader.num_workers
        self.queue = loader.num_workers * (loader.prefetch_factor or 0)
        self.batch = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self._name = "batch_sampler" if loader._auto_collation else "sampler"
        self._sampler = loader._index_sampler
        self.drawn: list[Any] = []

    def start(self, again: bool) -> Iterator[Any]:
        """An iterator; with `again` over the minibatches that were drawn before, made anew."""
        # Straight into the dictionary: DataLoader refuses to have its sampler set. The loader is never used as it
        # was any more, for the process ends after the last section.
        self.owner.__dict__[self._name] = _Again(self.drawn) if again else _Drawn(self._sampler, self.drawn)
        return self._begin()

    def stop(self, iterator: Any) -> None:
        """End the workers."""
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def cpu(self, iterator: Any) -> float:
        """Of the workers, or of this process if there are none."""
        if not self.workers:
            return time.process_time()
        ticks = 0
        for worker in iterator._workers:
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{worker.pid}/stat") as f:
                fields = f.read().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def figures(self) -> dict[str, Any]:
        """Also how many samples were drawn, handed out or not."""
        with suppress(TypeError):
            return {**super().figures(), "drawn": sum(map(len, self.drawn)), "samples": len(self.owner.sampler)}
        return super().figures()


class _Drawn:
    def __init__(self, sampler: Any, drawn: list[Any]) -> None:
        self._sampler = sampler
        self._drawn = drawn

    def __iter__(self) -> Iterator[Any]:
        for indices in self._sampler:
            self._drawn.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)


class _Again:
    def __init__(self, drawn: list[Any]) -> None:
        self._drawn = drawn

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._drawn))

    def __len__(self) -> int:
        return len(self._drawn)


class Exhausted(Exception):
    """The loader had no minibatch any more."""


class Plan:
    """The sections of one measurement, as a generator that the program draws its minibatches from.

    Each section is an object with `name`, `skip` and `count` (iterations left out at first, and measured), and perhaps
    `restart` (begin the same samples again), `drain` (do not hand out), `ready` (hand out the same few).
    """

    def __init__(self, source: Source, sections: list[dict[str, Any]], finish: Callable[[], None]) -> None:
        self.source = source
        self.results: dict[str, dict[str, Any]] = {}
        self.exhausted: str | None = None
        self.handed = 0
        self._sections = sections
        self._finish = finish
        self._left = 0  # when a minibatch was handed out last
        self._away = 0  # nanoseconds of a section that the program spent between two passes over its loader
        self._lost = 0  # iterations that were not measured because of that
        self._current: Iterator[Any] | None = None
        self._batches = self._run()

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.handed += 1
        self._left = _clock()
        return batch

    def came_back(self) -> None:
        """The program left its loop and begins another."""
        if self._left:
            self._away += _clock() - self._left
            self._lost += 1

    def _run(self) -> Iterator[Any]:
        for section in self._sections:
            try:
                yield from self._section(section)
            except Exhausted:
                self.exhausted = section["name"]
                break
        if self._current is not None:
            self.source.stop(self._current)
        self._finish()

    def _section(self, section: dict[str, Any]) -> Iterator[Any]:
        skip, count = section["skip"], section["count"]
        if self._current is None or section.get("restart"):
            if self._current is not None:
                self.source.stop(self._current)
            self._current = self.source.start(again=bool(section.get("restart")))
        current = self._current
        if section.get("ready"):
            ready = [_moved(batch) for batch in islice(current, _READY)]
            if not ready:
                raise Exhausted
            self.source.stop(current)
            draw: Callable[[], Any] = _cycle(ready).__next__
        else:
            draw = current.__next__
        for _ in range(skip):
            batch = _drawn(draw)
            if not section.get("drain"):
                yield batch
        _together()
        waits = samples = self._away = self._lost = 0
        cpu = self.source.cpu(current) if section.get("drain") else 0.0
        start = _clock()
        for _ in range(count):
            asked = _clock()
            batch = _drawn(draw)
            waits += _clock() - asked
            samples += self.source.samples(batch)
            if not section.get("drain"):
                yield batch
        _synchronize()
        seconds = (_clock() - start - self._away) / 1e9
        self.results[section["name"]] = {
            "iterations": count,
            "measured": count - self._lost,
            "samples": samples,
            "seconds": seconds * count / max(count - self._lost, 1),
            "wait": waits / 1e9,
            "cpu": self.source.cpu(current) - cpu if section.get("drain") else None,
        }


def _cycle(ready: list[Any]) -> Iterator[Any]:
    while True:
        yield from ready


def _drawn(draw: Callable[[], Any]) -> Any:
    try:
        return draw()
    except StopIteration:
        raise Exhausted from None


class Handout:
    """What the program gets for its loader's iterator while that is measured; other attributes are the loader's."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __iter__(self) -> Handout:
        return self

    def __next__(self) -> Any:
        return next(self._plan)

    def __len__(self) -> int:
        return len(self._plan.source.owner)


# -- PyTorch, where the program has it ------------------------------------------------------------------------------


def _torch() -> Any:
    return sys.modules.get("torch")


def _training() -> bool:
    """Whether gradients are kept: validation is done without."""
    torch = _torch()
    return torch is None or bool(torch.is_grad_enabled())


def _synchronize() -> None:
    torch = _torch()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _together() -> None:
    """All ranks of a distributed job begin a section at the same time."""
    _synchronize()
    torch = _torch()
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _moved(batch: Any) -> Any:
    """The minibatch on the device that the program uses, if that is known."""
    torch = _torch()
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return batch
    device = torch.device("cuda", torch.cuda.current_device())

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return type(value)((key, move(each)) for key, each in value.items())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(move, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(move, value))
        return value

    return move(batch)


# -- the process ----------------------------------------------------------------------------------------------------


class Runtime:
    """What the hook knows in one process of the program."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.out: str = config["out"]
        self.sections: list[dict[str, Any]] = config.get("sections") or []
        self.chosen: int | None = config.get("loader")
        self.data: str | None = config.get("data")
        self.pid = os.getpid()
        self.seen: list[Seen] = []
        self.plan: Plan | None = None
        self.measured: Seen | None = None
        self.written = False

    def meet(self, owner: Any, kind: str) -> Seen:
        """The record of a loader that the program begins to iterate over."""
        for seen in self.seen:
            if seen.owner is owner:
                break
        else:
            seen = Seen(len(self.seen) + 1, kind, owner, _training())
            self.seen.append(seen)
        seen.passes += 1
        seen.last = 0
        return seen

    def measures(self, seen: Seen) -> bool:
        """Whether this loader is the one that is measured."""
        if not self.sections or os.getpid() != self.pid:
            return False
        if self.measured is None and (seen.number == self.chosen if self.chosen else seen.training):
            self.measured = seen
        return self.measured is seen

    def handout(self, make: Callable[[], Source]) -> Handout:
        """What the program iterates over instead."""
        if self.plan is None:
            self.plan = Plan(make(), self.sections, self.finish)
        else:
            self.plan.came_back()
        return Handout(self.plan)

    def write(self) -> None:
        """What was found in this process, to its file."""
        if self.written or os.getpid() != self.pid or not self.seen:
            return
        self.written = True
        result: dict[str, Any] = {
            "rank": int(os.environ.get("RANK", "0")),
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "local_ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "loaders": [seen.figures() for seen in self.seen],
            "measured": self.measured.number if self.measured else None,
        }
        if self.plan:
            result |= {
                "kind": self.plan.source.kind,
                "source": self.plan.source.figures(),
                "sections": self.plan.results,
                "exhausted": self.plan.exhausted,
                "handed": self.plan.handed,
            }
        torch = _torch()
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            result["gpu"] = torch.cuda.get_device_name()
        if torch is not None:
            result["torch"] = str(torch.__version__)
        path = f"{self.out}/result-{self.pid}"
        with open(f"{path}.tmp", "w") as f:
            json.dump(result, f)
        os.rename(f"{path}.tmp", f"{path}.json")

    def finish(self) -> None:
        """Everything is measured: end the process, without the program's further doing."""
        self.write()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        with suppress(Exception):
            _together()
        os._exit(0)


_runtime: Runtime | None = None


def _watch_torch(module: ModuleType) -> None:
    """Wrap `DataLoader.__iter__`, and the `__next__` of its iterators, which stay what they are."""
    loader: Any = module.DataLoader
    iterator: Any = module._BaseDataLoaderIter
    begin, advance = loader.__iter__, iterator.__next__

    def __iter__(self: Any) -> Any:
        runtime = _runtime
        if runtime is None:
            return begin(self)
        seen = runtime.meet(self, TorchSource.kind)
        if runtime.measures(seen):
            return runtime.handout(lambda: TorchSource(self))
        result = begin(self)
        result._coordlfs_seen = seen
        return result

    def __next__(self: Any) -> Any:
        seen = getattr(self, "_coordlfs_seen", None)
        return advance(self) if seen is None else _timed(seen, advance, self)

    loader.__iter__ = _like(__iter__, begin)
    iterator.__next__ = _like(__next__, advance)


def _timed(seen: Seen, advance: Callable[[Any], Any], iterator: Any) -> Any:
    asked = _clock()
    if seen.last:
        seen.computes.append(asked - seen.last)
    batch = advance(iterator)
    seen.last = left = _clock()
    seen.waits.append(left - asked)
    return batch


def _like(function: Any, original: Any) -> Any:
    function.__doc__ = original.__doc__
    function.__wrapped__ = original
    return function


def _watch_class(kind: str, name: str) -> Callable[[ModuleType], None]:
    """Wrap a class that is its own iterator (DALI), or whose `__iter__` gives one (CoordinatedLoader)."""

    def watch(module: ModuleType) -> None:
        cls: Any = getattr(module, name, None)
        if cls is None:
            return
        begin = cls.__iter__

        def __iter__(self: Any) -> Any:
            runtime = _runtime
            if runtime is None:
                return begin(self)
            seen = runtime.meet(self, kind)
            if runtime.measures(seen):
                return runtime.handout(lambda: _source(kind, lambda: begin(self), self))
            return _Observed(begin(self), seen)

        cls.__iter__ = _like(__iter__, begin)

    return watch


def _source(kind: str, begin: Callable[[], Iterator[Any]], owner: Any, samples: int | None = None) -> Source:
    source = Source(begin, owner, samples or getattr(owner, "batch_size", None))
    source.kind = kind
    return source


class _Observed:
    """An iterator whose waits are timed."""

    def __init__(self, iterator: Iterator[Any], seen: Seen) -> None:
        self._iterator = iterator
        self._seen = seen

    def __iter__(self) -> _Observed:
        return self

    def __next__(self) -> Any:
        return _timed(self._seen, next, self._iterator)

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "torch.utils.data.dataloader": _watch_torch,
    "nvidia.dali.plugin.pytorch": _watch_class("DALIGenericIterator", "DALIGenericIterator"),
    "coordlfs_loader": _watch_class("CoordinatedLoader", "CoordinatedLoader"),
}


class _Finder(MetaPathFinder):
    """Lets others find the watched modules, and wraps what is in them as soon as they were run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As the others find it, with a loader that calls us afterwards."""
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watching(spec.loader, WATCHED[name])
                return spec
        return None


class _Watching(Loader):
    def __init__(self, loader: Any, watch: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._watch = watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._watch(module)


def _note_opens(runtime: Runtime) -> None:
    """Write down which files are opened for reading, by this process and those it forks."""
    log = os.open(f"{runtime.out}/opens", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    inside = os.path.join(runtime.data, "") if runtime.data else None
    own = tuple(
        {sys.prefix, sys.base_prefix, runtime.out, "/proc/", "/sys/", "/dev/", "/etc/", "/usr/", "/lib", "/run/"}
    )

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = arguments
        if not isinstance(path, (str, bytes)) or flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            return
        path = os.path.abspath(os.fsdecode(path))
        wanted = path.startswith(inside) if inside else not path.startswith(own) and not path.endswith(_NOT_DATA)
        if wanted and "\n" not in path:
            with suppress(OSError):
                os.write(log, os.fsencode(path + "\n"))

    sys.addaudithook(audit)


# -- loops of the program's own -------------------------------------------------------------------------------------


class _Loop:
    """A loop marked with `iteration`: the time inside is computing, between is loading."""

    def __init__(self, runtime: Runtime, seen: Seen, samples: int) -> None:
        self._runtime = runtime
        self._seen = seen
        self._samples = samples
        self._count = 0
        self._start = 0
        self._entered = 0
        self._left = 0
        self._wait = 0

    def enter(self) -> None:
        now = _clock()
        if self._left:
            self._seen.computes.append(self._left - self._entered)
            self._seen.waits.append(now - self._left)
        section = self._runtime.sections[0] if self._runtime.measured is self._seen else None
        if section:
            if self._count == section["skip"]:
                self._start, self._wait = now, 0
            elif self._left:
                self._wait += now - self._left
            if self._count == section["skip"] + section["count"]:
                self._end(section, (now - self._start) / 1e9)
        self._count += 1
        self._entered = _clock()

    def leave(self) -> None:
        _synchronize()
        self._left = _clock()

    def _end(self, section: dict[str, Any], seconds: float) -> None:
        source = _source("analyzer.iteration", lambda: iter(()), self, self._samples)
        plan = self._runtime.plan = Plan(source, [], self._runtime.finish)
        plan.handed = self._count
        plan.results[section["name"]] = {
            "iterations": section["count"],
            "measured": section["count"],
            "samples": section["count"] * self._samples,
            "seconds": seconds,
            "wait": self._wait / 1e9,
            "cpu": None,
        }
        self._runtime.finish()


_loops: dict[str, _Loop] = {}


@contextmanager
def iteration(samples: int = 1, name: str = "loop") -> Iterator[None]:
    """Mark one iteration's computing; see `coordlfs_tools.analyze.analyzer`."""
    runtime = _runtime
    if runtime is None:
        yield
        return
    loop = _loops.get(name)
    if loop is None:
        seen = runtime.meet(_loops.setdefault, f"analyzer.iteration({name!r})")
        seen.owner = object()
        runtime.measures(seen)
        loop = _loops[name] = _Loop(runtime, seen, samples)
    loop.enter()
    try:
        yield
    finally:
        loop.leave()


def batches(iterable: Any, samples: int | None = None) -> Iterator[Any]:
    """Iterate over the program's own source of minibatches; see `coordlfs_tools.analyze.analyzer`."""
    runtime = _runtime
    if runtime is None:
        return iter(iterable)
    seen = runtime.meet(iterable, "analyzer.batches")
    if runtime.measures(seen):
        return runtime.handout(lambda: _source("analyzer.batches", lambda: iter(iterable), iterable, samples))
    return _Observed(iter(iterable), seen)


def install() -> None:
    """Put the hook in, if the environment asks for it."""
    global _runtime
    words = os.environ.get(ENVIRONMENT)
    if not words or _runtime is not None:
        return
    config = json.loads(words)
    if not os.path.isdir(config["out"]):
        return  # a process that outlived its measurement
    _runtime = Runtime(config)
    with suppress(FileExistsError):
        os.close(os.open(f"{_runtime.out}/started", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    sys.meta_path.insert(0, _Finder())
    if config.get("opens"):
        _note_opens(_runtime)
    atexit.register(_runtime.write)
