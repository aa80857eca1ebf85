"""Devices that hold weights in formats of their own: what is counted, what is refused, and which tokens come."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import family_config, family_model
from splits import slow_devices, split, threads_of

from splitray.arch import ModelArch, held_by
from splitray.errors import InputError, PlacementError, TopologyError
from splitray.migration import diff, reformatted
from splitray.model.reading import read_arch
from splitray.placement import LayerPlacement, Placement, Shares, validate, weight_bytes
from splitray.planners import make_planner
from splitray.planners.memory import needed_bytes
from splitray.planners.optimum.space import Space
from splitray.planners.protocol import ClusterState
from splitray.runtime.device_formats import on_devices
from splitray.runtime.engine.heirs import inherited
from splitray.runtime.engine.policy import Recovery, without
from splitray.runtime.model_arch import read_model_arch
from splitray.runtime.sampling import Sampling
from splitray.topology import DeviceId, Topology, parse_topology

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
GREEDY = Sampling(max_new_tokens=24)
MIXED = {"edge0": "int4", "cloud0": "int4", "cloud1": "float32"}
EDGE, CLOUD, PLAIN = map(DeviceId, MIXED)


def topology(weights: dict[str, str] = MIXED, memory_bytes: float = 1e12) -> Topology:
    where = Topology.uniform(len(weights), memory_bytes=memory_bytes)
    return replace(where, devices=tuple(replace(d, weights=weights[d.id]) for d in where.devices))


def arch_of(family: str, weights: dict[str, str] = MIXED) -> ModelArch:
    return held_by(read_arch(family_config(family))[0], weights)


def placed(arch: ModelArch, first: str, second: str, ends: str) -> Placement:
    """The first layer, the others, and both ends each whole on a device."""

    def layer(device: str) -> LayerPlacement:
        return LayerPlacement(Shares.whole(arch.num_kv_heads, device), Shares.whole(arch.ffn_dim, device))

    others = (layer(second),) * (arch.num_layers - 1)
    return Placement((layer(first), *others), (DeviceId(ends),), Shares.whole(arch.vocab, ends))


def test_a_topology_names_the_formats_of_devices() -> None:
    device = {"id": "pi", "tier": "edge", "catalog": "raspberry-pi-5", "weights": "int4/128"}
    assert parse_topology({"devices": [device]}).devices[0].weights == "int4/128"
    for wrong in ("int5", "best", 4):
        with pytest.raises(TopologyError, match="weights.*one of auto, float32"):
            parse_topology({"devices": [{**device, "weights": wrong}]})


def test_each_device_counts_in_its_format() -> None:
    arch = arch_of("llama")
    assert arch.on(EDGE).weight_bytes(1000) == 900 and arch.on(PLAIN).weight_bytes(1000) == 4000
    assert arch.sums_in_blocks and arch.on(PLAIN).sums_in_blocks and arch.partial_bytes == 8
    whole = placed(arch, EDGE, EDGE, EDGE), placed(arch, PLAIN, PLAIN, PLAIN)
    held = [weight_bytes(p, arch)[d] for p, d in zip(whole, (EDGE, PLAIN), strict=True)]
    assert held[0] < 0.35 * held[1]
    moved = [m.weight_bytes for m in diff(*whole, arch, 0)]
    assert sum(moved) == pytest.approx(held[1] * 1.0, rel=0.2), "the target reads its own format"
    assert len(reformatted(*whole, arch)) == len(moved)
    assert not reformatted(whole[0], placed(arch, CLOUD, EDGE, CLOUD), arch)


def test_one_format_on_all_devices_is_that_of_the_run() -> None:
    plain = read_arch(family_config("llama"))[0]
    assert held_by(plain, dict.fromkeys(MIXED, "int4")) == replace(plain, weights="int4")
    named = on_devices(plain, topology({"edge0": "auto", "cloud0": "int8"}), "float32", lambda: "bfloat16")
    assert dict(named.device_weights) == {"edge0": "bfloat16", "cloud0": "int8"}


def test_few_bits_beside_a_gpu_are_refused_there() -> None:
    plain, where = read_arch(family_config("llama"))[0], Topology.uniform(2)
    where = replace(where, devices=(where.devices[0], replace(where.devices[1], torch_device="cuda")))
    assert dict(on_devices(plain, where, "auto", lambda: "bfloat16").device_weights)["cloud0"] == "float32"
    with pytest.raises(InputError, match="cloud0: weights int4.*torch_device: cpu"):
        on_devices(plain, where, "int4", lambda: "bfloat16")


def test_a_plan_takes_the_formats_of_its_topology() -> None:
    where = parse_topology({"devices": [
        {"id": "pi", "tier": "edge", "catalog": "raspberry-pi-5", "weights": "int4"},
        {"id": "gpu", "tier": "cloud", "catalog": "a100-80gb"},
    ]})  # fmt: skip
    arch = read_model_arch("llama-13b", topology=where)
    assert dict(arch.device_weights) == {"pi": "int4", "gpu": "bfloat16"}
    with pytest.raises(InputError, match="--dtype float32"):
        read_model_arch("llama-13b", dtype="bfloat16", topology=where)


def test_copies_in_two_formats_are_refused() -> None:
    arch, where = arch_of("llama"), topology()
    good = placed(arch, EDGE, CLOUD, EDGE)
    for device, fine in ((CLOUD, True), (PLAIN, False)):
        copied = LayerPlacement(Shares.whole(arch.num_kv_heads, EDGE, device), good.layers[0].ffn)
        for placement, what in (
            (replace(good, layers=(copied, *good.layers[1:])), "layer 0 attention"),
            (replace(good, embedding=(EDGE, device)), "embedding"),
        ):
            if fine:
                validate(placement, arch, where)
            else:
                with pytest.raises(PlacementError, match=f"{what}.*one format.*int4.*float32"):
                    validate(placement, arch, where)


def test_cuts_are_those_of_the_largest_groups() -> None:
    plain = replace(read_arch(family_config("llama"))[0], ffn_dim=4096)
    arch = held_by(plain, {"edge0": "int4/128", "cloud0": "int8"})
    assert set(arch.ffn_cuts) == set(held_by(plain, {"edge0": "int4/128"}).ffn_cuts)
    good = placed(arch, EDGE, EDGE, EDGE)
    inside = LayerPlacement(good.layers[0].attention, Shares.of({EDGE: [(0, 32)], CLOUD: [(32, 4096)]}))
    with pytest.raises(PlacementError, match="layer 0 ffn.*int8, int4/128 weights are rounded group by group"):
        validate(
            replace(good, layers=(inside, *good.layers[1:])), arch, topology({"edge0": "int4/128", "cloud0": "int8"})
        )


@pytest.mark.parametrize(
    "planner", ["even", "proportional", "tensor_parallel", "layer_cut", "layer_dp", "greedy", "round_robin", "myopic",
                "random", "drift_plus_penalty", "exact"],
)  # fmt: skip
def test_planners_count_each_device_in_its_format(planner: str) -> None:
    base = replace(
        arch_of("llama", dict.fromkeys(MIXED, "float32")), num_layers=4, hidden_dim=512, ffn_dim=1024, vocab=2048
    )
    arch, where = held_by(base, MIXED), topology()
    whole = weight_bytes(placed(arch, EDGE, EDGE, EDGE), arch)[EDGE]
    # the model fits into the two small devices in few bits only
    where = replace(
        where, devices=tuple(replace(d, memory_bytes=0.7 * whole if d.id != PLAIN else 6e6) for d in where.devices)
    )
    state = ClusterState(arch=arch, topology=where)
    if planner == "even":
        with pytest.raises(PlacementError, match="memory of cloud1"):
            make_planner(planner).propose(state)
        return
    placement = make_planner(planner).propose(state)
    assert all(n <= where.device(d).memory_bytes for d, n in needed_bytes(placement, state).items())
    space = Space(state)
    path = space.path_of(placement)
    if path is not None:
        for kind, (_, counts) in zip(space.kinds, path[0], strict=True):
            assert len(space.pieces(kind)) == len(counts)


@pytest.mark.parametrize("planner", ["myopic:max", "myopic:as_coded", "splitwise"])
def test_planners_that_count_all_pieces_alike_refuse_formats_of_devices(planner: str) -> None:
    state = ClusterState(arch=arch_of("llama"), topology=topology())
    with pytest.raises(PlacementError, match="one format of weights on all devices.*got int4, float32.*use exact"):
        make_planner(planner).propose(state)


def tokens_of(family: str, placement: Placement, weights: dict[str, str] = MIXED) -> list[int]:
    with split(family_model(family), topology=topology(weights), placement=placement) as engine:
        found = list(engine.stream(PROMPT, GREEDY))
        held = {DeviceId(d): s["weight_bytes"] for d, s in engine.stats().items() if s["weight_bytes"]}
        assert held.keys() == weight_bytes(placement, engine.arch).keys()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pieces_that_stay_in_their_format_give_the_same_tokens(family: str) -> None:
    arch = arch_of(family)
    runs = [tokens_of(family, placed(arch, a, PLAIN, b)) for a, b in ((EDGE, EDGE), (CLOUD, EDGE), (CLOUD, CLOUD))]
    halves = Shares.of({EDGE: [(0, 1)], CLOUD: [(1, arch.num_kv_heads)]})
    columns = Shares.of({CLOUD: [(0, arch.ffn_cuts[1])], EDGE: [(arch.ffn_cuts[1], arch.ffn_dim)]})
    shared = placed(arch, EDGE, PLAIN, EDGE)
    shared = replace(shared, layers=(LayerPlacement(halves, columns), *shared.layers[1:]))
    assert all(run == runs[0] for run in [*runs, tokens_of(family, shared)])


def test_a_sub_block_may_be_shared_by_formats() -> None:
    arch = arch_of("llama")
    good = placed(arch, EDGE, CLOUD, EDGE)
    halves = LayerPlacement(
        Shares.of({EDGE: [(0, 1)], PLAIN: [(1, arch.num_kv_heads)]}), Shares.of({EDGE: [(0, 16)], PLAIN: [(16, 40)]})
    )
    assert len(tokens_of("llama", replace(good, layers=(halves, *good.layers[1:])))) == GREEDY.max_new_tokens


def test_a_session_keeps_its_formats_while_placements_change(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = arch_of("llama")
    first, alike, other = (placed(arch, d, PLAIN, EDGE) for d in (EDGE, CLOUD, PLAIN))
    still = tokens_of("llama", first)
    slow_devices(monkeypatch, 0.01)
    with split(family_model("llama"), topology=topology(), placement=first, recovery=Recovery()) as engine:
        found = []
        for i, token in enumerate(engine.stream(PROMPT, GREEDY)):
            found.append(token)
            if i == 3:
                with pytest.raises(PlacementError, match="layer 0 attention on cloud1.*a session's pieces keep"):
                    engine.migrate(other)
                moved = engine.migrate(alike)
        assert found == still and moved.done.wait(20) and moved.error is None
        later = engine.migrate(other)
        assert later.done.wait(20) and later.error is None and engine.placement == other


def test_what_is_lost_goes_to_a_device_of_its_format() -> None:
    arch, where = arch_of("llama"), topology()
    running = placed(arch, EDGE, PLAIN, CLOUD)
    assert inherited(running, arch, without(where, [CLOUD])) == placed(arch, EDGE, PLAIN, EDGE)
    with pytest.raises(PlacementError, match="pieces of cloud1.*float32.*edge0 in int4"):
        inherited(running, arch, without(where, [PLAIN]))
    small = topology(memory_bytes=1e3)
    with pytest.raises(PlacementError, match="pieces of cloud0.*room on a device that holds int4"):
        inherited(running, arch, without(small, [CLOUD]))


def test_a_session_goes_on_in_its_formats_when_a_device_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = arch_of("llama")
    first = placed(arch, EDGE, PLAIN, CLOUD)
    still = tokens_of("llama", first)
    slow_devices(monkeypatch, 0.01)
    recovery = Recovery(replan=lambda left, _: placed(arch, PLAIN, PLAIN, PLAIN), fail_back=False, restarts=0)
    with split(family_model("llama"), topology=topology(), placement=first, recovery=recovery) as engine:
        found = []
        for i, token in enumerate(engine.stream(PROMPT, GREEDY)):
            found.append(token)
            if i == 3:
                threads_of(engine).kill(CLOUD)
        assert found == still and engine.placement == placed(arch, EDGE, PLAIN, EDGE)
