"""The suite `replacement`: placements that change while tokens are generated over a link that a trace drives.

What the live controller does (its own `next_action` and what it is fed with) beside the best fixed placement of
hindsight and a clairvoyant re-placement that knows the trace and pays the same for its moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from splitray.catalog import architecture
from splitray.errors import InputError
from splitray.evaluate.options import Options, Tell
from splitray.evaluate.stream import Copying, Stream, StreamPrices, TracedLink, at_rate
from splitray.placement import Placement
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState, Planner
from splitray.report.document import Cell, Number, Report, Table
from splitray.runtime.engine.controller import Action, Allowance, Gate, next_action, weighed
from splitray.runtime.engine.monitor import CHANGE, SOONEST_S, probe_period_s
from splitray.sim.traces import Trace, read_trace
from splitray.topology import Topology

EDGE, MODEL, HOLDS, LINK = "jetson-orin-nx-16gb", "gpt2-xl", "embedding_and_head", "wan"
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128
EVERY = 4  # tokens between looks, as of the live controller
STARTS = 8  # tokens between those at which the clairvoyant may begin a move
START_S = 1.0  # of the trace, when the first request comes
PROBE_S = 0.1  # that a probe takes, over which it sees the mean rate
LEAST_RATE = 500.0  # byte/s that a probe can still see
PLANNER = "layer_dp"
VARIES = 4.0  # 95th over 5th percentile of the rate, from which on a trace counts
TRACES = 10
LEAST_S = 300.0  # of stream over each trace
_LEVELS = 24  # rates at which the planner is asked for candidates
_RECOVERED, _WORSE, _FLIPS_GAIN = 0.8, 1.05, 1.3


@dataclass
class Online:
    """The live controller's decisions in a simulated stream."""

    stream: Stream
    planner: Planner
    gate: Gate = field(default_factory=Gate)
    moves: int = 0

    def run(self, requests: int) -> float:
        """Seconds until that many requests are answered."""
        stream, prices = self.stream, self.stream.prices
        self._allowance, self._probe = Allowance(self.gate, START_S), (START_S, stream.wire.rate(0.0, START_S))
        now_s, placement = START_S, None
        for _ in range(requests):
            placement = self._at_rest(placement, now_s)
            now_s = stream.read(placement, stream.prompt_tokens, now_s)
            token, copying = 1, None
            while token < stream.output_tokens:
                if copying is None:
                    action, wanted = self._look(placement, token, now_s)
                    if action.kind == "move" and action.copies_kv:
                        copying = Copying(wanted, prices.kv_bytes(placement, wanted, stream.prompt_tokens + token))
                    elif action.kind == "move":
                        placement = wanted
                        now_s = stream.read(placement, stream.prompt_tokens + token, now_s)
                least = min(EVERY, stream.output_tokens - token)
                now_s, done = stream.advance(placement, token, least, now_s, copying)
                token += done
                if copying is not None and copying.left_bytes <= 0:
                    placement, copying = copying.then, None
        return now_s - START_S

    def _at_rest(self, placement: Placement | None, now_s: float) -> Placement:
        if placement is None:
            return self.planner.propose(self._state(None, 0, now_s))
        action, wanted = self._look(placement, 0, now_s)
        return wanted if action.kind == "move" else placement

    def _look(self, placement: Placement, token: int, now_s: float) -> tuple[Action, Placement]:
        desired, observed = weighed(
            self.planner, self._state(placement, token, now_s), tokens_left=self.stream.output_tokens - token,
            moving=False, allowed_s=self._allowance.at(now_s),
        )  # fmt: skip
        action = next_action(desired, observed, self.gate)
        if action.kind == "move":
            self._allowance.left_s -= action.cost_s
            self.moves += 1
        return action, desired.placement

    def _state(self, placement: Placement | None, token: int, now_s: float) -> ClusterState:
        """The link as the monitor has it: by its last probe, which a change of the tokens' pace brings forward."""
        prices, wire = self.stream.prices, self.stream.wire
        probed_s, known = self._probe
        rate = max(wire.rate(max(0.0, now_s - PROBE_S), now_s), LEAST_RATE)
        used = placement is not None and prices.token(placement, self.stream.prompt_tokens + token).link_bytes > 0
        sooner = used and abs(rate - known) > CHANGE * known and now_s - probed_s >= SOONEST_S
        if sooner or now_s - probed_s >= probe_period_s(known):
            self._probe = now_s, rate
        return ClusterState(
            arch=prices.arch,
            topology=at_rate(prices.topology, self._probe[1]),
            context_tokens=self.stream.prompt_tokens + self.stream.output_tokens,
            current=placement,
            cached_tokens=self.stream.prompt_tokens + token if token else 0,
            interval_tokens=max(1, self.stream.output_tokens - token),
        )


def fixed(stream: Stream, placement: Placement, requests: int) -> float:
    """Seconds of one placement for all requests."""
    now_s = START_S
    for _ in range(requests):
        now_s = stream.read(placement, stream.prompt_tokens, now_s)
        now_s, _ = stream.advance(placement, 1, stream.output_tokens - 1, now_s)
    return now_s - START_S


def clairvoyant(stream: Stream, candidates: Sequence[Placement], requests: int) -> float:
    """Seconds of the fastest row of candidates, with the trace known and moves at their price: an exact search.

    Whoever is further by a time stays ahead, so the earliest time of each (token, placement) is enough. Moves begin
    every `STARTS` tokens.
    """
    now_s, looks = START_S, range(1, stream.output_tokens, STARTS)
    for _ in range(requests):
        earliest: dict[int, dict[Placement, float]] = {1: {}}  # by token and placement
        for p in candidates:
            earliest[1][p] = stream.read(p, stream.prompt_tokens, now_s)
        reach = partial(_reach, earliest)
        for token in looks:
            here = earliest.pop(token)
            for p, at_s in list(here.items()):  # who reads again starts from any of the others
                again = {q: stream.read(q, stream.prompt_tokens + token, at_s) for q in candidates if q != p}
                for q, then_s in again.items():
                    here[q] = min(then_s, here.get(q, float("inf")))
            most = min(STARTS, stream.output_tokens - token)
            for p, at_s in here.items():
                end_s, done = stream.advance(p, token, most, at_s)
                reach(token + done, p, end_s)
            _copied(stream, here, token, candidates, reach)
        now_s = min(earliest[stream.output_tokens].values())
    return now_s - START_S


def _reach(earliest: dict[int, dict[Placement, float]], token: int, placement: Placement, at_s: float) -> None:
    held = earliest.setdefault(token, {})
    held[placement] = min(at_s, held.get(placement, float("inf")))


def _copied(
    stream: Stream, here: dict[Placement, float], token: int, candidates: Sequence[Placement],
    reach: Callable[[int, Placement, float], None],
) -> None:  # fmt: skip
    """Copies of KV that begin at a token and are over before the request is."""
    left = stream.output_tokens - token
    for p, at_s in here.items():
        for q in candidates:
            moved = stream.prices.kv_bytes(p, q, stream.prompt_tokens + token) if q != p else 0
            if not moved or stream.wire.until(at_s, moved) > stream.advance(p, token, left, at_s)[0]:
                continue
            copying = Copying(q, moved)
            end_s, done = stream.advance(p, token, left, at_s, copying)
            if copying.left_bytes > 0:
                continue
            rest = min(-done % STARTS, left - done)
            end_s, more = stream.advance(q, token + done, rest, end_s)
            reach(token + done + more, q, end_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceResult:
    """One trace: seconds of the stream for each way of placing it."""

    trace: str
    varies: float
    requests: int
    fixed_s: tuple[float, ...]
    online_s: float
    clairvoyant_s: float
    moves: int

    @property
    def best_fixed_s(self) -> float:
        """Seconds of the fixed placement that is fastest once the whole trace is known."""
        return min(self.fixed_s)


def outcome(prices: StreamPrices, name: str, trace: Trace) -> TraceResult:
    """One trace, repeated where the stream takes longer."""
    planner = make_planner(PLANNER)
    stream = Stream(prices, TracedLink(trace, 100 * LEAST_S), prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
    candidates = candidates_of(prices, trace)
    requests = int(np.ceil(LEAST_S / min(fixed(stream, c, 1) for c in candidates)))
    online = Online(stream, planner)
    return TraceResult(
        trace=name, varies=variation(trace), requests=requests,
        fixed_s=tuple(fixed(stream, c, requests) for c in candidates), online_s=online.run(requests),
        clairvoyant_s=clairvoyant(stream, candidates, requests), moves=online.moves,
    )  # fmt: skip


def candidates_of(prices: StreamPrices, trace: Trace) -> list[Placement]:
    """The different placements that the planner proposes over the range of the trace's rates."""
    planner, tokens = make_planner(PLANNER), PROMPT_TOKENS + OUTPUT_TOKENS
    low, high = (max(LEAST_RATE, float(np.percentile(trace.value, p))) for p in (1, 99))
    wanted = [
        planner.propose(ClusterState(arch=prices.arch, topology=at_rate(prices.topology, b), context_tokens=tokens))
        for b in np.geomspace(low, high, _LEVELS)
    ]
    return list(dict.fromkeys(wanted))


def variation(trace: Trace) -> float:
    """95th over 5th percentile of the rate, second by second."""
    low, high = np.percentile(trace.sampled(max(1, int(trace.time_s[-1])), 1.0), (5, 95))
    return float(high / max(low, LEAST_RATE))


def flips(prices: StreamPrices) -> dict[str, Trace]:
    """Constructed: far above and far below the rate at which both regimes are as fast, in turn."""
    edge, cloud = (make_planner(PLANNER).propose(ClusterState(
        arch=prices.arch, topology=at_rate(prices.topology, b), context_tokens=PROMPT_TOKENS + OUTPUT_TOKENS,
    )) for b in (LEAST_RATE, 1e9))  # fmt: skip
    slow, fast = prices.token(edge, OUTPUT_TOKENS), prices.token(cloud, OUTPUT_TOKENS)
    even = fast.link_bytes / (slow.own_s - fast.own_s)
    return {
        f"{name}, every {period_s} s": Trace(np.arange(8.0) * period_s, np.tile([even * up, even / down], 4))
        for name, period_s, up, down in (
            ("10x up and down", 60, 10, 10),
            ("10x up and down", 30, 10, 10),
            ("30x up, 30x down", 60, 30, 30),
        )
    }


def run(options: Options, tell: Tell) -> Report:
    """The suite.

    Raises:
        InputError: no traces, or one that cannot be used.
    """
    arch, topology = architecture(MODEL), Topology.pair(EDGE, link=LINK, origin_holds=HOLDS)
    prices = StreamPrices(arch, topology)
    traces = {spec.rpartition("/")[2]: read_trace(spec) for spec in options.traces}
    varied = {n: t for n, t in traces.items() if variation(t) > VARIES}
    if not varied:
        expected, remedy = (
            f"some whose rates vary more than {VARIES:g}x",
            "give files with --trace, time [s] and Mbit/s",
        )
        raise InputError("recorded traces", expected=expected, actual=f"{len(traces)}, none does", remedy=remedy)
    evenly = np.linspace(0, len(varied) - 1, min(TRACES, len(varied))).astype(int)
    names = [list(varied)[i] for i in evenly]
    found: dict[str, list[TraceResult]] = {"recorded": [], "constructed": []}
    for kind, chosen in (("recorded", {n: varied[n] for n in names}), ("constructed", flips(prices))):
        for name, trace in chosen.items():
            tell(name)
            found[kind].append(options.done.of(f"{kind}: {name}", partial(outcome, prices, name, trace)))
    return Report(
        title="Re-placement while a stream is generated",
        facts={
            "model": f"{MODEL}, float16, {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens a request, one behind the other",
            "devices": f"{EDGE} and one A100 80 GB; origin holds {HOLDS.replace('_', ' ')}",
            "memory": ", ".join(f"{d.id} {d.memory_bytes / 1e9:g} GB" for d in topology.devices),
            "link": f"{LINK} of the catalogue with the trace's rate both ways",
            "planner": PLANNER,
            "gate": str(Gate()),
            "traces": f"{len(names)} of {len(varied)} that vary more than {VARIES:g}x, spread evenly over them by name",
        },
        tables=(targets(found), *(table(kind, rows) for kind, rows in found.items())),
        plots={"stream": _plot(found["recorded"])},
        captions={"stream": "Time over that of the best fixed placement of hindsight; simulated."},
    )


def targets(found: dict[str, list[TraceResult]]) -> Table:
    """The suite's targets beside what was reached, as a table."""
    recorded, constructed = found["recorded"], found["constructed"]
    ours, best = (
        sum(np.log(o.best_fixed_s / s(o)) for o in recorded) for s in (lambda o: o.online_s, lambda o: o.clairvoyant_s)
    )
    worst = max(o.online_s / o.best_fixed_s for o in recorded)
    least = min(o.best_fixed_s / o.online_s for o in constructed)
    possible = min(o.best_fixed_s / o.clairvoyant_s for o in constructed)
    count = len(recorded)
    rows: list[tuple[Cell, ...]] = [
        ("of a clairvoyant re-placement's gain, recorded", f"{_RECOVERED:.0%}",
         Number(float(ours / best) if best else None, "share", "simulated")),
        ("its gain over the best fixed placement, mean", "-",
         Number(float(np.exp(best / count)), "ratio", "simulated")),
        ("time over the best fixed placement, worst trace", f"{_WORSE:.2f}x", Number(worst, "ratio", "simulated")),
        ("gain on constructed flips, least", f"{_FLIPS_GAIN:.1f}x", Number(least, "ratio", "simulated")),
        ("a clairvoyant one's there, least", "-", Number(possible, "ratio", "simulated")),
    ]  # fmt: skip
    return Table("Targets", ("what", "wanted", "reached"), tuple(rows),
                 "The best fixed placement is chosen with the whole trace known; so is the clairvoyant re-placement, "
                 "which pays for its moves what the online one pays.")  # fmt: skip


def table(kind: str, outcomes: Sequence[TraceResult]) -> Table:
    """One row a trace: seconds of each way of placing the stream, gains and moves."""
    rows: list[tuple[Cell, ...]] = []
    for o in outcomes:
        gain, possible = o.best_fixed_s - o.online_s, o.best_fixed_s - o.clairvoyant_s
        rows.append((
            o.trace, Number(o.varies, "ratio", "measured" if kind == "recorded" else "simulated"),
            *(Number(s, "s", "simulated") for s in (o.best_fixed_s, max(o.fixed_s), o.online_s, o.clairvoyant_s)),
            Number(o.best_fixed_s / o.clairvoyant_s, "ratio", "simulated"),
            Number(gain / possible if possible > 1e-3 * o.best_fixed_s else None, "share", "simulated"),
            Number(o.moves, "count", "simulated"),
        ))  # fmt: skip
    columns = ("trace", "varies", "best fixed", "worst fixed", "re-placed", "clairvoyant", "its gain", "of it", "moves")
    return Table(f"Time of the stream, {kind} traces", columns, tuple(rows))


def _plot(outcomes: Sequence[TraceResult]) -> Figure:
    figure = Figure(figsize=(7, 0.35 * len(outcomes) + 1.2), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(outcomes))
    for label, values, marker in (
        ("re-placed", [o.online_s / o.best_fixed_s for o in outcomes], "o"),
        ("clairvoyant", [o.clairvoyant_s / o.best_fixed_s for o in outcomes], "|"),
    ):
        axes.plot(values, at, marker, label=label, markersize=9)
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.set_yticks(at, [o.trace[:28] for o in outcomes])
    axes.set_xlabel("time over the best fixed placement")
    axes.invert_yaxis()
    axes.legend()
    return figure
