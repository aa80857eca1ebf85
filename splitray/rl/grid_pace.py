"""How long two devices take for pieces of a model and for what they tell each other, at the rates of N instances.

Knows no placement. Shapes: N instances (last); two devices or directions, edge and cloud, come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitray.arch import ModelArch
from splitray.codecs import Codec, encoded_bytes
from splitray.cost import Rates
from splitray.planners.optimum.space import MISSING_S
from splitray.rl.choice import CLOUD, EDGE
from splitray.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PARTS, COPIES = 2, 3  # states beside EDGE and CLOUD: who holds a sub-block
_MEMBER = np.array([[True, False], [False, True], [True, True], [True, True]])
_BRINGS = np.array([[True, False], [False, True], [True, True], [False, False]])  # copies have nothing to tell
# Whether edge tells cloud, and cloud edge, between a sub-block held in one state and the next, [4, 4, 2].
SENDS = _BRINGS[:, None, :] & _MEMBER[None, :, ::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """One piece for one pass: seconds of its FLOPs on each device, [2, N], and bytes to read, [N]."""

    flops_s: Floats
    read_bytes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A token, or a prompt: when each device may begin ([2, 4, 4, N]), and what that radios ([4, 4, N])."""

    weight: float
    attention: Pieces
    ffn: Pieces
    arrive_s: Floats
    radio_j: Floats


class Pace:
    """What work and messages take, for one arch on two devices."""

    def __init__(self, arch: ModelArch, topology: Topology, rates: Rates, num_instances: int, codec: Codec) -> None:
        """Keep the rates, N or 1."""
        self.arch, self.num_instances, self._rates, self._codec = arch, num_instances, rates, codec
        self.flops_per_s, self.bytes_per_s = rates.flops_per_s.T, rates.bytes_per_s.T  # [2, N or 1]
        self.launch_s = rates.launch_s.T
        self.power_w = np.array([[d.active_w - d.idle_w] for d in topology.devices])
        self.radio_w = sum(d.radio_w for d in topology.devices)  # a message keeps both radios busy
        shared = int(rates.medium[0, 1])
        self._one_medium = shared >= 0 and shared == int(rates.medium[1, 0])

    def of(self, positions: float, context: Floats, share: float | None = None) -> Pass:
        """A step of so many new positions after `context` tokens [N]; a prompt of which a token pays a share."""
        arch = self.arch
        group, unit = arch.weight_bytes(arch.group_params), arch.weight_bytes(arch.ffn_unit_params)
        flops = positions * (2 * arch.group_params + 4 * arch.heads_per_group * arch.head_dim * context)
        ones = np.ones(self.num_instances)
        attention = Pieces(
            flops_s=flops / self.flops_per_s,
            read_bytes=group + arch.kv_bytes_per_token * context,
        )
        ffn = Pieces(
            flops_s=2 * arch.ffn_unit_params * positions * ones / self.flops_per_s,
            read_bytes=unit * ones,
        )
        arrive_s, radio_j = self.crossing(positions)
        if share is not None:  # as in `Additive`, a prompt's radio is not counted
            radio_j = np.zeros_like(radio_j)
        return Pass(
            weight=1.0 if share is None else share, attention=attention, ffn=ffn, arrive_s=arrive_s, radio_j=radio_j
        )

    def busy_s(self, pieces: Pieces, counts: tuple[Ints, Ints] | Ints) -> Floats:
        """Computing time of so many pieces on each device, [2, .., N], as `work_s` says."""
        bytes_read = [c * pieces.read_bytes for c in counts]
        seconds = np.empty((2, *np.shape(bytes_read[0])))
        for d in (EDGE, CLOUD):
            read = bytes_read[d] / self.bytes_per_s[d]
            if self._rates.shares_memory:
                read = read + np.minimum(*bytes_read) * self._rates.contention_s_per_byte[:, d, 1 - d]
            seconds[d] = np.maximum(counts[d] * pieces.flops_s[d], read) + (counts[d] > 0) * self.launch_s[d]
        return seconds

    def way(self, source: int, num_bytes: float) -> tuple[Floats, Floats, Floats]:
        """Of one message to the other device: seconds on air, with its fixed cost, and until it is there, [N]."""
        at = slice(None), source, 1 - source
        rate = self._rates.link_bytes_per_s[at]
        air = np.where(rate > 0, num_bytes / np.where(rate > 0, rate, 1.0), MISSING_S) + np.zeros(self.num_instances)
        occupied = air + self._rates.exchange_s[at]
        return air, occupied, occupied + self._rates.latency_s[at]

    def crossing(self, positions: float) -> tuple[Floats, Floats]:
        """The residual of so many positions, from any state to any other, [2, 4, 4, N] and [4, 4, N].

        When each device may begin if those before are done at 0 (never where it has no part), and joule of radio.
        """
        hidden = encoded_bytes(self._codec, 1, self.arch.hidden_dim, dtype_bytes=self.arch.dtype_bytes)
        num_bytes = positions * hidden
        ways = [self.way(d, num_bytes) for d in (EDGE, CLOUD)]
        there = SENDS[..., None]
        late = np.where(there[:, :, EDGE] & self._one_medium, ways[EDGE][1], 0.0)  # the edge is first on the air
        arrive = np.where(_MEMBER.T[:, None, :, None], np.zeros((2, 4, 4, self.num_instances)), -np.inf)
        arrive[EDGE] = np.where(there[:, :, CLOUD], ways[CLOUD][2] + late, arrive[EDGE])
        arrive[CLOUD] = np.where(there[:, :, EDGE], ways[EDGE][2], arrive[CLOUD])
        radio = (there[:, :, EDGE] * ways[EDGE][0] + there[:, :, CLOUD] * ways[CLOUD][0]) * self.radio_w
        return arrive, radio
