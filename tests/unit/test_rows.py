"""Rows of several sessions in one step: each is what it would be alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from splits import split

from splitray.model.kv_cache import KvCache, Place
from splitray.model.surgery import Shard
from splitray.runtime.device.crossing import Step
from splitray.runtime.device.holding import Holding
from splitray.runtime.fleet import ThreadFleet

SESSIONS = ([5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17])


def held(fleet: Any) -> tuple[Shard, Holding]:
    assert isinstance(fleet, ThreadFleet)
    (host,) = fleet.hosts.values()
    holding = host.epochs.running
    assert holding.shard is not None and holding.shard.lean is not None
    return holding.shard, holding


def alone(shard: Shard, cache: KvCache, ids: list[int]) -> np.ndarray:
    """Logits of every position, one step each."""
    rows = []
    for at, token in enumerate(ids):
        cache.begin(at, 1)
        assert shard.lean is not None
        rows.append(shard.lean.step(cache, torch.tensor([[token]]))[0, 0].numpy().copy())
    return np.stack(rows)


def together(shard: Shard, holding: Holding, caches: list[KvCache], seed: int) -> list[np.ndarray]:
    """The same in steps of some tokens of some sessions."""
    drawn = np.random.default_rng(seed)
    done, found = [0] * len(SESSIONS), [list[np.ndarray]() for _ in SESSIONS]
    while any(d < len(ids) for d, ids in zip(done, SESSIONS, strict=True)):
        places, tokens, whose = list[Place](), list[int](), list[int]()
        for i in drawn.permutation(len(SESSIONS)):
            count = min(int(drawn.integers(0, 4)), len(SESSIONS[i]) - done[i])
            if count:
                caches[i].begin(done[i], count)
                places += [Place(caches[i], done[i] + k) for k in range(count)]
                tokens += SESSIONS[i][done[i] : done[i] + count]
                whose += [i] * count
                done[i] += count
        if places:
            assert shard.lean is not None
            holding.crossing.step = Step(0, 0, 0, 0, len(places))
            logits = shard.lean.rows(places, tokens, len(places))[0].numpy()
            for i, row in zip(whose, logits, strict=True):
                found[i].append(row.copy())
    return [np.stack(rows) for rows in found]


PLAIN = ["llama", "qwen3", "gemma3_text", "gpt2", "olmo2", "mixtral", "deepseek_v3"]
FEW_BITS = ["llama", "gpt2", "phi3", "granite", "falcon", "mixtral"]
CASES = [*((f, "float32") for f in PLAIN), *((f, w) for f in FEW_BITS for w in ("int4", "int8"))]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("family", "weights"), CASES)
def test_a_row_of_several_sessions_is_what_it_is_alone(family, weights):
    model = family_model(family)
    with split(model, devices=1, lean=True, weights=weights) as engine, torch.inference_mode():
        shard, holding = held(engine.fleet)
        expected = [alone(shard, holding.cache(100 + i, 4), ids) for i, ids in enumerate(SESSIONS)]
        for seed in range(3):
            caches = [holding.cache(200 + 10 * seed + i, 4) for i in range(len(SESSIONS))]
            for one, wanted in zip(together(shard, holding, caches, seed), expected, strict=True):
                if weights == "float32":
                    np.testing.assert_allclose(one, wanted, rtol=2e-4, atol=2e-5)
                    assert (one.argmax(-1) == wanted.argmax(-1)).all()
                else:
                    assert (one == wanted).all()
