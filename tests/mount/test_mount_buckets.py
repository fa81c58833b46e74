"""Buckets that are mounted: the same bytes and errors as of a directory, and a bill that is what was missed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from coordlfs_loader import HintedSampler
from coordlfs_tools.lab.buckets import Asked, Bucket, Fault, serve
from mounts import MIB, MakeMount, Mount, coordlfs, eventually, mentions, noise, raises, read

SECRET = "hunter2-of-the-tests"
NOTHING = {"list": 0, "get": 0}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that serves, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with serve(Bucket()) as served:
        yield served


def fill(bucket: Bucket, count: int = 60, size: int = 50_000) -> dict[str, bytes]:
    """Put files into directories below `set/`; what is to be read of each."""
    files = {f"{n % 4}/{n:04}.jpg": noise(size, n) for n in range(count)}
    for name, data in files.items():
        bucket.put(f"set/{name}", data)
    return files


def options(bucket: Bucket, *more: str) -> list[str]:
    """How to reach it."""
    words = []
    for option in (f"endpoint={bucket.endpoint}", "allow-http=true", "timeout=2", *more):
        words += ["--source-option", option]
    return words


def walked(top: Path) -> set[str]:
    """The files below a directory."""
    return {os.path.relpath(os.path.join(at, name), top) for at, _, names in os.walk(top) for name in names}


def test_epochs_of_a_bucket_cost_what_is_missed(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket)
    bucket.put("set/large", noise(17 * MIB))
    bucket.put("set/empty", b"")
    bucket.put("set/marked/", b"")
    told: list[str] = []
    m = mount("s3://bucket/set", "64M", *options(bucket), "--immutable", "--metrics", "0", said=told.append)
    assert walked(m.path) == {*files, "large", "empty"}
    assert os.listdir(m.path / "marked") == []
    assert bucket.count("LIST") == 1 + 1 + 5, "once before it is mounted, and each directory"
    for name, data in files.items():
        assert read(m.path / name) == data
    assert bucket.count("GET") == len(files)
    assert read(m.path / "large") == noise(17 * MIB)
    m.settle()
    assert bucket.count("GET") == len(files) + 5, "a large one takes a request every 4 MiB"
    before = len(bucket.requests)
    with m.messages() as sent:
        for name, data in files.items():
            assert read(m.path / name) == data
    assert sent["read"] == 0
    assert len(bucket.requests) == before, "what is cached is asked of nobody"
    figures = m.stats()["source"]["requests"]
    assert (figures["get"], figures["head"], figures["errors"]) == (len(files) + 5, 0, 0)
    [url] = re.findall(r"http://\S+", told[0])
    with urllib.request.urlopen(url, timeout=60) as scrape:
        scraped = scrape.read().decode()
        assert f'kind="get",mountpoint="{m.path}"}} {len(files) + 5}.0' in scraped
        of_epoch = rf'coordlfs_epoch_store_gets{{epoch="\w+",mountpoint="{m.path}"}} {len(files) + 5}\.0'
        assert re.search(of_epoch, scraped)
    stats = m.stats()
    bills = [epoch["requests"] for epoch in (*stats["epoch_history"], stats["epoch"])]
    assert bills[0] == {name: figures[name] for name in ("list", "get", "head", "bytes")}
    assert not any(any(bill.values()) for bill in bills[1:])
    shown = coordlfs("status", m.path).stdout
    # That the second epoch has begun may be seen between the two questions.
    assert any(f"of this epoch {bill['list']} LIST, {bill['get']} GET" in shown for bill in (bills[-1], NOTHING))
    said = coordlfs("verify", m.path).stdout
    assert "all equal" in said
    assert "GET" in coordlfs("status", m.path).stdout


def test_an_order_that_is_announced_is_fetched_ahead(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket, 200, 20_000)
    bucket.faults = lambda asked: Fault(delay=0.02)
    m = mount("s3://bucket/set", "16M", *options(bucket))
    assert walked(m.path) == set(files)
    bucket.most_in_flight = 0
    order = list(files)
    random.Random(1).shuffle(order)
    for number in HintedSampler(range(len(order)), [m.path / name for name in order]):
        assert read(m.path / order[number]) == files[order[number]]
    m.settle()
    assert bucket.most_in_flight > 16, "one reader alone has one request in flight"
    assert len(files) <= bucket.count("GET") <= len(files) + 5, "who is faster than his order may ask himself"


def test_keys_that_cannot_be_named_hide_no_others(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket)
    for key in ("set//x", "set/0/./x", "set/1/a\nb", "set/2/..", "set/3/x/"):
        bucket.put(key, b"x")
    m = mount("s3://bucket/set", "16M", *options(bucket))
    assert walked(m.path) == set(files)
    for name, data in files.items():
        assert read(m.path / name) == data
    figures = m.stats()["source"]["requests"]
    assert (figures["hidden_keys"], figures["errors"]) == (5, 0)
    assert m.log.read_text().count("have names that no file system can show") == 5


def test_attributes_are_those_of_the_objects(bucket: Bucket, mount: MakeMount) -> None:
    bucket.put("set/f", b"x" * 5000)
    bucket.objects["set/f"].modified = 1_700_000_000.0
    m = mount("s3://bucket/set", "1M", *options(bucket))
    st = os.stat(m.path / "f")
    assert (st.st_mode, st.st_size, st.st_nlink) == (0o100444, 5000, 1)
    assert int(st.st_mtime) == 1_700_000_000
    assert (st.st_uid, st.st_gid) == (os.geteuid(), os.getegid())
    assert os.stat(m.path).st_mode == 0o40555
    assert os.listxattr(m.path / "f") == []
    raises(errno.ENODATA, lambda: os.getxattr(m.path / "f", "user.x"))
    raises(errno.EROFS, lambda: os.unlink(m.path / "f"))
    assert os.statvfs(m.path).f_namemax == 255


def test_a_change_is_noticed(bucket: Bucket, mount: MakeMount) -> None:
    for name in ("changes", "goes", "grows", "stays"):
        bucket.put(f"set/d/{name}", b"first " * 1000)
    m = mount("s3://bucket/set", "8M", *options(bucket), "--revalidate", "1s")
    assert sorted(os.listdir(m.path / "d")) == ["changes", "goes", "grows", "stays"]
    for name in ("changes", "goes", "grows", "stays"):
        assert read(m.path / "d" / name) == b"first " * 1000
    with open(m.path / "d" / "changes", "rb", buffering=0) as opened:
        bucket.put("set/d/changes", b"other " * 1000)
        bucket.put("set/d/grows", b"longer " * 2000)
        bucket.put("set/d/new", b"new")
        bucket.remove("set/d/goes")
        eventually(lambda: sorted(os.listdir(m.path / "d")) == ["changes", "grows", "new", "stays"])
        eventually(lambda: read(m.path / "d" / "changes") == b"other " * 1000)
        eventually(lambda: read(m.path / "d" / "grows") == b"longer " * 2000)
        got = b""
        with suppress(OSError):
            while some := opened.read(4096):
                got += some
        assert got == (b"first " * 1000)[: len(got)], "who has it open never gets bytes of another version"
    assert read(m.path / "d" / "new") == b"new"
    assert read(m.path / "d" / "stays") == b"first " * 1000


def test_a_change_that_a_reader_meets(bucket: Bucket, mount: MakeMount) -> None:
    bucket.put("set/f", b"first " * 1000)
    m = mount("s3://bucket/set", "8M", *options(bucket))
    assert os.stat(m.path / "f").st_size == 6000
    bucket.put("set/f", b"longer " * 2000)
    raises(errno.ESTALE, lambda: read(m.path / "f"))  # once: the kernel sends no more than the length that it knows

    def is_new() -> bool:
        with suppress(OSError):
            return read(m.path / "f") == b"longer " * 2000
        return False

    eventually(is_new)
    assert bucket.count("HEAD") == 1


def test_what_is_gone_is_stale_for_who_has_it_open_and_no_name_for_others(bucket: Bucket, mount: MakeMount) -> None:
    bucket.put("set/read", noise(17 * MIB, 1))
    bucket.put("set/not read", noise(MIB, 2))
    bucket.put("set/stays", b"stays")
    m = mount("s3://bucket/set", "1M", *options(bucket))
    assert walked(m.path) == {"read", "not read", "stays"}
    with open(m.path / "read", "rb", buffering=0) as begun:
        assert begun.read(4096) == noise(17 * MIB, 1)[:4096]
        bucket.remove("set/read")
        bucket.remove("set/not read")
        raises(errno.ESTALE, lambda: os.pread(begun.fileno(), 4096, 15 * MIB))
        eventually(lambda: not (m.path / "read").exists(), 30)
        raises(errno.ESTALE, lambda: os.pread(begun.fileno(), 4096, 15 * MIB))
    for name in ("read", "not read"):
        raises(errno.ENOENT, lambda name=name: read(m.path / name))  # type: ignore[misc]
    eventually(lambda: os.listdir(m.path) == ["stays"], 30)
    assert read(m.path / "stays") == b"stays"


def test_faults_while_readers_check_every_byte(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket, 120)
    lottery = random.Random(7)
    faults = [
        Fault(status=500),
        Fault(status=503),
        Fault(cut=1000),
        Fault(cut=0),
        Fault(delay=0.2),
        Fault(delay=5.0),
        Fault(stall=5.0),
        Fault(etag='"another"'),
        Fault(data=b"shorter"),
        Fault(data=noise(50_001)),
    ]

    def fault(asked: Asked) -> Fault | None:
        return lottery.choice(faults) if asked.kind == "GET" and lottery.random() < 0.2 else None

    m = mount("s3://bucket/set", "3M", *options(bucket))
    assert walked(m.path) == set(files)
    bucket.faults = fault
    wrong: list[str] = []
    failed: list[int] = []

    def reader(seed: int) -> None:
        names = list(files)
        random.Random(seed).shuffle(names)
        for name in names:
            try:
                data = read(m.path / name)
            except OSError as e:
                failed.append(e.errno or 0)
            else:
                if data != files[name]:
                    wrong.append(name)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(failed) <= {errno.ESTALE, errno.EIO}
    bucket.faults = lambda asked: None
    for name, data in files.items():
        assert read(m.path / name) == data
    figures = m.stats()["source"]["requests"]
    assert figures["retries"] > 0
    assert figures["throttled"] > 0


@pytest.mark.parametrize(("status", "code"), [(403, errno.EACCES), (404, errno.ENOENT), (400, errno.EIO)])
def test_what_the_store_refuses(bucket: Bucket, mount: MakeMount, status: int, code: int) -> None:
    fill(bucket, 4)
    m = mount("s3://bucket/set", "8M", *options(bucket))
    assert len(walked(m.path)) == 4
    bucket.faults = lambda asked: Fault(status=status)
    raises(code, lambda: read(m.path / "0/0000.jpg"))
    if code != errno.ENOENT:
        eventually(lambda: f"status {status}" in m.log.read_text())
        bucket.faults = lambda asked: None
        assert read(m.path / "0/0000.jpg") == noise(50_000, 0)


def test_cut_off_from_the_store_what_is_cached_goes_on(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket, 8)
    m = mount("s3://bucket/set", "8M", *options(bucket), "--revalidate", "1s")
    assert walked(m.path) == set(files)
    for name in files:
        read(m.path / name)
    m.settle()
    before = m.stats()["revalidation"]["passes"]
    bucket.faults = lambda asked: Fault(status=404 if asked.kind == "LIST" else 503)
    eventually(lambda: m.stats()["revalidation"]["passes"] > before + 2)
    assert walked(m.path) == set(files)
    for name, data in files.items():
        assert read(m.path / name) == data


def test_a_server_that_is_killed_takes_nothing_with_it(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket, 30)
    m = mount("s3://bucket/set", "1M", *options(bucket))
    m.expect_errors = True
    for name, data in itertools.islice(files.items(), 10):
        assert read(m.path / name) == data
    m.settle()
    os.kill(m.stats()["processes"]["server"], signal.SIGKILL)
    for name, data in files.items():
        assert read(m.path / name) == data
    assert m.stats()["server_starts"] == 2


def test_no_secret_is_where_others_can_read_it(bucket: Bucket, mount: MakeMount) -> None:
    fill(bucket, 4)
    m = mount("s3://bucket/set", "8M", *options(bucket))
    bucket.faults = lambda asked: Fault(status=403) if asked.kind == "GET" else None
    raises(errno.EACCES, lambda: read(m.path / "0/0000.jpg"))
    eventually(lambda: "status 403" in m.log.read_text())
    shown = [m.log.read_text(), str(m.stats()), Path("/proc/self/mountinfo").read_text()]
    shown += [Path(f"/proc/{pid}/cmdline").read_text() for pid in m.pids]
    assert len(shown) > 4
    assert not any(SECRET in text or "AKID" in text for text in shown)


def test_a_command_with_a_bucket(bucket: Bucket, place: Path) -> None:
    files = fill(bucket, 8)
    name, data = next(iter(files.items()))
    done = coordlfs(
        "run", "s3://bucket/set", place, "--cache-size", "4M", *options(bucket), "--", "sha256sum", place / name
    )
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest()
    assert os.listdir(place) == []
    done = coordlfs("run", "s3://bucket/set", *options(bucket), "--", "true", status=2)
    assert "say where to mount it" in done.stderr


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("source", "given", "says"),
    [
        ("s3://other/set", [], "does not exist at http"),
        ("s3://bucket/none", [], "no key begins with 'none/'"),
        ("s3://bucket/set/0/0000.jpg", [], "is an object: give the prefix"),
        ("s3://bucket/set", ["allow-http=false"], "plain http"),
        ("s3://bucket/set", ["endpoint=http://127.0.0.1:{free}"], "does not answer at http"),
        ("s3://bucket/set", ["endpoint=http://host.invalid"], "does not answer at http"),
        ("s3://bucket/denied", [], "may not be listed with these credentials (status 403"),
        ("ftp://bucket/set", [], "no kind of source"),
        ("s3://AKID:hunter@bucket/set", [], "credentials come from the environment"),
        ("s3://bucket/set", ["secret_access_key=hunter"], "every user can read a command line"),
        ("s3://bucket/set", ["colour=red"], "known are endpoint, region"),
    ],
)
def test_a_bucket_that_cannot_be_mounted(bucket: Bucket, place: Path, source: str, given: list[str], says: str) -> None:
    fill(bucket, 4)
    bucket.faults = lambda asked: Fault(status=403) if asked.key.startswith("denied") else None
    words = options(bucket, *(text.format(free=_free_port()) for text in given))
    done = coordlfs("mount", source, place / "mnt", *words, status=None)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("coordlfs: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert "hunter" not in done.stderr
    assert not (place / "mnt").exists()
    assert not mentions(place)


def test_peers_fetch_each_object_once(bucket: Bucket, mount: MakeMount) -> None:
    files = fill(bucket, 40)
    ports = [_free_port(), _free_port()]
    nodes = ",".join(f"127.0.0.1:{port}" for port in ports)
    mounted: list[Mount] = [
        mount("s3://bucket/set", "8M", *options(bucket), "--listen", f"127.0.0.1:{port}", "--peers", nodes)
        for port in ports
    ]
    for m in mounted:
        eventually(lambda m=m: m.stats()["peers"]["alive"] == 1)  # type: ignore[misc]
    for m in mounted:
        for name, data in files.items():
            assert read(m.path / name) == data
        m.settle()
    for m in mounted:
        for name, data in files.items():
            assert read(m.path / name) == data
    assert bucket.count("GET") == len(files)


def test_an_order_that_is_announced_on_each_of_two_nodes_has_each_object_fetched_once(
    bucket: Bucket, mount: MakeMount
) -> None:
    files = fill(bucket, 200, 20_000)
    bucket.faults = lambda asked: Fault(delay=0.01)
    ports = [_free_port(), _free_port()]
    nodes = ",".join(f"127.0.0.1:{port}" for port in ports)
    mounted: list[Mount] = [
        mount("s3://bucket/set", "16M", *options(bucket), "--listen", f"127.0.0.1:{port}", "--peers", nodes)
        for port in ports
    ]
    for m in mounted:
        eventually(lambda m=m: m.stats()["peers"]["alive"] == 1)  # type: ignore[misc]
        assert walked(m.path) == set(files)

    def train(m: Mount, seed: int) -> None:
        order = list(files)
        random.Random(seed).shuffle(order)
        for number in HintedSampler(range(len(order)), [m.path / name for name in order]):
            assert read(m.path / order[number]) == files[order[number]]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, mounted, range(2)))
    figures = [m.stats() for m in mounted]
    assert sum(each["source"]["requests"]["get"] for each in figures) == bucket.count("GET")
    assert len(files) <= bucket.count("GET") <= len(files) + sum(each["peers"]["skipped"] for each in figures)
    assert all(each["peers"]["bytes"] for each in figures)


def test_doctor_says_of_a_bucket_what_a_request_takes(bucket: Bucket) -> None:
    fill(bucket, 4)
    said = coordlfs("doctor", "s3://bucket/set", *options(bucket)).stdout
    assert "can be listed" in said
    assert "ms for 50,000 bytes" in said
    assert "requests in flight" in said
    bucket.faults = lambda asked: Fault(status=403) if asked.kind == "GET" else None
    said = " ".join(coordlfs("doctor", "s3://bucket/set", *options(bucket), status=1).stdout.split())
    assert "give these credentials the right to get objects" in said
    said = " ".join(coordlfs("doctor", "s3://none/set", *options(bucket), status=1).stdout.split())
    assert "does not exist at" in said


def test_what_is_on_disk_is_not_fetched_again_after_a_remount(bucket: Bucket, mount: MakeMount, source: Path) -> None:
    files = fill(bucket, 40)
    words = [*options(bucket), "--disk-cache", source, "--disk-size", "64M"]
    first = mount("s3://bucket/set", "1M", *words)
    for name, data in files.items():
        assert read(first.path / name) == data
    eventually(lambda: first.stats()["disk"]["held_blocks"] == len(files))
    first.end()
    gets = bucket.count("GET")
    second = mount("s3://bucket/set", "1M", *words)
    for name, data in files.items():
        assert read(second.path / name) == data
    assert bucket.count("GET") == gets == len(files)
    second.end()
    assert "all good" in coordlfs("cache", "verify", source, "--source", "s3://bucket/set/").stdout
    assert "is removed" in coordlfs("cache", "clear", source, "--source", "s3://bucket/set/").stdout
