"""A command with a wrapper around it that nobody notices: signals, stops and the end are the command's own.

The command stays in the wrapper's process group, as a shell would have it. So what is sent to the group, by a terminal,
a shell or a batch system, reaches the command without the wrapper's doing, and what is sent to the wrapper alone must
be passed on. A signal does not tell which of these it was. Therefore a witness, a process of the same group that
does nothing, is asked whether it has got the signal as well. It knows nothing of mounts.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress

from coordlfs.errors import UserError
from coordlfs.kernel import process
from coordlfs.processes.interpreter import environment

_ALL = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_GRACE = 0.02  # seconds that whoever sends a signal to one process after the other may take
_ANSWER = 1.0  # seconds that the witness is waited for, which may be stopped
_LOOK_EVERY = 0.1  # seconds between looks of the witness whether a command that was stopped goes on


class Witness:
    """A process of the wrapper's group that says which signals have reached it."""

    def __init__(self) -> None:
        self._seen: Counter[int] = Counter()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = 0
        wrapper = os.getpid()
        with theirs, suppress(OSError):  # without room for another process, all is passed on
            self.pid = os.fork()
            if not self.pid:
                try:
                    self._sock.close()
                    _testify(theirs, wrapper)
                finally:
                    os._exit(0)
        self._sock.settimeout(_ANSWER)

    def has_seen(self, number: int) -> bool:
        """Whether a signal that reached the wrapper was sent to the witness as well."""
        if not self._seen[number]:
            time.sleep(_GRACE)
            with suppress(OSError):
                self._sock.send(b"?")
                self._seen.update(self._sock.recv(1 << 16))
        if self._seen[number]:
            self._seen[number] -= 1
            return True
        return False

    def forget(self) -> None:
        """Nothing that it has seen is on its way to the wrapper any more."""
        self._seen.clear()

    def wake_me_with(self, pid: int) -> None:
        """Have this process, which is about to stop, go on when the process `pid` does, or ends."""
        with suppress(OSError):
            self._sock.send(b"%d" % pid)

    def end(self) -> None:
        """End the process."""
        self._sock.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _testify(asked: socket.socket, wrapper: int) -> None:
    """The witness: all signals stay pending until it is asked."""
    process.end_with_parent(wrapper, signal.SIGKILL)
    process.disguise("clfs-witness")
    for fd in range(3):  # whoever reads what the command writes must not wait for this process
        os.close(fd)
    while question := asked.recv(64):
        if question == b"?":
            seen = bytearray()
            while (found := signal.sigtimedwait(_ALL, 0)) is not None:
                seen.append(found.si_signo)
            asked.send(bytes(seen) or b"\0")
        else:
            while process.is_stopped(wrapper) is not True and process.is_stopped(int(question)):
                time.sleep(_LOOK_EVERY / 10)  # it is about to
            while process.is_stopped(wrapper) and process.is_stopped(int(question)):
                time.sleep(_LOOK_EVERY)
            if process.is_stopped(wrapper):
                os.kill(wrapper, signal.SIGCONT)


def call(command: list[str], inherited: process.Inherited) -> int:
    """Run a command in a process that blocks all signals; its exit status, 128 + number if a signal ended it."""
    witness = Witness()
    try:
        child = _start(command, inherited)
        while True:
            info = signal.sigwaitinfo(_ALL)
            number = info.si_signo
            if number == signal.SIGCHLD:
                found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
                if found is not None and found.si_code != os.CLD_STOPPED:
                    break
                if found is not None:
                    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG)
                    witness.wake_me_with(child.pid)
                    _stop(found.si_status)
            elif info.si_pid != witness.pid and not witness.has_seen(number):
                child.send_signal(number)
            if not signal.sigpending():
                witness.forget()
        status = child.wait()
        return status if status >= 0 else 128 - status
    finally:
        witness.end()


def _start(command: list[str], inherited: process.Inherited) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, preexec_fn=inherited.restore, env=environment())
    except OSError as e:
        # EACCES may be of a directory of PATH only.
        absent = e.errno == errno.ENOENT or ("/" not in command[0] and shutil.which(command[0]) is None)
        why = os.strerror(errno.ENOENT) if absent else e.strerror
        raise UserError(f"{command[0]} cannot be run: {why}", 127 if absent else 126) from None


def _stop(number: int) -> None:
    """Stop as the command did, until this process is told to go on."""
    if number != signal.SIGSTOP:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # here it stops
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    else:
        os.kill(os.getpid(), signal.SIGSTOP)


def block_signals() -> None:
    """Keep what comes until there is a command to pass it on to, but for what ends this process before."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ALL - {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD})


def block_all_signals() -> None:
    """From now on signals are the command's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
