"""Buckets of servers that others wrote: moto (S3), which checks signatures. What ours only claims is seen here."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from moto.server import ThreadedMotoServer

from coordlfs.kernel import pages
from coordlfs.sources.address import Address, Options
from coordlfs.sources.contract import Part
from coordlfs.sources.objects.source import ObjectSource

MIB = 1 << 20
CONTENT = os.urandom(18 * MIB)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where moto serves."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What fills buckets."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with closing(boto3.client("s3", endpoint_url=endpoint)) as made:
        made.create_bucket(Bucket="set")
        yield made
        for found in made.list_objects_v2(Bucket="set").get("Contents", []):
            made.delete_object(Bucket="set", Key=found["Key"])
        made.delete_bucket(Bucket="set")


def open_bucket(endpoint: str, bucket: str = "set") -> ObjectSource:
    """All of it."""
    options = Options(endpoint=endpoint, allow_http=True, timeout=10)
    return ObjectSource(Address("s3", bucket, ""), options, lasts=0.0, tried_for=1.0)


def read(source: ObjectSource, path: bytes) -> bytes:
    """All of an object."""
    size = source.lstat(path).st_size
    into = pages.buffer(size + pages.PAGE)
    n, _ = source.read(Part(1, path, 0, size), into, lambda: None)
    return into[:n]


def test_a_bucket_of_s3(endpoint: str, client: Any) -> None:
    keys = ["a", "d/b", "d/e/ü é", "d/100%+?#&=", "d/'\"<>", "marked/"]
    for key in keys:
        client.put_object(Bucket="set", Key=key, Body=key.encode() if key[-1] != "/" else b"")
    upload = client.create_multipart_upload(Bucket="set", Key="large")["UploadId"]
    parts = []
    for number, first in enumerate(range(0, len(CONTENT), 6 * MIB), 1):
        part = client.upload_part(
            Bucket="set", Key="large", PartNumber=number, UploadId=upload, Body=CONTENT[first : first + 6 * MIB]
        )
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    client.complete_multipart_upload(Bucket="set", Key="large", UploadId=upload, MultipartUpload={"Parts": parts})
    source = open_bucket(endpoint)
    assert source.listing(b"").names == [b"a", b"d", b"large", b"marked"]
    assert source.listing(b"marked").names == []
    assert source.listing(b"d").names == sorted([b"b", b"e", b"100%+?#&=", b"'\"<>"])
    for key in keys[:-1]:
        assert read(source, key.encode()) == key.encode()
    assert read(source, b"large") == CONTENT
    client.put_object(Bucket="set", Key="a", Body=b"b")
    assert read(source, b"a") == b"b"
    client.delete_object(Bucket="set", Key="a")
    with pytest.raises(FileNotFoundError):
        source.lstat(b"a")


def test_a_bucket_that_is_not_there(endpoint: str, client: Any) -> None:
    with pytest.raises(OSError, match="NoSuchBucket") as caught:
        open_bucket(endpoint, "none").listing(b"")
    assert caught.value.errno == errno.EIO
