"""Structures of Linux that more than one compiled module fills or reads."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/fuse.h>
    #include <sys/stat.h>
    """
    struct fuse_in_header:
        uint32_t len, opcode
        uint64_t unique, nodeid
        uint32_t uid, gid, pid

    struct fuse_read_in:
        uint64_t offset
        uint32_t size, flags

    struct fuse_ioctl_in:
        uint32_t flags

    struct fuse_out_header:
        uint32_t len
        int error
        uint64_t unique

    struct fuse_attr:
        uint64_t ino, size, blocks, atime, mtime, ctime
        uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags

    struct fuse_entry_out:
        uint64_t nodeid, generation, entry_valid, attr_valid
        fuse_attr attr

    struct fuse_dirent:
        uint64_t ino, off
        uint32_t namelen, type
        char name[]

    struct fuse_direntplus:
        fuse_entry_out entry_out
        fuse_dirent dirent

    const size_t FUSE_NAME_OFFSET_DIRENTPLUS
    const uint32_t FUSE_IOCTL, FUSE_IOCTL_DIR, FUSE_LOOKUP, FUSE_READ

    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec

    struct statx:
        uint32_t stx_blksize, stx_nlink, stx_uid, stx_gid
        uint16_t stx_mode
        uint64_t stx_ino, stx_size, stx_blocks
        statx_timestamp stx_atime, stx_mtime, stx_ctime
