"""`splitray bench --suite faults`: faults on purpose, half of all heads that move, and what checkpoints cost.

Real figures of this machine: threads for the many trials, processes killed by SIGKILL for the times.
"""

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitray.migration import delay_s, diff, moved_bytes
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.profiling.faults import FaultRun, trials
from splitray.profiling.machine import machine
from splitray.profiling.random_llama import RandomLlama
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import ProcessFleet, ThreadFleet
from splitray.runtime.launch import launch_engine, read_model
from splitray.runtime.sampling import Sampling
from splitray.runtime.timing import echo
from splitray.scratch import scratch_folder
from splitray.topology import Topology
from splitray.unfinished import Unfinished

Say = Callable[[str], None]
_TRIALS, _KILLS, _ROUNDS = 500, 6, 6
_CONTEXT = 512
_PROMPT = [5 + i % 90 for i in range(12)]


def faults(model: RandomLlama, *, say: Say, count: int = _TRIALS, done: Unfinished | None = None) -> dict[str, Any]:
    """The whole suite; its keys stand in benchmarks/README.md. What is `done` is not done again."""
    result: dict[str, Any] = {"suite": "faults", "machine": machine()}
    done = done or Unfinished()

    def told(what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        say(what)
        return done.of(what, work)

    with scratch_folder() as folder:
        store = folder / "store"
        result |= told("faults in threads", lambda: _in_threads(store, count))
        result["killed_processes"] = told("killed processes", lambda: _killed("tiny", store))
        result["standing_by"] = told("killed processes, others standing by", lambda: _standing_by("tiny"))
        path = model.write(folder)
        result["migration"] = told("half of all heads move", lambda: _migration(path))
        result["checkpoint_cost"] = told("checkpoints", lambda: _checkpoint_cost(path, store))
    return result


def _in_threads(store: Path, count: int) -> dict[str, Any]:
    runs: list[FaultRun] = []
    for url, part in ((None, count - count // 2), (str(store), count // 2)):
        fleet = ThreadFleet()
        recovery = Recovery(store=url, every_tokens=8 if url else None)
        with launch_engine(model="tiny", devices=3, planner="random", fleet=fleet, recovery=recovery) as engine:
            runs.append(trials(engine, fleet, prompt=_PROMPT, sampling=Sampling(max_new_tokens=24), count=part))
    seconds = [t.recovery_s for r in runs for t in r.struck]
    return {
        "trials": sum(len(r.trials) for r in runs),
        "struck": len(seconds),
        "identical": sum(r.identical for r in runs),
        "hangs": sum(r.hangs for r in runs),
        "leaks": sum(r.leaks for r in runs),
        "recovery_s": _spread(seconds),
    }


def _killed(model: str, store: Path) -> dict[str, Any]:
    """Processes of one node that are started anew: the start of a process and the rest apart."""
    fleet, rng, sampling = ProcessFleet(), random.Random(0), Sampling(max_new_tokens=120)
    recovery = Recovery(store=str(store), every_tokens=16, restarts=_KILLS)
    identical, gaps = 0, []
    with launch_engine(model=model, devices=2, fleet=fleet, recovery=recovery) as engine:
        wanted = list(engine.stream(_PROMPT, sampling))
        for _ in range(_KILLS):
            device, at = str(rng.choice(engine.route.devices)), rng.randrange(5, 100)
            got, gap = _run(engine, sampling, at, lambda d=device: os.kill(fleet.pid(d), signal.SIGKILL))  # type: ignore[misc]
            identical += got == wanted
            gaps.append(gap)
        found = engine.faults
    return {
        "trials": _KILLS,
        "identical": identical,
        "gap_s": _spread(gaps),
        "restart_s": _spread([f.restart_s for f in found]),
        "beyond_restart_s": _spread([g - f.restart_s for g, f in zip(gaps, found, strict=False)]),
        "replayed": _spread([float(f.replayed) for f in found]),
    }


def _standing_by(model: str) -> dict[str, Any]:
    """Attention on both devices and the FFN on the edge's side ready on the other: nothing is read or computed anew."""
    gaps, steps, identical = [], [], 0
    sampling = Sampling(max_new_tokens=120)
    for _ in range(_KILLS // 2):
        fleet, topology = ProcessFleet(), Topology.uniform(2)
        a, b = topology.ids
        arch, _, _ = read_model(model)
        half = arch.ffn_dim // 2
        columns = Shares.of({a: [(0, half)], b: [(half, arch.ffn_dim)]})
        layer = LayerPlacement(Shares.whole(arch.num_kv_heads, a, b), columns)
        placement = Placement((layer,) * arch.num_layers, (b,), Shares.whole(arch.vocab, b))

        def alone(where: Topology, context: int) -> Placement:
            state = ClusterState(arch=arch, topology=where, context_tokens=context)  # noqa: B023 - used in this round
            return make_planner("best_device").propose(state)

        options: dict[str, Any] = {"topology": topology, "placement": placement, "fleet": fleet}
        recovery = Recovery(replan=alone, stand_by=(a,), fail_back=False)
        with launch_engine(model=model, recovery=recovery, **options) as engine:
            wanted = list(engine.stream(_PROMPT, sampling))
            assert engine.report is not None and engine.report.tpot_s is not None, "it ran"
            tpot_s = engine.report.tpot_s
            got, gap = _run(engine, sampling, 60, lambda: os.kill(fleet.pid(a), signal.SIGKILL))  # noqa: B023
            identical += got == wanted
            gaps.append(gap)
            steps.append(gap / tpot_s)
    return {"trials": len(gaps), "identical": identical, "gap_s": _spread(gaps), "gap_steps": _spread(steps)}


def _run(engine: Engine, sampling: Sampling, at: int, strike: Callable[[], None]) -> tuple[list[int], float]:
    """Tokens of a run in which something happens after some of them, and the longest wait for one from then on."""
    got: list[int] = []
    last, gap = time.perf_counter(), 0.0
    for token in engine.stream(_PROMPT, sampling):
        now = time.perf_counter()
        gap = max(gap, now - last) if len(got) >= at else 0.0
        last = now
        got.append(token)
        if len(got) == at:
            strike()
    return got, gap


def _migration(path: Path) -> dict[str, Any]:
    """Half of all KV head groups go to the other device at a context of 512 tokens, and back again."""
    topology = Topology.uniform(2)
    a, b = (str(i) for i in topology.ids)
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"planner": "even", "fleet": ProcessFleet(), "recovery": Recovery()}
    with launch_engine(model=path, topology=topology, **options) as engine:
        arch = engine.arch
        near, far = engine.placement, _gathered(engine.placement, arch.num_kv_heads, a)
        prompt = [5 + i % 300 for i in range(_CONTEXT)]
        size = 1 << 22
        rate = 2 * size / statistics.median(echo(engine, a, b, size=size, rounds=20))
        for _ in range(_ROUNDS):
            before = engine.placement
            after = far if before == near else near
            times, moves, stop = [], [], 0
            for _ in engine.stream(prompt, Sampling(max_new_tokens=120)):
                times.append(time.perf_counter())
                if len(times) == 10:
                    moves.append(engine.migrate(after))
                if moves and moves[0].done.is_set() and not stop:
                    stop = len(times)
            move = moves[0]
            assert move.done.wait(60) and move.error is None, f"a move without a fault ends: {move.error}"
            if not stop:  # it came after the last token: there is no gap to measure
                continue
            gaps = [y - x for x, y in zip(times[1:], times[2:], strict=False)]
            usual = statistics.median(gaps)
            around = gaps[max(0, stop - 4) : stop + 2]
            each = moved_bytes(diff(before, after, arch, 1), staged=True)
            total = move.staged_bytes + move.tail_bytes
            free = tuple(replace(x, bandwidth_bytes_per_s=rate, rtt_s=0.0) for x in topology.links)
            positions = total // each if each else 0
            predicted = delay_s(diff(before, after, arch, positions), replace(topology, links=free), staged=True)
            rows.append({
                "extra_steps": max(around) / usual - 1, "bytes": total, "tail_bytes": move.tail_bytes,
                "bytes_error": total - each * positions if each else total, "stage_s": move.stage_s,
                "copy_s": move.copy_s, "pause_s": move.pause_s, "predicted_copy_s": predicted,
                "delay_error": abs(predicted / move.copy_s - 1) if move.copy_s else None,
            })  # fmt: skip
    errors = [r["delay_error"] for r in rows if r["delay_error"] is not None]
    return {
        "rounds": len(rows),
        "extra_steps": _spread([r["extra_steps"] for r in rows]),
        "bytes_error": max((abs(r["bytes_error"]) for r in rows), default=None),
        "delay_error_median": statistics.median(errors) if errors else None,
        "rows": rows,
    }


def _gathered(placement: Placement, groups: int, device: str) -> Placement:
    """The same with the attention of every layer on one device."""
    held = Shares.of({device: [(0, groups)]})
    return replace(placement, layers=tuple(replace(x, attention=held) for x in placement.layers))


def _checkpoint_cost(path: Path, store: Path) -> dict[str, Any]:
    """Tokens a second without and with checkpoints at Young's period and at a fixed one, turn by turn."""
    speeds: dict[str, list[float]] = {"none": [], "young": [], "every_16": []}
    url = str(store)
    settings = {"none": Recovery(), "young": Recovery(store=url), "every_16": Recovery(store=url, every_tokens=16)}
    sampling = Sampling(max_new_tokens=200)
    with launch_engine(model=path, devices=2, fleet=ProcessFleet(), recovery=Recovery()) as engine:
        list(engine.stream(_PROMPT, Sampling(max_new_tokens=20)))
        for _ in range(_ROUNDS):
            for name, recovery in settings.items():
                engine.members.recovery = recovery
                list(engine.stream(_PROMPT, sampling))
                assert engine.report is not None and engine.report.tpot_s is not None, "it ran"
                speeds[name].append(1 / engine.report.tpot_s)
    usual = statistics.median(speeds["none"])
    return {
        "tokens_per_s": {k: statistics.median(v) for k, v in speeds.items()},
        "lost_share": {k: 1 - statistics.median(v) / usual for k, v in speeds.items() if k != "none"},
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    if not ordered:
        return {"median": None, "p95": None, "max": None}
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"median": statistics.median(ordered), "p95": p95, "max": ordered[-1]}
