"""Keys that look alike, or are as long as a store allows: each is a file of its own, by its very bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from coordlfs_tools.lab.buckets import Bucket, serve
from mounts import MakeMount, raises, read

LONGEST = "/".join(["n" * 255] * 3) + "/" + "m" * 254  # 1,022 bytes: with `d/` as long as a key may be
ALIKE = [
    "Case",
    "case",
    "CASE",
    "\u00e9",
    "e\u0301",
    "\ufb01",
    "fi",
    " a",
    "a ",
    "a",
    "a%20",
    "a+",
    "%",
    "?",
    "#",
    "-rf",
    "\u202e",
]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that serves, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with serve(Bucket(page=7)) as served:
        yield served


def test_each_key_is_a_file_by_its_very_bytes(bucket: Bucket, mount: MakeMount) -> None:
    for name in [*(f"alike/{name}" for name in ALIKE), LONGEST]:
        bucket.put(f"d/{name}", name.encode())
    bucket.put(f"d/{'x' * 256}", b"longer than a name may be")
    bucket.put("d/both", b"an object and a prefix")
    bucket.put("d/both/f", b"f")
    bucket.put("d/both0", b"between them in no order")
    words = [f"endpoint={bucket.endpoint}", "allow-http=true", "timeout=2"]
    m = mount("s3://bucket/d", "16M", *(word for option in words for word in ("--source-option", option)))
    assert sorted(os.listdir(os.fsencode(m.path / "alike"))) == sorted(name.encode() for name in ALIKE)
    for name in [*(f"alike/{name}" for name in ALIKE), LONGEST]:
        assert read(m.path / name) == name.encode()
    assert sorted(os.listdir(m.path)) == sorted(["alike", "n" * 255, "both", "both0"])
    assert os.listdir(m.path / "both") == ["f"]
    for name in ("alike/cAse", "alike/FI", "alike/E\u0301", "x" * 255):
        raises(errno.ENOENT, (m.path / name).stat)
    assert m.stats()["source"]["requests"]["hidden_keys"] == 2
