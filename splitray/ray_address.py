"""Which Ray cluster a command is to join, and whether it can be: asked before Ray itself would try for minutes.

It speaks to a cluster's head by one call of Ray's own protocol. It joins and starts nothing.
"""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from splitray.errors import InputError, StartFailed
from splitray.scratch import PREFIX

LOCAL, AUTO = "local", "auto"
_LAST_STARTED = Path("/tmp/ray/ray_current_cluster")  # where `ray start` leaves its address
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")
_ANSWER_S, _CONNECT_S = 6.0, 2.0
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ALONE = "to use this machine alone, unset RAY_ADDRESS or set it to `local`"


@dataclass(frozen=True, slots=True)
class RayAddress:
    """HOST:PORT of a cluster's head, and who named it: an option, RAY_ADDRESS or `ray start`."""

    text: str
    named_by: str

    def __str__(self) -> str:
        return f"the Ray cluster at {self.text} (of {self.named_by})"


class _NobodyThere(StartFailed):
    """No Ray answers at an address."""


def running_cluster(option: str | None = None) -> RayAddress | None:
    """The cluster to join, which has answered; None if the command is to start a Ray of its own.

    That is the one that the option names, or RAY_ADDRESS, or else the last `ray start` of this machine if it still
    runs. `local` names none, `auto` the one that runs here.

    Raises:
        InputError: no such address can be, or `auto` means several.
        StartFailed: it cannot be joined: nobody is there, it is no Ray, another version, or wants another token.
    """
    named, by = (option, "--address") if option else (os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")
    if named == LOCAL:
        return None
    if named == AUTO:
        address = _only_one(by)
    elif named:
        address = _parsed(named, by)
    elif last := _last_started():
        address = RayAddress(last, str(_LAST_STARTED))
    else:
        return None
    try:
        _ask(address)
    except _NobodyThere:
        if address.named_by != str(_LAST_STARTED):
            raise
        return None  # a Ray that ended without a word leaves its address behind
    return address


def _parsed(named: str, by: str) -> RayAddress:
    found = _ADDRESS.fullmatch(named)
    if found and 0 < int(found[2]) < 2**16:
        return RayAddress(named, by)
    raise InputError(
        by,
        expected="HOST:PORT of the head of a Ray cluster that this machine is a node of ([HOST]:PORT for IPv6), "
        "`auto` or `local`",
        actual=repr(named),
        remedy="see `ray status`; join a cluster with `ray start --address=HOST:PORT`. A Ray client (ray://) or the "
        f"dashboard (http://) is outside of the cluster and cannot reach the devices' sockets; {_ALONE}",
    )


def _last_started() -> str | None:
    try:
        last = _LAST_STARTED.read_text(encoding="utf-8").strip() if _LAST_STARTED.is_file() else ""
    except (OSError, ValueError):  # somebody else's folder, or not a text
        return None
    return last if _ADDRESS.fullmatch(last) else None


def _only_one(by: str) -> RayAddress:
    """What `auto` means."""
    found = sorted({head for head, _ in _raylets() if head})
    last = _last_started()
    if len(found) == 1:
        return RayAddress(found[0], f"{by}=auto")
    if found:
        told = ", ".join(f"{a} (started last)" if a == last else a for a in found)
        remedy = f"name one of them as HOST:PORT, or end the others; {_ALONE}"
        raise InputError(by, expected="`auto` where one Ray runs", actual=f"{len(found)}: {told}", remedy=remedy)
    left = f"; {last} in {_LAST_STARTED} is of one that has ended" if last else ""
    raise StartFailed(f"{by}=auto: no Ray cluster runs on this machine{left}; start one with `ray start`; {_ALONE}")


def _raylets() -> list[tuple[str, bytes]]:
    """Of each node that runs on this machine for more than one command: its head's address, and its id."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] != "raylet":
            continue
        said = dict(a.lstrip("-").split("=", 1) for a in process.info["cmdline"] or () if a[:2] == "--" and "=" in a)
        if not Path(said.get("temp_dir", "")).name.startswith(PREFIX):
            found.append((said.get("gcs-address", ""), bytes.fromhex(said.get("node_id", ""))))
    return found


def _ask(address: RayAddress) -> None:
    """Ask the head whether it is one, of which version, and whether this machine has one of its nodes."""
    import grpc
    import ray
    from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest

    token, token_from = _token()
    nodes = [node for _, node in _raylets()]
    try:
        with _channel(grpc, address.text) as channel:
            ask = channel.unary_unary(_CHECK_ALIVE, CheckAliveRequest.SerializeToString, CheckAliveReply.FromString)
            known = (("authorization", f"Bearer {token}"),) if token else ()
            told = ask(CheckAliveRequest(node_ids=nodes), timeout=_ANSWER_S, metadata=known)
    except grpc.RpcError as error:
        raise _not_joined(address, error.code().name, error.details() or "", token_from) from error
    if told.ray_version != ray.__version__:
        remedy = f"install ray=={told.ray_version} here, or {ray.__version__} there"
        raise StartFailed(
            f"{address}: version mismatch: it runs Ray {told.ray_version}, this is {ray.__version__}; {remedy}"
        )
    if not any(told.raylet_alive):
        raise StartFailed(
            f"{address}: it lives, but none of its nodes runs on this machine; "
            f"join it with `ray start --address={address.text}`; {_ALONE}"
        )


def _not_joined(address: RayAddress, code: str, details: str, token_from: str | None) -> StartFailed:
    if code == "UNAUTHENTICATED":
        seen = f"its token is not the one of {token_from}" if token_from else "it wants a token, and there is none here"
        return StartFailed(
            f"{address}: {seen}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` says there"
        )
    if "DNS" in details or "resolution" in details:
        seen = "the name of its host is not known"
    else:
        seen = _who_listens(address.text)
    return _NobodyThere(f"{address}: {seen}; start that cluster, or correct the address; {_ALONE}")


def _who_listens(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"nobody answers there ({error.strerror or error})"
    return f"something listens there, but did not answer within {_ANSWER_S:g} s as a Ray cluster's head does"


def _token() -> tuple[str, str] | tuple[None, None]:
    """The token that Ray would send, and where it comes from."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None, None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token, "RAY_AUTH_TOKEN"
    for by, path in (("RAY_AUTH_TOKEN_PATH ", os.environ.get("RAY_AUTH_TOKEN_PATH")), ("", "~/.ray/auth_token")):
        try:
            if path and (token := Path(path).expanduser().read_text(encoding="ascii").strip()):
                return token, f"{by}{path}"
        except (OSError, ValueError, RuntimeError):
            continue
    return None, None


def _channel(grpc: Any, address: str) -> Any:
    options = (("grpc.enable_http_proxy", 0),)
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    authority, key, chain = (
        Path(os.environ[f"RAY_TLS_{name}"]).read_bytes() for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT")
    )
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain), options)
