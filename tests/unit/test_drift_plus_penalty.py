"""drift_plus_penalty: exact for its additive cost, quick, moved by debts; queues held to docs/equations.md E2.17."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.catalog import architecture
from splitray.channel import NoisyChannel
from splitray.cost import CostModel
from splitray.planners import ClusterState, make_planner
from splitray.planners.drift_plus_penalty import DriftPlusPenalty, cost_of
from splitray.planners.optimum.additive import Additive, Prices
from splitray.planners.optimum.space import MISSING_S, Space
from splitray.quality.accuracy import AccuracyRow, AccuracyTable
from splitray.quality.surrogate import shipped_surrogate
from splitray.quality.surrogate_accuracy import SurrogateAccuracy
from splitray.queues import Budgets, QueueState, SlotOutcome, advance
from splitray.route import compile_route
from splitray.topology import Device, DeviceId, Link, Topology, parse_topology

ARCH = ModelArch(
    name="toy", num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, hidden_dim=64, ffn_dim=256, vocab=500,
    context_tokens=256,
)  # fmt: skip
FAST, FRUGAL = DeviceId("fast"), DeviceId("frugal")
LOSSES = AccuracyTable(
    model="toy", num_layers=4, text="toy", tokens=1, window=1, stride=1, measured_at="2026-11-01", perplexity=10.0,
    rows=(
        AccuracyRow(codec="int8", cut=None, perplexity=10.8, standard_error=0.0),
        AccuracyRow(codec="int8", cut=1, perplexity=10.2, standard_error=0.0),
        AccuracyRow(codec="int8", cut=3, perplexity=10.1, standard_error=0.0),
    ),
)  # fmt: skip


def pair(*, speed: float = 2.0, power_w: float = 20.0, rtt_s: float = 1e-6) -> Topology:
    """Two devices with room, the first so many times as fast and drawing so many times 1 W more."""
    base = Device(
        id=FRUGAL, tier="cloud", memory_bytes=1e12, compute_flops=1e12, memory_bandwidth_bytes_per_s=1e7,
        idle_w=0.1, active_w=1.1, radio_w=0.2,
    )  # fmt: skip
    fast = replace(base, id=FAST, tier="edge", memory_bandwidth_bytes_per_s=speed * 1e7, active_w=base.idle_w + power_w)
    links = tuple(
        Link(source=a, target=b, bandwidth_bytes_per_s=1e8, rtt_s=rtt_s) for a, b in [(FAST, FRUGAL), (FRUGAL, FAST)]
    )
    return Topology(devices=(fast, base), links=links, origin=FAST)


def random_state(seed: int) -> ClusterState:
    rng = np.random.default_rng(seed)
    num_devices = 2 + seed % 2
    devices = tuple(
        Device(
            id=DeviceId(f"d{i}"), tier="cloud" if i else "edge", memory_bytes=1e12, compute_flops=1e12,
            memory_bandwidth_bytes_per_s=float(np.exp(rng.uniform(np.log(3e6), np.log(3e8)))),
            idle_w=float(rng.uniform(0, 5)), active_w=float(rng.uniform(5, 30)), radio_w=float(rng.uniform(0, 2)),
            launch_s=float(rng.choice([0, 1e-5])),
        )
        for i in range(num_devices)
    )  # fmt: skip
    links = tuple(
        Link(
            source=a.id, target=b.id, bandwidth_bytes_per_s=float(rng.uniform(1e6, 1e8)),
            rtt_s=float(np.exp(rng.uniform(np.log(1e-5), np.log(1e-2)))), medium="air" if seed % 5 == 0 else None,
        )
        for a, b in itertools.permutations(devices, 2)
    )  # fmt: skip
    pins = ("none", "none", "embedding", "embedding_and_head")[int(rng.integers(4))]
    where = Topology(devices=devices, links=links, origin=devices[-1].id, origin_holds=pins)  # type: ignore[arg-type]
    layers = 2 if num_devices == 2 else 1
    arch = replace(
        ARCH, num_layers=layers, post_norm=bool(rng.random() < 0.3), tied_embeddings=bool(rng.random() < 0.3)
    )
    queues = QueueState(
        backlog_tokens=float(rng.choice([0, 50])), arrived_tokens=float(rng.choice([0, 20])),
        energy_debt_j=float(rng.choice([0, 3])), accuracy_debt=float(rng.choice([0, 1])),
    )  # fmt: skip
    coded = {"codec": "int8", "accuracy": LOSSES} if seed % 3 == 0 else {}
    return ClusterState(arch=arch, topology=where, context_tokens=20, queues=queues, **coded)  # type: ignore[arg-type]


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to give at least one of `total` pieces to each of `parts`."""
    for bars in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *bars, total)))


def brute_force(state: ClusterState, prices: Prices, blocks: int) -> float:
    """Every embedding and every holding of every sub-block, each step priced as if all before it ended together."""
    space = Space(state, blocks=blocks)
    power = np.array([d.active_w - d.idle_w for d in state.topology.devices])
    radio = np.array([d.radio_w for d in state.topology.devices])
    coded = state.codec != "none" and state.accuracy is not None
    boundaries = len(space.kinds)

    def step(stage: int, before: int, after: int) -> float:
        kind, holding = space.kinds[stage], space.holdings[after]
        if not space.allowed(kind)[after]:
            return np.inf
        way = space.crossing_s(kind)[before, after].max(0) if stage else space.entry_s[before, after]
        air = space.radio_s("crossing")[before, after] if stage else space.radio_s("entry")[before, after]
        devices, (part,) = list(holding.devices), space.pieces(kind)
        ready = way[devices] + space.launch_s[devices]
        if holding.partitioned:
            ways = [np.array(c) for c in compositions(part.count, len(devices))]
        else:
            ways = [np.full(len(devices), part.count)]
        counts = min(ways, key=lambda c: max(ready + c * part.piece_s[devices]))
        work = counts * part.piece_s[devices] + space.launch_s[devices]
        joules = float(power[devices] @ work + air @ radio)
        loss = 0.0
        if coded and state.accuracy is not None:
            whole, partial = state.accuracy.boundary_loss(state.codec, stage / boundaries, boundaries - 1)
            if stage and space.crosses[before, after]:
                loss = partial if space.holdings[before].partitioned else whole
        seconds = float(max(ready + counts * part.piece_s[devices]))
        return prices.per_second * seconds + prices.per_joule * joules + prices.per_loss * loss

    size = len(space.holdings)
    steps = [
        np.array([[step(k, b, a) for a in range(size)] for b in range(size if k else len(space.tables))])
        for k in range(len(space.kinds))
    ]
    best = np.inf
    for e in space.embeddings:
        for path in itertools.product(range(size), repeat=len(space.kinds)):
            cost = steps[0][e, path[0]] + sum(steps[k][path[k - 1], path[k]] for k in range(1, len(path)))
            last = list(space.holdings[path[-1]].devices)
            back = float(space.exit_s[path[-1], last, e].max())
            cost += prices.per_second * back + prices.per_joule * float(space.radio_s("exit")[path[-1], e] @ radio)
            best = min(best, cost)
    return float(best)


def test_it_equals_brute_force_over_all_holdings_on_60_slots() -> None:
    for seed in range(60):
        state = random_state(seed)
        prices = DriftPlusPenalty(0.5 * (seed % 4)).prices(state)
        chosen = Additive(Space(state, blocks=6), prices).best()
        assert chosen.cost == pytest.approx(brute_force(state, prices, 6), rel=1e-9), f"slot {seed}"


def test_its_cost_is_the_true_one_for_whole_sub_blocks_and_never_below_it() -> None:
    whole = 0
    for seed in range(60):
        state = random_state(seed)
        prices = DriftPlusPenalty(1.0).prices(state)
        space = Space(state)
        chosen = Additive(space, prices).best()
        true = cost_of(space.placement(chosen.path, chosen.embedding), state, prices)
        assert true <= chosen.cost * (1 + 1e-9)
        if all(len(space.holdings[h].devices) == 1 for h, _ in chosen.path):
            whole += 1
            assert true == pytest.approx(chosen.cost, rel=1e-9), f"slot {seed}"
    assert whole >= 15


def test_a_deep_model_costs_what_its_steps_add_up_to() -> None:
    """The program extrapolates once all values rise alike; a copy that walks every step must agree."""
    for seed in range(12):
        state = replace(random_state(seed), codec="none")
        state = replace(state, arch=replace(state.arch, num_layers=24))
        program = Additive(Space(state), DriftPlusPenalty(0.5).prices(state))
        value = program._stages[0].cost.copy()
        value[[e for e in range(len(value)) if e not in program.space.embeddings]] = np.inf
        for stage in program._stages[1:]:
            value = (value[:, :, None] + stage.cost).min(1)
        assert program.best().cost == pytest.approx(float((value + program.exit.T).min()), rel=1e-9)
        assert program.best().seconds < MISSING_S / 2


def energy_j(state: ClusterState, planner: DriftPlusPenalty) -> float:
    step = CostModel(state.arch, state.topology).decode(planner.propose(state), context_tokens=state.context_tokens)
    return float(step.energy_j(state.topology).sum())


def test_energy_debt_moves_the_work_to_the_frugal_device() -> None:
    state = ClusterState(arch=ARCH, topology=pair(), context_tokens=20)
    at_first = DriftPlusPenalty().propose(state)
    assert all(FAST in layer.ffn.devices for layer in at_first.layers)
    debts = [0.0, 1.0, 10.0, 100.0, 1e4]
    spent = [energy_j(replace(state, queues=QueueState(energy_debt_j=z)), DriftPlusPenalty()) for z in debts]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] < spent[0] / 2
    indebted = DriftPlusPenalty().propose(replace(state, queues=QueueState(energy_debt_j=1e4)))
    assert {d for layer in indebted.layers for d in (*layer.attention.devices, *layer.ffn.devices)} == {FRUGAL}


def test_v_trades_delay_for_energy_and_a_backlog_trades_it_back() -> None:
    state = ClusterState(arch=ARCH, topology=pair(), context_tokens=20)
    spent = [energy_j(state, DriftPlusPenalty(v)) for v in (0.0, 1.0, 10.0, 1e3)]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] < spent[0] / 2
    waiting = replace(state, queues=QueueState(backlog_tokens=1e6))
    assert energy_j(waiting, DriftPlusPenalty(10.0)) > energy_j(state, DriftPlusPenalty(10.0))
    burst = replace(state, queues=QueueState(arrived_tokens=1e6))  # an empty queue, but this slot brings a burst
    assert energy_j(burst, DriftPlusPenalty(10.0)) > energy_j(state, DriftPlusPenalty(10.0))


def test_accuracy_debt_makes_fewer_lossy_crossings() -> None:
    state = ClusterState(
        arch=ARCH, topology=pair(speed=1.0, power_w=1.0), context_tokens=20, codec="int8", accuracy=LOSSES
    )
    crossings, losses = [], []
    for debt in (0.0, 0.01, 0.1, 1.0, 100.0):
        placement = DriftPlusPenalty().propose(replace(state, queues=QueueState(accuracy_debt=debt)))
        route = compile_route(placement, ARCH, state.topology, codec="int8")
        coded = [b for b in route.boundaries if 0 < b.after < len(route.sub_blocks) - 1 and b.messages]
        crossings.append(len(coded))
        losses.append(LOSSES.route_loss(route))
    assert crossings == sorted(crossings, reverse=True)
    assert losses == sorted(losses, reverse=True)
    assert crossings[0] >= 4
    assert crossings[-1] == 0


def test_over_a_noisy_channel_the_surrogates_word_makes_fewer_crossings() -> None:
    rises = []
    for loss in (0.05, 0.1, 0.3):
        told = SurrogateAccuracy(surrogate=shipped_surrogate(), model="tiny", channel=NoisyChannel(loss=loss))
        state = ClusterState(arch=ARCH, topology=pair(speed=1.0, power_w=1.0), context_tokens=20, accuracy=told)
        crossings = []
        for debt in (0.0, 0.1, 1.0, 100.0):
            placement = DriftPlusPenalty().propose(replace(state, queues=QueueState(accuracy_debt=debt)))
            route = compile_route(placement, ARCH, state.topology)
            crossings.append(sum(bool(b.messages) for b in route.boundaries[1:-2]))
            if debt == 0:
                rises.append(told.route_loss(route))
            elif debt == 100.0:
                assert told.route_loss(route) == 0
        assert crossings == sorted(crossings, reverse=True) and crossings[0] > crossings[-1] == 0
    assert rises[-1] > rises[0] > 0


def test_where_memory_binds_it_fits_and_is_no_slower_than_a_cut() -> None:
    where = pair()
    total = ARCH.weight_bytes(ARCH.num_params)
    devices = tuple(replace(d, memory_bytes=0.7 * total) for d in where.devices)
    state = ClusterState(arch=ARCH, topology=replace(where, devices=devices), context_tokens=20)
    cost = CostModel(ARCH, state.topology)
    ours = cost.tpot_s(make_planner("drift_plus_penalty").propose(state), context_tokens=20)
    assert ours <= cost.tpot_s(make_planner("layer_cut").propose(state), context_tokens=20) * (1 + 1e-9)


@pytest.mark.parametrize(("cloud", "link"), [("a100-80gb", "lte"), ("jetson-orin-nx-16gb", "gigabit-lan")])
def test_a_decision_at_32_layers_and_two_devices_is_quick(cloud: str, link: str) -> None:
    where = parse_topology(
        {
            "devices": [
                {"id": "a", "tier": "edge", "catalog": "jetson-orin-nx-16gb"},
                {"id": "b", "tier": "cloud", "catalog": cloud},
            ],
            "links": [{"between": ["a", "b"], "catalog": link}],
        }
    )
    state = ClusterState(arch=architecture("llama-7b"), topology=where, context_tokens=512)
    planner, taken = DriftPlusPenalty(), []
    for k in range(60):  # the link's rate differs in every slot, so nothing can be remembered
        links = tuple(replace(x, bandwidth_bytes_per_s=x.bandwidth_bytes_per_s * (1 + k / 60)) for x in where.links)
        slot = replace(state, topology=replace(where, links=links), queues=QueueState(backlog_tokens=10.0 * k))
        started = time.perf_counter()
        planner.propose(slot)
        taken.append(time.perf_counter() - started)
    print(
        f"32 layers, two devices over {link}: {np.median(taken) * 1e3:.2f} ms a decision, best {min(taken) * 1e3:.2f}"
    )
    assert min(taken) < 0.05  # 0.8 ms on an idle core; the figure is printed


def lyapunov(queues: QueueState, *, energy_weight: float = 1.0, accuracy_weight: float = 1.0) -> float:
    """Half the weighted sum of squares of the queues (2.15)."""
    return 0.5 * (
        queues.backlog_tokens**2 + energy_weight * queues.energy_debt_j**2 + accuracy_weight * queues.accuracy_debt**2
    )


def drift_bound(
    queues: QueueState,
    outcome: SlotOutcome,
    budgets: Budgets,
    *,
    slot_s: float,
    energy_weight: float = 1.0,
    accuracy_weight: float = 1.0,
) -> float:
    """What the Lyapunov function can rise by in a slot with this outcome, at most (2.17).

    `max(q - s, 0) + a` squared is at most `q^2 + s^2 + a^2 + 2 q (a - s)`; the virtual queues likewise, where there is
    a budget. With the extremes of outcomes in place of the squares this is the constant B0 of (2.17).
    """
    a, s = outcome.arrived_tokens, outcome.served_tokens
    bound = 0.5 * (a * a + s * s) + queues.backlog_tokens * (a - s)
    for weight, debt, spent, allowed in (
        (energy_weight, queues.energy_debt_j, outcome.energy_j, budgets.power_w * slot_s),
        (accuracy_weight, queues.accuracy_debt, outcome.accuracy_loss, budgets.accuracy_loss),
    ):
        if allowed < float("inf"):
            over = spent - allowed
            bound += weight * (0.5 * over * over + debt * over)
    return bound


def test_no_sampled_drift_exceeds_its_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5000):
        queues = QueueState(
            backlog_tokens=float(rng.exponential(50)), arrived_tokens=0.0,
            energy_debt_j=float(rng.exponential(20)), accuracy_debt=float(rng.exponential(2)),
        )  # fmt: skip
        outcome = SlotOutcome(
            arrived_tokens=float(rng.poisson(20)), served_tokens=float(rng.uniform(0, 100)),
            energy_j=float(rng.exponential(10)), accuracy_loss=float(rng.exponential(0.3)),
        )  # fmt: skip
        budgets = Budgets(power_w=float(rng.choice([5.0, np.inf])), accuracy_loss=float(rng.choice([0.2, np.inf])))
        weights = {"energy_weight": float(rng.uniform(0, 3)), "accuracy_weight": float(rng.uniform(0, 3))}
        # Without a budget there is no debt either: its queue has been held at 0.
        queues = replace(
            queues,
            energy_debt_j=queues.energy_debt_j if np.isfinite(budgets.power_w) else 0.0,
            accuracy_debt=queues.accuracy_debt if np.isfinite(budgets.accuracy_loss) else 0.0,
        )
        after = advance(queues, outcome, budgets, slot_s=2.0)
        drift = lyapunov(after, **weights) - lyapunov(queues, **weights)
        assert drift <= drift_bound(queues, outcome, budgets, slot_s=2.0, **weights) + 1e-9


def test_virtual_queues_hold_time_averages_to_feasible_budgets() -> None:
    state = ClusterState(
        arch=ARCH, topology=pair(speed=1.5, power_w=6.0), context_tokens=20, codec="int8", accuracy=LOSSES
    )
    cost = CostModel(ARCH, state.topology, codec="int8")

    def slot(queues: QueueState, tokens: float) -> SlotOutcome:
        placement = DriftPlusPenalty().propose(replace(state, queues=queues))
        step = cost.decode(placement, context_tokens=20)
        served = min(queues.backlog_tokens, state.slot_s / float(step.cycle_s[0]))
        idle_w = sum(d.idle_w for d in state.topology.devices)
        active_j = float(step.energy_j(state.topology).sum()) - idle_w * float(step.cycle_s[0])
        return SlotOutcome(
            arrived_tokens=tokens, served_tokens=served, energy_j=idle_w * state.slot_s + served * active_j,
            accuracy_loss=LOSSES.route_loss(compile_route(placement, ARCH, state.topology, codec="int8")),
        )  # fmt: skip

    backlog = QueueState(backlog_tokens=1e9)  # never idle
    greedy, frugal = slot(backlog, 0), slot(replace(backlog, energy_debt_j=1e15, accuracy_debt=1e15), 0)
    assert greedy.energy_j > frugal.energy_j
    assert greedy.accuracy_loss > frugal.accuracy_loss == 0
    rate = 0.6 * frugal.served_tokens  # so that both budgets and all requests can be met
    budgets = Budgets(power_w=1.02 * frugal.energy_j, accuracy_loss=0.2 * greedy.accuracy_loss)
    rng, queues, seen = np.random.default_rng(0), QueueState(), []
    slots = 1500
    for _ in range(slots):
        outcome = slot(queues, float(rng.poisson(rate)))
        queues = advance(queues, outcome, budgets, slot_s=state.slot_s)
        seen.append((outcome.energy_j, outcome.accuracy_loss, queues.backlog_tokens))
    energy_j, loss, waiting = np.array(seen).T
    later = slice(slots // 2, None)  # the debts have found the levels that hold the budgets
    print(f"mean power {energy_j.mean():.3f} of {budgets.power_w:.3f} W; {waiting.mean():.0f} tokens wait")
    print(f"loss {loss.mean():.4f}, in the later half {loss[later].mean():.4f}, of {budgets.accuracy_loss:.4f}")
    # What is above the budget on average is what the virtual queue still holds, over the slots (Neely 2010, 4.4).
    assert energy_j.mean() <= budgets.power_w + queues.energy_debt_j / slots + 1e-9
    assert loss.mean() <= budgets.accuracy_loss + queues.accuracy_debt / slots + 1e-9
    assert energy_j[later].mean() <= 1.02 * budgets.power_w
    assert loss[later].mean() <= 1.05 * budgets.accuracy_loss
    assert waiting[later].mean() <= 3 * rate
