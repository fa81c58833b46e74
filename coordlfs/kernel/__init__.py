"""Everything that speaks to Linux: FUSE messages, mounts, pages, extents, processes.

Nothing in here knows what coordlfs is; each module wraps one kernel interface that Python lacks.
"""
