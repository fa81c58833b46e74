"""The demonstration behind `tools/demo.sh`: one training script, directly on a dataset and on a mount of it.

It knows nothing of the benchmarks: what both need is in `coordlfs_tools.lab`.
"""
