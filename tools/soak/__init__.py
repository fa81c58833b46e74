"""The soak: jobs that check every byte they read through real mounts, while whatever can fail is made to fail.

`python -m coordlfs_tools.soak --minutes 10`. Files carry their version in every word, so that readers know bytes of
another version, another place or another file from right ones; a ledger in shared memory says which versions of a file
were legal at any time. Whatever else a reader sees (an error that nobody made, wrong bytes, no answer) is a failure.

It knows mounts by their commands and processes, and nothing of what they do inside.
"""
