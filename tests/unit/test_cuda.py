"""An edge on the CPU and a cloud on a GPU: the tokens are those of the unsplit model on the CPU. Needs CUDA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MORE, family_model
from splits import greedy, moved_while_generating, report_of, slow_devices, split, threads_of
from transformers import AutoModelForCausalLM

from splitray.profiling.faults import trials
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.launch import SHIPPED, launch_engine
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
GREEDY = Sampling(max_new_tokens=24)


def edge_and_gpus(clouds: int) -> Topology:
    plain = Topology.uniform(1 + clouds)
    devices = (replace(d, torch_device="cpu" if d.tier == "edge" else "cuda") for d in plain.devices)
    return replace(plain, devices=tuple(devices))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_split_over_a_cpu_and_a_gpu_gives_the_unsplit_tokens(family):
    model = family_model(family)
    expected = greedy(model, PROMPT, GREEDY.max_new_tokens)
    for clouds, planner in ((1, "random"), (1, "even"), (2, "random"), (1, "cloud_only"), (1, "fixed_cut:1")):
        with split(model, topology=edge_and_gpus(clouds), planner=planner, seed=3) as engine:
            assert list(engine.stream(PROMPT, GREEDY)) == expected, engine.placement
            assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)


def test_kv_moves_between_cpu_and_gpu_while_tokens_come(monkeypatch):
    slow_devices(monkeypatch, 0.01)
    model = family_model("llama")
    with split(model, topology=edge_and_gpus(2), seed=1, recovery=Recovery()) as engine:
        tokens, moves = moved_while_generating(engine, PROMPT, Sampling(max_new_tokens=60), range(2, 6))
    assert tokens == greedy(model, PROMPT, 60)
    assert sum(m.staged_bytes + m.tail_bytes for m in moves) > 0


def test_devices_that_die_change_no_token(tmp_path):
    recovery = Recovery(store=str(tmp_path), every_tokens=4)
    with split(family_model("llama"), topology=edge_and_gpus(2), seed=1, recovery=recovery) as engine:
        run = trials(engine, threads_of(engine), prompt=PROMPT, sampling=GREEDY, count=30, seed=4)
        assert run.hangs == 0 and run.leaks == 0 and [t for t in run.trials if not t.identical] == []


def test_a_codec_and_a_padded_batch_work_there():
    model = family_model("gpt2")
    ids = torch.tensor([[0, 0, 0, 5, 17], [9, 8, 7, 6, 5]])
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 5:]
    with split(model, topology=edge_and_gpus(1), seed=6) as engine:
        steps = list(engine.stream_batch(ids.tolist(), Sampling(max_new_tokens=6), attention_mask=mask.tolist()))
    assert torch.tensor(steps).T.tolist() == expected.tolist()
    with split(model, topology=edge_and_gpus(1), seed=6, codec="int8") as engine:
        assert len(list(engine.stream(PROMPT, GREEDY))) == GREEDY.max_new_tokens
        assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)


def test_processes_of_a_cpu_and_a_gpu_give_the_tokens_of_the_shipped_model():
    ids = torch.arange(5, 25).tolist()
    expected = greedy(AutoModelForCausalLM.from_pretrained(SHIPPED), ids, GREEDY.max_new_tokens)
    for planner in ("even", "fixed_cut:3"):
        with launch_engine(model="tiny", topology=edge_and_gpus(2), planner=planner, runtime="process") as engine:
            assert list(engine.stream(ids, GREEDY)) == expected
