"""Planners that put the whole model on one device: the ends of every comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from splitray.errors import PlacementError, listed
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.layer_times import layer_times
from splitray.planners.memory import fastest_first, first_fit
from splitray.planners.protocol import ClusterState
from splitray.topology import DeviceId


@dataclass(frozen=True, slots=True)
class EdgeOnly:
    """Everything on the origin if it is an edge, else on the first edge."""

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where there is no edge or it is too small."""
        return first_fit([own_edge(state)], lambda d: whole_on(d, state), state)


@dataclass(frozen=True, slots=True)
class CloudOnly:
    """Everything on the cloud device with room where a token is predicted to take the least; tokens stream back."""

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where there is no cloud device or none has room."""
        return first_fit(clouds(state), lambda d: whole_on(d, state), state)


@dataclass(frozen=True, slots=True)
class CloudOnlyRtt:
    """The embedding on the origin, all else on the cloud: a round trip a token, as where clients hold the loop."""

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where there is no cloud device or none has room."""
        origin, layers = state.topology.origin, state.arch.num_layers
        return first_fit(clouds(state, embedding=origin), lambda d: layers_on([d] * layers, origin, d, state), state)


@dataclass(frozen=True, slots=True)
class BestDevice:
    """Everything on the device with room where a token is predicted to take the least, whatever its tier.

    Of devices that are equal in this, the one that costs the edge less energy. What the origin does not reach comes
    last: during an outage the cloud is out.
    """

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where no single device has room."""
        only_origin = state.arch.tokens_everywhere and state.pinned_embedding is not None
        able = [state.topology.origin] if only_origin else served_first(state)
        return first_fit(quickest_first(state, able), lambda d: whole_on(d, state), state)


def whole_on(device: DeviceId, state: ClusterState) -> Placement:
    """Everything on one device but the pieces that are pinned to the origin."""
    return layers_on([device] * state.arch.num_layers, device, device, state)


def layers_on(devices: Sequence[DeviceId], embedding: DeviceId, head: DeviceId, state: ClusterState) -> Placement:
    """Whole layers, one device each, and the two ends where nothing pins them to the origin."""
    arch = state.arch
    each = {d: LayerPlacement(Shares.whole(arch.num_kv_heads, d), Shares.whole(arch.ffn_dim, d)) for d in set(devices)}
    return Placement(
        tuple(each[d] for d in devices),
        (state.pinned_embedding or embedding,),
        Shares.whole(arch.vocab, state.pinned_head or head),
    )


def served_first(state: ClusterState) -> list[DeviceId]:
    """All devices, those that the origin reaches first, the fastest of them first."""
    return sorted(fastest_first(state.topology.devices), key=lambda d: not state.topology.serves(d))


def quickest_first(
    state: ClusterState,
    devices: Sequence[DeviceId],
    *,
    first: tuple[DeviceId, int] | None = None,
    embedding: DeviceId | None = None,
) -> list[DeviceId]:
    """Devices by the predicted time of a token where all is on them; what a link is missing for comes last, in order.

    `first`: another device holds so many of the first layers; `embedding`: another one holds that.
    """
    times, index = layer_times(state, thrifty=True), state.topology.index
    before, count = first or (None, 0)

    def seconds(device: DeviceId) -> float:
        layers = [before or device] * count + [device] * (state.arch.num_layers - count)
        table = state.pinned_embedding or embedding or layers[0]
        head = state.pinned_head or device
        return times.chain_s(index[table], [index[d] for d in layers], index[head])

    return sorted(devices, key=seconds)


def own_edge(state: ClusterState) -> DeviceId:
    """The origin if it is an edge, else the first edge."""
    edges = state.topology.tier("edge")
    if not edges:
        raise _no_tier(state, "edge")
    return state.topology.origin if state.topology.origin in edges else edges[0]


def clouds(
    state: ClusterState, *, first: tuple[DeviceId, int] | None = None, embedding: DeviceId | None = None
) -> list[DeviceId]:
    """The cloud devices, as `quickest_first` puts them in order."""
    found = fastest_first([d for d in state.topology.devices if d.tier == "cloud"])
    if not found:
        raise _no_tier(state, "cloud")
    return found if len(found) == 1 else quickest_first(state, found, first=first, embedding=embedding)


def _no_tier(state: ClusterState, tier: str) -> PlacementError:
    return PlacementError(
        "topology",
        expected=f"at least one device of tier {tier}",
        actual=listed([f"{d.id} ({d.tier})" for d in state.topology.devices]),
        remedy=f"add one of tier {tier}, or use the planner best_device",
    )
