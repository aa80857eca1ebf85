"""Which messages cross between two holdings, by the exchange rule of route.py: no rates, no times."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from splitray.arch import ModelArch
from splitray.codecs import Codec
from splitray.route import BEST_BYTES, NORM_SUMS_BYTES, TOKEN_BYTES, Mode, SubBlock, crossing, message_bytes
from splitray.topology import Topology

Messages = Sequence[tuple[int, int, int]]  # source, target, bytes


@dataclass(frozen=True, slots=True)
class BlockHolding:
    """Who does a sub-block: device indices in order, and whether each of several does all of it."""

    devices: tuple[int, ...]
    replicated: bool = False

    @property
    def partitioned(self) -> bool:
        """Whether several devices share it."""
        return len(self.devices) > 1 and not self.replicated


_known_patterns: dict[Hashable, dict[str, list[Messages]]] = {}


def patterns(
    arch: ModelArch, where: Topology, holdings: tuple[BlockHolding, ...], tables: tuple[BlockHolding, ...], codec: Codec
) -> dict[str, list[Messages]]:
    """Who sends how much to whom at every boundary; remembered, as it hardly changes while rates do.

    Returns:
        `crossing` between any two holdings [S * S], `entry` from any `tables`, which hold the embedding, [E * S],
        `inner` within a partitioned attention [S], `best` to the sampler [S], and `token` back to all holders of the
        embedding and the origin [S * E].
    """
    links = tuple((x.source, x.target) for x in where.links) if len(where.ids) < 3 else where  # no choice of a holder
    key = (arch, where.ids, where.origin, links, holdings, tables, codec)
    if key not in _known_patterns:
        if len(_known_patterns) > 64:
            _known_patterns.clear()
        _known_patterns[key] = _make_patterns(arch, where, holdings, tables, codec)
    return _known_patterns[key]


def _make_patterns(
    arch: ModelArch, where: Topology, holdings: tuple[BlockHolding, ...], tables: tuple[BlockHolding, ...], codec: Codec
) -> dict[str, list[Messages]]:
    ids = where.ids
    index = {d: i for i, d in enumerate(ids)}

    def block(h: BlockHolding) -> SubBlock:
        mode: Mode = "partitioned" if h.partitioned else "replicated" if h.replicated else "whole"
        return SubBlock(0, "ffn", 0, tuple(ids[d] for d in h.devices), mode)

    def between(here: BlockHolding, there: BlockHolding) -> Messages:
        found = crossing(block(here), block(there), arch, where, codec)
        return [(index[m.source], index[m.target], message_bytes(m, arch, codec=codec)) for m in found]

    every, origin = range(len(ids)), index[where.origin]
    return {
        "crossing": [between(a, b) for a in holdings for b in holdings],
        "entry": [between(e, b) for e in tables for b in holdings],
        "inner": [
            [(a, b, NORM_SUMS_BYTES) for a in h.devices for b in h.devices if a != b] if h.partitioned else []
            for h in holdings
        ],
        "best": [[(i, h.devices[0], BEST_BYTES) for i in h.devices[1:]] for h in holdings],
        "token": [
            [(h.devices[0], d, TOKEN_BYTES) for d in every if d in (*e.devices, origin) and d != h.devices[0]]
            for h in holdings
            for e in tables
        ],
    }
