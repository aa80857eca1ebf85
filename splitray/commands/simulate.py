"""`splitray simulate`: planners side by side under one virtual clock, on a trace and on arrivals. Runs no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitray.channel import as_channel
from splitray.codecs import Codec
from splitray.commands.plan import Dtype, read_model_arch
from splitray.errors import InputError
from splitray.planners import make_planner
from splitray.quality.surrogate_accuracy import accuracy_of
from splitray.report.plots import save_plots
from splitray.report.simulation import plots_of
from splitray.sim.arena import Case, run
from splitray.sim.network import arrivals, links_varied
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import Scenario, background_load, edge_cloud_links
from splitray.sim.service import default_rate_per_s
from splitray.topology import DeviceId, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    model: str
    topology: str
    planners: str
    bandwidth_trace: str | None = None
    rtt_trace: str | None = None
    arrivals: str | None = None
    background: float = 0.0
    lose: str | None = None
    codec: Codec = "none"
    channel: str = "none"
    dtype: Dtype | None = None
    slots: int = 600
    slot_s: float = 1.0
    seed: int = 0
    staged: bool = True


def simulate(
    request: Request, *, tell: Callable[[int, int], None] = lambda done, of: None
) -> tuple[dict[str, Any], list[Outcome]]:
    """The document and the samples behind it.

    Raises:
        InputError: a file, a name or a number is wrong, or no planner finds a placement (the first one's reason).
    """
    names = [n.strip() for n in request.planners.split(",") if n.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError("--planners", expected="distinct names with commas between them", actual=request.planners,
                         remedy="write for example --planners cloud_only,layer_cut,drift_plus_penalty")  # fmt: skip
    for name in names:
        make_planner(name)
    scenario = scenario_of(request)
    outcomes = run([Case(planner=n, scenario=scenario, seed=request.seed) for n in names], tell=tell)
    refusals = [o.refusal for o in outcomes if o.refusal is not None and not np.isfinite(o.edge_share).any()]
    if len(refusals) == len(outcomes):
        raise refusals[0]
    document = {
        "model": request.model,
        "topology": list(map(str, scenario.topology.ids)),
        "slots": request.slots,
        "slot_s": request.slot_s,
        "seed": request.seed,
        "codec": request.codec,
        "channel": request.channel,
        "provenance": {
            "planners": "ours, simulated; costs as predicted from the topology's numbers",
            "decision_s": "ours, measured on this machine",
            "accuracy_loss": "exact transport: 0"
            if scenario.accuracy is None
            else "ours, measured on the shipped model"
            if request.channel == "none"
            else "ours, told by the surrogate of the shipped model",
        },
        "planners": {o.planner: o.document() for o in outcomes},
    }
    return document, outcomes


def scenario_of(request: Request) -> Scenario:
    """Read every file and draw what is random, each with a generator of its own so that they do not disturb each other.

    Raises:
        InputError: something cannot be used.
    """
    if not 0 < request.slot_s < float("inf"):
        raise InputError("--slot-s", expected="a finite slot longer than 0 s", actual=request.slot_s,
                         remedy="write for example 1")  # fmt: skip
    topology = Topology.load(request.topology)
    topology.require_connected()
    arch = read_model_arch(request.model, dtype=request.dtype)
    seeds = np.random.SeedSequence(request.seed).spawn(4)
    links, rtts, coming, other = (np.random.default_rng(s) for s in seeds)
    pairs = edge_cloud_links(topology)
    if (request.bandwidth_trace or request.rtt_trace) and not pairs:
        raise InputError("trace", expected="a topology with a link between an edge and a cloud device", actual="none",
                         remedy="correct the tiers, or leave the trace out")  # fmt: skip
    slots, slot_s = request.slots, request.slot_s
    if not 0 <= request.background <= 1:
        raise InputError("--background", expected="a share from 0 to 1", actual=request.background,
                         remedy="write for example 0.3")  # fmt: skip
    accuracy = accuracy_of(request.codec, as_channel(request.channel))
    return Scenario(
        name=request.model, arch=arch, topology=topology, num_slots=slots, slot_s=slot_s,
        requests=arrivals(request.arrivals, slots * slot_s, default_rate_per_s(arch, topology), coming),
        bandwidth_bytes_per_s=links_varied(
            request.bandwidth_trace, topology, pairs, slots, slot_s, links, what="bandwidth"
        ),
        rtt_s=links_varied(request.rtt_trace, topology, pairs, slots, slot_s, rtts, what="rtt"),
        background=background_load(slots, len(topology.ids), most=request.background, rng=other)
        if request.background
        else None,
        lost=_lost(request.lose, topology, slots, slot_s),
        codec=request.codec, accuracy=accuracy, staged=request.staged,
    )  # fmt: skip


def _lost(text: str | None, topology: Topology, slots: int, slot_s: float) -> np.ndarray | None:
    """`DEVICE:FROM_S:TO_S`, several with commas."""
    if not text:
        return None
    lost = np.zeros((slots, len(topology.ids)), bool)
    for each in text.split(","):
        name, _, times = each.partition(":")
        first, _, last = times.partition(":")
        try:
            begin, end = float(first), float(last)
        except ValueError:
            begin = end = float("nan")
        if name not in topology.ids or not 0 <= begin < end or not np.isfinite(end):
            raise InputError("--lose", expected=f"DEVICE:FROM_S:TO_S, finite times, a device of {list(topology.ids)}",
                             actual=each, remedy="write for example --lose cloud0:60:120")  # fmt: skip
        first_slot, end_slot = int(min(begin / slot_s, slots)), int(np.ceil(min(end / slot_s, slots)))
        lost[first_slot:end_slot, topology.ids.index(DeviceId(name))] = True
    return lost


def write(document: dict[str, Any], outcomes: list[Outcome], out: Path) -> list[Path]:
    """`simulation.json`, the raw samples as `samples.npz`, and the plots.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "simulation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        samples = {
            f"{o.planner}/{name}": getattr(o, name)
            for o in outcomes
            for name in ("arrival_s", "first_token_s", "finish_s", "backlog_tokens", "tpot_s", "energy_j")
        }
        np.savez_compressed(out / "samples.npz", allow_pickle=False, **samples)
        return [out / "simulation.json", out / "samples.npz", *save_plots(plots_of(outcomes), out)]
    except OSError as error:
        raise InputError("--out", expected="a folder that can be written", actual=error,
                         remedy="give another folder") from error  # fmt: skip
