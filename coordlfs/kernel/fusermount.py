"""Mounting FUSE file systems as an ordinary user, by way of the setuid program fusermount3 of libfuse.

It mounts and hands over the descriptor of /dev/fuse through a socket whose number the variable `_FUSE_COMMFD` tells.
It mounts on directories that the user may write to, and admits few options.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterable
from contextlib import suppress

from coordlfs.kernel import process

PROGRAM = "fusermount3"
_CONFIGURATION = "/etc/fuse.conf"
_TIMEOUT = 30.0  # seconds
PROFILE = "/etc/apparmor.d/fusermount3"  # of AppArmor, on Ubuntu from 24.10 on
LOCAL_PROFILE = "/etc/apparmor.d/local/fusermount3"
_DISABLED = "/etc/apparmor.d/disable/fusermount3"
_ALLOWED_USUALLY = ("@{HOME}/**/", "/mnt/**/", "/media/**/", "/tmp/**/")
_RULE = re.compile(r"^\s*mount\b[^#\n]*->\s*([^\s#]+),", re.MULTILINE)
_CODES = {  # what it says → errno
    "Device or resource busy": errno.EBUSY,
    "Operation not permitted": errno.EPERM,
    "mount failed: Permission denied": errno.EACCES,  # mount(2) gives root that where a security module forbids it
    "not found in": errno.EPERM,  # the mount is not this user's
    "No such file": errno.ENOENT,
}


def problem() -> tuple[str, str] | None:
    """Why this user cannot mount by fusermount3, and what to do; None if nothing is known to be in the way."""
    program = shutil.which(PROGRAM)
    if program is None:
        return f"there is no {PROGRAM}", "install fuse3, or run as root"
    st = os.stat(program)
    if st.st_uid or not st.st_mode & stat.S_ISUID:
        return f"{program} is not setuid root", f"`chown root {program}; chmod u+s {program}`, or run as root"
    if process.gains_no_privileges():
        return f"{program} is without effect (no_new_privs is set)", "mount from outside of this container or service"
    if not process.may_gain_capability(process.CAP_SYS_ADMIN):
        what = f"{program} is without effect (CAP_SYS_ADMIN is not in the bounding set)"
        return what, "mount from outside of this container or service"
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return f"user {os.getuid()} has no name, which {PROGRAM} asks for", "add the user to /etc/passwd"
    return None


def forbidden(mountpoint: str) -> str | None:
    """Why fusermount3 would not let this user mount on a directory that exists; None if it would."""
    st = os.stat(mountpoint)
    if not os.access(mountpoint, os.W_OK):
        return "may not be written to by this user"
    if st.st_mode & stat.S_ISVTX and st.st_uid != os.getuid():
        return "has the sticky bit and belongs to another user"
    return None


def confined_to() -> list[str]:
    """Where AppArmor's profile of fusermount3 lets it mount, as patterns; empty where there is no such profile."""
    found: dict[str, None] = {}
    if not os.path.lexists(_DISABLED):
        for path in (PROFILE, LOCAL_PROFILE):
            with suppress(OSError), open(path, errors="replace") as f:
                found |= dict.fromkeys(_RULE.findall(f.read()))
    return list(found)


def explain_refusal(mountpoint: str) -> str:
    """Why mount(2) of fusermount3 is refused though it is root's, and what to do."""
    allowed = confined_to()
    is_known = "" if allowed else "a security module forbids it, probably "
    return (
        f"{is_known}AppArmor's profile fusermount3 ({PROFILE}), which allows {', '.join(allowed or _ALLOWED_USUALLY)}:"
        f" mount there, or allow {mountpoint}/ in {LOCAL_PROFILE}"
    )


def allows_others() -> bool:
    """Whether an ordinary user may let others read a mount."""
    try:
        with open(_CONFIGURATION, errors="replace") as f:
            return any(line.strip() == "user_allow_other" for line in f)
    except OSError:
        return False


def escape(value: str) -> str:
    """A value of an option, with what would end it escaped."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _run(*arguments: str | bytes, **more: object) -> None:
    program = shutil.which(PROGRAM) or PROGRAM
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT,
            **more,  # type: ignore[call-overload]
        )
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"{PROGRAM} does not end") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().replace(f"{program}: ", "").replace("\n", "; ")
        code = next((code for text, code in _CODES.items() if text in said), errno.EIO)
        raise OSError(code, f"{PROGRAM}: {said or 'failed'}")


def mount(mountpoint: bytes, options: Iterable[str]) -> int:
    """Mount; the descriptor of /dev/fuse. Raises OSError with what fusermount3 says."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, "LC_ALL": "C", "_FUSE_COMMFD": str(theirs.fileno())}
        _run("-o", ",".join(options), "--", mountpoint, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise OSError(errno.EIO, f"{PROGRAM} mounted and gave no descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: bytes, *, lazy: bool = False) -> None:
    """Unmount what this user has mounted. Raises OSError: EBUSY, EPERM, or EIO with what fusermount3 says."""
    _run("-u", *(["-z"] if lazy else []), "--", mountpoint, env={**os.environ, "LC_ALL": "C"})
