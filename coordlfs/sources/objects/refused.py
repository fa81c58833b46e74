"""Listings that obstore refuses, by botocore: for one key that obstore cannot name it gives none of a page.

botocore gives keys as they are. It takes 0.3 s to import, 35 MB, and the GIL for as long as it reads an answer, so it
has a process of its own for as long as a listing takes: few directories hold such keys. It finds credentials as it
does everywhere. Only for stores that speak the protocol of S3. It knows keys, and not what is shown of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus

from coordlfs.sources.address import Address, Options
from coordlfs.sources.objects.failures import Failure, Meaning, meaning_of
from coordlfs.sources.objects.names import Entry, Found

_CONNECTS_WITHIN = 5.0  # seconds


class RefusedError(Exception):
    """It could not be listed in this way either."""

    def __init__(self, found: Failure) -> None:
        super().__init__(found.text)
        self.failure = found


def pages_below(address: Address, options: Options, prefix: str) -> Iterator[Found]:
    """What lies right below a prefix, by pages as they come. Raises RefusedError."""
    given = json.dumps({"address": address, "options": options, "prefix": prefix})
    with subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as lister:
        assert lister.stdin is not None
        assert lister.stdout is not None
        try:
            lister.stdin.write(given.encode())
            lister.stdin.close()
            for line in lister.stdout:
                said = json.loads(line)
                if "failed" in said:
                    raise RefusedError(Failure(Meaning[said["failed"][0]], said["failed"][1]))
                if "end" in said:
                    return
                yield _found(said)
            raise RefusedError(Failure(Meaning.PASSING, "the process that lists ended"))
        finally:
            lister.kill()


def _found(said: dict[str, Any]) -> Found:
    objects = [
        (key, Entry.of(size, datetime.fromisoformat(modified), etag)) for key, size, modified, etag in said["objects"]
    ]
    return Found(said["prefixes"], objects)


# -- the process that lists -----------------------------------------------------------------------------------------


def _main() -> None:
    """`python -m coordlfs.sources.objects.refused`: says pages, a line of JSON each, and then how it ended."""
    given = json.load(sys.stdin)
    try:
        for page in _asked(Address(*given["address"]), Options(*given["options"]), given["prefix"]):
            print(json.dumps(_told(page)), flush=True)
    except Exception as e:  # whatever fails is told; botocore has many classes
        found = _meaning(e)
        print(json.dumps({"failed": [found.meaning.name, found.text]}), flush=True)
    else:
        print(json.dumps({"end": True}), flush=True)


def _asked(address: Address, options: Options, prefix: str) -> Iterator[dict[str, Any]]:
    import botocore.session  # type: ignore[import-untyped]  # here: only this process has use for it
    from botocore import UNSIGNED
    from botocore.config import Config  # type: ignore[import-untyped]

    how = Config(
        connect_timeout=min(_CONNECTS_WITHIN, options.timeout),
        read_timeout=options.timeout,
        retries={"total_max_attempts": 1},  # who asks tries again
        signature_version=UNSIGNED if options.anonymous else None,
        s3={"addressing_style": _style(options)},
    )
    session = botocore.session.get_session()
    endpoint = options.endpoint or os.environ.get("AWS_ENDPOINT")  # a name that only obstore knows
    client = session.create_client("s3", region_name=options.region, endpoint_url=endpoint, config=how)
    # Encoded, since XML has no way to write some characters, and decoded here, since botocore takes UTF-8 for granted.
    asked = {"Bucket": address.bucket, "Prefix": prefix, "Delimiter": "/", "EncodingType": "url"}
    if options.requester_pays:
        asked["RequestPayer"] = "requester"
    yield from client.get_paginator("list_objects_v2").paginate(**asked)


def _style(options: Options) -> str:
    if options.path_style is None:
        return "path" if options.endpoint else "auto"
    return "path" if options.path_style else "virtual"


def _told(page: dict[str, Any]) -> dict[str, Any]:
    def decoded(key: str) -> str:
        return unquote_plus(key, errors="surrogateescape") if page.get("EncodingType") == "url" else key

    objects = [
        (decoded(o["Key"]), o["Size"], o["LastModified"].isoformat(), o.get("ETag")) for o in page.get("Contents", [])
    ]
    return {"prefixes": [decoded(found["Prefix"]) for found in page.get("CommonPrefixes", [])], "objects": objects}


def _meaning(error: Exception) -> Failure:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # a ClientError: the store has answered
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = response.get("Error", {}).get("Code")
        return meaning_of("ClientError", f"status code: {status} <Code>{code}</Code>")
    kind = type(error).__name__
    if isinstance(error, ImportError):
        return Failure(Meaning.BAD_KEY, "botocore is not installed: pip install 'coordlfs[objects]'")
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return Failure(Meaning.CREDENTIALS, "nobody gives any")
    if "Connection" in kind or "Timeout" in kind or kind == "HTTPClientError":
        return Failure(Meaning.PASSING, "no connection, or no answer in time")
    return Failure(Meaning.LASTING, kind)


if __name__ == "__main__":
    _main()
