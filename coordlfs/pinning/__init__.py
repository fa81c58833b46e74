"""Pinning a directory without a mount: which files there are, what changes, and which of them are pinned when.

It must not know how keepers pin (`cache`), nor how the process that does all this comes to be (`processes`).
"""
