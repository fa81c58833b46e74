"""What benchmarks, soak, demo and tests need of a machine, in one place: mounts, cgroups, networks, sources that fail.

Each is made for the length of a `with`, and nothing of it is left. It knows nothing of what is measured or tested.
"""
