"""An object store of one's own, that speaks as much of S3 as a reader needs, and fails as it is told to.

It answers listings, and gets of whole objects and ranges, as fast as one thread of asyncio does; it checks no
signature. What was asked for is in `requests`. Who wants a real server of the protocol takes moto, which is too slow
for figures.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import NamedTuple, Protocol
from urllib.parse import parse_qs, quote, unquote
from xml.sax.saxutils import escape

_REASONS = {200: "OK", 206: "Partial Content", 304: "Not Modified", 416: "Range Not Satisfiable", 503: "Slow Down"}


class Asked(NamedTuple):
    """A request as it came in: LIST, GET or HEAD of a key or prefix; `first` and `end` of the range that it names."""

    kind: str
    key: str
    first: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with an answer."""

    status: int | None = None  # in place of the right one, with no bytes
    delay: float = 0.0  # seconds before it; more than anybody waits: it hangs
    stall: float = 0.0  # seconds in the middle of the bytes
    cut: int | None = None  # bytes after which the connection is closed
    etag: str | None = None  # other than the object's
    ignores_range: bool = False
    data: bytes | None = None  # other bytes, of whatever length


class Parts(Protocol):
    """Bytes that are too many to lie in memory."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice) -> memoryview:
        """Some of them."""


@dataclass(slots=True)
class StoredObject:
    """An object: its bytes, or what gives parts of them, and what tells it from others of its key."""

    data: bytes | memoryview | Parts
    modified: float = field(default_factory=time.time)
    etag: str = ""


Faults = Callable[[Asked], Fault | None]


class Bucket:
    """One bucket at `url`, at the address that `serve` gave it. `objects` may be changed while it serves."""

    def __init__(self, name: str = "bucket", *, delay: float = 0.0, page: int = 1000) -> None:
        self.name = name
        self.objects: dict[str, StoredObject] = {}
        self.requests: list[Asked] = []
        self.faults: Faults = lambda asked: None
        self.in_flight = self.most_in_flight = 0
        self.endpoint = ""
        self._delay = delay
        self._page = page
        self._keys: list[str] = []  # sorted, as of when there were as many

    @property
    def url(self) -> str:
        """What names the bucket for a client."""
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Store an object, in place of that which has the key."""
        self.objects[key] = StoredObject(data, time.time(), f'"{hashlib.md5(data).hexdigest()}"')
        self._keys = []

    def remove(self, key: str) -> None:
        """Remove an object."""
        del self.objects[key]
        self._keys = []

    def count(self, kind: str) -> int:
        """How many requests of a kind there were."""
        return sum(asked.kind == kind for asked in self.requests)

    # -- answering ----------------------------------------------------------------------------------------------

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                method, target, _ = first.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    goes_on = await self._answer_one(writer, method, target, headers)
                finally:
                    self.in_flight -= 1
                if not goes_on:
                    break
        writer.close()

    async def _answer_one(
        self, writer: asyncio.StreamWriter, method: str, target: str, headers: dict[str, str]
    ) -> bool:
        path, _, query = target.partition("?")
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        options = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        if "list-type" in options:
            asked = Asked("LIST", options.get("prefix", ""))
        else:
            asked = Asked(method, key, *_range(headers.get("range")))
        self.requests.append(asked)
        fault = self.faults(asked) or Fault()
        if delay := self._delay + fault.delay:
            await asyncio.sleep(delay)
        if bucket != self.name:
            return await self._send(writer, 404, _error("NoSuchBucket"), {}, fault)
        if fault.status is not None:
            return await self._send(writer, fault.status, _error(f"Fault{fault.status}"), {}, fault)
        if asked.kind == "LIST":
            return await self._send(writer, 200, self._list(options), {"Content-Type": "application/xml"}, fault)
        return await self._get(writer, asked, headers, fault)

    async def _get(self, writer: asyncio.StreamWriter, asked: Asked, headers: dict[str, str], fault: Fault) -> bool:
        stored = self.objects.get(asked.key)
        if stored is None:
            return await self._send(writer, 404, _error("NoSuchKey"), {}, fault)
        data = fault.data if fault.data is not None else stored.data
        data = memoryview(data) if isinstance(data, bytes) else data
        etag = fault.etag or stored.etag
        about = {"ETag": etag, "Last-Modified": formatdate(stored.modified, usegmt=True)}
        if headers.get("if-match", etag) != etag:
            return await self._send(writer, 412, _error("PreconditionFailed"), {}, fault)
        status, first, end = 200, 0, len(data)
        if asked.first is not None and not fault.ignores_range:
            if asked.first >= len(data):
                return await self._send(writer, 416, _error("InvalidRange"), {}, fault)
            status, first, end = 206, asked.first, min(len(data), asked.end or len(data))
            about["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        if asked.kind == "HEAD":
            about["Content-Length"] = str(end - first)
            end = first
        return await self._send(writer, status, data[first:end], about, fault)

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, data: bytes | memoryview, about: dict[str, str], fault: Fault
    ) -> bool:
        about = {"Content-Length": str(len(data))} | about
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Of Its Own')}", *(f"{k}: {v}" for k, v in about.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        if fault.cut is not None:
            writer.write(data[: fault.cut])
            await writer.drain()
            return False
        if fault.stall:
            writer.write(data[: len(data) // 2])
            await writer.drain()
            await asyncio.sleep(fault.stall)
            data = data[len(data) // 2 :]
        writer.write(data)
        await writer.drain()
        return True

    def _list(self, options: dict[str, str]) -> bytes:
        """A page of a listing, of keys in their order."""
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter", "")
        after = options.get("continuation-token") or options.get("start-after") or ""
        if len(self._keys) != len(self.objects):
            self._keys = sorted(self.objects, key=str.encode)
        is_encoded = options.get("encoding-type") == "url"
        write = _url if is_encoded else _xml
        found: dict[str, str] = {}
        more = ""
        for key in self._keys:
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            is_below = bool(delimiter) and delimiter in rest
            shown = prefix + rest.partition(delimiter)[0] + delimiter if is_below else key
            if shown.encode() <= after.encode() or shown in found:
                continue
            if len(found) == self._page:
                more = list(found)[-1]
                break
            below = f"<CommonPrefixes><Prefix>{write(shown)}</Prefix></CommonPrefixes>"
            found[shown] = below if is_below else self._entry(key, write(key))
        token = f"<NextContinuationToken>{_xml(more)}</NextContinuationToken>" if more else ""
        truncated = str(bool(more)).lower()
        encoded = "<EncodingType>url</EncodingType>" if is_encoded else ""
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{self.name}</Name>{encoded}'
            f"<KeyCount>{len(found)}</KeyCount><IsTruncated>{truncated}</IsTruncated>{token}"
            f"{''.join(found.values())}</ListBucketResult>"
        )
        return body.encode("utf-8", "surrogateescape")

    def _entry(self, key: str, written: str) -> str:
        stored = self.objects[key]
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.modified))
        return (
            f"<Contents><Key>{written}</Key><LastModified>{modified}</LastModified><ETag>{escape(stored.etag)}</ETag>"
            f"<Size>{len(stored.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )


def _xml(text: str) -> str:
    return "".join(c if c >= " " else f"&#{ord(c)};" for c in escape(text))


def _url(text: str) -> str:
    return quote(text, errors="surrogateescape")


def _error(code: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()


def _range(header: str | None) -> tuple[int | None, int | None]:
    if not header or not header.startswith("bytes="):
        return None, None
    first, _, last = header[len("bytes=") :].partition("-")
    return int(first), int(last) + 1 if last else None


@contextmanager
def serve(bucket: Bucket) -> Iterator[Bucket]:
    """Serve a bucket on this machine, from a thread; it ends with the block."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(bucket.answer, "127.0.0.1", 0, backlog=1024))
    bucket.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="bucket", daemon=True)
    thread.start()
    try:
        yield bucket
    finally:

        async def end() -> None:
            server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
