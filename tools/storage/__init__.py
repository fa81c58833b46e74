"""Storage as a training job reads it: whole files or parts of them in random order, many at once, cold and warm.

It only reads, and needs no mount of coordlfs.
"""
