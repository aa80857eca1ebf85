"""One device as a plain class: a ShardHost that serves in a thread. EdgeActor and CloudActor make Ray actors of it.

Ray carries orders about life and death only: where the device listens, whether it lives, that it should stop.
"""

import os
import socket
import threading
from dataclasses import dataclass

import ray

from splitray.runtime.wire import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a device sits: its Ray node and its process there."""

    node_id: str
    node_ip: str
    hostname: str
    pid: int


class DeviceHost:
    """Serves one device from its construction until `stop`, or until its process ends."""

    def __init__(self, device: str, *, token: bytes, threads: int, deadline_s: float) -> None:
        """Start listening on the node's own address; `token` is the fleet's secret."""
        # Ray starts workers with one OpenMP thread or with the node's setting: this device has its own. It counts
        # because torch is imported only now; a runtime_env would do the same for a second more of start.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(threads)
        import torch

        from splitray.runtime.device.shard_host import ShardHost

        torch.set_num_threads(threads)
        address = ray.util.get_node_ip_address()
        self._host = ShardHost(device, token=token, host=address, deadline_s=deadline_s)
        self._serving = threading.Thread(target=self._host.serve, name=f"splitray-{device}", daemon=True)
        self._serving.start()

    def endpoint(self) -> Endpoint:
        """Where the engine and the other devices reach this one."""
        return self._host.endpoint

    def ping(self) -> Seat:
        """Answer, and say from where."""
        return Seat(
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            hostname=socket.gethostname(),
            pid=os.getpid(),
        )

    def until_stopped(self) -> None:
        """Return when the device no longer serves. A caller that holds this pending call learns of its death."""
        self._serving.join()

    def stop(self) -> None:
        """Stop serving and free the sockets."""
        self._host.close()
        self._serving.join()
