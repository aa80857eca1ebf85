"""How an engine gets its devices: threads of this process (tests), or processes of this machine.

A Fleet only starts and stops ShardHosts and says who died; orders and tensors go over the wire. RayFleet, the third
one, is in actors/fleet.py.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

from splitray.errors import DeviceLost
from splitray.model.state_dict_source import StateDictSource
from splitray.runtime.device.shard_host import ShardHost
from splitray.runtime.wire import Endpoint, new_token
from splitray.runtime.wire.listener import DEADLINE_S
from splitray.topology import Device

_START_S = 60.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Fleet(Protocol):
    """What the engine needs of a fleet."""

    token: bytes

    def start(self, devices: Sequence[Device]) -> dict[str, Endpoint]:
        """Start one ShardHost for each device; returns where they listen.

        Raises:
            DeviceLost: a device did not come up.
        """

    def dead(self) -> dict[str, str]:
        """Devices that have died, each with the reason."""

    def restart(self, device: Device) -> Endpoint:
        """Start a device anew, or one that was not needed so far; returns where it listens now.

        Several are started side by side, each in a thread of its own; whatever is raised counts as a failed try.

        Raises:
            DeviceLost: it does not come up, or the fleet is closed.
        """

    def close(self) -> None:
        """Stop every device; nothing is left running."""


class ThreadFleet:
    """Devices as threads of this process: the same wire and the same code, for tests and the self-test."""

    def __init__(self, *, source: StateDictSource | None = None, deadline_s: float = DEADLINE_S) -> None:
        """`source` gives weights in memory instead of a model folder."""
        self.token = new_token()
        self._source, self._deadline_s = source, deadline_s
        self.hosts: dict[str, ShardHost] = {}
        self._killed: dict[str, str] = {}
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False

    def start(self, devices: Sequence[Device]) -> dict[str, Endpoint]:
        """Start the threads."""
        self._closed = False
        return {device.id: self.restart(device) for device in devices}

    def restart(self, device: Device) -> Endpoint:
        """Start one thread."""
        with self._lock:
            if self._closed:
                raise DeviceLost(f"{device.id}: the fleet is closed")
            before = self.hosts.get(device.id)
            if before is not None:
                before.close()
            host = ShardHost(device.id, token=self.token, deadline_s=self._deadline_s, source=self._source)
            thread = threading.Thread(target=host.serve, name=f"splitray-{device.id}", daemon=True)
            thread.start()
            self.hosts[device.id] = host
            self._killed.pop(device.id, None)
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            return host.endpoint

    def kill(self, device: str) -> None:
        """As if the device's process were killed: it forgets all and its sockets close (tests)."""
        self._killed[device] = "it was killed"
        self.hosts[device].kill()

    def dead(self) -> dict[str, str]:
        """Threads die only where `kill` was asked for."""
        return dict(self._killed)

    def close(self) -> None:
        """Stop and join the threads."""
        with self._lock:
            self._closed = True
        for host in self.hosts.values():
            host.close()
        for thread in self._threads:
            thread.join()
        self.hosts.clear()
        self._threads.clear()


class ProcessFleet:
    """Devices as processes of this machine, each with one torch thread unless told otherwise."""

    def __init__(self, *, threads: int = 1, deadline_s: float = DEADLINE_S, start_s: float = _START_S) -> None:
        """`threads` are the torch and BLAS threads of each process, which may take `start_s` until it listens."""
        self.token, self._start_s = new_token(), start_s
        self._threads, self._deadline_s = threads, deadline_s
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._starting: set[str] = set()
        self._lock, self._closed = threading.Lock(), False

    def start(self, devices: Sequence[Device]) -> dict[str, Endpoint]:
        """Start the processes side by side and wait until each one listens."""
        self._closed = False
        for device in devices:
            self._spawn(device)
        return {device.id: self._endpoint(device.id) for device in devices}

    def restart(self, device: Device) -> Endpoint:
        """Start a new process, in place of one that has ended if there is one."""
        before = self._processes.pop(device.id, None)
        if before is not None:
            before.kill()
            before.wait()
            _close_pipes(before)
        with self._lock:  # so that none is left behind by `close`
            self._spawn(device)
        return self._endpoint(device.id)

    def host_of(self, device: str) -> str:
        """The address on which a device listens."""
        return "127.0.0.1"

    def prefix_of(self, device: str) -> list[str]:
        """What its command begins with (a laboratory puts each device into a network of its own)."""
        return []

    def _spawn(self, device: Device) -> None:
        if self._closed:
            raise DeviceLost(f"{device.id}: the fleet is closed")
        environment = dict(os.environ)
        for name in THREAD_VARIABLES:
            environment[name] = str(self._threads)
        order = {
            "device": device.id,
            "token": self.token.hex(),
            "host": self.host_of(device.id),
            "deadline_s": self._deadline_s,
            "threads": self._threads,
        }
        process = subprocess.Popen(
            [*self.prefix_of(device.id), sys.executable, "-m", "splitray.runtime.device.host_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._processes[device.id] = process
        self._starting.add(device.id)
        assert process.stdin is not None, "stdin is a pipe"
        with contextlib.suppress(BrokenPipeError):  # it has ended already: reading its endpoint says so
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()

    def _endpoint(self, device: str) -> Endpoint:
        process = self._processes[device]
        assert process.stdout is not None, "stdout is a pipe"
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._start_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
            self._starting.discard(device)
        if not line:
            code = process.wait()
            if late.is_set():
                raise DeviceLost(
                    f"{device}: not up after {self._start_s:g} s; a slow machine may need a longer start_s"
                )
            raise DeviceLost(f"{device}: its process ended at start with exit code {code}")
        return Endpoint(*json.loads(line))

    def pid(self, device: str) -> int:
        """Process id of a device."""
        return self._processes[device].pid

    def dead(self) -> dict[str, str]:
        """Processes that ended."""
        codes = {name: p.poll() for name, p in list(self._processes.items())}  # one may be starting
        return {name: f"its process ended with exit code {code}" for name, code in codes.items() if code is not None}

    def close(self) -> None:
        """End the processes: by closing their stdin, then by force."""
        with self._lock:
            self._closed = True
        for process in self._processes.values():
            assert process.stdin is not None, "stdin is a pipe"
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for device in self._starting & self._processes.keys():  # it would hear of it only when it has started
            self._processes[device].kill()
        for process in self._processes.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close_pipes(process)
        self._processes.clear()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "both are pipes"
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
