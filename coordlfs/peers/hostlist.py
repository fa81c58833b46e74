"""Slurm's notation of hosts: `a[01-03,7],b` are a01, a02, a03, a7 and b. Pure."""

from __future__ import annotations

import re
from itertools import islice, product

MOST = 1 << 16  # hosts, which is as many as Slurm has

_ENTRY = r"(?:[^,\[\]\s]|\[[^\[\]\s]+\])+"
_LIST = re.compile(f"(?:{_ENTRY}(?:,{_ENTRY})*)?")
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


def expand(text: str) -> list[str]:
    """The hosts, in their order: each bracket of an entry takes each of its numbers. Raises ValueError."""
    if not _LIST.fullmatch(text):
        raise ValueError(f"{text!r} is no list of hosts")
    hosts: list[str] = []
    for entry in re.findall(_ENTRY, text):
        parts = re.split(r"\[(.*?)\]", entry)  # text, numbers, text, numbers, …, text
        choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += map("".join, islice(product(*choices), MOST + 1))
        if len(hosts) > MOST:
            raise ValueError(f"{text!r} are more than {MOST} hosts")
    return hosts


def _numbers(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if not found:
            raise ValueError(f"[{text}] is no list of numbers")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < first + MOST:
            raise ValueError(f"[{text}] is no list of numbers")
        numbers += [str(n).zfill(len(found[1])) for n in range(first, last + 1)]
    return numbers
