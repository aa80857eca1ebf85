"""How long two devices take for pieces of a model and for what they tell each other, at the rates of N instances.

Knows no placement. Shapes: N instances (last); two devices or directions, edge and cloud, come first; P passes: a token
and, where it pays its share of one, a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitray.arch import ModelArch
from splitray.arrays import Floats, Ints
from splitray.codecs import Codec, encoded_bytes
from splitray.cost import Rates
from splitray.planners.optimum.space import MISSING_S
from splitray.planners.protocol import RequestShape
from splitray.rl.grid.choice import CLOUD, EDGE
from splitray.topology import Topology

PARTS, COPIES = 2, 3  # states beside EDGE and CLOUD: who holds a sub-block
_MEMBER = np.array([[True, False], [False, True], [True, True], [True, True]])
_BRINGS = np.array([[True, False], [False, True], [True, True], [False, False]])  # copies have nothing to tell
# Whether edge tells cloud, and cloud edge, between a sub-block held in one state and the next, [4, 4, 2].
SENDS = _BRINGS[:, None, :] & _MEMBER[None, :, ::-1]
_IDLE = np.where(_MEMBER.T[:, None, None, :, None], 0.0, -np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceWork:
    """One piece for each pass: seconds of its FLOPs on each device, [2, P, N], and bytes to read, [P, N]."""

    flops_s: Floats
    read_bytes: Floats

    @property
    def of_token(self) -> PieceWork:
        """The same work for the first pass, a token, alone."""
        return PieceWork(flops_s=self.flops_s[:, :1], read_bytes=self.read_bytes[:1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """When each device may begin ([2, P, 4, 4, N]), what that radios ([P, 4, 4, N]), and what each pass counts, [P]."""

    weight: Floats
    attention: PieceWork
    ffn: PieceWork
    arrive_s: Floats
    radio_j: Floats


class PairTimes:
    """Seconds that work and messages take, for one arch on two devices, at the rates of N instances."""

    def __init__(self, arch: ModelArch, topology: Topology, rates: Rates, num_instances: int, codec: Codec) -> None:
        """Keep the rates, N or 1."""
        self.arch, self.num_instances, self._rates, self._codec = arch, num_instances, rates, codec
        self.flops_per_s, self.bytes_per_s = rates.flops_per_s.T, rates.bytes_per_s.T  # [2, N or 1]
        self.launch_s = rates.launch_s.T
        self.power_w = np.array([[d.active_w - d.idle_w] for d in topology.devices])
        self.radio_w = sum(d.radio_w for d in topology.devices)  # a message keeps both radios busy
        rate, self._exchange_s, self._latency_s = (
            x[:, [EDGE, CLOUD], [CLOUD, EDGE]].T for x in (rates.link_bytes_per_s, rates.exchange_s, rates.latency_s)
        )
        there = np.broadcast_to(rate > 0, (2, num_instances))
        self._s_per_byte, self._missing_s = there / np.where(rate > 0, rate, 1.0), np.where(there, 0.0, MISSING_S)
        shared = int(rates.medium[0, 1])
        self._one_medium = shared >= 0 and shared == int(rates.medium[1, 0])

    def passes(self, context: Floats, request: RequestShape | None) -> Passes:
        """A token after `context` tokens [N], and its share of a request's prompt."""
        arch, prompt = self.arch, [] if request is None else [float(request.prompt_tokens)]
        positions = np.array([1.0, *prompt])[:, None]
        before = np.stack([np.maximum(1.0, context), *(np.full(self.num_instances, p) for p in prompt)])  # [P, N]
        group, unit = arch.weight_bytes(arch.group_params), arch.weight_bytes(arch.ffn_unit_params)
        flops = positions * (2 * arch.group_params + 4 * arch.heads_per_group * arch.head_dim * before)
        per_s = self.flops_per_s[:, None]
        attention = PieceWork(flops_s=flops / per_s, read_bytes=group + arch.kv_bytes_per_token * before)
        ffn_flops = np.broadcast_to(2 * arch.ffn_unit_params * positions, before.shape)
        ffn = PieceWork(flops_s=ffn_flops / per_s, read_bytes=np.full(before.shape, float(unit)))
        arrive_s, radio_j = self._crossing(positions)
        radio_j[1:] = 0.0  # as in `Additive`, a prompt's radio is not counted
        weight = np.array([1.0] if request is None else [1.0, 1 / request.output_tokens])
        return Passes(weight=weight, attention=attention, ffn=ffn, arrive_s=arrive_s, radio_j=radio_j)

    def busy_s(self, pieces: PieceWork, counts: Ints) -> Floats:
        """Computing time of so many pieces [2, X, N or 1] on each device, [2, P, X, N], as `work_s` says."""
        counts = counts[:, None]
        read = counts * pieces.read_bytes[:, None]
        seconds = read / self.bytes_per_s[:, None, None]
        if self._rates.shares_memory:
            slower = self._rates.contention_s_per_byte[:, [EDGE, CLOUD], [CLOUD, EDGE]].T
            seconds = seconds + read.min(0) * slower[:, None, None]
        busy: Floats = np.maximum(counts * pieces.flops_s[:, :, None], seconds)
        return busy + (counts > 0) * self.launch_s[:, None, None]

    def ways(self, num_bytes: float | Floats) -> tuple[Floats, Floats, Floats]:
        """Of messages from edge to cloud and back: on air, with the fixed cost, until there, [2, N] or [2, P, N] each.

        `num_bytes` is one number, or [P, 1].
        """
        over = (slice(None), None) if np.ndim(num_bytes) else slice(None)
        air = num_bytes * self._s_per_byte[over] + self._missing_s[over]
        occupied = air + self._exchange_s[over]
        return air, occupied, occupied + self._latency_s[over]

    def _crossing(self, positions: Floats) -> tuple[Floats, Floats]:
        """The residual of so many positions [P, 1], from any state to any other, [2, P, 4, 4, N] and [P, 4, 4, N].

        When each device may begin if those before are done at 0 (never where it has no part), and joule of radio.
        """
        num_bytes = positions * encoded_bytes(self._codec, 1, self.arch.hidden_dim, dtype_bytes=self.arch.dtype_bytes)
        air, occupied, ready = (x[:, :, None, None] for x in self.ways(num_bytes))
        up, down = SENDS[..., EDGE, None], SENDS[..., CLOUD, None]
        late = np.where(up & self._one_medium, occupied[EDGE], 0.0)  # the edge is first on the air
        arrive = np.stack([np.where(down, ready[CLOUD] + late, _IDLE[EDGE]), np.where(up, ready[EDGE], _IDLE[CLOUD])])
        return arrive, (up * air[EDGE] + down * air[CLOUD]) * self.radio_w
