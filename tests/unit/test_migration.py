"""Moves between placements: what arrives is what was lacking, with its KV, and the delay of its links."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splitray.arch import ModelArch
from splitray.migration import delay_s, diff, moved_bytes
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.planners import ClusterState, make_planner
from splitray.topology import Topology

ARCH = ModelArch(
    name="small", num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16, hidden_dim=128, ffn_dim=96, vocab=64,
    context_tokens=256,
)  # fmt: skip


def held(shares: Shares, device: str) -> set[int]:
    return {i for r in shares.ranges(device) for i in range(r.start, r.stop)}


@pytest.mark.thin(4)
@pytest.mark.parametrize("seed", range(40))
def test_moves_are_exactly_what_each_device_lacked(seed: int) -> None:
    where = Topology.uniform(1 + seed % 4)
    planner = make_planner("random", seed=seed)
    old, new = (planner.propose(ClusterState(arch=ARCH, topology=where)) for _ in range(2))
    moves = diff(old, new, ARCH, 10)
    for layer in range(ARCH.num_layers):
        for piece in ("attention", "ffn"):
            before, after = (getattr(p.layers[layer], piece) for p in (old, new))
            for device in where.ids:
                mine = [m for m in moves if (m.piece, m.layer, m.target) == (piece, layer, device)]
                came = [i for m in mine for i in range(*m.indices)]
                assert sorted(came) == sorted(held(after, device) - held(before, device))
                for m in mine:
                    assert set(range(*m.indices)) <= held(before, m.source)
                    kv = ARCH.kv_bytes_per_token * 10 * m.indices.count if piece == "attention" else 0
                    assert m.kv_bytes == kv
    assert diff(old, old, ARCH, 10) == ()


def test_links_work_side_by_side_and_one_link_in_turn() -> None:
    where = Topology.uniform(3)
    a, b, c = where.ids
    ends: dict[str, Any] = {"embedding": (a,), "head": Shares.whole(ARCH.vocab, a)}
    whole = LayerPlacement(Shares.whole(4, a), Shares.whole(96, a))
    spread = LayerPlacement(Shares.of({b: [(0, 3)], c: [(3, 4)]}), Shares.whole(96, a))
    moves = diff(Placement((whole,) * 2, **ends), Placement((spread,) * 2, **ends), ARCH, 100)
    kv = ARCH.kv_bytes_per_token * 100
    assert moved_bytes(moves, staged=True) == 8 * kv
    assert moved_bytes(moves, staged=False) == 8 * (kv + ARCH.group_params * 4)
    rate, rtt = where.links[0].bandwidth_bytes_per_s, where.links[0].rtt_s
    assert delay_s(moves, where, staged=True) == pytest.approx(6 * kv / rate + rtt / 2)
    assert delay_s((), where, staged=False) == 0.0


def test_a_replicated_piece_has_its_copy_there_already() -> None:
    where = Topology.uniform(2)
    a, b = where.ids
    both = LayerPlacement(Shares.whole(4, a, b), Shares.whole(96, a))
    one = LayerPlacement(Shares.whole(4, b), Shares.whole(96, a))
    ends: dict[str, Any] = {"embedding": (a,), "head": Shares.whole(ARCH.vocab, a)}
    assert diff(Placement((both,) * 2, **ends), Placement((one,) * 2, **ends), ARCH, 10) == ()
    assert np.isinf(
        delay_s(
            diff(Placement((one,) * 2, **ends), Placement((both,) * 2, **ends), ARCH, 10),
            Topology(devices=where.devices, links=(), origin=a),
            staged=True,
        )
    )
