"""The one error of the lab, for whoever runs something in it to catch. Knows nothing of what failed."""

from __future__ import annotations


class LabError(Exception):
    """What was to be run here cannot be run; the message says why, or what to do."""
