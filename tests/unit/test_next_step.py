"""What is done next about devices: 300 random schedules of deaths, stops, returns and refusals under a virtual clock.

A world of devices without a model: who lives, what each one holds, when a start ends. The planner is pure; the world
carries out what it says and objects if a piece of what runs is on a device that is not there or does not hold it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from splitray.errors import InputError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.runtime.engine.next_step import NextStep, SeenState, WantedState, next_step
from splitray.runtime.engine.policy import without
from splitray.topology import Topology

GROUPS, COLUMNS, LAYERS, VOCAB = 12, 24, 2, 30
TICK_S = 0.1
BROKEN_S = 8.0  # between two tries of a device with other weights


def even(topology: Topology, at_least: int = 1) -> Placement:
    ids = [str(d) for d in topology.ids]
    if len(ids) < at_least:
        raise InputError("memory", expected=f"{at_least} devices", actual=len(ids), remedy="more devices")

    def shares(total: int) -> Shares:
        ends = [total * i // len(ids) for i in range(len(ids) + 1)]
        return Shares.of({d: [(a, b)] for d, a, b in zip(ids, ends, ends[1:], strict=False)})

    layer = LayerPlacement(shares(GROUPS), shares(COLUMNS))
    return Placement((layer,) * LAYERS, (topology.ids[0],), shares(VOCAB))


@dataclass
class World:
    """Devices and a run that gives a token each tick while all its pieces are there."""

    names: tuple[str, ...]
    start_s: float
    rng: random.Random
    at_least: int
    now_s: float = 0.0
    alive: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    away_until: dict[str, float] = field(default_factory=dict)
    """When a dead device's host can start it again."""
    coming: dict[str, float] = field(default_factory=dict)
    """When a start that is under way ends."""
    spoilt_until: dict[str, float] = field(default_factory=dict)
    """Other weights on the disk until then."""
    refused_until: dict[str, float] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)
    """The epoch whose pieces each device has."""
    epoch: int = 0
    moves: list[tuple[float, NextStep]] = field(default_factory=list)
    tokens: int = 0
    steps: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.topology = replace(Topology.uniform(len(self.names)))
        assert tuple(map(str, self.topology.ids)) == self.names
        other = even(replace(self.topology, devices=self.topology.devices[::-1]))  # not what the planner gives again
        self.wanted = WantedState(placement=other, topology=self.topology, place=lambda t: even(t, self.at_least))
        self.alive = set(self.names)
        self.placement, self.over = self.wanted.placement, self.topology
        self.holds = dict.fromkeys(self.names, 0)

    @property
    def usable(self) -> frozenset[str]:
        refused = {d for d, t in self.refused_until.items() if t > self.now_s}
        return frozenset(self.alive - self.silent - refused)

    def die(self, device: str, away_s: float) -> None:
        self.alive.discard(device)
        self.silent.discard(device)
        self.coming.pop(device, None)
        self.holds.pop(device, None)
        self.away_until[device] = self.now_s + away_s

    def load(self, step: NextStep) -> bool:
        """Carry a step out: all its devices must be there, and none may have other weights."""
        devices = {str(d) for d in step.placement.devices}
        assert devices <= self.usable, f"a piece on {devices - self.usable}, which is not there"
        spoilt = [d for d in devices if self.spoilt_until.get(d, 0) > self.now_s and self.holds.get(d) is None]
        for device in spoilt:
            self.refused_until[device] = self.now_s + BROKEN_S
        if spoilt:
            return False
        self.epoch += 1
        self.holds |= dict.fromkeys(devices, self.epoch)
        self.placement, self.over = step.placement, step.topology
        return True

    def tick(self) -> None:
        self.now_s += TICK_S
        for device in self.names:
            if device not in self.alive and device not in self.coming and self.away_until[device] <= self.now_s:
                self.coming[device] = self.now_s + self.start_s
        for device in [d for d, t in self.coming.items() if t <= self.now_s]:
            del self.coming[device]
            self.alive.add(device)
        runs = {str(d) for d in self.placement.devices}
        stopped = not all(d in self.usable and self.holds.get(d) == self.epoch for d in runs)
        if stopped:
            self.moves.clear()
        if self.moves and self.moves[0][0] <= self.now_s:
            _, step = self.moves.pop()
            if {str(d) for d in step.placement.devices} <= self.usable:
                self.load(step)
        seen = SeenState(
            placement=self.placement, topology=self.over, usable=self.usable, stopped=stopped, moving=bool(self.moves)
        )
        step = next_step(self.wanted, seen)
        self.steps[step.kind] += 1
        allowed = {"wait", "go_on"} if stopped else {"stay", "move"}
        assert step.kind in allowed, step
        if step.kind == "go_on":
            self.load(step)
        elif step.kind == "move":
            self.moves.append((self.now_s + self.rng.uniform(0, 1.0), step))
        elif not stopped:
            owners = {str(d) for d in self.placement.devices}
            assert all(self.holds[d] == self.epoch and d in self.alive for d in owners), "a wrong owner of a piece"
            self.tokens += 1


@pytest.mark.thin(4)
@pytest.mark.parametrize("seed", range(300))
def test_never_stuck_and_never_a_wrong_owner(seed):
    rng = random.Random(seed)
    names = tuple(map(str, Topology.uniform(rng.choice([2, 3, 4, 5])).ids))
    world = World(names, rng.choice([0.3, 1.0, 3.0, 6.0]), rng, at_least=rng.choice([1, 1, min(2, len(names))]))
    end_s, next_s, healed_s = 60.0, 0.0, 0.0
    while world.now_s < end_s:
        if world.now_s >= next_s:
            next_s = world.now_s + rng.uniform(0.2, 6.0)
            device, kind = rng.choice(names), rng.choice(["die", "die", "die", "silence", "answer", "spoil"])
            if kind == "die" and device in world.alive:
                away_s = rng.choice([0.0, 0.0, 2.0, 15.0])
                world.die(device, away_s)
                if rng.random() < 0.2:
                    world.spoilt_until[device] = world.now_s + rng.uniform(1.0, 15.0)
            elif kind == "silence" and device in world.alive:
                world.silent.add(device)
            elif kind == "answer":
                world.silent.discard(device)
        world.tick()
    world.silent.clear()
    waits_s = [0.0, *world.away_until.values()]
    healed_s = max([world.now_s, *waits_s, *world.spoilt_until.values()])
    before = world.tokens
    whole_by_s = healed_s + BROKEN_S + world.start_s + 5.0
    while world.now_s < whole_by_s:
        world.tick()
    assert world.placement == world.wanted.placement, f"seed {seed}: not whole after {whole_by_s:.0f} s"
    assert {*map(str, world.over.ids)} == {*names}
    assert world.tokens > before, f"seed {seed}: stuck"


def of(placement, topology, usable, wanted, **how):
    return next_step(wanted, SeenState(placement=placement, topology=topology, usable=frozenset(usable), **how))


def test_a_death_off_the_route_is_no_reason_to_do_anything():
    topology = Topology.uniform(3)
    two = even(without(topology, {"cloud1"}))
    wanted = WantedState(placement=two, topology=topology, place=even)
    step = of(two, topology, {"edge0", "cloud0"}, wanted)
    assert step.kind == "stay"
    assert of(two, topology, {"edge0", "cloud0"}, wanted, stopped=True).kind == "go_on"


def test_without_a_planner_it_waits_for_all_of_them():
    topology = Topology.uniform(2)
    wanted = WantedState(placement=even(topology), topology=topology, place=None)
    step = of(wanted.placement, topology, {"edge0"}, wanted, stopped=True)
    assert step.kind == "wait" and "cloud0" in step.why
    assert of(wanted.placement, topology, {"edge0", "cloud0"}, wanted, stopped=True).kind == "go_on"


def test_the_two_that_are_back_are_used_when_the_last_one_dies():
    topology = Topology.uniform(3)
    wanted = WantedState(placement=even(topology), topology=topology, place=even)
    alone = without(topology, {"cloud0", "cloud1"})
    step = of(even(alone), alone, {"cloud0", "cloud1"}, wanted, stopped=True)
    assert step.kind == "go_on" and {*map(str, step.placement.devices)} == {"cloud0", "cloud1"}


def test_one_that_is_back_is_used_though_the_other_is_not():
    topology = Topology.uniform(3)
    wanted = WantedState(placement=even(topology), topology=topology, place=even)
    alone = without(topology, {"cloud0", "cloud1"})
    step = of(even(alone), alone, {"edge0", "cloud1"}, wanted)
    assert step.kind == "move" and {*map(str, step.placement.devices)} == {"edge0", "cloud1"}
    assert of(even(alone), alone, {"edge0", "cloud1"}, wanted, moving=True).kind == "stay"
    assert of(even(alone), alone, {"edge0", "cloud1"}, replace(wanted, fail_back=False)).kind == "stay"
    whole = of(even(alone), alone, {"edge0", "cloud0", "cloud1"}, wanted)
    assert whole.kind == "move" and whole.placement == wanted.placement and whole.topology == topology


def test_a_silent_device_is_waited_for_before_it_is_left_out():
    topology = Topology.uniform(2)
    wanted = WantedState(placement=even(topology), topology=topology, place=even)
    assert of(wanted.placement, topology, {"edge0"}, wanted, stopped=True, patient=True).kind == "wait"
    assert of(wanted.placement, topology, {"edge0"}, wanted, stopped=True).kind == "go_on"


def test_what_does_not_fit_is_waited_for_and_said():
    topology = Topology.uniform(3)
    wanted = WantedState(placement=even(topology), topology=topology, place=lambda t: even(t, 2))
    step = of(wanted.placement, topology, {"edge0"}, wanted, stopped=True)
    assert step.kind == "wait" and "without cloud0, cloud1 there is no placement" in step.why
    assert of(wanted.placement, topology, set(), wanted, stopped=True).kind == "wait"
