"""Python imports this by itself at its start, since the directory is on PYTHONPATH: puts the hook in.

The user's own sitecustomize, which this one hides, runs as well, and nothing of the hook stays on `sys.path`.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_HERE = os.path.dirname(os.path.abspath(__file__))


def _install() -> None:
    from coordlfs_stall_hook.install import install  # type: ignore[import-not-found]  # beside this file

    install()


def _chain() -> None:
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


try:
    _install()
finally:
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]
    _chain()
