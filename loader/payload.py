"""Batches as bytes: pickle protocol 5 with the bytes of tensors and arrays out of band, and back without a copy.

A payload is the pickle, the out-of-band buffers and the memory of tensors, each aligned and in any order; where each
tensor lies (part and offset); and a table of where the parts are, the pickle first, and in the end how many there are.
It does not know where they are kept, or who reads them.

Tensors keep their strides, and those that overlap in memory still do: a part holds a range of a storage that tensors
of the batch cover. One that covers much less than it spans is packed. What is no plain tensor of the CPU (nested,
sparse, quantized, masked, wrappers) goes the way of torch's own reduction, which ends at plain ones.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from coordlfs_loader.room import ALIGN, LEAST, Room

_COUNT = struct.Struct("=Q")
_PLACE = struct.Struct("=QQ")
_TENSOR = struct.Struct("=QQQ")
_WITHIN = 16  # bytes: what a storage's part begins at a multiple of, so that any dtype may begin there
_SPARSE = 8  # times its bytes that a tensor may span and keep its strides

Buffer = memoryview | bytes
Memory = Callable[[int], tuple[torch.Tensor, int]]


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
    pickler = _Pickler(stream, take)
    pickler.dump(batch)
    parts = [stream.getbuffer(), *out_of_band]
    parts += pickler.memory(len(parts))
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
    parts = [payload[at : at + length] for at, length in table]
    batch = _Unpickler(parts).load()
    if torch._utils._sparse_tensors_to_validate:  # torch keeps sparse ones until this is called
        torch._utils._validate_loaded_sparse_tensors()
    return batch


class _Pickler(pickle.Pickler):
    """Knows how to take tensors apart."""

    def __init__(self, stream: io.BytesIO, take: Callable[[pickle.PickleBuffer], bool]) -> None:
        super().__init__(stream, 5, buffer_callback=take)
        self._spans: list[tuple[int, int, int]] = []  # of each tensor: storage, first byte, end
        self._storages: dict[int, torch.UntypedStorage] = {}

    def reducer_override(self, value: object) -> Any:
        """How to pickle this; NotImplemented for as usual."""
        if isinstance(value, torch.UntypedStorage) and value.device.type == "cpu":
            return _storage, (self._refer(value, 0, value.nbytes()), value.nbytes())
        if not isinstance(value, torch.Tensor) or not _is_plain(value):
            return NotImplemented
        plain = value.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        nbytes = plain.numel() * plain.element_size()
        steps = sum((n - 1) * step for n, step in zip(plain.shape, plain.stride(), strict=True)) + 1
        if nbytes and steps * plain.element_size() > max(_SPARSE * nbytes, LEAST):
            plain = plain.contiguous()
            steps = plain.numel()
        number = -1
        if nbytes:
            first = int(plain.storage_offset()) * plain.element_size()
            number = self._refer(plain.untyped_storage(), first, first + int(steps) * plain.element_size())
        kind = type(value) if type(value) is not torch.Tensor else None
        what = (number, plain.dtype, tuple(plain.shape), plain.stride(), value.requires_grad)
        return _tensor, (*what, kind, value.__dict__ or None)

    def _refer(self, storage: torch.UntypedStorage, first: int, end: int) -> int:
        key = storage.data_ptr()
        self._storages.setdefault(key, storage)
        self._spans.append((key, first, end))
        return len(self._spans) - 1

    def memory(self, before: int) -> list[memoryview]:
        """The parts that hold the tensors, which follow `before` others; the last says where each tensor lies in them.

        What is too small for a part of its own lies in the last but one.
        """
        large: list[memoryview] = []
        small = bytearray()
        # Part, -1 for the small ones; where in it the range begins; where in that the tensor does.
        places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(self._spans)
        for key, first, end, inside in self._ranges():
            raw = _bytes(self._storages[key], first, end)
            is_small = end - first < LEAST
            for i in inside:
                offset = self._spans[i][1] - first
                places[i] = (-1, len(small), offset) if is_small else (before + len(large), 0, offset)
            if is_small:
                small += bytes(raw) + bytes(-len(raw) % _WITHIN)
            else:
                large.append(raw)
        last = before + len(large)
        table = b"".join(_TENSOR.pack(last if part < 0 else part, *offsets) for part, *offsets in places)
        return [*large, memoryview(small), memoryview(table)]

    def _ranges(self) -> Iterator[tuple[int, int, int, list[int]]]:
        """Ranges of storages that tensors cover: storage, first byte, end, and the tensors that lie inside."""
        order = sorted(range(len(self._spans)), key=self._spans.__getitem__)
        at = 0
        while at < len(order):
            key, first, end = self._spans[order[at]]
            inside = [order[at]]
            at += 1
            while at < len(order) and (span := self._spans[order[at]])[0] == key and span[1] < end:
                end = max(end, span[2])
                inside.append(order[at])
                at += 1
            # Alone a tensor begins its storage: what torch makes of it may take that for granted, as nested ones do.
            yield key, first - (first % _WITHIN if len(inside) > 1 else 0), end, inside


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is bytes in memory with a shape and strides; also one of a class that adds nothing to pickle."""
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        own = (kind.__torch_dispatch__, kind.__reduce_ex__, getattr(kind, "__setstate__", None))
        usual = (torch.Tensor.__torch_dispatch__, torch.Tensor.__reduce_ex__, torch.Tensor.__setstate__)
        if own != usual or copyreg._slotnames(kind):  # type: ignore[attr-defined]
            return False
    if value.is_nested or value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.is_leaf or not value.requires_grad  # else what torch says to that


def _bytes(storage: torch.UntypedStorage, first: int, end: int) -> memoryview:
    view = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, first, (end - first,), (1,))
    return view.numpy().data


class _Places:
    """Where the tensors are."""

    def __init__(self, parts: list[memoryview]) -> None:
        self._parts = parts
        self._places = list(_TENSOR.iter_unpack(parts[-1]))
        self._bases: dict[tuple[int, int], torch.Tensor] = {}  # tensors of one range share a storage

    def memory(self, number: int) -> tuple[torch.Tensor, int]:
        """The bytes of the range that a tensor lies in, and where in it the tensor begins."""
        part, begin, offset = self._places[number]
        base = self._bases.get((part, begin))
        if base is None:
            base = torch.frombuffer(self._parts[part], dtype=torch.uint8, offset=begin)
            self._bases[part, begin] = base
        return base, offset


class _Unpickler(pickle.Unpickler):
    """Makes tensors where they are.

    It keeps what `find_class` returns, which must not lead back to it: the batch would be there until the cycle is
    found, and its slot not free.
    """

    def __init__(self, parts: list[memoryview]) -> None:
        super().__init__(io.BytesIO(parts[0]), buffers=parts[1:])
        self._memory = _Places(parts).memory

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names."""
        if module == __name__ and name in ("_tensor", "_storage"):
            return partial(globals()[name], self._memory)
        return super().find_class(module, name)


def _storage(memory: Memory, number: int, nbytes: int) -> torch.UntypedStorage:
    """A storage of these bytes."""
    if not nbytes:
        return torch.UntypedStorage(0, device="cpu")
    base, offset = memory(number)
    return torch.frombuffer(base[offset : offset + nbytes].numpy(), dtype=torch.uint8).untyped_storage()


def _tensor(
    memory: Memory,
    number: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    kind: type[torch.Tensor] | None,
    state: dict[str, Any] | None,
) -> torch.Tensor:
    """A tensor over these bytes."""
    if number >= 0:
        base, offset = memory(number)
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        tensor.set_(base.untyped_storage(), offset // dtype.itemsize, shape, stride)
    else:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    if kind is not None:
        tensor = tensor.as_subclass(kind)
    if requires_grad:
        tensor.requires_grad_()
    if state:
        tensor.__dict__.update(state)
    return tensor
