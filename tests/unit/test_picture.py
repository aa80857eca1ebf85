"""The placement as a picture: the same facts in letters, in colours, and in a file."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from splitray.arch import ModelArch
from splitray.placement import LayerPlacement, Placement, Shares, validate
from splitray.profiling.named_placements import uneven_placement
from splitray.report.export import as_svg, as_text
from splitray.report.picture import BLOCK_CELLS, cells, placement_picture, rows
from splitray.report.quantities import bytes_text, seconds_text, share_text
from splitray.topology import DeviceId, Topology

EDGE, CLOUD = DeviceId("edge0"), DeviceId("cloud0")


def arch(**changes: object) -> ModelArch:
    small: dict[str, Any] = {
        "name": "llama", "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "hidden_dim": 64,
        "ffn_dim": 64, "vocab": 512, "context_tokens": 128,
    }  # fmt: skip
    return ModelArch(**{**small, **changes})


def placement(of: ModelArch, *, replicated: bool = True) -> Placement:
    """Layer 0: attention on both; layer 1: one group and a quarter of the columns on the edge."""

    def shared(total: int, first: int) -> Shares:
        return Shares.of({EDGE: [(0, first)], CLOUD: [(first, total)]})

    both = Shares.whole(of.num_kv_heads, EDGE, CLOUD)
    ffn, attention = shared(of.ffn_dim, of.ffn_dim // 4), shared(of.num_kv_heads, 1)
    layers = [LayerPlacement(both if i == 0 and replicated else attention, ffn) for i in range(of.num_layers)]
    return Placement(tuple(layers), (EDGE,), shared(of.vocab, of.vocab // 2))


def drawn(of: ModelArch, **options: bool) -> str:
    return as_text(placement_picture(placement(of, **options), of, Topology.uniform(2)))


def test_letters_alone_tell_every_piece_and_its_copies() -> None:
    lines = drawn(arch()).splitlines()
    wide = 4 * 3 + 2 + BLOCK_CELLS
    assert lines[:5] == [
        "           4 groups      64 FFN columns",
        f" embedding {'A' * wide}",
        f"   layer 0  #  #  #  #   {'A' * 8}{'B' * 24}",
        f"   layer 1  A  B  B  B   {'A' * 8}{'B' * 24}",
        f"      head {'A' * 23}{'B' * 23}",
    ]
    assert lines[-1] == " ### a full copy on each of edge0, cloud0"


def test_the_legend_gives_each_device_its_shares_and_bytes() -> None:
    legend = {line.split()[1]: line.split()[2:] for line in drawn(arch()).splitlines() if "%" in line}
    assert legend["edge0"] == ["edge", "62", "%", "25", "%", "50", "%", "344", "kB", "62", "%"]
    assert legend["cloud0"][:7] == ["cloud", "88", "%", "75", "%", "50", "%"]


def test_without_a_replica_there_is_no_sign_to_explain() -> None:
    assert "#" not in drawn(arch(), replicated=False)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 12, 16, 24, 32, 40, 128])
def test_any_number_of_heads_fits_a_terminal_of_80_columns(num_kv_heads: int) -> None:
    of = arch(num_heads=num_kv_heads, num_kv_heads=num_kv_heads, num_layers=40)
    assert max(map(len, drawn(of, replicated=num_kv_heads == 1).splitlines())) <= 80


def test_titles_of_few_groups_stay_apart() -> None:
    assert " 2 groups 64 FFN columns" in drawn(arch(num_kv_heads=2))


def test_experts_are_called_experts() -> None:
    text = drawn(arch(ffn_dim=8, num_experts=8, expert_columns=32))
    assert "8 experts" in text
    assert "FFN" not in text


def test_a_cell_goes_to_the_device_with_most_of_it() -> None:
    shares = Shares.of({EDGE: [(0, 7), (30, 40)], CLOUD: [(7, 30)]})
    assert cells(shares, 40, 4) == ((EDGE,), (CLOUD,), (CLOUD,), (EDGE,))


def test_a_replicated_embedding_is_drawn_as_copies() -> None:
    of = arch()
    both = Placement(placement(of).layers, (EDGE, CLOUD), placement(of).head)
    assert set(rows(both, of)[0].left) == {(EDGE, CLOUD)}


def test_colours_tell_the_devices_apart_too() -> None:
    of = arch()
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(placement_picture(placement(of), of, Topology.uniform(2)))
    grounds = {part.split("m")[0] for part in captured.get().split("48;2;")[1:]}
    assert len(grounds) == 2


def test_the_svg_needs_no_network() -> None:
    of = arch()
    svg = as_svg(placement_picture(placement(of), of, Topology.uniform(2)), title="two devices")
    assert svg.startswith("<svg")
    assert "@font-face" not in svg
    assert "url(http" not in svg and 'url("http' not in svg
    assert "#e69f00" in svg and "#0072b2" in svg


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_heads": 1, "num_kv_heads": 1}, {"parallel_block": True}, {"ffn_dim": 3, "num_experts": 3}, {"vocab": 2}],
    ids=str,
)
def test_the_placement_of_the_demo_is_valid_and_uneven(changes: dict[str, object]) -> None:
    of = arch(**changes)
    topology = Topology.uniform(2)
    chosen = uneven_placement(of, topology)
    validate(chosen, of, topology)
    assert chosen.embedding == (EDGE,)
    last = chosen.layers[-1]
    assert last.ffn.count(EDGE) < last.ffn.count(CLOUD)
    assert last.attention.count(EDGE) < last.attention.count(CLOUD)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(999.7), "1.00 kB"),
        (bytes_text(24_100), "24.1 kB"),
        (bytes_text(7.84e6), "7.84 MB"),
        (bytes_text(1e12), "1.00 TB"),
        (seconds_text(0.0000179), "17.9 us"),
        (seconds_text(0.0123), "12.3 ms"),
        (seconds_text(0.9996), "1.00 s"),
        (seconds_text(123), "123 s"),
        (share_text(1, 4), "25 %"),
        (share_text(1, 4000), "<1 %"),
        (share_text(0, 4), "0 %"),
    ],
)
def test_quantities_have_three_digits_and_a_unit(text: str, expected: str) -> None:
    assert text == expected
