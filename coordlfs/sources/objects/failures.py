"""What an error of obstore means: it tells apart by class what it can, and all else by the text alone.

It is given the name of the class and the text, so that it can be tested without a store; `tests/pure/test_objects.py`
has obstore itself raise each of them, since the texts are no promise of its.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import NamedTuple

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_BAD_KEY = re.compile(r'(?:Path|Error parsing Path) "(.*?)"(?: contained|: Encountered)', re.DOTALL)
_HTTP = re.compile(r"HTTP error: ([^\n]{1,80})")
_KIND = re.compile(r"kind: (\w{1,20})")
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_ASKS_FOR_CREDENTIALS = "//169.254.", "//metadata.google", "token request", "MissingAccount"
_THROTTLED = frozenset({429, 503})


class Meaning(Enum):
    """What is to be done about a failure."""

    GONE = auto()  # there is no such object
    NO_BUCKET = auto()
    DENIED = auto()  # these credentials may not
    CREDENTIALS = auto()  # there are none, or they have expired, and new ones may be had the next time
    REGION = auto()  # the bucket is in another one
    CHANGED = auto()  # it is not the object that was asked for
    BAD_KEY = auto()  # a listing holds a key that obstore cannot name, and has nothing else then
    THROTTLED = auto()  # the store asks for fewer requests
    PASSING = auto()  # may be over the next time
    LASTING = auto()  # the same request fails again


class Failure(NamedTuple):
    """What went wrong; `text` is for people: short, and without the request or what the server sent."""

    meaning: Meaning
    text: str


def failure(error: BaseException) -> Failure:
    """What an error of obstore means."""
    return meaning_of(type(error).__name__, str(error))


def meaning_of(kind: str, text: str) -> Failure:
    """As `failure`, of the name of the error's class and its text."""
    found = _STATUS.search(text)
    status = int(found[1]) if found else None
    code = found[1] if (found := _CODE.search(text)) else None
    said = " ".join(filter(None, (f"status {status}" if status else None, code)))
    if kind == "InvalidPathError":
        key = found[1][:200] if (found := _BAD_KEY.search(text)) else "?"
        return Failure(Meaning.BAD_KEY, f"a key at {key!r} cannot be named, and hides those beside it: rename it")
    if code == "NoSuchBucket" or "ContainerNotFound" in text:
        return Failure(Meaning.NO_BUCKET, said)
    if code in _EXPIRED or any(sign in text for sign in _ASKS_FOR_CREDENTIALS):
        return Failure(Meaning.CREDENTIALS, said or "nobody gives any")
    if kind == "FileNotFoundError" or status == 404:
        return Failure(Meaning.GONE, said or "not found")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return Failure(Meaning.DENIED, said or "not permitted")
    if kind in ("PreconditionError", "NotModifiedError") or status in (412, 416):
        return Failure(Meaning.CHANGED, said or "changed")
    if status in _THROTTLED:
        return Failure(Meaning.THROTTLED, said)
    if code == "AuthorizationHeaderMalformed" or status == 301:
        return Failure(Meaning.REGION, said)
    if status is not None:
        return Failure(Meaning.PASSING if status >= 500 or status == 408 else Meaning.LASTING, said)
    if "redirect" in text:
        return Failure(Meaning.REGION, "the store says so")
    if "NotPartial" in text or "non-partial" in text:
        return Failure(Meaning.LASTING, "the server ignores the range that it is asked for")
    if "builder error" in text:
        return Failure(Meaning.LASTING, "its endpoint is plain http, and --source-option allow-http=true is not said")
    if "invalid list response" in text or "InvalidListResponse" in text:
        return Failure(Meaning.LASTING, "the answer is none of an object store")
    if http := _HTTP.search(text):
        which = {"Connect": "no connection", "Timeout": "no answer in time", "Interrupted": "the connection broke off"}
        named = _KIND.search(text)
        return Failure(Meaning.PASSING, which.get(named[1] if named else "", http[1]))
    return Failure(Meaning.LASTING, text.partition("\n")[0][:120])
