"""`splitray bench --suite families`: which families run split and exact, each a small model in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from splitray.errors import InputError, did_you_mean
from splitray.model.folder import check_folder
from splitray.placement import Placement, Shares
from splitray.planners.protocol import ClusterState
from splitray.planners.random import RandomPlanner
from splitray.profiling.family_configs import WRAPPERS, auto_class, context_of, families, random_model, small_config
from splitray.profiling.family_variants import VARIANTS
from splitray.profiling.machine import machine
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.generation import continue_prompt, read_prompt
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.scratch import scratch_folder
from splitray.topology import Topology
from splitray.unfinished import Unfinished

PROMPTS, NEW_TOKENS, DEVICES = (12, 700), 16, 3
LIMIT_S = 180.0
_SEEDS = 6  # of weights, until an answer is varied and no token is nearly another
_NEAR, _VARIED = 1e-3, 4
_DRAWS = 400
OUTCOMES = ("exact", "wrong", "refused", "crashed", "untried")
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Random placements that are drawn until everything is in one that the model's grain allows.

    Heads and FFN units shared unevenly in several ranges, a sub-block that is replicated, embedding and head apart,
    and layers on every device.
    """

    seed: int

    def propose(self, state: ClusterState) -> Placement:
        """See `Planner`; the draw with the most of these, if none has all."""
        draws = [RandomPlanner(np.random.default_rng(self.seed)).propose(state)]
        allowed = 3 + (state.arch.num_kv_heads > 1) + (state.arch.ffn_dim > 1)
        while sum(_traits(draws[-1], state)) < allowed and len(draws) < _DRAWS:
            draws.append(RandomPlanner(np.random.default_rng([self.seed, len(draws)])).propose(state))
        return max(draws, key=lambda p: sum(_traits(p, state)))


def _traits(placement: Placement, state: ClusterState) -> tuple[bool, ...]:
    heads = [(x.attention, state.arch.num_kv_heads) for x in placement.layers]
    units = [(x.ffn, state.arch.ffn_dim) for x in placement.layers]
    return (
        any(_uneven(s, n) for s, n in heads),
        any(_uneven(s, n) for s, n in units),
        any(s.is_replicated(n) for s, n in (*heads, *units)),
        not set(placement.embedding) & set(placement.head.devices),
        {d for s, _ in (*heads, *units) for d in s.devices} == set(state.topology.ids),
    )


def _uneven(shares: Shares, total: int) -> bool:
    counts = {shares.count(d) for d in shares.devices}
    apart = total < 4 or any(len(shares.ranges(d)) > 1 for d in shares.devices)
    return len(shares.devices) > 1 and not shares.is_replicated(total) and apart and (len(counts) > 1 or total < 3)


def sweep(
    names: Iterable[str] | None = None,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    done: Unfinished | None = None,
) -> Result:
    """Try families (all, wrappers and variants too, if none are named), one after the other, each in a child process.

    What is `done` is not tried again.

    Raises:
        InputError: a name is no family of transformers.
    """
    left_out = families()
    parts = {"families": left_out.pop("tried"), "wrappers": list(WRAPPERS), "variants": list(VARIANTS)}
    every = [n for part in parts.values() for n in part]
    wanted = every if names is None else list(names)
    for name in wanted:
        if name not in every:
            raise InputError("--families", expected="text decoders of transformers", actual=name,
                             remedy=f"correct the name{did_you_mean(name, every)}")  # fmt: skip
    before, results, done = machine(), {}, done or Unfinished()
    for name in wanted:
        results[name] = done.of(f"{name} {seed}", partial(in_a_process, name, seed))
        say(f"{name}: {results[name]['outcome']} {results[name].get('why', '')}")
    counted = Counter(r["outcome"] for n, r in results.items() if n in parts["families"])
    return {
        "suite": "families",
        "machine": before,
        "transformers": transformers.__version__,
        "counts": {o: counted[o] for o in OUTCOMES},
        **{part: {n: r for n, r in results.items() if n in known} for part, known in parts.items()},
        "left_out": left_out,
    }


def in_a_process(name: str, seed: int = 0, limit_s: float = LIMIT_S) -> Result:
    """What became of one family, whatever it does to the process that tries it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(theirs, name, seed), daemon=True)
    start = time.monotonic()
    child.start()
    theirs.close()
    result: Result = {"outcome": "crashed", "why": f"no answer within {limit_s:.0f} s"}
    try:
        if ours.poll(limit_s):
            result = ours.recv()
    except EOFError:
        child.join(10)
        result["why"] = f"the process ended with code {child.exitcode}"
    finally:
        child.kill()
        child.join()
        ours.close()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _send(pipe: Connection, name: str, seed: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe.send(try_family(name, seed))


def try_family(name: str, seed: int = 0) -> Result:
    """Save a small model of a family, and compare what it answers split over three devices with what it answers whole.

    Returns:
        `outcome` is one of `OUTCOMES`; `untried` where transformers itself cannot run the model that it would not be
        refused. Beside it `why`, and what was seen on the way.
    """
    with scratch_folder() as folder:
        result: Result = {}
        expected: list[list[int]] = []
        try:
            prompts = _save(name, folder, seed, result)
            expected = result.pop("expected")
        except Exception as error:
            result["unsplit"] = _last_line(error)
            prompts = [_prompt(12)]
        if not (folder / "config.json").is_file():
            return {**result, "outcome": "untried", "why": f"transformers: {result['unsplit']}"}
        fleet, start = ThreadFleet(), time.monotonic()
        try:
            found = _split(str(folder), prompts, seed, fleet, result)
        except InputError as error:
            why = f"{error.what}: expected {error.expected}, got {error.actual}".replace(str(folder), "FOLDER")
            result |= {"outcome": "refused", "why": " ".join(why.split()), "started": bool(fleet.hosts),
                       "after_s": round(time.monotonic() - start, 2)}  # fmt: skip
        except Exception as error:
            result |= {"outcome": "crashed", "why": _last_line(error)}
        else:
            if "unsplit" in result:
                result |= {"outcome": "untried", "why": f"transformers: {result['unsplit']}"}
            else:
                result |= _compared(found, expected)
        return result


def _prompt(tokens: int) -> list[int]:
    return np.random.default_rng(tokens).integers(3, 250, tokens).tolist()


def _save(name: str, folder: Path, seed: int, result: Result) -> list[list[int]]:
    """The prompts for a model whose answers are varied and clear, as far as some seeds give one, and its answers."""
    config = small_config(name)
    context = context_of(config) or PROMPTS[-1] + NEW_TOKENS
    prompts = [_prompt(n) for n in PROMPTS if n + NEW_TOKENS <= context]
    best: tuple[int, int] | None = None
    for draw in range(_SEEDS):
        model = random_model(small_config(name), seed * _SEEDS + draw, gain=1.5 + draw / 2)
        if not best:
            model.save_pretrained(folder)  # there is something to refuse, whatever comes
        _, gap, varied = _answers(model, prompts)
        good = (gap >= _NEAR) + (varied >= _VARIED)
        if best is None or good > best[0]:
            best = good, draw
            model.save_pretrained(folder)
        if good == 2:
            break
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32)
    result["expected"], gap, varied = _answers(model, prompts)
    result |= {"class": type(model).__name__, "prompts": [len(p) for p in prompts], "gap": round(gap, 5),
               "different_tokens": varied}  # fmt: skip
    return prompts


def _answers(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float, int]:
    """Greedy tokens, the least distance of a best logit to the next in standard deviations, the least variety."""
    answers, gaps = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True,
                                   output_logits=True, pad_token_id=0,
                                   eos_token_id=model.generation_config.eos_token_id)  # fmt: skip
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        answers.append(out.sequences[0, len(prompt) :].tolist())
        logits = torch.cat(out.logits).float()
        best = logits.topk(2, dim=-1).values
        gaps.append(float(((best[:, 0] - best[:, 1]) / logits.std(-1)).min()))
    return answers, min(gaps), min(len(set(a)) for a in answers)


def _split(folder: str, prompts: list[list[int]], seed: int, fleet: ThreadFleet, result: Result) -> list[list[int]]:
    """Tokens of each prompt, by the calls that `splitray generate --runtime local` makes."""
    check_folder(folder)
    asked = read_prompt(folder, text=None, ids="3")
    sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_ids=asked.stop_ids)
    context = max(len(p) for p in prompts) + NEW_TOKENS
    with launch_engine(model=folder, topology=Topology.uniform(DEVICES), planner=Mixed(seed), runtime="local",
                       fleet=fleet, context=context) as engine:  # fmt: skip
        arch = engine.arch
        result |= {"layers": arch.num_layers, "grain": arch.grain, "groups": arch.num_kv_heads, "units": arch.ffn_dim,
                   "unit": "experts" if arch.num_experts else "columns", "parallel": arch.parallel_block,
                   "placement": engine.placement.to_document(),
                   "lean": all(s["lean"] for s in engine.stats().values() if s["weight_bytes"])}  # fmt: skip
        documents = [continue_prompt(engine, p, sampling, tell=lambda _: None, shared_process=True) for p in prompts]
    return [d["token_ids"] for d in documents]


def _compared(found: list[list[int]], expected: list[list[int]]) -> Result:
    for prompt, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            at = same.index(False) if False in same else len(same)
            return {"outcome": "wrong", "why": f"token {at + 1} after a prompt of {PROMPTS[prompt]} is another",
                    "found": ours, "expected": theirs}  # fmt: skip
    return {"outcome": "exact"}


def _last_line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said} (line {where.lineno} of {Path(where.filename).stem})"
