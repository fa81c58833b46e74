"""The FUSE wire protocol, as far as coordlfs speaks it itself (include/uapi/linux/fuse.h)."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen padding
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
READ_IN = struct.Struct("=QQIIQI")  # fh offset size read_flags lock_owner flags (of the open file)
READ_MESSAGE = struct.Struct("=IIQQ8xI4x8xQI12xI4x")  # all of a READ: len opcode unique nodeid pid offset size flags
READ_SIZE = READ_MESSAGE.size
INIT_IN = struct.Struct("=IIIII")  # major minor max_readahead flags flags2
INIT_OUT = struct.Struct("=IIIIHHIIHHII")
INIT_OUT_SIZE = 64
ENTRY = struct.Struct("=QQQQII")  # nodeid generation entry_valid attr_valid, and their nanoseconds
ATTR_VALID = struct.Struct("=QII")  # seconds nanoseconds padding
ATTR = struct.Struct(
    "=QQQqqqIIIIIIIIII"
)  # ino size blocks, times, their nanoseconds, mode nlink uid gid rdev blksize flags
XATTR_IN = struct.Struct("=II")  # size padding; the name follows
XATTR_OUT = struct.Struct("=II")  # size padding, where a size of 0 asks for it; else the value is the reply
IOCTL_IN = struct.Struct("=QIIQII")  # fh flags cmd arg in_size out_size; what it takes in follows
IOCTL_DIR = 1 << 4  # in flags: of a directory
IOCTL_OUT = struct.Struct("=iIII")  # result, and three of no use here
INVAL_INODE = struct.Struct("=QqQ")  # nodeid offset length
STORE = struct.Struct("=QQII")  # nodeid offset size padding; the bytes follow
INVAL_ENTRY = struct.Struct("=QII")  # parent namelen flags

LOOKUP, FORGET, GETATTR, SETATTR, READLINK = 1, 2, 3, 4, 5
OPEN, READ, STATFS, RELEASE, FSYNC = 14, 15, 17, 18, 20
GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 22, 23, 25, 26, 27, 28, 29, 30
ACCESS, INTERRUPT, DESTROY, IOCTL, BATCH_FORGET, READDIRPLUS = 34, 36, 38, 39, 42, 44

# What the kernel sends of those that are looked into: bytes after the header at least, and whether a name follows.
_BODIES = {
    LOOKUP: (0, True),
    READ: (READ_IN.size, False),
    GETXATTR: (XATTR_IN.size, True),
    LISTXATTR: (XATTR_IN.size, False),
    IOCTL: (IOCTL_IN.size, False),
    READDIRPLUS: (READ_IN.size, False),
}
_NOTHING = (0, False)

NOTIFY_INVAL_INODE, NOTIFY_INVAL_ENTRY, NOTIFY_STORE, NOTIFY_RESEND, NOTIFY_INC_EPOCH = 2, 3, 4, 7, 8
UNIQUE_RESENT = 1 << 63

ASYNC_READ, AUTO_INVAL_DATA, DO_READDIRPLUS, ASYNC_DIO = 1 << 0, 1 << 12, 1 << 13, 1 << 15
PARALLEL_DIROPS, POSIX_ACL, ABORT_ERROR, MAX_PAGES = 1 << 18, 1 << 20, 1 << 21, 1 << 22
NO_OPEN_SUPPORT, CACHE_SYMLINKS, NO_OPENDIR_SUPPORT = 1 << 17, 1 << 23, 1 << 24
INIT_EXT = 1 << 30
HAS_RESEND = 1 << (39 - 32)  # in flags2

ROOT_NODE = 1
_S = 10**9  # nanoseconds
MAX_READ = 1 << 20
MOST_PREFERRED = 1 << 17
LARGEST_FILE = (1 << 63) - 1
MAX_READ_PAGES = 256
REQUEST_BUFFER = 1 << 17  # room for the longest request that a read-only mount can send


@dataclass(frozen=True, slots=True)
class Features:
    """What the kernel offered in INIT and was granted."""

    minor: int
    zero_request_open: bool
    zero_request_opendir: bool
    resend: bool


def is_whole(request: memoryview, length: int, opcode: int) -> bool:
    """Whether a request of at least a header, which says that it has `length` bytes, holds what its kind must."""
    least, named = _BODIES.get(opcode, _NOTHING)
    least += IN_HEADER.size
    return length == len(request) and length >= least and (not named or (length > least + 1 and request[-1] == 0))


def init_reply(request: bytes, *, acl: bool, background: int = 512) -> tuple[bytes, Features]:
    """The reply to the INIT request `request`, and the features it settles.

    `acl` asks the kernel to enforce POSIX ACLs, which it reads as extended attributes.
    """
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != INIT:
        raise ValueError(f"the first request is not INIT but {opcode}")
    # Linux before 5.17 sends no second word of flags.
    body_in = bytes(request[IN_HEADER.size :])
    _, minor, readahead, offered, offered2 = INIT_IN.unpack_from(
        body_in.ljust(INIT_IN.size, b"\0") if len(body_in) >= 16 else body_in
    )
    want = ASYNC_READ | AUTO_INVAL_DATA | DO_READDIRPLUS | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES
    want |= CACHE_SYMLINKS | INIT_EXT | (POSIX_ACL if acl else 0)
    granted, granted2 = want & offered, HAS_RESEND & offered2
    body = INIT_OUT.pack(
        7,
        min(minor, 40),
        readahead,
        granted,
        background,
        background * 3 // 4,
        4096,  # max_write: nothing is ever written
        1,  # time granularity, ns
        MAX_READ_PAGES,
        0,
        granted2,
        0,
    ).ljust(INIT_OUT_SIZE, b"\0")
    features = Features(minor, bool(offered & NO_OPEN_SUPPORT), bool(offered & NO_OPENDIR_SUPPORT), bool(granted2))
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body, features


def error_reply(unique: int, code: int) -> bytes:
    """A reply that is nothing but the errno `code`."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)


def reply(unique: int, body: bytes) -> bytes:
    """A reply that is nothing but `body`."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def ioctl_reply(unique: int) -> bytes:
    """The reply to an ioctl that was done, and gives nothing back."""
    return reply(unique, IOCTL_OUT.pack(0, 0, 0, 0))


def attributes(node: int, st: os.stat_result) -> bytes:
    """struct fuse_attr."""
    atime, mtime, ctime = divmod(st.st_atime_ns, _S), divmod(st.st_mtime_ns, _S), divmod(st.st_ctime_ns, _S)
    return ATTR.pack(
        *(node, st.st_size, st.st_blocks, atime[0], mtime[0], ctime[0], atime[1], mtime[1], ctime[1]),
        *(st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev & 0xFFFFFFFF, preferred_size(st), 0),
    )


def preferred_size(st: os.stat_result) -> int:
    """Bytes to ask for at a time, st_blksize: of a small file so many that it comes as one READ.

    Python's `open` makes its buffer that large. With one of 4096 bytes the kernel's readahead begins with 16 KiB, and a
    photograph takes three READs; with 128 KiB it begins with 512.
    """
    if not stat.S_ISREG(st.st_mode) or not st.st_blksize < st.st_size < MAX_READ:
        return st.st_blksize
    return min(1 << (st.st_size - 1).bit_length(), MOST_PREFERRED)


def entry_reply(unique: int, node: int, st: os.stat_result, name_valid: int, valid: int) -> bytes:
    """The reply to LOOKUP: the name leads to `node` for `name_valid` seconds, its attributes are good for `valid`."""
    header = OUT_HEADER.pack(OUT_HEADER.size + ENTRY.size + ATTR.size, 0, unique)
    return header + ENTRY.pack(node, 0, name_valid, valid, 0, 0) + attributes(node, st)


def attributes_reply(unique: int, node: int, st: os.stat_result, valid: int) -> bytes:
    """The reply to GETATTR."""
    header = OUT_HEADER.pack(OUT_HEADER.size + ATTR_VALID.size + ATTR.size, 0, unique)
    return header + ATTR_VALID.pack(valid, 0, 0) + attributes(node, st)


def _notification(kind: int, body: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), kind, 0) + body


def invalidate_inode(node: int, offset: int, length: int) -> bytes:
    """Forget the attributes of `node`, and its pages from `offset` on (length 0: to the end).

    A negative offset leaves the pages alone. Otherwise the write BLOCKS while a page of the range is being read:
    never send it from a thread that such a READ may be waiting for.
    """
    return _notification(NOTIFY_INVAL_INODE, INVAL_INODE.pack(node, offset, length))


def invalidate_entry(parent: int, name: bytes) -> bytes:
    """Forget that `name` in directory `parent` leads anywhere."""
    return _notification(NOTIFY_INVAL_ENTRY, INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0")


def invalidate_all_entries() -> bytes:
    """Look up every name anew before it is used again (Linux 6.16). Never blocks."""
    return _notification(NOTIFY_INC_EPOCH, b"")


def store_nothing(node: int) -> bytes:
    """Put no byte into the page cache of `node`, which changes nothing: ENOENT if the kernel does not know it."""
    return _notification(NOTIFY_STORE, STORE.pack(node, 0, 0, 0))


def resend() -> bytes:
    """Ask for every request again that was read and not answered (Linux 6.9)."""
    return _notification(NOTIFY_RESEND, b"")
