"""Wraps the loaders that are known as soon as the program imports them; whoever is not imported costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import runtime
from .seen import Observed
from .sources import Dali, Iterable, Source, TorchLoader


def _like(function: Any, original: Any) -> Any:
    function.__doc__ = original.__doc__
    function.__wrapped__ = original
    return function


def _beginning(cls: Any, kind: str, source: Callable[[Any, Callable[[], Any]], Source]) -> None:
    """Have the class's `__iter__` noticed; `source` makes what is measured of an instance and what begins it."""
    begin = cls.__iter__

    def __iter__(self: Any) -> Any:
        active = runtime.active
        if active is None:
            return begin(self)
        seen = active.meet(self, kind)
        if active.measures(seen):
            return active.handout(lambda: source(self, lambda: begin(self)))
        return Observed(begin(self), seen)

    cls.__iter__ = _like(__iter__, begin)


_EMPTY: tuple[Any, ...] = ()


def _watch_torch(module: Any) -> None:
    """The iterators, not the loaders: however a class made of DataLoader comes to one, it is timed, and measured.

    Each is noticed as it is made, and asks the plan for its minibatches if it is the measured loader's.
    """
    cls = module._BaseDataLoaderIter
    made, advance, again = cls.__init__, cls.__next__, cls._reset
    placed: list[Any] = []  # a sampler for the iterator that is made next, by ourselves

    def __new__(cls: Any, *arguments: Any, **named: Any) -> Any:
        iterator = object.__new__(cls)
        active = runtime.active
        if active is not None and active.config.sections and not placed:
            iterator.__dict__["_coordlfs_made"] = lambda: cls(*arguments, **named)
        return iterator

    def __init__(self: Any, loader: Any, *arguments: Any, **named: Any) -> None:
        made(self, loader, *arguments, **named)
        make = self.__dict__.pop("_coordlfs_made", None)
        active = runtime.active
        if active is None:
            return
        if placed:
            _replace(self, placed[0])
            return
        seen = active.meet(loader, TorchLoader.KIND)
        if make is None or not active.measures(seen):
            self.__dict__["_coordlfs_seen"] = seen
            return
        if active.plan is None:
            source = TorchLoader(loader, self, make, advance, placed)
            plan = active.plan = active.plan_for(source)
            _replace(self, source.record(self._index_sampler, plan.most))
        else:
            active.plan.came_back()
            _replace(self, _EMPTY)  # it need not make anything: it hands out what the plan has
        self.__dict__["_coordlfs_plan"] = active.plan

    def __next__(self: Any) -> Any:
        plan = self.__dict__.get("_coordlfs_plan")
        if plan is not None:
            self.__dict__["_reset"] = lambda *arguments, **named: plan.came_back()  # another pass, not another epoch
            return next(plan)
        seen = self.__dict__.get("_coordlfs_seen")
        return advance(self) if seen is None else seen.timed(advance, self)

    def _reset(self: Any, loader: Any, first_iter: bool = False) -> None:
        """Workers that persist begin another pass without another iterator."""
        seen = self.__dict__.get("_coordlfs_seen")
        if seen is not None and not first_iter:
            seen.begin()
        again(self, loader, first_iter)

    cls.__new__ = __new__
    cls._reset = _like(_reset, again)
    cls.__init__ = _like(__init__, made)
    cls.__next__ = _like(__next__, advance)
    _watch_passes(module.DataLoader)


def _replace(iterator: Any, sampler: Any) -> None:
    iterator._index_sampler = sampler
    iterator._sampler_iter = iter(sampler)


def _watch_passes(cls: Any) -> None:
    """A pass over what is measured goes on with the iterator that the program has, and makes no other."""
    begin = cls.__iter__

    def __iter__(self: Any) -> Any:
        plan = runtime.active.plan if runtime.active is not None and runtime.active.is_here() else None
        if plan is None or plan.source.owner is not self or not isinstance(plan.source, TorchLoader):
            return begin(self)
        plan.came_back()
        return plan.source.first

    cls.__iter__ = _like(__iter__, begin)


def _watch_dali(module: Any) -> None:
    # The others of DALI's PyTorch iterators are made of this one; it is its own iterator.
    cls = module.DALIGenericIterator
    begin, advance = cls.__iter__, cls.__next__

    def __iter__(self: Any) -> Any:
        active = runtime.active
        if active is None:
            return begin(self)
        seen = active.meet(self, Dali.KIND)
        if active.measures(seen):
            return active.handout(lambda: Dali(lambda: begin(self), self))
        self.__dict__["_coordlfs_seen"] = seen
        return begin(self)

    def __next__(self: Any) -> Any:
        seen = self.__dict__.get("_coordlfs_seen")
        return advance(self) if seen is None else seen.timed(advance, self)

    cls.__iter__ = _like(__iter__, begin)
    cls.__next__ = _like(__next__, advance)


def _watch_nodes(module: Any) -> None:
    kind = "torchdata.nodes.Loader"
    _beginning(module.Loader, kind, lambda loader, begin: Iterable(kind, begin, loader))


def _watch_coordinated(module: Any) -> None:
    cls = module.CoordinatedLoader
    _beginning(cls, "CoordinatedLoader", lambda loader, begin: Source("CoordinatedLoader", begin, loader))


def _watch_multiprocessing(module: Any) -> None:
    """Sockets of the loader's workers go to a directory that is removed, though the process ends without a farewell."""
    active = runtime.active
    if active is not None:
        module.process.current_process()._config.setdefault("tempdir", active.config.out)


LOADERS: dict[str, Callable[[Any], None]] = {
    "torch.utils.data.dataloader": _watch_torch,
    "nvidia.dali.plugin.pytorch": _watch_dali,
    "torchdata.nodes.loader": _watch_nodes,
    "coordlfs_loader.loader": _watch_coordinated,
}
_WATCHED = {**LOADERS, "multiprocessing.util": _watch_multiprocessing}


def _watch(module: ModuleType) -> None:
    try:
        _WATCHED[module.__name__](module)
    except Exception as e:  # a version that is not known must not stop the program
        print(f"coordlfs: {module.__name__} is not what was expected, its loaders are not seen: {e}", file=sys.stderr)


class _Finder(MetaPathFinder):
    """Lets others find the watched modules, and wraps what is in them as soon as they were run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As the others find it, with a loader that calls us afterwards."""
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watching(spec.loader)
                return spec
        return None


class _Watching(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _watch(module)


def install() -> None:
    """From now on, and for what was imported already."""
    sys.meta_path.insert(0, _Finder())
    for name in _WATCHED:
        if name in sys.modules:
            _watch(sys.modules[name])
