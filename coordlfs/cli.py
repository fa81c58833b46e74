"""The command line: arguments and printing, nothing else."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from types import ModuleType
from typing import NoReturn

from coordlfs import __version__
from coordlfs.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit with status 2."""
        self.exit(2, f"coordlfs: {message} (`{self.prog} --help` says more)\n")


_TOOLS = {  # command → the module that has its arguments and does it, and what it is good for
    "analyze": ("coordlfs_tools.analyze.command", "measure where a training job's time goes, and what would help"),
    "simulate": ("coordlfs_tools.simulate.command", "hit rates of cache policies, over sizes, epochs, jobs and nodes"),
    "bench": ("coordlfs_tools.storage.command", "measure storage as a training job reads it"),
}
_WITH_JOB = ("run", "analyze")  # their command comes after --


def _tool(name: str) -> ModuleType:
    """The module behind a command that needs the extra `tools`. Raises UserError if that is not installed."""
    try:
        return importlib.import_module(_TOOLS[name][0])
    except ModuleNotFoundError as e:
        raise UserError(f"{name} needs {e.name}, which is not installed: pip install 'coordlfs[tools]'") from None


def _parser(asked: str | None = None) -> argparse.ArgumentParser:
    """All commands; of the tools, only the command that is `asked` for is loaded, with its arguments."""
    parser = _Parser(
        prog="coordlfs",
        description="A file system that is mounted over a dataset and keeps it in memory, never evicting.",
    )
    parser.add_argument("--version", action="version", version=f"coordlfs {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_options(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--cache-size",
            default="auto",
            metavar="SIZE",
            help="200G, 512M, 60%% (of all memory), 0 (none), or auto: 60%% of what is available (default)",
        )
        command.add_argument("--log-file", metavar="FILE", help="where messages go (default: syslog)")

    mount = commands.add_parser("mount", help="mount a dataset; returns when it serves")
    mount.add_argument("source", metavar="SRC", help="the dataset's directory")
    mount.add_argument("mountpoint", metavar="MNT", help="where to mount; may be SRC itself")
    mount.add_argument("--foreground", action="store_true", help="stay, log to the terminal, unmount on Ctrl-C")
    add_options(mount)

    umount = commands.add_parser("umount", help="unmount, and wait until everything has ended")
    umount.add_argument("mountpoint", metavar="MNT")
    umount.add_argument("--lazy", action="store_true", help="detach now, end when no file is open any more")

    status = commands.add_parser("status", help="what is cached, what was read, how often it hit")
    status.add_argument("mountpoint", metavar="MNT", nargs="?", help="default: every mount")
    status.add_argument("--json", action="store_true", help="stable figures, for programs")
    status.add_argument("--watch", action="store_true", help="a table that lives")

    warm = commands.add_parser("warm", help="fill the cache ahead of training")
    drop = commands.add_parser("drop", help="give cached files back")
    for command in (warm, drop):
        command.add_argument("mountpoint", metavar="MNT")
        command.add_argument("paths", metavar="PATH", nargs="*", help="files or directories on MNT; default: all")

    verify = commands.add_parser("verify", help="compare every byte, name and attribute with the source")
    verify.add_argument("mountpoint", metavar="MNT")

    run = commands.add_parser(
        "run",
        help="mount over SRC for one command, which alone sees it",
        usage="coordlfs run SRC [--cache-size SIZE] [--log-file FILE] -- COMMAND …",
    )
    run.add_argument("source", metavar="SRC")
    add_options(run)

    for name, (_, help_) in _TOOLS.items():
        tool = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        if name == asked:
            _tool(name).add_arguments(tool)
    return parser


def _mount(arguments: argparse.Namespace) -> int:
    from coordlfs import mounting

    options = mounting.Options(arguments.cache_size, arguments.log_file)
    supervisor = mounting.mount(arguments.source, arguments.mountpoint, options, foreground=arguments.foreground)
    if arguments.foreground:
        return mounting.stay(supervisor)
    supervisor.returncode = 0  # it lives on: do not let Popen warn of it
    return 0


def _umount(arguments: argparse.Namespace) -> int:
    from coordlfs import mounting

    mounting.umount(arguments.mountpoint, lazy=arguments.lazy)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from coordlfs import status

    status.show([arguments.mountpoint] if arguments.mountpoint else [], as_json=arguments.json, watch=arguments.watch)
    return 0


def _warm(arguments: argparse.Namespace) -> int:
    from coordlfs import client
    from coordlfs.sizes import text

    done = client.warm(arguments.mountpoint, arguments.paths)
    print(f"{done['pinned']} of {done['items']} items are cached, {text(done['bytes'])}")
    return 0


def _drop(arguments: argparse.Namespace) -> int:
    from coordlfs import client
    from coordlfs.kernel.pages import PAGE
    from coordlfs.sizes import text

    done = client.drop(arguments.mountpoint, arguments.paths)
    print(f"{done['dropped']} items were given back, {text(done['freed_pages'] * PAGE)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from coordlfs import verify
    from coordlfs.sizes import text

    entries, nbytes, found = verify.verify(arguments.mountpoint)
    for line in found:
        print(line)
    print(f"{entries} names and {text(nbytes)} compared: " + (f"{len(found)} differ" if found else "all equal"))
    return 1 if found else 0


def _run(arguments: argparse.Namespace) -> int:
    from coordlfs import mounting

    if not arguments.job:
        raise UserError("run needs a command: coordlfs run SRC -- python train.py", 2)
    return mounting.run(arguments.source, arguments.job, mounting.Options(arguments.cache_size, arguments.log_file))


_COMMANDS = {
    "mount": _mount,
    "umount": _umount,
    "status": _status,
    "warm": _warm,
    "drop": _drop,
    "verify": _verify,
    "run": _run,
}


def main(argv: list[str] | None = None) -> int:
    """The command `coordlfs`; the exit status: 2 for usage, 1 for what else went wrong."""
    words = sys.argv[1:] if argv is None else argv
    asked = words[0] if words else None
    ours = words.index("--") if asked in _WITH_JOB and "--" in words else len(words)
    try:
        arguments = _parser(asked).parse_args(words[:ours])
        arguments.job = words[ours + 1 :]
        if asked in _TOOLS:
            status: int = _tool(asked).command(arguments)
            return status
        return _COMMANDS[arguments.command](arguments)
    except UserError as e:
        print(f"coordlfs: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
