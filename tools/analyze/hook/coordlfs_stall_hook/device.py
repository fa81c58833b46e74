"""PyTorch and its device, where the program has them: everything here does nothing until the program imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def torch() -> Any:
    """The module, if the program imported it."""
    return sys.modules.get("torch")


def cuda() -> Any:
    """torch, if the program uses a GPU through it."""
    module = torch()
    return module if module is not None and module.cuda.is_available() and module.cuda.is_initialized() else None


def training() -> bool:
    """Whether gradients are kept: validation is done without."""
    module = torch()
    return module is None or bool(module.is_grad_enabled())


def synchronize() -> None:
    """Wait for what the GPU was given to do."""
    if (module := cuda()) is not None:
        module.cuda.synchronize()


def ready(batch: Any) -> Any:
    """The minibatch, already on the GPU if the program uses one."""
    if (module := cuda()) is None:
        return batch
    device = module.device("cuda", module.cuda.current_device())
    return _each(batch, lambda tensor: tensor.to(device))


def copy(batch: Any) -> Any:
    """A copy of the minibatch's tensors: a program that changes them in place must find them new each time."""
    return batch if torch() is None else _each(batch, lambda tensor: tensor.clone())


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch().Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, _each(each, change)) for key, each in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(each, change) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_each(each, change) for each in value)
    return value


def versions() -> dict[str, str]:
    """Of torch and the GPU, as far as there are any."""
    found = {}
    if (module := torch()) is not None:
        found["torch"] = str(module.__version__)
    if (module := cuda()) is not None:
        found["gpu"] = str(module.cuda.get_device_name())
    return found
