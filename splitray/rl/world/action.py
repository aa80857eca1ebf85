"""What the two agents may do, as blocks of categorical choices, with masks that are never empty.

`layer_agent` decides first: for each group of layers FREE (the exact program decides) or one of the modes, and three
knobs of that program. `head_ffn_agent` then says for groups that the first one split or copied, how much of their
heads and columns the edge takes. An action is a row of integers in the order of the blocks; its logits and its mask
are the blocks side by side, choice by choice.

Shapes: N instances, G groups; a block of `count` choices among `size` is [count, size] of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from splitray.arrays import Bools, Ints
from splitray.rl.grid.choice import CLOUD, COPIED, EDGE, MODES, SIXTEENTHS, SPLIT, Choice
from splitray.rl.world.room import Room

Variant = Literal["dp_knobs", "dp_modes", "no_dp"]

FREE = 0  # of the first agent's choices for a group; mode m of a Choice is 1 + m
V_FACTORS = (0.0, 0.25, 1.0, 4.0)  # of the price at which a joule counts as the reward counts it
MOVE_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 8.0)  # of a second of moving against a second of serving
PRICES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # the program is told share ** (1 + price) of the cloud's speed, not share
DEFAULT_KNOBS = (0, 2, 0)  # what the warm start does: delay only, moves at their price, the cloud as it is for oneself
EIGHTHS = 8
AUTO = EIGHTHS + 1  # of the second agent's choices: as the program says


@dataclass(frozen=True, slots=True)
class Block:
    """A named part of an action: `count` independent choices among `size`."""

    name: str
    count: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpec:
    """The shape of both agents' actions.

    Args:
        variant: `dp_knobs` leaves every group to the program; `dp_modes` may also fix modes; `no_dp` has no program.
        num_groups: G.
        bits: heads as eight bits of equal ranges instead of a count (docs/equations.md E2.8).
    """

    variant: Variant = "dp_knobs"
    num_groups: int = 12
    bits: bool = False

    @property
    def high(self) -> tuple[Block, ...]:
        """The blocks of the layer agent's action."""
        knobs = Block("v", 1, len(V_FACTORS)), Block("stay", 1, len(MOVE_WEIGHTS)), Block("price", 1, len(PRICES))
        return Block("mode", self.num_groups, 1 + MODES), *knobs

    @property
    def low(self) -> tuple[Block, ...]:
        """The blocks of the head and FFN agent's action."""
        heads = Block("bits", EIGHTHS * self.num_groups, 2) if self.bits else Block("heads", self.num_groups, AUTO + 1)
        return heads, Block("ffn", self.num_groups, AUTO + 1)

    @property
    def low_decides(self) -> bool:
        """Whether the second agent ever has a choice."""
        return self.variant != "dp_knobs"


def num_logits(blocks: tuple[Block, ...]) -> int:
    """Length of the logits of all blocks."""
    return sum(b.count * b.size for b in blocks)


def num_choices(blocks: tuple[Block, ...]) -> int:
    """Length of an action: choices of all blocks."""
    return sum(b.count for b in blocks)


def spans(blocks: tuple[Block, ...]) -> Iterator[tuple[Block, slice, slice]]:
    """Each block with its columns among the logits, and among the choices of an action."""
    at = first = 0
    for block in blocks:
        width = block.count * block.size
        yield block, slice(at, at + width), slice(first, first + block.count)
        at, first = at + width, first + block.count


def prior(spec: ActionSpec, confidence: float) -> dict[str, list[float]]:
    """Probabilities of the layer agent's choices that leave all to the program, by block; the rest is spread evenly.

    A deviation of one of G groups is a G-th as likely as one of a knob. Without a program there is none.
    """
    if spec.variant == "no_dp":
        return {}
    found = {}
    for block, index in zip(spec.high, (FREE, *DEFAULT_KNOBS), strict=True):
        rest = (1 - confidence) / block.count
        found[block.name] = [1 - rest if i == index else rest / (block.size - 1) for i in range(block.size)]
    return found


def parts(blocks: tuple[Block, ...], actions: Ints) -> dict[str, Ints]:
    """An action [N, choices] by the names of its blocks, [N, count] each."""
    ends = np.cumsum([b.count for b in blocks])[:-1]
    return {b.name: a for b, a in zip(blocks, np.split(actions, ends, axis=1), strict=True)}


def high_mask(spec: ActionSpec, room: Room) -> Bools:
    """What the layer agent may choose, [N, logits].

    A group that alone overflows the edge cannot go there; a copy needs all heads there. FREE is never masked where
    there is a program, CLOUD never where there is none.
    """
    n, groups = len(room.edge_bytes), spec.num_groups
    allowed = np.zeros((n, groups, 1 + MODES), bool)
    if spec.variant == "no_dp":
        allowed[:, :, 1 + CLOUD] = allowed[:, :, 1 + SPLIT] = True
    else:
        allowed[:, :, FREE] = True
        if spec.variant == "dp_modes":
            allowed[:, :, 1 + CLOUD] = allowed[:, :, 1 + SPLIT] = True
    if spec.variant != "dp_knobs":
        held = room.attention_bytes.shape[1]  # a model of fewer layers than groups leaves the rest of them idle
        left = room.edge_bytes[:, None]
        allowed[:, :held, 1 + EDGE] = room.attention_bytes + room.ffn_bytes <= left
        allowed[:, :held, 1 + COPIED] = room.attention_bytes <= left
    knobs = np.ones((n, num_logits(spec.high[1:])), bool)
    if spec.variant == "no_dp":
        knobs[:] = False
        at = 0
        for block, index in zip(spec.high[1:], DEFAULT_KNOBS, strict=True):
            knobs[:, at + index] = True
            at += block.size
    return np.concatenate([allowed.reshape(n, -1), knobs], axis=1)


def modes_that_fit(spec: ActionSpec, modes: Ints, room: Room) -> Ints:
    """The layer agent's modes [N, G], front to back, with those sent to the cloud that overflow the edge together."""
    if spec.variant == "dp_knobs":
        return modes
    fitting, left = modes.copy(), room.edge_bytes.copy()
    for g in range(room.attention_bytes.shape[1]):
        edge, copied = fitting[:, g] == 1 + EDGE, fitting[:, g] == 1 + COPIED
        need = (edge | copied) * room.attention_bytes[:, g] + edge * room.ffn_bytes[g]
        over = need > left
        fitting[over, g] = 1 + CLOUD
        left = left - np.where(over, 0.0, need)
    return fitting


def low_mask(spec: ActionSpec, modes: Ints, room: Room) -> Bools:
    """What the second agent may choose after the first one's modes [N, G], [N, logits].

    Groups that are not split have one choice only. The edge's room beside whole groups is shared evenly by the groups
    that are split, so that any choices of theirs fit together.
    """
    n, groups = modes.shape
    held = room.attention_bytes.shape[1]
    split, copied = modes == 1 + SPLIT, modes == 1 + COPIED
    split[:, held:] = copied[:, held:] = False
    whole = (modes == 1 + EDGE)[:, :held]
    taken = (room.attention_bytes * (whole | copied[:, :held]) + room.ffn_bytes * whole).sum(1)
    shared = np.maximum(1, split.sum(1) + copied.sum(1))
    budget = np.maximum(0.0, (room.edge_bytes - taken) / shared)[:, None]
    of_split = np.minimum(1.0, budget / (room.attention_bytes + room.ffn_bytes))
    of_copy = np.minimum(1.0, budget / room.ffn_bytes)
    most = np.zeros((n, groups))
    most[:, :held] = np.where(copied[:, :held], of_copy, of_split)
    eighths = np.arange(AUTO + 1)
    fits = eighths <= np.floor(most * EIGHTHS + 1e-9)[..., None]
    fits[..., AUTO] = spec.variant != "no_dp"
    only = eighths == (0 if spec.variant == "no_dp" else AUTO)
    columns = np.where((split | copied)[..., None], fits, only)
    if not spec.bits:
        return np.concatenate([np.where(split[..., None], fits, only).reshape(n, -1), columns.reshape(n, -1)], axis=1)
    on = np.arange(EIGHTHS) < np.floor(most * EIGHTHS + 1e-9)[..., None]  # any subset of so many bits fits
    bits = np.stack([np.ones_like(on), on & split[..., None]], axis=-1)
    return np.concatenate([bits.reshape(n, -1), columns.reshape(n, -1)], axis=1)


def eighths_of(spec: ActionSpec, low: Ints) -> tuple[Ints, Ints]:
    """The second agent's heads and columns on the edge, in eighths or AUTO, [N, G] each."""
    named = parts(spec.low, low)
    if not spec.bits:
        return named["heads"], named["ffn"]
    bits = named["bits"].reshape(len(low), spec.num_groups, EIGHTHS)
    return bits.sum(2), named["ffn"]


def shared(choice: Choice, modes: Ints, heads: Ints, ffn: Ints, num_kv_heads: int) -> Choice:
    """A choice with the second agent's shares in the groups that the first one split or copied."""
    asked_split, asked_copy = modes == 1 + SPLIT, modes == 1 + COPIED
    own_heads = asked_split & (heads <= EIGHTHS)
    own_ffn = (asked_split | asked_copy) & (ffn <= EIGHTHS)
    count = np.rint(np.minimum(heads, EIGHTHS) * num_kv_heads / EIGHTHS).astype(np.int64)
    return Choice(
        choice.mode,
        np.where(own_heads, count, choice.heads),
        np.where(own_ffn, np.minimum(ffn, EIGHTHS) * (SIXTEENTHS // EIGHTHS), choice.ffn),
        choice.embedding,
        choice.head,
    )


def imitated(spec: ActionSpec, choice: Choice, num_kv_heads: int) -> tuple[Ints, Ints]:
    """The actions of both agents that come nearest to a choice with the default knobs: what cloning aims at.

    Where there is a program, that is to leave everything to it.
    """
    n, held = choice.mode.shape
    modes = np.full((n, spec.num_groups), FREE if spec.variant != "no_dp" else 1 + CLOUD)
    rest = AUTO if spec.variant != "no_dp" else 0
    heads, ffn = np.full((2, n, spec.num_groups), rest)
    if spec.variant == "no_dp":
        modes[:, :held] = 1 + choice.mode
        split, copied = choice.mode == SPLIT, choice.mode == COPIED
        heads[:, :held] = np.where(split, np.rint(choice.heads * EIGHTHS / num_kv_heads), rest)
        ffn[:, :held] = np.where(split | copied, np.rint(choice.ffn * EIGHTHS / SIXTEENTHS), rest)
    if spec.bits:
        count = np.where(heads > EIGHTHS, 0, heads)
        heads = (np.arange(EIGHTHS) < count[..., None]).astype(np.int64).reshape(n, -1)
    knobs = np.tile(DEFAULT_KNOBS, (n, 1))
    return np.concatenate([modes, knobs], axis=1), np.concatenate([heads, ffn], axis=1)
