"""The exchange rule: known counts, and every random route checked against the symbolic simulation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
from exchange_simulation import complaints

import splitray.route as route_module
from splitray.arch import ModelArch
from splitray.errors import TopologyError
from splitray.placement import LayerPlacement, Placement, Shares, validate
from splitray.route import Boundary, Content, Message, compile_route, message_bytes
from splitray.topology import Device, DeviceId, Link, Topology

A, B, C = DeviceId("A"), DeviceId("B"), DeviceId("C")
LAYERS = 12
ARCH = ModelArch(
    name="twelve",
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    hidden_dim=64,
    ffn_dim=96,
    vocab=128,
    context_tokens=256,
)


def device(name: str, tier: Literal["edge", "cloud"] = "edge") -> Device:
    return Device(
        id=DeviceId(name),
        tier=tier,
        memory_bytes=1e12,
        compute_flops=1e10,
        memory_bandwidth_bytes_per_s=1e10,
    )


def linked(names: Iterable[str], rtt_s: Callable[[str, str], float] = lambda a, b: 1e-3) -> Topology:
    names = list(names)
    links = tuple(
        Link(source=DeviceId(a), target=DeviceId(b), bandwidth_bytes_per_s=1e8, rtt_s=rtt_s(a, b))
        for a, b in itertools.permutations(names, 2)
    )
    return Topology(devices=tuple(device(n) for n in names), links=links, origin=DeviceId(names[0]))


PAIR = linked("AB")


def halves(total: int) -> Shares:
    return Shares.of({A: [(0, total // 2)], B: [(total // 2, total)]})


def on(total: int, *devices: str) -> Shares:
    return Shares.whole(total, *devices)


def placed(
    attention: Shares | Sequence[Shares],
    ffn: Shares | Sequence[Shares],
    head: Shares,
    embedding: tuple[str, ...] = (A,),
) -> Placement:
    attention = [attention] * LAYERS if isinstance(attention, Shares) else attention
    ffn = [ffn] * LAYERS if isinstance(ffn, Shares) else ffn
    layers = tuple(LayerPlacement(a, f) for a, f in zip(attention, ffn, strict=True))
    return Placement(layers, tuple(DeviceId(d) for d in embedding), head)


KV, FFN, VOCAB = ARCH.num_kv_heads, ARCH.ffn_dim, ARCH.vocab
CUT_ATTENTION = [on(KV, A)] * 5 + [on(KV, B)] * 7
CUT_FFN = [on(FFN, A)] * 5 + [on(FFN, B)] * 7

KNOWN_COUNTS = {
    "all on the origin exchanges nothing": (placed(on(KV, A), on(FFN, A), on(VOCAB, A)), {}, 0, 0),
    "all on the cloud sends one token back": (placed(on(KV, B), on(FFN, B), on(VOCAB, B), (B,)), {}, 1, 1),
    "embedding and head at home, layers away": (placed(on(KV, B), on(FFN, B), on(VOCAB, A)), {}, 2, 2),
    "one cut with the head on the far side": (placed(CUT_ATTENTION, CUT_FFN, on(VOCAB, B)), {}, 2, 2),
    "one cut with the head back at home": (placed(CUT_ATTENTION, CUT_FFN, on(VOCAB, A)), {}, 2, 2),
    "heads and columns in halves, whole head": (placed(halves(KV), halves(FFN), on(VOCAB, A)), {}, 25, 48),
    "heads, columns and the head in halves": (placed(halves(KV), halves(FFN), halves(VOCAB)), {}, 26, 50),
    "attention replicated, columns in halves": (placed(on(KV, A, B), halves(FFN), on(VOCAB, A)), {}, 13, 24),
    "attention replicated, columns and head in halves": (
        placed(on(KV, A, B), halves(FFN), halves(VOCAB)),
        {},
        14,
        26,
    ),
    "embedding on both, heads and columns in halves": (
        placed(halves(KV), halves(FFN), on(VOCAB, A), (A, B)),
        {},
        25,
        48,
    ),
    "parallel attention and FFN cross once a layer": (
        placed(halves(KV), halves(FFN), on(VOCAB, A)),
        {"parallel_block": True},
        13,
        24,
    ),
    "norms over all heads add an exchange to each attention": (
        placed(halves(KV), halves(FFN), on(VOCAB, A)),
        {"qk_norm_over_heads": True, "post_norm": True},
        37,
        72,
    ),
    "norms over all heads cost a replica nothing": (
        placed(on(KV, A, B), halves(FFN), on(VOCAB, A)),
        {"qk_norm_over_heads": True, "post_norm": True},
        13,
        24,
    ),
}


@pytest.mark.parametrize(("placement", "traits", "exchanges", "messages"), KNOWN_COUNTS.values(), ids=KNOWN_COUNTS)
def test_twelve_layers_on_two_devices_have_the_known_counts(
    placement: Placement, traits: dict[str, Any], exchanges: int, messages: int
) -> None:
    arch = dataclasses.replace(ARCH, **traits)
    validate(placement, arch, PAIR)
    route = compile_route(placement, arch, PAIR)
    assert (route.exchanges_per_token, route.messages_per_token) == (exchanges, messages)


def test_bytes_per_token_add_up_over_boundaries() -> None:
    placement = placed(halves(KV), halves(FFN), halves(VOCAB))
    state = ARCH.hidden_dim * 4
    # Embedding -> B, 24 exchanges both ways, one (max, id); the sampler is also the embedding and the origin.
    route = compile_route(placement, ARCH, PAIR)
    assert route.bytes_per_token(ARCH) == state * (1 + 2 * 24) + 8
    sampled = compile_route(placement, ARCH, PAIR, greedy=False)
    assert sampled.bytes_per_token(ARCH, batch=3) == 3 * (state * 49 + VOCAB // 2 * 4)


@pytest.mark.parametrize(
    ("content", "decode", "prefill"),
    [
        ("state", 256, 2560),
        ("partial", 256, 2560),
        ("partial_and_state", 512, 5120),
        ("norm_sums", 8, 80),
        ("best", 8, 8),
        ("logits", 400, 400),
        ("token", 4, 4),
    ],
)
def test_only_what_belongs_to_a_position_grows_with_a_prompt(content: Content, decode: int, prefill: int) -> None:
    message = Message(A, B, content, rows=100)
    assert message_bytes(message, ARCH) == decode
    assert message_bytes(message, ARCH, positions=10) == prefill
    assert message_bytes(message, ARCH, batch=2, positions=10) == 2 * prefill


def test_a_whole_state_comes_from_the_holder_with_the_cheapest_link() -> None:
    slow_from_a = linked("ABC", lambda a, b: 1.0 if a == "A" else 1e-3)
    placement = placed(on(KV, A, B), on(FFN, C), on(VOCAB, C))
    first = compile_route(placement, ARCH, slow_from_a).boundary(1)
    assert first.messages == (Message(B, C, "state"),)
    ties = compile_route(placement, ARCH, linked("ABC")).boundary(1)
    assert ties.messages == (Message(A, C, "state"),)


def test_devices_stand_in_topology_order_whatever_the_placement_says() -> None:
    shares = Shares.of({B: [(0, 1)], A: [(1, KV)]})
    route = compile_route(placed(shares, halves(FFN), on(VOCAB, B), (B, A)), ARCH, PAIR)
    assert all(block.devices == (A, B) for block in route.sub_blocks[:-1])
    assert route.sub_blocks[1].lead == A
    assert (route.sampler, route.devices) == (B, (A, B))


def test_a_boundary_without_messages_is_empty_and_not_counted() -> None:
    route = compile_route(placed(on(KV, A), on(FFN, A), on(VOCAB, A)), ARCH, PAIR)
    assert route.boundary(3) == Boundary(3, ())
    assert route.boundary(3, inner=True) == Boundary(3, (), inner=True)


def test_a_missing_link_is_named_with_its_remedy() -> None:
    apart = Topology(devices=PAIR.devices, links=(), origin=A)
    with pytest.raises(TopologyError) as error:
        compile_route(placed(CUT_ATTENTION, CUT_FFN, on(VOCAB, B)), ARCH, apart)
    for text in ("link A -> B", "after sub-block 10", "got none", "add the link"):
        assert text in str(error.value)


TRAITS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel_block": {"parallel_block": True},
    "post_norm": {"post_norm": True},
    "qk_norm_over_heads": {"post_norm": True, "qk_norm_over_heads": True},
}


def small_arch(trait: str) -> ModelArch:
    return ModelArch(
        name=trait,
        num_layers=3,
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        hidden_dim=16,
        ffn_dim=7,
        vocab=11,
        context_tokens=64,
        **TRAITS[trait],
    )


def random_case(rng: np.random.Generator, trait: str) -> tuple[Placement, ModelArch, Topology]:
    arch = small_arch(trait)
    names = [f"d{i}" for i in range(int(rng.integers(1, 6)))]
    topology = linked(names, lambda a, b: float(rng.choice([1e-3, 2e-3])))
    topology = dataclasses.replace(topology, origin=DeviceId(str(rng.choice(names))))

    def subset() -> list[str]:
        return [str(d) for d in rng.permutation(names)[: int(rng.integers(1, len(names) + 1))]]

    def scattered(total: int) -> Shares:
        devices = subset()
        owners = [str(rng.choice(devices)) for _ in range(total)]
        return Shares.of({d: [(i, i + 1) for i, o in enumerate(owners) if o == d] for d in devices})

    def one(total: int) -> Shares:
        draw = rng.random()
        if draw < 0.25:
            return Shares.whole(total, str(rng.choice(names)))
        return Shares.whole(total, *subset()) if draw < 0.5 and not arch.parallel_block else scattered(total)

    def layer() -> LayerPlacement:
        if arch.parallel_block and rng.random() < 0.3:
            both = subset()
            return LayerPlacement(Shares.whole(arch.num_kv_heads, *both), Shares.whole(arch.ffn_dim, *both))
        return LayerPlacement(one(arch.num_kv_heads), one(arch.ffn_dim))

    layers = tuple(layer() for _ in range(arch.num_layers))
    embedding = tuple(DeviceId(d) for d in subset())
    placement = Placement(layers, embedding, scattered(arch.vocab))
    validate(placement, arch, topology)
    return placement, arch, topology


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("block", range(4))
def test_every_route_tells_each_device_all_it_needs_and_nothing_more(trait: str, block: int) -> None:
    for seed in range(40 * block, 40 * (block + 1)):
        placement, arch, topology = random_case(np.random.default_rng(seed), trait)
        route = compile_route(placement, arch, topology)
        assert complaints(route, placement, arch, topology) == [], f"seed {seed}: {placement}"


@pytest.mark.parametrize("trait", TRAITS)
def test_the_simulation_notices_each_missing_message(trait: str) -> None:
    for seed in range(3):
        placement, arch, topology = random_case(np.random.default_rng(seed), trait)
        route = compile_route(placement, arch, topology)
        for i, boundary in enumerate(route.boundaries):
            for message in boundary.messages:
                left = tuple(m for m in boundary.messages if m is not message)
                boundaries = list(route.boundaries)
                boundaries[i] = dataclasses.replace(boundary, messages=left)
                mutant = dataclasses.replace(route, boundaries=tuple(boundaries))
                assert complaints(mutant, placement, arch, topology), f"seed {seed}: {boundary} {message}"


Crossing = Callable[..., tuple[Message, ...]]


def _residual_twice(crossing: Crossing) -> Crossing:
    """The lead folds the residual and sends it apart as well."""

    def mutant(here, there, *rest):
        folded = not rest[0].post_norm and here.mode == "partitioned"
        return tuple(
            dataclasses.replace(m, content="partial_and_state") if folded and m.source == here.lead else m
            for m in crossing(here, there, *rest)
        )

    return mutant


def _residual_left_out(crossing: Crossing) -> Crossing:
    """A receiver that lacks x does not get it apart."""

    def mutant(here, there, *rest):
        messages = crossing(here, there, *rest)
        return tuple(
            dataclasses.replace(m, content="partial") if m.content == "partial_and_state" else m for m in messages
        )

    return mutant


def _holders_told_again(crossing: Crossing) -> Crossing:
    """A replica that has the state receives it from the lead once more."""

    def mutant(here, there, *rest):
        again = [d for d in there.devices if d in here.devices[1:] and here.mode == "replicated"]
        extra = tuple(Message(here.lead, d, "state") for d in again)
        return crossing(here, there, *rest) + extra

    return mutant


def _gathered_at_the_lead(crossing: Crossing) -> Crossing:
    """Partials go to the lead only, which never passes the sum on."""

    def mutant(here, there, *rest):
        messages = crossing(here, there, *rest)
        return tuple(m for m in messages if here.mode != "partitioned" or m.target == here.lead)

    return mutant


def _everyone_told(crossing: Crossing) -> Crossing:
    """Holders of the last sub-block that have no part in the next receive as well."""

    def mutant(here, there, *rest):
        left_out = [d for d in here.devices if d not in there.devices and d != here.lead]
        extra = tuple(Message(here.lead, d, "partial") for d in left_out)
        return crossing(here, there, *rest) + extra

    return mutant


MUTATED_RULES = {
    "the residual counted twice": (_residual_twice, "sequential", "does not count every atom once"),
    "the residual left out": (_residual_left_out, "post_norm", "does not count every atom once"),
    "replicas told again": (_holders_told_again, "sequential", "is superfluous"),
    "partials gathered at the lead": (_gathered_at_the_lead, "parallel_block", "does not count every atom"),
    "devices told that need nothing": (_everyone_told, "qk_norm_over_heads", "needs nothing"),
}


@pytest.mark.parametrize(("mutate", "trait", "complaint"), MUTATED_RULES.values(), ids=MUTATED_RULES)
def test_the_simulation_refuses_a_mutated_rule(
    mutate: Callable[[Crossing], Crossing], trait: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_module, "crossing", mutate(route_module.crossing))
    found: list[str] = []
    for seed in range(30):
        placement, arch, topology = random_case(np.random.default_rng(seed), trait)
        found += complaints(compile_route(placement, arch, topology), placement, arch, topology)
    assert any(complaint in text for text in found), found[:5]
