"""The papers' cost forms: each erratum with the number it gives and the right one; what the corrected forms equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.cost import CostModel, load_of, memory_bytes, work_s
from splitray.errors import ModelError, TopologyError
from splitray.migration import delay_s, diff
from splitray.papers import chen, kafetzis
from splitray.papers.kafetzis import (
    AS_CODED,
    CORRECTED,
    BlockAssignment,
    KafetzisErrata,
    inference_s,
    layer_blocks,
    migration_s,
)
from splitray.papers.splitwise_drl import LayerSplit, Sides
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.topology import Device, DeviceId, Link, Topology

A, B, C = map(DeviceId, ("a", "b", "c"))
EDGE, CLOUD = DeviceId("edge"), DeviceId("cloud")
# 8 heads of 64 in float32 with two maps of 4 D: SMALL of the released simulator.
SMALL = ModelArch(
    name="small", num_layers=1, num_heads=8, num_kv_heads=8, head_dim=64, hidden_dim=512, ffn_dim=2048, vocab=1000,
    context_tokens=512, ffn_matrices=2,
)  # fmt: skip
LARGE = replace(SMALL, name="large", num_heads=32, num_kv_heads=32, hidden_dim=2048, ffn_dim=8192)
LLAMA_7B = ModelArch(
    name="llama-7b", num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, hidden_dim=4096, ffn_dim=11008,
    vocab=32000, context_tokens=4096, dtype="float16",
)  # fmt: skip
LLAMA_3_8B = replace(LLAMA_7B, name="llama-3-8b", num_kv_heads=8, ffn_dim=14336, vocab=128256)
GPT2_XL = ModelArch(
    name="gpt2-xl", num_layers=48, num_heads=25, num_kv_heads=25, head_dim=64, hidden_dim=1600, ffn_dim=6400,
    vocab=50257, context_tokens=1024, ffn_matrices=2, tied_embeddings=True, dtype="float16",
)  # fmt: skip
LLAMA_13B = replace(
    LLAMA_7B, name="llama-13b", num_layers=40, num_heads=40, num_kv_heads=40, hidden_dim=5120, ffn_dim=13824
)
VECTORS = {  # docs/equations.md E1.T: weights of a query head and of an FFN
    "gpt2-xl": (GPT2_XL, 409_600, 20_480_000),
    "llama-7b": (LLAMA_7B, 2_097_152, 135_266_304),
    "llama-13b": (LLAMA_13B, 2_621_440, 212_336_640),
    "llama-3-8b": (LLAMA_3_8B, 1_310_720, 176_160_768),
}


def cluster(*ids: DeviceId, flops: float = 1e6, rate: float = 1e6, rtt_s: float = 0.0) -> Topology:
    """Equal devices and links; the first is the origin."""
    devices = tuple(
        Device(id=d, tier="edge", memory_bytes=1e12, compute_flops=flops, memory_bandwidth_bytes_per_s=1e9) for d in ids
    )
    links = tuple(Link(source=a, target=b, bandwidth_bytes_per_s=rate, rtt_s=rtt_s) for a in ids for b in ids if a != b)
    return Topology(devices=devices, links=links, origin=ids[0])


# Kafetzis et al.


def test_all_errata_together_give_the_formulas_of_the_released_code() -> None:
    s, g, d, width, b = 16, 3, 64, 512, 4
    blocks = layer_blocks(SMALL, context_tokens=s, generated_tokens=g, errata=AS_CODED)
    assert blocks.head.memory_bytes == 3 * s * d * b + 3 * width * d * b + g * width * b == 405_504 + 6144
    assert blocks.head.operations == 3 * s * width * d + s * s * d == 1_589_248
    assert (blocks.projection.memory_bytes, blocks.ffn.memory_bytes) == (32_768, 131_072)  # s D b and 4 s D b
    assert blocks.projection.operations == s * width**2 == 4_194_304
    assert blocks.ffn.operations == pytest.approx(0.8 * s * width**2)
    assert (blocks.head.output_bytes, blocks.projection.output_bytes) == (s * d * b, s * width * b)


def test_e1_the_cache_of_a_head_is_sixteen_times_too_large_and_forgets_the_prompt() -> None:
    def cache(context: int, generated: int, errata: KafetzisErrata) -> float:
        blocks = layer_blocks(LARGE, context_tokens=context, generated_tokens=generated, errata=errata)
        return blocks.head.cache_bytes

    coded, right = KafetzisErrata.CACHE_SIZE, CORRECTED
    assert cache(101, 1, coded) - cache(100, 0, coded) == 8192  # D b
    assert cache(101, 1, right) - cache(100, 0, right) == 512  # 2 d b
    assert (cache(100, 0, coded), cache(100, 0, right)) == (0, 51_200)


def test_e2_the_ffn_takes_a_tenth_of_its_operations() -> None:
    coded, right = (layer_blocks(SMALL, context_tokens=16, errata=e).ffn for e in (KafetzisErrata.FFN_TENTH, CORRECTED))
    assert right.operations == 2 * 8 * 512**2 == 4_194_304
    assert coded.operations == pytest.approx(419_430.4)


def test_e3_gigabytes_over_gigabits_are_eight_times_too_quick() -> None:
    where = cluster(A, B, rate=1e9 / 8)  # 1 Gbit/s
    assert kafetzis.transfer_s(where, A, B, 1e9) == pytest.approx(8.0)
    assert kafetzis.transfer_s(where, A, B, 1e9, errata=KafetzisErrata.GIGABITS) == pytest.approx(1.0)


def test_e4_projection_and_ffn_weigh_next_to_nothing() -> None:
    coded, right = (layer_blocks(SMALL, context_tokens=16, errata=e) for e in (KafetzisErrata.NO_WEIGHTS, CORRECTED))
    assert (right.projection.memory_bytes, right.ffn.memory_bytes) == (4 * 512**2 + 2048, 4 * 8 * 512**2 + 8192)
    assert (coded.projection.memory_bytes, coded.ffn.memory_bytes) == (2048, 8192)  # activations of one token
    assert coded.ffn.memory_bytes < coded.head.memory_bytes < right.ffn.memory_bytes


def test_e5_a_token_costs_the_square_of_the_context_without_the_cache() -> None:
    def operations(context: int, errata: KafetzisErrata) -> float:
        return layer_blocks(SMALL, context_tokens=context, errata=errata).head.operations

    assert operations(1000, CORRECTED) == 2 * (3 * 512 * 64 + 2 * 1000 * 64) == 452_608
    assert operations(1000, KafetzisErrata.RECOMPUTE) == 1000 * 452_608
    assert operations(2000, CORRECTED) - operations(1000, CORRECTED) == 256_000  # linear
    slope = operations(2000, KafetzisErrata.RECOMPUTE) - operations(1000, KafetzisErrata.RECOMPUTE)
    assert slope == 1000 * (2 * 3 * 512 * 64) + 3 * 256_000_000


def test_e6_a_move_of_a_head_costs_nothing_in_the_code() -> None:
    blocks = layer_blocks(SMALL, context_tokens=100)
    before, after = (BlockAssignment((d,) * 8, A, A) for d in (A, B))
    where = cluster(A, B, rate=1e6)
    one = (4 * 3 * 512 * 64 + 4 * 3 * 64 + 4 * 2 * 100 * 64) / 1e6  # weights, activations, K and V
    assert migration_s(before, after, blocks, where) == pytest.approx(8 * one) == pytest.approx(3.561_472)
    assert migration_s(before, after, blocks, where, errata=KafetzisErrata.FREE_MIGRATION) == 0.0


def test_e7_the_source_may_hold_nothing_in_the_code() -> None:
    where = cluster(A, B, C)
    assert kafetzis.hosts(where) == (A, B, C)
    assert kafetzis.hosts(where, KafetzisErrata.SOURCE_BAN) == (B, C)


def test_a_multiply_add_counts_once_in_the_code_on_devices_rated_in_flops() -> None:
    coded, right = (layer_blocks(SMALL, context_tokens=16, errata=e) for e in (KafetzisErrata.MULTIPLY_ADDS, CORRECTED))
    assert (right.projection.operations, coded.projection.operations) == (524_288, 262_144)


def test_the_weighted_sum_of_values_is_missing_in_the_code() -> None:
    def operations(errata: KafetzisErrata) -> float:
        wide, none = (layer_blocks(SMALL, context_tokens=c, errata=errata) for c in (1000, 0))
        return wide.head.operations - none.head.operations

    assert (operations(CORRECTED), operations(KafetzisErrata.NO_WEIGHTED_SUM)) == (4 * 1000 * 64, 2 * 1000 * 64)


def spread() -> BlockAssignment:
    """Four heads on A, three on B, one on C; projection on B, FFN on C."""
    return BlockAssignment((A, A, A, A, B, B, B, C), B, C)


def test_the_code_leaves_out_the_broadcast_to_the_heads_and_the_way_back() -> None:
    where, blocks = cluster(A, B, C), layer_blocks(SMALL, context_tokens=16)
    full, coded = (
        inference_s([spread()], blocks, where, mode="max", errata=e) for e in (CORRECTED, KafetzisErrata.NO_BROADCASTS)
    )
    heads = 4 * 2 * (3 * 512 * 64 + 2 * 16 * 64) / 1e6
    there = 4 * 256 / 1e6  # A's four outputs of 64 floats
    rest = (2 * 512**2 + 2 * 8 * 512**2) / 1e6 + 2048 / 1e6
    assert coded == pytest.approx(heads + there + rest)
    assert full - coded == pytest.approx(2 * 2048 / 1e6)  # to B and C side by side, back from C


def test_transfers_of_a_phase_add_up_or_overlap() -> None:
    where, blocks = cluster(A, B, C), layer_blocks(SMALL, context_tokens=16)
    total, longest = (inference_s([spread()], blocks, where, mode=m) for m in ("sum", "max"))
    assert total - longest == pytest.approx((2048 + 256) / 1e6)  # the second broadcast, and C's one head


def test_the_code_knows_no_latency() -> None:
    blocks = layer_blocks(SMALL, context_tokens=16)
    full, coded = (
        inference_s([spread()], blocks, cluster(A, B, C, rtt_s=0.02), mode="max", errata=e)
        for e in (CORRECTED, KafetzisErrata.NO_LATENCY)
    )
    assert full - coded == pytest.approx(4 * 0.01)  # to the heads, the projection, the FFN and back


def test_layers_in_a_row_start_where_the_last_ffn_ended() -> None:
    blocks = layer_blocks(SMALL, context_tokens=16)
    where = cluster(A, B, rtt_s=0.02)
    on_b = BlockAssignment((B,) * 8, B, B)
    once, twice = (inference_s([on_b] * n, blocks, where) for n in (1, 2))
    assert once == pytest.approx(twice / 2 + 0.01 + 2048 / 1e6)  # there and back once, however many layers


def test_migration_is_serial_or_parallel_by_link() -> None:
    blocks, where = layer_blocks(SMALL, context_tokens=100), cluster(A, B, C)
    before, after = BlockAssignment((A,) * 8, A, A), BlockAssignment((A,) * 5 + (B, B, C), A, A)
    serial, parallel = (migration_s(before, after, blocks, where, order=o) for o in ("serial", "parallel"))
    assert serial / parallel == pytest.approx(3 / 2)
    errata = KafetzisErrata.GIGABITS | KafetzisErrata.NO_LATENCY
    assert migration_s(before, after, blocks, where, errata=errata) == pytest.approx(parallel / 8)


@pytest.mark.parametrize(("arch", "head", "ffn"), VECTORS.values(), ids=VECTORS)
def test_corrected_blocks_have_the_vectors_of_the_specification(arch: ModelArch, head: int, ffn: int) -> None:
    blocks = layer_blocks(arch, context_tokens=100)
    group = blocks.head_with_projection(arch.num_kv_heads)
    assert group.weight_bytes == head * arch.heads_per_group * arch.dtype_bytes
    assert group.cache_bytes == 100 * arch.kv_bytes_per_token
    assert blocks.ffn.weight_bytes == ffn * arch.dtype_bytes
    assert blocks.ffn.operations == 2 * ffn
    assert group.operations == 2 * head * arch.heads_per_group + 4 * 100 * arch.heads_per_group * arch.head_dim


@pytest.mark.parametrize("arch", [SMALL, LLAMA_3_8B, GPT2_XL], ids=lambda a: a.name)
def test_corrected_blocks_of_a_layer_are_what_the_cost_model_counts(arch: ModelArch) -> None:
    """Equal but for activations, which the cost model leaves out of memory, and tables, which the paper does."""
    one, where = replace(arch, num_layers=1), cluster(A)
    layer = LayerPlacement(Shares.whole(one.num_kv_heads, A), Shares.whole(one.ffn_dim, A))
    placement = Placement((layer,), (A,), Shares.whole(one.vocab, A))
    blocks = layer_blocks(one, context_tokens=300)
    pieces = [blocks.head] * one.num_kv_heads + [blocks.projection, blocks.ffn]
    tables = memory_bytes(placement, one, 0)[A] - one.weight_bytes(
        one.num_kv_heads * one.group_params + one.ffn_dim * one.ffn_unit_params
    )
    assert sum(p.memory_bytes - p.activation_bytes for p in pieces) == memory_bytes(placement, one, 300)[A] - tables
    work = work_s(load_of(placement, one, where), CostModel(one, where).rates, context_tokens=300, time_model="flops")
    alone = BlockAssignment((A,) * one.num_kv_heads, A, A)
    assert inference_s([alone], blocks, where) == pytest.approx(work[0, 1:3, 0].sum())


def test_corrected_migration_is_that_of_the_engine_but_for_activations() -> None:
    """Weights travel in the paper; ours are staged on every device by default."""
    where = cluster(A, B)

    def placed(num_on_b: int) -> Placement:
        heads = Shares.of({A: [(0, 8 - num_on_b)], B: [(8 - num_on_b, 8)]})
        layer = LayerPlacement(heads, Shares.whole(SMALL.ffn_dim, A))
        return Placement((layer,), (A,), Shares.whole(SMALL.vocab, A))

    blocks = layer_blocks(SMALL, context_tokens=100).head_with_projection(8)
    moves = diff(placed(0), placed(3), SMALL, 100)
    assert delay_s(moves, where, staged=False) == pytest.approx(
        3 * (blocks.memory_bytes - blocks.activation_bytes) / 1e6
    )
    assert delay_s(moves, where, staged=True) == pytest.approx(3 * blocks.cache_bytes / 1e6)


def test_a_missing_link_takes_for_ever() -> None:
    where = cluster(A, B)
    assert kafetzis.transfer_s(replace(where, links=()), A, B, 1.0) == float("inf")


# Chen et al.


def test_the_printed_flops_are_the_formula_of_the_text() -> None:
    n, d, kappa = 20, 4096, 32
    printed = chen.layer_operations(LLAMA_7B, tokens=n, errata=chen.AS_PRINTED)
    assert printed == 3 * n * d**2 / kappa + 2 * n**2 * d / kappa + 9 * n * d**2


def test_e2_one_over_kappa_counts_one_head_beside_a_whole_ffn() -> None:
    share, right = (
        chen.layer_operations(GPT2_XL, tokens=1, errata=e) for e in (chen.ChenErrata.HEAD_SHARE, chen.CORRECTED)
    )
    d = 1600
    assert right == 24 * d**2 + 4 * d == 61_446_400
    assert share == 2 * (3 * d**2 / 25 + 2 * d / 25 + 9 * d**2) == 46_694_656
    assert (right - share) / right == pytest.approx(0.24, abs=1e-3)  # 3/12 of a layer, less one head's part


def test_e2_a_multiply_add_counts_once_as_printed() -> None:
    once, right = (
        chen.layer_operations(GPT2_XL, tokens=20, errata=e) for e in (chen.ChenErrata.MULTIPLY_ADDS, chen.CORRECTED)
    )
    assert right == 2 * once == 24 * 20 * 1600**2 + 4 * 20**2 * 1600


def test_the_text_counts_a_plain_mlp_for_llama_too() -> None:
    n, d = 20, 4096
    plain, right = (
        chen.layer_operations(LLAMA_7B, tokens=n, errata=e) for e in (chen.ChenErrata.PLAIN_MLP, chen.CORRECTED)
    )
    assert right == 8 * n * d**2 + 4 * n**2 * d + 6 * n * d * 11008
    assert plain == 24 * n * d**2 + 4 * n**2 * d
    assert chen.layer_operations(GPT2_XL, tokens=n, errata=chen.ChenErrata.PLAIN_MLP) == chen.layer_operations(
        GPT2_XL, tokens=n
    )


def test_e3_a_count_is_a_rate_only_if_a_step_takes_a_second() -> None:
    def rate(step_s: float, errata: chen.ChenErrata) -> float:
        return chen.ue_flops_per_s(GPT2_XL, 2, tokens=1, step_s=step_s, errata=errata)

    assert rate(0.1, chen.CORRECTED) == pytest.approx(1_228_928_000)
    assert rate(0.1, chen.ChenErrata.PER_SECOND) == 122_892_800 == rate(1.0, chen.CORRECTED)


def test_the_load_of_the_user_is_linear_in_the_layers_and_the_ratio_is_known() -> None:
    """docs/equations.md C2: printed over corrected is (3 / kappa + 9) / 24, plain MLP, one token, no attention."""
    for p in (0, 1, 10):
        printed, right = (chen.ue_operations(GPT2_XL, p, tokens=1, errata=e) for e in (chen.AS_PRINTED, chen.CORRECTED))
        assert right == p * 61_446_400
        assert printed == pytest.approx(right * (3 / 25 + 9) / 24, rel=1e-4)


@pytest.mark.parametrize("arch", [GPT2_XL, LLAMA_7B, LLAMA_3_8B], ids=lambda a: a.name)
def test_corrected_flops_are_those_of_a_prompt_in_the_cost_model(arch: ModelArch) -> None:
    one, where, n = replace(arch, num_layers=1), cluster(A), 512
    layer = LayerPlacement(Shares.whole(one.num_kv_heads, A), Shares.whole(one.ffn_dim, A))
    load = load_of(Placement((layer,), (A,), Shares.whole(one.vocab, A)), one, where)
    counted = n * (load.flops[0, 1:3].sum() + n * load.attention_flops[0, 1:3].sum())
    assert chen.layer_operations(arch, tokens=n) == counted


# Splitwise-DRL


def sides(rng: np.random.Generator | None = None, *, rtt_s: float = 0.03) -> Topology:
    rng = rng or np.random.default_rng(0)
    tiers: tuple[tuple[DeviceId, Literal["edge", "cloud"]], ...] = ((EDGE, "edge"), (CLOUD, "cloud"))
    devices = tuple(
        Device(
            id=d, tier=tier, memory_bytes=1e12, compute_flops=rng.uniform(1e11, 1e13), launch_s=rng.uniform(0, 1e-4),
            memory_bandwidth_bytes_per_s=rng.uniform(1e10, 1e12), memory_efficiency=0.7,
        )
        for d, tier in tiers
    )  # fmt: skip
    links = tuple(
        Link(source=a, target=b, bandwidth_bytes_per_s=rng.uniform(1e6, 1e8), rtt_s=rtt_s, exchange_s=1e-4)
        for a, b in ((EDGE, CLOUD), (CLOUD, EDGE))
    )
    return Topology(devices=devices, links=links, origin=EDGE)


def placed(layers: list[LayerSplit], arch: ModelArch) -> Placement:
    """Our placement of the same pieces: the embedding with the user, the head where the last FFN is."""
    found = []
    for layer in layers:
        groups = arch.num_kv_heads - layer.cloud_groups
        heads = Shares.of({EDGE: [(0, groups)], CLOUD: [(groups, arch.num_kv_heads)]})
        found.append(LayerPlacement(heads, Shares.whole(arch.ffn_dim, layer.ffn)))
    return Placement(tuple(found), (EDGE,), Shares.whole(arch.vocab, layers[-1].ffn))


def both(layers: list[LayerSplit], arch: ModelArch, where: Topology, *, context: int = 500) -> tuple[float, float]:
    """The reference with partial sums, and the engine's clocks; seconds."""
    reference = Sides(arch, where, reply="partial").token_s(layers, context_tokens=context)
    return reference, CostModel(arch, where).tpot_s(placed(layers, arch), context_tokens=context)


LAYERS = 6
LLAMA = replace(LLAMA_3_8B, num_layers=LAYERS)
MLP = replace(GPT2_XL, num_layers=LAYERS)
HERE, THERE = LayerSplit(0, "edge"), LayerSplit(8, "cloud")


@pytest.mark.parametrize("cut", range(LAYERS + 1))
def test_one_cut_takes_the_same_time_as_the_clocks(cut: int) -> None:
    """All edge, all cloud and every cut in between."""
    reference, clocks = both([HERE] * cut + [THERE] * (LAYERS - cut), LLAMA, sides())
    assert reference == pytest.approx(clocks, rel=1e-12)


@pytest.mark.parametrize("arch", [LLAMA, MLP], ids=lambda a: a.name)
@pytest.mark.parametrize("seed", range(5))
def test_mixed_heads_take_the_same_time_where_the_ffn_stays_with_the_residual(arch: ModelArch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [LayerSplit(int(rng.integers(0, arch.num_kv_heads)), "edge") for _ in range(LAYERS)]
    reference, clocks = both(layers, arch, sides(rng))
    assert reference == pytest.approx(clocks, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_engine_is_never_slower_since_partial_sums_go_straight_to_the_ffn(seed: int) -> None:
    """The forms differ where heads are mixed and the FFN is on the other side: three ways there, one for the engine."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerSplit(int(rng.integers(0, 9)), "edge" if rng.random() < 0.5 else "cloud") for _ in range(LAYERS)
    ]  # fmt: skip
    reference, clocks = both(layers, LLAMA, sides(rng))
    assert clocks <= reference * (1 + 1e-12)
    reference, clocks = both([LayerSplit(4, "cloud"), *[THERE] * (LAYERS - 1)], LLAMA, sides(rng, rtt_s=10.0))
    assert reference - clocks == pytest.approx(10.0, rel=0.1)  # two of the three ways


def test_raw_head_outputs_are_narrower_than_a_partial_sum() -> None:
    """docs/equations.md E2.2: the engine always sends the partial sum, d wide."""
    where, layers = sides(), [LayerSplit(2, "edge")] * LAYERS
    raw, partial = (Sides(LLAMA, where, reply=r).token_s(layers, context_tokens=1) for r in ("smaller", "partial"))
    rate = where.links[1].bandwidth_bytes_per_s
    assert partial - raw == pytest.approx(LAYERS * (4096 - 2 * 4 * 128) * 2 / rate)


def test_thirty_two_mixed_layers_wait_for_thirty_two_round_trips() -> None:
    """docs/equations.md E2.3: 0.96 s a token of pure latency at a round trip of 30 ms."""
    fast = tuple(
        replace(d, compute_flops=1e30, memory_bandwidth_bytes_per_s=1e30, launch_s=0.0) for d in sides().devices
    )
    links = tuple(replace(x, bandwidth_bytes_per_s=1e30, exchange_s=0.0) for x in sides().links)
    free = replace(sides(), devices=fast, links=links)
    assert Sides(LLAMA_7B, free).token_s([LayerSplit(16, "edge")] * 32, context_tokens=1) == pytest.approx(0.96)


@pytest.mark.parametrize(("arch", "first"), [(MLP, 1 / 2), (LLAMA, 2 / 3)], ids=["MLP", "SwiGLU"])
def test_w1_on_the_edge_and_w2_on_the_cloud(arch: ModelArch, first: float) -> None:
    """Mode 2 in one layer, from either side; the residual goes along only if the cloud has not got it."""
    where, d, wide = sides(), arch.hidden_dim * 2, arch.ffn_dim * 2
    where = replace(where, devices=tuple(replace(x, compute_flops=1e15) for x in where.devices))  # memory decides
    cloud = LayerSplit(arch.num_kv_heads, "cloud")
    up, down = (x.transfer_s for x in where.links)
    ffn_bytes = arch.ffn_dim * arch.ffn_unit_params * 2
    edge_s, cloud_s = (
        part * ffn_bytes / (0.7 * x.memory_bandwidth_bytes_per_s) + x.launch_s
        for part, x in zip((first, 1 - first), where.devices, strict=True)
    )
    model = Sides(arch, where)

    def tail(one: LayerSplit) -> float:  # the layer, then one on the cloud, so that both end there
        return model.token_s([one, cloud], context_tokens=1)

    whole = ffn_bytes / (0.7 * where.devices[1].memory_bandwidth_bytes_per_s) + where.devices[1].launch_s
    from_cloud = tail(LayerSplit(arch.num_kv_heads, "split")) - tail(cloud)
    assert from_cloud == pytest.approx(down(d) + edge_s + up(wide) + cloud_s - whole)
    from_edge = tail(LayerSplit(0, "split")) - tail(LayerSplit(0, "cloud"))
    assert from_edge == pytest.approx(edge_s + up(wide + d) - up(d) + cloud_s - whole)


def test_a_request_is_a_wait_a_prompt_and_a_step_for_each_further_token() -> None:
    where, layers = sides(), [HERE] * 2 + [THERE] * 4
    model, cost, ours = Sides(LLAMA, where), CostModel(LLAMA, where), placed([HERE] * 2 + [THERE] * 4, LLAMA)
    first = model.request_s(layers, prompt_tokens=64, output_tokens=1, queue_s=2.0)
    assert first == pytest.approx(2.0 + cost.ttft_s(ours, prompt_tokens=64))
    more = model.request_s(layers, prompt_tokens=64, output_tokens=3, queue_s=2.0)
    assert more - first == pytest.approx(sum(cost.tpot_s(ours, context_tokens=c) for c in (65, 66)))


def test_what_the_two_sides_cannot_price_is_refused() -> None:
    with pytest.raises(ModelError, match="both from one input"):
        Sides(replace(LLAMA, parallel_block=True), sides())
    with pytest.raises(TopologyError, match="one edge, one cloud"):
        Sides(LLAMA, cluster(A, B))
    experts = replace(LLAMA, num_experts=8, ffn_dim=8, expert_columns=14336)
    with pytest.raises(ModelError, match="8 experts"):
        Sides(experts, sides()).token_s([LayerSplit(0, "split")], context_tokens=1)
