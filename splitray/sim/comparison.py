"""Planners side by side under one virtual clock, on one trace and the same arrivals. Runs no model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitray.channel import as_channel
from splitray.codecs import Codec
from splitray.errors import InputError
from splitray.planners import make_planner
from splitray.quality.surrogate_accuracy import accuracy_of
from splitray.runtime.model_arch import PlanDtype, read_model_arch
from splitray.sim.arena import Case, run
from splitray.sim.network import arrivals, links_varied
from splitray.sim.outcome import Outcome
from splitray.sim.scenario import Scenario, background_load, edge_cloud_links
from splitray.sim.service import default_rate_per_s
from splitray.topology import DeviceId, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on what: names and files as a user gives them; the defaults are those of `splitray simulate`."""

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
    dtype: PlanDtype | None = None
    slots: int = 600
    slot_s: float = 1.0
    seed: int = 0
    staged: bool = True


def compare(
    asked: Comparison, *, tell: Callable[[int, int], None] = lambda done, of: None
) -> tuple[dict[str, Any], list[Outcome]]:
    """The document and the samples behind it.

    Raises:
        InputError: a file, a name or a number is wrong, or no planner finds a placement (the first one's reason).
    """
    names = [n.strip() for n in asked.planners.split(",") if n.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError("--planners", expected="distinct names with commas between them", actual=asked.planners,
                         remedy="write for example --planners cloud_only,layer_cut,drift_plus_penalty")  # fmt: skip
    for name in names:
        make_planner(name)
    scenario = scenario_of(asked)
    outcomes = run([Case(planner=n, scenario=scenario, seed=asked.seed) for n in names], tell=tell)
    refusals = [o.refusal for o in outcomes if o.refusal is not None and not np.isfinite(o.edge_share).any()]
    if len(refusals) == len(outcomes):
        raise refusals[0]
    document = {
        "model": asked.model,
        "topology": list(map(str, scenario.topology.ids)),
        "slots": asked.slots,
        "slot_s": asked.slot_s,
        "seed": asked.seed,
        "codec": asked.codec,
        "channel": asked.channel,
        "provenance": {
            "planners": "ours, simulated; costs as predicted from the topology's numbers",
            "decision_s": "ours, measured on this machine",
            "accuracy_loss": "exact transport: 0"
            if scenario.accuracy is None
            else "ours, measured on the shipped model"
            if asked.channel == "none"
            else "ours, told by the surrogate of the shipped model",
        },
        "planners": {o.planner: o.document() for o in outcomes},
    }
    return document, outcomes


def scenario_of(asked: Comparison) -> Scenario:
    """Read every file and draw what is random, each with a generator of its own so that they do not disturb each other.

    Raises:
        InputError: something cannot be used.
    """
    if not 0 < asked.slot_s < float("inf"):
        raise InputError("--slot-s", expected="a finite slot longer than 0 s", actual=asked.slot_s,
                         remedy="write for example 1")  # fmt: skip
    topology = Topology.load(asked.topology)
    topology.require_connected()
    arch = read_model_arch(asked.model, dtype=asked.dtype)
    seeds = np.random.SeedSequence(asked.seed).spawn(4)
    links, rtts, coming, other = (np.random.default_rng(s) for s in seeds)
    pairs = edge_cloud_links(topology)
    if (asked.bandwidth_trace or asked.rtt_trace) and not pairs:
        raise InputError("trace", expected="a topology with a link between an edge and a cloud device", actual="none",
                         remedy="correct the tiers, or leave the trace out")  # fmt: skip
    slots, slot_s = asked.slots, asked.slot_s
    if not 0 <= asked.background <= 1:
        raise InputError("--background", expected="a share from 0 to 1", actual=asked.background,
                         remedy="write for example 0.3")  # fmt: skip
    accuracy = accuracy_of(asked.codec, as_channel(asked.channel))
    return Scenario(
        name=asked.model, arch=arch, topology=topology, num_slots=slots, slot_s=slot_s,
        requests=arrivals(asked.arrivals, slots * slot_s, default_rate_per_s(arch, topology), coming),
        bandwidth_bytes_per_s=links_varied(
            asked.bandwidth_trace, topology, pairs, slots, slot_s, links, what="bandwidth"
        ),
        rtt_s=links_varied(asked.rtt_trace, topology, pairs, slots, slot_s, rtts, what="rtt"),
        background=background_load(slots, len(topology.ids), most=asked.background, rng=other)
        if asked.background
        else None,
        lost=_lost(asked.lose, topology, slots, slot_s),
        codec=asked.codec, accuracy=accuracy, staged=asked.staged,
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
