"""`mount.coordlfs`: what mount(8) calls for `mount -t coordlfs SRC MNT -o cache-size=10G` and for lines of /etc/fstab.

Options of `coordlfs mount` are written without their dashes. mount(8) hands over every option that it knows as well,
whether the user wrote it or not: those are ignored where they ask for nothing, or for what coordlfs does anyway. `rw`
is one of them: it is mount(8)'s default, and the mount is read-only all the same. What cannot be honoured is refused.
How to mount is known by `mount`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import redirect_stdout
from typing import NoReturn

from coordlfs.commands import cli
from coordlfs.errors import UserError
from coordlfs.kernel import fusermount
from coordlfs.kernel.paths import shown
from coordlfs.processes import attachment

_USAGE, _FAILURE = 1, 32  # the exit statuses of mount(8)
_OPTION = re.compile(r'(?:[^,"]|"[^"]*")+')  # libmount lets a value in quotes hold commas
_IGNORED = re.compile(
    r"rw|ro|defaults|(no)?(auto|user|users|owner|group|fail|suid|dev)|_r?netdev|exec|a?sync|dirsync"
    r"|(no)?(atime|diratime|relatime|strictatime|lazytime|mand|iversion)|silent|loud|symfollow"
    r"|default_permissions|nonempty|(x-|X-|comment=|user=|uhelper=).*"
)
_REFUSED = (  # what users may expect to be taken, and why it is not
    (r"remount", "a coordlfs mount cannot be remounted: unmount it, then mount it anew"),
    (
        r"(fs|def|root)?context|seclabel",
        "a coordlfs mount has the SELinux context that the policy gives to FUSE: leave {name!r} out",
    ),
)
_OURS_ALONE = frozenset({"command", "source", "mountpoint", "foreground"})  # of the parser, and no mount option


def words(options: str, *, sloppy: bool = False) -> list[str]:
    """Arguments of `coordlfs mount` for an option string. Raises UserError for what is unknown, unless `sloppy`."""
    known = set(vars(cli.parse(["mount", "SRC", "MNT"]))) - _OURS_ALONE
    found: list[str] = []
    for option in _OPTION.findall(options):
        name, equals, value = option.partition("=")
        if name.replace("-", "_") in known and "_" not in name:
            found.append(f"--{name}{equals}{value.strip(chr(34))}")
        elif option == "exec":  # the last one counts, as in mount(8)
            found = [word for word in found if word != "--noexec"]
        elif option == "allow_other":
            if not attachment.is_privileged() and not fusermount.allows_others():
                raise UserError("allow_other needs root, or the line user_allow_other in /etc/fuse.conf", 2)
        elif not _IGNORED.fullmatch(option):
            for pattern, why in _REFUSED:
                if re.fullmatch(pattern, name):
                    raise UserError(why.format(name=name), 2)
            if not sloppy:
                raise UserError(f"option {name!r} is not known: `coordlfs mount --help` lists what is", 2)
    return found


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message} (usage: {self.usage})", 2)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="mount.coordlfs", usage="mount.coordlfs SRC MNT [-sfnv] [-o OPTIONS]", allow_abbrev=False)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("mountpoint", metavar="MNT")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="check the options and mount nothing")
    parser.add_argument("-n", action="store_true", help="ignored: there is no mtab")
    parser.add_argument("-v", dest="verbose", action="store_true")
    parser.add_argument("-t", dest="type", metavar="TYPE", help="ignored")
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help="refused: see nsenter(1)")
    arguments = parser.parse_args(argv)
    if arguments.namespace is not None:
        raise UserError("-N is not supported: `nsenter --mount=NAMESPACE mount …` mounts in another namespace", 2)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """The command `mount.coordlfs`; the exit status is one of mount(8)'s."""
    try:
        arguments = _arguments(sys.argv[1:] if argv is None else argv)
        command = ["mount", *words(",".join(arguments.options), sloppy=arguments.sloppy)]
    except UserError as e:
        print(f"mount.coordlfs: {shown(str(e))}", file=sys.stderr)
        return _USAGE
    except SystemExit as e:
        return _USAGE if e.code else 0
    command += ["--", arguments.source, arguments.mountpoint]
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if arguments.verbose else nowhere):
        try:
            if arguments.fake:
                cli.parse(command)
                return 0
            status = cli.main(command)
        except SystemExit as e:
            status = 2 if e.code else 0
    return {0: 0, 2: _USAGE}.get(status, _FAILURE)


if __name__ == "__main__":
    sys.exit(main())
