"""Ways to generate that transformers has: what a split model makes of each, as a list that a test runs.

`python tests/unit/generation_cases.py > docs/generation.md` writes it as a page.
"""

from __future__ import annotations

import string
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)

FAMILIES = ("llama", "gpt2", "gpt_oss")
ROWS, NEW = 97, 10
IDS = torch.tensor([[5, 17, 60, 3, 44, 44, 8, 61, 12]])
Outcome = Literal["same", "refused", "not there"]
Options = dict[str, Any]
Call = Callable[[Any, Any], Any]
"""What a model gives, and what the other model beside it (for assistants) is."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Single characters, as many as the models have rows."""
    characters = models.BPE(vocab={c: i for i, c in enumerate(string.printable[:ROWS])}, merges=[])
    made = Tokenizer(characters)
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2")


def padded() -> tuple[Tensor, Tensor]:
    """Three prompts of 9, 5 and 7 tokens and their mask."""
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    return ids.masked_fill(mask == 0, 0), mask


def generate(model: Any, **options: Any) -> Any:
    """One prompt, unless others are given; random numbers begin anew."""
    torch.manual_seed(7)
    ids = options.pop("input_ids", IDS)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, **{**given, "eos_token_id": None, **options})


@dataclass(frozen=True)
class Case:
    """One way: how it is written, and what comes of it.

    `says` is what the refusal has to say; where transformers itself refuses, both say the same. `like` are options for
    transformers where it could only do the same with a GPU.
    """

    name: str
    options: Options = field(default_factory=dict)
    outcome: Outcome = "same"
    says: str = ""
    like: Options | None = None
    call: Call | None = None
    batch: bool = False

    def run(self, model: Any, other: Any, *, whole: bool = False) -> Any:
        """What `model` gives; `whole`: it is transformers'."""
        if self.call is not None:
            return plain(self.call(model, other))
        options = dict(self.like if whole and self.like is not None else self.options)
        if self.batch:
            options["input_ids"], options["attention_mask"] = padded()
        return plain(generate(model, **options))


def plain(value: Any) -> Any:
    """Without a cache, which cannot be compared."""
    if hasattr(value, "sequences"):
        return {n: value[n] for n in value if n not in ("past_key_values",)}
    return value


class Never(LogitsProcessor):
    """Forbids half of the tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor(MANY), -float("inf"))


class At(StoppingCriteria):
    """Ends at a length."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 13, dtype=torch.bool)


class Told(TextStreamer):
    """Keeps what it is told instead of printing it."""

    def __init__(self) -> None:
        super().__init__(tokenizer(), skip_prompt=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def streamed(model: Any, _: Any) -> str:
    told = Told()
    generate(model, streamer=told)
    return told.text


def iterated(model: Any, _: Any) -> list[str]:
    stream = TextIteratorStreamer(tokenizer(), timeout=60)
    thread = threading.Thread(target=generate, args=(model,), kwargs={"streamer": stream})
    thread.start()
    pieces = list(stream)
    thread.join()
    return pieces


def piped(model: Any, _: Any) -> list[Any]:
    generates = pipeline("text-generation", model=model, tokenizer=tokenizer())
    options: Options = {"max_new_tokens": 6, "do_sample": False, "max_length": None}
    one = generates("the cat", **options)
    return [one, generates(["so", "list of"], batch_size=2, return_full_text=False, **options)]


def at_once(model: Any, _: Any) -> list[Any]:
    found: dict[int, Any] = {}

    def one(n: int) -> None:
        ways: list[Options] = [{}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}]
        found[n] = model.generate(IDS + n, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False,
                                  eos_token_id=None, pad_token_id=0, **ways[n])  # fmt: skip

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[n] for n in sorted(found)]


def taken_up(model: Any, _: Any) -> Tensor:
    first = generate(model, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[4, 9]])], 1)
    found: Tensor = generate(model, input_ids=longer, past_key_values=first.past_key_values)
    return found


def transitions(model: Any, _: Any) -> Tensor:
    out = generate(model, num_beams=3, return_dict_in_generate=True, output_scores=True)
    found: Tensor = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    return found


def own_loop(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
    for _ in range(4):
        last = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, -1]
        input_ids = torch.cat([input_ids, last.argmin(-1, keepdim=True)], 1)
    return input_ids


def holes() -> Options:
    mask = torch.ones_like(IDS)
    mask[0, [2, 3, 6]] = 0
    return {"attention_mask": mask}


DRAWS: Options = {"do_sample": True, "temperature": 4.0}  # small random models are sure of themselves
ENDS: Options = {"eos_token_id": list(range(3, 97, 3))}
MANY = list(range(4, 97, 2))
REMOTE = "trust_remote_code"
CASES: dict[str, list[Case]] = {
    "Choosing a token": [
        Case("greedy"),
        Case("greedy, a batch padded on the left", batch=True),
        Case("`do_sample`", DRAWS),
        Case("`do_sample`, a batch padded on the left", DRAWS, batch=True),
        Case("`temperature`", {**DRAWS, "temperature": 2.5}),
        Case("`top_k`", {**DRAWS, "top_k": 5}),
        Case("`top_p`", {**DRAWS, "top_p": 0.5, "top_k": 0}),
        Case("`top_h`", {**DRAWS, "top_h": 0.5}),
        Case("`min_p`", {**DRAWS, "min_p": 0.2}),
        Case("`typical_p`", {**DRAWS, "typical_p": 0.6}),
        Case("`epsilon_cutoff`", {**DRAWS, "epsilon_cutoff": 0.05}),
        Case("`eta_cutoff`", {**DRAWS, "eta_cutoff": 0.1}),
        Case("all of these together, `renormalize_logits`", {**DRAWS, "top_k": 40, "top_p": 0.95,
             "min_p": 0.001, "typical_p": 0.95, "epsilon_cutoff": 3e-4, "renormalize_logits": True}, batch=True),
        Case("`num_return_sequences`", {**DRAWS, "num_return_sequences": 3}),
        Case("a `generation_config`", call=lambda m, _: m.generate(
             IDS, attention_mask=torch.ones_like(IDS), generation_config=GenerationConfig(
                 num_beams=3, repetition_penalty=1.5, max_new_tokens=6, pad_token_id=0))),
    ],
    "Beams": [
        Case("`num_beams`", {"num_beams": 3}),
        Case("`num_beams`, a batch padded on the left", {"num_beams": 2}, batch=True),
        Case("`num_beams` with `do_sample`", {**DRAWS, "num_beams": 3}),
        Case("`num_beams` with `num_return_sequences`", {"num_beams": 4, "num_return_sequences": 3}),
        Case("`length_penalty`, `early_stopping`", {**ENDS, "num_beams": 3, "length_penalty": 2.0,
             "early_stopping": True}),
        Case("`num_beam_groups` (group beam search)", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
             "not there", REMOTE),
        Case("`force_words_ids` (constrained beam search)", {"num_beams": 3, "force_words_ids": [[5]]}, "not there",
             REMOTE),
    ],
    "Guessing ahead, looking twice": [
        Case("`assistant_model`: the split model is assisted by a whole one", call=lambda m, other: generate(
             m, assistant_model=other[0])),
        Case("`assistant_model`: the split model assists a whole one", call=lambda m, other: generate(
             other[0], assistant_model=m)),
        Case("`assistant_model` with `do_sample`", call=lambda m, other: generate(
             m, assistant_model=other[0], **DRAWS)),
        Case("`prompt_lookup_num_tokens`", {"prompt_lookup_num_tokens": 3}),
        Case("`prompt_lookup_num_tokens` with `do_sample`", {**DRAWS, "prompt_lookup_num_tokens": 3}),
        Case("`assistant_early_exit`", {"assistant_early_exit": 1}, "refused", "assistant_early_exit"),
        Case("`use_mtp`", {"use_mtp": True}, "refused", "use_mtp"),
        Case("`guidance_scale`", {"guidance_scale": 5.0}),
        Case("`guidance_scale` with `negative_prompt_ids`", {"guidance_scale": 5.0,
             "negative_prompt_ids": torch.tensor([[7, 9, 7]])}),
        Case("`dola_layers`", {"dola_layers": "high"}, "not there", REMOTE),
        Case("`penalty_alpha` (contrastive search)", {"penalty_alpha": 0.6, "top_k": 4}, "not there", REMOTE),
    ],
    "Changing the scores": [
        Case("`repetition_penalty`", {"repetition_penalty": 1.4}, batch=True),
        Case("`encoder_repetition_penalty`", {"encoder_repetition_penalty": 1.4}),
        Case("`no_repeat_ngram_size`", {"no_repeat_ngram_size": 2}, batch=True),
        Case("`encoder_no_repeat_ngram_size`", {"encoder_no_repeat_ngram_size": 1}),
        Case("`bad_words_ids`", {"bad_words_ids": [[44, 8], *([i] for i in MANY)]}),
        Case("`sequence_bias`", {"sequence_bias": {(7,): -10.0, (9, 9): 5.0, (12,): 3.0}}),
        Case("`suppress_tokens`, `begin_suppress_tokens`", {"suppress_tokens": MANY, "begin_suppress_tokens": [7, 44]}),
        Case("`forced_bos_token_id`, `forced_eos_token_id`", {"forced_bos_token_id": 9, "forced_eos_token_id": 2}),
        Case("`remove_invalid_values`", {"remove_invalid_values": True}),
        Case("`prefix_allowed_tokens_fn`", {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row + 3, 97, 5))},
             batch=True),
        Case("`watermarking_config`, green and red", {"watermarking_config": WatermarkingConfig(bias=3.0)}),
        Case("`watermarking_config`, SynthID", {**DRAWS, "watermarking_config": SynthIDTextWatermarkingConfig(
             keys=[3, 5, 7], ngram_len=3)}),
        Case("`logits_processor` of one's own", {"logits_processor": LogitsProcessorList([Never()])}, batch=True),
    ],
    "Ending": [
        Case("`eos_token_id`, several, a batch", ENDS, batch=True),
        Case("`min_length`, `min_new_tokens`", {**ENDS, "min_length": 14, "min_new_tokens": 6}),
        Case("`exponential_decay_length_penalty`", {**ENDS, "exponential_decay_length_penalty": (2, 1.3)}),
        Case("`max_length`", {"max_length": 14, "max_new_tokens": None}),
        Case("`max_time`", {"max_time": 600.0}),
        Case("`max_time` that is over", {"max_time": 0.0}),
        Case("`stop_strings`", call=lambda m, _: generate(
             m, stop_strings=list("abcdefghijklm"), tokenizer=tokenizer())),
        Case("`stopping_criteria` of one's own", {"stopping_criteria": StoppingCriteriaList([At()])}, batch=True),
    ],
    "What goes in": [
        Case("no prompt: `bos_token_id`", call=lambda m, _: m.generate(
             bos_token_id=5, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)),
        Case("an `attention_mask` with holes", holes()),
        Case("a prompt read in pieces: `prefill_chunk_size`", {"prefill_chunk_size": 4}),
        Case("`past_key_values` that a generation returned", call=taken_up),
        Case("`past_key_values` of transformers' own kind", call=lambda m, _: generate(
             m, past_key_values=DynamicCache()), outcome="refused", says="past_key_values"),
        Case("`inputs_embeds`", {"inputs_embeds": torch.zeros(1, 9, 48)}, "refused", "inputs_embeds"),
        Case("a mask of four axes", {"attention_mask": torch.ones(1, 1, 9, 9).tril()}, "not there", "must be 2D"),
    ],
    "What comes out": [
        Case("`return_dict_in_generate`, `output_scores`, `output_logits`", {"return_dict_in_generate": True,
             "output_scores": True, "output_logits": True}, batch=True),
        Case("the same of beams", {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True,
             "output_logits": True}),
        Case("`compute_transition_scores`", call=transitions),
        Case("`output_hidden_states`", {"return_dict_in_generate": True, "output_hidden_states": True}, "refused",
             "output_hidden_states"),
        Case("`output_attentions`", {"return_dict_in_generate": True, "output_attentions": True}, "refused",
             "output_attentions"),
        Case("`streamer`: `TextStreamer`", call=streamed),
        Case("`streamer`: `TextIteratorStreamer`, from another thread", call=iterated),
        Case('`pipeline("text-generation")`, one text and a batch', call=piped),
    ],
    "Caches, code and threads": [
        Case("`use_cache=False`", {"use_cache": False}, batch=True),
        Case('`cache_implementation="dynamic"`', {"cache_implementation": "dynamic"}),
        Case('`cache_implementation="static"`', {"cache_implementation": "static"}),
        Case('`cache_implementation="offloaded"`', {"cache_implementation": "offloaded"}, like={}),
        Case('`cache_implementation="offloaded_static"`', {"cache_implementation": "offloaded_static"}, like={}),
        Case('`cache_implementation="quantized"`', {"cache_implementation": "quantized"}, "refused",
             "cache_implementation"),
        Case('`cache_implementation="paged"`, `generate_batch`', {"cache_implementation": "paged"}, "refused",
             "generate_batch"),
        Case("`disable_compile`", {"disable_compile": True}),
        Case("`custom_generate`: a loop of one's own", {"custom_generate": own_loop}),
        Case("several `generate()` at once", call=at_once),
    ],
}  # fmt: skip
SHOWN = {"same": "same", "refused": "refused", "not there": "refused by transformers, too"}
BEGIN = """# Generation

Written by `python tests/unit/generation_cases.py`, never by hand: the ways to generate that transformers 5
has, and what `SplitModel.generate` makes of each. A test (`tests/unit/test_generation_cases.py`) runs all of them on
small models of {families}, whole in transformers and split at random over three devices.

- **same**: the same tokens, scores and texts as transformers gives.
- **refused**: an `InputError` before anything is generated; it says what to do instead.
- **refused by transformers, too**: for whole models as for split ones. Group and constrained beams, contrastive search
  and DoLa have moved out of it, and run where code from a hub is trusted.
"""


def every() -> Iterator[tuple[str, Case]]:
    """All cases, each with its group."""
    for group, cases in CASES.items():
        for case in cases:
            yield group, case


def page() -> str:
    """docs/generation.md."""
    names = [f"`{n}`" for n in FAMILIES]
    lines = [BEGIN.format(families=f"{', '.join(names[:-1])} and {names[-1]}")]
    for group, cases in CASES.items():
        lines += [f"## {group}\n", "| way | comes out |", "|---|---|"]
        lines += [f"| {c.name} | {SHOWN[c.outcome]} |" for c in cases]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
