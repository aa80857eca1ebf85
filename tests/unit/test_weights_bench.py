"""The suite `weights` of the bench: what it makes of a small model, and what it says was missed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from splitray.errors import InputError
from splitray.model.weights.held import HeldLinear
from splitray.model.weights.quantised import quantise
from splitray.model.weights.unused_memory import give_back
from splitray.profiling import weights_bench
from splitray.profiling.random_llama import RandomLlama
from splitray.report.bench import weights_table
from splitray.runtime.device.busy import rss_anon_bytes
from splitray.unfinished import Unfinished

SMALL = RandomLlama(
    name="small", layers=2, hidden=128, heads=4, kv_heads=2, ffn=512, vocab=512, tied=True, dtype="bfloat16"
)


@pytest.mark.usefixtures("forked_devices")
@pytest.mark.full
@pytest.mark.slow
@pytest.mark.alone
def test_a_small_model_goes_through_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(weights_bench, "MODELS", {"small": SMALL})
    with (tmp_path / "u").open("w+b") as file:
        document = weights_bench.weights(done=Unfinished(file))
        file.seek(0)
        again = weights_bench.weights(say=lambda text: pytest.fail(f"{text}: done already"), done=Unfinished(file))
    assert again["models"] == document["models"]
    assert set(document["weights"]) == set(weights_bench.MEASURED)
    for row in document["weights"].values():
        assert row["same_tokens"], "one device, halves and a cut"
        assert row["one_device_tpot_ms"] > 0 and row["prefill_tokens_per_s"] > 0 and row["rss_over_share"] > 1
        for where in ("one_device_memory", "split_half_memory"):
            memory = row[where]
            assert memory["peak_bytes"] >= memory["rss_bytes"] > memory["share_bytes"] > 0
            assert memory["read_bytes"] == pytest.approx(memory["slices_bytes"], rel=0.01)
    small = document["small_devices"]["small"]
    assert "bytes too many" in small["float32"]["refused"]
    assert small["int4/128"]["tokens"] == 8
    assert sum(small["int4/128"]["weight_bytes"].values()) <= 3 * small["memory_bytes"]
    console = Console(width=200, record=True)
    weights_table(console, document)
    assert "int4/128" in console.export_text()


def row(tpot_ms: float, rss_bytes: float = 1e9) -> dict[str, Any]:
    memory = {"share_bytes": 1e9, "rss_bytes": rss_bytes, "peak_bytes": rss_bytes, "read_bytes_per_s": 2e8}
    return {"one_device_tpot_ms": tpot_ms, "split_half_over_one_device": 1.7, "layer_cut_over_one_device": 0.9,
            "prefill_tokens_per_s": 60.0, "prefill_split_over_one_device": 1.7, "read_over_slices": 1.0,
            "one_device_memory": memory, "split_half_memory": memory}  # fmt: skip


def test_a_miss_stands_beside_what_was_aimed_at():
    rows = {"float32": row(200.0), "int4": row(40.0, 2e9), "int8": row(100.0)}
    found = {(a["format"], a["what"]): a for a in weights_bench.aims("llama-1b", rows)}
    assert found["int4", "tokens/s, one device"] == {"model": "llama-1b", "format": "int4", "aim": 22, "reached": True,
                                                     "what": "tokens/s, one device", "measured": 25.0}  # fmt: skip
    assert not found["int8", "tokens/s, one device"]["reached"]
    assert found["int4", "speed over float32, one device"]["measured"] == 5.0
    assert found["int8", "split half over one device"]["reached"]
    assert not found["int8", "one cut over one device"]["reached"]
    resident = "resident MB, one device"
    assert found["float32", resident]["reached"] and not found["int4", resident]["reached"]
    assert found["int4", resident]["aim"] == pytest.approx(1.1e3 + 350)


def test_an_unknown_model_is_refused_before_anything_is_written():
    with pytest.raises(InputError, match="did you mean llama-1b"):
        weights_bench.weights(["llama-1bn"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nobody tells what is resident")
def test_a_large_prompt_leaves_no_memory_with_each_matrix():
    """onnxruntime's arenas would keep the outputs of the largest prompt, 8 MB for each of these."""
    linears = [HeldLinear([quantise(torch.randn(512, 64), bits=4, group=32)], None, sums=False) for _ in range(12)]
    x = np.ones((4096, 64), np.float32)
    linears[0](x)
    give_back()
    before = rss_anon_bytes(os.getpid())
    for linear in linears:
        linear(x)
    give_back()
    assert rss_anon_bytes() - before < 3 * 4096 * 512 * 4
