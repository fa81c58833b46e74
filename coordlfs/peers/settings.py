"""What `--listen`, `--peers` and the rest say, checked before anything is mounted."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from coordlfs.errors import UserError
from coordlfs.peers import hostlist
from coordlfs.peers.connection import Credentials

_SHORTEST_KEY = 16  # bytes
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


def read_key(path: str | None) -> bytes:
    """The cluster's key; empty if there is none. Raises OSError."""
    if path is None:
        return b""
    with open(path, "rb") as f:
        return f.read(1 << 16).strip()


def credentials(config: dict[str, Any]) -> Credentials:
    """What `prepare` found, read again. Raises OSError."""
    return Credentials(read_key(config["key_file"]), config["tls_cert"], config["tls_key"], config["tls_ca"])


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
    if cluster.peers and cluster.peers.partition(":")[0] not in ("dns", "slurm", "etcd"):
        for entry in filter(None, map(str.strip, cluster.peers.split(","))):
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
    if cluster.key_file is not None:
        _check_key(cluster.key_file)
    if any(tls):
        try:
            Credentials(b"", *tls).context(server=True)
        except OSError as e:
            raise UserError(f"--tls-cert, --tls-key, --tls-ca: {e.strerror or e}") from None
    sock = _listen(cluster.listen, cluster.key_file is not None)
    absolute = [os.path.abspath(path) if path else None for path in (cluster.key_file, *tls)]
    port = sock.getsockname()[1]
    config = {
        "name": _name(cluster, port),
        "port": port,
        "peers": cluster.peers,
        "listener": sock.fileno(),
        **dict(zip(("key_file", "tls_cert", "tls_key", "tls_ca"), absolute, strict=True)),
    }
    return config, sock
