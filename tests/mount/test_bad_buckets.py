"""Buckets that cannot be mounted, for what the machine, the environment or a server says: one line, and nothing stays.

What is wrong with the words themselves is in `test_mount_buckets.py`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from coordlfs_tools.lab.buckets import Bucket, Fault, serve
from mounts import coordlfs, mentions

OF_A_CLOUD = ("AWS_", "GOOGLE_", "AZURE_")
KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "hunter2-of-the-tests", "AWS_REGION": "us-east-1"}
ACCOUNT = {"AZURE_STORAGE_ACCOUNT_NAME": "account"}


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the cloud's tools, nothing but what a test sets."""
    for name in [name for name in os.environ if name.startswith(OF_A_CLOUD)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def refused(place: Path, source: str, endpoint: str | None, *given: str) -> str:
    """What `mount` says of a source that it does not mount."""
    words = []
    for option in ([f"endpoint={endpoint}"] if endpoint else []) + ["timeout=1s", *given]:
        words += ["--source-option", option]
    done = coordlfs("mount", source, place / "mnt", *words, status=1)
    assert done.stderr.startswith("coordlfs: ")
    assert done.stderr.count("\n") == 1
    assert "hunter" not in done.stderr
    assert not (place / "mnt").exists()
    assert not mentions(place)
    return done.stderr


def setting(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    """Put values into the environment."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@contextmanager
def web_server(status: int, body: bytes) -> Iterator[str]:
    """The address of a server that says the same to all that it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("body", [b"", b"<!doctype html><p>Welcome<br>", b'{"ok": true}', b"<html/>"])
def test_an_endpoint_that_is_no_object_store(
    place: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, body: bytes
) -> None:
    setting(monkeypatch, ACCOUNT)
    with web_server(200, body) as endpoint:
        said = refused(place, f"{scheme}://set/d", endpoint, "allow-http=true", "anonymous=true")
    assert "none of an object store" in said or "no object store" in said


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, b"<html>nothing here</html>", "check the endpoint and the bucket's name"),
        (404, b"<Error><Code>NoSuchBucket</Code></Error>", "does not exist at http"),
        (400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "--source-option region="),
        (301, b"<Error><Code>PermanentRedirect</Code></Error>", "--source-option region="),
        (403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>", "may not be listed with these credentials"),
        (403, b"<Error><Code>ExpiredToken</Code></Error>", "no credentials were found"),
    ],
)
def test_what_a_store_says_of_a_bucket(
    place: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, says: str
) -> None:
    setting(monkeypatch, KEYS)
    with web_server(status, body) as endpoint:
        assert says in refused(place, "s3://set/d", endpoint, "allow-http=true")


@pytest.mark.parametrize(
    ("source", "values", "says"),
    [
        ("s3://set", {"AWS_ACCESS_KEY_ID": "AKID"}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("az://set", {}, "set AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://set", ACCOUNT | {"AZURE_STORAGE_ACCOUNT_KEY": "%%%"}, "set AZURE_STORAGE_ACCOUNT_NAME"),
        ("gs://set", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}, "set GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://set", KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "--source-option allow-http=true"),
    ],
)
def test_an_environment_that_lacks_something(
    place: Path, monkeypatch: pytest.MonkeyPatch, source: str, values: dict[str, str], says: str
) -> None:
    setting(monkeypatch, values)
    assert says in refused(place, source, None)


def test_no_credentials(place: Path) -> None:
    with serve(Bucket()) as bucket:
        bucket.put("d/f", b"")
        bucket.faults = lambda asked: Fault(status=403)  # nor has this machine a role
        said = refused(place, "s3://bucket/d", bucket.endpoint, "allow-http=true")
    assert "no credentials were found" in said
