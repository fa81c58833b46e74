"""coordlfs as others start it: mount(8) and fstab, systemd, and what Kubernetes is given."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from mounts import COORDLFS, PATIENCE, eventually, is_mounted, mentions, read, unmount_lazily, write_files

from coordlfs.commands import mount_helper
from coordlfs.commands.mounted import stats
from coordlfs.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.xdist_group("mount.coordlfs")  # which is installed while a test runs
HELPER = Path("/sbin/mount.coordlfs")

# -- mount(8) -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ("", []),
        ("rw", []),
        ("rw,nosuid,nodev,relatime,_netdev,nofail,x-systemd.automount,X-mount.mkdir,comment=data,user=joe", []),
        ("cache-size=10G,ro", ["--cache-size=10G"]),
        ("rw,log-file=/a=b,metrics=[::1]:9", ["--log-file=/a=b", "--metrics=[::1]:9"]),
        ('log-file="/a,b",noauto', ["--log-file=/a,b"]),
        ("rw,noexec,nosuid,nodev,user", ["--noexec"]),
        ("rw,noexec,nodev,users,suid", ["--noexec"]),
        ("rw,nosuid,nodev,owner,group,nousers", []),
        ("noexec,user,exec", []),
        ("exec,user,noexec", ["--noexec"]),
        ("allow_other,default_permissions,nonempty,_rnetdev,uhelper=x", []),
        (",,", []),
    ],
)
def test_mount_options(options: str, meant: list[str]) -> None:
    assert mount_helper.words(options) == meant


@pytest.mark.parametrize(
    "options",
    ["cache", "cache_size=1G", "foreground", "help", "rw,frobnicate=1", "nosymfollow", "--cache-size=1G"],
)
def test_options_that_cannot_be_honoured_are_refused(options: str) -> None:
    with pytest.raises(UserError):
        mount_helper.words(options)
    assert mount_helper.words(options, sloppy=True) == []


@pytest.mark.parametrize(
    "options", ["remount", 'context="system_u:object_r:tmp_t:s0:c1,c2"', "rootcontext=a", "seclabel"]
)
def test_what_would_be_missed_is_refused_even_of_the_sloppy(options: str) -> None:
    for sloppy in (False, True):
        with pytest.raises(UserError, match=options.partition("=")[0] if "=" in options else "coordlfs mount"):
            mount_helper.words(options, sloppy=sloppy)


@pytest.fixture
def mountpoint(place: Path, _may_mount: None) -> Iterator[Path]:
    """A directory to mount on, with /sbin/mount.coordlfs there meanwhile."""
    path = place / "mnt"
    path.mkdir()
    installed = Path(sys.executable).parent / "mount.coordlfs"
    assert not HELPER.exists(), f"{HELPER} is there already"
    HELPER.symlink_to(installed)
    try:
        yield path
    finally:
        HELPER.unlink()
        unmount_lazily(path)
        eventually(lambda: not mentions(path))


def run(*command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}"
    return done


def test_mount_and_umount(source: Path, mountpoint: Path) -> None:
    names = write_files(source, 2, 100)
    log = mountpoint.parent / "log,1"
    done = run("mount", "-t", "coordlfs", source, mountpoint, "-o", f'cache-size=1M,noatime,nofail,log-file="{log}"')
    assert not done.stdout
    assert read(mountpoint / names[0]) == read(source / names[0])
    assert log.exists()
    assert run("findmnt", "-no", "FSTYPE,SOURCE", mountpoint).stdout.split() == ["fuse.coordlfs", str(source)]
    run("umount", mountpoint)
    assert not is_mounted(mountpoint)


def test_a_line_of_fstab_with_a_disk_cache(source: Path, mountpoint: Path) -> None:
    names, disk = write_files(source, 2, 100), mountpoint.parent / "a disk, with a comma"
    table = mountpoint.parent / "fstab"
    quoted = f'disk-cache="{disk}",disk-size=8M'.replace(" ", "\\040")
    table.write_text(f"{source} {mountpoint} coordlfs cache-size=0,{quoted},nofail 0 0\n")
    run("mount", "-T", table, mountpoint)
    for name in names:
        assert read(mountpoint / name) == read(source / name)
    assert json.loads(os.getxattr(mountpoint, "user.coordl.stats"))["disk"]["directory"] == str(disk)
    run("umount", mountpoint)
    assert f"{source}: " in run(sys.executable, "-m", "coordlfs", "cache", disk).stdout


def test_a_line_of_fstab(source: Path, mountpoint: Path) -> None:
    names = write_files(source, 2, 100)
    spaced = source / "with space"
    spaced.mkdir()
    (spaced / "file").write_text("here")
    table = mountpoint.parent / "fstab"
    written = str(spaced).replace(" ", "\\040")
    table.write_text(f"{written} {mountpoint} coordlfs defaults,cache-size=1M,_netdev,x-systemd.automount 0 0\n")
    run("mount", "-T", table, "-v", mountpoint)
    assert (mountpoint / "file").read_text() == "here"
    assert names
    run("umount", mountpoint)


@pytest.mark.parametrize(("options", "may_run"), [("user", False), ("users,exec", True), ("owner", True)])
def test_a_line_of_fstab_for_users(source: Path, mountpoint: Path, options: str, may_run: bool) -> None:
    program = source / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    table = mountpoint.parent / "fstab"
    table.write_text(f"{source} {mountpoint} coordlfs noauto,{options},cache-size=1M,allow_other 0 0\n")
    run("mount", "-T", table, mountpoint)
    if may_run:
        run(mountpoint / "program")
    else:
        with pytest.raises(PermissionError):
            run(mountpoint / "program")
    assert read(mountpoint / "program") == read(program)
    run("umount", mountpoint)


_AUTOMOUNTER = """
import ctypes, fcntl, os, select, struct, subprocess, sys
source, place = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
heard, tells = os.pipe()
os.set_inheritable(tells, True)
options = f"fd={tells},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
assert not libc.mount(b"test", place.encode(), b"autofs", 0, options.encode()), ctypes.get_errno()
os.close(tells)
control = os.open(place, os.O_RDONLY)
who = subprocess.Popen(["cat", place + "/file"], start_new_session=True, stdout=subprocess.PIPE, text=True)
assert select.select([heard], [], [], 20)[0]
token = struct.unpack_from("iiI", os.read(heard, 512))[2]
done = subprocess.run(["mount.coordlfs", source, place, "-o", "cache-size=1M"], timeout=30)
print(who.poll())  # the automounter has not said yet that it is mounted
fcntl.ioctl(control, 0x9361 if done.returncode else 0x9360, token)
print(who.communicate(timeout=20)[0], done.returncode)
"""


def test_an_automounter_mounts(source: Path, mountpoint: Path) -> None:
    """Who waits for the mount is let on only when the automounter says so, and none of our processes is among them."""
    with Path("/proc/filesystems").open() as f:
        assert "autofs" in f.read()
    (source / "file").write_text("here")
    command = [sys.executable, "-c", _AUTOMOUNTER, str(source), str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, start_new_session=True)
    try:
        assert done.stdout.split() == ["None", "here", "0"], done.stderr
        pid = stats(str(mountpoint))["processes"]["supervisor"]
        assert os.getsid(pid) == pid, "a terminal's signals do not reach it"
        run("umount", mountpoint)
    finally:
        unmount_lazily(mountpoint)
        unmount_lazily(mountpoint)  # the automounter's own


def test_what_mount_refuses(source: Path, mountpoint: Path) -> None:
    for options, says, status in [
        ("frobnicate=1", "option 'frobnicate' is not known", 1),
        ("cache-size=5X", "'5X' is not a size", 1),
        ("context=system_u:object_r:tmp_t:s0,noauto", "SELinux context", 1),
    ]:
        if "context" in options:  # which mount(8) takes out where there is no SELinux
            done = run("mount.coordlfs", source, mountpoint, "-o", options, status=status)
            assert says in done.stderr
            assert len(done.stderr.splitlines()) == 1
            continue
        done = run("mount", "-t", "coordlfs", source, mountpoint, "-o", options, status=status)
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    for words in (["-N", "/proc/self/ns/mnt"], ["-q"], ["more"]):
        done = run("mount.coordlfs", source, mountpoint, *words, status=1)
        assert len(done.stderr.splitlines()) == 1
    done = run("mount", "-t", "coordlfs", source / "missing", mountpoint, status=32)
    assert "does not exist" in done.stderr
    run("mount", "-f", "-t", "coordlfs", source, mountpoint)
    assert not is_mounted(mountpoint)
    run("mount", "-s", "-t", "coordlfs", source, mountpoint, "-o", "frobnicate=1,cache-size=1M")
    run("umount", mountpoint)


# -- systemd ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(source: Path, place: Path, abstract: bool) -> None:
    names = write_files(source, 2, 100)
    path = place / "mnt"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = f"@coordlfs-test-{os.getpid()}" if abstract else str(place / "notify")
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(240)

        def told() -> dict[str, str]:
            return dict(line.split("=", 1) for line in manager.recv(1 << 12).decode().splitlines())

        command = [*COORDLFS, "mount", str(source), str(path), "--foreground", "--cache-size", "1M"]
        environment = os.environ | {"NOTIFY_SOCKET": address}
        job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            assert told() == {"READY": "1", "STATUS": f"serves {path}"}
            assert read(path / names[0]) == read(source / names[0]), "it serves when it says so"
            assert told()["STATUS"].startswith(f"{source}: ")
            job.send_signal(signal.SIGTERM)
            assert told() == {"STOPPING": "1", "STATUS": f"unmounting {path}"}
            assert job.wait(PATIENCE) == 0
            assert told() == {"STOPPING": "1", "STATUS": f"{path} is unmounted"}
        finally:
            with suppress(ProcessLookupError):
                job.kill()
            job.communicate()
            unmount_lazily(path)
    assert not is_mounted(path)


@pytest.mark.parametrize("command", ["mount", "pin"])
def test_the_unit_is_valid(command: str, tmp_path: Path) -> None:
    name = "coordlfs@" if command == "mount" else "coordlfs-pin@"
    template = (DOCS / "systemd" / f"{name}.service").read_text()
    assert "Type=notify" in template
    assert f"ExecStart=/opt/coordlfs/bin/coordlfs {command} --foreground" in template
    if shutil.which("systemd-analyze"):
        # It insists on a program that exists.
        (tmp_path / f"{name}.service").write_text(template.replace("/opt/coordlfs/bin/coordlfs", "/bin/true"))
        done = run("systemd-analyze", "verify", tmp_path / f"{name}mnt-cached.service")
        assert not done.stderr


def test_the_service_manager_is_told_of_what_is_pinned(source: Path, place: Path) -> None:
    write_files(source, 2, 100)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.settimeout(240)
        command = [*COORDLFS, "pin", str(source), "--foreground", "--cache-size", "1M"]
        environment = os.environ | {"NOTIFY_SOCKET": str(place / "notify")}
        job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            assert manager.recv(1 << 12).decode().splitlines() == ["READY=1", f"STATUS=pins {source}"]
            assert manager.recv(1 << 12).decode().startswith(f"STATUS={source}: ")
            job.send_signal(signal.SIGTERM)
            assert manager.recv(1 << 12).decode().splitlines() == ["STOPPING=1", f"STATUS=letting go of {source}"]
            assert job.wait(PATIENCE) == 0
        finally:
            with suppress(ProcessLookupError):
                job.kill()
            job.communicate()


# -- Kubernetes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes-pin.yaml", "kubernetes-cluster.yaml"])
def test_the_manifests_are_what_kubernetes_takes(name: str) -> None:
    documents = list(yaml.safe_load_all((DOCS / name).read_text()))
    assert len(documents) >= 2
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_nodes_of_the_manifest_find_each_other_by_the_service() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((DOCS / "kubernetes-cluster.yaml").read_text())}
    service, daemons = documents["Service"], documents["DaemonSet"]
    (container,) = daemons["spec"]["template"]["spec"]["containers"]
    words = container["command"][-1].split("exec ")[1].split()
    options = dict(zip(words[5::2], words[6::2], strict=True))
    (port,) = service["spec"]["ports"]
    assert options["--peers"] == f"dns:{service['metadata']['name']}:{port['port']}"
    assert options["--listen"] == f'"$POD_IP:{port["port"]}"'
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == daemons["spec"]["template"]["metadata"]["labels"]
    places = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {os.path.dirname(options[option]) for option in ("--disk-cache", "--cluster-key-file")} <= places


def test_the_manifest_propagates_the_mount() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text())}
    pod = documents["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["privileged"] is True
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["name"]: m for m in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    assert mounts["cached"]["mountPropagation"] == "Bidirectional"
    job = documents["Pod"]["spec"]
    (used,) = job["containers"][0]["volumeMounts"]
    assert used["mountPropagation"] == "HostToContainer"
    (volume,) = job["volumes"]
    assert volume["hostPath"]["path"] == volumes["cached"]["hostPath"]["path"]
    words = " ".join(container["command"])
    assert f"coordlfs mount --foreground {mounts['source']['mountPath']} {mounts['cached']['mountPath']}/" in words
    ports = [p["containerPort"] for p in container["ports"]]
    assert f"--metrics 0.0.0.0:{ports[0]}" in words


def test_the_manifest_of_pin_takes_no_privilege_but_to_lock_memory() -> None:
    """The job mounts the same directory, by itself."""
    documents = {d["kind"]: d for d in yaml.safe_load_all((DOCS / "kubernetes-pin.yaml").read_text())}
    pod = documents["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    context = container["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert not context.get("privileged")
    assert container["command"][:2] == ["coordlfs", "pin"]
    (source,), (used,) = container["volumeMounts"], documents["Pod"]["spec"]["containers"][0]["volumeMounts"]
    assert source["readOnly"] is used["readOnly"] is True
    assert "mountPropagation" not in used
    assert pod["volumes"][0]["hostPath"]["path"] == documents["Pod"]["spec"]["volumes"][0]["hostPath"]["path"]
