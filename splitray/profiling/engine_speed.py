"""The suite `engine` of `splitray bench`: split generation against one-thread transformers, in one run, interleaved.

Figures of parallel processes mean something only while nothing else runs: the load before the run is in the result.
CPU seconds and bytes are solid in any weather. Every ratio is speed over one-thread transformers.generate.
"""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from splitray.placement import Placement, weight_bytes
from splitray.profiling.calibration import Model
from splitray.profiling.exchange_cost import exchange_cost
from splitray.profiling.machine import machine
from splitray.profiling.named_placements import placements
from splitray.profiling.random_llama import BENCH_110M, BENCH_190M, RandomLlama
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.run_report import RunReport
from splitray.runtime.fleet import ProcessFleet
from splitray.runtime.launch import ray_fleet
from splitray.runtime.sampling import Sampling
from splitray.runtime.timing import echo
from splitray.scratch import scratch_folder
from splitray.topology import Topology

MODELS = (BENCH_110M, BENCH_190M)
_ROUNDS, _NEW_TOKENS, _PROMPT_TOKENS, _PREFILL_TOKENS = 5, 48, 16, 512
_IDLE_S, _ECHO_ROUNDS = 3.0, 3000


def engine_speed(*, say: Callable[[str], None]) -> dict[str, Any]:
    """Rows of all placements, ratios over transformers, and the time of an exchange; about six minutes."""
    result: dict[str, Any] = {"suite": "engine", "machine": machine(), "ratios": {}, "rows": []}
    with scratch_folder() as folder:
        for model in MODELS:
            say(f"{model.name}: writing random weights")
            _measure(model, model.write(folder), result, say)
    result["exchange_us"] |= exchange_cost(say=say)
    return result


def _measure(model: RandomLlama, path: Path, result: dict[str, Any], say: Callable[[str], None]) -> None:
    first = model is MODELS[0]
    split = Model(path, Topology.uniform(2))
    chosen = placements(split.arch, split.topology)
    if not first:
        chosen = {k: chosen[k] for k in ("split_half", "one_device")}
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = [5 + i % 90 for i in range(_PROMPT_TOKENS)]
    long_prompt = [5 + i % 300 for i in range(_PREFILL_TOKENS)]
    reference = _transformers_tokens(whole, prompt, _NEW_TOKENS)
    times, prefill, cpu_s = (defaultdict[str, list[float]](list) for _ in range(3))
    reports: dict[str, RunReport] = {}

    def start(name: str, stack: contextlib.ExitStack, fleet: Any, placement: Placement) -> Engine:
        say(f"{model.name}: loading {name}")
        return stack.enter_context(split.start(placement, fleet))

    with contextlib.ExitStack() as stack:
        engines = {n: start(n, stack, ProcessFleet(), p) for n, p in chosen.items()}
        if first:
            engines["split_half_ray"] = start("split_half_ray", stack, ray_fleet(), chosen["split_half"])
        memory = {n: e.stats() for n, e in engines.items()}
        idle = _idle_fraction(engines)
        for i in range(_ROUNDS):
            say(f"{model.name}: round {i + 1} of {_ROUNDS}")
            times["transformers"].append(_transformers_tpot(whole, prompt))
            for name, engine in engines.items():
                ids = list(engine.stream(prompt, Sampling(max_new_tokens=_NEW_TOKENS)))
                if ids != reference:
                    raise RuntimeError(f"{name} gave other tokens than transformers: {ids} and not {reference}")
                report = engine.report
                assert report is not None and report.tpot_s is not None, "a run of several tokens was made"
                reports[name] = report
                times[name].append(report.tpot_s)
                cpu_s[name].append(report.decode_cpu_s / (_NEW_TOKENS - 1))
            if first:
                half, once = engines["split_half"], Sampling(max_new_tokens=1)
                prefill["transformers"].append(_timed(lambda: _transformers_tokens(whole, long_prompt, 1)))
                prefill["split_half"].append(_timed(partial(lambda e, s: list(e.stream(long_prompt, s)), half, once)))
        if first:
            size = 4 * split.arch.hidden_dim
            there_and_back = echo(engines["split_half"], *split.topology.ids, size=size, rounds=_ECHO_ROUNDS)
            trips = sorted(t / 2 for t in there_and_back)
            result["exchange_us"] = {"median": trips[len(trips) // 2] * 1e6, "p95": trips[int(len(trips) * 0.95)] * 1e6}
        bandwidth = _read_bandwidth_bytes_per_s()
        base = statistics.median(times["transformers"])
        result["rows"].append({"model": model.name, "name": "transformers", "tpot_ms": base * 1e3, "ratio": 1.0,
                               "read_bandwidth_bytes_per_s": bandwidth})  # fmt: skip
        for name, engine in engines.items():
            row = _row(
                model, name, engine, reports[name], base, times[name], cpu_s[name], memory[name], idle[name], bandwidth
            )
            result["rows"].append(row)
    _ratios(model, result, times, cpu_s, prefill)


def _row(
    model: RandomLlama, name: str, engine: Engine, report: RunReport, base: float, times: list[float],
    cpu_s: list[float], memory: dict[str, dict[str, Any]], idle: float, bandwidth: float,
) -> dict[str, Any]:  # fmt: skip
    arch = engine.arch
    share = {str(d): n for d, n in weight_bytes(engine.placement, arch).items()}
    return {
        "model": model.name,
        "name": name,
        "tpot_ms": statistics.median(times) * 1e3,
        "ratio": base / statistics.median(times),
        "bound_ms": _critical_bytes(engine) / bandwidth * 1e3,
        "cpu_ms_per_token": statistics.median(cpu_s) * 1e3,
        "exchanges_per_token": engine.route.exchanges_per_token,
        "messages_per_token": report.messages_per_token,
        "bytes_per_token": report.bytes_per_token,
        "rule_bytes_per_token": engine.route.bytes_per_token(arch),
        "wire_bytes_per_token": report.wire_bytes_per_token,
        "wire_over_payload": report.wire_bytes_per_token / report.bytes_per_token if report.bytes_per_token else 1.0,
        "idle_core_fraction": idle,
        "devices": {
            d: {
                "weight_bytes": m["weight_bytes"],
                "share_bytes": share.get(d, 0),
                "weight_over_share": m["weight_bytes"] / share[d] if share.get(d) else 1.0,
                "checkpoint_bytes_read": m["checkpoint_bytes_read"],
                "rss_anon_bytes": m["rss_anon_bytes"],
                "rss_anon_over_share_bytes": m["rss_anon_bytes"] - share.get(d, 0),
            }
            for d, m in memory.items()
        },
    }


def _critical_bytes(engine: Engine) -> float:
    """Weight bytes on the critical path: the larger half of partitioned work, the sum of work done in turn."""
    arch = engine.arch
    total = 0.0
    for layer in engine.placement.layers:
        for shares, unit in ((layer.attention, arch.group_params), (layer.ffn, arch.ffn_unit_params)):
            total += max(shares.count(d) for d in shares.devices) * unit * arch.dtype_bytes
    head = engine.placement.head
    return total + max(head.count(d) for d in head.devices) * arch.vocab_row_params * arch.dtype_bytes


def _ratios(
    model: RandomLlama, result: dict[str, Any], times: dict[str, list[float]], cpu_s: dict[str, list[float]],
    prefill: dict[str, list[float]],
) -> None:  # fmt: skip
    middle = {name: statistics.median(values) for name, values in times.items()}
    base = middle["transformers"]
    ratios = result["ratios"]
    if model is not MODELS[0]:
        ratios[f"split_half_{model.name}"] = base / middle["split_half"]
        return
    for name in ("split_half", "layer_cut", "one_device"):
        ratios[name] = base / middle[name]
    ratios["replicated"] = base / middle["replicated"]
    ratios["ray_vs_process"] = middle["split_half"] / middle["split_half_ray"]
    ratios["prefill_half"] = statistics.median(prefill["transformers"]) / statistics.median(prefill["split_half"])
    ratios["cpu_half"] = statistics.median(cpu_s["split_half"]) / statistics.median(cpu_s["one_device"])
    result["layer_cut_added_ms"] = (middle["layer_cut"] - middle["one_device"]) * 1e3
    row = next(r for r in result["rows"] if r["name"] == "split_half")
    for key in ("bytes_per_token", "wire_bytes_per_token", "messages_per_token"):
        result[key] = row[key]


def _transformers_tokens(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    return out[0, len(prompt) :].tolist()


def _transformers_tpot(model: Any, prompt: list[int]) -> float:
    short = _timed(lambda: _transformers_tokens(model, prompt, 1))
    return (_timed(lambda: _transformers_tokens(model, prompt, _NEW_TOKENS)) - short) / (_NEW_TOKENS - 1)


def _read_bandwidth_bytes_per_s() -> float:
    """What one thread reads of memory in a second: a row times a matrix far larger than any cache, best of ten."""
    matrix, row = np.ones((1024, 1 << 16), np.float32), np.ones(1024, np.float32)
    return float(matrix.nbytes / min(_timed(lambda: row @ matrix) for _ in range(10)))


def _idle_fraction(engines: dict[str, Engine]) -> dict[str, float]:
    before = {n: sum(s["cpu_s"] for s in e.stats().values()) for n, e in engines.items()}
    time.sleep(_IDLE_S)
    after = {n: {d: s["cpu_s"] for d, s in e.stats().items()} for n, e in engines.items()}
    return {n: (sum(after[n].values()) - before[n]) / _IDLE_S / len(after[n]) for n in engines}


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
