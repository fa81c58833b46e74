"""The talk with one bucket, through obstore: what is asked, how often again, and which errors that comes to.

Three kinds of requests, none of which writes: LIST, GET and HEAD. All errors are OSErrors, `ChangedError` where an
object is not the one that was asked for. It knows keys and bytes, and neither directories nor what is cached.

obstore must not be used before a fork: in the child every call would hang. Calls block, release the GIL, and cannot be
interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from coordlfs.sources.address import Address, Options
from coordlfs.sources.objects import refused
from coordlfs.sources.objects.failures import Failure, Meaning, failure
from coordlfs.sources.objects.names import Entry, Found, bare
from coordlfs.sources.objects.profiles import Profile
from coordlfs.sources.objects.window import Window

if TYPE_CHECKING:
    from obstore import GetOptions

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIED_FOR = 30.0  # seconds after which what fails is not tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # between attempts, of which each waits a random part
_CONNECTS_WITHIN = 5.0  # seconds
_LASTS_AT_MOST = 300.0  # seconds, of a request that brings bytes all the time
_KEYS = frozenset({"AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"})
_REGIONS = frozenset({"AWS_REGION", "AWS_DEFAULT_REGION"})
_AGAIN = frozenset({Meaning.THROTTLED, Meaning.PASSING, Meaning.CREDENTIALS})
_DENIED = frozenset({Meaning.DENIED, Meaning.CREDENTIALS})


class StoreError(OSError):
    """What the store answered, for who wants to say more than an errno does: EACCES or EIO."""

    def __init__(self, found: Failure, code: int | None = None) -> None:
        super().__init__(code or (errno.EACCES if found.meaning in _DENIED else errno.EIO), found.text)
        self.failure = found


class GoneError(StoreError, FileNotFoundError):
    """There is no such object."""

    def __init__(self, found: Failure) -> None:
        super().__init__(found, errno.ENOENT)


class ChangedError(OSError):
    """An object is not the one that was asked for."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, "the object has changed")


def _opened(address: Address, options: Options) -> S3Store | GCSStore | AzureStore:
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(_CONNECTS_WITHIN, options.timeout)),
        "read_timeout": timedelta(seconds=options.timeout),
        "timeout": timedelta(seconds=max(_LASTS_AT_MOST, options.timeout)),
        "allow_http": options.allow_http,
    }
    # Attempts are made again by `_persistently`, which counts them.
    retry: dict[str, Any] = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    config: dict[str, Any] = {}
    if options.endpoint is not None:
        config["endpoint"] = options.endpoint
    if options.anonymous:
        config["skip_signature"] = True
    common: dict[str, Any] = {"client_options": client, "retry_config": retry}
    if address.scheme == "gs":
        if "endpoint" in config:
            config["base_url"] = config.pop("endpoint")
        return GCSStore(address.bucket, **config, **common)
    if address.scheme == "az":
        return AzureStore(address.bucket, **config, **common)
    profile = Profile()
    if not options.anonymous and not _KEYS & os.environ.keys() and profile.has_keys:
        common["credential_provider"] = profile
    if options.region is not None:
        config["region"] = options.region
    elif not _REGIONS & os.environ.keys() and profile.region is not None:
        config["region"] = profile.region
    if options.requester_pays:
        config["request_payer"] = True
    if options.path_style is not None:
        config["virtual_hosted_style_request"] = not options.path_style
    return S3Store(address.bucket, **config, **common)


class Store:
    """The objects of a bucket. Thread-safe.

    `tried_for`: seconds after which what fails is not tried again. `ended` is set to have nothing tried again.
    """

    def __init__(self, address: Address, options: Options, *, tried_for: float = TRIED_FOR) -> None:
        self._address = address
        self._options = options
        self._tried_for = tried_for
        self.window = Window(options.in_flight)
        self.ended = threading.Event()
        self._store = _opened(address, options)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def figures(self) -> dict[str, int]:
        """Requests by kind (`list`, `get`, `head`), `bytes`, `errors`, `retries`, `throttled`, and those in flight."""
        names = ("list", "get", "head", "bytes", "errors", "retries", "throttled")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
        return counts | {"in_flight": self.window.in_flight, "in_flight_limit": self.window.limit}

    # -- requests -----------------------------------------------------------------------------------------------

    def holds_anything(self, prefix: str) -> bool:
        """Whether a prefix is any key's. Raises OSError."""

        def ask() -> bool:
            try:
                return next(iter(obstore.list(self._store, prefix or None, chunk_size=1)), None) is not None
            except BaseError as e:
                if failure(e).meaning is not Meaning.BAD_KEY:
                    raise
            found = self._list(prefix)  # the key may lie deeper, and be in nobody's way here
            return bool(found.objects or found.prefixes)

        return self._persistently("list", prefix, ask)

    def get(self, key: str, entry: Entry, first: int, end: int) -> memoryview:
        """The bytes of an object from `first` to before `end`. Raises OSError; ChangedError if it is not `entry`."""
        return self._persistently("get", key, lambda: self._get(key, entry, first, end))

    def _get(self, key: str, entry: Entry, first: int, end: int) -> memoryview:
        options: GetOptions = {}
        if entry.etag:
            options["if_match"] = f'"{entry.etag}"'
        if (first, end) != (0, entry.size):
            options["range"] = first, end
        result = obstore.get(self._store, key, options=options)
        # Before the bytes, which may be of another object, and far more: some servers ignore If-Match.
        meta = result.meta
        if meta["size"] != entry.size or bare(meta["e_tag"]) != entry.etag or tuple(result.range) != (first, end):
            raise ChangedError
        data = memoryview(result.bytes())
        if len(data) != end - first:
            raise StoreError(Failure(Meaning.PASSING, f"{len(data)} bytes came in place of {end - first}"))
        self._count("bytes", len(data))
        return data

    def head(self, key: str) -> Entry:
        """What an object is now. Raises OSError."""

        def ask() -> Entry:
            meta = obstore.head(self._store, key)
            return Entry.of(meta["size"], meta["last_modified"], meta["e_tag"])

        return self._persistently("head", key, ask)

    def list_below(self, prefix: str) -> Found:
        """What lies right below a prefix, which ends with a slash or is empty. Raises OSError.

        obstore refuses a page of a listing for one key in it that it cannot name (`a//b`, `.`, control characters), and
        all others of that page with it. Where the store speaks the protocol of S3 another library is asked then; else
        it is an error, which names the key, since half a directory would be taken for all of it.
        """
        return self._persistently("list", prefix, lambda: self._list(prefix))

    def _list(self, prefix: str) -> Found:
        try:
            result = obstore.list_with_delimiter(self._store, prefix or None)
        except BaseError as e:
            if self._address.scheme == "s3" and failure(e).meaning is Meaning.BAD_KEY:
                return self._list_refused(prefix)
            raise
        objects = [(o["path"], Entry.of(o["size"], o["last_modified"], o["e_tag"])) for o in result["objects"]]
        # A request lists a thousand keys.
        self._count("list", (len(objects) + len(result["common_prefixes"])) // 1000)
        return Found([*result["common_prefixes"]], objects)

    def _list_refused(self, prefix: str) -> Found:
        pages = 0
        prefixes: list[str] = []
        objects: list[tuple[str, Entry]] = []
        try:
            for page in refused.pages_below(self._address, self._options, prefix):
                pages += 1
                prefixes += page.prefixes
                objects += page.objects
        except refused.RefusedError as e:
            raise StoreError(e.failure) from None
        finally:
            self._count("list", pages)
        return Found(prefixes, objects)

    # -- attempts -----------------------------------------------------------------------------------------------

    def _persistently(self, kind: str, key: str, action: Callable[[], T]) -> T:
        """`action`, again if it fails in a way that may pass, for as long as that is worth it."""
        until, pause = time.monotonic() + self._tried_for, _FIRST_PAUSE
        while True:
            self._count(kind)
            try:
                with self.window:
                    return action()
            except ChangedError:
                raise
            except (BaseError, OSError) as e:
                found = e.failure if isinstance(e, StoreError) else failure(e)
                if found.meaning is Meaning.CHANGED:
                    raise ChangedError from None
                self._failed(found)
                wait = random.uniform(pause / 2, pause)
                if found.meaning not in _AGAIN or time.monotonic() + wait > until or self.ended.wait(wait):
                    # Without the cause, which holds the request, and that may hold what is secret.
                    if found.meaning is Meaning.GONE and kind != "list":  # no listing says so of what is below a prefix
                        raise GoneError(found) from None
                    self._count("errors")
                    log.warning("%s of '%s' failed: %s", kind.upper(), key[:300], found.text)
                    raise StoreError(found) from None
                self._count("retries")
                pause = min(_LONGEST_PAUSE, 2 * pause)

    def _failed(self, found: Failure) -> None:
        if found.meaning is Meaning.THROTTLED:
            self.window.refused()
            self._count("throttled")

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount
