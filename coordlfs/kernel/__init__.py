"""Everything that speaks to Linux: FUSE requests, mounts, pages, extents, processes.

Nothing in here knows what coordlfs is; each module wraps one kernel interface that Python lacks.
"""
