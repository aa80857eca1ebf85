"""Sessions of callers that sample themselves (runtime/hf.py), one forward at a time."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from splitray.runtime.crossing import tensor_of
from splitray.runtime.epoch import Epoch, Kept
from splitray.runtime.members import Members
from splitray.runtime.messages import StepOrder


class Steps:
    """The sessions of one engine."""

    def __init__(self, members: Members) -> None:
        """None yet."""
        self._members = members
        self._kept: dict[int, Kept] = {}

    def kept(self) -> list[Kept]:
        """What has to move with a placement."""
        return list(self._kept.values())

    def forget(self, session: int) -> None:
        """It is over."""
        self._kept.pop(session, None)

    def forward(
        self, epoch: Epoch, *, session: int, attempt: int, ids_BT: Tensor, position: int, keep: int, capacity: int,
        attention_mask: Tensor | None, position_ids: Tensor | None, reorder: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Let the devices read some positions.

        Returns:
            Float32 logits [batch, keep, vocab], joined from all holders of the head.
        """
        batch, new_tokens = ids_BT.shape
        order = StepOrder(
            session=session, attempt=attempt, epoch=epoch.number, batch=batch, new_tokens=new_tokens,
            position=position, keep=keep, capacity=capacity, ids=_bytes(ids_BT),
            attention_mask=None if attention_mask is None else _bytes(attention_mask),
            position_ids=None if position_ids is None else _bytes(position_ids.expand(batch, -1)),
            reorder=None if reorder is None else reorder.tolist(),
        )  # fmt: skip
        plain = asdict(order)
        for device in epoch.route.devices:
            self._members.order(device, "step", plain)
        logits = self._logits(epoch)
        self._kept[session] = Kept(number=session, capacity=capacity, stop=position + new_tokens)
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
