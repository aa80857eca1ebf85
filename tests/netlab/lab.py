"""Devices in network namespaces of one machine: links that are shaped, cut and restored. Needs the rights of root.

A bridge in a namespace of its own joins all hosts and this process. What a lab makes carries its process id, and only
that is taken down again.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Self

from splitray.runtime.fleet import ProcessFleet

_numbers = itertools.count()


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


class NetLab:
    """One host for each name, 10.77.N.2 and on; this process is 10.77.N.1."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Make the networks; `close` takes them down."""
        number = next(_numbers)
        self._tag, self._net = f"sr{os.getpid() % 100000}{chr(97 + number % 26)}", f"10.77.{number % 200}"
        self.address = f"{self._net}.1"
        self.hosts = {host: f"{self._net}.{i}" for i, host in enumerate(hosts, start=2)}
        self._index = {host: i for i, host in enumerate(hosts, start=2)}
        self._made: list[str] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        bridge = self._space("br")
        _ip(bridge, "link", "add", "br0", "type", "bridge")
        _ip(bridge, "link", "set", "br0", "up")
        _run("ip", "link", "add", self._tag, "type", "veth", "peer", "name", "port1", "netns", bridge)
        _run("ip", "address", "add", f"{self.address}/24", "dev", self._tag)
        _run("ip", "link", "set", self._tag, "up")
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
        return f"{self._tag}-h{self._index[host]}"

    def cut(self, host: str) -> None:
        """Nothing reaches the host or leaves it from now on."""
        _ip(f"{self._tag}-br", "link", "set", self._port(host), "down")

    def restore(self, host: str) -> None:
        """The link is back."""
        _ip(f"{self._tag}-br", "link", "set", self._port(host), "up")

    def shape(self, host: str, bytes_per_s: float) -> None:
        """Limit what a host sends and receives, each."""
        rate = f"{8 * bytes_per_s:.0f}bit"
        for space, device in ((self.space(host), "eth0"), (f"{self._tag}-br", self._port(host))):
            _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "32kb",
                 "latency", "400ms")  # fmt: skip

    def close(self) -> None:
        """Take everything down, and what still runs in it."""
        subprocess.run(["ip", "link", "delete", self._tag], capture_output=True, check=False)
        for space in self._made:
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
            for pid in pids.split():
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        self._made.clear()

    def __enter__(self) -> Self:
        """Use it as a context: it takes itself down."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _space(self, name: str) -> str:
        space = f"{self._tag}-{name}"
        _run("ip", "netns", "add", space)
        self._made.append(space)
        return space

    def _port(self, host: str) -> str:
        return f"port{self._index[host]}"


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
        return ["ip", "netns", "exec", self._lab.space(device)]


def _ip(space: str, *arguments: str) -> None:
    _run("ip", "-n", space, *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
