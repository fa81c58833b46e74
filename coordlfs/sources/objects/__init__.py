"""Reading the dataset from an object store: S3, Google Cloud Storage or Azure, through obstore.

Nothing here is imported for a mount of a directory. Nothing here can write to a store or delete in one.
"""
