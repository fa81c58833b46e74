"""Batches as bytes: pickle protocol 5 with the bytes of tensors and arrays out of band, and back without a copy.

A payload is a head (how many parts, their lengths), the pickle, and the out-of-band buffers, each aligned.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import torch

_ALIGN = 64
_INLINE = 512  # bytes below which a buffer is not worth a place of its own
_U64 = struct.Struct("=Q")

Buffer = memoryview | bytes


def encode(batch: object) -> tuple[int, list[Buffer]]:
    """The payload's size in bytes, and the buffers that make it up; they refer to the batch's own memory."""
    out_of_band: list[Any] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _INLINE:
            return True
        out_of_band.append(raw)
        return False

    stream = io.BytesIO()
    _Pickler(stream, take).dump(batch)
    parts: list[Any] = [stream.getbuffer(), *out_of_band]
    head = struct.pack(f"={1 + len(parts)}Q", len(parts), *(p.nbytes for p in parts))
    buffers: list[Buffer] = []
    size = 0
    for part in (head, *parts):
        pad = -size % _ALIGN
        if pad:
            buffers.append(bytes(pad))
        buffers.append(part)
        size += pad + (part.nbytes if isinstance(part, memoryview) else len(part))
    return size, buffers


def decode(payload: memoryview) -> Any:
    """The batch; its tensors and arrays are views of the payload, writable if that is, and keep it alive."""
    (count,) = _U64.unpack_from(payload)
    position = _U64.size * (1 + count)
    parts = []
    for (length,) in _U64.iter_unpack(payload[_U64.size : position]):
        position += -position % _ALIGN
        parts.append(payload[position : position + length])
        position += length
    return pickle.loads(parts[0], buffers=parts[1:])


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
