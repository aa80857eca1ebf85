"""What whole layers cost on each device, and hidden states between devices: the additive view of layer-wise papers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from splitray.arrays import Floats
from splitray.codecs import encoded_bytes
from splitray.cost import Rates, load_of, work_s
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.memory import ffn_unit_bytes, group_bytes, vocab_row_bytes
from splitray.planners.protocol import ClusterState, equal_s_per_joule
from splitray.route import TOKEN_BYTES
from splitray.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of one decode step, by device in device order; matrices are [source, target], infinite without a link.

    A token goes from the head's device to the embedding's, and to the origin before or beside it; it takes infinitely
    long where one of these links is missing.
    """

    layer_s: Floats  # [D]
    head_s: Floats  # [D]
    state_s: Floats  # [D, D] one hidden state
    token_s: Floats  # [D, D] one token id

    def chain_s(self, embedding: int, layers: Sequence[int], head: int) -> float:
        """One decode step of whole layers: every stage, the states between them, the token back to the embedding."""
        stops = [embedding, *layers, head]
        moves = sum(self.state_s[a, b] for a, b in zip(stops, stops[1:], strict=False))
        return float(sum(self.layer_s[d] for d in layers) + self.head_s[head] + moves + self.token_s[head, embedding])


def layer_times(state: ClusterState, topology: Topology | None = None, *, thrifty: bool = False) -> LayerTimes:
    """The times at the state's context, on the state's topology or on another one of the same devices.

    `thrifty`: each stage takes longer by so little for the energy that edge devices spend on it that the energy decides
    only between chains that are `EQUAL`.
    """
    where, arch = topology or state.topology, state.arch
    work, rates = work_alone_s(state, where), Rates.of(where)
    head_s = work[:, -2]
    layer_s = work.sum(1) - head_s
    n, origin = len(where.ids), where.ids.index(where.origin)
    linked = rates.link_bytes_per_s[0] > 0

    def on_air_s(num_bytes: float) -> Floats:
        return np.where(linked, num_bytes / np.where(linked, rates.link_bytes_per_s[0], 1.0), 0.0)

    def transfer_s(num_bytes: float) -> Floats:
        seconds = np.where(linked, on_air_s(num_bytes) + rates.exchange_s[0] + rates.latency_s[0], np.inf)
        np.fill_diagonal(seconds, 0.0)
        return seconds

    hidden_bytes = encoded_bytes(state.codec, 1, arch.hidden_dim, dtype_bytes=arch.dtype_bytes)
    state_s, token_s = transfer_s(hidden_bytes), transfer_s(TOKEN_BYTES)
    # The head's device tells the origin first where that comes first in the order and is reached by the same medium.
    busy_s = on_air_s(TOKEN_BYTES) + np.where(linked, rates.exchange_s[0], 0.0)
    shared = (rates.medium == rates.medium[:, origin, None]) & ~np.eye(n, dtype=bool)
    shared[origin], shared[:, : origin + 1] = False, False
    token_s = token_s + np.where(shared, busy_s[:, origin, None], 0.0)
    token_s[~linked[:, origin] & (np.arange(n) != origin)] = np.inf
    token_s[:, [not where.serves(d) for d in where.ids]] = np.inf
    times = LayerTimes(layer_s=layer_s, head_s=head_s, state_s=state_s, token_s=token_s)
    edge = np.array([d.tier == "edge" for d in where.devices])
    active_w = edge * np.array([d.active_w - d.idle_w for d in where.devices])
    radio_w = edge * np.array([d.radio_w for d in where.devices])
    price = equal_s_per_joule(where)
    if not thrifty or not price:
        return times
    both_w = radio_w[:, None] + radio_w
    told_j = (on_air_s(TOKEN_BYTES) * both_w)[:, origin, None] * (np.arange(n) != origin)
    joules = LayerTimes(
        layer_s=active_w * layer_s, head_s=active_w * head_s, state_s=on_air_s(hidden_bytes) * both_w,
        token_s=on_air_s(TOKEN_BYTES) * both_w + told_j,
    )  # fmt: skip
    return LayerTimes(**{f.name: getattr(times, f.name) + price * getattr(joules, f.name) for f in fields(LayerTimes)})


def work_alone_s(state: ClusterState, where: Topology) -> Floats:
    """The stages of a model of one layer on each device alone, [D, B]: all are priced at once, an instance each."""
    arch, first, rates = replace(state.arch, num_layers=1), where.ids[0], Rates.of(where)
    alone = replace(where, devices=where.devices[:1], links=(), origin=first)  # what a link costs is not asked here
    layer = LayerPlacement(Shares.whole(arch.num_kv_heads, first), Shares.whole(arch.ffn_dim, first))
    load = load_of(Placement((layer,), (first,), Shares.whole(arch.vocab, first)), arch, alone)
    each = replace(
        rates,
        flops_per_s=rates.flops_per_s.T,
        bytes_per_s=rates.bytes_per_s.T,
        launch_s=rates.launch_s.T,
        contention_s_per_byte=np.zeros((len(where.ids), 1, 1)),
    )
    return work_s(load, each, context_tokens=max(1, state.context_tokens))[:, :, 0]


def layer_bytes(state: ClusterState) -> int:
    """One whole layer: its weights and the KV of the state's context."""
    arch = state.arch
    return arch.num_kv_heads * group_bytes(arch, state.context_tokens) + arch.ffn_dim * ffn_unit_bytes(arch)


def table_bytes(state: ClusterState) -> int:
    """The head."""
    return state.arch.vocab * vocab_row_bytes(state.arch)


def embedding_bytes(state: ClusterState) -> int:
    """The embedding, with the tables that some models keep beside it."""
    return table_bytes(state) + state.arch.weight_bytes(state.arch.embedding_params)
