"""What kind of source a name on the command line is of, and the options that a bucket may be given.

Secrets have no place on a command line, which every user of the machine can read: they are refused here. It knows the
names of things and opens none of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from coordlfs import sizes
from coordlfs.errors import UserError

_STORES = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SERVER = re.compile(
    r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/%-]*)?", re.IGNORECASE
)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,221}")
_SECRET = re.compile(
    r"secret|passw|token|sas\b|sig\b|credential|(access|account|service|api|storage).?key|^key", re.IGNORECASE
)
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MOST_IN_FLIGHT = 256

_WHERE_SECRETS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS,"
    " AZURE_STORAGE_ACCOUNT_KEY …), from the files of the cloud's tools, or from the machine's role"
)

# Names of options, and what they are for; `docs/reference/sources.md` explains them.
OPTIONS = {
    "endpoint": "URL of a store that is not the cloud's own, as http://minio:9000",
    "region": "where the bucket is",
    "anonymous": "true: ask without credentials",
    "path-style": "false: the bucket's name is part of the host's",
    "requester-pays": "true: who asks pays",
    "allow-http": "true: ask without TLS; who sees the network then sees the data",
    "timeout": "after which a request that brings nothing is given up: 10s",
    "in-flight": f"requests at a time, at most: {MOST_IN_FLIGHT}",
}
_ARE_BOOLEAN = frozenset({"anonymous", "path-style", "requester-pays", "allow-http"})


class Address(NamedTuple):
    """A bucket (Azure: a container), and the prefix in it that is the root: without slashes at its ends."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


class Options(NamedTuple):
    """How to ask a store; None where the store's own tools decide."""

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False
    path_style: bool | None = None
    requester_pays: bool = False
    allow_http: bool = False
    timeout: float = 10.0  # seconds without a byte
    in_flight: int = MOST_IN_FLIGHT


def parse(source: str) -> Address | None:
    """The bucket that a source names; None if it is a path. Raises UserError for a URL that names none."""
    found = _URL.fullmatch(source)
    if found is None:
        return None
    scheme, rest = found[1].lower(), found[2]
    if scheme not in _STORES:
        known = ", ".join(f"{name}://" for name in _STORES)
        raise UserError(f"'{scheme}://' is no kind of source: give a directory, or a bucket as {known}", 2)
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise UserError(
            f"a {scheme}:// source is a bucket and a prefix, and nothing else: {_WHERE_SECRETS}", 2
        )  # what it has is not repeated: it may be a secret
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"'{bucket}' is no bucket's name: give {scheme}://BUCKET/PREFIX", 2)
    prefix = prefix.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise UserError(f"'{prefix}' is no prefix of files: its parts must not be empty, '.' or '..'", 2)
    return Address(scheme, bucket, prefix)


def canonical(source: str) -> str:
    """A source's one name, by which it is found again: a bucket's address, or the path without links.

    Raises UserError, as `parse`.
    """
    bucket = parse(source)
    return os.path.realpath(source) if bucket is None else str(bucket)


def options(given: Iterable[str]) -> Options:
    """What `--source-option KEY=VALUE` says. Raises UserError for what is not known, and for secrets."""
    values: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().lower().replace("_", "-")
        if name not in OPTIONS:
            if _SECRET.search(name):
                raise UserError(
                    f"--source-option {name} is refused: every user can read a command line; {_WHERE_SECRETS}", 2
                )
            raise UserError(f"--source-option {name} is not known: known are {', '.join(OPTIONS)}", 2)
        if not equals or not value:
            raise UserError(f"--source-option {name} needs a value, as {name}=… ({OPTIONS[name]})", 2)
        values[name.replace("-", "_")] = _value(name, value)
    return Options(**values)  # type: ignore[arg-type]


def _value(name: str, value: str) -> object:
    if name in _ARE_BOOLEAN:
        if value.lower() not in _BOOLEANS:
            raise UserError(f"--source-option {name} is true or false, and not '{value}'", 2)
        return _BOOLEANS[value.lower()]
    if name == "timeout":
        return sizes.seconds(value)
    if name == "in-flight":
        if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= MOST_IN_FLIGHT:
            raise UserError(f"--source-option in-flight is a number from 1 to {MOST_IN_FLIGHT}, and not '{value}'", 2)
        return int(value)
    if name == "endpoint" and not _SERVER.fullmatch(value):  # of some others obstore panics
        raise UserError("--source-option endpoint is an address as https://HOST:PORT, with nothing secret in it", 2)
    return value
