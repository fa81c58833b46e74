"""A store of blocks of files on a local disk, which proves what it gives and outlives every process.

It knows keys, versions and bytes, and neither the catalogue nor what is worth its place.
"""
