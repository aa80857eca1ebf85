"""Devices killed by SIGKILL while they generate: processes of this machine, and actors on real node processes."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import psutil
import pytest
import ray
from conformance import PROMPT, eventually, expected, small_model
from ray_nodes import RayNodes

from actors.fleet import RayFleet
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import Fleet, ProcessFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling

NEW_TOKENS = 400


def killed(fleet: Any, model, folder, tmp_path, *, kills: int, recovery: Recovery) -> list[Any]:
    """Runs in each of which a device is killed; the faults as they were met."""
    wanted, rng, sampling = (
        expected(model, max_new_tokens=NEW_TOKENS),
        random.Random(0),
        Sampling(max_new_tokens=NEW_TOKENS),
    )
    with launch_engine(model=folder, devices=3, planner="even", fleet=fleet, recovery=recovery) as engine:
        for n in range(kills):
            victim, at, got = rng.choice(engine.topology.ids), rng.randrange(1, NEW_TOKENS // 2), []
            for token in engine.stream(PROMPT, sampling):
                got.append(token)
                if len(got) == at:
                    os.kill(fleet.pid(victim), signal.SIGKILL)
            assert got == wanted, f"kill {n}: {victim} at token {at}"
        return engine.faults


@pytest.mark.usefixtures("forked_devices")
@pytest.mark.full  # make test has such a kill in tests/unit/test_clocks.py and tests/unit/test_cli.py
def test_processes_killed_by_sigkill_come_back_and_no_token_changes(tmp_path) -> None:
    folder = tmp_path / "model"
    model = small_model(folder)
    before = set(psutil.Process().children(recursive=True))
    recovery = Recovery(store=str(tmp_path / "kv"), every_tokens=32, restarts=99)
    faults = killed(ProcessFleet(), model, folder, tmp_path, kills=3, recovery=recovery)
    assert faults and all(f.restarted for f in faults)
    beyond = [f.recovery_s - f.restart_s for f in faults]
    print(f"started anew in {[round(f.restart_s, 2) for f in faults]} s, and {[round(s, 2) for s in beyond]} s beyond")
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(28, marks=pytest.mark.full)])
def test_thirty_actors_killed_by_sigkill_change_no_token(nodes: RayNodes, tmp_path, kills: int) -> None:
    folder = tmp_path / "model"
    model = small_model(folder)
    fleet: Fleet = RayFleet()
    started = time.monotonic()
    recovery = Recovery(store=str(tmp_path / "kv"), every_tokens=32, restarts=99)
    faults = killed(fleet, model, folder, tmp_path, kills=kills, recovery=recovery)
    assert len(faults) >= (0.8 * kills if kills > 5 else 1), "the others died behind the last token"
    beyond = sorted(f.recovery_s - f.restart_s for f in faults)
    took_s, middle_s = time.monotonic() - started, beyond[len(beyond) // 2]
    print(f"{len(faults)} faults, {took_s:.0f} s; beyond an actor's start {middle_s:.2f} s")
    assert eventually(lambda: not fleet.dead())


def living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_raylet_leaves_its_device_out_within_ten_seconds(nodes: RayNodes) -> None:
    before, sampling, prompt = living_nodes(), Sampling(max_new_tokens=160), list(range(5, 25))
    node = psutil.Process(nodes.add({"edge0": 1}))  # a device whose own id is a resource sits nowhere else
    recovery = Recovery(replan="best_device", fail_back=False)
    with launch_engine(model="tiny", devices=2, fleet=RayFleet(), recovery=recovery) as engine:
        wanted, got, gap_s, last = list(engine.stream(prompt, sampling)), [], 0.0, time.perf_counter()
        family = node.children(recursive=True)  # found now: to look takes longer than many tokens
        family.sort(key=lambda p: p.name() != "raylet")  # its workers end with it, a little later
        assert family[0].name() == "raylet"
        for token in engine.stream(prompt, sampling):
            gap_s, last = max(gap_s, time.perf_counter() - last), time.perf_counter()
            got.append(token)
            if len(got) == 20:
                for process in family:
                    process.kill()
        assert got == wanted and engine.faults[0].left_out == ("edge0",)
    print(f"the longest wait for a token: {gap_s:.2f} s")
    assert gap_s < 10
    assert eventually(lambda: living_nodes() == before, within_s=60), "no test behind this one sees the dead node"
