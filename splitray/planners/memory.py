"""Bytes that pieces of a model take on a device, its KV cache included. Knows no measured number."""

from collections.abc import Callable, Sequence

import numpy as np

from splitray.arch import ModelArch
from splitray.arrays import Bools, Ints
from splitray.errors import PlacementError, listed
from splitray.placement import Placement, validate, weight_bytes
from splitray.planners.protocol import ClusterState
from splitray.topology import Device, DeviceId


def no_room(expected: str, actual: str, remedy: str) -> PlacementError:
    """The error of a planner that finds no placement which fits."""
    return PlacementError("memory", expected=expected, actual=actual, remedy=remedy)


def each_held(state: ClusterState) -> list[ModelArch]:
    """The model as each device of the topology holds it."""
    return [state.arch.on(d) for d in state.topology.ids]


def group_bytes(state: ClusterState) -> Ints:
    """One head group of one layer on each device, [D]: its weights and the KV of the state's context."""
    kv = state.arch.kv_bytes_per_token * state.context_tokens
    return np.array([a.weight_bytes(a.group_params) + kv for a in each_held(state)])


def ffn_unit_bytes(state: ClusterState) -> Ints:
    """One FFN column, or one whole expert, on each device, [D]."""
    return np.array([a.weight_bytes(a.ffn_unit_params) for a in each_held(state)])


def vocab_row_bytes(state: ClusterState) -> Ints:
    """One vocabulary row of the head on each device, [D]."""
    return np.array([a.table_bytes(a.vocab_row_params) for a in each_held(state)])


def layer_bytes(state: ClusterState) -> Ints:
    """One whole layer on each device, [D]: its weights and the KV of the state's context."""
    arch = state.arch
    return arch.num_kv_heads * group_bytes(state) + arch.ffn_dim * ffn_unit_bytes(state)


def table_bytes(state: ClusterState) -> Ints:
    """The head on each device, [D]."""
    return state.arch.vocab * vocab_row_bytes(state)


def embedding_bytes(state: ClusterState) -> Ints:
    """The embedding on each device, [D], with the tables that some models keep beside it."""
    return np.array([a.embedding_bytes for a in each_held(state)])


def shares_table(state: ClusterState) -> Bools:
    """On which devices a tied head takes no memory beside the embedding, [D]."""
    return np.array([a.shares_table for a in each_held(state)])


def model_bytes(state: ClusterState) -> int:
    """The whole model with its KV cache in the smallest format, nothing replicated, a shared table counted once."""
    arch = state.arch
    kv = arch.num_layers * arch.num_kv_heads * arch.kv_bytes_per_token * state.context_tokens
    return min(a.model_bytes for a in each_held(state)) + kv


def needed_bytes(placement: Placement, state: ClusterState) -> dict[DeviceId, int]:
    """Bytes that each device of the placement must hold: weights and KV."""
    needed = weight_bytes(placement, state.arch)
    per_group = state.arch.kv_bytes_per_token * state.context_tokens
    for layer, count in placement.runs():
        for device, ranges in layer.attention.by_device:
            needed[device] += count * sum(r.count for r in ranges) * per_group
    return needed


def shortfall(placement: Placement, state: ClusterState) -> list[str]:
    """One text for each device that cannot hold its pieces; empty if all fit."""
    return [
        f"{needed:,} bytes on {device} of {state.topology.device(device).memory_bytes:,.0f}"
        for device, needed in needed_bytes(placement, state).items()
        if needed > state.topology.device(device).memory_bytes
    ]


def require_one_format(state: ClusterState, planner: str) -> None:
    """Refuse devices with formats of their own, for a planner that counts all pieces alike.

    Raises:
        PlacementError: there are such devices.
    """
    if formats := {f.name for f in state.arch.formats[1:]}:
        raise PlacementError(
            f"planner {planner}",
            expected="one format of weights on all devices",
            actual=", ".join([state.arch.formats[0].name, *sorted(formats)]),
            remedy="use exact, drift_plus_penalty or myopic, or leave `weights:` out of the topology",
        )


def check(placement: Placement, state: ClusterState) -> None:
    """`validate`, and room for the KV cache of the state's context.

    Raises:
        PlacementError: the placement is not valid, or weights and KV together do not fit.
    """
    validate(placement, state.arch, state.topology)
    missing = shortfall(placement, state)
    if missing:
        expected = f"room for weights and the KV of {state.context_tokens} tokens"
        remedy = "shorten the context, or place the pieces on other devices"
        raise no_room(expected, f"a need of {'; '.join(missing)}", remedy)


def fastest_first(devices: Sequence[Device]) -> list[DeviceId]:
    """Ids by falling memory bandwidth (decoding is bound by it), ties in device order."""
    return [d.id for d in sorted(devices, key=lambda d: -d.memory_bandwidth_bytes_per_s)]


def first_fit(candidates: Sequence[DeviceId], build: Callable[[DeviceId], Placement], state: ClusterState) -> Placement:
    """The placement of the first candidate that fits.

    Raises:
        PlacementError: none fits; names the needed and the available bytes of each candidate.
    """
    missing: list[str] = []
    for candidate in candidates:
        placement = build(candidate)
        short = shortfall(placement, state)
        if not short:
            return placement
        missing += short
    expected = f"room for the pieces of {state.arch.name} on one of {listed(candidates)}"
    remedy = "split the model over more devices (planner proportional), or shorten the context"
    raise no_room(expected, f"a need of {listed([*dict.fromkeys(missing)], '; ')}", remedy)
