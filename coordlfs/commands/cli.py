"""The command line: arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Container
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from coordlfs import __version__
from coordlfs.errors import UserError
from coordlfs.kernel import limits, process
from coordlfs.kernel.paths import shown
from coordlfs.sources import address

if TYPE_CHECKING:
    from coordlfs.commands.mount import Options

    Commands = argparse._SubParsersAction["_Parser"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit with status 2."""
        self.exit(2, f"coordlfs: {shown(message)} (`{self.prog} --help` says more)\n")


_TOOLS = {  # command → the module that has its arguments and does it, and what it is good for
    "analyze": ("coordlfs_tools.analyze.command", "measure where a training job's time goes, and what would help"),
    "simulate": ("coordlfs_tools.simulate.command", "hit rates of cache policies, over sizes, epochs, jobs and nodes"),
    "bench": ("coordlfs_tools.storage.command", "measure storage as a training job reads it"),
}
_OF_MOUNT = (  # and not of `pin`
    *("disk_cache", "disk_size", "source_option", "noexec"),
    *("listen", "peers", "cluster_key_file", "tls_cert", "tls_key", "tls_ca"),
)
_WITH_JOB = ("run", "analyze")  # their command comes after --


def _tool(name: str) -> ModuleType:
    """The module behind a command that needs the extra `tools`. Raises UserError if that is not installed."""
    try:
        return importlib.import_module(_TOOLS[name][0])
    except ModuleNotFoundError as e:
        raise UserError(f"{name} needs {e.name}, which is not installed: pip install 'coordlfs[tools]'") from None


def _parsers(tools: Container[str]) -> tuple[_Parser, Commands]:
    """The parser, and that of each command; of the tools only `tools` are loaded, with their arguments."""
    parser = _Parser(
        prog="coordlfs",
        description="A file system that is mounted over a dataset and keeps it in memory, never evicting.",
    )
    parser.add_argument("--version", action="version", version=f"coordlfs {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_common(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--cache-size",
            default="auto",
            metavar="SIZE",
            help="200G, 512M, 60%% (of all memory), 0 (none), or auto: 60%% of what is available (default)",
        )
        command.add_argument(
            "--revalidate",
            default="10m",
            metavar="TIME",
            help="within which a change of the source is noticed though nobody reads it: 30s, 10m (default), 6h",
        )
        command.add_argument("--immutable", action="store_true", help="the source never changes: do not look")
        command.add_argument("--log-file", metavar="FILE", help="where messages go (default: the journal, or syslog)")
        command.add_argument(
            "--metrics",
            metavar="[HOST:]PORT",
            help="serve figures to Prometheus there, on loopback if no host is named",
        )

    def add_source_option(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--source-option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"how to reach a bucket, may be repeated; KEY is one of {', '.join(address.OPTIONS)}; never a secret",
        )

    def add_options(command: argparse.ArgumentParser) -> None:
        add_common(command)
        command.add_argument(
            "--disk-cache", metavar="DIR", help="keep what has no room in memory there, on a local disk"
        )
        command.add_argument(
            "--disk-size",
            metavar="SIZE",
            help="2T, 500G, 80%% (of the file system of DIR), or auto: what is free there, less a tenth (default)",
        )
        add_source_option(command)
        command.add_argument("--noexec", action="store_true", help="no program on the mount may be run")
        command.add_argument(
            "--peers",
            metavar="NODES",
            help="share caches with these nodes: HOST:PORT,HOST:PORT…, dns:NAME:PORT, slurm:PORT or etcd:URL/PREFIX",
        )
        command.add_argument("--listen", metavar="HOST:PORT", help="where the other nodes reach this one")
        command.add_argument("--cluster-key-file", metavar="FILE", help="the key that all nodes share")
        command.add_argument("--tls-cert", metavar="FILE", help="this node's certificate, and then all is encrypted")
        command.add_argument("--tls-key", metavar="FILE", help="its private key")
        command.add_argument("--tls-ca", metavar="FILE", help="who signed the nodes' certificates")

    mount = commands.add_parser("mount", help="mount a dataset; returns when it serves")
    mount.add_argument(
        "source", metavar="SRC", help="the dataset's directory, or a bucket: s3://BUCKET/PREFIX, gs://…, az://…"
    )
    mount.add_argument("mountpoint", metavar="MNT", help="where to mount; may be SRC itself")
    mount.add_argument("--foreground", action="store_true", help="stay, log to the terminal, unmount on Ctrl-C")
    add_options(mount)

    umount = commands.add_parser("umount", help="unmount, and wait until everything has ended")
    umount.add_argument("mountpoint", metavar="MNT")
    umount.add_argument("--lazy", action="store_true", help="detach now, end when no file is open any more")

    pin = commands.add_parser(
        "pin", help="keep a directory's own files in memory, without a mount; returns when it works"
    )
    pin.add_argument("directory", metavar="DIR", help="the dataset's directory")
    pin.add_argument("paths", metavar="PATH", nargs="*", help="files or directories in DIR; default: all")
    pin.add_argument("--foreground", action="store_true", help="stay, log to the terminal, unpin on Ctrl-C")
    add_common(pin)

    unpin = commands.add_parser("unpin", help="let go of what `pin` keeps in memory")
    unpin.add_argument("directory", metavar="DIR")

    status = commands.add_parser("status", help="what is cached, what was read, how often it hit")
    status.add_argument("mountpoint", metavar="MNT", nargs="?", help="or what `pin` was given; default: everything")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="stable figures, for programs")
    how.add_argument("--watch", action="store_true", help="a table that is updated")

    warm = commands.add_parser("warm", help="fill the cache ahead of training")
    drop = commands.add_parser("drop", help="drop files from the cache")
    for command in (warm, drop):
        command.add_argument("mountpoint", metavar="MNT")
        command.add_argument("paths", metavar="PATH", nargs="*", help="files or directories on MNT; default: all")

    warm.add_argument(
        "--cluster",
        action="store_true",
        help="have every node that shares the cache fetch what it owns, until all have",
    )

    peers = commands.add_parser("peers", help="the nodes that share the cache: who lives, what each caches and sends")
    peers.add_argument("mountpoint", metavar="MNT")
    peers.add_argument("--json", action="store_true", help="stable figures, for programs")

    verify = commands.add_parser("verify", help="compare every byte, name and attribute with the source")
    verify.add_argument("mountpoint", metavar="MNT")

    refresh = commands.add_parser("refresh", help="notice now what changed in the source")
    refresh.add_argument("mountpoint", metavar="MNT", help="or what `pin` was given")
    refresh.add_argument("paths", metavar="PATH", nargs="*", help="files or directories on MNT; default: all")

    cache = commands.add_parser(
        "cache", help="the disk caches in a directory: list them, check every byte, remove them"
    )
    cache.add_argument("action", nargs="?", choices=("list", "verify", "clear"), default="list", help="default: list")
    cache.add_argument("directory", metavar="DIR", help="what --disk-cache was given")
    cache.add_argument("--source", metavar="SRC", help="verify or clear only that of this dataset")

    restart = commands.add_parser("restart", help="replace the mount's processes by the installed version, in use")
    restart.add_argument("mountpoint", metavar="MNT")

    groups = commands.add_parser("groups", help="jobs on this node that share a loader: epochs, stage, what is saved")
    groups.add_argument("--json", action="store_true", help="stable figures, for programs")
    groups.add_argument("--watch", action="store_true", help="tables that are updated")

    doctor = commands.add_parser("doctor", help="examine the machine: what is missing, what that costs, how to mend it")
    doctor.add_argument("source", metavar="BUCKET", nargs="?", help="examine a bucket as well: s3://BUCKET/PREFIX, …")
    add_source_option(doctor)
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument("--disk-cache", metavar="DIR", help="whether that is a good place for a disk cache, too")

    run = commands.add_parser(
        "run",
        help="mount over SRC (or on MNT) for one command, which alone sees it",
        usage="coordlfs run SRC [MNT] [--pin] [--cache-size SIZE] [OPTION …] -- COMMAND …",
    )
    run.add_argument("source", metavar="SRC")
    run.add_argument("mountpoint", metavar="MNT", nargs="?", help="where to mount instead; needed for a bucket")
    run.add_argument("--pin", action="store_true", help="mount nothing, but `pin` SRC for as long as the command runs")
    add_options(run)

    for name, (_, help_) in _TOOLS.items():
        tool = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        if name in tools:
            _tool(name).add_arguments(tool)
    return parser, commands


def commands() -> list[tuple[str, str, argparse.ArgumentParser]]:
    """Name, purpose and arguments of every command, for the reference. Raises UserError without the extra `tools`."""
    _, found = _parsers(_TOOLS)
    # argparse has no public way to the words that it prints beside each command.
    return [(purpose.dest, purpose.help or "", found.choices[purpose.dest]) for purpose in found._choices_actions]


def _options(arguments: argparse.Namespace) -> Options:
    from coordlfs.commands.mount import Options
    from coordlfs.sizes import seconds

    a = argparse.Namespace(**dict.fromkeys(_OF_MOUNT) | vars(arguments))
    given = (a.listen, a.peers, a.cluster_key_file, a.tls_cert, a.tls_key, a.tls_ca)
    cluster = None
    if any(value is not None for value in given):
        from coordlfs.peers.settings import Cluster

        cluster = Cluster(*given)
    if a.disk_cache == "":  # of a variable that was not set, and not the working directory
        raise UserError("--disk-cache names no directory: its path is empty", 2)
    if a.disk_cache is None and a.disk_size is not None:
        raise UserError("--disk-size needs a directory: give --disk-cache DIR as well", 2)
    revalidate = None if a.immutable else seconds(a.revalidate)
    return Options(
        a.cache_size,
        a.log_file,
        revalidate,
        a.metrics,
        cluster,
        bool(a.noexec),
        disk_cache=a.disk_cache,
        disk_size=a.disk_size or "auto",
        source_options=tuple(a.source_option or ()),
    )


def _mount(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import mount, mounted
    from coordlfs.commands.starting import leave, stay

    place = arguments.mountpoint
    supervisor = mount.mount(arguments.source, place, _options(arguments), foreground=arguments.foreground)
    if not arguments.foreground:
        return leave(supervisor)
    says = {"serves": f"serves {place}", "ends": f"unmounting {place}", "ended": f"{place} is unmounted"}
    return stay(supervisor, lambda: mounted.stats(place), **says)


def _umount(arguments: argparse.Namespace) -> int:
    from coordlfs.commands.umount import umount

    umount(arguments.mountpoint, lazy=arguments.lazy)
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import pin, pinned
    from coordlfs.commands.starting import leave, stay

    place = arguments.directory
    supervisor = pin.pin(place, arguments.paths, _options(arguments), foreground=arguments.foreground)
    if not arguments.foreground:
        return leave(supervisor)
    says = {"serves": f"pins {place}", "ends": f"letting go of {place}", "ended": f"{place} is not pinned"}
    return stay(supervisor, lambda: pinned.stats(place), **says)


def _unpin(arguments: argparse.Namespace) -> int:
    from coordlfs.commands.pin import unpin

    unpin(arguments.directory)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import status

    status.show([arguments.mountpoint] if arguments.mountpoint else [], as_json=arguments.json, watch=arguments.watch)
    return 0


def _warm(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import client
    from coordlfs.sizes import text

    if arguments.cluster:
        from coordlfs.commands import warm_cluster

        nodes = warm_cluster.warm(arguments.mountpoint, arguments.paths)
        print(*warm_cluster.lines(nodes), sep="\n")
        return 0 if all(node.state in ("done", "full") for node in nodes if node.is_alive) else 1
    done = client.warm(arguments.mountpoint, arguments.paths)
    on_disk = f"; {done['on_disk']} more on disk, {text(done['on_disk_bytes'])}" if done["on_disk"] else ""
    print(f"{done['pinned']} of {done['items']} items are cached, {text(done['bytes'])}{on_disk}")
    if done["is_full"]:
        untried = f": {done['untried']} more files were not tried" if done["untried"] else ""
        stopped = done["disk_stopped"]
        print(f"nothing more is kept in the disk cache: {stopped}" if stopped else f"the cache is full{untried}")
    return 0


def _drop(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import client
    from coordlfs.kernel.pages import PAGE
    from coordlfs.sizes import text

    done = client.drop(arguments.mountpoint, arguments.paths)
    on_disk = f"; {text(done['freed_disk_bytes'])} on disk" if done.get("freed_disk_bytes") else ""
    print(f"{done['dropped']} items were dropped, {text(done['freed_pages'] * PAGE)}{on_disk}")
    return 0


def _peers(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import peers

    peers.show(arguments.mountpoint, as_json=arguments.json)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import verify
    from coordlfs.sizes import text

    entries, nbytes, found = verify.verify(arguments.mountpoint)
    for line in found:
        print(line)
    print(f"{entries} names and {text(nbytes)} compared: " + (f"{len(found)} differences" if found else "all equal"))
    return 1 if found else 0


def _refresh(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import client, pinned

    done = (pinned if pinned.is_pinned(arguments.mountpoint) else client).refresh(arguments.mountpoint, arguments.paths)
    print(f"{done['checked']} known names compared with the source, {done['changed']} had changed")
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import client

    done = client.restart(arguments.mountpoint)
    peers = " and peer server" if done["peer_servers"] else ""
    print(f"server and {done['keepers']} keepers{peers} replaced, {done['pinned_items']} items cached")
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import cache

    if arguments.action == "verify":
        return 0 if cache.verify(arguments.directory, arguments.source) else 1
    if arguments.action == "clear":
        cache.clear(arguments.directory, arguments.source)
    else:
        cache.show(arguments.directory)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from coordlfs.commands import doctor

    options = address.options(arguments.source_option)
    if arguments.source is None:
        return 0 if doctor.show(as_json=arguments.json, disk_cache=arguments.disk_cache) else 1
    bucket = address.parse(arguments.source)
    if bucket is None:
        raise UserError(f"doctor examines a bucket, as s3://BUCKET/PREFIX: {arguments.source} is a path", 2)
    from coordlfs.commands import doctor_bucket

    more = doctor_bucket.examine(bucket, options)
    return 0 if doctor.show(as_json=arguments.json, disk_cache=arguments.disk_cache, more=more) else 1


def _groups(arguments: argparse.Namespace) -> int:
    try:
        groups = importlib.import_module("coordlfs_loader.groups")
    except ModuleNotFoundError as e:
        raise UserError(f"groups needs {e.name}, which is not installed: pip install 'coordlfs[loader]'") from None
    groups.show(as_json=arguments.json, watch=arguments.watch)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from coordlfs.commands.run import run, run_pinned

    if not arguments.job:
        raise UserError("run needs a command: coordlfs run SRC -- python train.py", 2)
    if arguments.pin and (wrong := [name for name in (*_OF_MOUNT, "mountpoint") if getattr(arguments, name)]):
        option = "MNT" if wrong[0] == "mountpoint" else f"--{wrong[0].replace('_', '-')}"
        raise UserError(f"run --pin mounts nothing: leave out {option}", 2)
    if arguments.pin:
        return run_pinned(arguments.source, arguments.job, _options(arguments), arguments.inherited)
    return run(arguments.source, arguments.mountpoint, arguments.job, _options(arguments), arguments.inherited)


_COMMANDS = {
    "mount": _mount,
    "umount": _umount,
    "pin": _pin,
    "unpin": _unpin,
    "status": _status,
    "warm": _warm,
    "drop": _drop,
    "peers": _peers,
    "verify": _verify,
    "refresh": _refresh,
    "restart": _restart,
    "cache": _cache,
    "doctor": _doctor,
    "groups": _groups,
    "run": _run,
}


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments that `words` mean; exits with status 2 if they mean none."""
    return _parsers(words[:1])[0].parse_args(words)


def _of_environment(error: BaseException) -> str | None:
    """What is wrong with the process's surroundings, where that explains an error."""
    if not _has_working_directory():
        return "the working directory is gone: change to one that exists"
    if isinstance(error, FileNotFoundError):
        return None  # no limit makes a file vanish
    what = "not enough memory" if isinstance(error, MemoryError) else str(error)
    if (hint := limits.hint()) or isinstance(error, MemoryError):
        return f"{what}{hint}"
    return None


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """The command `coordlfs`; the exit status: 2 for usage, 1 for what else went wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may be any bytes
    words = sys.argv[1:] if argv is None else argv
    asked = words[0] if words else None
    ours = words.index("--") if asked in _WITH_JOB and "--" in words else len(words)
    try:
        arguments = parse(words[:ours])
        arguments.job = words[ours + 1 :]
        if asked in _TOOLS:
            status: int = _tool(asked).command(arguments)
            return status
        arguments.inherited = process.settle()
        return _COMMANDS[arguments.command](arguments)
    except UserError as e:
        print(f"coordlfs: {shown(str(e))}", *map(shown, e.output), sep="\n  ", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, MemoryError) as e:
        if (said := _of_environment(e)) is None:
            raise
        print(f"coordlfs: {shown(said)}", file=sys.stderr)
        return 1
