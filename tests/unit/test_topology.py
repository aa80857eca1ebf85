"""Devices, links and their file: what is read, what is refused, and with which words."""

from __future__ import annotations

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitray.errors import TopologyError
from splitray.topology import Device, DeviceId, Link, Topology, parse_topology

EDGE_A, EDGE_B, CLOUD_A = DeviceId("edge_a"), DeviceId("edge_b"), DeviceId("cloud_a")


def entry(name: str, tier: str = "edge", **more: Any) -> dict[str, Any]:
    numbers = {"memory_bytes": 8e9, "compute_flops": 2e10, "memory_bandwidth_bytes_per_s": 1e10}
    return {"id": name, "tier": tier, **numbers, **more}


def link(a: str, b: str, **more: Any) -> dict[str, Any]:
    return {"between": [a, b], "bandwidth_bytes_per_s": 1e7, "rtt_s": 0.02, **more}


def document(**more: Any) -> dict[str, Any]:
    pair = {"devices": [entry(EDGE_A), entry(CLOUD_A, "cloud")], "links": [link(EDGE_A, CLOUD_A)]}
    return {**pair, **more}


def parse(**more: Any) -> Topology:
    return parse_topology(document(**more))


def test_a_file_is_read_with_its_units_and_its_order(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(
        """
        origin: edge_b
        origin_holds: embedding
        devices:
          - {id: cloud_a, tier: cloud, memory_bytes: 8e9, compute_flops: 1e12,
             memory_bandwidth_bytes_per_s: 1e11}
          - {id: edge_b, tier: edge, catalog: raspberry-pi-5, active_w: 5, torch_device: cpu, model_path: /m}
        links:
          - {between: [cloud_a, edge_b], uplink_bytes_per_s: 5e6, downlink_bytes_per_s: 1e6, rtt_s: 0.04,
             exchange_s: 1e-4, medium: radio}
        """
    )
    topology = Topology.load(path)
    assert topology.ids == (CLOUD_A, EDGE_B)
    assert (topology.origin, topology.origin_holds) == (EDGE_B, "embedding")
    assert topology.tier("cloud") == (CLOUD_A,)
    board = topology.device(EDGE_B)
    assert (board.memory_bytes, board.idle_w, board.active_w, board.model_path) == (8e9, 3.0, 5.0, "/m")
    there, back = topology.link(CLOUD_A, EDGE_B), topology.link(EDGE_B, CLOUD_A)
    assert there and back and (there.bandwidth_bytes_per_s, back.bandwidth_bytes_per_s) == (5e6, 1e6)
    assert back.rtt_s == 0.04 and back.exchange_s == 1e-4 and back.medium == "radio"


def test_json_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(document()))
    assert Topology.load(path).ids == (EDGE_A, CLOUD_A)


@pytest.mark.parametrize(
    ("tiers", "origin"),
    [(("cloud", "edge", "edge"), 1), (("edge", "cloud", "edge"), 0), (("cloud", "cloud", "cloud"), 0)],
)
def test_the_origin_is_the_first_edge_unless_named(tiers: tuple[str, ...], origin: int) -> None:
    devices = [entry(f"d{i}", tier) for i, tier in enumerate(tiers)]
    assert parse(devices=devices, links=[]).origin == f"d{origin}"
    assert parse(devices=devices, links=[], origin="d2").origin == "d2"


def test_a_device_named_by_a_number_is_the_same_in_its_links() -> None:
    topology = parse(devices=[entry(1), entry(2)], links=[link(1, 2)], origin=2)  # type: ignore[arg-type]
    assert topology.ids == ("1", "2") and topology.origin == "2"
    assert topology.link(DeviceId("1"), DeviceId("2")) is not None


def test_one_way_takes_half_the_round_trip_the_fixed_cost_and_the_bytes() -> None:
    one = Link(source=EDGE_A, target=CLOUD_A, bandwidth_bytes_per_s=1e6, rtt_s=0.02, exchange_s=0.003)
    assert math.isclose(one.transfer_s(5e5), 0.01 + 0.003 + 0.5)


def test_a_pair_without_a_link_has_none() -> None:
    topology = parse(devices=[entry(EDGE_A), entry(EDGE_B), entry(CLOUD_A, "cloud")])
    assert topology.link(EDGE_A, CLOUD_A) and topology.link(CLOUD_A, EDGE_A)
    assert topology.link(EDGE_A, EDGE_B) is None


def test_a_uniform_topology_links_every_pair() -> None:
    topology = Topology.uniform(4, num_edges=2)
    assert topology.ids == ("edge0", "edge1", "cloud0", "cloud1") and topology.origin == "edge0"
    assert len(topology.links) == 12
    assert Topology.uniform(1).ids == ("edge0",) and Topology.uniform(1).links == ()


def test_a_topology_survives_pickling_with_its_links() -> None:
    topology = parse()
    again = pickle.loads(pickle.dumps(topology))
    assert again == topology
    assert again.link(EDGE_A, CLOUD_A) == topology.link(EDGE_A, CLOUD_A)


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in entry(EDGE_A).items() if k != key}


THREE_ENTRIES = [entry(EDGE_A), entry(EDGE_B), entry(CLOUD_A, "cloud")]

REFUSED_DOCUMENTS = {
    "no devices": ({"devices": []}, ("devices", "at least one device", "got none", "list a device")),
    "devices that are no list": ({"devices": {"a": 1}}, ("devices", "a list", "a mapping", "`devices:`")),
    "a device that is no mapping": ({"devices": ["a"]}, ("devices[0]", "a mapping", "a text", "clusters/")),
    "two devices of one id": (
        {"devices": [entry(EDGE_A), entry(EDGE_A)], "links": []},
        ("devices", "distinct ids", "['edge_a'] more than once", "rename"),
    ),
    "a wrong tier": (
        {"devices": [entry(EDGE_A, "fog")], "links": []},
        ("device edge_a: tier", "edge or cloud", "got fog", "set tier"),
    ),
    "no memory": (
        {"devices": [entry(EDGE_A, memory_bytes=0)], "links": []},
        ("device edge_a: memory_bytes", "a number above 0", "got 0", "give the device's memory_bytes"),
    ),
    "a negative power": (
        {"devices": [entry(EDGE_A, idle_w=-1)], "links": []},
        ("device edge_a: idle_w", "0 or more", "got -1", "give the device's idle_w"),
    ),
    "a rate that is not a number": (
        {"devices": [entry(EDGE_A, compute_flops=math.nan)], "links": []},
        ("device edge_a: compute_flops", "a number above 0", "got nan"),
    ),
    "a number in words": (
        {"devices": [entry(EDGE_A, memory_bytes="8 GB")], "links": []},
        ("devices[0].memory_bytes", "a number", "'8 GB'", "SI units, such as 1.5e9"),
    ),
    "a list for a number": (
        {"devices": [entry(EDGE_A, active_w=[1])], "links": []},
        ("devices[0].active_w", "a number", "[1]", "SI units"),
    ),
    "a truth value for a number": (
        {"devices": [entry(EDGE_A, active_w=True)], "links": []},
        ("devices[0].active_w", "a number", "True"),
    ),
    "a missing memory": (
        {"devices": [without("memory_bytes")], "links": []},
        ("devices[0]", "['memory_bytes']", "only ['compute_flops'", "add the missing keys"),
    ),
    "an unknown device key": (
        {"devices": [entry(EDGE_A, memory_byte=1)], "links": []},
        ("devices[0].memory_byte", "expected one of", "remove the key (did you mean memory_bytes?)"),
    ),
    "an unknown catalogue name": (
        {"devices": [{"id": EDGE_A, "tier": "edge", "catalog": "raspbery-pi-5"}], "links": []},
        ("devices[0].catalog", "raspberry-pi-4", "raspbery-pi-5", "did you mean raspberry-pi-5?", "explicit values"),
    ),
    "an unknown key at the top": (
        {"orign": EDGE_A},
        ("topology.orign", "expected one of", "got orign", "(did you mean origin?)"),
    ),
    "an unknown link key": (
        {"links": [link(EDGE_A, CLOUD_A, rtt_ms=3)]},
        ("links[0].rtt_ms", "remove the key (did you mean rtt_s?)"),
    ),
    "an unknown origin": (
        {"origin": "edge_c"},
        ("origin", "edge_a, cloud_a", "edge_c", "did you mean"),
    ),
    "a wrong origin_holds": (
        {"origin_holds": "head"},
        ("origin_holds", "none, embedding or embedding_and_head", "got head", "use one of the three"),
    ),
    "a link to an unknown device": (
        {"links": [link(EDGE_A, "clod_a")]},
        ("link", "edge_a, cloud_a", "clod_a", "correct the name (did you mean cloud_a?)"),
    ),
    "a link of three ends": (
        {"links": [link(EDGE_A, CLOUD_A, between=[EDGE_A, CLOUD_A, EDGE_B])]},
        ("links[0].between", "two device ids", "write [a, b]"),
    ),
    "a link to itself": (
        {"links": [link(EDGE_A, EDGE_A)]},
        ("links", "two different devices", "edge_a to itself", "remove it"),
    ),
    "a link given twice": (
        {"links": [link(EDGE_A, CLOUD_A), link(CLOUD_A, EDGE_A)]},
        ("links", "one link between two", "cloud_a -> edge_a again", "remove it"),
    ),
    "a link without a round-trip time": (
        {"links": [{"between": [EDGE_A, CLOUD_A], "bandwidth_bytes_per_s": 1e6}]},
        ("links[0]", "rtt_s and bandwidth_bytes_per_s", "only ['bandwidth_bytes_per_s', 'between']"),
    ),
    "a link of one direction's rate": (
        {"links": [{"between": [EDGE_A, CLOUD_A], "rtt_s": 0.1, "uplink_bytes_per_s": 1e6}]},
        ("links[0]", "or uplink and downlink", "add the missing keys"),
    ),
    "a link without bandwidth": (
        {"links": [link(EDGE_A, CLOUD_A, bandwidth_bytes_per_s=0)]},
        ("link edge_a -> cloud_a", "bandwidth above 0", "0.0, 0.02, 0.0", "correct the link"),
    ),
    "links that are no list": ({"links": "all"}, ("links", "a list", "a text", "write `links:` as a list")),
}


@pytest.mark.parametrize(("change", "texts"), REFUSED_DOCUMENTS.values(), ids=REFUSED_DOCUMENTS)
def test_a_wrong_document_is_refused_with_what_to_do(change: dict[str, Any], texts: tuple[str, ...]) -> None:
    with pytest.raises(TopologyError) as error:
        parse(**change)
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "content", [None, "devices: [", b"\xff\xfe\x00", "- a\n- b"], ids=["missing", "yaml", "bytes", "a list"]
)
def test_a_file_that_cannot_be_read_is_refused(content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TopologyError, match="topology"):
        Topology.load(path)


def test_asking_for_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(TopologyError) as error:
        parse().device(DeviceId("edge_z"))
    for text in ("edge_a, cloud_a", "edge_z", "did you mean edge_a?"):
        assert text in str(error.value)


def test_a_written_document_reads_back_the_same() -> None:
    text = yaml.safe_dump(document(devices=THREE_ENTRIES))
    assert parse_topology(yaml.safe_load(text)) == parse(devices=THREE_ENTRIES)


def test_every_device_must_be_joined_with_the_origin_both_ways() -> None:
    chain = {"devices": [entry(EDGE_A), entry(EDGE_B), entry(CLOUD_A, "cloud")]}
    parse(**chain, links=[link(EDGE_A, EDGE_B), link(EDGE_B, CLOUD_A)]).require_connected()
    parse(devices=[entry(EDGE_A)], links=[]).require_connected()
    with pytest.raises(TopologyError, match=r"the origin edge_a.*got no links that join it with edge_b, cloud_a"):
        parse(**chain, links=[link(EDGE_B, CLOUD_A)]).require_connected()
    whole = parse()
    for one_way in whole.links:
        with pytest.raises(TopologyError, match="cloud_a"):
            replace(whole, links=(one_way,)).require_connected()


def test_a_device_is_checked_however_it_is_made() -> None:
    with pytest.raises(TopologyError, match="memory_bandwidth_bytes_per_s"):
        Device(
            id=EDGE_A,
            tier="edge",
            memory_bytes=1,
            compute_flops=1,
            memory_bandwidth_bytes_per_s=-1,
        )


DEVICE = "  - {id: %s, tier: %s, memory_bytes: %s, compute_flops: 1e11, memory_bandwidth_bytes_per_s: 2e10}\n"
LINK = "  - {between: [edge_a, cloud_a], bandwidth_bytes_per_s: 1e8, rtt_s: 0.01}\n"
TWO = "devices:\n" + DEVICE % ("edge_a", "edge", "8e9") + DEVICE % ("cloud_a", "cloud", "8e10") + "links:\n" + LINK
ANCHORS = "".join(f"{c}: &{c} [{','.join(['*' + b] * 10)}]\n" for b, c in zip("abcdefg", "bcdefgh", strict=True))

IN_FILES = {
    "endless memory": ("8e9", ".inf", ":2: devices[0].memory_bytes"),
    "no number": ("8e9", ".nan", ":2: device edge_a: memory_bytes"),
    "400 digits": ("8e9", "9" * 400, ":2: devices[0].memory_bytes"),
    "5,000 digits": ("8e9", "9" * 5000, ":2: devices[0].memory_bytes"),
    "octal in YAML 1.1": ("8e9", "010000000000", "leading zeros"),
    "sexagesimal in YAML 1.1": ("8e9", "1:30", ":2: devices[0].memory_bytes: expected a number"),
    "digits grouped": ("8e9", "1_000", "expected a number"),
    "a truth value": ("8e9", "true", "expected a number"),
    "nothing": ("8e9", "", "expected a number, got nothing"),
    "quotes": ("8e9", '"8e9"', "without a unit, quotes"),
    "bytes with a unit": ("8e9", "8 GB", "8 GB are 8e9, 8 GiB are 8589934592"),
    "a rate with a unit": ("1e8", "100 Mbit/s", "100 Mbit/s are 1.25e7"),
    "a time with a unit": ("0.01", "10 ms", "10 ms are 0.01"),
    "an absurd rate": ("1e8", "1e300", ":5: links[0].bandwidth_bytes_per_s: expected 0, or a number from 1e-09 to"),
    "an absurd time": ("0.01", "1e9", ":5: links[0].rtt_s: expected a number from 0 to 100000"),
    "an endless time": ("0.01", ".inf", ":5: links[0].rtt_s"),
    "a negative rate": ("1e8", "-1", ":5: link edge_a -> cloud_a"),
    "a list for a medium": ("0.01", "0.01, medium: [1]", ":5: links[0].medium: expected a text"),
    "a list for a path": ("tier: edge", "tier: edge, model_path: [a]", ":2: devices[0].model_path: expected a text"),
    "a list for a catalogue name": ("tier: edge", "tier: edge, catalog: [a]", ":2: devices[0].catalog"),
    "a mapping for an origin": ("devices:", "origin: {a: b}\ndevices:", ":1: origin: expected a text"),
    "a number for a torch device": ("tier: edge", "tier: edge, torch_device: 7", ":2: device edge_a: torch_device"),
    "no id": ("id: edge_a", "id: ", ":2: devices[0].id: expected a text on one line, got nothing"),
    "an id of two lines": ("id: edge_a", 'id: "a\\nb"', ":2: devices[0].id"),
    "an id with a slash": ("id: edge_a", "id: a/b", ":2: device a/b: id"),
    "a long id": ("id: edge_a", "id: " + "x" * 101, ":2: device xxx"),
    "a wrong tier": ("tier: edge", "tier: fog", ":2: device edge_a: tier"),
    "a key twice": (
        "tier: edge",
        "tier: edge, tier: cloud",
        ":2: expected each key of a mapping once, got 'tier' again",
    ),
    "a section twice": ("links:", "devices: []\nlinks:", ":4: expected each key of a mapping once"),
    "a pair twice": ("links:\n", "links:\n" + LINK, ":6: links: expected one link between"),
    "an unknown end": ("[edge_a,", "[edge_b,", ":5: link: expected one of"),
    "an id twice": ("id: cloud_a", "id: edge_a", ":3: devices: expected distinct ids"),
    "brackets without end": (
        "devices:",
        "profile: " + "[" * 3000 + "]" * 3000 + "\ndevices:",
        ":1: expected at most 100",
    ),
    "aliases of aliases": ("devices:", f"a: &a [1]\n{ANCHORS}devices:", "values, aliases counted"),
    "an alias of nothing": ("devices:", "profile: *a\ndevices:", ":1: expected &a before it"),
    "an alias of itself": ("devices:", "profile: &a [*a]\ndevices:", ":1: expected &a before it"),
    "a tag": ("8e9", "!!python/object/apply:os.system [ls]", ":2: expected a value without a tag"),
    "a list for a key": ("devices:", "? [a]\n: b\ndevices:", ":1: expected a text for a key, got a list"),
    "two documents": ("links:", "---\nlinks:", ":4: expected one document"),
    "tabs": ("  - {id: edge_a", "\t- {id: edge_a", ":2: .*with tabs"),
    "NUL": ("links:", "# \0\nlinks:", ":4: expected a text in UTF-8, got a NUL"),
}


@pytest.mark.parametrize(("old", "new", "said"), IN_FILES.values(), ids=IN_FILES)
def test_what_a_file_says_wrong_is_refused_with_its_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(TWO.replace(old, new, 1))
    with pytest.raises(TopologyError) as error:
        Topology.load(path)
    words = said.split(".*") if said.startswith(":2: .*") else [said]
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value)) < 10_000


@pytest.mark.parametrize("name", ["no", "1:30", "007", "2024-01-01", "1.10", "1e3", "0x10", "true", "é 1", "🎉"])
def test_a_device_is_called_what_is_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TWO.replace("edge_a,", f"{name},").encode())  # as some editors begin
    assert Topology.load(path).ids == (name, CLOUD_A)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("origin: a\x07\n", "give a topology file"),
        ("origin:\n\t- a\n", "not with tabs"),
        ("links:\n  - {between: [a, b], rtt_s: 0,01}\n", "thousands separators"),
        ("devices:\n  - {id: a, memory_bytes: 8,000,000,000}\n", "thousands separators"),
    ],
)
def test_the_remedy_is_for_what_is_wrong(content: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(TopologyError) as refused:
        Topology.load(tmp_path / "t.yaml")
    assert remedy in refused.value.remedy


def test_json_escapes_characters_beyond_16_bits_as_pairs(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"devices": [entry("🎉"), entry("b", model_path="\\\\ud83d🎉")]}))
    found = Topology.load(tmp_path / "t.json").devices
    assert (found[0].id, found[1].model_path) == ("🎉", "\\\\ud83d🎉")


def test_numbers_are_those_of_yaml_1_2_and_anchors_may_be_merged(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    for written, meant in (("1e9", 1e9), ("0x10", 16), ("0o17", 15), (".5e3", 500), ("+8", 8), ("8.", 8)):
        path.write_text(TWO.replace("8e9", written))
        assert Topology.load(path).devices[0].memory_bytes == meant
    path.write_text("devices:\n" + (DEVICE % ("a", "edge", "8e9")).replace("{", "&a {", 1) + "  - {<<: *a, id: b}\n")
    assert Topology.load(path).devices[1].memory_bytes == 8e9


def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", "a\0b"):
        with pytest.raises(TopologyError, match="a plain file|a readable file"):
            Topology.load(path)
