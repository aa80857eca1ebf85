"""The suite `weights` of `splitray bench`: what a format of weights gives in time and in memory.

Random llamas, each format in two fresh processes of one thread: one device alone, every layer half and half, one cut.
What is aimed at stands beside what came of it, so that a miss is seen; the aims were set on a core with AVX-512 VNNI,
which multiplies whole numbers some twice as fast as one without it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from splitray.arch import ModelArch
from splitray.errors import InputError, did_you_mean
from splitray.placement import Placement, weight_bytes
from splitray.profiling.calibration import PROMPT, Model
from splitray.profiling.machine import machine
from splitray.profiling.named_placements import placements
from splitray.profiling.random_llama import BENCH_1B, BENCH_110M, BENCH_190M, RandomLlama
from splitray.runtime.device.busy import rss_anon_bytes
from splitray.runtime.engine.engine import Engine
from splitray.runtime.kept_fleet import KeptFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.scratch import scratch_folder
from splitray.topology import Topology
from splitray.unfinished import Unfinished
from splitray.weight_formats import FORMATS

MODELS = {m.name: m for m in (BENCH_110M, BENCH_190M, BENCH_1B)}
MEASURED = ("float32", "bfloat16", "int8", "int4", "int4/128")
_PLACED = ("one_device", "split_half", "layer_cut")
_NEW_TOKENS, _FIRST, _PREFILL_TOKENS = 24, 2, 512
_SAMPLED_S = 0.01
_SMALL_BYTES = 400e6 / 1.04e9  # of one of three small devices, for each weight of the model
_RESIDENT, _PEAK = (1.1, 350e6), (1.3, 500e6)  # times a device's share, and the process beside it
Row = dict[str, Any]
Say = Callable[[str], None]


def weights(
    names: Sequence[str] | None = None, *, say: Say = lambda _: None, done: Unfinished | None = None
) -> dict[str, Any]:
    """The whole suite, or some of its models; its keys stand in benchmarks/README.md. What is `done` is not done again.

    Raises:
        InputError: a name is none of a model of the suite.
    """
    for name in names or ():
        if name not in MODELS:
            remedy = f"correct the name{did_you_mean(name, MODELS)}"
            raise InputError("--models", expected=f"some of {', '.join(MODELS)}", actual=name, remedy=remedy)
    before, done, found = machine(), done or Unfinished(), dict[str, dict[str, Row]]()
    small: dict[str, Row] = {}
    for name in [n for n in MODELS if names is None or n in names]:
        with scratch_folder() as folder:
            kept = _Written(MODELS[name], folder, say)
            found[name] = {f: done.of(f"{name} {f}", partial(_format, kept, f, say)) for f in MEASURED}
            small[name] = done.of(f"{name} small", partial(_small_devices, kept, say))
    last = found[next(reversed(found))]
    return {"suite": "weights", "machine": before, "weights": last, "models": found, "small_devices": small,
            "aims": [a for name, rows in found.items() for a in aims(name, rows)]}  # fmt: skip


class _Written:
    """A model that is written when it is first asked for."""

    def __init__(self, recipe: RandomLlama, folder: Path, say: Say) -> None:
        self.recipe, self._folder, self._say = recipe, folder, say

    @property
    def path(self) -> Path:
        where = self._folder / self.recipe.name
        if where.is_dir():
            return where
        self._say(f"{self.recipe.name}: writing random weights")
        return self.recipe.write(self._folder)


def _format(kept: _Written, kind: str, say: Say) -> Row:
    """One format of one model: times of each placement, memory of the devices that were fresh."""
    topology, row, ids = Topology.uniform(2), Row(), list[list[int]]()
    with KeptFleet(topology.devices) as fleet:
        model = Model(kept.path, topology, fleet, weights=kind)
        chosen = placements(model.arch, topology)
        for name in _PLACED:
            say(f"{kept.recipe.name}, {kind}: {name}")
            devices = chosen[name].devices
            start = time.perf_counter()
            with _peaks(fleet, devices) as peaks, model.start(chosen[name]) as engine:
                loaded_s = time.perf_counter() - start
                stats = engine.stats()
                if name != "layer_cut":
                    device = devices[-1]  # the one that has held nothing yet
                    row[f"{name}_memory"] = _memory(
                        kept.recipe, model.arch, chosen[name], device, stats[device], peaks[device], loaded_s
                    )
                ids.append(_run(engine, name, row))
    halves, alone = row["split_half_memory"], row["one_device_memory"]
    return {
        **row,
        "rss_over_share": alone["rss_bytes"] / alone["share_bytes"],
        "split_half_over_one_device": row["one_device_tpot_ms"] / row["split_half_tpot_ms"],
        "layer_cut_over_one_device": row["one_device_tpot_ms"] / row["layer_cut_tpot_ms"],
        "prefill_split_over_one_device": row["split_half_prefill_tokens_per_s"] / row["prefill_tokens_per_s"],
        "read_over_slices": max(m["read_bytes"] / m["slices_bytes"] for m in (halves, alone)),
        "same_tokens": all(i == ids[0] for i in ids),
    }


def _run(engine: Engine, name: str, row: Row) -> list[int]:
    arrivals, ids = [], []
    for token in engine.stream(list(PROMPT), Sampling(max_new_tokens=_NEW_TOKENS)):
        arrivals.append(time.perf_counter())
        ids.append(token)
    assert engine.report is not None, "it ran"
    row[f"{name}_tpot_ms"] = statistics.median(np.diff(arrivals)[_FIRST:].tolist()) * 1e3
    row[f"{name}_cpu_ms_per_token"] = engine.report.decode_cpu_s / (_NEW_TOKENS - 1) * 1e3
    if name != "layer_cut":
        list(engine.stream([5 + i % 300 for i in range(_PREFILL_TOKENS)], Sampling(max_new_tokens=1)))
        key = "prefill_tokens_per_s" if name == "one_device" else f"{name}_prefill_tokens_per_s"
        row[key] = _PREFILL_TOKENS / engine.report.ttft_s
    return ids


def _memory(
    recipe: RandomLlama, arch: ModelArch, placement: Placement, device: str, stats: Row, peak: int, loaded_s: float
) -> Row:
    """What a device that had held nothing holds now, and what it took to get there."""
    stored = replace(arch, weights="float32", dtype=recipe.dtype)
    return {
        "share_bytes": {str(d): n for d, n in weight_bytes(placement, arch).items()}[device],
        "rss_bytes": stats["rss_anon_bytes"],
        "peak_bytes": max(peak, stats["rss_anon_bytes"]),
        "slices_bytes": {str(d): n for d, n in weight_bytes(placement, stored).items()}[device],
        "read_bytes": stats["checkpoint_bytes_read"],
        "load_s": loaded_s,
        "read_bytes_per_s": stats["checkpoint_bytes_read"] / loaded_s,
    }


@contextmanager
def _peaks(fleet: KeptFleet, devices: Sequence[str]) -> Iterator[dict[str, int]]:
    """The most anonymous memory that each device's process had while the block ran, as often as it was looked at."""
    most, over = dict.fromkeys(devices, 0), threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLED_S):
            for device in devices:
                most[device] = max(most[device], rss_anon_bytes(fleet.pid(device)))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield most
    finally:
        over.set()
        watch.join()


def _small_devices(kept: _Written, say: Say) -> Row:
    """Three devices that only few bits fit on (400 MB each for 1.04 billion weights): refused in bytes, or run."""
    result: Row = {}
    path = kept.path
    for kind in ("float32", "int4/128"):
        say(f"{kept.recipe.name}, {kind}: three small devices")
        memory_bytes = float(round(_SMALL_BYTES * Model(path, Topology.uniform(1), weights=kind).arch.num_params))
        where = Topology.uniform(3, memory_bytes=memory_bytes)
        result |= {"memory_bytes": memory_bytes}
        try:
            with launch_engine(model=path, topology=where, planner="exact", weights=kind) as engine:
                ids = list(engine.stream(list(PROMPT), Sampling(max_new_tokens=8)))
                held = {d: s["weight_bytes"] for d, s in engine.stats().items()}
                result[kind] = {"tokens": len(ids), "weight_bytes": held}
        except InputError as error:
            result[kind] = {"refused": " ".join(str(error).split())}
    return result


_TOKENS_PER_S = {"int8": 15, "int4": 22, "int4/128": 30}
_OVER_FLOAT32 = {"bfloat16": 1.4, "int8": 2.8, "int4": 4.2, "int4/128": 5.5}
_MOST = ("resident", "peak while loading", "read over slices")


def aims(name: str, rows: dict[str, Row]) -> list[Row]:
    """What is aimed at, a row for each: `measured` beside `aim`, and whether it is `reached`."""
    found: list[Row] = []

    def add(kind: str, what: str, measured: float, aim: float) -> None:
        reached = measured <= aim if what.startswith(_MOST) else measured >= aim
        found.append({"model": name, "format": kind, "what": what, "measured": measured, "aim": aim,
                      "reached": bool(reached)})  # fmt: skip

    for kind, row in rows.items():
        if name == BENCH_1B.name:
            if kind in _TOKENS_PER_S:
                add(kind, "tokens/s, one device", 1e3 / row["one_device_tpot_ms"], _TOKENS_PER_S[kind])
            if kind in _OVER_FLOAT32:
                over = rows["float32"]["one_device_tpot_ms"] / row["one_device_tpot_ms"]
                add(kind, "speed over float32, one device", over, _OVER_FLOAT32[kind])
            if kind == "int4":
                add(kind, "prompt tokens/s, one device", row["prefill_tokens_per_s"], 58)
                add(kind, "prompt, split over one device", row["prefill_split_over_one_device"], 1.7)
        if FORMATS[kind].is_quantised:
            add(kind, "split half over one device", row["split_half_over_one_device"], 1.6)
            add(kind, "one cut over one device", row["layer_cut_over_one_device"], 0.95)
            add(kind, "MB of source quantised a second", row["one_device_memory"]["read_bytes_per_s"] / 1e6, 150)
        for where in ("one_device", "split_half"):
            memory = row[f"{where}_memory"]
            for what, key, (factor, beside) in (
                ("resident MB", "rss_bytes", _RESIDENT), ("peak while loading, MB", "peak_bytes", _PEAK),
            ):  # fmt: skip
                most = factor * memory["share_bytes"] + beside
                add(kind, f"{what}, {where.replace('_', ' ')}", memory[key] / 1e6, most / 1e6)
        add(kind, "read over slices", row["read_over_slices"], 1.01)
    return found
