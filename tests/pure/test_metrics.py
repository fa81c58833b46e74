"""Counters that threads share and that the next server goes on with."""

from __future__ import annotations

import sys
import threading
from array import array

import pytest

from coordlfs.catalogue.catalog import COUNTERS
from coordlfs.catalogue.metrics import NAMES, Counters


def words(count: int = COUNTERS) -> memoryview:
    """Memory for counters."""
    return memoryview(array("Q", bytes(8 * count)))


def test_no_count_is_lost_between_threads() -> None:
    memory = words()
    counters = Counters(memory)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def count() -> None:
        for _ in range(5000):
            counters.add("reads")
            counters.count_read(1 << 40)

    threads = [threading.Thread(target=count) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [counters[name] for name in ("reads", "source_reads")] == [40_000, 40_000]
    assert counters["source_bytes"] == 40_000 << 40
    assert Counters(memory)["reads"] == 40_000, "the next server starts anew"


def test_every_counter_has_a_word_of_its_own() -> None:
    counters = Counters(words(len(NAMES)))
    for number, name in enumerate(NAMES, 1):
        counters.set(name, number)
    assert [counters[name] for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert len(NAMES) <= COUNTERS


def test_too_little_memory_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Counters(words(len(NAMES) - 1))
    with pytest.raises(KeyError):
        Counters(words()).add("no such counter")
