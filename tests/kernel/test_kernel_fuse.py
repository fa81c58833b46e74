"""FUSE messages: their sizes are the kernel's, and no request, however mangled, raises what nobody expects."""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlfs.kernel import fuse

WORD = st.integers(0, (1 << 32) - 1)
LONG = st.integers(0, (1 << 64) - 1)
INIT_SIZE = 104  # header, and fuse_init_in since Linux 5.17


def init(unique: int, minor: int, readahead: int, flags: int, flags2: int, size: int = INIT_SIZE) -> bytes:
    """The kernel's first request."""
    header = struct.pack("<IIQQIIIHH", size, 26, unique, 0, 0, 0, 0, 0, 0)
    return (header + struct.pack("<IIIII", 7, minor, readahead, flags, flags2)).ljust(INIT_SIZE, b"\0")[:size]


def test_headers_have_the_sizes_of_linux_fuse_h() -> None:
    assert fuse.IN_HEADER.size == 40
    assert fuse.OUT_HEADER.size == 16
    assert fuse.INVAL_INODE.size == 24
    assert fuse.INVAL_ENTRY.size == 16


@given(unique=LONG, minor=st.integers(31, 60), readahead=WORD, flags=WORD, flags2=WORD, acl=st.booleans())
def test_init_grants_only_what_was_offered(
    unique: int, minor: int, readahead: int, flags: int, flags2: int, acl: bool
) -> None:
    reply, features = fuse.init_reply(init(unique, minor, readahead, flags, flags2), acl=acl)
    length, error, answered = struct.unpack_from("<IiQ", reply)
    assert (length, error, answered) == (len(reply), 0, unique)
    assert len(reply) == 16 + 64
    major, spoken, ahead, granted, background, congested, _, _, pages, _, granted2, _ = struct.unpack_from(
        "<IIIIHHIIHHII", reply, 16
    )
    assert (major, ahead) == (7, readahead)
    assert spoken <= minor
    assert granted & ~flags == 0
    assert granted2 & ~flags2 == 0
    assert not granted & fuse.POSIX_ACL or acl
    assert 0 < congested < background
    assert pages * 4096 == fuse.MAX_READ
    assert features.zero_request_open == bool(flags & 1 << 17)
    assert features.zero_request_opendir == bool(flags & 1 << 24)
    assert features.resend == bool(flags2 & 1 << 7)


@given(
    request=st.binary(max_size=120) | st.integers(0, INIT_SIZE).map(lambda n: init(1, 40, 0, ~0 & 0xFFFFFFFF, 0)[:n])
)
def test_what_is_no_init_is_refused(request: bytes) -> None:
    whole = len(request) >= 56 and struct.unpack_from("<I", request, 4)[0] == 26
    if whole:
        assert fuse.init_reply(request, acl=True)[0]
    else:
        with pytest.raises((ValueError, struct.error)):
            fuse.init_reply(request, acl=True)


def test_init_of_kernels_before_5_17_is_understood() -> None:
    reply, features = fuse.init_reply(init(1, 34, 1 << 17, 0xFFFFFFFF & ~fuse.INIT_EXT, 0, size=56), acl=False)
    assert features.zero_request_open
    assert not features.resend
    assert len(reply) == 80


@given(unique=LONG, code=st.sampled_from(sorted(errno.errorcode)))
def test_an_error_is_a_header_alone(unique: int, code: int) -> None:
    assert fuse.error_reply(unique, code) == struct.pack("<IiQ", 16, -code, unique)


@given(
    unique=LONG,
    node=LONG,
    numbers=st.tuples(*[st.integers(0, (1 << 31) - 1)] * 6),
    times=st.tuples(*[st.integers(-(1 << 62), 1 << 62)] * 3),
    size=st.integers(0, (1 << 63) - 1),
)
def test_attributes_are_laid_out_as_struct_fuse_attr(
    unique: int, node: int, numbers: tuple[int, ...], times: tuple[int, int, int], size: int
) -> None:
    mode, links, uid, gid, device, blocks = numbers
    names = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_blksize", "st_rdev")
    found = os.stat_result(
        (mode, 7, 1, links, uid, gid, size, 0, 0, 0), dict(zip(names, (*times, blocks, 4096, device), strict=True))
    )
    entry = fuse.entry_reply(unique, node, found, 86400, 5)
    assert struct.unpack_from("<IiQQQQQII", entry) == (len(entry), 0, unique, node, 0, 86400, 5, 0, 0)
    reply = fuse.attributes_reply(unique, node, found, 1)
    assert struct.unpack_from("<IiQQII", reply) == (len(reply), 0, unique, 1, 0, 0)
    assert (len(entry), len(reply)) == (16 + 128, 16 + 104)
    body = reply[32:]
    assert entry[56:] == body
    seconds, nanoseconds = struct.unpack_from("<qqq", body, 24), struct.unpack_from("<III", body, 48)
    assert all(n < 10**9 for n in nanoseconds), "the kernel takes no more than a second of them"
    assert tuple(s * 10**9 + n for s, n in zip(seconds, nanoseconds, strict=True)) == times
    assert struct.unpack_from("<QQQ", body) == (node, size, blocks)
    assert struct.unpack_from("<IIIIIII", body, 60) == (mode, links, uid, gid, device, fuse.preferred_size(found), 0)


@pytest.mark.parametrize(
    ("mode", "size", "preferred"),
    [
        (stat.S_IFREG, 0, 4096),
        (stat.S_IFREG, 4096, 4096),
        (stat.S_IFREG, 4097, 8192),
        (stat.S_IFREG, 131_072, 131_072),
        (stat.S_IFREG, 131_073, 131_072),
        (stat.S_IFREG, (1 << 20) - 1, 131_072),
        (stat.S_IFREG, 1 << 20, 4096),
        (stat.S_IFREG, 1 << 40, 4096),
        (stat.S_IFDIR, 100_000, 4096),
    ],
)
def test_a_small_file_is_best_read_at_once(mode: int, size: int, preferred: int) -> None:
    found = os.stat_result((mode, 7, 1, 1, 0, 0, size, 0, 0, 0), {"st_blksize": 4096})
    assert fuse.preferred_size(found) == preferred


@given(node=LONG, offset=st.integers(-(1 << 63), (1 << 63) - 1), length=LONG)
def test_invalidate_inode(node: int, offset: int, length: int) -> None:
    assert fuse.invalidate_inode(node, offset, length) == struct.pack("<IiQQqQ", 40, 2, 0, node, offset, length)


@given(parent=LONG, name=st.binary(min_size=1, max_size=255))
def test_invalidate_entry(parent: int, name: bytes) -> None:
    message = fuse.invalidate_entry(parent, name)
    assert message == struct.pack("<IiQQII", len(message), 3, 0, parent, len(name), 0) + name + b"\0"


def test_resend() -> None:
    assert fuse.resend() == struct.pack("<IiQ", 16, 7, 0)
