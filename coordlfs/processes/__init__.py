"""What runs: the supervisor, the server that it restarts, and what the commands and Prometheus ask them.

It must not know what a user typed.
"""
