"""Which device holds which piece: shares, the checks of a whole placement, its bytes and its file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitray.arch import ModelArch, Range
from splitray.errors import PlacementError
from splitray.placement import Placement, Shares, validate, weight_bytes
from splitray.topology import Device, DeviceId, Topology

EDGE_A, EDGE_B, CLOUD_A = DeviceId("edge_a"), DeviceId("edge_b"), DeviceId("cloud_a")
ARCH = ModelArch(
    name="toy",
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    hidden_dim=64,
    ffn_dim=10,
    vocab=20,
    context_tokens=64,
)
GROUP_BYTES = 64 * 8 * (2 * 2 + 2) * 4
COLUMN_BYTES = 3 * 64 * 4
ROW_BYTES = 64 * 4


def topology(memory_bytes: float = 1e9, **more: Any) -> Topology:
    devices = tuple(
        Device(
            id=name,
            tier="cloud" if name == CLOUD_A else "edge",
            memory_bytes=memory_bytes,
            compute_flops=1e10,
            memory_bandwidth_bytes_per_s=1e10,
        )
        for name in (EDGE_A, EDGE_B, CLOUD_A)
    )
    return Topology(devices=devices, links=(), origin=EDGE_A, **more)


def document(**more: Any) -> dict[str, Any]:
    """A valid placement; a change replaces a top key, `layer` a part of layer 1."""
    layer = more.pop("layer", {})
    scattered = {EDGE_A: [[0, 1], [3, 4]], CLOUD_A: [[1, 3]]}
    replicated = {EDGE_A: [[0, 10]], EDGE_B: [[0, 10]]}
    plain = {
        "layers": [
            {"attention": scattered, "ffn": replicated},
            {"attention": {EDGE_B: [[0, 4]]}, "ffn": {EDGE_B: [[0, 10]]}, **layer},
        ],
        "embedding": [EDGE_A],
        "head": {EDGE_A: [[0, 5]], CLOUD_A: [[5, 20]]},
        **more,
    }
    return {k: v for k, v in plain.items() if v is not None}


def placement(**more: Any) -> Placement:
    return Placement.from_document(document(**more))


def refused(call: Any, *texts: str) -> None:
    with pytest.raises(PlacementError) as error:
        call()
    for text in ("expected ", "got ", *texts):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("ranges", "normal"),
    [
        ([(0, 2), (2, 4)], [(0, 4)]),
        ([(3, 4), (0, 1)], [(0, 1), (3, 4)]),
        ([(2, 2), (0, 1)], [(0, 1)]),
        ([(0, 3), (2, 4)], [(0, 3), (2, 4)]),
    ],
    ids=["neighbours join", "ranges are sorted", "empty ranges go", "an overlap stays for validate"],
)
def test_shares_are_normalised(ranges: list[tuple[int, int]], normal: list[tuple[int, int]]) -> None:
    assert Shares.of({"a": ranges}).ranges("a") == tuple(Range(*r) for r in normal)


def test_a_device_without_a_range_is_no_holder() -> None:
    shares = Shares.of({"a": [], "b": [(1, 1)], "c": [(0, 2), (4, 5)]})
    assert shares.devices == ("c",)
    assert (shares.count("c"), shares.count("a"), shares.ranges("b")) == (3, 0, ())


@pytest.mark.parametrize(
    ("shares", "replicated"),
    [
        (Shares.whole(4, "a", "b"), True),
        (Shares.whole(4, "a"), False),
        (Shares.of({"a": [(0, 2)], "b": [(2, 4)]}), False),
        (Shares.of({"a": [(0, 4)], "b": [(0, 3)]}), False),
    ],
    ids=["two full copies", "one holder", "disjoint halves", "a copy and a part"],
)
def test_only_full_copies_on_several_devices_are_a_replica(shares: Shares, replicated: bool) -> None:
    assert shares.is_replicated(4) is replicated


def test_a_valid_placement_passes_and_names_its_devices_in_order() -> None:
    validate(placement(), ARCH, topology())
    assert placement().devices == (EDGE_A, CLOUD_A, EDGE_B)


REFUSED = {
    "too few layers": (
        {"layers": [document()["layers"][0]]},
        ("layers", "2 of toy", "got 1", "one entry a layer"),
    ),
    "an unknown device": (
        {"embedding": ["edge_c"]},
        ("edge_a, edge_b, cloud_a", "got edge_c", "correct the device's name"),
    ),
    "an embedding held twice by one device": (
        {"embedding": [EDGE_A, EDGE_A]},
        ("embedding", "each once", "['edge_a', 'edge_a']", "name each holder"),
    ),
    "a head group left out": (
        {"layer": {"attention": {EDGE_A: [[0, 1]], EDGE_B: [[2, 4]]}}},
        ("layer 1 attention", "all 4 head groups placed", "[1, 2) on no device", "add the missing range"),
    ),
    "the last columns left out": (
        {"layer": {"ffn": {EDGE_A: [[0, 9]]}}},
        ("layer 1 ffn", "all 10 columns placed", "[9, 10) on no device", "add the missing range"),
    ),
    "a sub-block on nobody": (
        {"layer": {"ffn": {}}},
        ("layer 1 ffn", "all 10 columns placed", "[0, 10) on no device"),
    ),
    "a column given twice": (
        {"layer": {"ffn": {EDGE_A: [[0, 6]], CLOUD_A: [[5, 10]]}}},
        (
            "layer 1 ffn",
            "or all of them on each",
            "[5, 6) on edge_a and on cloud_a",
            "make the ranges disjoint",
        ),
    ),
    "a part beside a full copy": (
        {"layer": {"attention": {EDGE_A: [[0, 4]], CLOUD_A: [[0, 2]]}}},
        ("layer 1 attention", "each of 4 head groups on one device", "replicate the whole sub-block"),
    ),
    "a range past the end": (
        {"layer": {"attention": {EDGE_A: [[0, 5]]}}},
        ("layer 1 attention on edge_a", "ranges within [0, 4) head groups", "[0, 5)", "correct the range"),
    ),
    "vocabulary rows left out": (
        {"head": {EDGE_A: [[0, 19]]}},
        ("head", "all 20 vocabulary rows placed", "[19, 20) on no device"),
    ),
    "a head copied": (
        {"head": {EDGE_A: [[0, 20]], EDGE_B: [[0, 20]]}},
        ("head", "one holder or disjoint rows", "a full copy on several devices", "its own vocabulary rows"),
    ),
}


@pytest.mark.parametrize(("change", "texts"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_placement_is_refused_with_what_to_do(change: dict[str, Any], texts: tuple[str, ...]) -> None:
    refused(lambda: validate(placement(**change), ARCH, topology()), *texts)


def test_an_empty_embedding_made_in_code_is_refused() -> None:
    empty = dataclasses.replace(placement(), embedding=())
    refused(lambda: validate(empty, ARCH, topology()), "embedding", "at least one device", "[]")


def test_experts_are_called_experts() -> None:
    experts = dataclasses.replace(ARCH, num_experts=10, expert_columns=6)
    wrong = placement(layer={"ffn": {EDGE_A: [[0, 9]]}})
    refused(lambda: validate(wrong, experts, topology()), "all 10 experts placed", "[9, 10)")


BOTH = {EDGE_A: [[0, 4]], EDGE_B: [[0, 4]]}
PARALLEL_LAYERS = {
    "both replicated on the same devices": (BOTH, {EDGE_A: [[0, 10]], EDGE_B: [[0, 10]]}, True),
    "both partitioned, on other devices": ({EDGE_A: [[0, 4]]}, {EDGE_A: [[0, 3]], EDGE_B: [[3, 10]]}, True),
    "attention replicated alone": (BOTH, {EDGE_A: [[0, 10]]}, False),
    "FFN replicated alone": ({EDGE_A: [[0, 4]]}, {EDGE_A: [[0, 10]], EDGE_B: [[0, 10]]}, False),
    "replicated on other devices": (BOTH, {EDGE_A: [[0, 10]], CLOUD_A: [[0, 10]]}, False),
}


@pytest.mark.parametrize(("attention", "ffn", "valid"), PARALLEL_LAYERS.values(), ids=PARALLEL_LAYERS)
def test_a_parallel_block_is_replicated_as_one(attention: dict[str, Any], ffn: dict[str, Any], valid: bool) -> None:
    parallel = dataclasses.replace(ARCH, parallel_block=True)
    layer = {"attention": attention, "ffn": ffn}
    one = placement(layers=[layer, layer])
    if valid:
        validate(one, parallel, topology())
    else:
        refused(
            lambda: validate(one, parallel, topology()),
            "layer 0",
            "attention and FFN replicated together, on the same devices",
            "replicate both on the same devices, or partition both",
        )
    validate(one, ARCH, topology())  # two sub-blocks of a sequential model may differ


@pytest.mark.parametrize(
    ("holds", "change", "texts"),
    [
        ("embedding", {"embedding": [EDGE_B]}, ("embedding", "on the origin edge_a", "['edge_b']")),
        ("embedding", {"embedding": [EDGE_A, EDGE_B]}, ("embedding", "['edge_a', 'edge_b']")),
        ("embedding_and_head", {}, ("head", "origin_holds: embedding_and_head", "['edge_a', 'cloud_a']")),
    ],
    ids=["an embedding elsewhere", "a copy of the embedding elsewhere", "rows of the head elsewhere"],
)
def test_pieces_pinned_to_the_origin_stay_there(holds: str, change: dict[str, Any], texts: tuple[str, ...]) -> None:
    validate(placement(**change), ARCH, topology())
    refused(
        lambda: validate(placement(**change), ARCH, topology(origin_holds=holds)),
        *texts,
        "place it there, or set origin_holds: none",
    )


def test_a_pinned_embedding_and_head_on_the_origin_pass() -> None:
    pinned = placement(head={EDGE_A: [[0, 20]]})
    validate(pinned, ARCH, topology(origin_holds="embedding_and_head"))


def test_weight_bytes_count_every_slice_where_it_lies() -> None:
    assert weight_bytes(placement(), ARCH) == {
        EDGE_A: 2 * GROUP_BYTES + 10 * COLUMN_BYTES + (20 + 5) * ROW_BYTES,
        EDGE_B: 4 * GROUP_BYTES + 20 * COLUMN_BYTES,
        CLOUD_A: 2 * GROUP_BYTES + 15 * ROW_BYTES,
    }


def test_tied_rows_cost_nothing_beside_the_embedding() -> None:
    tied = weight_bytes(placement(), dataclasses.replace(ARCH, tied_embeddings=True))
    assert tied[EDGE_A] == 2 * GROUP_BYTES + 10 * COLUMN_BYTES + 20 * ROW_BYTES
    assert tied[CLOUD_A] == 2 * GROUP_BYTES + 15 * ROW_BYTES


def test_memory_is_enough_to_the_byte() -> None:
    needed = max(weight_bytes(placement(), ARCH).values())
    validate(placement(), ARCH, topology(needed))
    refused(
        lambda: validate(placement(), ARCH, topology(needed - 1)),
        f"memory of {EDGE_B}",
        f"at most {needed - 1:,} bytes of weights",
        f"got {needed:,} bytes",
        "move pieces to another device",
    )


def test_a_saved_placement_reads_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "placement.yaml"
    placement().save(path)
    assert Placement.load(path) == placement()
    assert yaml.safe_load(path.read_text()) == document()
    assert Placement.from_document(placement().to_document()) == placement()


MALFORMED = {
    "a missing key": ({"head": None}, ("placement", "['layers', 'embedding', 'head']", "placement-example")),
    "an unknown key": (
        {"haed": {}},
        ("placement", "placement.haed is unknown (did you mean head?)", "placement-example.yaml"),
    ),
    "an unknown key of a layer": (
        {"layer": {"attn": {}}},
        ("layers[1]", "['attention', 'ffn']", "layers[1].attn is unknown"),
    ),
    "layers that are no list": ({"layers": {"0": {}}}, ("layers", "a list", "a mapping", "one entry a layer")),
    "a layer that is no mapping": ({"layers": [["attention", "ffn"]]}, ("layers[0]", "a mapping", "list")),
    "an embedding that is no list": (
        {"embedding": "edge_a"},
        ("embedding", "a list of devices", "edge_a", "write `embedding: [device]`"),
    ),
    "an embedding on nobody": ({"embedding": []}, ("embedding", "a list of devices", "[]")),
    "shares that are no mapping": (
        {"head": [[0, 20]]},
        ("head", "a mapping device -> ranges", "list", "{device: [[start, stop], ...]}"),
    ),
    "a bare range": ({"head": {EDGE_A: [0, 20]}}, ("head.edge_a", "[start, stop]", "[0, 20]", "half-open")),
    "a range backwards": ({"head": {EDGE_A: [[20, 0]]}}, ("head.edge_a", "start <= stop", "[[20, 0]]")),
    "a negative start": ({"head": {EDGE_A: [[-1, 20]]}}, ("head.edge_a", "start <= stop")),
    "a fraction of a row": ({"head": {EDGE_A: [[0, 20.0]]}}, ("head.edge_a", "whole numbers")),
    "a truth value for a row": ({"head": {EDGE_A: [[False, 20]]}}, ("head.edge_a", "whole numbers")),
    "a range of three": (
        {"layer": {"ffn": {EDGE_A: [[0, 5, 10]]}}},
        ("layers[1].ffn.edge_a", "a list of [start, stop]", "[[0, 5, 10]]"),
    ),
}


@pytest.mark.parametrize(("change", "texts"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_document_is_refused_with_its_path(change: dict[str, Any], texts: tuple[str, ...]) -> None:
    refused(lambda: placement(**change), *texts)


@pytest.mark.parametrize("content", [None, "layers: [", "", "- 1"], ids=["missing", "broken", "empty", "list"])
def test_a_file_that_is_no_placement_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "placement.yaml"
    if content is not None:
        path.write_text(content)
    refused(lambda: Placement.load(path), "placement")
