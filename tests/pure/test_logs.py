"""Messages: their form in files and in the journal, and how many of a kind there are."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_lines import parse
from mounts import eventually

from coordlfs import logs
from coordlfs.kernel import systemd


def record(message: str, *arguments: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("coordlfs.test", level, __file__, 1, message, arguments, None)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(message=_TEXT, mountpoint=_TEXT)
def test_a_line_says_what_it_was_given_whatever_that_is(message: str, mountpoint: str) -> None:
    line = logs.KeyValue({"process": "server", "mountpoint": mountpoint}).format(record("%s", message))
    assert "\n" not in line
    fields = parse(line)
    assert line.isprintable()
    assert fields.get("msg", "") == message
    assert fields.get("mountpoint", "") == mountpoint
    assert (fields["level"], fields["process"], fields["pid"]) == ("INFO", "server", str(os.getpid()))


def test_bytes_that_are_no_text_are_shown() -> None:
    assert parse(logs.KeyValue({"mountpoint": "/\udcff"}).format(record("m")))["mountpoint"] == "/\\xff"
    assert logs.Plain("%(message)s").format(record("%s: %d", "a\n\x1b[31m\udcff", 7)) == "a\\n\\x1b[31m\\xff: 7"


def test_a_file_that_was_moved_away_is_made_anew_and_one_that_cannot_be_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    handler = logs._File(str(tmp_path / "logs" / "log"))
    handler.handle(record("before"))
    os.rename(tmp_path / "logs" / "log", tmp_path / "old")
    handler.handle(record("after"))
    assert (tmp_path / "logs" / "log").read_text() == "after\n"
    os.remove(tmp_path / "logs" / "log")
    os.rmdir(tmp_path / "logs")
    raising, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        handler.handle(record("lost"))
    finally:
        logging.raiseExceptions = raising
        handler.close()


# -- the journal --------------------------------------------------------------------------------------------------


@pytest.fixture
def datagrams(tmp_path: Path) -> Iterator[socket.socket]:
    """What listens in place of systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.settimeout(240)
        yield sock


def decode(entry: bytes) -> dict[str, str]:
    """The fields of an entry, by the protocol's own rules."""
    fields = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields[name.decode()] = value.decode()
        entry = rest
    return fields


@given(st.dictionaries(st.from_regex("[A-Z][A-Z_]{0,10}", fullmatch=True), st.text(max_size=300)))
def test_entries_of_the_journal(fields: dict[str, str]) -> None:
    expected = {name: value.encode(errors="replace").decode() for name, value in fields.items()}
    assert decode(systemd.journal_entry(dict(fields))) == expected


def test_a_message_for_the_journal(datagrams: socket.socket) -> None:
    context = {"process": "server", "mountpoint": "/mnt/a b", "source": ""}
    logs.Journal(context, datagrams.getsockname()).handle(record("two\nlines of %d", 7, level=logging.WARNING))
    fields = decode(datagrams.recv(1 << 16))
    assert fields["MESSAGE"] == "two\\nlines of 7"
    assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"]) == ("4", "coordlfs")
    assert (fields["COORDLFS_PROCESS"], fields["COORDLFS_MOUNTPOINT"]) == ("server", "/mnt/a b")
    assert "COORDLFS_SOURCE" not in fields


def test_a_journal_that_is_full_or_gone_holds_nobody_up(datagrams: socket.socket, tmp_path: Path) -> None:
    results = [systemd.to_journal({"MESSAGE": "x" * 1000}, datagrams.getsockname()) for _ in range(2000)]
    assert results[0]
    assert not results[-1]
    assert not systemd.to_journal({"MESSAGE": "x"}, str(tmp_path / "nowhere"))


# -- rate limit ---------------------------------------------------------------------------------------------------


def test_what_repeats_is_counted_by_its_template() -> None:
    now = 0.0
    told: list[logging.LogRecord] = []
    limit = logs.RateLimit(told.append, 3, 3600, lambda: now)
    assert [limit.filter(record("%d failed", n)) for n in range(5)] == [True] * 3 + [False] * 2
    assert limit.filter(record("another"))
    assert limit.filter(record("%d failed", 1, level=logging.ERROR))
    limit.summarize(("coordlfs.test", logging.INFO, "%d failed"))
    assert [r.getMessage() for r in told] == ["suppressed 2 similar: %d failed"]
    assert limit.filter(told[0])
    assert limit.filter(record("%d failed", 6)), "a new interval"
    now = 4000.0
    assert [limit.filter(record("another")) for _ in range(4)] == [True] * 3 + [False]


def test_the_sum_is_told_when_the_interval_is_over() -> None:
    told: list[logging.LogRecord] = []
    limit = logs.RateLimit(told.append, 2, 0.2)
    threads = [threading.Thread(target=lambda: [limit.filter(record("again")) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: told)
    assert told[0].getMessage() == "suppressed 398 similar: again"


@given(st.lists(st.text(max_size=2)))
def test_templates_are_not_remembered_for_ever(templates: list[str]) -> None:
    now = 0.0
    limit = logs.RateLimit(lambda r: None, 100, 1, lambda: now)
    for template in templates:
        now += 2
        limit.filter(record(template))
    assert len(limit._windows) <= 1
