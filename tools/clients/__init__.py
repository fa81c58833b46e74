"""Frameworks that training jobs are written with, run for real: `python -m coordlfs_tools.clients [NAME …]`.

It knows how each is used, and not how it is measured.
"""
