"""Weights over the wire: a device without the model on its disk reads its slices from the disk of another one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from splitray.arch import Range
from splitray.errors import DeviceLost, ModelError
from splitray.model.opened import Opened, open_checkpoint
from splitray.model.reading import read_config
from splitray.model.weights.quantised import Quantised
from splitray.runtime.wire import Channel
from splitray.runtime.wire.answers import Answer, CheckpointKey, ConfigText, Done, Fingerprint, Numbers
from splitray.runtime.wire.calls import ask
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import (
    ConfigOrder,
    ExpertsOrder,
    FingerprintOrder,
    KeyOrder,
    Lender,
    NumbersOrder,
    Order,
    SliceOrder,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

A = TypeVar("A")
LendOrder = ConfigOrder | KeyOrder | SliceOrder | NumbersOrder | ExpertsOrder | FingerprintOrder
_SILENT_S = 20.0  # after which a lender counts as gone


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
            (Path(folder) / "config.json").write_bytes(self._ask(ConfigOrder)[0].text.encode())
            self.config: PretrainedConfig = read_config(folder)

    def renew(self, lenders: Sequence[Lender]) -> None:
        """Others may be there by now.

        Raises:
            ModelError: nobody has the model.
        """
        with self._lock:
            self._leave()
            self._lenders = list(lenders)
        self._ask(ConfigOrder)

    def key(self, name: str) -> str | None:
        """The checkpoint's key for a parameter, or None."""
        return self._ask(KeyOrder, name=name)[0].key

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """A tensor or joined ranges of it."""
        return self._ask(SliceOrder, name=name, axis=axis, ranges=None if ranges is None else tuple(ranges))[1][0]

    def read_quantised(
        self, name: str, *, outputs: Sequence[Range] | None = None, blocks: Sequence[Range] | None = None
    ) -> list[Quantised] | None:
        """What is stored of a matrix in whole numbers, or None."""
        found, rows = list[Quantised](), None if outputs is None else tuple(outputs)
        for block in [None] if blocks is None else blocks:
            part = self._numbers(name=name, outputs=rows, block=block)
            if part is None:
                return None
            found.append(part)
        return found

    def read_experts(self, name: str, experts: Sequence[int]) -> Tensor:
        """Some experts of a stacked weight."""
        return self._ask(ExpertsOrder, name=name, experts=tuple(experts))[1][0]

    def read_quantised_expert(self, name: str, expert: int) -> Quantised | None:
        """What is stored of one expert in whole numbers, or None."""
        return self._numbers(name=name, outputs=None, block=None, expert=expert)

    def _numbers(self, **which: Any) -> Quantised | None:
        told, tensors = self._ask(NumbersOrder, **which)
        if not told.parts:
            return None
        arrays: dict[str, Any] = {p: t.numpy() for p, t in zip(told.parts, tensors, strict=True)}
        return Quantised(bits=told.bits, group=told.group, inputs=told.inputs, **{"zeros": None, **arrays})

    def fingerprint(self) -> str:
        """The lender's checkpoint, told from others."""
        return self._ask(FingerprintOrder)[0].fingerprint

    def _ask(self, order: Callable[..., Order[A]], **details: Any) -> tuple[A, list[Tensor]]:
        """Of the first lender that is there and has the model."""
        with self._lock:
            while True:
                channel, path = self._lender()
                tensors: list[Tensor] = []
                try:
                    answer = ask(channel, order(path=path, **details), tensors.append)
                except DeviceLost:
                    self._next()
                except ModelError:  # it has no model either
                    if order is not ConfigOrder:
                        raise
                    self._next()
                else:
                    self.bytes_read += sum(t.nbytes for t in tensors)
                    return answer, [t.clone() for t in tensors]

    def _lender(self) -> tuple[Channel, str]:
        while self._lenders:
            lender = self._lenders[0]
            if self._channel is not None:
                return self._channel, lender.model_path
            try:
                self._channel = dial(lender.endpoint, me="side/weights", peer=lender.device, token=self._token,
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


def lend(order: LendOrder, opened: dict[str, Opened]) -> tuple[Answer, list[Tensor]]:
    """What a lender answers, and tensors that go before it. `opened` keeps checkpoints for the next order.

    Raises:
        ModelError: it has no model there, or no such tensor.
    """
    if order.path not in opened:
        opened[order.path] = open_checkpoint(order.path)
    source = opened[order.path]
    match order:
        case ConfigOrder():
            return ConfigText(text=source.config_text()), []
        case KeyOrder():
            return CheckpointKey(key=source.key(order.name)), []
        case SliceOrder():
            return Done(), [source.read(order.name, axis=order.axis, ranges=order.ranges)]
        case NumbersOrder():
            matrix = _numbers_of(order, source)
            if matrix is None:
                return Numbers(), []
            arrays = matrix.arrays()
            told = Numbers(bits=matrix.bits, group=matrix.group, inputs=matrix.inputs, parts=tuple(arrays))
            return told, [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays.values()]
        case ExpertsOrder():
            return Done(), [source.read_experts(order.name, order.experts)]
        case FingerprintOrder():
            return Fingerprint(fingerprint=source.fingerprint()), []


def _numbers_of(order: NumbersOrder, source: Opened) -> Quantised | None:
    if order.expert is not None:
        return source.read_quantised_expert(order.name, order.expert)
    blocks = None if order.block is None else [order.block]
    found = source.read_quantised(order.name, outputs=order.outputs, blocks=blocks)
    return None if found is None else found[0]
