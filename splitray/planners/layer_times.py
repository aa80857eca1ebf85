"""What whole layers cost on each device, and hidden states between devices: the additive view of layer-wise papers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from splitray.arrays import Floats
from splitray.cost import Rates, load_of, work_s
from splitray.planners.memory import ffn_unit_bytes, group_bytes, vocab_row_bytes
from splitray.planners.protocol import ClusterState
from splitray.planners.whole import layers_on
from splitray.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of one decode step, by device in device order; matrices are [source, target], infinite without a link."""

    layer_s: Floats  # [D]
    head_s: Floats  # [D]
    state_s: Floats  # [D, D] one hidden state
    token_s: Floats  # [D, D] one token id

    def chain_s(self, embedding: int, layers: Sequence[int], head: int) -> float:
        """One decode step of whole layers: every stage, the states between them, the token back to the embedding."""
        stops = [embedding, *layers, head]
        moves = sum(self.state_s[a, b] for a, b in zip(stops, stops[1:], strict=False))
        return float(sum(self.layer_s[d] for d in layers) + self.head_s[head] + moves + self.token_s[head, embedding])


def layer_times(state: ClusterState, topology: Topology | None = None) -> LayerTimes:
    """The times at the state's context, on the state's topology or on another one of the same devices."""
    where, arch = topology or state.topology, state.arch
    n, work = len(where.ids), work_alone_s(state, where)
    head = work[:, -2]
    layer = work.sum(1) - head

    def transfer(num_bytes: int) -> Floats:
        seconds = np.full((n, n), np.inf)
        for link in where.links:
            seconds[where.ids.index(link.source), where.ids.index(link.target)] = link.transfer_s(num_bytes)
        np.fill_diagonal(seconds, 0.0)
        return seconds

    return LayerTimes(
        layer_s=layer, head_s=head, state_s=transfer(arch.hidden_dim * arch.dtype_bytes), token_s=transfer(4)
    )


def work_alone_s(state: ClusterState, where: Topology) -> Floats:
    """The stages of a model of one layer on each device alone, [D, B]: all are priced at once, an instance each."""
    arch, first, rates = replace(state.arch, num_layers=1), where.ids[0], Rates.of(where)
    alone = replace(where, devices=where.devices[:1], links=(), origin=first)  # what a link costs is not asked here
    load = load_of(layers_on([first], first, first, replace(state, arch=arch), pinned=False), arch, alone)
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
    """The embedding, or the head."""
    return state.arch.vocab * vocab_row_bytes(state.arch)
