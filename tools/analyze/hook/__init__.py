"""What a measured command's Python runs at its start: this directory goes on PYTHONPATH. Needs only Python itself."""
