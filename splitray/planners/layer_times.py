"""What whole layers cost on each device, and hidden states between devices: the additive view of layer-wise papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from splitray.arrays import Floats
from splitray.codecs import encoded_bytes
from splitray.cost import Load, Rates, holding, load_of, work_s
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.pairs import LinkedPairs, PairSeconds
from splitray.planners.protocol import ClusterState, equal_s_per_joule
from splitray.route import TOKEN_BYTES
from splitray.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of one decode step, by device in device order and by pair of devices.

    A token goes from the head's device to the embedding's, and to the origin before or beside it; it takes infinitely
    long where one of these links is missing.
    """

    layer_s: Floats  # [D]
    head_s: Floats  # [D]
    state_s: PairSeconds  # one hidden state
    token_s: PairSeconds  # one token id

    def chain_s(self, embedding: int, layers: Sequence[int], head: int) -> float:
        """One decode step of whole layers: every stage, the states between them, the token back to the embedding."""
        moves = sum(self.state_s[a, b] for a, b in pairwise([embedding, *layers, head]) if a != b)
        return float(sum(self.layer_s[d] for d in layers) + self.head_s[head] + moves + self.token_s[head, embedding])


def layer_times(state: ClusterState, topology: Topology | None = None, *, thrifty: bool = False) -> LayerTimes:
    """The times at the state's context, on the state's topology or on another one of the same devices.

    `thrifty`: each stage takes longer by so little for the energy that edge devices spend on it that the energy decides
    only between chains that are `EQUAL`.
    """
    where, arch = topology or state.topology, state.arch
    work = work_alone_s(state, where)
    head_s = work[:, -2]
    layer_s = work.sum(1) - head_s
    hidden_bytes = encoded_bytes(state.codec, 1, arch.hidden_dim, dtype_bytes=arch.dtype_bytes)
    links = LinkedPairs.of(where)
    on_air_s, told_s = links.on_air_s(hidden_bytes), links.on_air_s(TOKEN_BYTES)
    state_s, token_s = (on_air + links.exchange_s + links.latency_s for on_air in (on_air_s, told_s))
    # The head's device tells the origin first where that comes first in the order and is reached by the same medium.
    origin, to_origin = where.index[where.origin], links.to_origin
    busy_s = np.where(to_origin >= 0, told_s[to_origin] + links.exchange_s[to_origin], 0.0)[links.source]
    medium = np.where(to_origin >= 0, links.medium[to_origin], -1)[links.source]
    away = links.source != origin
    token_s += np.where(away & links.linked & (links.target > origin) & (links.medium == medium), busy_s, 0.0)
    token_s[away & (to_origin < 0)[links.source]] = np.inf
    token_s[~np.array([where.serves(d) for d in where.ids])[links.target]] = np.inf
    edge = np.array([d.tier == "edge" for d in where.devices])
    active_w = edge * np.array([d.active_w - d.idle_w for d in where.devices])
    radio_w = edge * np.array([d.radio_w for d in where.devices])
    price = equal_s_per_joule(where)
    if thrifty and price:
        both_w = radio_w[links.source] + radio_w[links.target]
        told_j = np.where(to_origin >= 0, (told_s * both_w)[to_origin], 0.0)[links.source]
        layer_s, head_s = layer_s + price * (active_w * layer_s), head_s + price * (active_w * head_s)
        state_s = state_s + price * (on_air_s * both_w)
        token_s = token_s + price * (told_s * both_w + told_j * (links.target != origin))
    return LayerTimes(layer_s=layer_s, head_s=head_s, state_s=links.times(state_s), token_s=links.times(token_s))


def work_alone_s(state: ClusterState, where: Topology) -> Floats:
    """The stages of a model of one layer on each device alone, [D, B]: all are priced at once, an instance each."""
    arch, first, n = replace(state.arch, num_layers=1), where.ids[0], len(where.ids)
    alone = replace(where, devices=where.devices[:1], links=(), origin=first)  # what a link costs is not asked here
    layer = LayerPlacement(Shares.whole(arch.num_kv_heads, first), Shares.whole(arch.ffn_dim, first))
    placement = Placement((layer,), (first,), Shares.whole(arch.vocab, first))
    formats = [arch.on(d).weights for d in where.ids]
    loads = {w: load_of(placement, replace(arch, weights=w, device_weights=()), alone) for w in dict.fromkeys(formats)}
    load = next(iter(loads.values())) if len(loads) == 1 else Load.stack([loads[w] for w in formats])
    none = np.zeros((n, 1, 1))
    rates = Rates.alone(holding(where.devices, arch))
    each = Rates(
        **{name: rate.T for name, rate in rates.items()}, link_bytes_per_s=none, latency_s=none, exchange_s=none,
        contention_s_per_byte=none, medium=np.full((1, 1), -1),
    )  # fmt: skip
    return work_s(load, each, context_tokens=max(1, state.context_tokens))[:, :, 0]
