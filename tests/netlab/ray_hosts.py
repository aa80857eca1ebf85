"""A Ray cluster over the hosts of a laboratory: a raylet of its own on each, and a program with an engine on it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from lab import NetLab

_START_S = 150.0  # an idle machine needs ten, a busy one has needed sixty
_END_S = 30.0
_PORT = 6379  # every host has all ports of its own
_STARTED = "Ray runtime started"
_DRIVER = Path(__file__).with_name("ray_driver.py")


class RayHosts:
    """A Ray node on each host, which offers one resource of the host's name; the first host is the head."""

    def __init__(self, lab: NetLab) -> None:
        """Start the nodes; `close` ends them, and the lab whatever it leaves."""
        self._lab, self._nodes = lab, dict[str, subprocess.Popen[bytes]]()
        self._folder = Path(tempfile.mkdtemp(prefix="l-", dir="/tmp"))  # Ray's socket paths have to stay short
        self.head, *others = lab.hosts
        self.address = f"{lab.hosts[self.head]}:{_PORT}"
        try:
            for host in (self.head, *others):
                self.start(host)
        except BaseException:
            self.close()
            raise

    def start(self, host: str) -> None:
        """Start a host's node, also one that was killed."""
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix=host[0]))
        role = ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        command = [*self._lab.prefix(host), sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += role if host == self.head else [f"--address={self.address}"]
        command += [f"--node-ip-address={self._lab.hosts[host]}", f"--temp-dir={folder}", "--num-cpus=1"]
        command += [f"--resources={json.dumps({host: 1})}", "--object-store-memory=80000000"]
        command += ["--include-log-monitor=false", "--disable-usage-stats"]
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_agent_register_timeout_ms": "300000"}
        path, give_up = folder / "log", time.monotonic() + _START_S
        with path.open("wb") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._nodes[host] = node
        while _STARTED not in (said := path.read_text(errors="replace")):
            if node.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the node on {host} did not start:\n{said}")
            time.sleep(0.1)

    def kill(self, host: str) -> None:
        """As if the host's power went: raylet, workers and all."""
        self._lab.kill(host)
        self._nodes.pop(host).wait()

    def close(self) -> None:
        """End the nodes and remove their files."""
        for host in list(self._nodes):
            self.kill(host)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Use it as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Driver:
    """The program on the head that has the engine (`ray_driver.py`). Times are this machine's monotonic seconds."""

    def __init__(self, lab: NetLab, head: str) -> None:
        """Start the program, which takes a while to read its modules."""
        command = [*lab.prefix(head), sys.executable, "-W", "ignore", str(_DRIVER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, address: str) -> None:
        """Start the engine, on a cluster that has both devices' hosts."""
        self._asked("start", address=address)

    def run(self, **sampling: Any) -> Iterator[tuple[int, float]]:
        """Tokens of a run, and when each came."""
        self._order("run", sampling)
        while (told := self._told()) is not None:
            yield told[0], told[1]

    def faults(self) -> list[dict[str, Any]]:
        """What happened since this was asked last."""
        return self._asked("faults")

    def pids(self) -> dict[str, int]:
        """The processes of the devices that the placement uses now."""
        return self._asked("pids")

    def round_trips_s(self, *, size: int, rounds: int) -> list[float]:
        """Between the two devices."""
        return self._asked("echo", size=size, rounds=rounds)

    def close(self) -> None:
        """Let it close the engine, and wait for its end."""
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        """Use it as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, op: str, **values: Any) -> Any:
        self._order(op, values)
        return self._told()

    def _order(self, op: str, values: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        print(json.dumps([op, values]), file=self._process.stdin, flush=True)

    def _told(self) -> Any:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the driver has ended with exit code {self._process.wait(_END_S)}")
        return json.loads(line)
