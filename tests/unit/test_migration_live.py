"""Placements that change while tokens come: the tokens are those of a run that stays, and bytes the formula's."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE, family_model
from splits import SOON_S, another, greedy, moved_while_generating, slow_devices, split, threads_of

from splitray.errors import DeviceLost
from splitray.migration import diff
from splitray.model.surgery import Shard
from splitray.runtime.device.epochs import Epochs
from splitray.runtime.device.holding import Holding
from splitray.runtime.device.shard_host import ShardHost
from splitray.runtime.engine.epoch import Next
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.sampling import Sampling

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
NEW_TOKENS = 60


def held_by(host: ShardHost) -> Holding:
    """What a device holds of the placement that runs."""
    assert host.epochs.current is not None
    return host.epochs.current


def shard_of(host: ShardHost) -> Shard:
    shard = held_by(host).shard
    assert shard is not None
    return shard


@pytest.fixture(autouse=True)
def time_to_stage(monkeypatch):
    slow_devices(monkeypatch, 0.01)


@pytest.mark.thin(8)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_moves_while_it_generates(family):
    model = family_model(family)
    with split(model, devices=3, seed=1, recovery=Recovery()) as engine:
        tokens, moves = moved_while_generating(engine, PROMPT, Sampling(max_new_tokens=NEW_TOKENS), range(2, 5))
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        assert len(moves) == engine.epoch >= 2, "three, but on a busy machine"
        assert moves[1].staged_bytes == moves[1].tail_bytes == 0, "it read the tokens again"
        again = list(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)))
        assert again == tokens, "the placement that stays runs on"
        assert {s["kv_bytes"] for s in engine.stats().values()} == {0}, "nothing is left of the sessions"


def test_sampling_goes_on_with_the_same_numbers():
    model = family_model("qwen3")
    settings = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=7)
    with split(model, devices=3, seed=1) as engine:
        still = list(engine.stream(PROMPT, settings))
    with split(model, devices=3, seed=1, recovery=Recovery()) as engine:
        tokens, _ = moved_while_generating(engine, PROMPT, settings, range(2, 6))
    assert tokens == still


def test_bytes_are_those_of_the_formula():
    model = family_model("llama")
    with split(model, devices=3, seed=1, recovery=Recovery()) as engine:
        for seed in range(2, 6):
            before = engine.placement
            positions = len(PROMPT)
            moves: list[Next] = []
            told = False
            for n, _ in enumerate(engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)), start=1):
                if not moves:
                    moves.append(engine.migrate(another(engine, seed)))
                    assert moves[0].staged.wait(SOON_S)
                if moves[0].done.is_set() and not told:
                    positions += n - 2  # the switch came before this token, which was read by the new placement
                    told = True
            wanted = sum(m.kv_bytes for m in diff(before, engine.placement, engine.arch, 1))
            got = moves[0].staged_bytes + moves[0].tail_bytes
            assert got % wanted == 0 if wanted else got == 0
            if wanted:
                assert got // wanted == positions


def test_a_migration_without_a_run_happens_at_once_and_keeps_sessions_of_hf_generate():
    from splitray.runtime.hf import CacheHandle

    model = family_model("llama")
    ids = torch.tensor([PROMPT])
    with split(model, devices=3, seed=1, recovery=Recovery()) as engine, torch.no_grad():
        handle = CacheHandle(engine, 40)
        logits = engine.step(Forward(session=handle.session, ids=ids, position=0, keep=1, capacity=40))
        move = engine.migrate(another(engine, 2))
        assert move.done.wait(SOON_S) and move.error is None
        token = logits[:, -1].argmax(-1, keepdim=True)
        after = engine.step(Forward(session=handle.session, ids=token, position=len(PROMPT), keep=1, capacity=40))
        expected = model(torch.cat([ids, token], dim=1)).logits[:, -1:]
        assert torch.allclose(after, expected, atol=1e-4)


@pytest.mark.parametrize("change", ["reordered", "cropped", "more_beams"])
def test_what_a_caller_changes_while_its_kv_is_copied_is_copied_again(change, monkeypatch):
    """Beams change rows, prompt lookup takes positions back."""
    model, copy, copied, go_on = family_model("llama"), Epochs.copy, [], threading.Event()
    rows = torch.tensor([PROMPT, PROMPT[::-1]])
    order, length = torch.tensor([1, 0, 1] if change == "more_beams" else [1, 0]), len(PROMPT)

    def late(epochs, staged, session):
        num_bytes = copy(epochs, staged, session)
        copied.append(epochs.device)
        assert go_on.wait(SOON_S)
        return num_bytes

    monkeypatch.setattr(Epochs, "copy", late)
    with split(model, devices=3, seed=1, recovery=Recovery()) as engine, torch.no_grad():
        engine.step(Forward(session=1, ids=rows, position=0, keep=1, capacity=length))
        placement = another(engine, 2)
        move = engine.migrate(placement)
        while len(copied) < len(placement.devices):
            time.sleep(0.001)
        options: dict[str, Any] = {"session": 1, "keep": 1, "capacity": length}
        if change == "cropped":
            rows = torch.cat([rows[:, :4], rows[:, :4].flip(0), rows], dim=1)
            engine.step(Forward(ids=rows[:, 4:], position=4, **options))
        else:
            rows = torch.cat([rows[order], rows[order, :1]], dim=1)
            engine.step(Forward(ids=rows[:, -1:], position=length, reorder=order, **options))
        go_on.set()
        assert move.done.wait(SOON_S) and move.error is None
        after = engine.step(Forward(ids=rows[:, :1], position=rows.shape[1], **options))
        expected = model(torch.cat([rows, rows[:, :1]], dim=1)).logits[:, -1:]
        assert torch.allclose(after, expected, atol=1e-4)


def test_kv_that_a_device_has_not_written_yet_is_waited_for_and_never_made_up():
    from splitray.arch import Range
    from splitray.model.kv_cache import KvPiece

    model = family_model("llama")
    with split(model, devices=2, planner="even", recovery=Recovery()) as engine:
        engine.step(Forward(session=1, ids=torch.tensor([PROMPT]), position=0, keep=1, capacity=40))
        held = held_by(threads_of(engine).hosts["edge0"])
        piece, soon = KvPiece(0, Range(*held.groups(0)[0])), threading.Timer(0.1, lambda: setattr(cache, "written", 9))
        cache = held.caches[1]
        cache.written = 8
        soon.start()
        rows = held.read(1, piece, 0, 9)
        assert rows is not None
        keys, _ = rows
        assert keys.shape[2] == 9 and cache.written == 9
        with pytest.raises(DeviceLost, match="not written yet"):
            held.read(1, piece, 0, 10)


def test_what_both_placements_hold_is_shared_and_not_read_again():
    model = family_model("llama")
    with split(model, devices=2, planner="even", recovery=Recovery()) as engine:
        before = {d: shard_of(h) for d, h in threads_of(engine).hosts.items()}
        move = engine.migrate(engine.placement)
        assert move.done.wait(SOON_S) and move.error is None
        for device, host in threads_of(engine).hosts.items():
            assert shard_of(host) is before[device]
        layers = list(engine.placement.layers)
        turned = type(engine.placement)(
            (*layers[:-1], type(layers[0])(layers[-1].attention, layers[-1].ffn.whole(engine.arch.ffn_dim, "edge0"))),
            engine.placement.embedding, engine.placement.head,
        )  # fmt: skip
        move = engine.migrate(turned)
        assert move.done.wait(SOON_S) and move.error is None
        for device, host in threads_of(engine).hosts.items():
            new, old = shard_of(host), before[device]
            assert new.layers[0].attention is old.layers[0].attention
            assert new.layers[-1].ffn is not old.layers[-1].ffn
            assert new.lean is not None and old.lean is not None and new.lean.attention[0] is old.lean.attention[0]
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == greedy(model, PROMPT, 8)
