"""Where a batch is put together: right in the slot of the stage that it is to lie in, so that it need not be copied.

A DataLoader's worker stacks a batch's tensors in shared memory that is new for each batch, which costs more than the
copy that it saves: the kernel has to zero it, and to map it page by page. A slot was used before. It does not know
what becomes of the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from coordlfs_loader.stage import address_of
from torch.utils.data import default_collate
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data._utils.collate import collate, collate_tensor_fn, default_collate_fn_map

ALIGN = 64
LEAST = 512  # bytes below which a tensor is not worth a place of its own


def stack(tensors: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
    """What `collate_tensor_fn` makes of tensors, in a worker too in memory of its own.

    There torch takes it from /dev/shm, which is 64 MB in most containers.
    """
    told, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        found: torch.Tensor = collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)
        return found
    finally:
        torch_worker._worker_info = told


class Room:
    """The memory of a slot, from which tensors are given pieces."""

    def __init__(self, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._memory = memory
        self._address = address_of(memory)
        self._used = 0

    def collate(self, samples: list[Any]) -> Any:
        """What `default_collate` makes of the samples, its tensors in this room as far as they fit."""
        if default_collate_fn_map.get(torch.Tensor) not in (collate_tensor_fn, stack):
            return default_collate(samples)  # somebody has ideas of his own
        return collate(samples, collate_fn_map={**default_collate_fn_map, torch.Tensor: self._stack})

    def _stack(self, tensors: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
        first = tensors[0]
        nbytes = len(tensors) * first.numel() * first.element_size()
        begin = self._used + -self._used % ALIGN
        if (
            any(type(t) is not torch.Tensor or t.requires_grad or t.dtype != first.dtype for t in tensors)
            or first.layout != torch.strided
            or first.device.type != "cpu"
            or first.is_nested
            or not LEAST <= nbytes <= len(self._memory) - begin
        ):
            return stack(tensors, collate_fn_map=collate_fn_map)
        self._used = begin + nbytes
        piece = torch.from_numpy(self._memory[begin : self._used]).view(first.dtype)
        return torch.stack(tensors, 0, out=piece.view(len(tensors), *first.size()))

    def offset(self, buffer: memoryview) -> int | None:
        """Where in this room a buffer lies, if it does."""
        offset = address_of(np.frombuffer(buffer, np.uint8)) - self._address
        return offset if 0 <= offset < self._used else None
