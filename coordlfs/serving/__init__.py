"""Answering the kernel: the loops over /dev/fuse, the compiled fast path, names, listings, reads.

It must not know how it was mounted.
"""
