"""This process's way into a Ray cluster: the one it is in, a running one, or one of its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import ClassVar

import psutil
import ray
from ray._private.services import get_ray_address_from_environment

from splitray.errors import DeviceLost, InputError

LOCAL = "local"
_LONGEST_ROOT = 24
_ANSWER_S = 5.0
_OBJECT_STORE_BYTES = 100 * 1024**2  # Ray carries no tensors here


class Membership:
    """Being in a cluster. Connections that this process opened itself end with the last membership that uses them."""

    # Of the whole process, as Ray's connection is.
    _lock: ClassVar = threading.Lock()
    _sharers: ClassVar[list[Membership]] = []
    _local_dir: ClassVar[tempfile.TemporaryDirectory[str] | None] = None

    def __init__(self, *, address: str | None = None, namespace: str | None = None) -> None:
        """Join a cluster.

        Args:
            address: of a running cluster, or `local` for a new one on this machine. None: `RAY_ADDRESS` or a
                cluster found on this machine, and if there is none a new one. A process that is in a cluster stays.
            namespace: of named actors, where this call makes the connection.

        Raises:
            InputError: there is no cluster at the address.
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


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the program's SIGTERM handler, if it has one: Ray puts its own in its place, and ours cleans up more."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@_own_sigterm()
def _connect(address: str | None, namespace: str | None) -> None:
    running = _running(address)
    if running is None:
        _start_local(namespace)
        return
    try:
        ray.init(address=running, namespace=namespace, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(running, error) from error


def _running(address: str | None) -> str | None:
    """The address of the running cluster to join, or None if one is to be started."""
    if address == LOCAL:
        return None
    named = address or os.environ.get("RAY_ADDRESS") or "auto"
    if named == "auto":
        with contextlib.suppress(ConnectionError):  # Ray found none
            found: str = get_ray_address_from_environment("auto", None)
            if _refusal(found) is None:  # else the cluster has left its address behind
                return found
        return None
    # Ray would try an address where nobody answers for minutes.
    refusal = _refusal(named)
    if refusal is not None:
        raise _no_cluster(named, refusal) from refusal
    return named


def _refusal(address: str) -> Exception | None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        return error
    return None


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(
        "address",
        expected="HOST:PORT of the head of a Ray cluster that this machine is a node of",
        actual=f"{address} ({_first_line(error)})",
        remedy="see `ray status`; join a cluster with `ray start --address=HEAD:PORT`, or start one with "
        "`ray start --head`. A Ray client (ray://) outside of the cluster cannot reach the devices' sockets",
    )


def _start_local(namespace: str | None) -> None:
    # Ray's head listens on every interface. Unless told otherwise this cluster is closed to others by a token that
    # lives in this process's environment alone; Ray itself would write one to ~/.ray and with that switch every
    # later Ray of this user to tokens.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The paths of Ray's sockets must stay under 108 characters.
    root = "/tmp" if len(tempfile.gettempdir()) > _LONGEST_ROOT else None
    folder = tempfile.TemporaryDirectory(prefix="ray-", dir=root, ignore_cleanup_errors=True)
    before = set(psutil.Process().children(recursive=True))
    try:
        ray.init(
            address=LOCAL,
            num_cpus=os.cpu_count() or 1,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder.name,
        )
    except BaseException as error:  # Ctrl-C too: a Ray that is half started does not end itself
        ray.shutdown()
        _kill([p for p in psutil.Process().children(recursive=True) if p not in before])
        folder.cleanup()
        if isinstance(error, Exception):  # a bare one if a slow machine misses Ray's start deadline of 30 s
            raise DeviceLost(f"Ray did not start on this machine: {_first_line(error)}") from error
        raise
    Membership._local_dir = folder


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_ANSWER_S)


def _disconnect() -> None:
    ray.shutdown()
    folder, Membership._local_dir = Membership._local_dir, None
    if folder is not None:
        folder.cleanup()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
