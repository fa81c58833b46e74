"""`coordlfs doctor` on this machine, on crippled versions of it, and for an ordinary user."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mounts import COORDLFS, NOBODY, PATIENCE, coordlfs
from users import open_device

from coordlfs.commands import doctor
from coordlfs.commands.check import Check, State
from coordlfs.kernel import memory, mounts, pages


def examine(*prefix: object, status: int = 0) -> dict[str, dict[str, Any]]:
    """What the doctor says of a machine as `prefix` leaves it, by the checks' names."""
    command = [*map(str, prefix), *COORDLFS, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["works"] is (status == 0)
    return {check["name"]: check for check in report["checks"]}


@pytest.mark.usefixtures("_may_mount")
def test_this_machine_works() -> None:
    found = examine()
    assert b"coordlfs-doctor" not in Path("/proc/self/mountinfo").read_bytes()
    for name in ("/dev/fuse", "right to mount", "opening without a request", "kernel", "open_tree", "pinning a page"):
        assert found[name]["state"] == "ok", found[name]
    table = coordlfs("doctor").stdout
    assert "coordlfs works here" in table
    assert all(name in table for name in found)


@pytest.mark.usefixtures("_may_mount")
def test_without_the_device_it_cannot_work() -> None:
    hide = 'mount -t tmpfs none /dev && exec "$@"'
    found = examine("unshare", "-m", "sh", "-c", hide, "sh", status=1)
    assert found["/dev/fuse"]["state"] == "missing"
    assert "modprobe fuse" in found["/dev/fuse"]["remedy"]
    assert found["FUSE features"]["state"] == "warning"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hide, "sh", *COORDLFS, "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "for want of: /dev/fuse; but `coordlfs pin` can" in " ".join(done.stdout.split())


@pytest.mark.usefixtures("_may_mount")
def test_limits_are_seen() -> None:
    unprivileged = ("setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-all")
    found = examine("prlimit", "--memlock=65536", "--nofile=64", *unprivileged)
    assert found["locked memory"]["state"] == "warning"
    assert found["locked memory"]["found"] == "at most 64.0 KiB"
    assert found["open files"]["state"] == "warning"
    assert found["pinning a page"]["state"] == "ok"
    found = examine("prlimit", "--memlock=0", *unprivileged)
    assert found["pinning a page"]["state"] == "missing"
    assert "ulimit -l" in found["pinning a page"]["remedy"]


@pytest.mark.usefixtures("_may_mount")
def test_for_an_ordinary_user() -> None:
    nobody = ("setpriv", f"--reuid={NOBODY}", "--clear-groups", "--inh-caps=-all")
    with open_device(0o600):
        assert "chmod 666" in examine(*nobody, status=1)["/dev/fuse"]["remedy"]
    with open_device():
        found = examine(*nobody)
        bounded = examine(*nobody, "--bounding-set=-all", status=1)
    assert found["right to mount"]["state"] == "warning"
    assert "fusermount3" in found["right to mount"]["found"]
    assert bounded["right to mount"]["state"] == "missing", "fusermount3 cannot become root"
    assert examine("setpriv", "--bounding-set=-all", status=1)["right to mount"]["required"]
    assert not [c for c in found.values() if "cannot be examined" in c["found"]]


def test_a_limit_of_a_memory_cgroup_is_seen(cgroup: Any) -> None:
    group = cgroup(1 << 30)
    command = [*COORDLFS, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, preexec_fn=group.enter)
    (found,) = [c for c in json.loads(done.stdout)["checks"] if c["name"] == "memory cgroup"]
    assert found["state"] == "warning"
    assert "1.0 GiB" in found["found"]
    assert str(group.path) in found["found"]
    assert memory.memory().total > 1 << 30


@pytest.mark.usefixtures("_may_mount")
def test_what_is_mounted_may_have_any_name(place: Path) -> None:
    point = os.fsencode(place) + b"/\xff"
    os.mkdir(point)
    mounts.mount("none", point, "tmpfs", mounts.MS_NODEV, "size=64k")
    try:
        assert "version" in doctor._cgroup().found
    finally:
        mounts.unmount(point)


def test_whatever_is_not_ok_says_what_it_costs_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(os, "open", fails)
    monkeypatch.setattr(pages, "resident", lambda *_: None)
    for module, name in ((pages, "map_file"), (pages, "lock"), (mounts, "detached_copy")):
        monkeypatch.setattr(module, name, fails)
    found = doctor.examine()
    troubled = [check for check in found if check.state is not State.OK]
    assert len(troubled) >= 6
    assert all(check.cost and check.remedy for check in troubled)
    assert not doctor.works(found)


def test_a_check_that_fails_is_a_warning() -> None:
    def _odd_thing() -> Check:
        raise ValueError("surprise")

    (found,) = doctor._one(_odd_thing)()
    assert (found.name, found.state) == ("odd thing", State.WARNING)
    assert "surprise" in found.found


def test_only_what_is_required_makes_it_fail() -> None:
    assert doctor.works([Check("a", State.MISSING, ""), Check("b", State.WARNING, "", required=True)])
    assert not doctor.works([Check("a", State.MISSING, "", required=True)])


def test_the_documentation_lists_it() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert "coordlfs doctor" in text


def test_a_directory_for_a_disk_cache_is_examined(tmp_path: Path) -> None:
    def of_disk(directory: object, status: int = 0) -> dict[str, str]:
        command = [*COORDLFS, "doctor", "--json", "--disk-cache", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == status, done.stdout + done.stderr
        checks = json.loads(done.stdout)["checks"]
        return {check["name"]: check["state"] for check in checks if check["name"].startswith("disk cache")}

    assert set(of_disk("/var/tmp/none").values()) == {"ok"}
    assert of_disk("/dev/shm")["disk cache: disk"] == "warning"
    assert of_disk(tmp_path / "none" / "neither", status=1) == {"disk cache": "missing"}
    assert of_disk("/proc/1", status=1)["disk cache: files"] == "missing"
    assert list(tmp_path.iterdir()) == []
