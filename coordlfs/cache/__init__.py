"""MinIO over memory: what is admitted, how keepers pin it, what epochs read.

It must not know how requests arrive or who owns an item.
"""
