"""Sessions of callers that sample themselves (runtime/hf.py), one forward at a time.

It remembers what each caller has let the devices read: after a fault they read it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitray.runtime.engine.epoch import Epoch, Kept
from splitray.runtime.engine.members import Members
from splitray.runtime.wire.messages import StepOrder
from splitray.runtime.wire.tensors import tensor_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One forward that a caller asks for.

    Args:
        session: any number that is the caller's own.
        ids: the new tokens, [batch, new positions].
        position: of the first of them.
        keep: of how many last positions the logits are wanted.
        capacity: positions for which devices make room.
        attention_mask: [batch, all positions], None: nothing is masked.
        position_ids: [batch, new positions] where they are not position, position + 1, ...
        reorder: sequence i goes on from what sequence reorder[i] was.
    """

    session: int
    ids: Tensor
    position: int
    keep: int
    capacity: int
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    reorder: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class Reading:
    """One session so far, [batch, positions] each; of the first `held` positions the devices have the KV."""

    capacity: int
    ids: Tensor
    places: Tensor
    """Position ids."""
    held: int = 0

    def go_on(self, ids_BT: Tensor, places_BT: Tensor, position: int, reorder: Tensor | None) -> None:
        """New positions behind `position`; sequence i goes on from what reorder[i] was."""
        for name, new_BT in (("ids", ids_BT), ("places", places_BT)):
            before_BT = getattr(self, name)[:, :position]
            if position and reorder is not None:
                before_BT = before_BT[reorder]
            setattr(self, name, torch.cat([before_BT, new_BT], dim=1) if position else new_BT)


class Steps:
    """The sessions of all callers of one engine that sample themselves."""

    def __init__(self, members: Members) -> None:
        """No session yet."""
        self._members = members
        self._readings: dict[int, Reading] = {}

    def kept(self) -> list[Kept]:
        """The sessions whose KV has to move with a placement."""
        return [Kept(number=n, capacity=r.capacity, stop=r.held) for n, r in list(self._readings.items()) if r.held]

    def lost(self) -> None:
        """The devices have no KV of these sessions any more."""
        for reading in self._readings.values():
            reading.held = 0

    def forget(self, session: int) -> None:
        """Forget a session: its caller wants no more of it."""
        self._readings.pop(session, None)

    def read(self, forward: Forward) -> Reading:
        """Note what the next forward is to read."""
        places_BT = forward.position_ids
        if places_BT is None:
            places_BT = torch.arange(forward.position, forward.position + forward.ids.shape[1])
        places_BT = places_BT.expand_as(forward.ids)
        reading = self._readings.setdefault(
            forward.session, Reading(capacity=forward.capacity, ids=forward.ids, places=places_BT)
        )
        reading.capacity = forward.capacity
        reading.go_on(forward.ids, places_BT, forward.position, forward.reorder)
        return reading

    def run(self, reading: Reading, forward: Forward, epoch: Epoch, attempt: int) -> Tensor:
        """Let the devices read from `forward.position` on, or all where they have lost what was before.

        Returns:
            Float32 logits [batch, keep, vocab], joined from all holders of the head.
        """
        position, places_BT, reorder = forward.position, forward.position_ids, forward.reorder
        if reading.held < position:
            position, places_BT, reorder = 0, reading.places, None
        ids_BT, mask = reading.ids[:, position:], forward.attention_mask
        batch, new_tokens = ids_BT.shape
        order = StepOrder(
            session=forward.session, attempt=attempt, epoch=epoch.number, batch=batch, new_tokens=new_tokens,
            position=position, keep=forward.keep, capacity=reading.capacity, ids=_bytes(ids_BT),
            attention_mask=None if mask is None else _bytes(mask),
            position_ids=None if places_BT is None else _bytes(places_BT.expand(batch, -1)),
            reorder=None if reorder is None else reorder.tolist(),
        )  # fmt: skip
        for device in epoch.route.devices:
            self._members.order(device, order)
        logits = self._logits(epoch)
        reading.held = position + new_tokens
        return logits

    def _logits(self, epoch: Epoch) -> Tensor:
        holders = epoch.placement.head.by_device
        waiting = {str(d) for d, _ in holders}
        parts: dict[str, Tensor] = {}
        while waiting:
            device, frame = self._members.next_frame({str(d) for d in epoch.route.devices})
            if frame.dtype != "float32":
                self._members.reply(device, frame)  # raises the device's error
            parts[device] = tensor_of(frame)
            waiting.discard(device)
        first = next(iter(parts.values()))
        if len(parts) == 1:
            return first
        logits = first.new_empty((*first.shape[:2], epoch.arch.vocab))
        for device_id, ranges in holders:
            at = 0
            for r in ranges:
                logits[..., r.start : r.stop] = parts[device_id][..., at : at + r.count]
                at += r.count
        return logits


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(torch.int64).contiguous().numpy().tobytes()
