"""Hosts in network namespaces of one machine: links that are cut, restored, shaped, late. Needs the rights of root.

A bridge in a namespace of its own joins all hosts and this process. What a lab makes carries its process id, and only
that is taken down again. It knows nothing of what runs on a host.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from splitray.runtime.fleet import ProcessFleet
from splitray.sim.traces import Trace

_numbers = itertools.count()
_RELAY = Path(__file__).with_name("relay.py")


def why_not() -> str | None:
    """Why there can be no laboratory here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need the rights of root"
    missing = [c for c in ("ip", "tc") if shutil.which(c) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: apt-get install iproute2)"
    name = f"sr{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespace can be made here: {done.stderr.strip()}"
    _run("ip", "netns", "delete", name)
    return None


def why_no_relay() -> str | None:
    """Why nothing can be late or lost here, or None."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"delay and loss need TAP devices: {error}"
    return None


class NetLab:
    """One host for each name, 10.77.N.2 and on; this process is 10.77.N.1."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Make the networks; `close` takes them down."""
        number = os.getpid() + next(_numbers)  # laboratories side by side have networks of their own
        self.tag, self._net = f"sr{os.getpid() % 100000}{chr(97 + number % 26)}", f"10.77.{number % 200}"
        self.address = f"{self._net}.1"
        self.hosts = {host: f"{self._net}.{i}" for i, host in enumerate(hosts, start=2)}
        self._index = {host: i for i, host in enumerate(hosts, start=2)}
        self._made: list[str] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    @property
    def _bridge(self) -> str:
        return f"{self.tag}-br"

    def _build(self) -> None:
        bridge = self._space("br")
        _ip(bridge, "link", "add", "br0", "type", "bridge")
        _ip(bridge, "link", "set", "br0", "up")
        _run("ip", "link", "add", self.tag, "type", "veth", "peer", "name", "port1", "netns", bridge)
        _run("ip", "address", "add", f"{self.address}/24", "dev", self.tag)
        _run("ip", "link", "set", self.tag, "up")
        _ip(bridge, "link", "set", "port1", "master", "br0", "up")
        for host, address in self.hosts.items():
            space, port = self._space(f"h{self._index[host]}"), self._port(host)
            _run("ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", bridge)
            _ip(bridge, "link", "set", port, "master", "br0", "up")
            _ip(space, "link", "set", "lo", "up")
            _ip(space, "address", "add", f"{address}/24", "dev", "eth0")
            _ip(space, "link", "set", "eth0", "up")
            _ip(space, "route", "add", "default", "via", self.address)

    def space(self, host: str) -> str:
        """The namespace of a host."""
        return f"{self.tag}-h{self._index[host]}"

    def prefix(self, host: str) -> list[str]:
        """What the command of a process on the host begins with."""
        return _inside(self.space(host))

    def cut(self, host: str) -> None:
        """Nothing reaches the host or leaves it from now on."""
        _ip(self._bridge, "link", "set", self._port(host), "down")

    def restore(self, host: str) -> None:
        """The link is back."""
        _ip(self._bridge, "link", "set", self._port(host), "up")

    def shape(self, host: str, bytes_per_s: float) -> None:
        """Limit what a host sends and receives, each."""
        rate = f"{8 * bytes_per_s:.0f}bit"
        for space, device in self._ends(host):
            _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "32kb",
                 "latency", "400ms")  # fmt: skip

    def free(self, host: str) -> None:
        """As fast as it was before `shape`."""
        for space, device in self._ends(host):
            _run("tc", "-n", space, "qdisc", "delete", "dev", device, "root")

    @contextlib.contextmanager
    def following(self, host: str, trace: Trace) -> Iterator[None]:
        """Shape a host's link as a trace of byte/s says; its last value holds, and zero is an outage."""
        over, began = threading.Event(), time.monotonic()

        def follow() -> None:
            for at_s, rate in zip(trace.time_s, trace.value, strict=True):
                if over.wait(max(0.0, began + at_s - time.monotonic())):
                    return
                if rate:
                    self.shape(host, rate)
                    self.restore(host)
                else:
                    self.cut(host)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.restore(host)
            self.free(host)

    @contextlib.contextmanager
    def far(self, host: str, *, delay_s: float, loss: float = 0.0, seed: int = 0) -> Iterator[None]:
        """Let every frame to and from a host come later, and some not at all: its port is behind a relay for a while.

        Addresses and connections stay.
        """
        port, (here, there), behind = (
            self._port(host),
            (f"{self._port(host)}{x}" for x in "ab"),
            f"br{self._index[host]}",
        )
        command = [*_inside(self._bridge), sys.executable, str(_RELAY), here, there, f"{delay_s}", f"{loss}", f"{seed}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as relay:
            try:
                assert relay.stdout is not None and relay.stdout.readline(), "the relay has begun"
                _ip(self._bridge, "link", "add", behind, "type", "bridge")
                _ip(self._bridge, "link", "set", behind, "up")
                _ip(self._bridge, "link", "set", here, "master", "br0", "up")
                _ip(self._bridge, "link", "set", there, "master", behind, "up")
                _ip(self._bridge, "link", "set", port, "master", behind)
                yield
            finally:
                relay.kill()
                _ip(self._bridge, "link", "set", port, "master", "br0")
                _ip(self._bridge, "link", "delete", behind)

    def pids(self, host: str) -> list[int]:
        """The processes on a host."""
        return _pids(self.space(host))

    def kill(self, host: str) -> None:
        """End every process on a host at once, those that they start meanwhile too."""
        _kill(self.space(host))

    def close(self) -> None:
        """Take everything down, and what still runs in it."""
        subprocess.run(["ip", "link", "delete", self.tag], capture_output=True, check=False)
        for space in self._made:
            _kill(space)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        self._made.clear()

    def left(self) -> list[str]:
        """What there still is of the lab: nothing after `close`."""
        spaces, links = (
            subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
            for what in (("netns", "list"), ("-o", "link"))
        )
        return [line for line in (*spaces.splitlines(), *links.splitlines()) if self.tag in line]

    def __enter__(self) -> Self:
        """Use it as a context: it takes itself down."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _space(self, name: str) -> str:
        space = f"{self.tag}-{name}"
        _run("ip", "netns", "add", space)
        self._made.append(space)
        return space

    def _port(self, host: str) -> str:
        return f"port{self._index[host]}"

    def _ends(self, host: str) -> list[tuple[str, str]]:
        return [(self.space(host), "eth0"), (self._bridge, self._port(host))]


class NetFleet(ProcessFleet):
    """Device processes, each on a host of a laboratory."""

    def __init__(self, lab: NetLab) -> None:
        """`lab` has a host for each device."""
        super().__init__()
        self._lab = lab

    def host_of(self, device: str) -> str:
        """Its address in the laboratory."""
        return self._lab.hosts[device]

    def prefix_of(self, device: str) -> list[str]:
        """Its network namespace."""
        return self._lab.prefix(device)


def _inside(space: str) -> list[str]:
    return ["ip", "netns", "exec", space]


def _pids(space: str) -> list[int]:
    told = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in told.split()]


def _kill(space: str) -> None:
    while pids := _pids(space):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _ip(space: str, *arguments: str) -> None:
    _run("ip", "-n", space, *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
