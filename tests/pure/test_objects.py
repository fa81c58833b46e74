"""Object stores as sources, where they differ from a directory: what keys imply, what it takes, what fails."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from coordlfs_tools.lab.buckets import Asked, Bucket, Fault, Faults, serve
from hypothesis import given
from hypothesis import strategies as st

from coordlfs.errors import UserError
from coordlfs.kernel import pages
from coordlfs.sources import address
from coordlfs.sources.address import Address, Options
from coordlfs.sources.contract import Part
from coordlfs.sources.objects import names
from coordlfs.sources.objects.blocks import WHOLE, Block, Blocks, blocks_of
from coordlfs.sources.objects.failures import Meaning, failure, meaning_of
from coordlfs.sources.objects.names import Directory, Entry, Found, shown
from coordlfs.sources.objects.sequences import Sequences
from coordlfs.sources.objects.source import ObjectSource
from coordlfs.sources.objects.window import Window

MIB = 1 << 20
CONTENT = os.urandom(40 * MIB)


# -- what needs no store --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data", None),
        ("s3:/data", None),
        ("s3://bucket", Address("s3", "bucket", "")),
        ("S3://bucket/", Address("s3", "bucket", "")),
        ("gs://my.bucket/a/b c/", Address("gs", "my.bucket", "a/b c")),
        ("az://container/ü", Address("az", "container", "ü")),
    ],
)
def test_a_bucket_is_told_from_a_path(text: str, expected: Address | None) -> None:
    assert address.parse(text) == expected


@pytest.mark.parametrize("text", ["s3://", "s3:///key", "ftp://host/path", "s3://b/a//b", "s3://b/../c", "s3://b_*"])
def test_what_is_no_bucket(text: str) -> None:
    with pytest.raises(UserError) as caught:
        address.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["s3://AKID:hunter2@bucket/x", "s3://bucket/x?sig=hunter2", "az://b/x?sv=1&sig=hunter2"]
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError) as caught:
        address.parse(text)
    assert "hunter2" not in str(caught.value)
    assert "environment" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["secret_access_key", "access-key-id", "aws_session_token", "account_key", "sas_token", "password", "key"]
)
def test_a_secret_option_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(UserError) as caught:
        address.options([f"{name}=hunter2"])
    assert "hunter2" not in str(caught.value)
    assert "environment" in str(caught.value)


def test_options_are_what_was_given() -> None:
    given_ = ["endpoint=https://host:1/", "region=eu-1", "anonymous=true", "path_style=no", "timeout=2m", "in-flight=7"]
    assert address.options(given_) == Options("https://host:1/", "eu-1", True, False, timeout=120, in_flight=7)
    assert address.options([]) == Options()
    for endpoint in ("http://127.0.0.1:9000", "HTTPS://[::1]:1", "https://h-1.x_y/account/%7Ea"):
        assert address.options([f"endpoint={endpoint}"]).endpoint == endpoint


@pytest.mark.parametrize(
    "given_",
    [
        *("colour=red", "region", "region=", "anonymous=perhaps", "in-flight=0", "in-flight=257"),
        *(
            f"endpoint={at}"
            for at in ("host", "ftp://host", "http://", "https://a b", "http://a?b", "http://u:p@a", "http://a:x")
        ),
    ],
)
def test_options_that_mean_nothing(given_: str) -> None:
    with pytest.raises(UserError):
        address.options([given_])


_NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _entry(size: int = 1, etag: str = "e") -> Entry:
    return Entry.of(size, _NOW, etag)


def test_what_a_file_system_cannot_show_is_hidden_and_counted() -> None:
    long, longer = "x" * 255, "ü" * 128
    found = Found(
        ["p/d", "p/", "p/..", f"p/{longer}"],
        [
            ("p", _entry(0)),  # a marker of the directory itself
            *((f"p/{name}", _entry()) for name in ("a", "d", ".", "..", long, longer, "a\0b", "a\nb", "\x7f", "b/c")),
            ("p/\udcff", _entry()),  # not UTF-8
        ],
    )
    entries, hidden = shown("p/", found)
    assert set(entries) == {b"a", b"d", long.encode()}
    assert entries[b"d"].is_directory
    assert hidden == 3 + 9


def test_an_object_where_a_directory_is_marked_is_hidden_if_it_has_bytes() -> None:
    assert shown("p/", Found([], [("p", _entry(0))])) == ({}, 0)
    assert shown("p/", Found([], [("p", _entry(3))])) == ({}, 1)


@given(st.dictionaries(st.binary(min_size=1, max_size=5), st.integers(-1, 5)), st.binary(max_size=5))
def test_a_directory_finds_what_was_listed(sizes: dict[bytes, int], other: bytes) -> None:
    entries = {name: Entry(size, 5, "e") if size >= 0 else Entry(-1) for name, size in sizes.items()}
    directory = Directory(entries, 0.0, 0)
    assert directory.names == sorted(entries)
    for name in {*entries, other}:
        assert directory.find(name) == entries.get(name)


def test_a_listing_keeps_the_time_of_what_stays_and_says_when_names_came_or_went() -> None:
    first = Directory({b"a": Entry(1, 1, "e"), b"b": Entry(1, 1, "e")}, 0.0, 10)
    second = Directory({b"a": Entry(1, 2, "e"), b"b": Entry(1, 2, "f")}, 1.0, 10)
    second.succeeds(first, 99)
    assert (second.find(b"a"), second.find(b"b")) == (Entry(1, 1, "e"), Entry(1, 2, "f"))
    assert second.changed_ns == 10
    third = Directory({b"a": Entry(1, 2, "e")}, 2.0, 10)
    third.succeeds(second, 99)
    assert third.changed_ns == 99


def test_what_a_request_showed_to_be_gone_has_no_name_until_it_is_listed_again() -> None:
    entries = {b"gone": Entry(3, 5, "a"), b"stays": Entry(4, 6, "b")}
    listed = Directory(entries, 1.0, 7)
    listed.remove(b"gone")
    listed.remove(b"never was")
    assert listed.find(b"gone") is None
    assert listed.find(b"stays") == entries[b"stays"]
    assert listed.names == [b"gone", b"stays"], "who reads it just now finds all others where they were"
    again = Directory(entries, 2.0, 7)
    again.succeeds(listed, 8)
    assert again.find(b"gone") == entries[b"gone"]


def test_the_time_of_an_object_tells_apart_what_was_written_twice_in_a_second() -> None:
    one, other = _entry(etag='"one"'), _entry(etag='"other"')
    assert one.mtime_ns != other.mtime_ns
    assert one.mtime_ns // 1_000_000 == other.mtime_ns // 1_000_000 == _NOW.timestamp() * 1000
    assert _entry(etag="one") == _entry(etag='W/"one"') == one


@given(st.integers(0, 70 * MIB), st.integers(0, 80 * MIB), st.integers(1, 9 * MIB))
def test_blocks_cover_a_part_and_no_more(size: int, offset: int, wanted: int) -> None:
    entry = Entry(size)
    found = list(blocks_of(b"f", entry, offset, wanted))
    if offset >= size:
        assert not found
        return
    assert found[0].first <= offset < found[0].end
    assert found[-1].first < min(offset + wanted, size) <= found[-1].end
    assert all(a.end == b.first for a, b in itertools.pairwise(found))
    if size <= WHOLE:
        assert found == [Block(b"f", entry, 0, size)]


def test_one_refusal_halves_and_successes_add() -> None:
    window = Window(256)
    begin = window.limit
    window.refused(now=10.0)
    window.refused(now=10.5)  # of requests that were on their way together
    assert window.limit == begin // 2
    for _ in range(begin * 2):
        with window:
            pass
    assert begin // 2 < window.limit <= begin // 2 + 4
    for at in range(20):
        window.refused(now=100.0 + 2 * at)
    assert window.limit == 1
    for _ in range(100_000):
        with window:
            pass
    assert window.limit == 256


def test_no_more_are_in_flight_than_the_window_allows() -> None:
    window, most, lock, now = Window(3), 0, threading.Lock(), 0

    def ask() -> None:
        nonlocal most, now
        with window:
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.01)
            with lock:
                now -= 1

    _in_threads([ask] * 12)
    assert most == 3
    assert window.in_flight == 0


def test_a_block_is_fetched_once_for_all_who_wait_and_memory_is_bounded() -> None:
    fetched: list[Block] = []

    def fetch(block: Block) -> memoryview:
        fetched.append(block)
        time.sleep(0.05)
        return memoryview(CONTENT)[block.first : block.end]

    entry = Entry(len(CONTENT))
    blocks = Blocks(fetch, 9 * MIB)
    [first, second, third] = list(blocks_of(b"f", entry, 0, 12 * MIB))

    def read(block: Block, offset: int, size: int) -> None:
        assert blocks.read(block, offset, size, lambda: None) == CONTENT[offset : offset + size]

    _in_threads([lambda: read(first, 0, MIB), lambda: read(first, MIB, MIB), lambda: read(first, 2 * MIB, MIB)])
    assert fetched == [first]
    assert blocks.used == 4 * MIB, "a part of it was not read yet"
    read(second, second.first, MIB)
    read(third, third.first, MIB)
    assert blocks.used == 8 * MIB, "the first one gave way"
    read(third, third.first + MIB, 3 * MIB)
    assert blocks.used == 4 * MIB, "what was read to its end is let go of"
    read(first, 3 * MIB, MIB)
    assert fetched == [first, second, third, first]


def _in_threads(actions: list[Callable[[], None]]) -> None:
    failed: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize(
    ("kind", "text", "meaning"),
    [
        (
            "GenericError",
            "Server returned non-2xx status code: 403 Forbidden: <Code>ExpiredToken</Code>",
            "CREDENTIALS",
        ),
        ("GenericError", "Error performing token request: status code: 403", "CREDENTIALS"),
        ("GenericError", "status code: 400 <Code>AuthorizationHeaderMalformed</Code> expecting 'eu-1'", "REGION"),
        ("GenericError", "status code: 404 Not Found: <Code>NoSuchBucket</Code>", "NO_BUCKET"),
        ("GenericError", "status code: 400 Bad Request", "LASTING"),
        ("NotSupportedError", "no such thing", "LASTING"),
    ],
)
def test_errors_that_only_the_clouds_give(kind: str, text: str, meaning: str) -> None:
    assert meaning_of(kind, text).meaning is Meaning[meaning]


# -- with a store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """An empty one, that serves."""
    with serve(Bucket(page=5)) as served:
        yield served


def open_bucket(
    bucket: Bucket, *, lasts: float | None = None, tried_for: float = 20.0, **options: float
) -> ObjectSource:
    """What is below `d/` of it; a request that brings nothing for half a second is given up."""
    how = Options(endpoint=bucket.endpoint, anonymous=True, allow_http=True, **({"timeout": 0.5} | options))  # type: ignore[arg-type]
    return ObjectSource(Address("s3", bucket.name, "d"), how, lasts=lasts, tried_for=tried_for)


def read(source: ObjectSource, path: bytes, offset: int = 0, size: int = MIB) -> tuple[bytes, os.stat_result]:
    """As the data loop does."""
    into = pages.buffer(size + pages.PAGE)
    n, found = source.read(Part(1, path, offset, size), into, lambda: None)
    return into[:n], found


def once(fault: Fault, kind: str = "GET", times: int = 1) -> Faults:
    """Fails so many times, and then well."""
    left = [fault] * times

    def faults(asked: Asked) -> Fault | None:
        return left.pop() if asked.kind == kind and left else None

    return faults


def test_the_bill(bucket: Bucket) -> None:
    for number in range(12):
        bucket.put(f"d/{number % 3}/{number}", b"x" * number)
    source = open_bucket(bucket)
    for directory in source.listing(b"").names:
        for name in source.listing(directory).names:
            path = directory + b"/" + name
            size = source.lstat(path).st_size
            data, _ = read(source, path)
            assert data == b"x" * size
            with pytest.raises(FileNotFoundError):
                source.lstat(path + b".no")
    assert bucket.count("LIST") == 1 + 3
    assert bucket.count("GET") == 11, "an empty object is known by its size"
    assert bucket.count("HEAD") == 0
    figures = source.requests()
    assert (figures["list"], figures["get"], figures["head"], figures["errors"]) == (4, 11, 0, 0)
    assert figures["bytes"] == sum(range(12))


def test_a_large_object_is_read_by_ranges_and_nothing_twice(bucket: Bucket) -> None:
    bucket.put("d/large", CONTENT)
    source = open_bucket(bucket)
    assert b"".join(read(source, b"large", at)[0] for at in range(0, len(CONTENT), MIB)) == CONTENT
    ranges = sorted((asked.first, asked.end) for asked in bucket.requests if asked.kind == "GET")
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(CONTENT)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert source.requests()["buffered_bytes"] == 0


REFUSED = ["s//x", "s/./x", "s/../x", "s/.", "s/..", "s/a\x01b", "s/a\nb", "s/\x7f/x", "s//"]


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_obstore_refuses_hides_no_other(bucket: Bucket, key: str, caplog: pytest.LogCaptureFixture) -> None:
    good = [f"s/{name}" for name in ("a", "b/c", "p l+u%s&", "ü", "'<\">", "z0", "z1", "z2", "z3")]
    for name in (*good, key, "t/b"):
        bucket.put("d/" + name, name.encode("utf-8", "surrogateescape"))
    source = open_bucket(bucket, lasts=0.0)
    assert not source.is_empty()
    assert source.listing(b"").names == [b"s", b"t"]
    for _ in range(2):
        assert source.listing(b"s").names == sorted({name[2:].partition("/")[0].encode() for name in good})
    assert source.listing(b"s/b").names == [b"c"]
    for name in good:
        assert read(source, name.encode())[0] == name.encode()
    figures = source.requests()
    assert (figures["hidden_keys"], figures["errors"], figures["head"]) == (1, 0, 0)
    assert caplog.text.count("1 keys below 'd/s/'") == 1


def test_what_two_libraries_list_is_the_same(bucket: Bucket) -> None:
    for number in range(12):
        bucket.put(f"d/{number}", b"x" * number)
        bucket.put(f"d/{number}d/x", b"")
    source = open_bucket(bucket)
    by_obstore = source.store.list_below("d/")
    bucket.put("d//x", b"")
    other = source.store.list_below("d/")
    assert sorted(other.objects) == sorted(by_obstore.objects)
    assert shown("d/", other)[0] == shown("d/", by_obstore)[0]


def test_what_fails_where_obstore_refuses(bucket: Bucket) -> None:
    bucket.put("d/a", b"")
    bucket.put("d//x", b"")
    answers = {Fault(status=403): errno.EACCES, Fault(status=400): errno.EIO, Fault(status=503): errno.EIO}
    for fault, code in answers.items():
        source = open_bucket(bucket, tried_for=1.0)
        asked = itertools.count()
        bucket.faults = lambda _, fault=fault, asked=asked: fault if next(asked) % 2 else None  # type: ignore[misc]
        with pytest.raises(OSError) as caught:
            source.listing(b"")
        assert caught.value.errno == code
        assert "rename" not in str(caught.value)
    bucket.faults = once(Fault(status=503), "LIST", times=2)
    assert open_bucket(bucket).listing(b"").names == [b"a"]


PASSING = [
    Fault(status=503),
    Fault(status=500),
    Fault(status=429),
    Fault(cut=10),
    Fault(delay=3.0),
    Fault(stall=3.0),
]


@pytest.mark.parametrize("fault", PASSING, ids=str)
@pytest.mark.parametrize("kind", ["GET", "LIST"])
def test_what_passes_is_not_noticed(bucket: Bucket, fault: Fault, kind: str) -> None:
    bucket.put("d/f", b"right" * 1000)
    source = open_bucket(bucket)
    bucket.faults = once(fault, kind, times=2)
    assert read(source, b"f")[0] == b"right" * 1000
    assert source.retries == 2
    assert source.requests()["throttled"] == (2 if fault.status in (429, 503) else 0)


@pytest.mark.parametrize("fault", [*PASSING, Fault(ignores_range=True), Fault(status=400)], ids=str)
def test_what_does_not_pass_is_an_error_in_time(bucket: Bucket, fault: Fault) -> None:
    bucket.put("d/large", CONTENT[: 20 * MIB])
    source = open_bucket(bucket, tried_for=1.0)
    names_ = source.listing(b"").names
    bucket.faults = lambda asked: fault
    with pytest.raises(OSError) as caught:
        read(source, b"large")
    assert caught.value.errno == errno.EIO
    assert source.requests()["errors"] == 1
    assert source.listing(b"").names == names_, "what is known goes on being known"


@pytest.mark.parametrize(("status", "code"), [(403, errno.EACCES), (401, errno.EACCES), (404, errno.ENOENT)])
def test_what_the_store_refuses_for_good(bucket: Bucket, status: int, code: int) -> None:
    bucket.put("d/f", b"f")
    source = open_bucket(bucket)
    source.lstat(b"f")
    bucket.faults = lambda asked: Fault(status=status)
    with pytest.raises(OSError) as caught:
        read(source, b"f")
    assert caught.value.errno == code
    assert source.retries == 0


@pytest.mark.parametrize("data", [b"", b"short", b"just as long!", b"longer than what was listed"])
def test_bytes_of_another_version_are_never_given_for_those_of_the_listed(bucket: Bucket, data: bytes) -> None:
    bucket.put("d/f", b"the listed...")
    source = open_bucket(bucket)
    before = source.lstat(b"f")
    bucket.put("d/f", data)
    got, found = read(source, b"f")
    assert (got, found.st_size) == (data, len(data))
    assert (found.st_ino, found.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
    assert source.lstat(b"f")[:] == found[:]


@pytest.mark.parametrize(
    "fault", [Fault(etag='"other"'), Fault(data=b"x" * 12), Fault(data=b"x" * 14), Fault(data=b"")], ids=str
)
def test_a_store_that_says_one_thing_and_sends_another(bucket: Bucket, fault: Fault) -> None:
    bucket.put("d/f", b"the listed...")
    source = open_bucket(bucket)
    source.lstat(b"f")
    bucket.faults = lambda asked: fault if asked.kind == "GET" else None
    with pytest.raises(OSError) as caught:
        read(source, b"f")
    assert caught.value.errno in (errno.ESTALE, errno.EIO)
    bucket.faults = lambda asked: None
    assert read(source, b"f")[0] == b"the listed..."


def test_a_request_that_hangs_holds_up_nobody_else(bucket: Bucket) -> None:
    for number in range(100):
        bucket.put(f"d/{number}", b"%d" % number)
    source = open_bucket(bucket, timeout=60)
    source.listing(b"")
    bucket.faults = lambda asked: Fault(delay=5.0) if asked.key.endswith("0") else None
    hanging = [threading.Thread(target=read, args=(source, b"%d" % n)) for n in range(0, 100, 10)]
    for thread in hanging:
        thread.start()
    for number in range(100):
        if number % 10:
            assert read(source, b"%d" % number)[0] == b"%d" % number
    assert all(thread.is_alive() for thread in hanging)
    for thread in hanging:
        thread.join()


def test_a_listing_is_listed_once_and_again_when_it_is_old(bucket: Bucket) -> None:
    bucket.put("d/s/a", b"")
    source = open_bucket(bucket, lasts=3600.0)
    bucket.faults = lambda asked: Fault(delay=0.1)
    _in_threads([lambda: source.lstat(b"s/a") and None] * 8)
    assert bucket.count("LIST") == 2
    bucket.put("d/s/b", b"")
    with pytest.raises(FileNotFoundError):
        source.lstat(b"s/b")
    assert source.neighbours(age=3600.0).lstat(b"s", b"a").st_size == 0
    assert bucket.count("LIST") == 2
    neighbours = source.neighbours()
    assert [neighbours.lstat(b"s", name).st_size for name in (b"a", b"b", b"a")] == [0, 0, 0]
    assert bucket.count("LIST") == 3
    source.lstat(b"s/b")


def test_no_secret_is_in_an_error_or_the_log(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDHUNTER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter3")
    bucket.put("d/f", b"f")
    how = Options(endpoint=bucket.endpoint, allow_http=True, timeout=0.5)
    source = ObjectSource(Address("s3", bucket.name, "d"), how, tried_for=0.5)
    source.lstat(b"f")
    for status in (400, 403, 500):
        bucket.faults = lambda asked, status=status: Fault(status=status)  # type: ignore[misc]
        with pytest.raises(OSError) as caught:
            read(source, b"f")
        assert "unter" not in f"{caught.value!r} {caught.value.__cause__!r} {source.store._store!r}".lower()
    assert "hunter" not in caplog.text.lower()
    assert "GET of 'd/f' failed: status 403" in caplog.text


def test_a_directory_needs_no_obstore(tmp_path: Path) -> None:
    program = "import sys, coordlfs.processes.server, coordlfs.commands.mount; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_nothing_here_can_write() -> None:
    text = "".join(path.read_text() for path in Path(names.__file__).parent.glob("*.py"))
    for call in ("put", "delete", "copy", "rename", "open_writer", "sign"):
        assert f".{call}(" not in text


def test_the_texts_of_obstore_mean_what_they_did(bucket: Bucket) -> None:
    bucket.put("d/f", b"f")
    source = open_bucket(bucket)
    store = source.store._store
    expected = {
        400: Meaning.LASTING,
        403: Meaning.DENIED,
        404: Meaning.GONE,
        412: Meaning.CHANGED,
        416: Meaning.CHANGED,
        429: Meaning.THROTTLED,
        500: Meaning.PASSING,
        503: Meaning.THROTTLED,
    }
    import obstore

    for status, meaning in expected.items():
        bucket.faults = lambda asked, status=status: Fault(status=status)  # type: ignore[misc]
        for ask in (lambda: obstore.get(store, "d/f"), lambda: obstore.list_with_delimiter(store, "d/")):
            with pytest.raises(Exception) as caught:
                ask()
            assert failure(caught.value).meaning is meaning
    for fault, text in ((Fault(delay=3.0), "no answer"), (Fault(stall=3.0), "no answer"), (Fault(cut=0), "broke off")):
        bucket.faults = lambda asked, fault=fault: fault  # type: ignore[misc]
        with pytest.raises(Exception) as caught:
            obstore.get(store, "d/f").bytes()
        found = failure(caught.value)
        assert found.meaning is Meaning.PASSING, text


def test_cut_off_from_the_store_every_known_name_goes_on(bucket: Bucket) -> None:
    bucket.put("d/s/a", b"a")
    source = open_bucket(bucket, lasts=0.0, tried_for=0.3)
    assert source.listing(b"s").names == [b"a"]
    for status in (404, 503):
        bucket.faults = lambda asked, status=status: Fault(status=status)  # type: ignore[misc]
        assert source.lstat(b"s/a").st_size == 1
        assert source.listing(b"s").names == [b"a"]
        with pytest.raises(OSError) as caught:
            source.neighbours().lstat(b"s", b"a")  # nobody may think that it is gone
        assert caught.value.errno == errno.EIO


# -- ahead of readers -----------------------------------------------------------------------------------------------


def test_what_is_expected_is_fetched_once_and_never_after_it_was_read() -> None:
    fetched: list[Block] = []
    goes_on = threading.Event()

    def fetch(block: Block) -> memoryview:
        fetched.append(block)
        assert goes_on.wait(60)
        return memoryview(CONTENT)[block.first : block.end]

    blocks = Blocks(fetch, 64 * MIB)
    wanted = [Block(b"%d" % n, Entry(1000), 0, 1000) for n in range(200)]
    for block in [*wanted, *wanted]:
        blocks.expect(block)
    readers = [threading.Thread(target=blocks.read, args=(block, 0, 1000, lambda: None)) for block in wanted[150:]]
    for reader in readers:
        reader.start()
    goes_on.set()
    for reader in readers:
        reader.join()
    for block in wanted[:150]:
        assert blocks.read(block, 0, 2000, lambda: None) == CONTENT[:1000]
    assert sorted(fetched) == sorted(wanted)
    assert blocks.used == 0
    blocks.close()


def test_what_is_fetched_ahead_takes_half_of_the_room() -> None:
    arrived: list[Block] = []

    def fetch(block: Block) -> memoryview:
        arrived.append(block)
        return memoryview(CONTENT)[block.first : block.end]

    blocks = Blocks(fetch, 16 * MIB)
    ahead = list(blocks_of(b"f", Entry(len(CONTENT)), 0, len(CONTENT)))
    for block in ahead:
        blocks.expect(block)
    for number, block in enumerate(ahead):
        deadline = time.monotonic() + 60
        while len(arrived) < min(number + 2, len(ahead)) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert blocks.used <= 8 * MIB
        assert blocks.read(block, block.first, 4 * MIB, lambda: None) == CONTENT[block.first : block.end]
    assert arrived == ahead
    blocks.close()


def test_only_who_goes_on_where_he_was_is_read_ahead() -> None:
    sequences = Sequences()
    ahead = list(blocks_of(b"f", Entry(len(CONTENT)), 0, len(CONTENT)))
    assert list(sequences.ahead_of(ahead[0])) == []
    assert list(sequences.ahead_of(ahead[0])) == [], "the same block again"
    assert list(sequences.ahead_of(ahead[1])) == ahead[2:4]
    assert list(sequences.ahead_of(ahead[1])) == []
    assert list(sequences.ahead_of(ahead[2])) == ahead[3:11]
    assert list(sequences.ahead_of(ahead[3])) == ahead[4:20]
    for number in (9, 6, 0, 5):
        assert list(sequences.ahead_of(ahead[number])) == [], "from here to there"
    assert list(sequences.ahead_of(Block(b"g", Entry(10), 0, 10))) == []


def test_a_sequential_reader_gets_blocks_in_parallel_and_a_random_one_no_more_than_it_touches(bucket: Bucket) -> None:
    bucket.put("d/large", CONTENT)
    source = open_bucket(bucket)
    source.lstat(b"large")
    bucket.faults = lambda asked: Fault(delay=0.05)
    for number in (7, 2, 5):
        read(source, b"large", number * 4 * MIB + 100, 1000)
    assert sorted((asked.first or 0) // MIB for asked in bucket.requests if asked.kind == "GET") == [8, 20, 28]
    del bucket.requests[:]
    bucket.most_in_flight = 0
    other = open_bucket(bucket)
    assert b"".join(read(other, b"large", at)[0] for at in range(0, len(CONTENT), MIB)) == CONTENT
    assert bucket.count("GET") == 10
    assert bucket.most_in_flight > 1
    other.close()
