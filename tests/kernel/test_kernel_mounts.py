"""The table of mounts, read back from real mounts with awkward names, in namespaces of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mounts import script

from coordlfs.kernel import fusermount, mounts

NAMES = [
    b"plain",
    b"sp ace",
    b"tab\t",
    b"new\nline",
    b"back\\slash",
    b"\\040",
    b"hash#",
    b"\xff\xfe",
    b" - ",
    b"1\\0612",
]


def test_the_root_is_in_the_table() -> None:
    table = list(mounts.table())
    assert [m for m in table if m.point == b"/"][-1].device == os.stat("/").st_dev
    assert len({m.mount_id for m in table}) == len(table)


MOUNT = """
import os, sys
from coordlfs.kernel import mounts, process
process.unshare_mounts()
top = os.fsencode(sys.argv[1])
made = sorted(os.listdir(top))
for name in made:
    mounts.mount("so urce\\t\\\\#", os.path.join(top, name), "tmpfs", mounts.MS_NODEV, "size=64k")
here = [m for m in mounts.table() if m.point.startswith(top + b"/")]
assert [m.point for m in here] == [os.path.join(top, name) for name in made], here
assert {m.source for m in here} == {b"so urce\\t\\\\#"}, here
assert {m.fstype for m in here} == {b"tmpfs"}
assert [m.device for m in here] == [os.stat(m.point).st_dev for m in here]
copy = mounts.detached_copy(here[0].point)
assert os.fstat(copy).st_dev == here[0].device
for m in here:
    mounts.unmount(m.point)
assert not [m for m in mounts.table() if m.point.startswith(top + b"/")]
try:
    mounts.unmount(here[0].point)
except OSError as e:
    print(e.errno)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_names_of_any_bytes_are_read_back(tmp_path: Path) -> None:
    for name in NAMES:
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    assert script(MOUNT, tmp_path) == "22\n", "unmounting what is not mounted is EINVAL"
    assert os.fsencode(tmp_path) not in Path("/proc/self/mountinfo").read_bytes(), "seen outside"


def test_readahead_of_a_device_that_is_none_cannot_be_set() -> None:
    assert mounts.set_readahead(os.makedev(4000, 4000), 128) is False


def test_where_apparmor_lets_fusermount_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, local, disabled = tmp_path / "profile", tmp_path / "local", tmp_path / "disabled"
    for name, path in (("PROFILE", profile), ("LOCAL_PROFILE", local), ("_DISABLED", disabled)):
        monkeypatch.setattr(fusermount, name, str(path))
    assert fusermount.confined_to() == []
    profile.write_text(
        """profile fusermount3 /usr/bin/fusermount3 {
  include <abstractions/base>
  /dev/fuse rw,
  mount fstype=@{fuse_types} options=(nosuid,nodev,rw) -> @{HOME}/**/,
  mount fstype=@{fuse_types} options=(nosuid,nodev,ro) -> @{HOME}/**/,
  mount fstype=@{fuse_types} options=(nosuid,nodev,ro) -> /mnt/{,**/},  # as admins do
  # mount fstype=@{fuse_types} -> /srv/**/,
  umount /opt/**/,
  include if exists <local/fusermount3>
}
"""
    )
    local.write_text("mount fstype=@{fuse_types} options=(nosuid,nodev,ro) -> /data/mnt/,\numount /data/mnt/,\n")
    assert fusermount.confined_to() == ["@{HOME}/**/", "/mnt/{,**/}", "/data/mnt/"]
    assert "allows @{HOME}/**/, /mnt/{,**/}, /data/mnt/:" in fusermount.explain_refusal("/srv/m")
    assert "allow /srv/m/ in" in fusermount.explain_refusal("/srv/m")
    disabled.symlink_to(profile)
    assert fusermount.confined_to() == []
