"""A link that becomes slow while a run uses it, emulated on this machine, and the placement that moves for it."""

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from splitray.cost import CostModel
from splitray.placement import Placement
from splitray.planners import make_planner
from splitray.runtime.engine.controller import Controller
from splitray.runtime.engine.monitor import Monitor
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

PLANNER = "layer_dp"
NEW_TOKENS = 160
_WARM, _AT, _SLOW = 8, 60, 12
_PERIOD_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Tokens of one placement under one link: a later token as predicted and as measured (a median)."""

    name: str
    placement: Placement
    tokens: int
    predicted_s: float
    measured_s: float | None
    """None where the phase was over at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDrop:
    """The whole run: before, slow, and moved."""

    token_ids: tuple[int, ...]
    link_bytes_per_s: float
    phases: tuple[Phase, Phase, Phase]
    reaction_s: float
    """From when a planner may move it to the first token of the new placement."""


def link_drop(
    model: Path, placement: Placement, measured: Topology, prompt_ids: Sequence[int], *,
    link_bytes_per_s: float = 400e3, planner: str = PLANNER,
) -> LinkDrop:  # fmt: skip
    """Generate greedily on device processes; in the middle their links become slow, then a planner may move it all.

    It begins with `placement` on the devices of `measured`, this machine as calibrated, from which times are predicted.

    Raises:
        DeviceLost: a device died.
    """
    times: list[float] = []
    token_ids: list[int] = []
    moved_at = None
    with launch_engine(
        model=model, topology=measured, placement=placement, runtime="process", recovery=Recovery()
    ) as engine:
        monitor = Monitor(engine, period_s=_PERIOD_S)
        decides = make_planner(planner)
        controller = Controller(engine=engine, planner=decides, topology=monitor.topology, monitor=monitor)
        with closing(controller):
            for token_id in engine.stream(prompt_ids, Sampling(max_new_tokens=NEW_TOKENS)):
                times.append(time.perf_counter())
                token_ids.append(token_id)
                if len(times) == _AT:
                    engine.slow_links(link_bytes_per_s)
                if len(times) == _AT + _SLOW:
                    controller.start()
                if moved_at is None and engine.epoch:
                    moved_at = len(times)
            engine.slow_links(0.0)
        after, arch = engine.placement, engine.arch
    slowed = [replace(x, bandwidth_bytes_per_s=min(link_bytes_per_s, x.bandwidth_bytes_per_s)) for x in measured.links]
    slow = replace(measured, links=tuple(slowed))
    switched = moved_at or len(times)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    spans = (
        ("as it was", placement, measured, gaps[_WARM : _AT - 1]),
        ("the link is slow", placement, slow, gaps[_AT : _AT + _SLOW - 1]),  # then probes and KV share it
        ("moved", after, slow, gaps[switched:]),
    )
    phases = tuple(
        Phase(
            name=name, placement=where, tokens=len(span), measured_s=statistics.median(span) if span else None,
            predicted_s=CostModel(arch, links).tpot_s(where, context_tokens=len(prompt_ids) + _AT),
        )
        for name, where, links, span in spans
    )  # fmt: skip
    return LinkDrop(
        token_ids=tuple(token_ids),
        link_bytes_per_s=link_bytes_per_s,
        phases=phases,  # type: ignore[arg-type]
        reaction_s=times[min(switched, len(times)) - 1] - times[_AT + _SLOW - 1],
    )
