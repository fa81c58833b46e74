"""`python -m coordlfs` is the command `coordlfs`."""

import sys

from coordlfs.commands.entry import coordlfs

if __name__ == "__main__":
    sys.exit(coordlfs())
