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

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("SPLITRAY_TRACES", ROOT.parent / "shared" / "data" / "traces"))
SLOTS, NUM_TRACES = 60, 8


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
    for edge in ("jetson-orin-nx-16gb", "raspberry-pi-5"):
        for holds in ("none", "embedding_and_head"):
            arch, where = architecture("gpt2-xl"), edge_and_cloud(edge, holds)
            line = arrivals("poisson:0.08", SLOTS, 1.0, np.random.default_rng(1))
            cases = []
            for i, spec in enumerate(traces()):
                rates = links_varied(
                    spec, where, edge_cloud_links(where), SLOTS, 1.0, np.random.default_rng(i), what="bandwidth"
                )
                scenario = Scenario(
                    name=spec, arch=arch, topology=where, requests=line, num_slots=SLOTS, bandwidth_bytes_per_s=rates
                )
                cases += [Case(planner=n, scenario=scenario, every=4) for n in names]
            every = run(cases)
            found[edge, holds] = [tuple(every[i : i + len(names)]) for i in range(0, len(every), len(names))]
    return found


def test_drift_plus_penalty_seldom_loses_to_edgeshards_program(outcomes) -> None:  # type: ignore[no-untyped-def]
    ratios = [o[0].latency_s.mean() / o[1].latency_s.mean() for runs in outcomes.values() for o in runs]
    lost = np.mean(np.array(ratios) > 1 + 1e-6)
    print(f"drift_plus_penalty loses to layer_dp in {lost:.0%} of {len(ratios)} runs, "
          f"worst {max(ratios):.3f}, geometric mean {np.exp(np.mean(np.log(ratios))):.3f}")  # fmt: skip
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
    assert ratios.max() <= 1.15, "a move may turn out to have been for nothing, but not by much"
    assert ratios.min() < 0.9 or not FOLDER.exists(), "drawn traces around LTE's own rate leave less to gain"
