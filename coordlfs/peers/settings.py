"""What `--listen`, `--peers` and the rest say, checked before anything is mounted.

It speaks to no node.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from coordlfs.errors import UserError
from coordlfs.peers import hostlist
from coordlfs.peers.connection import Credentials

_SHORTEST_KEY = 16  # bytes
_OWN_KEY = "loopback.key"
_OF_ROOT = "/run/coordlfs"
_OPEN_TO_OTHERS = 0o066  # who writes to a key knows it as well as who reads it
_BACKLOG = 512


@dataclass(frozen=True, slots=True)
class Cluster:
    """The options of a node that shares its cache, as they were given."""

    listen: str | None = None
    peers: str | None = None
    key_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, or [HOST]:PORT for IPv6. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def read_key(path: str) -> bytes:
    """A key. Raises OSError."""
    with open(path, "rb") as f:
        return f.read(1 << 16).strip()


def credentials(config: dict[str, Any]) -> Credentials:
    """What `prepare` found, read again. Raises OSError; UserError as `loopback_key` does."""
    try:
        key = read_key(config["key_file"])
    except FileNotFoundError:
        if not config["own_key"]:
            raise
        key = read_key(loopback_key())  # XDG_RUNTIME_DIR goes when the user logs out, and the mount stays
    return Credentials(key, config["tls_cert"], config["tls_key"], config["tls_ca"])


# -- the key of a node that is given none ---------------------------------------------------------------------------


def loopback_key() -> str:
    """The path of the key with which this user's nodes on this machine know each other; made if there is none.

    Anybody on the machine may connect over loopback, so it takes a key there, too. Raises UserError.
    """
    why = ""
    for directory in _key_directories():
        path = os.path.join(directory, _OWN_KEY)
        try:
            _make_directory(directory)
            try:
                _check_own_key(path)
            except FileNotFoundError:
                _make_key(path)
                _check_own_key(path)
        except OSError as e:
            why = f"{path}: {e.strerror}"
        else:
            return path
    raise UserError(f"there is no place for a key of this user ({why}): give --cluster-key-file FILE")


def _key_directories() -> Iterator[str]:
    """Where the key may lie; the first where it can be made counts."""
    user = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if user == 0:  # whose environment may be that of who called sudo
        yield _OF_ROOT
    elif os.path.isabs(runtime):
        with suppress(OSError):
            if os.stat(runtime).st_uid == user:
                yield os.path.join(runtime, "coordlfs")
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        yield os.path.join(home, ".cache", "coordlfs")
    yield f"/tmp/coordlfs-{user}"  # of users without a home, as services are


def _make_directory(path: str) -> None:
    """Make a directory, and the one that it is in. Raises OSError; UserError if somebody else may write to it."""
    for made in (os.path.dirname(path), path):
        with suppress(FileExistsError):
            os.mkdir(made, 0o700)
    st = os.lstat(path)
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid() or st.st_mode & 0o022:
        raise UserError(f"{path} is not a directory of this user alone: remove it, or give --cluster-key-file FILE")


def _make_key(path: str) -> None:
    """Make a key, unless somebody has just done so; whoever sees it sees all of it. Raises OSError."""
    new = f"{path}.{os.urandom(8).hex()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as f:
            f.write(os.urandom(32).hex().encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())  # or after a crash it may be empty, and refused
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.unlink(new)


def _check_own_key(path: str) -> None:
    """See that nobody else can know a key that was made here. Raises OSError; UserError if somebody may."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as f:
        st = os.fstat(fd)
        wrong = None
        if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid():
            wrong = "is not a file of this user"
        elif st.st_mode & _OPEN_TO_OTHERS:
            wrong = "may be read by others"
        elif (found := len(f.read(1 << 16).strip())) < _SHORTEST_KEY:
            wrong = f"holds {found} bytes"
    if wrong:
        raise UserError(f"{path} {wrong}: remove it, and another is made, or give --cluster-key-file FILE")


# -- checks ---------------------------------------------------------------------------------------------------------


def _check_key(path: str) -> None:
    try:
        key = read_key(path)
        mode = os.stat(path).st_mode
    except OSError as e:
        raise UserError(f"--cluster-key-file {path} cannot be read: {e.strerror}") from None
    if len(key) < _SHORTEST_KEY:
        raise UserError(f"--cluster-key-file {path} holds {len(key)} bytes: make a key with `openssl rand -hex 32`")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise UserError(f"--cluster-key-file {path} may be read by others: `chmod 600 {path}`")


def _check_peers(text: str) -> None:
    kind, colon, rest = text.partition(":")
    if kind == "etcd" and rest.startswith(("http://", "https://")):
        if importlib.util.find_spec("httpx") is None:
            raise UserError(f"--peers {text} needs httpx: `pip install coordlfs[cluster]`")
        return
    if kind == "slurm" and not os.environ.get("SLURM_JOB_NODELIST"):
        raise UserError(f"--peers {text}: there is no SLURM_JOB_NODELIST: mount from within the job")
    if kind == "slurm":
        try:
            hostlist.expand(os.environ["SLURM_JOB_NODELIST"])
        except ValueError as e:
            raise UserError(f"--peers {text}: SLURM_JOB_NODELIST: {e}") from None
    try:
        if kind == "dns" and rest:
            address(rest)
        elif kind == "slurm" and colon:
            address("host:" + rest)
        else:
            for entry in filter(None, map(str.strip, text.split(","))):
                address(entry)
    except ValueError:
        raise UserError(
            f"--peers {text}: give HOST:PORT,HOST:PORT…, dns:NAME:PORT, slurm:PORT or etcd:URL/PREFIX", 2
        ) from None


def _static(text: str) -> list[str]:
    """The entries of a static list; none if it is another kind."""
    if text.partition(":")[0] in ("dns", "slurm", "etcd"):
        return []
    return [entry for entry in map(str.strip, text.split(",")) if entry]


def _check_loopback(text: str) -> None:
    """See that no other machine is named, for a node whose key only this one has."""
    for entry in _static(text):
        with suppress(ValueError):  # a name
            if not ipaddress.ip_address(address(entry)[0]).is_loopback:
                raise UserError(
                    f"--peers {text}: {entry} is not on this machine: give --cluster-key-file FILE, the same on all", 2
                )


def _listen(text: str, have_key: bool) -> socket.socket:
    try:
        host, port = address(text)
    except ValueError as e:
        raise UserError(f"--listen: {e}", 2) from None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise UserError(f"--listen {text}: {e.strerror}") from None
    if not have_key and not ipaddress.ip_address(where[0]).is_loopback:
        raise UserError(
            f"--listen {text} is open to others: give --cluster-key-file FILE, or listen on 127.0.0.1:{port}", 2
        )
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(_BACKLOG)
    except OSError as e:
        sock.close()
        raise UserError(f"--listen {text}: {e.strerror}") from None
    return sock


def is_local(where: tuple[str, int], port: int) -> bool:
    """Whether an address is one of this machine's (of this network namespace's), and the port is `port`."""
    if where[1] != port:
        return False
    with suppress(OSError):
        for family, kind, protocol, _, found in socket.getaddrinfo(*where, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                try:
                    probe.bind((found[0], 0))
                except OSError:
                    continue
                return True
    return False


def _name(cluster: Cluster, port: int) -> str:
    """The name by which all nodes know this one: its entry in the static list, else its host's name and port."""
    assert cluster.listen is not None
    for entry in _static(cluster.peers or ""):
        if is_local(address(entry), port):
            return entry
    host, _ = address(cluster.listen)
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
    return f"{host}:{port}"


def prepare(cluster: Cluster) -> tuple[dict[str, Any], socket.socket]:
    """The node's configuration and its listening socket. Raises UserError."""
    if cluster.peers is None:
        raise UserError("--listen, --cluster-key-file and --tls-… go with --peers, which names the other nodes", 2)
    if cluster.listen is None:
        raise UserError("--peers needs --listen HOST:PORT, where the others reach this node", 2)
    _check_peers(cluster.peers)
    tls = (cluster.tls_cert, cluster.tls_key, cluster.tls_ca)
    if any(tls) and not all(tls):
        raise UserError("--tls-cert, --tls-key and --tls-ca go together", 2)
    if cluster.key_file is None:
        _check_loopback(cluster.peers)
    else:
        _check_key(cluster.key_file)
    if any(tls):
        try:
            Credentials(b"", *tls).context(server=True)
        except OSError as e:
            raise UserError(f"--tls-cert, --tls-key, --tls-ca: {e.strerror or e}") from None
    sock = _listen(cluster.listen, cluster.key_file is not None)
    try:
        key_file = loopback_key() if cluster.key_file is None else cluster.key_file
    except UserError:
        sock.close()
        raise
    absolute = [os.path.abspath(path) if path else None for path in (key_file, *tls)]
    port = sock.getsockname()[1]
    config = {
        "name": _name(cluster, port),
        "port": port,
        "peers": cluster.peers,
        "listener": sock.fileno(),
        "own_key": cluster.key_file is None,
        **dict(zip(("key_file", "tls_cert", "tls_key", "tls_ca"), absolute, strict=True)),
    }
    return config, sock
