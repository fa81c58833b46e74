"""What a mount writes to its log."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from log_lines import parse
from mounts import MakeMount, read, write_files


def test_the_log_of_a_mount(source: Path, mount: MakeMount) -> None:
    names = write_files(source, 1, 100)
    mounted = mount(source)
    mounted.expect_errors = True
    os.kill(mounted.processes["server"], signal.SIGKILL)
    read(mounted.path / names[0])
    lines = [parse(line) for line in mounted.log.read_text().splitlines()]
    told = [line for line in lines if line["msg"] == "the server ended with status -9"]
    assert len(told) == 1
    assert told[0]["level"] == "ERROR"
    assert (told[0]["process"], told[0]["pid"]) == ("supervisor", str(mounted.supervisor))
    assert (told[0]["mountpoint"], told[0]["source"]) == (str(mounted.path), str(source))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told[0]["time"])
