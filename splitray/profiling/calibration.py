"""`splitray profile`: short runs of two random llamas that tell the numbers of the cost model apart.

The probes run the engine itself, because only that reads weights and wakes devices as the engine does. A wide and a
narrow model, half of the layers on each of two devices, give a rate and a fixed cost for each sub-block. The wide one
whole on every device at once gives what sharing a memory costs. A hop is timed between devices that read weights in
turn: the receiver waits as it does in a run (runtime/wire/waits.py), with caches that have seen other things.

One device alone is no base for the others: it computes a tenth faster than two that take turns (16.0 against 17.4-17.9
ms a token, whether they hand over 2 or 24 times), so it is predicted too slow by as much.

This is for machines whose devices are processes; all of them are taken to be alike, so one stands for each.
"""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from splitray.arch import ModelArch
from splitray.cost import load_of
from splitray.errors import InputError
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.profile import CoreSpeed, LinkSpeed, Profile
from splitray.profiling.machine import cache_bytes, machine
from splitray.profiling.random_llama import RandomLlama
from splitray.runtime.engine.engine import Engine
from splitray.runtime.fleet import Fleet
from splitray.runtime.kept_fleet import KeptFleet
from splitray.runtime.launch import read_model
from splitray.runtime.sampling import Sampling
from splitray.runtime.timing import echo, hops, speeds
from splitray.scratch import scratch_folder
from splitray.topology import DeviceId, FormatSpeed, Topology
from splitray.weight_formats import AUTO_WEIGHTS, as_format

PROMPT = tuple(5 + i % 90 for i in range(16))
MOST_DEVICES = 16
ROUNDS = 5
FORMATS_PROFILED = ("bfloat16", "int8", "int4", "int4/128")
_WIDE_LAYER_BYTES = 4 * 768 * (4 * 768 + 3 * 2048)
_NEW_TOKENS, _FIRST = 24, 2  # the first tokens of a run find cold caches
_RUNS, _LONG_PROMPT = 3, tuple(5 + i % 300 for i in range(256))
_PING_BYTES, _PINGS, _LARGE, _HOPS = 4 * 768, 1000, 50, 150


def calibrate(
    num_devices: int = 2,
    *,
    rounds: int = ROUNDS,
    like: ModelArch | None = None,
    formats: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Measure this machine as `num_devices` device processes; half a minute, on an otherwise idle machine.

    Each of the `formats` of weights takes a quarter of a minute more.

    `like` is a llama-like model for which the profile is meant. The probes of the `rounds` then have its shape, so that
    weights which fit into a cache are read from there; without, they are so large that weights come from memory.

    Raises:
        InputError: fewer than one device, or more than `MOST_DEVICES`.
        DeviceLost: a device did not come up or died.
    """
    if not 1 <= num_devices <= MOST_DEVICES:
        expected = f"1 to {MOST_DEVICES} devices on this machine"
        raise InputError("devices", expected=expected, actual=num_devices, remedy="give a number of devices that fits")
    topology = Topology.uniform(num_devices)
    with scratch_folder() as folder, KeptFleet(topology.devices) as fleet:
        progress("writing random weights")
        calibration = Calibration(fleet, topology, folder, like=like)
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            calibration.round()
        for weights in formats:
            progress(f"weights in {weights}")
            calibration.round_in(weights)
        return calibration.profile()


class Model:
    """A checkpoint that was read, ready for engines of a fleet."""

    def __init__(
        self, path: Path, topology: Topology, fleet: Fleet | None = None, *, weights: str = AUTO_WEIGHTS
    ) -> None:
        """Read and test the folder of a model; without a fleet, `start` is given one each time."""
        self.path, self.fleet, self.topology = path, fleet, topology
        self.arch, self.layout, self.lean = read_model(path, weights=weights)

    def start(self, placement: Placement, fleet: Fleet | None = None) -> Engine:
        """An engine of this placement."""
        used = fleet or self.fleet
        assert used is not None, "a fleet is given here or there"
        return Engine(
            fleet=used, model_path=self.path, arch=self.arch, layout=self.layout, topology=self.topology,
            placement=placement, lean=self.lean,
        )  # fmt: skip

    def token_s(self, placement: Placement, *, new_tokens: int = _NEW_TOKENS) -> float:
        """Time of a later token: the median of one run."""
        with self.start(placement) as engine:
            return token_s(engine, new_tokens)


def token_s(engine: Engine, new_tokens: int = _NEW_TOKENS) -> float:
    """Time of a later token of an engine: the median of one run."""
    arrivals = [time.perf_counter() for _ in engine.stream(list(PROMPT), Sampling(max_new_tokens=new_tokens))]
    return statistics.median(np.diff(arrivals)[_FIRST:].tolist())


class Calibration:
    """Probe runs of a fleet, in rounds: a shared machine's speed drifts within a minute, so each round sees it all."""

    def __init__(self, fleet: Fleet, topology: Topology, folder: Path, *, like: ModelArch | None = None) -> None:
        """Write the two models. Without `like` the wide one does not fit into the cache, several times over."""
        self.topology = topology
        if like is None:
            self.cold_bytes = 4 * cache_bytes()
            layers = min(24, max(12, -(-self.cold_bytes // _WIDE_LAYER_BYTES)))
            wide = RandomLlama(
                name="wide", layers=layers, hidden=768, heads=12, kv_heads=12, ffn=2048, vocab=512, tied=False
            )
            narrow = RandomLlama(
                name="narrow", layers=24, hidden=768, heads=2, kv_heads=2, ffn=256, vocab=512, tied=False, head_dim=64
            )
        else:
            self.cold_bytes = like.model_bytes // len(topology.ids)
            wide = RandomLlama(
                name="wide", layers=like.num_layers, hidden=like.hidden_dim, heads=like.num_heads,
                kv_heads=like.num_kv_heads, ffn=like.ffn_dim, vocab=like.vocab, tied=like.tied_embeddings,
                head_dim=like.head_dim,
            )  # fmt: skip
            narrow = replace(wide, name="narrow", layers=2 * like.num_layers, heads=like.heads_per_group, kv_heads=1,
                             ffn=max(1, like.ffn_dim // 8), vocab=max(64, like.vocab // 8))  # fmt: skip
        self.wide, self.narrow = (Model(m.write(folder), topology, fleet) for m in (wide, narrow))
        self.rounds: list[dict[str, float]] = []
        self.rounds_in: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.cores: list[CoreSpeed] = []
        self.links: dict[tuple[int, int], LinkSpeed] = {}

    def round(self) -> None:
        """Run each probe, and at first the small measurements of cores and links."""
        if not self.cores:
            self._cores_and_links()
        ids = self.topology.ids
        times = {"narrow": self.narrow.token_s(in_turn(self.narrow.arch, ids[:2]))}
        wide = [self.wide.token_s(in_turn(self.wide.arch, ids[:2]))]
        if len(ids) > 1:
            with self.wide.start(everywhere(self.wide.arch, ids)) as engine:
                times["copies"] = token_s(engine)
                one_way = hops(engine, ids[0], ids[1], size=_PING_BYTES, rounds=_HOPS, cold_bytes=self.cold_bytes)
            times["hop"] = statistics.median(one_way)
            wide.append(self.wide.token_s(in_turn(self.wide.arch, ids[:2])))
        times["wide"] = statistics.fmean(wide)  # before and after what it is subtracted from
        self.rounds.append(times)

    def round_in(self, weights: str) -> None:
        """Run the probes with weights in a format: both models in turn, copies, a prompt."""
        ids, runs = self.topology.ids, range(_RUNS)
        wide, narrow = (self._in(weights, m) for m in (self.wide, self.narrow))
        times: dict[str, float] = {}
        with narrow.start(in_turn(narrow.arch, ids[:2])) as engine:
            times["narrow"] = statistics.median(token_s(engine) for _ in runs)
        with wide.start(in_turn(wide.arch, ids[:2])) as engine:
            times["wide"] = statistics.median(token_s(engine) for _ in runs)
            list(engine.stream(list(_LONG_PROMPT), Sampling(max_new_tokens=1)))
            assert engine.report is not None, "it ran"
            times["prompt"] = engine.report.ttft_s
        if len(ids) > 1:
            with wide.start(everywhere(wide.arch, ids)) as engine:
                times["copies"] = statistics.median(token_s(engine) for _ in runs)
        self.rounds_in[weights].append(times)

    def _in(self, weights: str, model: Model) -> Model:
        return Model(model.path, self.topology, model.fleet, weights=weights)

    def _speed(self, weights: str, hop_s: float) -> FormatSpeed:
        rounds, others = self.rounds_in[weights], len(self.topology.ids) - 1
        middle = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        wide, narrow = (self._in(weights, m) for m in (self.wide, self.narrow))
        launch_s, s_per_byte = self._line(wide, narrow, *(middle[n] - 2 * hop_s for n in ("wide", "narrow")))
        each = as_format(weights).resident_bits / 8
        shared = None
        if others:
            more_s = max(0.0, middle["copies"] - (middle["wide"] - 2 * hop_s))
            shared = 1 / (s_per_byte + more_s / others / self._work(wide)[1]) / each
        load = load_of(in_turn(wide.arch, self.topology.ids[:2]), wide.arch, self.topology)
        prompt = len(_LONG_PROMPT) * float(load.flops.sum()) / 2 / middle["prompt"]
        return FormatSpeed(name=weights, weights_per_s=1 / s_per_byte / each, shared_weights_per_s=shared,
                           prompt_weights_per_s=prompt, launch_s=launch_s)  # fmt: skip

    def _cores_and_links(self) -> None:
        ids = self.topology.ids
        with self.narrow.start(partitioned(self.narrow.arch, ids)) as engine:
            self.cores = [CoreSpeed(**speeds(engine, d, cold_bytes=self.cold_bytes)) for d in ids]
            for a, b in itertools.combinations(range(len(ids)), 2):
                ping = statistics.median(echo(engine, ids[a], ids[b], size=_PING_BYTES, rounds=_PINGS))
                large = statistics.median(echo(engine, ids[a], ids[b], size=1 << 20, rounds=_LARGE))
                self.links[a, b] = LinkSpeed(ping_s=ping, mebibyte_s=large / 2)

    def profile(self) -> Profile:
        """The profile that the rounds so far make; differences are taken within a round."""
        assert self.rounds, "a profile needs a round"
        middle = {name: statistics.median(r[name] for r in self.rounds) for name in self.rounds[0]}
        others, hop_s, more_s = len(self.topology.ids) - 1, 0.0, 0.0
        if others:
            hop_s = middle["hop"]
            more_s = max(0.0, statistics.median(r["copies"] - r["wide"] for r in self.rounds) + 2 * hop_s)
        launch_s, s_per_byte = self._line(
            self.wide, self.narrow, *(middle[name] - 2 * hop_s for name in ("wide", "narrow"))
        )
        shared = 1 / (s_per_byte + more_s / others / self._work(self.wide)[1]) if others else None
        read = 1 / s_per_byte
        return Profile(
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            memory_bytes=float(psutil.virtual_memory().total // len(self.topology.ids)),
            read_bytes_per_s=read,
            shared_bytes_per_s=None if shared is None else min(shared, read),
            launch_s=launch_s,
            hop_s=hop_s,
            hop_bytes=_PING_BYTES,
            cores=self.cores,
            links=self.links,
            formats=[self._speed(weights, hop_s) for weights in self.rounds_in],
        )

    def _line(self, wide: Model, narrow: Model, wide_s: float, narrow_s: float) -> tuple[float, float]:
        """Fixed cost of a sub-block and time of a byte, of which both runs consist."""
        (wide_blocks, wide_bytes), (narrow_blocks, narrow_bytes) = self._work(wide), self._work(narrow)
        matrix = np.array([[wide_blocks, wide_bytes], [narrow_blocks, narrow_bytes]])
        launch_s, s_per_byte = map(float, np.linalg.solve(matrix, [wide_s, narrow_s]))
        if launch_s < 0 or s_per_byte <= 0:  # noise only: then all of the wide run is reading
            return 0.0, wide_s / wide_bytes
        return launch_s, s_per_byte

    def _work(self, model: Model) -> tuple[float, float]:
        """Sub-blocks and bytes of a token, at the middle of a run."""
        load = load_of(in_turn(model.arch, self.topology.ids[:2]), model.arch, self.topology)
        context = len(PROMPT) + _NEW_TOKENS / 2
        return float(load.launches.sum()), float((load.weight_bytes + load.kv_bytes * context).sum())


def in_turn(arch: ModelArch, ids: Sequence[DeviceId]) -> Placement:
    """The later half of the layers on the second of two devices (if there is one): two hops."""
    a, b = ids[0], ids[-1]
    owners = [a if i < arch.num_layers // 2 else b for i in range(arch.num_layers)]
    layers = tuple(LayerPlacement(Shares.whole(arch.num_kv_heads, d), Shares.whole(arch.ffn_dim, d)) for d in owners)
    return Placement(layers, (a,), Shares.whole(arch.vocab, a))


def everywhere(arch: ModelArch, ids: Sequence[DeviceId]) -> Placement:
    """All layers on each of the devices, the ends on the first one."""
    layer = LayerPlacement(Shares.whole(arch.num_kv_heads, *ids), Shares.whole(arch.ffn_dim, *ids))
    return Placement((layer,) * arch.num_layers, (ids[0],), Shares.whole(arch.vocab, ids[0]))


def partitioned(arch: ModelArch, ids: Sequence[DeviceId]) -> Placement:
    """FFN columns over all devices, so that each pair has a connection."""
    edges = [round(i * arch.ffn_dim / len(ids)) for i in range(len(ids) + 1)]
    columns = Shares.of({d: [(edges[i], edges[i + 1])] for i, d in enumerate(ids)})
    layer = LayerPlacement(Shares.whole(arch.num_kv_heads, ids[0]), columns)
    return Placement((layer,) * arch.num_layers, (ids[0],), Shares.whole(arch.vocab, ids[0]))
