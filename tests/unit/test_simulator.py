"""The virtual clock: against a scalar oracle, Little's law, energy, and what happens to a line that must wait."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.cost import CostModel, Load, Rates, load_of
from splitray.planners import ClusterState, make_planner
from splitray.sim.simulator import Simulator
from splitray.sim.workload import Requests, poisson
from splitray.topology import Device, DeviceId, Link, Topology

ARCH = ModelArch(
    name="small", num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16, hidden_dim=128, ffn_dim=256, vocab=512,
    context_tokens=256,
)  # fmt: skip


def pair(*, rtt_s: float = 1e-3, edge_rate: float = 1.0) -> Topology:
    """An edge and a cloud device on which a token of ARCH takes some tens of milliseconds."""
    kinds = (("edge", 5e7 * edge_rate, 1.0, 3.0), ("cloud", 1e8, 5.0, 40.0))
    devices = tuple(
        Device(
            id=DeviceId(tier), tier=tier, memory_bytes=1e9, compute_flops=1e12,  # type: ignore[arg-type]
            memory_bandwidth_bytes_per_s=rate, idle_w=idle, active_w=active, radio_w=0.5,
        )
        for tier, rate, idle, active in kinds
    )  # fmt: skip
    links = tuple(
        Link(source=a.id, target=b.id, bandwidth_bytes_per_s=1e6, rtt_s=rtt_s)
        for a in devices for b in devices if a is not b
    )  # fmt: skip
    return Topology(devices=devices, links=links, origin=devices[0].id)


def load(planner: str, where: Topology, seed: int = 0) -> Load:
    return load_of(make_planner(planner, seed=seed).propose(ClusterState(arch=ARCH, topology=where)), ARCH, where)


def requests(*rows: tuple[float, int, int]) -> Requests:
    arrival, prompt, output = zip(*rows, strict=True)
    return Requests(np.array(arrival, float), np.array(prompt), np.array(output))


def scalar_line(planner: str, where: Topology, line: Requests, slot_s: float, slots: int) -> list[tuple[float, float]]:
    """One line as a person would do it: first and last token of each request, priced anew at each slot."""
    cost = CostModel(ARCH, where)
    placement = make_planner(planner).propose(ClusterState(arch=ARCH, topology=where))
    now, slot, done, fill_left, i = 0.0, 0, 0.0, 1.0, 0
    first = float("nan")
    found: list[tuple[float, float]] = []

    def prices() -> tuple[float, float]:
        if i >= len(line):
            return 0.0, 0.0
        known = float(line.prompt_tokens[i] + done)
        return cost.tpot_s(placement, context_tokens=known), cost.ttft_s(placement, prompt_tokens=known)  # type: ignore[arg-type]

    tpot, fill = prices()
    while i < len(line) and slot < slots:
        end = (slot + 1) * slot_s
        now = max(now, float(line.arrival_s[i]))
        if now >= end:
            slot += 1
            tpot, fill = prices()
            continue
        step = min(fill_left * fill, end - now)
        now, fill_left = now + step, fill_left - (step / fill if step else 0)
        if fill_left > 1e-12:
            continue
        if done == 0:
            first, done = now, 1.0
        tokens = min(line.output_tokens[i] - done, (end - now) / tpot)
        now, done = now + tokens * tpot, done + tokens
        if line.output_tokens[i] - done <= 1e-9:
            found.append((first, now))
            i, done, fill_left = i + 1, 0.0, 1.0
            tpot, fill = prices()
    return found


@pytest.mark.parametrize("planner", ["edge_only", "cloud_only", "fixed_cut:1", "even"])
def test_a_line_equals_a_scalar_simulation(planner: str) -> None:
    where, rng = pair(), np.random.default_rng(7)
    line = poisson(0.5, 60.0, prompt_tokens=20, output_tokens=12, rng=rng)
    simulator = Simulator(where, [line], slot_s=0.5)
    for _ in range(400):
        simulator.step(load(planner, where), Rates.of(where))
    expected = scalar_line(planner, where, line, 0.5, 400)
    assert len(expected) == len(line)
    got = np.stack([simulator.first_token_s[0, : len(line)], simulator.finish_s[0, : len(line)]], axis=1)
    assert got == pytest.approx(np.array(expected), rel=1e-9)


def test_side_by_side_equals_one_by_one() -> None:
    where = pair()
    lines = [poisson(0.6, 40.0, prompt_tokens=20, output_tokens=8, rng=np.random.default_rng(i)) for i in range(6)]
    loads = [load("random", where, seed=i) for i in range(6)]
    together = Simulator(where, lines)
    energy = np.zeros(6)
    for _ in range(60):
        energy += together.step(Load.stack(loads), Rates.of(where)).energy_j.sum(1)
    for i, line in enumerate(lines):
        alone = Simulator(where, [line])
        spent = sum(float(alone.step(loads[i], Rates.of(where)).energy_j.sum()) for _ in range(60))
        assert together.finish_s[i, : len(line)] == pytest.approx(alone.finish_s[0, : len(line)], nan_ok=True)
        assert energy[i] == pytest.approx(spent)


@pytest.mark.full
def test_littles_law_holds_within_five_per_cent() -> None:
    """Requests in the system, counted at slot ends, are the rate times the mean time in the system."""
    where, n = pair(), 16
    lines = [poisson(1.5, 4000.0, prompt_tokens=20, output_tokens=16, rng=np.random.default_rng(i)) for i in range(n)]
    simulator = Simulator(where, lines)
    many = Load.stack([load("cloud_only", where)] * n)
    counts = []
    for _ in range(4300):
        simulator.step(many, Rates.of(where))
        counts.append(simulator.backlog_requests.copy())
    assert not simulator.backlog_requests.any(), "the lines end empty, so that every request counts in full"
    in_system = np.mean(counts) * 4300 / 4000
    sojourn = np.nanmean(simulator.finish_s - np.where(np.isfinite(simulator.arrival_s), simulator.arrival_s, np.nan))
    rate = sum(len(x) for x in lines) / (n * 4000)
    print(f"Little's law: {in_system:.4f} in the system, rate x time {rate * sojourn:.4f}")
    assert in_system == pytest.approx(rate * sojourn, rel=0.05)
    assert in_system > 0.8, "the system is not idle"


def test_tokens_and_energy_are_those_of_the_cost_model() -> None:
    where = pair()
    line = requests((0.0, 30, 21))
    simulator = Simulator(where, [line], slot_s=1000.0)
    slot = simulator.step(load("cloud_only", where), Rates.of(where))
    cost = CostModel(ARCH, where)
    placement = make_planner("cloud_only").propose(ClusterState(arch=ARCH, topology=where))
    ttft, tpot = cost.ttft_s(placement, prompt_tokens=30), cost.tpot_s(placement, context_tokens=30)
    assert simulator.first_token_s[0, 0] == pytest.approx(ttft)
    assert simulator.finish_s[0, 0] == pytest.approx(ttft + 20 * tpot)
    assert slot.served_tokens[0] == pytest.approx(21)
    token_j = cost.decode(placement, context_tokens=30).energy_j(where)[0]
    assert slot.energy_j[0, 0] > 20 * token_j[0], "the edge idles and sends the prompt"
    assert slot.energy_j[0, 1] == pytest.approx(20 * token_j[1], rel=0.2)


def test_an_outage_stops_what_needs_the_link_and_nothing_is_lost() -> None:
    where = pair()
    split, down = load("fixed_cut:1", where), Rates.of(where)
    down = replace(down, link_bytes_per_s=np.zeros_like(down.link_bytes_per_s))
    line = requests((0.0, 10, 400))
    simulator, free = Simulator(where, [line]), Simulator(where, [line])
    for t in range(60):
        simulator.step(split, down if 3 <= t < 8 else Rates.of(where))
        free.step(split, Rates.of(where))
    assert simulator.finish_s[0, 0] == pytest.approx(free.finish_s[0, 0] + 5, abs=0.2)


def test_a_prompt_waits_for_a_link_that_is_down() -> None:
    where = pair()
    cloud, down = load("cloud_only", where), Rates.of(where)
    down = replace(down, link_bytes_per_s=np.zeros_like(down.link_bytes_per_s))
    simulator = Simulator(where, [requests((0.5, 10, 5))])
    for t in range(6):
        simulator.step(cloud, down if t < 3 else Rates.of(where))
    assert 3.0 < simulator.first_token_s[0, 0] < 4.0


def test_tokens_reach_the_origin_only_while_it_can_be_reached() -> None:
    """The whole model on the cloud needs no link to go on, but its tokens do."""
    where = pair()
    cloud, down = load("cloud_only", where), Rates.of(where)
    down = replace(down, link_bytes_per_s=np.zeros_like(down.link_bytes_per_s))
    simulator = Simulator(where, [requests((0.0, 10, 100))])
    for t in range(12):
        simulator.step(cloud, down if 1 <= t < 6 else Rates.of(where))
    assert simulator.finish_s[0, 0] > 6.0


def test_each_prompt_in_a_slot_has_its_own_price() -> None:
    """A short one after a long one still takes the round trip; slots of any length agree."""
    where = pair(rtt_s=0.1)
    for first, second in ((200, 3), (3, 200)):
        line = requests((0.0, first, 2), (0.0, second, 2))
        found = []
        for slot_s in (2.0, 0.02):
            simulator = Simulator(where, [line], slot_s=slot_s)
            for _ in range(round(4 / slot_s)):
                simulator.step(load("cloud_only", where), Rates.of(where))
            found.append(simulator.first_token_s[0, 1] - simulator.finish_s[0, 0])
        assert min(found) >= 0.1
        assert found[0] == pytest.approx(found[1], rel=0.05)


def test_three_devices_outlive_an_outage() -> None:
    where = Topology.uniform(3)
    state = ClusterState(arch=ARCH, topology=where)
    placed = load_of(make_planner("even").propose(state), ARCH, where)
    down = Rates.of(where)
    down = replace(down, link_bytes_per_s=np.zeros_like(down.link_bytes_per_s))
    simulator = Simulator(where, [requests((0.0, 10, 50))])
    for t in range(10):
        simulator.step(placed, down if t < 4 else Rates.of(where))
    assert 4.0 < simulator.finish_s[0, 0] < 6.0


def test_a_pause_delays_by_itself_and_a_lost_cache_costs_a_prefill() -> None:
    where = pair()
    line, edge = requests((0.0, 100, 200)), load("edge_only", where)
    plain, paused, lost = (Simulator(where, [line]) for _ in range(3))
    for t in range(40):
        if t == 2:
            paused.pause(0, 1.5)
            lost.lose_cache(0)
        for each in (plain, paused, lost):
            each.step(edge, Rates.of(where))
    assert paused.finish_s[0, 0] == pytest.approx(plain.finish_s[0, 0] + 1.5, rel=0.01)
    assert plain.finish_s[0, 0] + 0.01 < lost.finish_s[0, 0]
    assert lost.first_token_s[0, 0] == plain.first_token_s[0, 0], "tokens that were said stay said"


def test_a_failed_request_leaves_the_line_to_the_next() -> None:
    where = pair()
    simulator = Simulator(where, [requests((0.0, 10, 10_000), (0.1, 10, 5))])
    edge = load("edge_only", where)
    simulator.step(edge, Rates.of(where))
    assert simulator.backlog_requests[0] == 2
    simulator.fail_head(0)
    simulator.step(edge, Rates.of(where))
    assert simulator.failed[0].tolist()[:2] == [True, False]
    assert np.isnan(simulator.finish_s[0, 0])
    assert np.isfinite(simulator.finish_s[0, 1])
    assert simulator.backlog_tokens[0] == 0


def test_a_slot_says_for_how_long_each_device_computes() -> None:
    where = pair()
    simulator = Simulator(where, [requests((0.0, 10, 500))])
    simulator.step(load("fixed_cut:1", where), Rates.of(where))  # the prompt and the first tokens
    context = round(simulator.context_tokens[0])
    slot = simulator.step(load("fixed_cut:1", where), Rates.of(where))
    edge, cloud = slot.busy_s[0]
    busy = CostModel(ARCH, where).decode(
        make_planner("fixed_cut:1").propose(ClusterState(arch=ARCH, topology=where)), context_tokens=context
    ).busy_s[0]  # fmt: skip
    assert edge / cloud == pytest.approx(busy[0] / busy[1], rel=0.01)
    assert edge == pytest.approx(slot.served_tokens[0] * busy[0], rel=0.01)
