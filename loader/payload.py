"""Batches as bytes: pickle protocol 5 with the bytes of tensors and arrays out of band, and back without a copy.

A payload is the pickle and the out-of-band buffers, each aligned and in any order, and a table of where they are: the
offset and length of each, the pickle first, and in the very end how many there are.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import torch
from coordlfs_loader.room import ALIGN, LEAST, Room

_COUNT = struct.Struct("=Q")
_PLACE = struct.Struct("=QQ")

Buffer = memoryview | bytes


def encode(batch: object, room: Room | None = None) -> tuple[int, list[Buffer]]:
    """The payload's size in bytes, and the buffers that make it up; they refer to the batch's own memory.

    What lies in `room` already has the same place in the payload.
    """
    out_of_band: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < LEAST:
            return True
        out_of_band.append(raw)
        return False

    stream = io.BytesIO()
    _Pickler(stream, take).dump(batch)
    parts = [stream.getbuffer(), *out_of_band]
    there = {i: at for i, part in enumerate(parts) if (at := room.offset(part) if room else None) is not None}
    places = [(0, 0)] * len(parts)
    buffers: list[Buffer] = []
    size = 0
    for i in sorted(range(len(parts)), key=lambda i: there.get(i, 1 << 62)):
        at = there.get(i, size + -size % ALIGN)
        if at > size:
            buffers.append(bytes(at - size))
        buffers.append(parts[i])
        size = at + parts[i].nbytes
        places[i] = at, parts[i].nbytes
    table = b"".join(_PLACE.pack(*place) for place in places) + _COUNT.pack(len(places))
    return size + len(table), [*buffers, table]


def decode(payload: memoryview) -> Any:
    """The batch; its tensors and arrays are views of the payload, writable if that is, and keep it alive."""
    end = len(payload) - _COUNT.size
    (count,) = _COUNT.unpack_from(payload, end)
    table = _PLACE.iter_unpack(payload[end - count * _PLACE.size : end])
    pickled, *buffers = [payload[at : at + length] for at, length in table]
    return pickle.loads(pickled, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Knows how to take tensors apart."""

    def __init__(self, stream: io.BytesIO, take: Callable[[pickle.PickleBuffer], bool]) -> None:
        super().__init__(stream, 5, buffer_callback=take)

    def reducer_override(self, value: object) -> Any:
        """How to pickle this; NotImplemented for as usual."""
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            return NotImplemented
        if value.is_quantized or (value.requires_grad and not value.is_leaf):
            return NotImplemented  # what torch says to that
        plain = value.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        order = sorted(range(plain.dim()), key=lambda d: (-plain.stride()[d], d))
        dense = plain.permute(order)
        if not dense.is_contiguous():
            dense = plain = plain.contiguous()
        data: Any = dense.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
        kind = type(value) if type(value) is not torch.Tensor else None
        state = value.__dict__ or None
        what = (pickle.PickleBuffer(data), plain.dtype, tuple(plain.shape), plain.stride(), value.requires_grad)
        return _tensor, (*what, kind, state)


def _tensor(
    data: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    kind: type[torch.Tensor] | None,
    state: dict[str, Any] | None,
) -> torch.Tensor:
    """A tensor over these bytes."""
    if len(data):
        tensor = torch.frombuffer(data, dtype=torch.uint8).view(dtype).as_strided(shape, stride)
    else:
        tensor = torch.empty_strided(shape, stride, dtype=dtype)
    if kind is not None:
        tensor = tensor.as_subclass(kind)
    if requires_grad:
        tensor.requires_grad_()
    if state:
        tensor.__dict__.update(state)
    return tensor
