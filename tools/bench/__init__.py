"""The benchmarks that show coordlfs' numbers: `python -m coordlfs_tools.bench NAME`, as root.

Each holds the mount against what it replaces, both sides taking turns in one run, and prints the median ratio and the
bound that it has to keep. What they need of a machine is in `coordlfs_tools.lab`. They know nothing of soak and
demonstration.
"""
