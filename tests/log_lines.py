"""Lines of coordlfs's log, as tests read them."""

from __future__ import annotations

import json
import re

_PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "]+)(?: |$)')


def parse(line: str) -> dict[str, str]:
    """The fields of a line; the test fails if there is anything else in it."""
    assert "".join(m[0] for m in _PAIR.finditer(line)) == line
    return {m[1]: json.loads(m[2]) if m[2][0] == '"' else m[2] for m in _PAIR.finditer(line)}
