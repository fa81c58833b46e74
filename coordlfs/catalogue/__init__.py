"""Node ids, records and counters, in memory that outlives the server.

It must not know who reads them or what is cached.
"""
