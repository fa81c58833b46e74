"""A link that takes its time: TCP connections relayed to another port, each byte some seconds later.

`python -m coordlfs_tools.lab.relay PORT TARGET SECONDS` relays from a port to another, both of loopback, and prints a
line when it listens. For kernels without netem. It knows nothing of what is carried.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from coordlfs_tools.lab.errors import LabError

_AT_ONCE = 1 << 20


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Carry one direction of a connection, and its end."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not data:
                break
            writer.write(data)
            await writer.drain()
        writer.close()

    async def take() -> None:
        data = b"-"
        while data:
            data = b""
            with suppress(OSError):
                data = await reader.read(_AT_ONCE)
            queue.put_nowait((time.monotonic() + delay, data))

    with suppress(OSError):
        await asyncio.gather(take(), deliver())


async def _relay(port: int, target: int, delay: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_carry(reader, back, delay), _carry(there, writer, delay))

    async with await asyncio.start_server(connected, "127.0.0.1", port) as server:
        print(flush=True)
        await server.serve_forever()


@contextmanager
def relayed(port: int, target: int, delay: float) -> Iterator[None]:
    """For the length of a `with`, what connects to `port` reaches `target`, `delay` seconds later each way."""
    command = [sys.executable, "-m", __name__, str(port), str(target), str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise LabError(f"the relay to port {target} did not start")
        yield
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    asyncio.run(_relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
