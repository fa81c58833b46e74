"""The policy simulator: what a cache would hit and read under MinIO, LRU, the kernel's two lists, and at best.

It needs no mount, and knows of a job no more than its trace.
"""
