"""Weights over the wire: a device without the model on its disk reads its slices from the disk of another one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgpack
from torch import Tensor

from splitray.arch import Range
from splitray.errors import DeviceLost, ModelError
from splitray.model.reading import read_config
from splitray.model.source import Checkpoint
from splitray.runtime.wire import Channel, Endpoint, Kind
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import error_from_plain
from splitray.runtime.wire.tensors import tensor_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SILENT_S = 20.0  # after which a lender counts as gone
Lender = tuple[str, Sequence[Any], str]
"""A device, where it listens, and where the model lies on its disk."""


class Lent:
    """A source of slices (slice_reader.Source) on other devices' disks; `bytes_read` came over the wire."""

    def __init__(self, lenders: Sequence[Lender], *, token: bytes, model_path: str) -> None:
        """Find one that has the model.

        Raises:
            ModelError: nobody has.
        """
        self._lenders, self.bytes_read = list(lenders), 0
        self._token, self._path = token, model_path
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        with TemporaryDirectory(prefix="splitray-config-") as folder:
            (Path(folder) / "config.json").write_bytes(self._ask("config")[0]["text"].encode())
            self.config: PretrainedConfig = read_config(folder)

    def renew(self, lenders: Sequence[Lender]) -> None:
        """Others may be there by now.

        Raises:
            ModelError: nobody has the model.
        """
        with self._lock:
            self._leave()
            self._lenders = list(lenders)
        self._ask("config")

    def key(self, name: str) -> str | None:
        """The checkpoint's key for a parameter, or None."""
        key: str | None = self._ask("key", name=name)[0]["key"]
        return key

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """A tensor or joined ranges of it."""
        plain = None if ranges is None else [list(r) for r in ranges]
        return self._ask("read", name=name, axis=axis, ranges=plain)[1][0]

    def read_experts(self, module: str, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fused gate_up and down weights of some experts."""
        gate_up, down = self._ask("experts", name=module, experts=list(experts))[1]
        return gate_up, down

    def fingerprint(self) -> str:
        """The lender's."""
        print_: str = self._ask("fingerprint")[0]["fingerprint"]
        return print_

    def _ask(self, what: str, **details: Any) -> tuple[dict[str, Any], list[Tensor]]:
        with self._lock:
            while True:
                channel, path = self._lender()
                try:
                    order = {"op": "weights", "what": what, "path": path, **details}
                    channel.send((int(Kind.CALL), 0, 0, 0, 0, 0, "", ()), msgpack.packb(order))
                    channel.drain_fully()
                    return self._answer(channel)
                except DeviceLost:
                    self._next()
                except ModelError:  # it has no model either
                    if what != "config":
                        raise
                    self._next()

    def _answer(self, channel: Channel) -> tuple[dict[str, Any], list[Tensor]]:
        tensors: list[Tensor] = []
        while True:
            frame = channel.read()
            assert frame is not None, "a blocking read returns a frame"
            if frame.kind == Kind.TENSOR:
                self.bytes_read += len(frame.payload)
                tensors.append(tensor_of(frame).clone())
                continue
            values = msgpack.unpackb(bytes(frame.payload))
            if "error" in values:
                raise error_from_plain(values["error"], channel.peer)
            return values, tensors

    def _lender(self) -> tuple[Channel, str]:
        while self._lenders:
            device, endpoint, path = self._lenders[0]
            if self._channel is not None:
                return self._channel, path
            try:
                self._channel = dial(Endpoint(*endpoint), me="side/weights", peer=device, token=self._token,
                                     deadline_s=_SILENT_S)  # fmt: skip
            except DeviceLost:
                self._next()
        raise ModelError(f"model {self._path}", expected="the model here or on another device", actual="on none",
                         remedy="copy it to a device's model_path")  # fmt: skip

    def _next(self) -> None:
        self._leave()
        self._lenders.pop(0)

    def _leave(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = None


def lend(order: dict[str, Any], opened: dict[str, Checkpoint]) -> tuple[dict[str, Any], list[Tensor]]:
    """What a lender answers: values, and tensors that go before them.

    Raises:
        ModelError: it has no model there, or no such tensor.
    """
    path = order["path"]
    if path not in opened:
        opened[path] = Checkpoint(path)
    source = opened[path]
    match order["what"]:
        case "config":
            return {"text": (source.folder / "config.json").read_text(encoding="utf-8")}, []
        case "key":
            return {"key": source.key(order["name"])}, []
        case "read":
            ranges = None if order["ranges"] is None else [Range(*r) for r in order["ranges"]]
            return {}, [source.read(order["name"], axis=order["axis"], ranges=ranges)]
        case "experts":
            return {}, list(source.read_experts(order["name"], order["experts"]))
        case _:
            return {"fingerprint": source.fingerprint()}, []
