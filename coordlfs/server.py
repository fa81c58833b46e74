"""What a supervisor of version 0.1 starts as its server: a mount goes on when 0.2 is installed beneath it."""

from coordlfs.processes.server import main

if __name__ == "__main__":
    main()
