"""What the supervisor passes on of a disk cache, and what follows from it for others than the disk tier."""

from __future__ import annotations

from typing import Any


def size(config: dict[str, Any]) -> int:
    """Bytes that a mount may keep on disk; 0 without a disk cache."""
    disk = config.get("disk")
    return int(disk["size"]) if disk else 0
