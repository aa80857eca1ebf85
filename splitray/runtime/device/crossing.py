"""One device's side of the exchange rule (ARCHITECTURE.md): partial sums in, next residual out.

Executes a Route; decides nothing. Knows tensors and the wire, not the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitray.arch import ModelArch
from splitray.model.split_layer import Array
from splitray.route import Route
from splitray.runtime.wire import Frame, Header, Key, Kind, Wire, frame_start, header
from splitray.runtime.wire.tensors import DTYPE_NAMES, payload_of, tensor_of

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_ROW_TYPES = {FLOAT32: "float32", FLOAT64: "float64"}


@dataclass(frozen=True, slots=True)
class Step:
    """What all frames of one step share; `keep` positions go on to the head."""

    session: int
    epoch: int
    attempt: int
    position: int
    keep: int


@dataclass(frozen=True, slots=True)
class Plan:
    """This device's part in one boundary. `parts` are the holders whose partials it adds, in device order."""

    member: bool
    lead: bool
    partitioned: bool
    state_to: tuple[str, ...]
    partial_to: tuple[str, ...]
    both_to: tuple[str, ...]
    state_from: str | None
    parts: tuple[str, ...]
    into_head: bool
    row_to: tuple[str, ...]
    """Whom this device sends a row: its partial, or the state."""


class Junction:
    """The `Exchange` that all shards of a device hold for good: behind it the crossing changes with the epoch."""

    cross: Callable[..., Tensor | None]
    cross_row: Callable[..., Array | None]
    settle_row: Callable[..., Array | None]
    sum_over_holders: Callable[[int, Tensor], Tensor]

    def lead_to(self, crossing: Crossing) -> None:
        """From now on everything goes through this one."""
        self.cross, self.cross_row, self.settle_row = crossing.cross, crossing.cross_row, crossing.settle_row
        self.sum_over_holders = crossing.sum_over_holders


class Crossing:
    """The `Exchange` of one device on a wire."""

    def __init__(self, me: str, route: Route, arch: ModelArch, wire: Wire) -> None:
        """Compile this device's sends and receipts for every boundary of the route."""
        self.me, self.route, self.wire = me, route, wire
        self.torch_device = torch.device("cpu")
        self.step = Step(0, 0, 0, 0, 1)
        self.plans = [self._plan(i) for i in range(len(route.sub_blocks) - 1)]
        self.inner = {
            b.after: [m.target for m in b.messages if m.source == me]
            for b in route.boundaries if b.inner and any(m.source == me for m in b.messages)
        }  # fmt: skip
        self._holders = {b.index: [d for d in b.devices] for b in route.sub_blocks}
        self._hidden = arch.hidden_dim
        self._started: tuple[Any, bytes] = None, b""
        targets = [m.target for b in route.boundaries for m in b.messages if m.source == me]
        self.targets = tuple(dict.fromkeys(targets))

    def _plan(self, index: int) -> Plan:
        here, there = self.route.sub_blocks[index], self.route.sub_blocks[index + 1]
        messages = self.route.boundary(index).messages

        def to(content: str) -> tuple[str, ...]:
            return tuple(m.target for m in messages if m.source == self.me and m.content == content)

        state_from = [m.source for m in messages if m.target == self.me and m.content == "state"]
        partitioned = here.mode == "partitioned"
        return Plan(
            member=self.me in here.devices,
            lead=self.me == here.lead,
            partitioned=partitioned,
            state_to=to("state"),
            partial_to=to("partial"),
            both_to=to("partial_and_state"),
            state_from=state_from[0] if state_from else None,
            parts=tuple(here.devices) if partitioned and self.me in there.devices else (),
            into_head=there.kind == "head",
            row_to=to("partial") if partitioned else to("state"),
        )

    def cross(
        self,
        index: int,
        x_BTD: Tensor | None,
        y_BTD: Tensor | None,
        settle: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        """Leave sub-block `index`: see model/split_layer.py's Exchange."""
        plan = self.plans[index]
        if plan.into_head and plan.member:
            keep = self.step.keep
            x_BTD = None if x_BTD is None else x_BTD[..., -keep:, :]
            y_BTD = None if y_BTD is None else y_BTD[..., -keep:, :]
        leave = self._partitioned if plan.partitioned else self._whole
        return leave(index, plan, x_BTD, y_BTD, settle)

    def _partitioned(
        self,
        index: int,
        plan: Plan,
        x_BTD: Tensor | None,
        y_BTD: Tensor | None,
        settle: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        mine = y_BTD
        if plan.member:
            assert x_BTD is not None and y_BTD is not None, f"a holder of {index} without residual or partial"
            if plan.lead and settle is None:
                mine = x_BTD + y_BTD
            for peer in plan.partial_to:
                self._send(peer, index, mine)
            if plan.both_to:
                both = torch.stack([y_BTD, x_BTD])
                for peer in plan.both_to:
                    self._send(peer, index, both)
        if not plan.parts:
            self.wire.flush()
            return None
        total: Tensor | None = None
        for peer in plan.parts:
            part = mine if peer == self.me else self._receive(peer, index)
            assert part is not None, "own partial exists for a holder"
            if settle is not None and not plan.member and peer == plan.parts[0]:
                part, x_BTD = part[0], part[1]
            total = part if total is None else total + part
        self.wire.flush()
        assert total is not None, "a partitioned sub-block has holders"
        if settle is None:
            return total
        assert x_BTD is not None, "the lead sends x apart to whoever lacks it"
        return settle(x_BTD, total)

    def _whole(
        self,
        index: int,
        plan: Plan,
        x_BTD: Tensor | None,
        y_BTD: Tensor | None,
        settle: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        if plan.member:
            assert x_BTD is not None, f"a holder of {index} without residual"
            if y_BTD is not None:
                x_BTD = x_BTD + y_BTD if settle is None else settle(x_BTD, y_BTD)
            return self._send_state(index, plan, x_BTD)
        return self._receive_state(plan.state_from, index) if plan.state_from else None

    def _send_state(self, index: int, plan: Plan, x_BTD: Tensor) -> Tensor:
        """Send the residual to whoever gets it from here; returns the one that this device goes on with."""
        for peer in plan.state_to:
            self._send(peer, index, x_BTD)
        if plan.state_to:
            self.wire.flush()
        return x_BTD

    def _receive_state(self, peer: str, index: int) -> Tensor:
        return self._receive(peer, index)

    def cross_row(self, index: int, x_D: Array | None, y_D: Array | None) -> Array | None:
        """Leave sub-block `index` with one row: the hot path of decoding, see model/split_layer.py's Exchange."""
        plan = self.plans[index]
        mine = y_D
        if plan.member:
            assert x_D is not None, f"a holder of {index} without residual"
            if y_D is None:
                mine = x_D
            elif plan.lead or not plan.partitioned:
                y_D += x_D
            for peer in plan.row_to:
                self.send_row(peer, index, mine)
        if plan.parts:
            total: Array | None = None
            for peer in plan.parts:  # two or more, so the sum is no view of what a channel received
                part = mine if peer == self.me else self.receive_row(peer, index)
                assert part is not None, "own partial exists for a holder"
                total = part if total is None else total + part
            return total
        if plan.partitioned:
            return None
        return mine if plan.state_from is None else self.receive_row(plan.state_from, index).copy()

    def settle_row(
        self, index: int, x_D: Array | None, y_D: Array | None, settle: Callable[[Array, Array], Array]
    ) -> Array | None:
        """As `cross_row`, where sums are normalised before the residual is added: by the messages of `cross`."""
        plan = self.plans[index]
        if not plan.partitioned:
            if x_D is not None and plan.member:
                x_D = x_D if y_D is None else settle(x_D, y_D)
                for peer in plan.state_to:
                    self.send_row(peer, index, x_D)
                return x_D
            return None if plan.state_from is None else self.receive_row(plan.state_from, index).copy()
        if plan.member:
            for peer in plan.partial_to:
                self.send_row(peer, index, y_D)
            if plan.both_to:
                assert x_D is not None and y_D is not None, f"a holder of {index} without residual or partial"
                both = torch.from_numpy(np.stack([y_D, x_D])[:, None, None])
                for peer in plan.both_to:
                    self._send(peer, index, both)
        total: Array | None = None
        for peer in plan.parts:
            if peer == self.me:
                part = y_D
            elif not plan.member and peer == plan.parts[0]:
                part, x_D = self._receive(peer, index).view(2, -1).numpy()
            else:
                part = self.receive_row(peer, index)
            assert part is not None, "own partial exists for a holder"
            total = part if total is None else total + part
        if total is None:
            return None
        assert x_D is not None, "the lead sends x apart to whoever lacks it"
        return settle(x_D, total)

    def send_row(self, peer: str, index: int, row_D: Array | None) -> None:
        """Send one row to a peer across the boundary of `index`."""
        assert row_D is not None, "a holder has a row"
        self.wire.put(peer, self._row_start(index, row_D.dtype, len(row_D)), row_D.data.cast("B"))

    def receive_row(self, peer: str, index: int, dtype: np.dtype[Any] = FLOAT32) -> Array:
        """Receive one row from a peer across the boundary of `index`; valid until the next receive from it."""
        step, hidden = self.step, self._hidden
        key = (step.attempt, step.position, 2 * index + 1)  # making a `Key` takes as long as a look at the socket
        start = self._row_start(index, dtype, hidden)
        return np.frombuffer(self.wire.receive_expected(peer, key, start, dtype.itemsize * hidden), dtype)

    def _row_start(self, index: int, dtype: np.dtype[Any], hidden: int) -> bytes:
        """One start for what is sent and what is received at a boundary: they differ in their payload only."""
        row = (self.step, index, dtype, hidden)
        if row != self._started[0]:
            fields = self._header(Kind.TENSOR, 2 * index + 1, _ROW_TYPES[dtype], (1, 1, hidden))
            self._started = row, frame_start(fields, dtype.itemsize * hidden)
        return self._started[1]

    def sum_over_holders(self, index: int, sums: Tensor) -> Tensor:
        """Sum a small tensor over the holders of a partitioned sub-block, in device order on every one."""
        peers = self.inner.get(index)
        if not peers:
            return sums
        for peer in peers:
            self._send(peer, index, sums, inner=True)
        total: Tensor | None = None
        for peer in self._holders[index]:
            part = sums if peer == self.me else self._receive(peer, index, inner=True)
            total = part if total is None else total + part
        self.wire.flush()
        assert total is not None, "a sub-block has holders"
        return total

    def send_end(self, peer: str, index: int, tensor: Tensor, kind: Kind = Kind.TENSOR) -> None:
        """Send across a boundary behind the head: best or logits (index of the head), token (one more)."""
        self._send(peer, index, tensor, kind=kind)

    def receive_end(self, peer: str, index: int) -> tuple[Tensor, Frame]:
        """Receive across a boundary behind the head, with the frame that it came in."""
        frame = self._frame(peer, index, inner=False)
        return tensor_of(frame), frame

    def stop(self) -> None:
        """Pass on the end of the run to every device that this one sends to in a step."""
        for peer in self.targets:
            self.wire.tell(peer, self._header(Kind.STOP, 0, "", ()))
        self.wire.flush()

    def _header(self, kind: Kind, boundary: int, dtype: str, shape: tuple[int, ...]) -> Header:
        step = self.step
        return header(kind, step.session, step.epoch, boundary, step.position, step.attempt, dtype, shape)

    def _send(
        self, peer: str, index: int, tensor: Tensor | None, *, inner: bool = False, kind: Kind = Kind.TENSOR
    ) -> None:
        assert tensor is not None, "only tensors are sent"
        tensor, payload = payload_of(tensor)
        boundary = 2 * index + (0 if inner else 1)
        self.wire.send(peer, self._header(kind, boundary, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)), payload)

    def _frame(self, peer: str, index: int, *, inner: bool) -> Frame:
        step = self.step
        return self.wire.receive(peer, Key(step.attempt, step.position, 2 * index + (0 if inner else 1)))

    def _receive(self, peer: str, index: int, *, inner: bool = False) -> Tensor:
        tensor = tensor_of(self._frame(peer, index, inner=inner))
        return tensor if self.torch_device.type == "cpu" else tensor.to(self.torch_device)
