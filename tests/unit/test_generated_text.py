from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine
from tokenizers_made import sentencepiece
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from serve_apps.engine_queue import EngineQueue
from serve_apps.protocol import CompletionRequest
from serve_apps.service import TextService
from splitray.commands.cli import app

PROMPT = "the cat sat on"
TOKENIZER = sentencepiece()
PROMPT_IDS = TOKENIZER(PROMPT)["input_ids"]
SAID = TOKENIZER.convert_tokens_to_ids(["▁the", "<0xC3>", "<0xA9>", "<|eot|>", "▁mat", "<tool>", "▁and", "</s>"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose layers add nothing, so that the last token alone decides: it says SAID after PROMPT."""
    folder = tmp_path_factory.mktemp("models") / "model"
    TOKENIZER.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=128, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=SAID[-1], pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = torch.nn.functional.normalize(torch.randn(config.vocab_size, config.hidden_size), dim=1)
        llama.model.embed_tokens.weight.copy_(rows)
        llama.lm_head.weight.zero_()
        for before, after in zip([PROMPT_IDS[-1], *SAID], SAID, strict=False):
            llama.lm_head.weight[after] = rows[before]
    llama.save_pretrained(folder)
    return folder


def served(*, skip_special_tokens: bool) -> str:
    """What the API answers if the engine says the same ids."""
    engine = FakeEngine(tokenizer=TOKENIZER, say=lambda _: SAID)
    queue = EngineQueue(lambda: engine)
    try:
        service = TextService(queue, model_name="m")
        request = CompletionRequest(model="m", prompt=PROMPT, skip_special_tokens=skip_special_tokens)
        jobs = service.jobs(request)

        async def text() -> str:
            return "".join([piece.text async for piece in service.pieces(jobs)])

        return asyncio.run(text())
    finally:
        queue.close()


@pytest.mark.parametrize("option", ["--skip-special-tokens", "--keep-special-tokens"])
def test_prompt_and_text_are_transformers_decoding_of_all_ids_on_the_command_line_and_served(
    model: Path, option: str
) -> None:
    arguments = ["generate", "--model", str(model), "--runtime", "local", "--max-new-tokens", "20", "--json", option]
    result = CliRunner().invoke(app, [*arguments, "--prompt", PROMPT])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["token_ids"] == SAID
    skip = option == "--skip-special-tokens"
    assert PROMPT + document["text"] == TOKENIZER.decode([*PROMPT_IDS, *SAID], skip_special_tokens=skip)
    # The API leaves out what ended the answer, as OpenAI's does.
    assert served(skip_special_tokens=skip) == document["text"].removesuffix("</s>")
    by_ids = CliRunner().invoke(app, [*arguments, "--prompt-ids", ",".join(map(str, PROMPT_IDS))])
    assert json.loads(by_ids.stdout)["text"] == document["text"]
