"""Where nodes may be found: a static list, the name service, Slurm's host list, or etcd.

Whatever goes wrong here changes nothing about the nodes that are known: they are greeted all the same. It does not
know which of them live: `membership` does.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from coordlfs.peers import hostlist, settings

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

Addresses = set[tuple[str, int]]
Found = Callable[[Addresses], None]

_RESOLVE_EVERY = 5.0  # seconds
_ASK_SLURM_EVERY, _SLURM_THINKS = 15.0, 10.0  # seconds: its controller is asked by every node of the job
_NODE_LIST = re.compile(r"(?:^|\s)NodeList=([^\s(]+)")
_LEASE = 10  # seconds that etcd keeps a node which says nothing
_RENEW_EVERY = 3.0
_QUIET = 15.0  # seconds without a change after which it is asked whether there was one
_AGAIN_AFTER = 1.0  # seconds after which an etcd that failed is asked again


def static(text: str) -> Addresses:
    """The addresses of HOST:PORT,HOST:PORT…"""
    return {settings.address(entry) for entry in map(str.strip, text.split(",")) if entry}


async def watch(
    config: dict[str, Any], found: Found, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Call `found` with the addresses, now and whenever they change, until cancelled."""
    text: str = config["peers"]
    kind, _, rest = text.partition(":")
    if kind == "dns":
        await _watch_names(settings.address(rest), found, task_status)
    elif kind == "etcd":
        await _watch_etcd(rest, config["name"], found, task_status)
    elif kind == "slurm":
        await _watch_job(int(rest), found, task_status)
    else:
        found(static(text))
        task_status.started()
        await trio.sleep_forever()


# -- Slurm ----------------------------------------------------------------------------------------------------------


async def _watch_job(port: int, found: Found, task_status: trio.TaskStatus[None]) -> None:
    """The hosts of the job: as it began, from the environment; then, where there is scontrol, as it has become."""
    found({(host, port) for host in hostlist.expand(os.environ["SLURM_JOB_NODELIST"])})
    task_status.started()
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or scontrol is None:
        log.info("the hosts of the job are taken for good: there is no %s", "scontrol" if job else "SLURM_JOB_ID")
        await trio.sleep_forever()
    while True:
        await trio.sleep(_ASK_SLURM_EVERY)
        try:
            with trio.fail_after(_SLURM_THINKS):
                done = await trio.run_process([scontrol, "-o", "show", "job", job], capture_stdout=True)
            said = _NODE_LIST.search(done.stdout.decode(errors="replace"))
            if said is None:
                raise ValueError("it names no hosts")  # of a job that waits or has ended
            found({(host, port) for host in hostlist.expand(said[1])})
        except (OSError, ValueError, trio.TooSlowError, subprocess.CalledProcessError) as e:
            log.info("scontrol show job %s: %s", job, e)


# -- the name service -----------------------------------------------------------------------------------------------


async def _watch_names(where: tuple[str, int], found: Found, task_status: trio.TaskStatus[None]) -> None:
    """Every address of a name is a node: a headless service of Kubernetes."""
    started = False
    while True:
        try:
            entries = await trio.socket.getaddrinfo(*where, type=socket.SOCK_STREAM)
        except OSError as e:  # of a service without a node that is ready, too
            log.info("%s cannot be resolved: %s", where[0], e)
        else:
            found({(str(entry[4][0]), where[1]) for entry in entries})
        if not started:
            started = True
            task_status.started()
        await trio.sleep(_RESOLVE_EVERY)


# -- etcd -----------------------------------------------------------------------------------------------------------


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _after(prefix: str) -> str:
    """The end of the range of keys that begin with `prefix`."""
    key = bytearray(prefix.encode())
    key[-1] += 1
    return base64.b64encode(bytes(key)).decode()


def split_url(text: str) -> tuple[str, str]:
    """Where etcd is, and the prefix of the nodes' keys: http://HOST:2379/PREFIX."""
    scheme, _, rest = text.partition("://")
    host, _, prefix = rest.partition("/")
    return f"{scheme}://{host}", f"/{prefix.strip('/') or 'coordlfs'}/"


async def _watch_etcd(text: str, name: str, found: Found, task_status: trio.TaskStatus[None]) -> None:
    """Every node keeps a key with a lease, and watches the others' (etcd's v3 API through its JSON gateway).

    While etcd is away nothing changes; when it is back, keys are written again where their lease has run out.
    """
    import httpx  # of the extra `cluster`

    url, prefix = split_url(text)
    task_status.started()
    timeout = httpx.Timeout(5.0)
    async with httpx.AsyncClient(base_url=url, timeout=timeout) as client, trio.open_nursery() as nursery:
        nursery.start_soon(_keep_key, client, prefix + name)
        while True:
            try:
                async for addresses in _etcd_changes(client, prefix):
                    found(addresses)
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
                log.info("etcd at %s: %r", url, e)
            await trio.sleep(_AGAIN_AFTER)


async def _ask(client: httpx.AsyncClient, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(f"/v3/{verb}", json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


async def _keep_key(client: httpx.AsyncClient, key: str) -> None:
    import httpx

    lease = None
    while True:
        try:
            if lease is not None:
                answer = await _ask(client, "lease/keepalive", {"ID": lease})
                if int(answer["result"].get("TTL", 0)) <= 0:
                    lease = None
            if lease is None:
                new = (await _ask(client, "lease/grant", {"TTL": _LEASE}))["ID"]
                await _ask(client, "kv/put", {"key": _encode(key), "value": "", "lease": new})
                lease = new
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
            log.info("etcd: the key of this node: %r", e)
            lease = None if isinstance(e, httpx.HTTPStatusError) else lease
            await trio.sleep(_AGAIN_AFTER)
        else:
            await trio.sleep(_RENEW_EVERY)


async def _etcd_changes(client: httpx.AsyncClient, prefix: str) -> AsyncIterator[Addresses]:
    """The addresses now, and again after every change. Ends when etcd goes away, or says nothing for a while.

    For of a connection that went dead there is no other sign; then it is asked anew.
    """
    import httpx

    span = {"key": _encode(prefix), "range_end": _after(prefix)}
    answer = await _ask(client, "kv/range", {**span, "keys_only": True})
    yield _addresses(answer, prefix)
    revision = int(answer["header"]["revision"]) + 1
    body = {"create_request": {**span, "start_revision": str(revision)}}
    quiet = httpx.Timeout(5.0, read=_QUIET)
    async with client.stream("POST", "/v3/watch", json=body, timeout=quiet) as response:
        response.raise_for_status()
        lines = response.aiter_lines()
        with suppress(httpx.ReadTimeout, StopAsyncIteration):
            while True:
                result = json.loads(await anext(lines)).get("result", {})
                if result.get("canceled"):  # as its revision is compacted away
                    break
                if "events" in result:
                    # What is there now, and not what the events say: whatever was missed is made good by it.
                    yield _addresses(await _ask(client, "kv/range", {**span, "keys_only": True}), prefix)


def _addresses(answer: dict[str, Any], prefix: str) -> Addresses:
    found: Addresses = set()
    for entry in answer.get("kvs", ()):
        name = base64.b64decode(entry["key"]).decode()[len(prefix) :]
        try:
            found.add(settings.address(name))
        except ValueError:
            log.warning("etcd: %s%s is no address", prefix, name)
    return found
