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
from .sources import Source, TorchLoader


def _like(function: Any, original: Any) -> Any:
    function.__doc__ = original.__doc__
    function.__wrapped__ = original
    return function


def _advancing(cls: Any) -> None:
    """Have the class's `__next__` timed, for iterators that were told whose they are."""
    advance = cls.__next__

    def __next__(self: Any) -> Any:
        seen = self.__dict__.get("_coordlfs_seen")
        return advance(self) if seen is None else seen.timed(advance, self)

    cls.__next__ = _like(__next__, advance)
    cls.__next__._coordlfs_timed = True


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
        iterator = begin(self)
        if not hasattr(type(iterator).__next__, "_coordlfs_timed"):
            return Observed(iterator, seen)
        iterator._coordlfs_seen = seen  # it stays what it is
        return iterator

    cls.__iter__ = _like(__iter__, begin)


def _watch_torch(module: Any) -> None:
    _beginning(module.DataLoader, TorchLoader.KIND, lambda loader, _: TorchLoader(loader))
    _advancing(module._BaseDataLoaderIter)


def _watch_dali(module: Any) -> None:
    # The others of DALI's PyTorch iterators are made of this one; it is its own iterator.
    cls = module.DALIGenericIterator
    _beginning(cls, "DALIGenericIterator", lambda loader, begin: Source("DALIGenericIterator", begin, loader))
    _advancing(cls)


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
