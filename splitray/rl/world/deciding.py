"""From the actions of both agents to placements: the one way.

An environment executes actions through it and a serving planner too, so that they cannot disagree. Shapes: n instances,
G groups.
"""

from collections.abc import Callable

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.rl.grid.choice import EDGE, MODES, Choice
from splitray.rl.grid.grid import Grid
from splitray.rl.world.action import DEFAULT_KNOBS, FREE, ActionSpec, eighths_of, modes_that_fit, parts, shared
from splitray.rl.world.cell import CLOUD_DEVICE, EDGE_DEVICE
from splitray.rl.world.observation import Static
from splitray.rl.world.room import Room

Program = Callable[[Ints, Ints, Ints], Choice]
"""The exact program: from modes [n, G] (`FREE` or fixed), knobs [n, 3] and which of the instances, to placements."""


def left_alone(spec: ActionSpec, num_instances: int) -> Ints:
    """The layer agent's action that leaves all to the program with its default knobs, [n, choices]."""
    free = np.full((num_instances, spec.num_groups), FREE)
    return np.concatenate([free, np.tile(DEFAULT_KNOBS, (num_instances, 1))], axis=1)


def decided(
    grid: Grid,
    program: Program,
    high: Ints,
    low: Ints | None,
    *,
    spec: ActionSpec,
    static: Static,
    room: Room | None,
    longest_tokens: Floats,
    memory_bytes: Floats,
) -> Choice:
    """The placements that two actions mean; they always fit where any does.

    `high` is the layer agent's action, [n, choices], `low` the second agent's; without it the program decides all
    shares. The variant of `spec` says how much is left to the program; `static` says where the ends are pinned, and
    `room` is not looked at where all modes are left to the program. The KV of `longest_tokens` [n] has to fit into
    `memory_bytes`, [n, 2].
    """
    named, everyone = parts(spec.high, high), np.arange(len(high))
    knobs = np.concatenate([named["v"], named["stay"], named["price"]], axis=1)
    if not spec.low_decides:
        return program(named["mode"], knobs, everyone)
    assert room is not None, "modes that are fixed have to fit"
    modes = modes_that_fit(spec, named["mode"], room)
    if spec.variant != "no_dp":
        choice = program(modes, knobs, everyone)
        if low is None:
            return choice
    else:
        assert low is not None, "without the program the second agent has to say the shares"
        choice = _outright(modes[:, : grid.num_groups] - 1, static)
    heads, ffn = eighths_of(spec, low)
    g = grid.num_groups
    mixed = shared(choice, modes[:, :g], heads[:, :g], ffn[:, :g], grid.num_heads)
    over = (grid.memory_bytes(mixed, longest_tokens) > memory_bytes).any(1)
    if over.any():  # the edge's room was kept; what is left is a cloud that is full, or a program's own shares
        at = np.flatnonzero(over)
        mixed.put(at, program(np.full_like(modes[at], FREE), knobs[at], at))
    return mixed


def allowed_modes(modes: Ints) -> Bools | None:
    """The modes that the program may take where some are fixed, [n, G, 4]; None where all are free."""
    if (modes == FREE).all():
        return None
    return (modes == FREE)[..., None] | (modes[..., None] == 1 + np.arange(MODES))


def _outright(modes: Ints, static: Static) -> Choice:
    """The modes as they are, each end where its neighbour is or where it is pinned."""
    pinned = static.pinned_embedding, static.pinned_head
    ends = [
        np.where(np.full(len(modes), pin) | (modes[:, at] == EDGE), EDGE_DEVICE, CLOUD_DEVICE)
        for pin, at in zip(pinned, (0, -1), strict=True)
    ]
    zeros = np.zeros(modes.shape, np.int64)
    return Choice(modes.astype(np.int8), zeros, zeros, *ends)
