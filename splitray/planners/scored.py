"""Scores of the simulator released with arXiv 2505.02533, beside our myopic planner: each block where it scores best.

Scores E4.11 and E4.12 of docs/equations.md over what devices have left, with correct costs, overloads resolved,
backtracking and migration charged. The score of a block sees the blocks that it needs and that are placed already, so
heads do not know where their FFN will be; the clocks of `myopic` do. With all errata and no step back it is the
heuristic of the author's released simulator (CODE): whole capacities, the source banned, the first block without a
place ends it, moves free.

That code has one layer: here a block's load meets that of its own layer (layers run one after the other), its memory
that of all. FFNs stay whole. The projection goes with its heads in our engine; `as_coded` places it as a block of its
own, for the sake of the scores, and drops it. Embedding and head, which it leaves out, are as in `myopic`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from splitray.arrays import Bools, Floats
from splitray.errors import PlacementError, listed
from splitray.papers.kafetzis import AS_CODED, CORRECTED, KafetzisErrata, hosts, layer_blocks, transfer_s
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners.layer_times import layer_times
from splitray.planners.memory import model_bytes, require_one_format
from splitray.planners.myopic import ends_of
from splitray.planners.pay_back import keep_or_move
from splitray.planners.protocol import MANY_DEVICES, ClusterState

Rule = Literal["max", "weighted"]
_Kind = Literal["head", "projection", "ffn"]
WEIGHTS = (0.4, 0.3, 0.3)  # of compute, memory and transfer: the default of the released code
SLOT_S = 1.0  # of E4.9: the code compares FLOPs with FLOP/s


@dataclass(frozen=True, slots=True)
class Scored:
    """A placement for the next interval by a released score.

    Args:
        rule: `max` of the three ratios, or their weighted sum.
        errata: what is done as the released code does it, in costs and in choices.
        projection_apart: the projection is a block of its own.
        backtrack_limit: overloads to resolve and blocks to take back before the instance counts as infeasible.
        staged: weights lie on every device, so that only the KV moves.
    """

    rule: Rule
    errata: KafetzisErrata = CORRECTED
    projection_apart: bool = False
    backtrack_limit: int = 200
    staged: bool = True
    most_devices: ClassVar[int] = MANY_DEVICES

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where a block finds no place.

        Memory is checked at the end of the interval (E4.8), and the current placement stays where moving does not
        pay; under FREE_MIGRATION there is only now. What NO_WEIGHTS believes to fit need not.
        """
        require_one_format(state, "myopic with a released score")
        if KafetzisErrata.FREE_MIGRATION in self.errata:
            return _BlockSearch(self, state, state).placement()
        end = replace(state, context_tokens=state.context_tokens + state.interval_tokens)
        return keep_or_move(_BlockSearch(self, state, end).placement(), state, end, staged=self.staged)


VARIANTS: Mapping[str, Scored] = {
    "as_coded": Scored("max", errata=AS_CODED, projection_apart=True, backtrack_limit=0),
    "max": Scored("max"),
    "weighted": Scored("weighted"),
}


class _BlockSearch:
    """One run over the blocks, layer by layer; those of a layer in falling order of their demand.

    Blocks are numbered through all layers, `device` has -1 for one that is not placed.
    """

    def __init__(self, planner: Scored, state: ClusterState, end: ClusterState) -> None:
        self.planner, self.state, self.end = planner, state, end
        errata = planner.errata
        arch, where = state.arch, state.topology
        blocks = layer_blocks(arch, context_tokens=max(1, end.context_tokens), errata=errata)
        head = blocks.head if planner.projection_apart else blocks.head_with_projection(arch.num_kv_heads)
        of_kind = {"head": head, "projection": blocks.projection, "ffn": blocks.ffn}
        self.memory = {k: b.memory_bytes for k, b in of_kind.items()}
        self.operations = {k: b.operations for k, b in of_kind.items()}
        self.capacity = np.array([d.memory_bytes for d in where.devices], float)
        self.per_slot = SLOT_S * np.array([d.compute_flops * d.compute_efficiency for d in where.devices])
        self.allowed = np.isin(where.ids, hosts(where, errata))
        self.head_s, self.state_s = (
            np.array([[transfer_s(where, a, b, n, errata=errata) for b in where.ids] for a in where.ids])
            for n in (blocks.head.output_bytes, blocks.projection.output_bytes)
        )
        self.kinds = self._order(head.cache_bytes if KafetzisErrata.CACHE_SIZE in errata else 0.0)
        self.num_blocks = arch.num_layers * len(self.kinds)
        self.heads = [i for i, k in enumerate(self.kinds) if k == "head"]
        self.device = np.full(self.num_blocks, -1)
        self.held = np.zeros(len(where.ids))
        self.load = np.zeros((arch.num_layers, len(where.ids)))
        self.head_load = np.zeros_like(self.load)
        charged = KafetzisErrata.FREE_MIGRATION not in errata and state.current is not None
        self.move_s = self._moves() if charged else None
        self.steps_back = self.resolved = 0

    def _order(self, forgotten_bytes: float) -> list[_Kind]:
        """Kinds of one layer's blocks by m / max M + F / max C, descending; the code forgets the cache here."""
        kinds: list[_Kind] = ["head"] * self.state.arch.num_kv_heads
        kinds += ["projection", "ffn"] if self.planner.projection_apart else ["ffn"]
        memory = self.memory | {"head": self.memory["head"] - forgotten_bytes}
        demand = {k: memory[k] / self.capacity.max() + self.operations[k] / self.per_slot.max() for k in set(kinds)}
        return sorted(kinds, key=lambda k: -demand[k])

    def _moves(self) -> Floats:
        """Seconds in which the KV of each head of each layer comes to each device, [L, H, D]."""
        arch, where, current = self.state.arch, self.state.topology, self.state.current
        assert current is not None, "only a current placement can be moved"
        weights = 0 if self.planner.staged else arch.weight_bytes(arch.group_params)
        num_bytes = weights + arch.kv_bytes_per_token * self.state.context_tokens
        way = np.array([[transfer_s(where, a, b, num_bytes) for b in where.ids] for a in where.ids])
        seconds = np.zeros((arch.num_layers, arch.num_kv_heads, len(where.ids)))
        if not num_bytes:
            return seconds
        for layer, held in enumerate(current.layers):
            seconds[layer] = np.inf
            for device, ranges in held.attention.by_device:
                for r in ranges:
                    rows = seconds[layer, r.start : r.stop]
                    np.minimum(rows, way[where.index[device]], out=rows)
        return seconds

    def placement(self) -> Placement:
        """Run it.

        Raises:
            PlacementError: tables, or a block, find no place.
        """
        left = self.capacity.copy()
        ends = ends_of(self.state, layer_times(self.state).head_s, left)
        if ends is None:
            raise self._stuck("embedding and head")
        self.embedding, head = ends
        self.held = self.capacity - left
        if KafetzisErrata.NO_WEIGHTS not in self.planner.errata and model_bytes(self.end) > self.capacity.sum():
            raise self._stuck("the model")
        self._fill()
        arch, ids = self.state.arch, self.state.topology.ids
        layers = []
        for first in range(0, self.num_blocks, len(self.kinds)):
            heads = self.device[[first + i for i in self.heads]]
            if self.state.current is None:
                heads = np.sort(heads)  # nothing to keep in its place: one range a device
            shares = {str(d): [(int(g), int(g) + 1) for g in np.flatnonzero(heads == i)] for i, d in enumerate(ids)}
            ffn = ids[self.device[first + self.kinds.index("ffn")]]
            layers.append(LayerPlacement(Shares.of(shares), Shares.whole(arch.ffn_dim, ffn)))
        return Placement(tuple(layers), (ids[self.embedding],), Shares.whole(arch.vocab, ids[head]))

    def _fill(self) -> None:
        """Place all blocks; a block without a place has others moved off a device, or the last ones taken back."""
        tried = np.zeros((self.num_blocks, len(self.held)), bool)
        block = 0
        while block < self.num_blocks:
            score = np.where(tried[block], np.inf, self._scores(block))
            best = int(score.argmin())
            if np.isfinite(score[best]):
                self._put(block, best)
                block += 1
                if block < self.num_blocks:
                    # Heads of a layer are alike: what one tried in vain, no later one needs to try.
                    alike = block % len(self.kinds) and self.kinds[(block - 1) % len(self.kinds)] == self._kind(block)
                    tried[block] = tried[block - 1] if alike else False
                continue
            if self.steps_back + self.resolved >= self.planner.backtrack_limit:
                raise self._stuck(f"{self._kind(block)} of layer {block // len(self.kinds)}")
            if self._resolve(block, tried[block]):
                self.resolved += 1
                continue
            if not block:
                raise self._stuck(f"{self._kind(0)} of layer 0")
            self.steps_back += 1
            block -= 1
            tried[block, self._take(block)] = True

    def _kind(self, block: int) -> _Kind:
        return self.kinds[block % len(self.kinds)]

    def _put(self, block: int, device: int, sign: int = 1) -> None:
        kind, layer = self._kind(block), block // len(self.kinds)
        self.device[block] = device if sign > 0 else -1
        self.held[device] += sign * self.memory[kind]
        self.load[layer, device] += sign * self.operations[kind]
        if kind == "head":
            self.head_load[layer, device] += sign * self.operations[kind]

    def _take(self, block: int) -> int:
        device = int(self.device[block])
        self._put(block, device, -1)
        return device

    def _scores(self, block: int, *, crowded: bool = False) -> Floats:
        """S(i, j) on every device, infinite where the block must not go; `crowded` overlooks lack of memory, [D]."""
        kind, layer = self._kind(block), block // len(self.kinds)
        memory, operations = self.memory[kind], self.operations[kind]
        whole = KafetzisErrata.TOTAL_CAPACITY in self.planner.errata
        busy = 0.0 if whole or kind != "head" else self.head_load[layer]  # heads run side by side, FFNs later
        held = 0.0 if whole else self.held
        parts = (
            (operations + busy) / self.per_slot,
            (memory + held) / self.capacity * (not crowded),
            self._transfer_s(block) / SLOT_S,
        )
        score: Floats
        if self.planner.rule == "weighted":
            score = sum((w * p for w, p in zip(WEIGHTS, parts, strict=True)), np.zeros(len(self.held)))
        else:
            score = np.maximum.reduce(parts)
        fits = self.allowed & (score <= 1) & (self.load[layer] + operations <= self.per_slot)
        if not crowded:
            fits &= self.held + memory <= self.capacity
        if self.move_s is not None and kind == "head":
            per_token_s = self.move_s[layer, self.heads.index(block % len(self.kinds))] / self.state.interval_tokens
            score = score + per_token_s / SLOT_S
        return np.where(fits, score, np.inf)

    def _transfer_s(self, block: int) -> Floats:
        """Time of what a block needs from blocks that are placed already, [D]."""
        kind, first = self._kind(block), block - block % len(self.kinds)
        nothing = np.zeros(len(self.held))
        if kind == "head":
            if KafetzisErrata.NO_BROADCASTS in self.planner.errata:
                return nothing
            residual = self.device[first - len(self.kinds) + self.kinds.index("ffn")] if first else self.embedding
            return self.state_s[residual]
        if kind == "ffn" and self.planner.projection_apart:
            projection = self.device[first + self.kinds.index("projection")]
            return self.state_s[projection] if projection >= 0 else nothing
        heads = [d for d in self.device[[first + i for i in self.heads]] if d >= 0]
        if kind == "projection":
            return sum((self.head_s[d] for d in heads), nothing)
        return sum((self.state_s[d] for d in set(heads)), nothing)  # one partial sum a device

    def _resolve(self, block: int, tried: Bools) -> bool:
        """Make room for a block where it would be best, by moving the smallest blocks there elsewhere."""
        if (self.capacity - self.held).sum() < self.memory[self._kind(block)]:
            return False
        score = np.where(tried, np.inf, self._scores(block, crowded=True))
        wanted = (int(d) for d in np.argsort(score, kind="stable") if np.isfinite(score[d]))
        return any(self._clear(device, self.memory[self._kind(block)]) for device in wanted)

    def _clear(self, device: int, need: float) -> bool:
        moved: list[int] = []
        for block in self._movable(device):
            if self.held[device] + need <= self.capacity[device]:
                return True
            self._take(block)
            score = self._scores(block)
            score[device] = np.inf
            best = int(score.argmin())
            self._put(block, best if np.isfinite(score[best]) else device)
            if not np.isfinite(score[best]):
                break  # nor will a larger one
            moved.append(block)
        if self.held[device] + need <= self.capacity[device]:
            return True
        for block in reversed(moved):
            self._take(block)
            self._put(block, device)
        return False

    def _movable(self, device: int) -> Iterator[int]:
        """Blocks on a device, smallest first, the latest of equals first."""
        there = np.flatnonzero(self.device == device)[::-1]
        yield from sorted((int(b) for b in there), key=lambda b: self.memory[self._kind(b)])

    def _stuck(self, what: str) -> PlacementError:
        state = self.state
        available = listed([f"{d.memory_bytes:,.0f} bytes on {d.id}" for d in state.topology.devices])
        remedy = "add memory or a device, or shorten the context"
        if self.planner.errata:
            remedy += ", or use planner myopic: as coded, the origin holds no block and nothing is tried twice"
        return PlacementError(
            f"myopic by the {self.planner.rule} score",
            expected=f"a device with room and time for {what} of {state.arch.name} ({available})",
            actual=f"none after {self.resolved} overloads resolved and {self.steps_back} blocks taken back",
            remedy=remedy,
        )
