"""PyTorch and its device, where the program has them: everything here does nothing until the program imports torch."""

from __future__ import annotations

import sys
from typing import Any

from .rebuild import rebuilt


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
    """The minibatch, already on the GPU if the program uses one. Raises CannotCopyError."""
    if (module := cuda()) is None:
        return batch
    device = module.device("cuda", module.cuda.current_device())
    return rebuilt(batch, lambda tensor: tensor.to(device), lambda value: value.to(device))


def copied(batch: Any) -> Any:
    """A copy of the minibatch: a program that changes it must find it new each time. Raises CannotCopyError."""
    return rebuilt(batch, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def versions() -> dict[str, str]:
    """Of torch and the GPU, as far as there are any."""
    found = {}
    if (module := torch()) is not None:
        found["torch"] = str(module.__version__)
    if (module := cuda()) is not None:
        found["gpu"] = str(module.cuda.get_device_name())
    return found
