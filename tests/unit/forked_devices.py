"""Device processes forked from one that has read torch and transformers: a start takes a tenth of a second, not five.

They are processes of their own all the same: they can be killed, and their memory is theirs. Run as a program, this
file is the process that they are forked from.
"""

import contextlib
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from typing import Any, cast

from splitray.runtime.fleet import ProcessFleet
from splitray.topology import Device


class Nursery:
    """The process that device processes are forked from."""

    def __init__(self) -> None:
        self._socket, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen([sys.executable, __file__], stdin=there.fileno())

    def fork(self) -> "Forked":
        """A device process, which waits for its order on stdin."""
        pipes = [os.pipe() for _ in range(3)]
        (order, stdin), (stdout, said), (status, ended) = pipes
        socket.send_fds(self._socket, [b"x"], [order, said, ended])
        for theirs in (order, said, ended):
            os.close(theirs)
        pid = int.from_bytes(self._socket.recv(8), "big")
        return Forked(pid, os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb"), os.fdopen(status, "rb"))

    def close(self) -> None:
        """No more forks."""
        self._socket.close()
        self._process.wait()


class Forked:
    """What a fleet asks of its `subprocess.Popen`."""

    def __init__(
        self, pid: int, stdin: io.BufferedWriter, stdout: io.BufferedReader, status: io.BufferedReader
    ) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._status, self._code = status, cast("int | None", None)

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._status, selectors.EVENT_READ)
                if not ready.select(timeout):
                    raise subprocess.TimeoutExpired("a device process", timeout or 0.0)
            with self._status:
                self._code = int(self._status.read())
        return self._code

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def spawn(nursery: Nursery, fleet: ProcessFleet, device: Device) -> None:
    """In place of `ProcessFleet._spawn`, for devices that sit on this machine and not in a network of their own."""
    order = {
        "device": device.id,
        "token": fleet.token.hex(),
        "host": fleet.host_of(device.id),
        "deadline_s": fleet._deadline_s,
        "threads": fleet._threads,
    }
    processes: dict[str, Any] = fleet._processes
    process = processes[device.id] = nursery.fork()
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()


def _serve(asked: socket.socket) -> None:
    """Fork a device process for each message, and write to its status pipe how it ended."""
    alive: dict[int, int] = {}
    child_ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    with selectors.DefaultSelector() as ready:
        ready.register(asked, selectors.EVENT_READ)
        ready.register(child_ended, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is not asked:
                    os.read(child_ended, 100)
                    _tell(alive)
                    continue
                message, fds, *_ = socket.recv_fds(asked, 1, 3)
                if not message:
                    return
                order, said, ended = fds
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.dup2(order, 0)
                    os.dup2(said, 1)
                    os.closerange(3, 1 + max(*fds, *alive.values(), asked.fileno(), wake, child_ended))
                    os.setsid()
                    _be_a_device()
                alive[pid] = ended
                os.close(order)
                os.close(said)
                asked.send(pid.to_bytes(8, "big"))


def _tell(alive: dict[int, int]) -> None:
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(BrokenPipeError), os.fdopen(alive.pop(pid), "w") as told:
            told.write(str(os.waitstatus_to_exitcode(status)))


def _be_a_device() -> None:
    from splitray.runtime.device.host_process import main

    code = 1
    try:
        main()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401

    import splitray.runtime.device.shard_host  # noqa: F401

    _serve(socket.socket(fileno=os.dup(0)))
