"""Ray nodes as process trees of this machine: each with its own raylet, address, resources and folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_START_S = 150.0  # an idle machine needs ten, a busy one has needed sixty
_END_S = 10.0
_STARTED = "Ray runtime started"


class RayNodes:
    """A head and its workers on addresses of the loopback network; ended by process id, never by `ray stop`."""

    def __init__(self, resources: Sequence[Mapping[str, float]], *, first_host: int = 11) -> None:
        """Start one node for each entry; the first is the head. Clusters side by side need hosts of their own."""
        self.hosts = [f"127.0.0.{first_host + i}" for i in range(len(resources))]
        self._folder = Path(tempfile.mkdtemp(prefix="n-", dir="/tmp"))  # Ray's socket paths have to stay short
        self._nodes: list[subprocess.Popen[bytes]] = []
        with socket.create_server((self.hosts[0], 0)) as probe:
            self.address = f"{self.hosts[0]}:{probe.getsockname()[1]}"
        head = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
        try:
            self._start(0, head, resources[0])
            self._wait(0)
            for i, offered in enumerate(resources[1:], start=1):
                self._start(i, [f"--address={self.address}"], offered)
            for i in range(1, len(resources)):
                self._wait(i)
        except BaseException:
            self.close()
            raise

    def add(self, resources: Mapping[str, float]) -> int:
        """Start one more node on an address of its own; returns the process id of its `ray start`."""
        index = len(self._nodes)
        self.hosts.append(f"{self.hosts[-1].rpartition('.')[0]}.{int(self.hosts[-1].rpartition('.')[2]) + 1}")
        self._start(index, [f"--address={self.address}"], resources)
        self._wait(index)
        return self._nodes[index].pid

    def _start(self, index: int, arguments: list[str], resources: Mapping[str, float]) -> None:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_agent_register_timeout_ms": "300000",
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),  # its workers import the tests' own actors
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += [f"--node-ip-address={self.hosts[index]}", f"--temp-dir={self._folder / str(index)}"]
        command += ["--num-cpus=2", f"--resources={json.dumps(resources)}", "--object-store-memory=80000000"]
        command += ["--include-log-monitor=false", "--disable-usage-stats"]
        with self._log(index).open("wb") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._nodes.append(node)

    def _wait(self, index: int) -> None:
        give_up = time.monotonic() + _START_S
        while _STARTED not in (said := self._log(index).read_text(errors="replace")):
            if self._nodes[index].poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"node {index} did not start:\n{said}")
            time.sleep(0.1)

    def _log(self, index: int) -> Path:
        return self._folder / f"{index}.log"

    def close(self) -> None:
        """End all processes of all nodes and remove their files."""
        trees = [t for node in self._nodes for t in _tree(node.pid)]
        for node in self._nodes:
            node.send_signal(signal.SIGTERM)  # `ray start --block` takes its own processes with it
        _, left = psutil.wait_procs(trees, timeout=_END_S)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=_END_S)
        for node in self._nodes:
            node.wait()
        self._nodes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
