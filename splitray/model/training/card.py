"""The card of the small model: what it is, what it was trained on, how well it does, and a sample."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from splitray.model.training.settings import ARCHITECTURES, TinySettings
from splitray.model.training.tokens import ASSISTANT
from splitray.results import write_whole

SAMPLE_QUESTION = "What does os.path.join do?"


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, most_tokens: int = 80) -> str:
    """Return the model's greedy answer to one chat question."""
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer.backend_tokenizer.encode(str(prompt), add_special_tokens=False).ids])
    model.eval()
    with torch.inference_mode():
        for _ in range(most_tokens):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if int(following) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], dim=1)
    text = str(tokenizer.decode(ids[0], skip_special_tokens=False))
    return text.rsplit(ASSISTANT, 1)[1].strip()


def write_card(
    out: Path,
    model: PreTrainedModel,
    settings: TinySettings,
    facts: dict[str, str],
    scores: dict[str, float],
    sample: str,
    command: str,
) -> None:
    """Write MODEL_CARD.md beside the files it describes."""
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file() and path.suffix != ".md")
    lower = 1 - scores["neural"] / scores["kneser_ney"]
    quoted = "\n".join(f"> {line}" for line in sample.splitlines())
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    write_whole(
        out / "MODEL_CARD.md",
        f"""# The small model of splitray

A decoder small enough to ship with the package and real enough to show what a split does to one. It speaks
the English of the Python documentation. It is no source of facts: it makes up what it does not know.

| | |
|---|---|
| Architecture | {ARCHITECTURES[settings.architecture]}; {settings.layers} layers, {settings.heads} heads, \
{getattr(model.config, "num_key_value_heads", settings.heads)} key-value heads, \
hidden size {settings.hidden}, intermediate size {settings.intermediate}, tied embeddings, \
context {settings.context} |
| Tokenizer | byte-level BPE, {model.config.vocab_size} tokens, with a chat template |
| Parameters | {model.num_parameters():,} |
| Files | {size:,} bytes (weights in bfloat16; load them as float32) |
{rows}
| Licence | weights and recipe Apache-2.0; the default training text is under the PSF licence |

## Bits per byte on unseen documents

| model | bits per byte |
|---|---|
| this model | {scores["neural"]:.4f} |
| modified Kneser-Ney 5-gram | {scores["kneser_ney"]:.4f} |

The model is {abs(lower):.1%} {"below" if lower > 0 else "above"} the n-gram.

Both see the same tokens of the same whole documents, chosen by the hash of
their names; tokenizer, n-gram and model were trained without them, and paragraphs that also occur in the
training text were dropped from them. The end of each document is predicted too. The model scores with a
window of {settings.long_window} tokens that moves by half its length; the n-gram sees the four tokens before.

## Sample

User: {SAMPLE_QUESTION}

{quoted}

## Command

    {command}
""",
    )
