"""What crosses between pairs of devices, for as many pairs as have a link: a matrix of many devices is nearly empty.

Shapes: P pairs, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSeconds:
    """Seconds by [source, target], kept for linked pairs and devices themselves: of many devices few pairs are linked.

    Indexed as a matrix by numbers or arrays of them; infinite for every other pair.
    """

    pairs: Ints  # [P] source * D + target, rising
    seconds: Floats  # [P]
    num_devices: int

    def __getitem__(self, pair: tuple[Any, ...]) -> Any:
        """The seconds of one pair, or of the pairs of two arrays that broadcast."""
        source, target = pair
        wanted = np.asarray(source) * self.num_devices + np.asarray(target)
        at = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        return np.where(self.pairs[at] == wanted, self.seconds[at], np.inf)

    def targets(self, source: int) -> Ints:
        """The devices that a device has a link to, and itself."""
        first, end = np.searchsorted(self.pairs, [source * self.num_devices, (source + 1) * self.num_devices])
        return self.pairs[first:end] % self.num_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedPairs:
    """The links of a topology and each device's way to itself, which takes no time, by source and target."""

    source: Ints  # [P]
    target: Ints  # [P]
    linked: Bools  # [P] False for a device and itself
    bytes_per_s: Floats  # [P]
    latency_s: Floats  # [P]
    exchange_s: Floats  # [P]
    medium: Ints  # [P] -1 where nothing is shared
    to_origin: Ints  # [D] which of them leads from a device to the origin, -1 where none does

    @staticmethod
    def of(where: Topology) -> LinkedPairs:
        """Those of a topology."""
        index, n = where.index, len(where.ids)
        media = {m: i for i, m in enumerate({x.medium for x in where.links} - {None})}
        rows = [(index[x.source], index[x.target], 1.0, x.bandwidth_bytes_per_s, x.rtt_s / 2, x.exchange_s,
                 media.get(x.medium, -1)) for x in where.links]  # fmt: skip
        table = np.array([*rows, *((d, d, 0.0, 1.0, 0.0, 0.0, -1) for d in range(n))])
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        source, target, medium = (table[:, c].astype(np.int64) for c in (0, 1, 6))
        to_origin = np.full(n, -1)
        ways = np.flatnonzero((target == index[where.origin]) & (source != target))
        to_origin[source[ways]] = ways
        return LinkedPairs(
            source=source, target=target, linked=table[:, 2] > 0, bytes_per_s=table[:, 3], latency_s=table[:, 4],
            exchange_s=table[:, 5], medium=medium, to_origin=to_origin,
        )  # fmt: skip

    def times(self, seconds: Floats) -> PairSeconds:
        """Seconds of each of them, [P], as a matrix."""
        n = len(self.to_origin)
        return PairSeconds(pairs=self.source * n + self.target, seconds=seconds, num_devices=n)

    def on_air_s(self, num_bytes: float) -> Floats:
        """Seconds that a message occupies each of them, [P]."""
        return np.where(self.linked, num_bytes / self.bytes_per_s, 0.0)
