"""Sizes as users write them: the right number of bytes, or one line that says what to write."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordlfs.errors import UserError
from coordlfs.kernel.memory import Memory
from coordlfs.sizes import AUTO_SHARE, cache_size, text

GIB = 1 << 30
HAVE = Memory(64 * GIB, 40 * GIB)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("0", 0),
        ("0G", 0),
        ("0%", 0),
        ("4096", 4096),
        ("8192b", 8192),
        ("10k", 10 << 10),
        ("512M", 512 << 20),
        ("512MB", 512 << 20),
        ("512MiB", 512 << 20),
        ("1.5g", 3 * GIB // 2),
        (" 2 GiB ", 2 * GIB),
        ("0.01T", int(0.01 * (1 << 40))),
        ("64G", 64 * GIB),
        ("60%", 64 * GIB * 60 // 100),
        ("12.5 %", 8 * GIB),
        ("100%", 64 * GIB),
        ("auto", int(40 * GIB * AUTO_SHARE)),
        ("AUTO", int(40 * GIB * AUTO_SHARE)),
    ],
)
def test_sizes(asked: str, expected: int) -> None:
    assert cache_size(asked, HAVE)[0] == expected


@pytest.mark.parametrize("asked", ["65G", "1P", "100.1%", f"{64 * GIB + 1}"])
def test_more_than_there_is_says_so(asked: str) -> None:
    with pytest.raises(UserError, match="more than") as failed:
        cache_size(asked, HAVE)
    assert failed.value.status == 2


@pytest.mark.parametrize("asked", ["60", "7b", "0.001K", "4095"])
def test_less_than_a_page_is_taken_for_a_mistake(asked: str) -> None:
    with pytest.raises(UserError, match="less than a page") as failed:
        cache_size(asked, HAVE)
    assert failed.value.status == 2


@pytest.mark.parametrize(
    "asked", ["", " ", "G", "-1", "-1G", "1e9", "1,5G", "12X", "5%%", "%", "auto1", "0x10", "nan", "∞"]
)
def test_what_is_not_a_size_says_what_is(asked: str) -> None:
    with pytest.raises(UserError, match="write 200G") as failed:
        cache_size(asked, HAVE)
    assert failed.value.status == 2


NEARLY = st.text("0123456789.,+-% KMGTPEkibB aouteinfxyz", max_size=12)
ALMOST = st.from_regex(r"\d{1,30}(\.\d{1,9})?\s?[KMGTPX]?i?B?%?", fullmatch=True, alphabet=st.characters(codec="ascii"))


def outcome(asked: str, have: Memory) -> int | UserError:
    """The size, or the error that users know."""
    try:
        return cache_size(asked, have)[0]
    except UserError as e:
        return e


@given(asked=st.text() | NEARLY | ALMOST, total=st.integers(1, 1 << 50), share=st.floats(0, 1))
@example(asked="1\N{KELVIN SIGN}", total=GIB, share=1)  # equals k when case is ignored
@example(asked="9" * 400, total=GIB, share=1)  # infinite as a float
def test_any_text_is_a_size_that_fits_or_a_usage_error(asked: str, total: int, share: float) -> None:
    got = outcome(asked, Memory(total, int(total * share)))
    assert got.status == 2 if isinstance(got, UserError) else 0 <= got <= total


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (3 * GIB, "3.0 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_bytes_for_people(nbytes: int, expected: str) -> None:
    assert text(nbytes) == expected


@given(nbytes=st.integers(0, 1 << 52))
def test_bytes_for_people_are_near_the_truth(nbytes: int) -> None:
    number, unit = text(nbytes).split()
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * factor - nbytes) <= 0.051 * factor
