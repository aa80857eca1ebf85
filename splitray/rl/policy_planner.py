"""A trained policy as a planner: two files, numpy, and the exact program. Knows neither RLlib nor Ray nor torch.

The policy turns the knobs of the one-slot program (V, the weight of moves, the price of a cloud that others use too);
the program makes the placement, so that what does not fit cannot be chosen. If the backlog passes `most_requests`, the
knobs are overridden by those that only shorten the queue (docs/equations.md E2.S). Where an edge cannot relieve a cloud
that it shares, the program is left alone (`relieves`).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from splitray.arrays import Floats32, Ints
from splitray.cost import Rates
from splitray.errors import PlacementError
from splitray.placement import Placement
from splitray.planners.memory import require_one_format
from splitray.planners.protocol import ClusterState, RequestShape
from splitray.rl.grid.choice import Choice
from splitray.rl.grid.grid import Grid
from splitray.rl.world.action import high_mask, low_mask, modes_that_fit, parts
from splitray.rl.world.cell import CLOUD_DEVICE, USUAL, References, references
from splitray.rl.world.deciding import allowed_modes, decided, left_alone
from splitray.rl.world.knobs import Moment, planned
from splitray.rl.world.observation import History, Seen, Static, observe
from splitray.rl.world.policy import Policy
from splitray.rl.world.room import room_of
from splitray.topology import Topology

SHIPPED = Path(__file__).parent / "shipped" / "policy"
MOST_REQUESTS = 50.0  # that may wait before the queue alone counts
_LAYERS = ("whole", "group", "join", "knobs")  # of training/module.py, that lead to the knobs
_CROWD, _MARGIN = 16, 1.7  # see `relieves`


def relieves(static: Static) -> bool:
    """Whether it can pay to keep a request away from a cloud that is shared: where not, a policy has nothing to win.

    In a crowd of 16 a request takes its own time among 15 others there, and costs them as much again. The edge has to
    have room for the whole model, and to be quicker than that within a margin, which was chosen by `holdout.score` on
    drawn weather, not on recorded. Where an end is pinned to the edge each token crosses anyway.
    """
    known, others = static.known, 2 * (_CROWD - 1)
    crowded_s = known.cloud.service_s(known.request) + others * known.cloud.device_s(known.request)
    pinned = static.pinned_embedding or static.pinned_head
    return not pinned and known.edge.weight_share <= 1 and known.edge.service_s(known.request) <= _MARGIN * crowded_s


@dataclass(slots=True)
class Served:
    """What does not change while one model is served on one pair of devices, and what was seen so far."""

    topology: Topology
    usual: Rates
    grid: Grid
    known: References
    static: Static
    history: History
    relieves: bool
    since_move: float = 0.0
    made: tuple[Placement, Choice] | None = None


@dataclass
class Splitwise:
    """See `Planner`, and `Learner`: it remembers the slots that are over.

    Args:
        policy: trained.
        most_requests: that may wait before it is overridden.
    """

    policy: Policy
    most_requests: float = MOST_REQUESTS
    overrides: int = 0
    _served: tuple[Any, Served] | None = None  # the last

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; fails where there is no edge or no cloud device, or nothing fits.

        Of several it takes the origin, or else the first edge, and the fastest cloud; others hold nothing.
        """
        served = self._of(state)
        moment = self._moment(state, served)
        current = self._current(state, served, moment)
        request = state.request or USUAL
        seen = None
        if moment.backlog_tokens[0] > self.most_requests * request.output_tokens:
            self.overrides += 1
        elif served.relieves or self.policy.spec.low_decides:
            seen = observe(self._seen(state, served, moment, current), served.history.values, served.static)
        choice = self.chosen(served, replace(moment, current=current), request, seen)
        if state.current is not None and choice.same_as(current)[0]:
            return state.current
        placement = served.grid.placement(choice, 0)
        served.made = placement, choice
        return placement

    def chosen(
        self, served: Served, moment: Moment, request: RequestShape, seen: tuple[Floats32, Floats32] | None
    ) -> Choice:
        """What the policy decides for features [N, F] and [N, G, L], executed as in training; N placements.

        Without features the program is left alone, with its default knobs.
        """
        policy, spec, low, room = self.policy, self.policy.spec, None, None
        if seen is None:
            spec = replace(spec, variant="dp_knobs")
            high = left_alone(spec, len(moment.backlog_tokens))
        elif not spec.low_decides:
            high = policy.high(*seen)
        else:
            room = room_of(served.grid, moment.memory_bytes, moment.longest_tokens)
            high = policy.high(*seen, high_mask(spec, room))
            modes = modes_that_fit(spec, parts(spec.high, high)["mode"], room)
            low = policy.low(*seen, modes, low_mask(spec, modes, room))

        def program(modes: Ints, knobs: Ints, rows: Ints) -> Choice:
            here = moment if len(rows) == len(high) else moment.take(rows)
            return planned(
                served.grid, here, knobs, known=served.known, request=request, weights=policy.weights,
                allowed=allowed_modes(modes[:, : served.grid.num_groups]),
            )  # fmt: skip

        return decided(
            served.grid, program, high, low, spec=spec, static=served.static, room=room,
            longest_tokens=moment.longest_tokens, memory_bytes=moment.memory_bytes,
        )  # fmt: skip

    def observe(self, state: ClusterState, placement: Placement, *, tpot_s: float, energy_j_per_token: float) -> None:
        """Remember what the slot was like."""
        served = self._of(state)
        moment = self._moment(state, served)
        served.history.push(self._seen(state, served, moment, _choice_of(placement, served)), served.static)
        served.since_move = served.since_move + 1 if placement == state.current else 0.0

    def _of(self, state: ClusterState) -> Served:
        nominal = state.average or state.topology
        key = state.arch, nominal, state.request
        if self._served is None or self._served[0] != key:
            self._served = key, _served(state, nominal, self.policy.card["num_groups"])
        return self._served[1]

    def _moment(self, state: ClusterState, served: Served) -> Moment:
        now, ids = state.topology, served.topology.ids
        if now.ids != ids:
            here = {d.id: d for d in now.devices}
            if missing := [d for d in ids if d not in here]:
                remedy = "wait for it, or use another planner"
                raise PlacementError("devices", expected=f"{', '.join(ids)}", actual=f"no {missing[0]}", remedy=remedy)
            links = tuple(x for x in now.links if {x.source, x.target} == set(ids))
            now = replace(served.topology, devices=tuple(here[i] for i in ids), links=links)
        rates = Rates.of(now, state.arch)
        return Moment(
            rates=rates, cloud_free=rates.bytes_per_s[:, CLOUD_DEVICE] / served.usual.bytes_per_s[:, CLOUD_DEVICE],
            backlog_tokens=np.array([state.queues.backlog_tokens]),
            arrived_tokens=np.array([state.queues.arrived_tokens]),
            energy_debt_j=np.array([state.queues.energy_debt_j]),
            longest_tokens=np.array([float(max(1, state.context_tokens))]),
            memory_bytes=np.array([[d.memory_bytes for d in now.devices]]), slot_s=state.slot_s, current=None,
        )  # fmt: skip

    def _current(self, state: ClusterState, served: Served, moment: Moment) -> Choice:
        if state.current is not None:
            return _choice_of(state.current, served)
        return self.chosen(served, moment, state.request or USUAL, None)

    def _seen(self, state: ClusterState, served: Served, moment: Moment, choice: Choice) -> Seen:
        cached = float(state.cached_tokens or 0)
        step = max(1.0, cached if state.step_tokens is None else float(state.step_tokens))
        usual = served.usual
        held = served.grid.memory_bytes(choice, np.array([step]))
        return Seen(
            backlog_tokens=moment.backlog_tokens, arrived_tokens=moment.arrived_tokens,
            energy_debt_j=moment.energy_debt_j, accuracy_debt=np.array([state.queues.accuracy_debt]),
            link_bytes_per_s=moment.rates.link_bytes_per_s[:, 0, 1],
            mean_link_bytes_per_s=usual.link_bytes_per_s[:, 0, 1],
            rtt_s=2 * np.where(moment.rates.latency_s[:, 0, 1] > 0, moment.rates.latency_s, usual.latency_s)[:, 0, 1],
            mean_rtt_s=2 * usual.latency_s[:, 0, 1], cloud_free=moment.cloud_free,
            context_tokens=np.array([step]), serving=np.array([cached > 0]),
            free_memory=1 - held / moment.memory_bytes, slots_since_move=np.array([served.since_move]), choice=choice,
        )  # fmt: skip


def _choice_of(placement: Placement, served: Served) -> Choice:
    """A placement in the grid; the last one that was asked for is remembered."""
    if served.made is None or served.made[0] != placement:
        served.made = placement, served.grid.choice_of(placement)
    return served.made[1]


def build(argument: str) -> Splitwise:
    """The planner `splitwise` with the policy that ships, or `splitwise:PATH` with another.

    Raises:
        InputError: the policy cannot be used.
    """
    return Splitwise(Policy.load(argument or SHIPPED))


def _served(state: ClusterState, nominal: Topology, num_groups: int) -> Served:
    require_one_format(state, "splitwise")
    edges = [d for d in nominal.devices if d.tier == "edge"]
    clouds = [d for d in nominal.devices if d.tier == "cloud"]
    if not edges or not clouds:
        raise PlacementError(
            "topology",
            expected="an edge and a cloud device for the planner splitwise",
            actual=f"{[f'{d.id} ({d.tier})' for d in nominal.devices]}",
            remedy="use the planner exact, drift_plus_penalty or myopic",
        )
    edge = next((d for d in edges if d.id == nominal.origin), edges[0])
    cloud = max(clouds, key=lambda d: d.memory_bandwidth_bytes_per_s)
    pair = {edge.id, cloud.id}
    ordered = replace(
        nominal,
        devices=(edge, cloud),
        links=tuple(x for x in nominal.links if {x.source, x.target} == pair),
        origin=nominal.origin if nominal.origin in pair else edge.id,
    )
    grid = Grid(state.arch, ordered, groups=num_groups, codec=state.codec)
    known = references(state.arch, ordered, state.request or USUAL)
    static = Static(
        known=known, group_layers=grid.sizes, num_kv_heads=state.arch.num_kv_heads,
        hidden_bytes=state.arch.hidden_dim * state.arch.dtype_bytes,
        memory_bytes=np.array([d.memory_bytes for d in ordered.devices]),
        pinned_embedding=state.pinned_embedding is not None, pinned_head=state.pinned_head is not None,
    )  # fmt: skip
    return Served(ordered, Rates.of(ordered, state.arch), grid, known, static, History(1), relieves(static))
