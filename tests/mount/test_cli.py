"""What the command line says to bad usage and to directories that cannot be mounted. Nothing here mounts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from mounts import coordlfs, script

from coordlfs import __version__
from coordlfs.commands.cli import main

COMMANDS = ["mount", "umount", "status", "warm", "drop", "verify", "doctor", "run"]
USAGE = [
    [],
    ["frobnicate"],
    ["--frobnicate"],
    ["mount"],
    ["mount", "/src"],
    ["mount", "/src", "/mnt", "/more"],
    ["mount", "/src", "/mnt", "--cache-size"],
    ["mount", "/src", "/mnt", "--frobnicate"],
    ["umount"],
    ["umount", "/mnt", "/more"],
    ["status", "/mnt", "/more"],
    ["warm"],
    ["drop"],
    ["verify"],
    ["run"],
    ["run", "--", "true"],
    ["run", "/src", "/mnt", "more", "--", "true"],
]


def fails(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> tuple[int | str | None, str]:
    """Run a command that must fail and print nothing else; its exit status, and what it says."""
    status: int | str | None
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as e:
        status = e.code
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(("coordlfs: ", "usage: ")), printed.err
    return status, printed.err


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_bad_usage_has_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert fails(capsys, arguments)[0] == 2


def test_bad_usage_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {" ".join(arguments): len(fails(capsys, arguments)[1].splitlines()) for arguments in USAGE}
    assert lines == dict.fromkeys(lines, 1)


@pytest.mark.parametrize("size", ["", "x", "-1", "5X", "1000P", "101%", "1e9"])
def test_a_bad_cache_size_is_told_before_anything_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, size: str
) -> None:
    for missing in (False, True):
        source = tmp_path / "missing" if missing else tmp_path
        status, said = fails(capsys, ["mount", source, tmp_path / "mnt", f"--cache-size={size}"])
        assert (status, len(said.splitlines())) == (2, 1)
        assert said.startswith("coordlfs: --cache-size ")
    assert os.listdir(tmp_path) == [], "a mountpoint was made"


def test_options_of_run_come_before_the_command(tmp_path: Path) -> None:
    for size in (["--cache-size", "5X"], ["--cache-size=5X"]):
        done = coordlfs("run", tmp_path, *size, "--", "true", "--cache-size", "1G", status=2)
        assert "'5X' is not a size" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_run_without_a_command_says_how(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["run", tmp_path], ["run", tmp_path, "--"]):
        status, said = fails(capsys, arguments)
        assert (status, len(said.splitlines())) == (2, 1)
        assert "-- python train.py" in said


def test_places_that_cannot_be_mounted_are_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "src" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    src, mnt, missing = tmp_path / "src", tmp_path / "mnt", tmp_path / "missing"
    for source, mountpoint, says in [
        (missing, mnt, "does not exist"),
        (missing / "deeper", mnt, "does not exist"),
        (tmp_path / "file", mnt, "is not a directory"),
        (tmp_path / "file" / "below", mnt, "is not a directory"),
        (tmp_path / "loop", mnt, "cannot be opened"),
        (src, tmp_path, "would hide it"),
        (src, src / "inner", "would contain itself"),
        (src, src / "new", "would contain itself"),
        (src, tmp_path / "file", "is not a directory"),
        (src, tmp_path / "file" / "below", "cannot be used"),
        (src, missing / "mnt", "does not exist"),
    ]:
        status, said = fails(capsys, ["mount", source, mountpoint])
        assert (status, len(said.splitlines())) == (1, 1), said
        assert says in said
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "src"], "a mountpoint was made"
    assert os.listdir(src) == ["inner"]


@pytest.mark.parametrize("arguments", [["", "/mnt"], ["/", ""]])
def test_an_empty_path_is_bad_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, said = fails(capsys, ["mount", *arguments])
    assert (status, len(said.splitlines())) == (2, 1)


@pytest.mark.parametrize("command", ["umount", "status", "warm", "drop", "verify"])
def test_what_is_no_mount_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    for place, says in [
        (tmp_path, "is not mounted"),
        (tmp_path / "missing", "is not mounted"),
        ("/", "not by coordlfs"),
    ]:
        status, said = fails(capsys, [command, place])
        assert (status, len(said.splitlines())) == (1, 1), said
        assert says in said


def test_help_and_version_go_to_stdout() -> None:
    assert coordlfs("--version").stdout == f"coordlfs {__version__}\n"
    overview = coordlfs("--help")
    assert all(command in overview.stdout for command in COMMANDS)
    assert not overview.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: coordlfs {command} ")


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = {"numpy", "pyfuse3", "trio", "rich", "torch", "xxhash"}
    loaded = script(
        "import sys, coordlfs.commands.cli; coordlfs.commands.cli.parse(['doctor']); print(*sys.modules)"
    ).split()
    assert not heavy.intersection(loaded)
    assert "argparse" in loaded
