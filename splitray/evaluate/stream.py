"""One stream of tokens over one link whose rate a trace drives, token by token: for placements that change on the way.

A step of a placement takes a time of its own (work, latencies) and sends bytes over the link; both follow from the cost
model. KV that a new holder lacks is copied beside the stream, with half of the link, or read again from the tokens.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from splitray.arch import ModelArch
from splitray.cost import CostModel
from splitray.migration import diff, moved_bytes
from splitray.placement import Placement
from splitray.sim.traces import Trace
from splitray.topology import Topology

FAST, SLOW = 1e13, 1e5  # byte/s between which the cost model is read off


class TracedLink:
    """The bytes that a link has carried by a time, and back; a rate of 0 is an outage. The trace repeats."""

    def __init__(self, trace: Trace, until_s: float) -> None:
        """Sum the trace, again and again, up to a time and some more."""
        again = trace.repeated(2 * until_s)
        self._time_s: list[float] = again.time_s.tolist()
        self._rate: list[float] = again.value.tolist()
        steps = np.diff(again.time_s)
        self._bytes: list[float] = np.concatenate([[0.0], np.cumsum(again.value[:-1] * steps)]).tolist()

    def sent(self, at_s: float) -> float:
        """Bytes that the link has carried by `at_s` seconds."""
        i = bisect_right(self._time_s, at_s) - 1
        return self._bytes[i] + self._rate[i] * (at_s - self._time_s[i])

    def until(self, start_s: float, num_bytes: float) -> float:
        """When bytes that start at a time are across, seconds; infinite where the link never comes back."""
        if num_bytes <= 0:
            return start_s
        target = self.sent(start_s) + num_bytes
        i = bisect_left(self._bytes, target) - 1
        left = target - self._bytes[i]
        return self._time_s[i] + left / self._rate[i] if self._rate[i] > 0 else float("inf")

    def rate(self, from_s: float, to_s: float) -> float:
        """Mean byte/s between two times in seconds."""
        return (self.sent(to_s) - self.sent(from_s)) / (to_s - from_s)


@dataclass(frozen=True, slots=True)
class StreamStep:
    """What a step takes apart from the bytes that it sends, s, and these bytes, both directions together."""

    own_s: float
    link_bytes: float


class StreamPrices:
    """Steps and moves of placements of one model on one topology whose links all have one rate."""

    def __init__(self, arch: ModelArch, topology: Topology, *, context_step: int = 64) -> None:
        """Prices are read off once for each placement and `context_step` tokens of context."""
        self.arch, self.topology, self._context_step = arch, topology, context_step
        self._models = tuple(CostModel(arch, at_rate(topology, b)) for b in (FAST, SLOW))
        self._decoded, self._moved = cache(self._decode), cache(self._kv_bytes)
        self.read = cache(self._read)
        """(placement, tokens) -> a prompt, or a context that is read again."""

    def token(self, placement: Placement, context: int) -> StreamStep:
        """The step of a token behind the first, at this context in tokens."""
        return self._decoded(placement, max(1, context // self._context_step) * self._context_step)

    def kv_bytes(self, old: Placement, new: Placement, context: int) -> int:
        """Bytes of KV that a move from one placement to another sends over the link at this context."""
        return self._moved(old, new) * context

    def _decode(self, placement: Placement, context: int) -> StreamStep:
        return _step(*(m.tpot_s(placement, context_tokens=context) for m in self._models))

    def _read(self, placement: Placement, tokens: int) -> StreamStep:
        return _step(*(m.ttft_s(placement, prompt_tokens=tokens) for m in self._models))

    def _kv_bytes(self, old: Placement, new: Placement) -> int:
        return moved_bytes(diff(old, new, self.arch, 1), staged=True)


def at_rate(topology: Topology, bandwidth_bytes_per_s: float) -> Topology:
    """The topology with one rate on all links."""
    links = tuple(replace(x, bandwidth_bytes_per_s=bandwidth_bytes_per_s) for x in topology.links)
    return replace(topology, links=links)


def _step(fast_s: float, slow_s: float) -> StreamStep:
    return StreamStep(fast_s, max(0.0, (slow_s - fast_s) * SLOW))


@dataclass(slots=True)
class Copying:
    """KV on its way to the placement that comes next."""

    then: Placement
    left_bytes: float


class Stream:
    """Requests of one shape, one behind the other, at any point of time and of the request that is being answered."""

    def __init__(self, prices: StreamPrices, wire: TracedLink, *, prompt_tokens: int, output_tokens: int) -> None:
        """A stream of requests of this shape; its methods are given the time, it keeps none."""
        self.prices, self.wire = prices, wire
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens

    def after(self, step: StreamStep, start_s: float) -> float:
        """The end of a step that has the link for itself."""
        return self.wire.until(start_s + step.own_s, step.link_bytes)

    def read(self, placement: Placement, tokens: int, start_s: float) -> float:
        """The end of a prompt, or of reading a context again."""
        return self.after(self.prices.read(placement, tokens), start_s)

    def advance(
        self, placement: Placement, token: int, tokens: int, start_s: float, copying: Copying | None = None
    ) -> tuple[float, int]:
        """Generate; with `copying`, until it is done.

        `token` is the first one to generate, counted within the request (1 is the first behind the prompt); `copying`
        has half of the link while the stream uses it.

        Returns:
            The time, and the tokens that were generated.
        """
        now_s = start_s
        for done in range(tokens):
            step = self.prices.token(placement, self.prompt_tokens + token + done)
            share = 1.0 if copying is None or not step.link_bytes else 2.0
            end_s = self.wire.until(now_s + step.own_s, share * step.link_bytes)
            if copying is not None:
                copying.left_bytes -= (self.wire.sent(end_s) - self.wire.sent(now_s)) / share
                if copying.left_bytes <= 0:
                    return end_s, done + 1
            now_s = end_s
        return now_s, tokens
