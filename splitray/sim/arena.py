"""The one executor of planners under the virtual clock: each decides slot by slot, and pays for what it moves.

All cases run side by side in one `Simulator`. At the beginning of a slot a planner sees that slot's rates, the queues
and its own placement. A move takes the cheaper of sending the KV, which stops its line, and replaying its tokens in the
new place (`planners/pay_back.py`); it happens only where it pays, by the planner's own weighing or else by time. What
does not fit at the present context gives up the request that it serves, as a device that runs out of memory would.
Cases of one pool are edges of one cloud, which is as slow for each as the others make it (`crowd.py`); they decide one
after the other.

Shapes: N cases, T slots, D devices, L layers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from splitray.arch import ModelArch
from splitray.arrays import Floats
from splitray.codecs import Codec
from splitray.cost import Load, Rates, load_of
from splitray.errors import InputError, PlannerError
from splitray.migration import diff, moved_bytes
from splitray.placement import LayerPlacement, Placement
from splitray.planners import CheckedPlanner, ClusterState, make_planner
from splitray.planners.memory import needed_bytes
from splitray.planners.pay_back import keep_or_move, moving_s
from splitray.planners.protocol import Planner
from splitray.planners.whole import layers_on
from splitray.quality.weight_loss import weights_loss
from splitray.queues import QueueState, SlotOutcome, advance
from splitray.route import compile_route
from splitray.sim.crowd import Crowd, slowed
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import Scenario
from splitray.sim.simulator import Simulator
from splitray.topology import DeviceId, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One planner, by name or as an object, put to one scenario; `every` slots it may decide anew.

    Cases of one `pool` share all devices of the tier cloud; without one a case is alone.
    """

    planner: str | Planner
    scenario: Scenario
    seed: int = 0
    every: int = 1
    pool: int | None = None


@dataclass(slots=True)
class _Line:
    """A case while it runs: its planner, placement, queues and what is recorded of it."""

    case: Case
    planner: CheckedPlanner
    placement: Placement | None = None
    queues: QueueState = QueueState()
    last: tuple[ClusterState, Placement] | None = None
    refusal: InputError | None = None
    loss: float = 0.0
    decisions_s: list[float] = field(default_factory=list)
    migrations: int = 0
    migration_bytes: int = 0
    migration_s: float = 0.0
    replays: int = 0
    records: list[tuple[float, ...]] = field(default_factory=list)
    share: Floats | None = None  # of the placement; see `edge_share`
    shares: list[Floats] = field(default_factory=list)


def run(
    cases: Sequence[Case], *, drain: bool = True, tell: Callable[[int, int], None] = lambda done, of: None
) -> list[Outcome]:
    """Run all cases side by side.

    The cases are of one model and the same devices, links and slots. `drain`: go on without new requests, at most as
    long again, until every line is empty. `tell` is told how many slots of how many are done.

    Raises:
        InputError: a planner is wrong, or the cases do not go together.
    """
    first = cases[0].scenario
    for case in cases:
        if _common(case.scenario) != _common(first):
            expected, remedy = "one model, the same devices, links and slots", "run them one after the other"
            raise InputError("cases", expected=expected, actual=case.scenario.name, remedy=remedy)
    lines = [_Line(c, make_planner(c.planner, seed=c.seed)) for c in cases]
    arena = _Arena(lines)
    total = first.num_slots
    for t in range(2 * total if drain else total):
        if t >= total and not arena.simulator.backlog_requests.any():
            break
        arena.slot(min(t, total - 1), recorded=t < total)
        tell(min(t + 1, total), total)
    return [arena.outcome(i) for i in range(len(lines))]


def _common(s: Scenario) -> tuple[object, ...]:
    """What the cases of a run share, for they are priced together."""
    where = s.topology
    links = tuple((x.source, x.target, x.medium) for x in where.links)
    return s.arch, where.devices, links, where.origin, s.num_slots, s.slot_s


class _Arena:
    def __init__(self, lines: list[_Line]) -> None:
        scenarios = [x.case.scenario for x in lines]
        self.lines, self.scenarios = lines, scenarios
        self.topology = scenarios[0].topology
        self.arch = scenarios[0].arch
        self.simulator = Simulator(self.topology, [s.requests for s in scenarios], slot_s=scenarios[0].slot_s)
        self._different = different = list({id(s): s for s in scenarios}.values())
        at = {id(s): i for i, s in enumerate(different)}
        self._of = np.array([at[id(s)] for s in scenarios])
        self._loads: dict[tuple[Placement, Codec], tuple[Load, Floats, Floats]] = {}
        origin, state = self.topology.origin, ClusterState(arch=self.arch, topology=self.topology)
        self._stand_in = layers_on([origin] * self.arch.num_layers, origin, origin, state)  # of a line that is not up
        self._take_part({origin, *self.topology.ids[:2]})
        self._up = np.zeros(len(lines), bool)
        d = len(self.topology.ids)
        own = iter(range(len(lines), 2 * len(lines)))
        self._pool = np.array([next(own) if x.case.pool is None else x.case.pool for x in lines])
        self._pool = np.unique(self._pool, return_inverse=True)[1]
        self._members = [np.flatnonzero(self._pool == p) for p in range(int(self._pool.max()) + 1)]
        shared = np.array([x.tier == "cloud" for x in self.topology.devices])
        self._crowd = Crowd(self._pool, shared) if any(x.case.pool is not None for x in lines) else None
        self._held, self._held_per_token = np.zeros((len(lines), d)), np.zeros((len(lines), d))

    def _take_part(self, devices: set[DeviceId]) -> None:
        """Make rates and loads of these devices alone: tables of all pairs of many devices are large."""
        self._part = self.topology.among(devices)
        self._at = [self.topology.index[d] for d in self._part.ids]
        rates = [s.rates_among(self._part.ids) for s in self._different]
        names = [f.name for f in fields(Rates) if f.name != "medium"]
        self._rates = {n: np.stack([getattr(r, n) for r in rates]) for n in names}
        self._medium = rates[0].medium
        self._loads.clear()
        placed = [x.placement or self._stand_in for x in self.lines]
        self._now = Load.stack([self._known(p, s)[0] for p, s in zip(placed, self.scenarios, strict=True)])

    def _alone(self, t: int) -> Rates:
        """The rates of a slot for each line, if it has the devices that take part to itself."""
        return Rates(medium=self._medium, **{n: a[self._of, t] for n, a in self._rates.items()})

    def slot(self, t: int, *, recorded: bool) -> None:
        """Decide, generate, and write down what came of it."""
        simulator, topologies = self.simulator, {}
        crowd, ids = self._crowd, self.topology.ids
        if crowd is not None:
            crowd.look(simulator, self._now, self._alone(t))
        for at in range(len(self.lines)):
            i = self._turn(at, t)
            line, scenario = self.lines[i], self.scenarios[i]
            if id(scenario) not in topologies:
                topologies[id(scenario)] = scenario.topology_at(t)
            where, before = topologies[id(scenario)], line.placement
            self._decide(i, line, where if crowd is None else shared_with(where, ids, crowd.share[i]), t)
            if crowd is not None and line.placement is not before:
                crowd.look(simulator, self._now, self._alone(t), np.array([i]))
        self._give_up(t)
        states = [x.last for x in self.lines]
        alone = self._alone(t)
        if crowd is None:
            slot = simulator.step(self._now, alone, up=self._up)
        else:
            slow = slowed(alone, crowd.share[:, self._at])
            slot = simulator.step(self._now, slow, up=self._up, share=crowd.share)
        energy = slot.energy_j.sum(1)
        backlog, waiting = simulator.backlog_tokens, simulator.backlog_requests
        for i, line in enumerate(self.lines):
            seen = states[i]
            if seen is not None and line.planner.learns:
                tpot_s, joule = float(slot.tpot_s[i]), float(slot.token_j[i])
                line.planner.observe(*seen, tpot_s=tpot_s, energy_j_per_token=joule)
            outcome = SlotOutcome(
                arrived_tokens=float(slot.arrived_tokens[i]),
                served_tokens=float(slot.served_tokens[i]),
                energy_j=float(energy[i]),
                accuracy_loss=line.loss,
            )
            queues = advance(line.queues, outcome, self.scenarios[i].budgets, slot_s=simulator.slot_s)
            line.queues = replace(queues, backlog_tokens=float(backlog[i]))
            seconds = slot.tpot_s[i] if self._up[i] else np.nan
            line.records.append((backlog[i], waiting[i], seconds, line.loss, *slot.energy_j[i]))
            if recorded:
                line.shares.append(np.full(self.arch.num_layers, np.nan) if line.share is None else line.share)

    def _turn(self, at: int, t: int) -> int:
        """Which line decides next: those of a pool in turn, each slot another one first."""
        members = self._members[self._pool[at]]
        return int(members[(np.searchsorted(members, at) + t) % len(members)])

    def _decide(self, i: int, line: _Line, topology: Topology, t: int) -> None:
        current = line.placement
        here = set(topology.ids)
        whole = current is not None and here.issuperset(current.devices)
        if current is not None and not whole and not keeps_cache(current, self.arch, here):
            self.simulator.lose_cache(i)  # even if the device comes back, its memory is lost
        due = t % line.case.every == 0 or not whole
        # In a crowd most lines of many are empty, and what they would choose is not used.
        crowded = line.case.pool is not None
        if crowded and whole and not self.simulator.head(i).waits:
            if line.planner.learns and current is not None:
                line.last = self._state(i, line, topology), current
        elif due and not (line.planner.once and whole):
            state = self._state(i, line, topology)
            proposal = self._propose(line, state)
            if proposal is not None and state.current is not None and not line.planner.charges_moves:
                proposal = keep_or_move(proposal, state, state, staged=self.scenarios[i].staged)
            if proposal is not None and proposal != current:
                self._move(i, line, state, proposal, free=current is None or not whole)
        self._up[i] = line.placement is not None and here.issuperset(line.placement.devices)

    def _state(self, i: int, line: _Line, topology: Topology) -> ClusterState:
        scenario, head = self.scenarios[i], self.simulator.head(i)
        present = head.next_tokens
        context = scenario.longest_tokens if scenario.reserve else int(present) + scenario.interval_tokens
        current = line.placement
        if current is not None and not set(topology.ids).issuperset(current.devices):
            current = None
        return ClusterState(
            arch=scenario.arch, topology=topology, context_tokens=context, current=current,
            cached_tokens=int(head.cached_tokens), step_tokens=int(present),
            interval_tokens=scenario.interval_tokens, slot_s=scenario.slot_s, queues=line.queues,
            average=scenario.average, request=scenario.shape, codec=scenario.codec, accuracy=scenario.accuracy,
        )  # fmt: skip

    def _propose(self, line: _Line, state: ClusterState) -> Placement | None:
        """What the planner says, or said to the very same state; None where it finds nothing."""
        key = state if line.planner.heeds_queues else replace(state, queues=QueueState())
        if not line.planner.charges_moves:
            key = replace(key, cached_tokens=None, step_tokens=None, current=None)
        if line.last is not None and line.last[0] == key and not line.planner.learns:
            return line.last[1]
        started = time.perf_counter()
        try:
            placement = line.planner.propose(state)
        except PlannerError:
            raise  # the planner is wrong, and not this moment
        except InputError as error:  # nothing fits, or a link is down that it needs
            line.refusal, line.last = error, None
            return None
        finally:
            line.decisions_s.append(time.perf_counter() - started)
        line.last = key, placement
        return placement

    def _move(self, i: int, line: _Line, state: ClusterState, new: Placement, *, free: bool) -> None:
        scenario = self.scenarios[i]
        try:
            load, held, per_token = self._known(new, scenario)
        except InputError as error:  # a link that was never there
            line.refusal = error
            return
        if free and line.placement is not None and any(m.kv_bytes for m in diff(line.placement, new, self.arch, 1)):
            self.simulator.lose_cache(i)  # what is left of it is not where it is needed: the tokens are replayed
        if not free and line.placement is not None:
            seconds, replay = moving_s(line.placement, new, state, staged=scenario.staged)
            if not np.isfinite(seconds):
                return
            line.migrations += 1
            line.migration_s += seconds
            if replay:
                line.replays += 1
                self.simulator.lose_cache(i)
            else:
                moves = diff(line.placement, new, self.arch, state.cached_tokens or 0)
                line.migration_bytes += moved_bytes(moves, staged=scenario.staged)
                self.simulator.pause(i, seconds)
        line.placement, line.share = new, edge_share(new, self.arch, self.topology)
        line.loss = weights_loss(new, self.arch)
        if scenario.accuracy is not None:
            route = compile_route(new, scenario.arch, scenario.topology, codec=scenario.codec)
            line.loss += scenario.accuracy.route_loss(route)
        self._now.put([i], load)
        self._held[i], self._held_per_token[i] = held, per_token

    def _known(self, placement: Placement, scenario: Scenario) -> tuple[Load, Floats, Floats]:
        """The load of a placement and the bytes that it needs on each device: fixed, and for a token of context."""
        if not self._part.index.keys() >= set(placement.devices):
            self._take_part({*self._part.ids, *placement.devices})
        key = placement, scenario.codec
        if key not in self._loads:
            load = load_of(placement, self.arch, self._part, codec=scenario.codec)
            state, ids = ClusterState(arch=self.arch, topology=self.topology), self.topology.ids
            needed = [needed_bytes(placement, replace(state, context_tokens=n)) for n in (0, 1)]
            fixed, with_one = (np.array([float(b.get(d, 0)) for d in ids]) for b in needed)
            self._loads[key] = load, fixed, with_one - fixed
        return self._loads[key]

    def _give_up(self, t: int) -> None:
        """Fail the request of each line that no longer fits the memory there is."""
        context = self.simulator.next_tokens
        room = np.stack([s.memory_at(t) for s in self.scenarios])
        over = (self._held + self._held_per_token * context[:, None] > room).any(1) & self._up
        for i in np.flatnonzero(over & (context > 1)):
            self.simulator.fail_head(int(i))

    def outcome(self, i: int) -> Outcome:
        """The case's line as it stands."""
        line, s, scenario = self.lines[i], self.simulator, self.scenarios[i]
        count = len(scenario.requests)
        records = np.array(line.records)
        return Outcome(
            planner=line.planner.spec, scenario=scenario, now_s=s.now_s,
            arrival_s=s.arrival_s[i, :count], first_token_s=s.first_token_s[i, :count],
            finish_s=s.finish_s[i, :count], failed=s.failed[i, :count], output_tokens=s.output_tokens[i, :count],
            backlog_tokens=records[:, 0], backlog_requests=records[:, 1], tpot_s=records[:, 2],
            accuracy_loss=records[:, 3], energy_j=records[:, 4:], edge_share=np.array(line.shares),
            decisions_s=np.array(line.decisions_s), migrations=line.migrations,
            migration_bytes=line.migration_bytes, migration_s=line.migration_s, replays=line.replays,
            refusal=line.refusal, num_cut=scenario.num_cut,
        )  # fmt: skip


def shared_with(topology: Topology, ids: tuple[DeviceId, ...], share: Floats) -> Topology:
    """The topology with its devices as fast as a line has them: a share of each, [D] in the order of ids."""
    if (share == 1).all():
        return topology
    left = dict(zip(ids, map(float, share), strict=True))
    devices = tuple(
        replace(d.slowed(left[d.id]), launch_s=d.launch_s / left[d.id]) if left[d.id] < 1 else d
        for d in topology.devices
    )
    return replace(topology, devices=devices)


def keeps_cache(placement: Placement, arch: ModelArch, here: set[DeviceId]) -> bool:
    """Whether every head group's KV is still on some device: replicated attention keeps a copy."""
    return all(
        here & set(x.attention.devices)
        if x.attention.is_replicated(arch.num_kv_heads)
        else here.issuperset(x.attention.devices)
        for x in placement.layers
    )


def edge_share(placement: Placement, arch: ModelArch, topology: Topology) -> Floats:
    """The share of each layer's weights that edge devices hold, [L]; a copy counts as holding."""
    edges = topology.tier("edge")
    whole = arch.num_kv_heads * arch.group_params + arch.ffn_dim * arch.ffn_unit_params
    known: dict[LayerPlacement, float] = {}
    for layer in placement.layers:
        if layer not in known:
            groups = min(arch.num_kv_heads, sum(layer.attention.count(e) for e in edges))
            units = min(arch.ffn_dim, sum(layer.ffn.count(e) for e in edges))
            known[layer] = (groups * arch.group_params + units * arch.ffn_unit_params) / whole
    return np.array([known[x] for x in placement.layers])
