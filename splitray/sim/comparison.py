"""Planners side by side under one virtual clock, on one trace and the same arrivals. Runs no model.

Several edges are so many users, each with the topology's edge devices and links and with requests of its own. They have
a cloud each, or share one, which then is as slow for each as the others make it (crowd.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitray.arrays import Floats
from splitray.channel import as_channel
from splitray.codecs import Codec
from splitray.errors import InputError
from splitray.planners import make_planner
from splitray.planners.protocol import RequestShape
from splitray.quality.surrogate_accuracy import accuracy_of
from splitray.runtime.model_arch import PlanDtype, read_model_arch
from splitray.sim.arena import Case, run
from splitray.sim.network import links_varied, requests_of
from splitray.sim.outcome import Outcome, together
from splitray.sim.scenario import Scenario, background_load, edge_cloud_links
from splitray.sim.service import default_rate_per_s, shared_rate_per_s
from splitray.topology import DeviceId, Topology
from splitray.weight_formats import BEST_WEIGHTS

MOST_EDGES = 64  # a crowd of more takes hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on what: names and files as a user gives them; the defaults are those of `splitray simulate`.

    `edges` are so many users of the same kind, one by default; with `shared_cloud` all devices of the tier cloud are
    there once for all of them.
    """

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
    weights: str | None = None
    sums: str = "fixed"
    slots: int = 600
    slot_s: float = 1.0
    seed: int = 0
    staged: bool = True
    edges: int | None = None
    shared_cloud: bool = False


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
    scenarios = scenarios_of(asked)
    scenario, edges = scenarios[0], len(scenarios)
    cases = [
        Case(planner=n, scenario=each, seed=asked.seed + k, pool=p if asked.shared_cloud else None)
        for p, n in enumerate(names)
        for k, each in enumerate(scenarios)
    ]
    found = run(cases, tell=tell)
    outcomes = [together(found[i : i + edges]) for i in range(0, len(found), edges)]
    refusals = [o.refusal for o in outcomes if o.refusal is not None and not np.isfinite(o.edge_share).any()]
    if len(refusals) == len(outcomes):
        raise refusals[0]
    document = {
        "model": asked.model,
        "topology": list(map(str, scenario.topology.ids)),
        "slots": asked.slots,
        "slot_s": asked.slot_s,
        "seed": asked.seed,
        "edges": edges,
        "shared_cloud": asked.shared_cloud,
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


def scenarios_of(asked: Comparison) -> list[Scenario]:
    """Read every file and draw what is random, for each edge with generators of its own that do not disturb each other.

    Raises:
        InputError: something cannot be used.
    """
    if not 0 < asked.slot_s < float("inf"):
        raise InputError("--slot-s", expected="a finite slot longer than 0 s", actual=asked.slot_s,
                         remedy="write for example 1")  # fmt: skip
    topology = Topology.load(asked.topology)
    topology.require_connected()
    edges = _edges(asked, topology)
    if asked.weights == BEST_WEIGHTS:
        remedy = "ask `splitray plan --weights best`, and write `weights:` to the devices of the topology"
        raise InputError("weights best", expected="formats that all planners share", actual="a choice of each planner",
                         remedy=remedy)  # fmt: skip
    arch = read_model_arch(asked.model, dtype=asked.dtype, weights=asked.weights, sums=asked.sums, topology=topology)
    pairs = edge_cloud_links(topology)
    if (asked.bandwidth_trace or asked.rtt_trace) and not pairs:
        raise InputError("trace", expected="a topology with a link between an edge and a cloud device", actual="none",
                         remedy="correct the tiers, or leave the trace out")  # fmt: skip
    slots, slot_s = asked.slots, asked.slot_s
    if not 0 <= asked.background <= 1:
        raise InputError("--background", expected="a share from 0 to 1", actual=asked.background,
                         remedy="write for example 0.3")  # fmt: skip
    accuracy, lost = accuracy_of(asked.codec, as_channel(asked.channel)), _lost(asked.lose, topology, slots, slot_s)
    rate = shared_rate_per_s(arch, topology) / edges if asked.shared_cloud else default_rate_per_s(arch, topology)
    seeds = [np.random.SeedSequence(asked.seed if not k else [asked.seed, k]).spawn(4) for k in range(edges)]
    rngs = [[np.random.default_rng(s) for s in each] for each in seeds]  # links, round trips, requests, other work
    lines = requests_of(asked.arrivals, slots * slot_s, rate, [r[2] for r in rngs])
    asking = [line for line in lines if len(line)]
    shape = None
    if edges > 1 and asking:  # whoever runs the service knows the mean request of all
        prompts, outputs = (
            np.concatenate(each) for each in zip(*((x.prompt_tokens, x.output_tokens) for x in asking), strict=True)
        )
        shape = RequestShape(float(prompts.mean()), float(outputs.mean()))
    other = _other_work(asked, topology, [r[3] for r in rngs])
    found = []
    for k, line in enumerate(lines):
        varying = [
            links_varied(spec, topology, pairs, slots, slot_s, rngs[k][i], what=what)
            for i, (spec, what) in enumerate(((asked.bandwidth_trace, "bandwidth"), (asked.rtt_trace, "rtt")))
        ]
        if k:  # a recorded trace is the same for all, so that each edge takes it from a point of its own
            turn = int(rngs[k][0].integers(slots))
            varying = [{pair: np.roll(values, turn) for pair, values in each.items()} for each in varying]
        found.append(
            Scenario(
                name=asked.model, arch=arch, topology=topology, num_slots=slots, slot_s=slot_s, requests=line,
                bandwidth_bytes_per_s=varying[0], rtt_s=varying[1], background=other[k], lost=lost,
                codec=asked.codec, accuracy=accuracy, staged=asked.staged, mean_request=shape,
            )
        )  # fmt: skip
    return found


def _edges(asked: Comparison, topology: Topology) -> int:
    """How many edges there are.

    Raises:
        InputError: the number is wrong, or the topology has no edge or no cloud device for it.
    """
    if asked.edges is None:
        if asked.shared_cloud:
            raise InputError("--shared-cloud", expected="--edges N, the number of those that share it", actual="none",
                             remedy="write for example --edges 8 --shared-cloud")  # fmt: skip
        return 1
    if not 1 <= asked.edges <= MOST_EDGES:
        raise InputError("--edges", expected=f"from 1 to {MOST_EDGES} edges", actual=asked.edges,
                         remedy="write for example --edges 8")  # fmt: skip
    for tier, needed in (("edge", True), ("cloud", asked.shared_cloud)):
        if needed and not any(d.tier == tier for d in topology.devices):
            raise InputError("--edges" if tier == "edge" else "--shared-cloud", expected=f"a device of tier {tier}",
                             actual=f"{[f'{d.id} ({d.tier})' for d in topology.devices]}",
                             remedy="correct the tiers in the topology, or leave the option out")  # fmt: skip
    return asked.edges


def _other_work(asked: Comparison, topology: Topology, rngs: list[np.random.Generator]) -> Sequence[Floats | None]:
    """What other work takes of each edge's devices; of a cloud that is shared it takes the same from all."""
    if not asked.background:
        return [None] * len(rngs)
    found = [background_load(asked.slots, len(topology.ids), most=asked.background, rng=rng) for rng in rngs]
    cloud = [d.tier == "cloud" for d in topology.devices]
    for each in found[1:] if asked.shared_cloud else []:
        each[:, cloud] = found[0][:, cloud]
    return found


def _lost(text: str | None, topology: Topology, slots: int, slot_s: float) -> np.ndarray | None:
    """`DEVICE:FROM_S:TO_S`, several with commas."""
    if not text:
        return None
    lost = np.zeros((slots, len(topology.ids)), bool)
    for each in text.split(","):
        rest, _, last = each.rpartition(":")
        name, _, first = rest.rpartition(":")  # a name may have colons, too
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
