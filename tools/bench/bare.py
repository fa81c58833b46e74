"""The least that getting a file from another node takes in Python: request, `sendfile`, `recv`. `python FILE ROLE …`.

`serve ROOT HOST PORT` serves; `fetch HOST PORT THREADS` reads names from standard input, gets every one of them once,
and prints files, bytes and seconds as JSON. No checks, no versions, no time limits: peer hits are measured against it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time

_LENGTH = struct.Struct("!Q")
_REQUEST = struct.Struct("!H")


def _serve(root: str, host: str, port: int) -> None:
    directory = os.open(root, os.O_RDONLY)
    listener = socket.create_server((host, port))
    print("ready", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_answer, args=(sock, directory), daemon=True).start()


def _answer(sock: socket.socket, directory: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := sock.recv(4096):
        fd = os.open(request[_REQUEST.size :], os.O_RDONLY, dir_fd=directory)
        size = os.fstat(fd).st_size
        sock.sendall(_LENGTH.pack(size), socket.MSG_MORE)
        at = 0
        while at < size:
            at += os.sendfile(sock.fileno(), fd, at, size - at)
        os.close(fd)


def _fetch(host: str, port: int, threads: int) -> None:
    names = sys.stdin.read().split("\n")
    total = [0] * threads

    def work(number: int) -> None:
        sock = socket.create_connection((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        into, head = memoryview(bytearray(1 << 20)), bytearray(_LENGTH.size)
        for name in names[number::threads]:
            encoded = name.encode()
            sock.sendall(_REQUEST.pack(len(encoded)) + encoded)
            sock.recv_into(head, 0, socket.MSG_WAITALL)
            (size,) = _LENGTH.unpack(head)
            total[number] += sock.recv_into(into[:size], 0, socket.MSG_WAITALL)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(json.dumps({"files": len(names), "bytes": sum(total), "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        _fetch(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
