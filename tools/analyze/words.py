"""What was found, in rows of words: the terminal's tables and the report's are the same."""

from __future__ import annotations

from typing import Any

from coordlfs.sizes import text

_RATES = {
    "ingestion": ("ingestion G", "fed with minibatches at hand"),
    "prep": ("prep P", "the loader drained, all data cached"),
    "fetch": ("fetch F", "the loader drained, nothing cached"),
    "storage": ("storage S", "the data read as the loader reads it, cold"),
    "cache": ("cache C", "the same from memory"),
}
STALLS = {"compute": "computing", "prep": "waiting for prep", "fetch": "waiting for storage"}


def rate_rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, meaning, median and interval of each rate."""
    rows = []
    for name, (label, meaning) in _RATES.items():
        value, spread = found["rates"][name], found["spread"][name]
        if value is None or spread is None:
            rows.append((label, meaning, "not measured", ""))
        elif name in ("storage", "cache"):
            rows.append((label, meaning, f"{text(value)}/s", f"{text(spread[0])} – {text(spread[1])}"))
        else:
            rows.append((label, meaning, f"{value:,.0f} samples/s", f"{spread[0]:,.0f} – {spread[1]:,.0f}"))
    return rows


def stall_rows(found: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Name, milliseconds of an iteration, share and the share's interval."""
    stalls = found["stalls"]
    rows = []
    for name, label in STALLS.items():
        interval = found["spread"].get(f"{name}_share")
        words = f"{interval[0]:.1%} – {interval[1]:.1%}" if interval else ""
        rows.append((label, stalls[f"{name}_seconds"] * 1000, stalls[f"{name}_share"], words))
    return rows


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
