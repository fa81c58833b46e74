"""The partitioned cache: nodes that mount the same dataset add their caches up.

Every item has one owner, which alone caches it; a miss asks the owner, and reads the source where that does not help.
It must not know how requests arrive, or how what is cached is held.
"""
