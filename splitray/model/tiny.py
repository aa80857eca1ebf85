"""How the small real model that ships with the package is trained.

`python -m splitray.model.tiny --out DIR` trains a tokenizer and a Llama-type decoder on the documentation
that every CPython installation carries, or on the files given with `--text`, scores both the model and a
modified Kneser-Ney 5-gram on documents neither has seen, and writes weights, tokenizer and model card.
`--architecture gpt_neox` trains another kind of decoder in the same way.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from splitray.errors import InputError
from splitray.model.training.batches import Batches
from splitray.model.training.card import SAMPLE_QUESTION, answer, write_card
from splitray.model.training.corpus import Document, file_documents, installation_documents, split
from splitray.model.training.decoder import build_model, model_bits
from splitray.model.training.kneser_ney import KneserNey
from splitray.model.training.loop import train
from splitray.model.training.settings import ARCHITECTURES, TinySettings
from splitray.model.training.tokens import encode, encode_chats, train_tokenizer


def _bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def cook(
    documents: Sequence[Document], out: Path, settings: TinySettings, source: str, command: str
) -> dict[str, float]:
    """Train, score, and write model, tokenizer and card to ``out``.

    The documents are split here into training, checking and held-out ones; ``source`` (what the text is) and
    ``command`` (which repeats this run) are for the card.

    Returns:
        The bits per byte on the held-out documents, under "neural" and "kneser_ney".
    """
    torch.manual_seed(settings.seed)
    torch.set_flush_denormal(True)
    parts = split(documents)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(parts.train, settings)
    tokenizer.save_pretrained(out)
    train_ids, check_ids, held_ids = (encode(tokenizer, d) for d in (parts.train, parts.check, parts.held_out))
    chat_ids = encode_chats(tokenizer, parts.train, settings.seed)
    held_bytes, check_bytes = _bytes(parts.held_out), _bytes(parts.check)
    starts = [ids[: settings.long_window + 1] for ids in check_ids]
    model = build_model(settings, tokenizer)

    def save() -> None:
        # Half the bytes; what is scored below is read back from these files, rounding included.
        state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
        model.save_pretrained(out, state_dict=state)

    trained = train(
        model,
        Batches(train_ids, chat_ids, settings, len(tokenizer)),
        lambda: model_bits(model, starts, settings.long_window) / sum(len(ids) - 1 for ids in starts),
        settings,
        save,
    )
    best = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    scores = {"neural": model_bits(best, held_ids, settings.long_window) / held_bytes}
    # Questions repeat the text they were made from, which spoils counts of counts: the n-gram is given the
    # text with and without them, and credited with the better of the two.
    scores["kneser_ney"] = min(
        KneserNey(ids, len(tokenizer), tokenizer.bos_token_id).bits(held_ids) / held_bytes
        for ids in (train_ids, train_ids + chat_ids)
    )
    facts = {
        "Text": f"{source}; {_bytes(parts.train):,} bytes ({sum(map(len, train_ids)):,} tokens) to train on, "
        f"{check_bytes:,} to choose the checkpoint, {held_bytes:,} ({sum(map(len, held_ids)):,} tokens) held out",
        "Teachers": "5-grams of one half of the training documents for the other half, their weight in the loss "
        f"falling from {settings.teaching:g} to 0; neither saw the held-out documents",
        "Chat examples": f"{len(chat_ids):,}, made from the training documents",
        "Tokens seen": f"{trained.tokens:,} in {trained.steps:,} steps",
        "Processor time": f"{trained.cpu_seconds / 60:.1f} minutes of training ({settings.device})",
        "Seed": str(settings.seed),
    }
    write_card(out, best, settings, facts, scores, answer(best, tokenizer, SAMPLE_QUESTION), command)
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from the command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitray.model.tiny", description=(__doc__ or "").strip())
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default=TinySettings.architecture)
    parser.add_argument("--minutes", type=float, default=TinySettings.minutes, help="processor time to train for")
    parser.add_argument("--steps", type=int, help="train for this many steps, whatever time they take")
    parser.add_argument("--seed", type=int, default=TinySettings.seed)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=TinySettings.device)
    args = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    settings = TinySettings(
        architecture=args.architecture, seed=args.seed, device=args.device, minutes=args.minutes, steps=args.steps
    )
    budget = f"--minutes {args.minutes:g}" if args.steps is None else f"--steps {args.steps}"
    texts = "".join(f"--text {path.name} " for path in args.text)
    kind = "" if args.architecture == TinySettings.architecture else f"--architecture {args.architecture} "
    command = f"python -m splitray.model.tiny {texts}{kind}--out DIR {budget} --seed {args.seed} --device {args.device}"
    try:
        if args.minutes <= 0 or (args.steps is not None and args.steps < 1):
            got = f"{args.minutes:g} and {args.steps}"
            raise InputError("--minutes and --steps", expected="numbers above zero", actual=got, remedy="give such")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device", expected="a CUDA device", actual="none", remedy="train with --device cpu")
        documents = file_documents(args.text) if args.text else installation_documents()
        source = (
            ", ".join(path.name for path in args.text)
            or f"topics, docstrings, comments and licence of CPython {sys.version.split()[0]}"
        )
        scores = cook(documents, args.out, settings, source, command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"bits per byte: model {scores['neural']:.4f}, Kneser-Ney 5-gram {scores['kneser_ney']:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
