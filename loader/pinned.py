"""`pin_memory=True`: slots that are registered with CUDA, so that copies of their batches to a GPU are asynchronous.

It does not know what lies in a slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from coordlfs_loader.stage import Pins


class CudaPins:
    """With CUDA. Copies are expected on the stream that is current when the last tensor of a batch is dropped."""

    def register(self, address: int, size: int) -> None:
        """Pin the pages there. Raises RuntimeError."""
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)))

    def unregister(self, address: int) -> None:
        """Pin them no longer."""
        torch.cuda.cudart().cudaHostUnregister(address)

    def fence(self) -> Callable[[], bool]:
        """An event on the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event.query


def pins(wanted: bool) -> Pins | None:
    """How to pin here; None if that is not wanted, or there is no CUDA, and it would do nothing."""
    return CudaPins() if wanted and torch.cuda.is_available() else None
