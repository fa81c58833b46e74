"""How coordlfs' own Python processes are started: they depend on no variable, directory or locale of who starts them.

The modules of another program may lie where `PYTHONPATH` points, or in the working directory. This module is loaded
before it is known that they do not, and so imports nothing but what the interpreter has loaded already.
"""

from __future__ import annotations

import os
import site
import sys

import coordlfs

_FLAGS = ("-E", "-P", "-X", "utf8")  # no PYTHON* variables, no directory of the script, UTF-8 whatever the locale
_HARMLESS = frozenset(
    {"PYTHONDONTWRITEBYTECODE", "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONNOUSERSITE", "PYTHONUNBUFFERED"}
)


def command(module: str) -> list[str]:
    """The beginning of the command line that runs a module of coordlfs."""
    before, last = _places()
    if not before and not last:
        return [sys.executable, *_FLAGS, "-m", module]
    find = (
        "import sys, runpy; at = next((i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)); "
        f"sys.path[at:at] = {before!r}; sys.path += {last!r}; "
    )
    return [sys.executable, *_FLAGS, "-c", f"{find}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


def _places() -> tuple[list[str], list[str]]:
    """Where coordlfs and what it needs are found, if an interpreter that is told nothing might not look there.

    First where its dependencies are installed, as by PYTHONPATH, which are searched before other installations; then
    where only coordlfs is, which is searched last, so that nothing else that lies there hides a module.
    """
    known = {os.path.realpath(path) for path in (*site.getsitepackages(), site.getusersitepackages())}
    found = dict.fromkeys(os.path.realpath(path) for path in sys.path if path or os.path.isdir("."))
    others = [path for path in found if path not in known]
    before = [path for path in others if _holds_dependencies(path)]
    return before, [path for path in others if path == _root() and path not in before]


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.realpath(coordlfs.__file__)))


def _holds_dependencies(path: str) -> bool:
    try:
        return any(entry.partition(".")[0] == "pyfuse3" for entry in os.listdir(path))  # which nobody else has
    except OSError:
        return False


def isolate(module: str) -> None:
    """Go on as a process that depends on nothing inherited, with `module` as its main one, if this one might.

    Standard descriptors that are closed are opened on /dev/null, before anything else takes their numbers.
    """
    was_closed = [fd for fd in range(3) if not _is_open(fd) and _open_nowhere(fd)]
    if was_closed or _listens_to_environment():
        sys.stdout and sys.stdout.flush()
        os.execve(sys.executable, [*command(module), *sys.argv[1:]], environment())
    _forget_working_directory()


def environment() -> dict[str, str]:
    """The variables that this process was given: an interpreter in the C locale adds one for its children."""
    variables = dict(os.environ)
    if variables.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        try:
            with open("/proc/self/environ", "rb") as f:
                if not any(variable.startswith(b"LC_CTYPE=") for variable in f.read().split(b"\0")):
                    del variables["LC_CTYPE"]
        except OSError:
            pass
    return variables


def _listens_to_environment() -> bool:
    if sys.flags.ignore_environment:
        return False
    set_ = {name for name in os.environ if name.startswith("PYTHON") and not name.startswith("PYTHON_")}
    return bool(set_ - _HARMLESS) or sys.getfilesystemencoding() != "utf-8"


def _forget_working_directory() -> None:
    """Where `python -m` put it first, import nothing from it that can be found elsewhere."""
    if sys.flags.safe_path or not sys.path:
        return
    first = os.path.realpath(sys.path[0]) if sys.path[0] or os.path.isdir(".") else ""
    place = _root()
    del sys.path[0]
    if place == first:
        sys.path.append(place)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_nowhere(fd: int) -> bool:
    """Open /dev/null with the number `fd`, the lowest that is free; whether that could be done."""
    try:
        opened = os.open(os.devnull, os.O_RDWR)
    except OSError:
        return False
    if opened == fd:
        os.set_inheritable(fd, True)
        return True
    os.close(opened)
    return False
