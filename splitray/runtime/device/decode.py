"""The engine's own loop on one device: prefill in chunks, then one token after another, sampled on the devices.

The driver is not in it: the head's first holder chooses, the token goes to whoever embeds it and to the origin.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from splitray.errors import InputError, Unsampled
from splitray.model.kv_cache import KvCache
from splitray.model.lengths import LengthRule
from splitray.model.surgery import Shard
from splitray.runtime.device.crossing import Crossing, Step
from splitray.runtime.sampling import Chooser, check_maximum, deciding, fill_in
from splitray.runtime.wire import Channel, Kind, StopRun, header
from splitray.runtime.wire.answers import Counts, NotSampled, Refused
from splitray.runtime.wire.messages import DecodeOrder
from splitray.runtime.wire.tensors import payload_of

CHUNK_TOKENS = 512


class DecodeLoop:
    """One run of one batch on one device."""

    def __init__(
        self,
        *,
        device: str,
        shard: Shard | None,
        crossing: Crossing,
        caller: Channel,
        cache: KvCache,
        order: DecodeOrder,
        head_rows: Mapping[str, Tensor],
    ) -> None:
        """`head_rows` gives the vocabulary ids of each head holder's rows."""
        self.me, self.shard, self.crossing, self.caller = device, shard, crossing, caller
        self.cache, self.order, self.head_rows = cache, order, head_rows
        self.sampling = order.sampling
        self.prompt_BT = torch.tensor(order.prompt, dtype=torch.int64)
        route = crossing.route
        self.head = route.sub_blocks[-1]
        self.waiting = [m.target for m in route.boundary(self.head.index + 1).messages]
        self.is_sampler = device == route.sampler
        self.is_origin = device == route.origin
        self.rule = LengthRule() if shard is None else shard.rope.rule
        self.overwriting = False
        self.mask_BS: Tensor | None = None
        if order.attention_mask is not None:
            self.mask_BS = torch.tensor(order.attention_mask, dtype=torch.int64)
        self.chooser: Chooser | None = None
        if self.is_sampler:
            assert shard is not None, "the sampler holds rows of the head"
            before = self.prompt_BT.shape[1] - order.done
            self.chooser = Chooser(self.sampling, self.prompt_BT[:, :before])
            self.chooser.catch_up(self.prompt_BT[:, before:], shard.arch.vocab)

    @torch.inference_mode()
    def run(self) -> Counts | NotSampled:
        """Run to the last token; the origin sends each one to the caller.

        Returns:
            What this device counted in the decode steps alone, or why no token can be chosen.
        """
        batch, prompt_tokens = self.prompt_BT.shape
        position, most = self.order.start, self.sampling.max_new_tokens - self.order.done
        steps = 0
        traffic = self.crossing.wire.traffic
        before = (0, 0, 0)
        start = cpu = 0.0
        try:
            spans = self.rule.spans(position, prompt_tokens - self.order.done, prompt_tokens, self._length)
            for at, position, length in spans:
                logits = self._read(self.prompt_BT, at, position, length)
            anew = self._reads_anew_at()
            ids_B, last = self._next(logits, position, left=most - 1)
            before = (traffic.messages, traffic.payload_bytes, traffic.wire_bytes)
            start, cpu = time.perf_counter(), time.process_time()
            while not last:
                tokens_BT = None if ids_B is None else ids_B[:, None]
                if self.mask_BS is not None:
                    self.mask_BS = torch.cat([self.mask_BS, self.mask_BS.new_ones(batch, 1)], dim=1)
                if position <= anew:
                    logits = self._grow(tokens_BT, position, anew)
                else:
                    logits = self._advance(tokens_BT, position)
                position += 1
                steps += 1
                ids_B, last = self._next(logits, position, left=most - 1 - steps)
        except StopRun:
            self.crossing.stop()
        except (InputError, Unsampled) as error:
            self.crossing.stop()
            return NotSampled(why=Refused.of(error))
        return Counts(
            steps=steps,
            messages=traffic.messages - before[0],
            payload_bytes=traffic.payload_bytes - before[1],
            wire_bytes=traffic.wire_bytes - before[2],
            decode_s=time.perf_counter() - start,
            decode_cpu_s=time.process_time() - cpu,
            kv_bytes=self.cache.num_bytes,
        )

    def _read(self, ids_BT: Tensor | None, start: int, stop: int, length: int | None) -> Tensor | None:
        """Read the positions [start, stop) in chunks; logits of the last."""
        logits = None
        for at in range(start, stop, CHUNK_TOKENS):
            end = min(at + CHUNK_TOKENS, stop)
            logits = self._advance(None if ids_BT is None else ids_BT[:, at:end], at, end - at, length)
        return logits

    def _length(self, tokens: int) -> int:
        """Of the first positions, without padding, in the longest sequence."""
        return tokens if self.mask_BS is None else max(1, int(self.mask_BS[:, :tokens].sum(-1).max()))

    def _reads_anew_at(self) -> int:
        """The position with which everything is read again, -1 if there is none."""
        anew = self.rule.reads_anew
        return -1 if anew is None or anew < self.prompt_BT.shape[1] else anew

    def _grow(self, tokens_BT: Tensor | None, position: int, anew: int) -> Tensor | None:
        """One more token of a generation that is to read everything again at the position `anew`."""
        if tokens_BT is not None:
            self.prompt_BT = torch.cat([self.prompt_BT, tokens_BT], dim=1)
        if position < anew:
            return self._advance(tokens_BT, position)
        known = None if tokens_BT is None else self.prompt_BT
        written, self.cache.written = self.cache.written, 0
        self.overwriting = True  # a fault halfway leaves KV of two kinds
        try:
            logits = self._read(known, 0, position + 1, self._length(position + 1))
        except StopRun:  # it comes in the place of the first frame: nothing is overwritten yet
            self.cache.written, self.overwriting = written, False
            raise
        self.cache.written, self.overwriting = position + 1, False
        return logits

    def _advance(
        self, tokens_BT: Tensor | None, position: int, new_tokens: int = 1, length: int | None = None
    ) -> Tensor | None:
        batch = self.prompt_BT.shape[0]
        order = self.order
        self.crossing.step = Step(order.session, order.epoch, order.attempt, position, 1)
        self.crossing.wire.waits.alike = new_tokens == 1
        if self.shard is None:
            return None
        self.cache.begin(position, new_tokens)
        mask_BS = position_ids = None
        if self.mask_BS is not None:
            mask_BS = self.mask_BS[:, : position + new_tokens]
            position_ids = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -new_tokens:]
        logits = self.shard.forward(
            cache=self.cache,
            tokens_BT=tokens_BT,
            batch=batch,
            new_tokens=new_tokens,
            attention_mask=mask_BS,
            position_ids=position_ids,
            length=length,
        )
        if not self.overwriting:
            self.cache.written = position + new_tokens
        return logits

    def _next(self, logits_BTR: Tensor | None, position: int, *, left: int) -> tuple[Tensor | None, bool]:
        """Choose the next token or wait for it; returns (ids or None where nobody needs them here, last)."""
        order, crossing = self.order, self.crossing
        crossing.step = Step(order.session, order.epoch, order.attempt, position, 1)
        last = left == 0
        ids_B: Tensor | None = None
        if self.me in self.head.devices:
            assert logits_BTR is not None, "a head holder has logits"
            ids_B = self._choose(logits_BTR[:, -1])
        if self.is_sampler:
            assert ids_B is not None and self.chooser is not None, "the sampler has chosen"
            ends = last or self.chooser.done or self._cancelled()
            for peer in self.waiting:
                crossing.send_end(peer, self.head.index + 1, ids_B.to(torch.int32), Kind.LAST if ends else Kind.TENSOR)
            crossing.wire.flush()
        elif self.me in self.waiting:
            ids_B, frame = crossing.receive_end(crossing.route.sampler, self.head.index + 1)
            ids_B, ends = ids_B.to(torch.int64), frame.kind == Kind.LAST
        else:
            return None, last
        if self.is_origin:
            self._emit(ids_B)
        if ends and not last:
            crossing.stop()
        return ids_B, ends

    def _choose(self, local_BR: Tensor) -> Tensor | None:
        crossing, index = self.crossing, self.head.index
        mine = self.head_rows[self.me]
        if self.sampling.only_maximum:
            at_B = local_BR.argmax(-1)
            value_B = local_BR.gather(-1, at_B[:, None]).squeeze(-1).float().cpu()
            ids_B = mine[at_B.cpu()]
            if not self.is_sampler:
                packed = torch.stack([value_B.view(torch.int32), ids_B.to(torch.int32)])
                crossing.send_end(self.head.lead, index, packed)
                crossing.wire.flush()
                return None
            for peer in self.head.devices[1:]:
                packed, _ = crossing.receive_end(peer, index)
                other_B, other_ids_B = packed[0].view(torch.float32), packed[1].to(torch.int64)
                better = (other_B > value_B) | ((other_B == value_B) & (other_ids_B < ids_B))
                value_B = torch.where(better | other_B.isnan(), other_B, value_B)
                ids_B = torch.where(better, other_ids_B, ids_B)
            assert self.chooser is not None, "the sampler has a chooser"
            check_maximum(value_B, self.chooser.finished_B)
            return self.chooser.accept(ids_B)
        logits_BR = local_BR.float().cpu()
        if not self.is_sampler:
            crossing.send_end(self.head.lead, index, deciding(logits_BR, self.sampling, crossing.step.position))
            crossing.wire.flush()
            return None
        assert self.chooser is not None and self.shard is not None, "the sampler holds rows of the head"
        if len(self.head.devices) > 1:
            whole_BV = logits_BR.new_full((logits_BR.shape[0], self.shard.arch.vocab), -math.inf)
            whole_BV[:, mine] = logits_BR
            for peer in self.head.devices[1:]:
                part, _ = crossing.receive_end(peer, index)
                fill_in(whole_BV, self.head_rows[peer], part)
            logits_BR = whole_BV
        return self.chooser.from_logits(logits_BR)

    def _emit(self, ids_B: Tensor) -> None:
        ids, payload = payload_of(ids_B.to(torch.int32))
        step = self.crossing.step
        shape = tuple(ids.shape)
        head = header(Kind.TOKEN, step.session, step.epoch, 0, step.position, step.attempt, "int32", shape)
        self.caller.send(head, payload)

    def _cancelled(self) -> bool:
        self.caller.take_in()
        return any(f.kind == Kind.CANCEL and f.attempt == self.order.attempt for f in self.caller.pending)
