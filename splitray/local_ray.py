"""A private Ray on this machine for the time of one command, with the OpenAI API on it if wanted.

Nothing of it is left afterwards, however the command ends. Knows no placement and prints nothing.
"""

import ctypes
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import psutil

from splitray.errors import InputError
from splitray.topology import Topology

_PR_SET_CHILD_SUBREAPER = 36
_LAST_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # where `ray start` leaves its address
_CONNECT_S = 2.0
_LOOK_S = 0.1
_APPLICATION = "generate"
_REFUSAL = re.compile(r"splitray\.errors\.\w+Error: (.+?): expected (.+), got (.+); (.+)")  # InputError as text
_END_S = 4.0
_LONGEST_PREFIX = 24  # characters; the socket paths that Ray makes below its folder must stay under 108
_OBJECT_STORE_BYTES = 100 * 2**20  # tensors travel outside the object store
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning about a future default
    "RAY_agent_register_timeout_ms": "300000",  # a busy machine starts Ray's agent slowly
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


class StartFailed(RuntimeError):  # noqa: N818 - a state of the world, like DeviceLost
    """Ray or Serve did not come up on this machine."""


class Terminated(SystemExit):
    """SIGTERM: leaves as Ctrl-C does, through every cleanup."""


def running_cluster() -> str | None:
    """The address of RAY_ADDRESS, or of the last `ray start` on this machine if something listens there.

    Ray's own search also finds the private Rays of other commands, which are nobody else's.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return named
    last = _LAST_CLUSTER.read_text().strip() if _LAST_CLUSTER.is_file() else ""
    return last if last and listens(last) else None


def listens(address: str) -> bool:
    """Whether something accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


@contextmanager
def some_ray(topology: Topology) -> Iterator[None]:
    """The cluster that runs, or else a private Ray.

    Raises:
        StartFailed: RAY_ADDRESS cannot be joined, or Ray did not come up.
    """
    address = running_cluster()
    if address is None:
        with private_ray(topology):
            yield
        return
    with _joined(address):
        yield


def cluster_facts(address: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The living nodes of a cluster as Ray lists them, and its resources.

    Raises:
        StartFailed: it cannot be joined.
    """
    with _joined(address):
        import ray

        return [n for n in ray.nodes() if n["Alive"]], ray.cluster_resources()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "start that cluster, give its RAY_AUTH_TOKEN, or unset RAY_ADDRESS to use this machine alone"
        raise StartFailed(f"the Ray cluster at {address}: {_last_line(str(error))}; {remedy}") from error
    try:
        signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        ray.shutdown()


@contextmanager
def private_ray(topology: Topology) -> Iterator[None]:
    """A Ray of one node that has what every device of the topology asks for.

    Its ports listen on all interfaces, as Ray's do, so a random token guards them.

    Raises:
        StartFailed: Ray did not come up.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    tiers = {tier: float(len(topology.tier(tier))) for tier in ("edge", "cloud") if topology.tier(tier)}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with _nothing_left(), _folder() as folder, _no_obituaries():
        try:
            try:
                ray.init(
                    address="local",
                    num_cpus=len(topology.devices) + 1,
                    resources=tiers,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                )
            except SystemExit as error:  # while Ray starts, its own handler of SIGTERM stands in for ours
                raise Terminated from error
            except (RuntimeError, OSError, ValueError) as error:
                remedy = "run `splitray doctor`; a busy machine may only need another try"
                raise StartFailed(f"Ray did not start: {_last_line(str(error))}; {remedy}") from error
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray took it over; the command knows better what to clean up
            yield
        finally:
            # Ray's threads tell on stdout about the actors that end now, which is what was asked for.
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                ray.shutdown()


@contextmanager
def _no_obituaries() -> Iterator[None]:
    """Ray prints a page about each dead worker, `log_to_driver` or not; whoever starts devices here says so himself."""
    from ray._private import worker

    usual = getattr(worker, "print_to_stdstream", None)
    if usual is not None:
        worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        if usual is not None:
            worker.print_to_stdstream = usual


@contextmanager
def served(
    arguments: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """The application `serve_apps.generate` on the Ray that runs; gives its URL. Port 0 means any free one.

    Its processes load torch and the slices for many seconds, in which `meanwhile` can do something useful.

    Raises:
        InputError: the port is taken, or the application refuses what was asked for.
        StartFailed: the application did not come up.
    """
    from ray import serve
    from ray.exceptions import RayError

    from serve_apps.generate import Args, build

    port = free_port(host, port)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        application = serve.RunTarget(target=build(Args(**arguments)), name=_APPLICATION)
        serve.run_many([application], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except (RayError, RuntimeError, OSError) as error:
        raise StartFailed(f"Serve did not start: {_last_line(str(error))}") from error
    meanwhile()
    _wait_until_running()
    yield f"http://{host}:{port}"


def _wait_until_running() -> None:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    while True:
        now = serve.status().applications.get(_APPLICATION)
        if now and now.status == ApplicationStatus.RUNNING:
            return
        if now:
            told = [_last_line(d.message) for d in now.deployments.values() if d.message]
            refusal = _REFUSAL.search(told[0]) if told else None
            if refusal:  # Serve would try twice more, and hear the same
                what, expected, actual, remedy = refusal.groups()
                raise InputError(what, expected=expected, actual=actual, remedy=remedy)
            if now.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise StartFailed(f"the application did not start: {(told or [now.message])[0]}")
        time.sleep(_LOOK_S)


def free_port(host: str, port: int) -> int:
    """The port itself if nobody listens there, or any free one for 0.

    Raises:
        InputError: the port is taken, or the host is no address of this machine.
    """
    try:
        with socket.create_server((host, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(
            f"port {port} of {host}",
            expected="a free port on an address of this machine",
            actual=error.strerror or error,
            remedy="stop what listens there, or give another --port",
        ) from error


@contextmanager
def _folder() -> Iterator[str]:
    long = len(tempfile.gettempdir()) > _LONGEST_PREFIX
    folder = tempfile.mkdtemp(prefix="splitray-", dir="/tmp" if long else None)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _nothing_left() -> Iterator[None]:
    """End every process that is started inside, also those whose parent is gone by then."""
    # Orphans come to this process and not to init, so that they can be found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        for end in (None, psutil.Process.terminate, psutil.Process.kill):
            left = [p for p in psutil.Process().children(recursive=True) if p not in before]
            for process in left:
                if end is not None:
                    _if_there(process, end)
            psutil.wait_procs(left, timeout=_END_S)


def _if_there(process: psutil.Process, end: Any) -> None:
    try:
        end(process)
    except psutil.NoSuchProcess:
        return


def _last_line(message: str) -> str:
    """Of a traceback, the line that tells the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
