"""coordlfs: a FUSE file system that ends data stalls in deep-learning training.

Mounted over a dataset directory, it keeps as much of it as memory allows in the kernel's page
cache, never evicts it, and lets a cached read take no round trip to user space.
Importing the package loads nothing else; `coordlfs.commands.cli` is the command.
"""

__version__ = "0.2.0"
