"""Planners over bandwidth as it was recorded on buses, trains and lines, where the recordings lie beside the project.

The project ships none of them (`SPLITRAY_TRACES` names their folder, `../shared/data/traces` is looked at); without
them the same is asserted over drawn traces, so that nothing is left out silently.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from splitray.catalog import architecture
from splitray.evaluate.traces import edge_and_cloud
from splitray.sim.arena import Case, run
from splitray.sim.network import arrivals, links_varied
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import Scenario, edge_cloud_links
from splitray.sim.service import service_s

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("SPLITRAY_TRACES", ROOT.parent / "shared" / "data" / "traces"))
SLOTS, NUM_TRACES, REQUESTS = 100, 8, 25


def traces() -> list[str]:
    files = sorted(str(p) for p in FOLDER.rglob("*") if p.is_file() and ("norway" in p.name or "trace_" in p.name))
    if not files:
        print(f"no recordings in {FOLDER}: drawn traces instead")
        return [f"log_ar1:{0.2 + 0.1 * i}" for i in range(NUM_TRACES)]
    chosen = files[:: max(1, len(files) // NUM_TRACES)][:NUM_TRACES]
    print(f"{len(chosen)} of {len(files)} recordings in {FOLDER.name}")
    return chosen


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], list[tuple[Outcome, ...]]]:
    """For each edge and privacy setting, outcomes of the planners by trace."""
    names = ("drift_plus_penalty", "layer_dp", "cloud_only", "cloud_only_rtt", "layer_cut")
    found = {}
    for edge in ("jetson-orin-nx-16gb", "galaxy-s23"):
        for holds in ("none", "embedding_and_head"):
            arch, where = architecture("gpt2-xl"), edge_and_cloud(edge, holds)
            rate = 0.4 / service_s(arch, where, "static_cut")
            slot_s = max(1.0, REQUESTS / (rate * SLOTS))
            line = arrivals(None, SLOTS * slot_s, rate, np.random.default_rng(1))
            assert len(line) >= 20, "a mean of few requests says nothing"
            cases = []
            for i, spec in enumerate(traces()):
                rng, pairs = np.random.default_rng(i), edge_cloud_links(where)
                rates = links_varied(spec, where, pairs, SLOTS, slot_s, rng, what="bandwidth", repeat=True)
                scenario = Scenario(
                    name=spec, arch=arch, topology=where, requests=line, num_slots=SLOTS, slot_s=slot_s,
                    bandwidth_bytes_per_s=rates,
                )  # fmt: skip
                cases += [Case(planner=n, scenario=scenario, every=2) for n in names]
            every = run(cases)
            found[edge, holds] = [tuple(every[i : i + len(names)]) for i in range(0, len(every), len(names))]
    return found


def test_drift_plus_penalty_seldom_loses_to_edgeshards_program(outcomes) -> None:  # type: ignore[no-untyped-def]
    for holds in ("none", "embedding_and_head"):
        runs = [o for (_, pins), found in outcomes.items() if pins == holds for o in found]
        ratios = np.array([o[0].latency_s.mean() / o[1].latency_s.mean() for o in runs])
        lost = np.mean(ratios > 1 + 1e-6)
        print(f"origin holds {holds}: drift_plus_penalty loses to layer_dp in {lost:.0%} of {len(ratios)} runs, "
              f"worst {ratios.max():.3f}, geometric mean {np.exp(np.log(ratios).mean()):.3f}")  # fmt: skip
        assert lost <= 0.20


def test_nobody_beats_the_streamed_cloud_where_nothing_is_pinned(outcomes) -> None:  # type: ignore[no-untyped-def]
    """And with both ends on the origin the two cloud variants are one and the same."""
    for (edge, holds), runs in outcomes.items():
        for ours, _, cloud, cloud_rtt, _ in runs:
            if holds == "none":
                assert ours.latency_s.mean() <= cloud.latency_s.mean() * (1 + 1e-6), edge
                assert cloud.latency_s.mean() < cloud_rtt.latency_s.mean()
            else:
                assert cloud.latency_s.mean() == pytest.approx(cloud_rtt.latency_s.mean())


def test_where_the_origin_holds_both_ends_the_choice_follows_the_bandwidth(outcomes) -> None:  # type: ignore[no-untyped-def]
    runs = outcomes["jetson-orin-nx-16gb", "embedding_and_head"]
    ratios = np.array([o[0].latency_s.mean() / o[2].latency_s.mean() for o in runs])
    print(f"drift_plus_penalty over cloud_only, both ends on the origin: {np.round(ratios, 2).tolist()}")
    assert ratios.max() <= 1.05, "a move may turn out to have been for nothing, but not by much"
    assert ratios.min() < 0.9 or not FOLDER.exists(), "drawn traces around LTE's own rate leave less to gain"
