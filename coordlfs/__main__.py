"""`python -m coordlfs` is the command `coordlfs`."""

import sys

from coordlfs.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
