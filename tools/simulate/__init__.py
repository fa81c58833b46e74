"""The policy simulator: what a cache would hit and read under MinIO, LRU, the kernel's two lists, and at best."""
