"""This process's way into a Ray cluster: the one it is in, a running one, or one of its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from typing import ClassVar

import psutil
import ray

from splitray.errors import DeviceLost
from splitray.local_ray import join, own_sigterm
from splitray.ray_address import LOCAL, running_cluster
from splitray.scratch import scratch_folder

_ANSWER_S = 5.0
_OBJECT_STORE_BYTES = 100 * 1024**2  # Ray carries no tensors here


class Membership:
    """Being in a cluster. Connections that this process opened itself end with the last membership that uses them."""

    # Of the whole process, as Ray's connection is.
    _lock: ClassVar = threading.Lock()
    _sharers: ClassVar[list[Membership]] = []
    _local_dir: ClassVar[contextlib.ExitStack | None] = None

    def __init__(self, *, address: str | None = None, namespace: str | None = None) -> None:
        """Join a cluster.

        Args:
            address: of a running cluster, or `local` for a new one on this machine, see `running_cluster`. A process
                that is in a cluster stays.
            namespace: of named actors, where this call makes the connection.

        Raises:
            InputError: no such address can be.
            StartFailed: the cluster there cannot be joined.
            DeviceLost: Ray did not start here.
        """
        with Membership._lock:
            if not ray.is_initialized():
                Membership._sharers.clear()
                _connect(address, namespace)
            elif not Membership._sharers:
                return  # the connection belongs to whoever made it: a Serve replica, a notebook, a job
            Membership._sharers.append(self)

    def leave(self) -> None:
        """Give the membership back. Idempotent."""
        with Membership._lock:
            if self in Membership._sharers:
                Membership._sharers.remove(self)
                if not Membership._sharers:
                    _disconnect()


def _connect(address: str | None, namespace: str | None) -> None:
    running = running_cluster(address)
    if running is None:
        _start_local(namespace)
    else:
        join(running, namespace=namespace)


def _start_local(namespace: str | None) -> None:
    # Ray's head listens on every interface. Unless told otherwise this cluster is closed to others by a token that
    # lives in this process's environment alone; Ray itself would write one to ~/.ray and with that switch every
    # later Ray of this user to tokens.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = set(psutil.Process().children(recursive=True))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(for_ray=True))
        try:
            with own_sigterm():
                ray.init(
                    address=LOCAL,
                    num_cpus=os.cpu_count() or 1,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    namespace=namespace,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder),
                )
        except BaseException as error:  # Ctrl-C too: a Ray that is half started does not end itself
            ray.shutdown()
            _kill([p for p in psutil.Process().children(recursive=True) if p not in before])
            if isinstance(error, Exception):  # a bare one if a slow machine misses Ray's start deadline of 30 s
                raise DeviceLost(f"Ray did not start on this machine: {_first_line(error)}") from error
            raise
        Membership._local_dir = stack.pop_all()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_ANSWER_S)


def _disconnect() -> None:
    ray.shutdown()
    folder, Membership._local_dir = Membership._local_dir, None
    if folder is not None:
        folder.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
