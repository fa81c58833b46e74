"""Changes that no reader shows: cached files that change behind the cache's back are noticed in time, or at once."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounts import MIB, MakeMount, Mount, coordlfs, eventually, is_mounted, noise, read, write_files

NEW = noise(150_000, 777)


def _replace(file: Path) -> None:
    (file.parent / "new").write_bytes(NEW)
    os.rename(file.parent / "new", file)


def _in_place(file: Path) -> None:
    with open(file, "r+b") as f:
        f.write(NEW)


def _truncate(file: Path) -> None:
    os.truncate(file, 5000)


def _append(file: Path) -> None:
    with open(file, "ab") as f:
        f.write(NEW)


def _delete(file: Path) -> None:
    file.unlink()


def _add(file: Path) -> None:
    (file.parent / "added").write_bytes(NEW)


def _chmod(file: Path) -> None:
    file.chmod(0o600)


def _to_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").write_bytes(NEW)


def _retarget(file: Path) -> None:
    (file.parent / "link").unlink()
    (file.parent / "link").symlink_to("nowhere")


CHANGES = [_replace, _in_place, _truncate, _append, _delete, _add, _chmod, _to_directory, _retarget]


def _tree(root: Path) -> dict[str, object]:
    """All that can be seen of a tree. Raises FileNotFoundError if a name goes while it is looked at."""
    found: dict[str, object] = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(directory, name)
            st = os.lstat(path)
            key = str(path.relative_to(root))
            content = os.readlink(path) if path.is_symlink() else read(path) if path.is_file() else None
            found[key] = (st.st_mode, st.st_uid, st.st_size if path.is_file() else 0, content)
    return found


def _shows(mounted: Mount, tree: dict[str, object]) -> bool:
    """Whether a mount shows just this."""
    try:
        return _tree(mounted.path) == tree
    except FileNotFoundError:
        return False
    except OSError as e:
        if e.errno != errno.ESTALE:  # opened a moment before the change was noticed
            raise
        return False


def _cached(source: Path, mount: MakeMount, *options: str) -> Mount:
    (source / "d").mkdir()
    write_files(source / "d", 8, 100_000)
    (source / "d" / "link").symlink_to("item-00001")
    mounted = mount(source, "64M", *options)
    assert _tree(mounted.path) == _tree(source)
    assert mounted.settle()["pinned_items"] == 8
    return mounted


@pytest.mark.parametrize("change", CHANGES)
def test_a_refresh_notices_at_once(source: Path, mount: MakeMount, change: Callable[[Path], None]) -> None:
    mounted = _cached(source, mount, "--immutable")
    change(source / "d" / "item-00003")
    said = coordlfs("refresh", mounted.path).stdout
    assert int(re.findall(r"(\d+) had changed", said)[0]) > 0
    eventually(lambda: _shows(mounted, _tree(source)))
    changed = [f for f in (source / "d").rglob("*") if f.is_file() and not f.is_symlink()]
    eventually(lambda: _tree(mounted.path) and mounted.settle()["pinned_items"] == len(changed))
    coordlfs("verify", mounted.path)
    assert int(re.findall(r"(\d+) had changed", coordlfs("refresh", mounted.path).stdout)[0]) == 0


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_notices_in_time(source: Path, mount: MakeMount, change: Callable[[Path], None]) -> None:
    mounted = _cached(source, mount, "--revalidate", "1s")
    change(source / "d" / "item-00003")
    eventually(lambda: _shows(mounted, _tree(source)))
    assert mounted.stats()["revalidation"]["interval_seconds"] == 1


def test_a_pass_is_spread_over_its_time(source: Path, mount: MakeMount) -> None:
    for number in range(3000):
        (source / f"{number}").touch()
    mounted = mount(source, "8M", "--revalidate", "4s")
    assert len(os.listdir(mounted.path)) == 3000
    # By passes that are over, where the next one was seen to rest: at its beginning, and after each of its parts. The
    # first one began before there were names.
    rests: dict[int, set[int]] = {}
    last: dict[str, Any] = {}

    def is_seen_to_rest_on_its_way() -> bool:
        nonlocal last
        before, last = last, mounted.stats()["revalidation"]
        if before == last and last["passes"]:
            rests.setdefault(last["passes"], set()).add(last["checked_files"])
        return any(len(seen) > 2 for seen in rests.values())

    eventually(is_seen_to_rest_on_its_way)


def test_an_immutable_source_is_not_looked_at(source: Path, mount: MakeMount) -> None:
    mounted = _cached(source, mount, "--immutable")
    assert mounted.stats()["revalidation"] == {"interval_seconds": None, "passes": 0, "checked_files": 0}
    _replace(source / "d" / "item-00003")
    with mounted.messages() as sent:
        assert read(mounted.path / "d" / "item-00003") == noise(100_000, 3)
    assert sent["read"] == 0


def test_a_refresh_of_some_leaves_the_others_alone(source: Path, mount: MakeMount) -> None:
    mounted = _cached(source, mount, "--immutable")
    for number in (3, 4):
        _replace(source / "d" / f"item-0000{number}")
    coordlfs("refresh", mounted.path, mounted.path / "d" / "item-00003")
    eventually(lambda: read(mounted.path / "d" / "item-00003") == NEW)
    assert read(mounted.path / "d" / "item-00004") == noise(100_000, 4)
    coordlfs("refresh", mounted.path, mounted.path / "d")
    eventually(lambda: read(mounted.path / "d" / "item-00004") == NEW)


def test_a_pass_costs_hits_no_request(source: Path, mount: MakeMount) -> None:
    mounted = _cached(source, mount, "--revalidate", "1s")
    with mounted.messages() as sent:
        passes = mounted.stats()["revalidation"]["passes"]
        while mounted.stats()["revalidation"]["passes"] < passes + 2:
            for name in (source / "d").glob("item-*"):
                read(mounted.path / "d" / name.name)
    assert sent["read"] == 0


def test_a_refresh_of_a_source_that_vanished_loses_nothing(source: Path, mount: MakeMount, place: Path) -> None:
    mounted = _cached(source, mount, "--immutable")
    os.rename(source / "d", place / "away")
    coordlfs("refresh", mounted.path)
    eventually(lambda: _shows(mounted, {}))
    os.rename(place / "away", source / "d")
    coordlfs("refresh", mounted.path)
    eventually(lambda: _shows(mounted, _tree(source)))


@pytest.mark.parametrize("time", ["0", "x", "5y", "-1", "0.5s", ""])
def test_what_is_not_a_time(source: Path, place: Path, time: str) -> None:
    done = coordlfs("mount", source, place / "m", f"--revalidate={time}", status=2)
    assert "is not a time" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not is_mounted(place / "m")


def test_a_restart_in_use(source: Path, mount: MakeMount) -> None:
    """A job that reads meanwhile sees nothing of it, and the source is not read again."""
    names = write_files(source, 64, MIB // 2)
    mounted = mount(source, "64M")
    coordlfs("warm", mounted.path)
    before = mounted.settle()
    assert before["pinned_items"] == 64
    reader = subprocess.Popen(
        ["sh", "-c", f"while :; do cat {mounted.path}/* | cksum || exit 1; done"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        done = coordlfs("restart", mounted.path)
    finally:
        os.killpg(reader.pid, 15)
        sums, errors = reader.communicate()
    assert done.stdout == "server and 1 keepers replaced, 64 items cached\n"
    expected = subprocess.run(["sh", "-c", f"cat {source}/* | cksum"], capture_output=True, text=True).stdout
    assert set(sums.splitlines()) == set(expected.splitlines())
    assert not errors
    after = mounted.settle()
    assert after["processes"]["supervisor"] == before["processes"]["supervisor"]
    assert after["processes"]["server"] != before["processes"]["server"]
    assert set(after["processes"]["keepers"]).isdisjoint(before["processes"]["keepers"])
    assert after["source"]["bytes"] == before["source"]["bytes"]
    assert read(mounted.path / names[0]) == (source / names[0]).read_bytes()
    mounted.processes = after["processes"]
