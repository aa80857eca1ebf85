"""What the policy sees: one vector for the whole and one for each group of layers, normalised to about [-3, 3].

Everything comes from `Seen`, which an environment or a planner fills; this file knows neither. The table below is the
contract with trained weights: its hash stands on a policy's card.

Shapes: N instances, G groups, F global features, L features of a group, H slots of history.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from splitray.arrays import Bools, Floats, Floats32, Ints
from splitray.rl.grid.choice import COPIED, MODES, SIXTEENTHS, SPLIT, Choice
from splitray.rl.world.cell import EDGE_DEVICE, References

HISTORY = 8  # slots
_FLOOR = 1e-3  # of a ratio: an outage is the logarithm of this
_LIMIT = 3.0


@dataclass(frozen=True, slots=True)
class Feature:
    """One row of the table: `kind` says what an ablation leaves out."""

    name: str
    size: int
    meaning: str
    kind: str = "present"


FEATURES = (
    Feature("backlog", 1, "ln(1 + tokens waited for / tokens of a mean request) / 2"),
    Feature("arrived", 1, "ln(1 + tokens asked for in the last slot / tokens of a mean request)"),
    Feature("energy_debt", 1, "ln(1 + virtual energy queue / energy of a request) / 2"),
    Feature("accuracy_debt", 1, "ln(1 + 100 * virtual accuracy queue) / 2"),
    Feature("bandwidth", 1, "ln(rate of the link now / its mean), an outage is -3"),
    Feature("bandwidth_mean", 1, "log10(mean rate of the link / 1 MB/s)"),
    Feature("rtt", 1, "ln(round trip now / its mean)"),
    Feature("rtt_mean", 1, "log10(mean round trip / 10 ms)"),
    Feature("cloud_free", 1, "ln(share of the cloud that others leave) / 1.5"),
    Feature("context", 1, "log10(tokens that the next step will have in its cache) - 1"),
    Feature("serving", 1, "1 where a sequence has a KV cache that a move would carry"),
    Feature("free_memory", 2, "share of edge and cloud memory that the current placement leaves"),
    Feature("edge_token", 1, "log10(seconds of a token all on the edge / 50 ms)"),
    Feature("cloud_token", 1, "log10(seconds of a token all on the cloud now, without crossings / 50 ms)"),
    Feature("crossing", 1, "log10(seconds of one crossing there and back now / 50 ms)"),
    Feature("edge_prompt", 1, "log10(seconds of a mean prompt on the edge / 1 s)"),
    Feature("cloud_prompt", 1, "log10(seconds of a mean prompt on the cloud now / 1 s)"),
    Feature("edge_against_cloud", 1, "ln(a token on the edge / on the cloud with a crossing, now) / 2"),
    Feature("fits", 2, "ln(memory of the whole model / of the device), edge and cloud, / 2"),
    Feature("pinned", 2, "whether embedding and head are pinned to the origin"),
    Feature("layers", 1, "number of layers / 40"),
    Feature("request", 2, "log10(mean prompt) - 2, log10(mean output) - 2"),
    Feature("bandwidth_history", HISTORY, "bandwidth of the slots before, latest first", "history"),
    Feature("rtt_history", HISTORY, "rtt of the slots before", "history"),
    Feature("arrivals_history", HISTORY, "arrived of the slots before", "history"),
    Feature("cloud_history", HISTORY, "cloud_free of the slots before", "history"),
    Feature("modes", MODES, "share of the layers on the edge, on the cloud, split, copied", "placement"),
    Feature("edge_share", 2, "share of all heads and of all columns on the edge", "placement"),
    Feature("ends", 2, "whether embedding and head are on the edge", "placement"),
    Feature("crossings", 1, "boundaries between groups whose mode changes / groups, * 3", "placement"),
    Feature("since_move", 1, "slots since the last move / 16, at most 2", "placement"),
)
GROUP_FEATURES = (
    Feature("position", 1, "place of the group in the model, -1 to 1"),
    Feature("size", 1, "its share of the layers * 10"),
    Feature("mode", MODES, "its mode now", "placement"),
    Feature("heads", 1, "share of its heads on the edge now", "placement"),
    Feature("ffn", 1, "share of its columns on the edge now", "placement"),
)
NUM_GLOBAL = sum(f.size for f in FEATURES)
NUM_GROUP = sum(f.size for f in GROUP_FEATURES)


def table_hash() -> str:
    """Changes with any name, size, order or meaning of a feature."""
    text = "\n".join(f"{f.name}:{f.size}:{f.kind}:{f.meaning}" for f in (*FEATURES, *GROUP_FEATURES))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache
def kept(leave_out: frozenset[str], features: tuple[Feature, ...] = FEATURES) -> Floats32:
    """1 for features that stay and 0 for those whose kind an ablation leaves out."""
    return np.concatenate([np.full(f.size, float(f.kind not in leave_out), np.float32) for f in features])


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """What does not change while a policy serves one model on one pair of devices."""

    known: References
    group_layers: Ints  # [G]
    num_kv_heads: int
    hidden_bytes: float
    """Bytes of one position's residual, which is what crosses."""
    memory_bytes: Floats  # [2]
    pinned_embedding: bool
    pinned_head: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One moment of N instances, in SI units; all [N] if not said otherwise. The means are of the whole run."""

    backlog_tokens: Floats
    arrived_tokens: Floats
    energy_debt_j: Floats
    accuracy_debt: Floats
    link_bytes_per_s: Floats
    mean_link_bytes_per_s: Floats
    rtt_s: Floats
    mean_rtt_s: Floats
    cloud_free: Floats
    context_tokens: Floats
    serving: Bools
    free_memory: Floats  # [N, 2], shares
    slots_since_move: Floats
    choice: Choice

    def take(self, rows: Ints) -> Seen:
        """A copy of the instances `rows`."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "choice"}
        return Seen(**arrays, choice=self.choice.take(rows))


class History:
    """The last slots of four quantities, latest first, [N, 4, H]; zeros before the first."""

    def __init__(self, num_instances: int) -> None:
        """A history of N instances without a slot in it."""
        self.values = np.zeros((num_instances, 4, HISTORY))

    def push(self, seen: Seen, static: Static, rows: Ints | None = None) -> None:
        """Remember what some instances, all by default, saw in a slot that they have decided on."""
        at = slice(None) if rows is None else rows
        now = np.stack(_changing(seen, static), axis=1)[..., None]
        self.values[at] = np.concatenate([now, self.values[at][..., :-1]], axis=2)


def _ratio(value: Floats, mean: Floats) -> Floats:
    return np.log(np.maximum(value / np.maximum(mean, 1e-12), np.exp(-_LIMIT)))


def _changing(seen: Seen, static: Static) -> list[Floats]:
    """Bandwidth, round trip, arrivals and the cloud's free share."""
    return [
        _ratio(seen.link_bytes_per_s, seen.mean_link_bytes_per_s),
        _ratio(seen.rtt_s, seen.mean_rtt_s),
        np.log1p(seen.arrived_tokens / static.known.request.output_tokens),
        np.log(np.maximum(seen.cloud_free, _FLOOR)) / 1.5,
    ]


def observe(seen: Seen, history: Floats, static: Static) -> tuple[Floats32, Floats32]:
    """The features of the whole [N, F] and of each group [N, G, L]; history is `History.values` of the instances."""
    known, n = static.known, len(seen.backlog_tokens)
    bandwidth, rtt, arrived, free = _changing(seen, static)
    cloud_now = known.cloud.token_s / np.maximum(seen.cloud_free, _FLOOR)
    prompt_now = known.cloud.prompt_s / np.maximum(seen.cloud_free, _FLOOR)
    crossing = seen.rtt_s + 2 * static.hidden_bytes / np.maximum(seen.link_bytes_per_s, 1.0)
    columns: list[Floats | float] = [
        np.log1p(np.maximum(seen.backlog_tokens, 0) / known.request.output_tokens) / 2,
        arrived,
        np.log1p(seen.energy_debt_j / known.request_j) / 2,
        np.log1p(100 * seen.accuracy_debt) / 2,
        bandwidth,
        np.log10(np.maximum(seen.mean_link_bytes_per_s, 1.0) / 1e6),
        rtt,
        np.log10(np.maximum(seen.mean_rtt_s, 1e-6) / 1e-2),
        free,
        np.log10(np.maximum(seen.context_tokens, 1)) - 1,
        seen.serving.astype(float),
        *seen.free_memory.T,
        math.log10(known.edge.token_s / 0.05),
        np.log10(cloud_now / 0.05),
        np.log10(crossing / 0.05),
        math.log10(known.edge.prompt_s),
        np.log10(prompt_now),
        np.log(known.edge.token_s / (cloud_now + crossing)) / 2,
        math.log(known.edge.weight_share) / 2,
        math.log(known.cloud.weight_share) / 2,
        float(static.pinned_embedding),
        float(static.pinned_head),
        float(static.group_layers.sum()) / 40,
        math.log10(known.request.prompt_tokens) - 2,
        math.log10(known.request.output_tokens) - 2,
    ]
    placement, groups = _placement(seen, static)
    whole = np.concatenate([_side_by_side(columns, n), history.reshape(n, -1), _side_by_side(placement, n)], axis=1)
    assert whole.shape[1] == NUM_GLOBAL, "the table and the code have to agree"
    return _bounded(whole), _bounded(groups)


def _side_by_side(columns: Sequence[Floats | float], n: int) -> Floats:
    """[N, columns]; `np.stack` takes no numbers, and several times as long."""
    found = np.empty((n, len(columns)))
    for i, column in enumerate(columns):
        found[:, i] = column
    return found


def _bounded(features: Floats) -> Floats32:
    return np.minimum(np.maximum(features, -_LIMIT), _LIMIT).astype(np.float32)


def on_edge(choice: Choice, num_kv_heads: int) -> tuple[Floats, Floats]:
    """The share of each group's heads and columns on the edge, [N, G] each; a copy counts as there."""
    split, copied = choice.mode == SPLIT, choice.mode == COPIED
    whole = (choice.mode == EDGE_DEVICE).astype(float)
    heads = np.where(split, choice.heads / num_kv_heads, np.where(copied, 1.0, whole))
    columns = np.where(split | copied, choice.ffn / SIXTEENTHS, whole)
    return heads, columns


def _placement(seen: Seen, static: Static) -> tuple[list[Floats], Floats]:
    """Columns of the whole, [N] each, and the features of each group."""
    choice, sizes = seen.choice, static.group_layers / static.group_layers.sum()
    n, groups = choice.mode.shape
    heads, columns = on_edge(choice, static.num_kv_heads)
    modes = (choice.mode[:, :, None] == np.arange(MODES)).astype(float)
    changes = (choice.mode[:, 1:] != choice.mode[:, :-1]).sum(1)
    whole = [
        *(modes * sizes[:, None]).sum(1).T,
        heads @ sizes,
        columns @ sizes,
        (choice.embedding == EDGE_DEVICE).astype(float),
        (choice.head == EDGE_DEVICE).astype(float),
        3 * changes / groups,
        np.minimum(seen.slots_since_move / 16, 2),
    ]
    each = np.empty((n, groups, NUM_GROUP))
    each[:, :, 0] = np.arange(groups) * (2 / max(1, groups - 1)) - 1
    each[:, :, 1] = 10 * sizes
    each[:, :, 2 : 2 + MODES] = modes
    each[:, :, -2], each[:, :, -1] = heads, columns
    return whole, each
