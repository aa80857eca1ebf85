"""Measures the engine against one-thread transformers on this machine, in one run, interleaved.

Figures of parallel processes mean something only while nothing else runs: the load before the run is in the result.
CPU seconds and bytes are solid in any weather. Every ratio is speed over one-thread transformers.generate.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitray.errors import InputError
from splitray.placement import LayerPlacement, Placement, Shares, weight_bytes
from splitray.topology import Topology

if TYPE_CHECKING:
    from splitray.arch import ModelArch
    from splitray.runtime.engine import Engine, RunReport

SUITES = ("engine",)
_ROUNDS, _NEW_TOKENS, _PROMPT_TOKENS, _PREFILL_TOKENS = 5, 48, 16, 512
_IDLE_S, _ECHO_ROUNDS = 3.0, 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A random-weight llama that the bench makes itself."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool


MODELS = (
    Model(name="llama-110m", layers=12, hidden=768, heads=12, kv_heads=12, ffn=2048, vocab=32000, tied=True),
    Model(name="llama-190m", layers=16, hidden=1024, heads=16, kv_heads=4, ffn=2816, vocab=4096, tied=False),
)


def run(suite: str = "engine", *, json: bool = False, out: Path | None = None) -> int:
    """Run a suite, print its table (or one JSON document) and write it to `out` if given.

    Raises:
        InputError: there is no such suite.
    """
    if suite not in SUITES:
        raise InputError("suite", expected=f"one of {list(SUITES)}", actual=suite, remedy="use one of them")
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {"suite": suite, "machine": _machine(), "ratios": {}, "rows": []}
    with tempfile.TemporaryDirectory(prefix="splitray-bench-") as folder:
        for model in MODELS:
            _say(f"{model.name}: writing random weights")
            path = Path(folder) / model.name
            _write(model, path)
            _measure(model, path, result)
    text = jsonlib.dumps(result, indent=2)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"bench-{suite}.json").write_text(text + "\n")
    if json:
        print(text)
    else:
        _table(result)
    return 0


def placements(arch: ModelArch, topology: Topology) -> dict[str, Placement]:
    """The placements that the issue names: halves, replicated attention, one cut, one device."""
    a, b = topology.ids
    layers = arch.num_layers

    def half(total: int) -> Shares:
        return Shares.of({a: [(0, total // 2)], b: [(total // 2, total)]})

    def all_on(device: str) -> LayerPlacement:
        return LayerPlacement(Shares.whole(arch.num_kv_heads, device), Shares.whole(arch.ffn_dim, device))

    halves = LayerPlacement(half(arch.num_kv_heads), half(arch.ffn_dim))
    replicated = LayerPlacement(Shares.whole(arch.num_kv_heads, a, b), half(arch.ffn_dim))
    cut = tuple(all_on(a if i < layers // 2 else b) for i in range(layers))
    return {
        "split_half": Placement((halves,) * layers, (a,), half(arch.vocab)),
        "replicated": Placement((replicated,) * layers, (a,), half(arch.vocab)),
        "replicated_whole_head": Placement((replicated,) * layers, (a,), Shares.whole(arch.vocab, a)),
        "layer_cut": Placement(cut, (a,), Shares.whole(arch.vocab, b)),
        "one_device": Placement((all_on(a),) * layers, (a,), Shares.whole(arch.vocab, a)),
    }


def _measure(model: Model, path: Path, result: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from splitray.runtime.engine import Engine
    from splitray.runtime.fleet import ProcessFleet
    from splitray.runtime.launch import ray_fleet, read_model
    from splitray.runtime.sampling import Sampling

    first = model is MODELS[0]
    arch, layout, lean = read_model(path)
    topology = Topology.uniform(2)
    chosen = placements(arch, topology)
    if not first:
        chosen = {k: chosen[k] for k in ("split_half", "one_device")}
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = [5 + i % 90 for i in range(_PROMPT_TOKENS)]
    long_prompt = [5 + i % 300 for i in range(_PREFILL_TOKENS)]
    reference = _transformers_tokens(whole, prompt, _NEW_TOKENS)
    times: dict[str, list[float]] = {}
    prefill: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    reports: dict[str, RunReport] = {}

    def start(name: str, stack: contextlib.ExitStack, fleet: Any, placement: Placement) -> Engine:
        _say(f"{model.name}: loading {name}")
        return stack.enter_context(
            Engine(fleet=fleet, model_path=path, arch=arch, layout=layout, topology=topology, placement=placement,
                   lean=lean, pin=True)
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        engines = {n: start(n, stack, ProcessFleet(), p) for n, p in chosen.items()}
        if first:
            engines["split_half_ray"] = start("split_half_ray", stack, ray_fleet(), chosen["split_half"])
        memory = {n: e.stats() for n, e in engines.items()}
        idle = _idle_fraction(engines)
        for i in range(_ROUNDS):
            _say(f"{model.name}: round {i + 1} of {_ROUNDS}")
            times.setdefault("transformers", []).append(_transformers_tpot(whole, prompt))
            for name, engine in engines.items():
                ids = list(engine.stream(prompt, Sampling(max_new_tokens=_NEW_TOKENS)))
                if ids != reference:
                    raise RuntimeError(f"{name} gave other tokens than transformers: {ids} and not {reference}")
                report = engine.report
                assert report is not None and report.tpot_s is not None, "a run of several tokens was made"
                reports[name] = report
                times.setdefault(name, []).append(report.tpot_s)
                cpu_s.setdefault(name, []).append(report.decode_cpu_s / (_NEW_TOKENS - 1))
            if first:
                prefill.setdefault("transformers", []).append(
                    _timed(lambda: _transformers_tokens(whole, long_prompt, 1))
                )
                engine = engines["split_half"]
                prefill.setdefault("split_half", []).append(
                    _timed(lambda e=engine: list(e.stream(long_prompt, Sampling(max_new_tokens=1))))  # type: ignore[misc]
                )
        if first:
            a, b = topology.ids
            trips = sorted(
                t / 2 for t in engines["split_half"].echo(a, b, size=4 * arch.hidden_dim, rounds=_ECHO_ROUNDS)
            )
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
    model: Model, name: str, engine: Engine, report: RunReport, base: float, times: list[float], cpu_s: list[float],
    memory: dict[str, dict[str, Any]], idle: float, bandwidth: float,
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
    model: Model, result: dict[str, Any], times: dict[str, list[float]], cpu_s: dict[str, list[float]],
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


def _write(model: Model, path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads, intermediate_size=model.ffn, vocab_size=model.vocab,
        tie_word_embeddings=model.tied, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)


def _transformers_tokens(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def _transformers_tpot(model: Any, prompt: list[int]) -> float:
    short = _timed(lambda: _transformers_tokens(model, prompt, 1))
    return (_timed(lambda: _transformers_tokens(model, prompt, _NEW_TOKENS)) - short) / (_NEW_TOKENS - 1)


def _read_bandwidth_bytes_per_s() -> float:
    """What one thread reads of memory in a second: a row times a matrix far larger than any cache, best of ten."""
    import numpy as np

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


def _machine() -> dict[str, Any]:
    import torch

    return {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "processor": _processor(),
            "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"  {text}", file=sys.stderr, flush=True)


_COLUMNS = {
    "tpot_ms": ".1f", "ratio": ".2f", "bound_ms": ".1f", "cpu_ms_per_token": ".1f", "exchanges_per_token": "d",
    "bytes_per_token": ",.0f", "wire_over_payload": ".3f",
}  # fmt: skip


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["model"]
    yield row["name"]
    for key, form in _COLUMNS.items():
        yield format(row[key], form) if key in row else ""


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(110, Console().width))
    heads = ("model", "placement", "ms/token", "speed", "bound ms", "CPU ms", "exchanges", "bytes/token", "wire")
    table = Table(*heads, title="decode against one-thread transformers", box=None)
    for row in result["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for name, value in result["ratios"].items():
        console.print(f"{name:24} {value:.3f}")
    exchange = result["exchange_us"]
    console.print(f"exchange                 {exchange['median']:.0f} us median, {exchange['p95']:.0f} us p95")
    console.print(f"load before the run      {result['machine']['load_before']:.2f}")
