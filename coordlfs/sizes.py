"""Sizes and times as users write and read them.

It is told how much memory there is, and looks at nothing.
"""

from __future__ import annotations

import re

from coordlfs.errors import UserError
from coordlfs.kernel.memory import Memory
from coordlfs.kernel.pages import PAGE

AUTO_SHARE = 0.6  # of the memory that is available
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd]?)", re.IGNORECASE | re.ASCII)
_SHARE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*%", re.ASCII)


def text(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1024 or unit == "TiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def cache_size(asked: str, memory: Memory) -> tuple[int, str]:
    """Bytes of cache for "200G", "60%" (of all memory) or "auto" (a share of what is available), and how that came.

    Raises UserError for anything else, and for more than there is.
    """
    asked = asked.strip()
    if asked.lower() == "auto":
        size = int(memory.available * AUTO_SHARE)
        return size, f"auto: {AUTO_SHARE:.0%} of the {text(memory.available)} available"
    if share := _SHARE.fullmatch(asked):
        percent = float(share[1])
        if percent > 100:
            raise UserError(f"--cache-size {asked} is more than all memory: give at most 100%", 2)
        return int(memory.total * percent / 100), f"{asked} of {text(memory.total)} of memory"
    if match := _SIZE.fullmatch(asked):
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size > memory.total:
            raise UserError(
                f"--cache-size {asked} is more than the {text(memory.total)} of memory here: give less, or auto", 2
            )
        if size < PAGE and float(match[1]):
            raise UserError(
                f"--cache-size {asked} is less than a page of memory: is {match[1]}G or {match[1]}% meant?", 2
            )
        return size, "no cache" if not size else "as given"
    raise UserError(f"--cache-size {asked!r} is not a size: write 200G, 512M, 60% or auto", 2)


def disk_size(asked: str, total: int, free: int, least: int) -> int:
    """Bytes of disk cache for "2T", "80%" (of the file system) or "auto" (what is `free`, less a tenth of the `total`).

    Raises UserError for anything else, for more than the file system has, and for fewer than `least`.
    """
    asked = asked.strip()
    if asked.lower() == "auto":
        size = max(0, free - total // 10)
        if size < least:
            raise UserError(
                f"--disk-size auto finds no room: {text(free)} of {text(total)} are free: make some, or give a size"
            )
        return size
    if share := _SHARE.fullmatch(asked):
        size = int(total * min(101.0, float(share[1])) / 100)
    elif match := _SIZE.fullmatch(asked):
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        raise UserError(f"--disk-size {asked!r} is not a size: write 2T, 500G, 80% or auto", 2)
    if size > total > 0:  # some do not say: 0
        raise UserError(f"--disk-size {asked} is more than the {text(total)} of its file system: give less, or auto", 2)
    if size < least:
        raise UserError(f"--disk-size {asked} is too small: give {text(least)} or more, or leave --disk-cache out", 2)
    return size


def seconds(asked: str) -> float:
    """Seconds for "90", "90s", "10m", "6h" or "1d". Raises UserError for anything else, and for less than one."""
    match = _TIME.fullmatch(asked.strip())
    found = float(match[1]) * _TIME_UNITS[match[2].lower()] if match else 0.0
    if found < 1:
        raise UserError(f"{asked!r} is not a time: write 30s, 10m, 6h or 1d, and at least 1s", 2)
    return found
