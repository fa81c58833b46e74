"""What the jobs of a group must agree on, and in what two of them differ, in words. Pure; needs no torch.

A profile is what a job sends as it joins: its settings, and the digest of what makes its samples (`identity.py`).
"""

from __future__ import annotations

from typing import Any

_NAMED = 4  # differences of the content that a message names
_CONTENT = ("content", "parts", "unknown")


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """In what a job (`here`) differs from the others of its group (`there`); nothing if they may share."""
    found = [
        f"{key.replace('_', ' ')} is {here.get(key)!r} here and {there.get(key)!r} there"
        for key in {**there, **here}
        if key not in _CONTENT and here.get(key) != there.get(key)
    ]
    if here.get("identity") is not None or there.get("identity") is not None:
        return found  # somebody vouches for the content
    if here.get("dataset") != there.get("dataset"):
        return found  # and it differs, of course
    return found + _content(here, there)


def _content(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    digests = here.get("content"), there.get("content")
    if digests[0] is not None and digests[0] == digests[1]:
        return []
    named = _parts(_texts(here), _texts(there))
    if None in digests:
        why = here.get("unknown") or there.get("unknown")
        named.append(f"whether the samples are the same cannot be told: {why}")
    return named or ["the dataset or what prepares it differs"]


def _texts(profile: dict[str, Any]) -> dict[str, str]:
    parts = profile.get("parts")
    return {str(k): str(v) for k, v in parts.items()} if isinstance(parts, dict) else {}


def _parts(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """The parts that differ: values and code where there are any, else the innermost of what has only a digest."""
    differ = [key for key in here if key in there and here[key] != there[key]]
    values = [key for key in differ if not here[key].startswith("#") and not there[key].startswith("#")]
    digests = [key for key in differ if key not in values]
    inner = [k for k in digests if not any(o != k and o.startswith((f"{k}.", f"{k}[")) for o in differ)]
    code = [key for key in inner if key.startswith("the code of ")]
    found = [f"{key} is {here[key]} here and {there[key]} there" for key in values]
    found += [f"{key} differs" for key in (code or (inner if not values else []))]
    if not found or all(f.partition(".")[0] == f for f in found):  # only as a whole
        found += [f"{key} is only here" for key in here if key not in there]
        found += [f"{key} is only there" for key in there if key not in here]
    more = len(found) - _NAMED
    return found[:_NAMED] + ([f"{more} more"] if more > 0 else [])
