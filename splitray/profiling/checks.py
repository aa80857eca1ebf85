"""What `splitray doctor` looks at: each check yields what it found, and what to do about it if that is not good."""

import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from splitray.errors import DeviceLost, InputError, StartFailed
from splitray.local_ray import cluster_facts
from splitray.ray_address import RayAddress, running_cluster
from splitray.report.quantities import bytes_text, seconds_text

Status = Literal["ok", "warning", "problem"]
_NAMED = ("torch", "transformers", "ray")
_LEAST_MEMORY_BYTES, _ENOUGH_MEMORY_BYTES = 1e9, 3e9  # a bare device process takes 0.27 GB
_ENOUGH_SHM_BYTES = 2e8
_SLOW_ROUND_TRIP_S = 1e-3
_FRAME_BYTES, _ROUNDS = 3072, 200  # one residual of a small model
_ANSWER_S = 2.0
_PROMPT_IDS, _NEW_TOKENS = (3, 1, 4, 1, 5), 8


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do if that is not good."""

    name: str
    status: Status
    found: str
    todo: str = ""


def findings(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a check yields; a check never raises: whatever goes wrong in it is what it found."""
    found: list[Check] = []
    try:
        found.extend(check())
    except Exception as error:  # noqa: BLE001 - the doctor's boundary: a check that breaks is a finding
        what = str(error).strip() or type(error).__name__
        found.append(Check(name, "problem", what, "repair what the message names"))
    return found


def _versions() -> Iterator[Check]:
    wanted = [Requirement(r) for r in metadata.requires("splitray") or ()]
    needs = metadata.metadata("splitray")["Requires-Python"]
    python = ".".join(map(str, sys.version_info[:3]))
    yield _version("python", python, Requirement(f"python{needs}"))
    others = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        check = _version(requirement.name, installed, requirement)
        if requirement.name in _NAMED or check.status != "ok":
            yield check
        else:
            others.append(requirement.name)
    yield Check("packages", "ok", f"{', '.join(others)} as required")


def _version(name: str, installed: str, requirement: Requirement) -> Check:
    supported = ",".join(sorted(map(str, requirement.specifier), reverse=True))
    if installed != "not installed" and requirement.specifier.contains(installed, prereleases=True):
        return Check(name, "ok", f"{installed} ({supported} is supported)")
    todo = "use that Python" if name == "python" else f"pip install '{requirement.name}{supported}'"
    return Check(name, "problem", f"{installed}, but {supported} is supported", todo)


def _cores() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    found = f"{cores} usable, load {load:.1f}"
    if cores < 2:
        yield Check("cores", "warning", found, "devices of one machine will take turns; measure on two or more cores")
    elif load > cores:
        yield Check("cores", "warning", found, "the machine is busy: times will be longer than its own")
    else:
        yield Check("cores", "ok", found)


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    found = f"{bytes_text(memory.available)} free of {bytes_text(memory.total)}"
    todo = "end other programs, or give this machine fewer devices"
    enough, least = memory.available >= _ENOUGH_MEMORY_BYTES, memory.available >= _LEAST_MEMORY_BYTES
    yield Check("memory", "ok" if enough else "warning" if least else "problem", found, "" if enough else todo)


def _threads() -> Iterator[Check]:
    import torch

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
    told = {name: os.environ[name] for name in names if name in os.environ}
    found = f"torch uses {torch.get_num_threads()} here; each device process uses 1"
    found += "".join(f"; {name}={value}" for name, value in told.items())
    if told.get("OMP_WAIT_POLICY", "").lower() == "passive":
        yield Check("threads", "warning", found, "unset OMP_WAIT_POLICY: passive makes two threads take turns")
    else:
        yield Check("threads", "ok", found)


def _sockets() -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="splitray-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()
        echo = threading.Thread(target=_echo, args=(listener,), daemon=True)
        echo.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_ANSWER_S)
            client.connect(f"{folder}/s")
            times = []
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                client.sendall(bytes(_FRAME_BYTES))
                _read(client)
                times.append(time.perf_counter() - start)
        echo.join()
    median = statistics.median(times)
    found = f"{_FRAME_BYTES:,} bytes there and back in {seconds_text(median)} over a Unix socket (median)"
    slow = median > _SLOW_ROUND_TRIP_S
    yield Check(
        "sockets", "warning" if slow else "ok", found, "a busy machine? each exchange waits this long" if slow else ""
    )


def _echo(listener: socket.socket) -> None:
    peer, _ = listener.accept()
    with peer:
        for _ in range(_ROUNDS):
            peer.sendall(_read(peer))


def _read(peer: socket.socket) -> bytes:
    data = b""
    while len(data) < _FRAME_BYTES:
        more = peer.recv(_FRAME_BYTES - len(data))
        if not more:
            raise ConnectionError("a Unix socket closed in the middle of a message")
        data += more
    return data


def _shared_memory() -> Iterator[Check]:
    folder = Path("/dev/shm")
    todo = "mount a tmpfs there, for example `docker run --shm-size=1g`: Ray keeps its object store in it"
    if not folder.is_dir():
        yield Check("/dev/shm", "problem", "not there", todo)
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix="splitray-") as file:
        file.write(bytes(4096))
    free = shutil.disk_usage(folder).free
    enough = free >= _ENOUGH_SHM_BYTES
    yield Check("/dev/shm", "ok" if enough else "warning", f"{bytes_text(free)} free", "" if enough else todo)


def _cluster() -> Iterator[Check]:
    if "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").is_file():
        yield Check("ray auth", "warning", "~/.ray/auth_token switches token authentication on by itself",
                    "set RAY_AUTH_MODE to token or to disabled, the same on all nodes")  # fmt: skip
    try:
        address = running_cluster()
        if address is None:
            yield Check("cluster", "ok", "none runs here; `splitray demo` and `splitray serve` start their own")
        else:
            yield _joined(address)
    except (InputError, StartFailed) as error:
        todo = "start that cluster (`ray up`, `ray start --head`), or unset RAY_ADDRESS"
        yield Check("cluster", "problem", str(error), todo)


def _joined(address: RayAddress) -> Check:
    nodes, total = cluster_facts(address)
    kinds = ", ".join(f"{total[k]:g} {k}" for k in ("CPU", "GPU", "edge", "cloud") if k in total)
    names = ", ".join(n["NodeManagerHostname"] for n in nodes)
    found = f"{address.text}: {len(nodes)} node{'s' if len(nodes) != 1 else ''} ({names}) with {kinds}"
    if "edge" not in total and "cloud" not in total:
        todo = "start nodes with --resources='{\"edge\": 1}' or '{\"cloud\": 1}': devices are placed by them"
        return Check("cluster", "warning", found, todo)
    return Check("cluster", "ok", found)


def _gpu() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("gpu", "ok", "none that torch can use; devices run on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Check("gpu", "ok", f"cuda:{i} {name}, {bytes_text(free)} free of {bytes_text(total)}")


def _model() -> Iterator[Check]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from splitray.model.reading import read_config
    from splitray.runtime.launch import launch_engine, model_path
    from splitray.runtime.sampling import Sampling

    disable_progress_bar()  # it would draw on a stderr that is no terminal too
    try:
        read_config(model_path("tiny"))
        whole: Any = AutoModelForCausalLM.from_pretrained(model_path("tiny"), dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        found = f"the shipped model does not load: {str(error).splitlines()[0]}"
        yield Check("model", "problem", found, "install splitray again")
        return
    yield Check("model", "ok", f"the shipped one loads, {whole.num_parameters():,} weights")
    with torch.inference_mode():
        ids = whole.generate(
            torch.tensor([_PROMPT_IDS]), max_new_tokens=_NEW_TOKENS, do_sample=False,
            attention_mask=torch.ones(1, len(_PROMPT_IDS)),
        )  # fmt: skip
    try:
        with launch_engine(model="tiny", devices=2, runtime="process") as engine:
            split = list(engine.stream(_PROMPT_IDS, Sampling(max_new_tokens=_NEW_TOKENS)))
    except (InputError, DeviceLost) as error:
        yield Check("split", "problem", str(error), "repair what the message names")
        return
    theirs = ids[0, len(_PROMPT_IDS) :].tolist()
    if split[: len(theirs)] == theirs:  # transformers may have stopped at an end of sequence
        yield Check("split", "ok", "two device processes give the tokens of transformers")
    else:
        yield Check("split", "problem", f"two device processes gave {split} where transformers gives {theirs}",
                    "report it with this output: it must not happen")  # fmt: skip


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "versions": _versions,
    "cores": _cores,
    "memory": _memory,
    "threads": _threads,
    "sockets": _sockets,
    "/dev/shm": _shared_memory,
    "gpu": _gpu,
    "cluster": _cluster,
    "model": _model,
}
