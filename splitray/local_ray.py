"""A private Ray on this machine for the time of one command, with the OpenAI API on it if wanted.

Nothing of it is left afterwards, however the command ends. Knows no placement and prints nothing.
"""

import ctypes
import errno
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import psutil

from splitray.errors import InputError, StartFailed
from splitray.ray_address import RayAddress
from splitray.scratch import scratch_folder
from splitray.topology import Topology

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.1
_APPLICATION = "generate"
_REFUSAL = re.compile(r"splitray\.errors\.\w+Error: (.+?): expected (.+), got (.+); (.+)")  # InputError as text
_END_S = 4.0
_NOT_GIVEN = range(20_000, 32_768)  # to no connection: Linux gives those above, Ray's workers listen below
_TRIES = 20
_OBJECT_STORE_BYTES = 100 * 2**20  # tensors travel outside the object store
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning about a future default
    "RAY_agent_register_timeout_ms": "300000",  # a busy machine starts Ray's agent slowly
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


@contextmanager
def some_ray(address: RayAddress | None, topology: Topology) -> Iterator[None]:
    """The cluster that runs (see `running_cluster`), or else a private Ray.

    Raises:
        StartFailed: it cannot be joined, or Ray did not come up.
    """
    with private_ray(topology) if address is None else _joined(address):
        yield


def cluster_facts(address: RayAddress) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The living nodes of a cluster as Ray lists them, and its resources.

    Raises:
        StartFailed: it cannot be joined.
    """
    with _joined(address):
        import ray

        return [n for n in ray.nodes() if n["Alive"]], ray.cluster_resources()


@contextmanager
def _joined(address: RayAddress) -> Iterator[None]:
    join(address)
    try:
        yield
    finally:
        import ray

        ray.shutdown()


def join(address: RayAddress, *, namespace: str | None = None) -> None:
    """Become a driver of a cluster; `ray.shutdown` ends it.

    Raises:
        StartFailed: the cluster does not take this process.
    """
    import ray
    from ray.exceptions import RayError

    with own_sigterm():
        try:
            ray.init(address=address.text, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, RuntimeError, OSError, ValueError) as error:
            remedy = "give its RAY_AUTH_TOKEN, or set RAY_ADDRESS to `local` to use this machine alone"
            raise StartFailed(f"{address}: {_in_a_line(error)}; {remedy}") from error
        except BaseException:
            ray.shutdown()
            raise


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep the program's own handler, which cleans up more, where `ray.init` puts two of Ray's in its place."""
    from ray._private import utils

    usual = getattr(utils, "set_sigterm_handler", None)
    if usual is not None:
        utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        if usual is not None:
            utils.set_sigterm_handler = usual


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
    with scratch_folder(for_ray=True) as folder, nothing_left(), _no_obituaries():
        try:
            try:
                with own_sigterm():
                    ray.init(
                        address="local",
                        num_cpus=len(topology.devices) + 1,
                        resources=tiers,
                        object_store_memory=_OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _node_ip_address="127.0.0.1",
                        _temp_dir=str(folder),
                    )
            except Exception as error:  # a bare one where a slow machine misses Ray's deadline of 30 s
                remedy = "run `splitray doctor`; a busy machine may only need another try"
                raise StartFailed(f"Ray did not start: {_in_a_line(error)}; {remedy}") from error
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

    What Ray starts between now and then opens many connections: a port that one of them may be given is not chosen.

    Raises:
        InputError: the port is taken, or the host is no address of this machine.
    """
    for each in [port] if port else secrets.SystemRandom().sample(_NOT_GIVEN, _TRIES):
        try:
            socket.create_server((host, each)).close()
            return each
        except OSError as error:
            found = error
            if error.errno != errno.EADDRINUSE:
                break
    raise InputError(
        f"port {port} of {host}",
        expected="a free port on an address of this machine",
        actual=found.strerror or found,
        remedy="stop what listens there, or give another --port",
    ) from found


@contextmanager
def nothing_left() -> Iterator[None]:
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


def _in_a_line(error: Exception) -> str:
    """All of a message, as a mismatch of versions names them behind its first line."""
    return " ".join(str(error).split()) or type(error).__name__


def _last_line(message: str) -> str:
    """Of a traceback, the line that tells the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
