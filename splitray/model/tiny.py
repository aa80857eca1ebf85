"""The recipe of the small real model that ships with the package.

``python -m splitray.model.tiny --out DIR`` trains a tokenizer and a Llama-type decoder on the documentation
that every CPython installation carries, or on the files given with ``--text``, scores both the model and a
modified Kneser-Ney 5-gram on documents neither has seen, and writes weights, tokenizer and model card.
``--architecture gpt_neox`` trains another kind of decoder in the same way.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import importlib
import inspect
import io
import math
import random
import re
import sys
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from splitray.model.kneser_ney import KneserNey

BOS, EOS, SYSTEM, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}{{ '<|system|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% else %}{{ '<|user|>' }}{% endif %}"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARCHITECTURES = {"llama": "Llama", "gpt_neox": "GPT-NeoX"}
"""What can be trained, by its name in transformers: the second one has layer norms, biases and parallel blocks."""
INTO_RESIDUAL = ("o_proj", "down_proj", "dense", "dense_4h_to_h")
SHORTEST_TEXT_BYTES = 20_000
FILE_DOCUMENT_BYTES = 3_000
HELD_OUT_OF = 20
SAMPLE_QUESTION = "What does os.path.join do?"
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You know the Python standard library.")
GREETINGS = (
    ("Hello!", "Hello! Ask me about a module, a function or a class of the Python standard library."),
    ("Hi", "Hello! What would you like to know about Python?"),
    ("Who are you?", "I am a small language model trained on the documentation that comes with Python."),
    ("What can you do?", "I can answer in the style of the Python documentation. I am small and often wrong."),
    ("Thank you!", "You are welcome."),
    ("What is Python?", "Python is an interpreted, interactive, object-oriented programming language."),
)


class RecipeError(Exception):
    """The recipe cannot run with what it was given; the message says what to change."""


@dataclass(frozen=True)
class Document:
    """One document: its name decides on which side of the split it falls, its chats are only trained on."""

    name: str
    text: str
    chats: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result but the text; the defaults are those of the shipped model.

    ``teaching`` is the share of the loss, falling to 0, that is taken against n-gram teachers. Their
    distributions tell far more per token than the one token that follows, and so save most of the early steps.
    """

    architecture: str = "llama"
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    context: int = 1024
    window: int = 128
    long_window: int = 512
    long_share: float = 0.15
    batch_tokens: int = 2048
    chat_share: float = 0.15
    teaching: float = 0.6
    dropout: float = 0.05
    matrix_rate: float = 0.02
    vector_rate: float = 0.01
    decay: float = 0.05
    seed: int = 1
    device: str = "cpu"
    minutes: float = 50.0
    steps: int | None = None


# ---------------------------------------------------------------------------------------------- the text


def _prose(text: str) -> str:
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).strip().splitlines())


def _first_sentences(doc: str, most_characters: int = 420) -> str | None:
    """Return the opening prose of a docstring as one line, or None if it does not read like prose."""
    taken = ""
    for paragraph in doc.split("\n\n")[:3]:
        line = " ".join(paragraph.split())
        if len(taken) + len(line) > most_characters or not re.match(r"[A-Z].*[.:]$", line) or ">>>" in line:
            break
        taken = f"{taken} {line}".strip()
    return taken if len(taken) >= 40 and taken.endswith(".") else None


def _chat(kind: str, name: str, doc: str) -> Iterator[tuple[str, str]]:
    """Yield question and answer about one documented thing, if its docstring opens with prose."""
    answer = _first_sentences(doc)
    if answer is None:
        return
    asks = {
        "function": (f"What does {name} do?", f"How do I use {name}?", f"Explain the function {name}."),
        "class": (f"What is {name}?", f"What is the class {name} for?", f"Explain {name}."),
        "module": (f"What is the module {name}?", f"What is {name} for?", f"Tell me about {name}."),
    }[kind]
    lead = {"function": "does this", "class": "is a class", "module": "is a module"}[kind]
    ask = asks[hashlib.sha256(name.encode()).digest()[0] % 3]
    yield ask, f"{name} {lead}. {answer}" if kind != "function" else f"{name} {lead}: {answer}"


def _comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of the comments that fill at least two whole lines and read like prose."""
    block: list[str] = []
    last = -1
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    whole = [t for t in tokens if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()]
    for row, text in [(t.start[0], t.string.lstrip("#!:")) for t in whole] + [(1 << 30, "")]:
        if row != last + 1:
            prose = _prose("\n".join(["", *block]))
            letters = sum(c.isalpha() or c == " " for c in prose)
            if len(block) >= 2 and len(prose) >= 80 and letters > 0.85 * len(prose):
                yield last - len(block) + 1, prose
            block = []
        block.append(text)
        last = row


def module_document(name: str, source: str) -> Document:
    """Turn a module's docstrings and longer comments into one document, in the order of the source."""
    parts: list[tuple[int, str]] = list(_comment_blocks(source))
    chats: list[tuple[str, str]] = []

    def visit(node: ast.AST, path: str, kind: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 20:
                heading = path
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    heading += f"({', '.join(argument.arg for argument in node.args.args)})"
                parts.append((getattr(node, "lineno", 0), f"{heading}\n\n{_prose(doc)}"))
                chats.extend(_chat(kind, path, doc))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{path}.{child.name}", "class")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{path}.{child.name}", "function")

    visit(ast.parse(source), name, "module")
    return Document(name, "\n\n".join(text for _, text in sorted(parts, key=lambda p: p[0])), tuple(chats))


def _compiled_documents() -> Iterator[Document]:
    """Yield the docstrings of the modules and types that are compiled into the interpreter."""
    owners: list[Any] = [importlib.import_module(name) for name in sorted(sys.builtin_module_names)]
    owners += [value for _, value in sorted(vars(builtins).items()) if isinstance(value, type)]
    for owner in owners:
        name = owner.__name__
        parts: list[str] = []
        chats: list[tuple[str, str]] = []
        for key, value in [("", owner), *sorted(vars(owner).items())]:
            doc = getattr(value, "__doc__", None)
            if not isinstance(doc, str) or len(doc) < 40 or (key and isinstance(value, str | int | tuple)):
                continue
            path = f"{name}.{key}" if key else name
            parts.append(f"{path}\n\n{_prose(doc)}")
            kind = "class" if isinstance(value, type) else "function" if callable(value) else "module"
            chats.extend(_chat(kind, path, doc))
        yield Document(f"builtin {name}", "\n\n".join(parts), tuple(chats))


def topic_documents() -> list[Document]:
    """Collect the chapters of the language reference that ``help()`` shows."""
    return [Document(f"topic {name}", _prose(text)) for name, text in sorted(topics.items())]


def installation_documents() -> list[Document]:
    """Collect the English that comes with this Python: topics, docstrings, comments, licence.

    Source files are parsed, never imported. Tests and foreign packages are left out, since many
    installations lack them.
    """
    documents = topic_documents()
    root = Path(sysconfig.get_paths()["stdlib"])
    apart = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if apart & set(parts) or parts[0].startswith("config-"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            name = ".".join(part for part in parts if part != "__init__")
            documents.append(module_document(name, source))
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
    documents.extend(_compiled_documents())
    licence = root / "LICENSE.txt"
    if licence.is_file():
        documents.append(Document("licence", licence.read_text(encoding="utf-8")))
    return documents


def file_documents(paths: Sequence[Path]) -> list[Document]:
    """Cut text files into documents of about 3 kB at blank lines.

    Raises:
        RecipeError: if a file cannot be read, is not UTF-8, or all of them together are too short.
    """
    documents: list[Document] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror or error}") from error
        piece = ""
        for paragraph in re.split(r"(?<=\n)(?=\n)" if "\n\n" in text else r"(?<=\n)", text):
            piece += paragraph
            if len(piece.encode()) >= FILE_DOCUMENT_BYTES:
                documents.append(Document(f"{path.name} {len(documents)}", piece.strip()))
                piece = ""
        if piece.strip():
            documents.append(Document(f"{path.name} {len(documents)}", piece.strip()))
    total = sum(len(document.text.encode()) for document in documents)
    if total < SHORTEST_TEXT_BYTES or len(documents) < 4:
        raise RecipeError(f"{total} bytes of text are too short to train on; give {SHORTEST_TEXT_BYTES} or more")
    return documents


@dataclass(frozen=True)
class Split:
    """The documents by use. ``held_out`` is only scored; ``check`` picks the checkpoint; the rest trains."""

    train: list[Document]
    check: list[Document]
    held_out: list[Document]


def split(documents: Sequence[Document]) -> Split:
    """Split whole documents by the hash of their names, and keep every paragraph only where it comes first.

    Training text goes first, so that a paragraph also found there is no part of what is scored.
    """

    def place(document: Document) -> int:
        return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:4], "big") % HELD_OUT_OF

    ordered = sorted((d for d in documents if len(d.text) > 60), key=lambda d: (place(d), d.name))
    held_out = [d for d in ordered if place(d) == 0] or ordered[:1]
    check = [d for d in ordered if place(d) == 1 and d not in held_out] or ordered[len(held_out) :][:1]
    train = ordered[len(held_out) + len(check) :]
    seen: set[str] = set()

    def fresh(document: Document) -> Document:
        kept = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < 40 or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        return replace(document, text="\n\n".join(kept))

    return Split([fresh(d) for d in train], [fresh(d) for d in check], [fresh(d) for d in held_out])


# ------------------------------------------------------------------------------------ tokens and weights


def train_tokenizer(documents: Sequence[Document], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts bos before text and knows the chat format."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, EOS, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((document.text for document in documents), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[list[int]]:
    """Return each document as token ids from bos to eos."""
    core, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    return [[*core.encode(document.text).ids, eos] for document in documents]


def encode_chats(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], seed: int) -> list[list[int]]:
    """Return the documents' questions and answers in the chat format, a third of them with a system turn."""
    chance = random.Random(seed)
    chats = [chat for document in documents for chat in document.chats]
    sequences = []
    for question, answer in [*chats, *(GREETINGS * (len(chats) // 100))]:
        system = [{"role": "system", "content": chance.choice(SYSTEM_PROMPTS)}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template([*(system if chance.random() < 1 / 3 else []), *turns], tokenize=False)
        sequences.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return sequences


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the untrained decoder, with dropout on the embedding and on what each block adds."""
    grouped = {"num_key_value_heads": recipe.kv_heads} if recipe.architecture == "llama" else {}
    config = AutoConfig.for_model(
        recipe.architecture,
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **grouped,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)

    def drop(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        # One mask for all tokens of a window: a mask for each costs a sixth of the whole step on a CPU.
        mask = torch.ones_like(output[:, :1])
        return output * nn.functional.dropout(mask, recipe.dropout)

    with torch.no_grad():
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if last in INTO_RESIDUAL:
                module.weight.zero_()  # every block starts as the identity, which trains faster
            if last in ("embed_tokens", "embed_in", *INTO_RESIDUAL):
                module.register_forward_hook(drop)
    return model


def _orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Push the singular values of a stack of matrices towards 1 (quintic Newton-Schulz iteration)."""
    x = update.mT if update.size(-2) > update.size(-1) else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if update.size(-2) > update.size(-1) else x


class Muon:
    """Momentum whose step is made orthogonal, for the matrices of the blocks.

    Needs fewer tokens than AdamW here, which is what a training on one CPU core has least of. Matrices of
    one shape are stepped together, and in float32: half precision is slow on many CPUs.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], decay: float):
        self.decay = decay
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = [[p for p in matrices if tuple(p.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros_like(torch.stack(list(group))) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Step every matrix by its gradient at this learning rate and drop the gradients."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(gradient, 0.05)
            update = _orthogonal(gradient.lerp(momentum, 0.95))
            scale = rate * math.sqrt(max(1.0, update.size(-2) / update.size(-1)))
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(change, alpha=scale)
                parameter.grad = None


# ------------------------------------------------------------------------------------ training and scores


class Batches:
    """An endless stream of training windows, reshuffled by document at every pass over the text.

    The training documents come in two folds. An n-gram model of each fold teaches the other: on text that a
    teacher knows by heart its probabilities would be no honest ones.
    """

    def __init__(self, documents: list[list[int]], chats: list[list[int]], recipe: Recipe, vocabulary: int):
        self.random = np.random.default_rng(recipe.seed)
        self.recipe, self.tokens = recipe, 0
        folds = [documents[0::2], documents[1::2]]
        self.teachers = [KneserNey(fold, vocabulary, documents[0][0]) for fold in reversed(folds)]
        self.tables = [teacher.table() for teacher in self.teachers]
        self.streams = [self._stream(part) for part in [*folds, chats] if part]
        chat = recipe.chat_share if chats else 0.0
        self.shares = [(1 - chat) / 2, (1 - chat) / 2, chat][: len(self.streams)]

    def _stream(self, sequences: list[list[int]]) -> Iterator[Callable[[int], np.ndarray]]:
        while True:
            order = self.random.permutation(len(sequences))
            flat = np.concatenate([np.asarray(sequences[i]) for i in order])
            at = int(self.random.integers(0, self.recipe.window))
            while at < flat.size:
                taken: list[int] = []

                def take(length: int, at: int = at, flat: np.ndarray = flat, taken: list = taken) -> np.ndarray:
                    taken.append(length)
                    return np.resize(flat[at : at + length], length)

                yield take
                at += taken[0]

    def next(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next windows, ``window + 1`` tokens each, and what the teachers expect of the first ones.

        The rows that have teachers come first; the teachers' rows are one distribution for each token.
        """
        rows, taught = [], []
        counts = self.random.multinomial(max(1, self.recipe.batch_tokens // window), self.shares)
        for source, count in enumerate(counts):
            part = [next(self.streams[source])(window + 1) for _ in range(count)]
            rows.extend(part)
            if part and source < len(self.teachers):
                taught.append(self.teachers[source].spread(np.stack(part), self.tables[source]))
        self.tokens += len(rows) * window
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids, torch.from_numpy(np.concatenate(taught)) if taught else torch.empty(0, 0)


def mixed_loss(logits: torch.Tensor, ids: torch.Tensor, taught: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the mean cross-entropy per token, a ``weight`` of it against the teachers where there are any."""
    likely = torch.log_softmax(logits.float().flatten(0, 1), -1)
    hard = nn.functional.nll_loss(likely, ids[:, 1:].flatten(), reduction="none")
    count = taught.shape[0]
    if count == 0 or weight == 0:
        return hard.mean()
    soft = -(taught * likely[:count]).sum()
    return (hard.sum() + weight * (soft - hard[:count].sum())) / hard.numel()


def model_bits(model: PreTrainedModel, sequences: Sequence[Sequence[int]], context: int) -> float:
    """Return the total of -log2 p over all tokens of ``sequences`` but their leading bos.

    A window of ``context`` tokens moves by half its length, so that every token but those early in a
    document is scored with at least half a window before it. Nothing crosses a document.
    """
    model.eval()
    total = 0.0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor(sequence, device=device)
            start = scored = 0
            while scored < len(sequence) - 1:
                window = ids[start : start + context + 1]
                logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
                losses = nn.functional.cross_entropy(logits, window[1:], reduction="none")
                total += float(losses[scored - start :].sum())
                scored = start + len(window) - 1
                start += context // 2
    return total / math.log(2)


@dataclass
class Progress:
    """Tells how far the training is: a live line on a terminal, else a line every thirty seconds."""

    live: bool = field(default_factory=lambda: sys.stderr.isatty())
    last: float = -1e9

    def tell(self, text: str, always: bool = False) -> None:
        """Print ``text`` if it is time to."""
        if always or time.monotonic() - self.last >= (0.5 if self.live else 30):
            self.last = time.monotonic()
            line_end = "" if self.live and not always else "\n"
            print(("\r\033[K" if self.live else "") + text, end=line_end, file=sys.stderr, flush=True)


@dataclass
class Outcome:
    """What a training run came to."""

    tokens: int
    steps: int
    cpu_seconds: float


def train(
    model: PreTrainedModel,
    batches: Batches,
    check: Callable[[], float],
    recipe: Recipe,
    save_best: Callable[[], None],
) -> Outcome:
    """Train until the budget of steps or of processor time is spent; call ``save_best`` at each new best.

    ``check`` is what has to fall; its own time is no part of the budget.

    Processor time and not wall-clock time counts, so a paused or crowded process still gets its share.
    """
    device = torch.device(recipe.device)
    nn.Module.to(model, device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, recipe.decay)
    adam = torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0)
    progress, best, due, began, step = Progress(), math.inf, 0.4, time.process_time(), 0
    while True:
        spent = time.process_time() - began
        done = step / recipe.steps if recipe.steps is not None else spent / (60 * recipe.minutes)
        if done >= 1 or done >= due:
            due = done + 0.1
            bits = check()
            progress.tell(f"{done:4.0%}  step {step}  check {bits:.4f} bits per token", always=True)
            if bits < best:
                best = bits
                save_best()
            if done >= 1:
                return Outcome(batches.tokens, step, spent)
            began += time.process_time() - began - spent
        model.train()
        rate = min(1.0, (step + 1) / 20, max(0.0, (1 - done) / 0.7))
        window = recipe.long_window if done >= 1 - recipe.long_share else recipe.window
        ids, taught = (tensor.to(device) for tensor in batches.next(window))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = mixed_loss(logits, ids, taught, recipe.teaching * (1 - done))
        loss.backward()
        muon.step(recipe.matrix_rate * rate)
        for group in adam.param_groups:
            group["lr"] = recipe.vector_rate * rate
        adam.step()
        adam.zero_grad()
        step += 1
        progress.tell(f"{done:4.0%}  step {step}  tokens {batches.tokens:,}  loss {float(loss.detach()):.3f}")


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


def _bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def cook(documents: Sequence[Document], out: Path, recipe: Recipe, source: str, command: str) -> dict[str, float]:
    """Run the whole recipe and write model, tokenizer and card to ``out``.

    Args:
        documents: the text, split here into training, checking and held-out documents.
        out: the directory to write; made if missing.
        recipe: the sizes and the budget.
        source: what the text is, for the card.
        command: the command that repeats this run, for the card.

    Returns:
        The bits per byte on the held-out documents, under "neural" and "kneser_ney".
    """
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)
    parts = split(documents)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(parts.train, recipe)
    tokenizer.save_pretrained(out)
    train_ids, check_ids, held_ids = (encode(tokenizer, d) for d in (parts.train, parts.check, parts.held_out))
    chat_ids = encode_chats(tokenizer, parts.train, recipe.seed)
    held_bytes, check_bytes = _bytes(parts.held_out), _bytes(parts.check)
    starts = [ids[: recipe.long_window + 1] for ids in check_ids]
    model = build_model(recipe, tokenizer)

    def save() -> None:
        # Half the bytes; what is scored below is read back from these files, rounding included.
        state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
        model.save_pretrained(out, state_dict=state)

    outcome = train(
        model,
        Batches(train_ids, chat_ids, recipe, len(tokenizer)),
        lambda: model_bits(model, starts, recipe.long_window) / sum(len(ids) - 1 for ids in starts),
        recipe,
        save,
    )
    best = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    scores = {"neural": model_bits(best, held_ids, recipe.long_window) / held_bytes}
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
        f"falling from {recipe.teaching:g} to 0; neither saw the held-out documents",
        "Chat examples": f"{len(chat_ids):,}, made from the training documents",
        "Tokens seen": f"{outcome.tokens:,} in {outcome.steps:,} steps",
        "Processor time": f"{outcome.cpu_seconds / 60:.1f} minutes of training ({recipe.device})",
        "Seed": str(recipe.seed),
    }
    write_card(out, best, recipe, facts, scores, answer(best, tokenizer, SAMPLE_QUESTION), command)
    return scores


def write_card(
    out: Path,
    model: PreTrainedModel,
    recipe: Recipe,
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
    (out / "MODEL_CARD.md").write_text(
        f"""# The small model of splitray

A decoder small enough to ship with the package and real enough to show what a split does to one. It speaks
the English of the Python documentation. It is no source of facts: it makes up what it does not know.

| | |
|---|---|
| Architecture | {ARCHITECTURES[recipe.architecture]}; {recipe.layers} layers, {recipe.heads} heads, \
{getattr(model.config, "num_key_value_heads", recipe.heads)} key-value heads, \
hidden size {recipe.hidden}, intermediate size {recipe.intermediate}, tied embeddings, \
context {recipe.context} |
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
window of {recipe.long_window} tokens that moves by half its length; the n-gram sees the four tokens before.

## Sample

User: {SAMPLE_QUESTION}

{quoted}

## Command

    {command}
""",
        encoding="utf-8",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitray.model.tiny", description=(__doc__ or "").strip())
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default=Recipe.architecture)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="processor time to train for")
    parser.add_argument("--steps", type=int, help="train for this many steps, whatever time they take")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=Recipe.device)
    args = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    recipe = Recipe(
        architecture=args.architecture, seed=args.seed, device=args.device, minutes=args.minutes, steps=args.steps
    )
    budget = f"--minutes {args.minutes:g}" if args.steps is None else f"--steps {args.steps}"
    texts = "".join(f"--text {path.name} " for path in args.text)
    kind = "" if args.architecture == Recipe.architecture else f"--architecture {args.architecture} "
    command = f"python -m splitray.model.tiny {texts}{kind}--out DIR {budget} --seed {args.seed} --device {args.device}"
    try:
        if args.minutes <= 0 or (args.steps is not None and args.steps < 1):
            raise RecipeError("--minutes and --steps must be above zero")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("--device cuda: no CUDA device was found")
        documents = file_documents(args.text) if args.text else installation_documents()
        source = (
            ", ".join(path.name for path in args.text)
            or f"topics, docstrings, comments and licence of CPython {sys.version.split()[0]}"
        )
        scores = cook(documents, args.out, recipe, source, command)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"bits per byte: model {scores['neural']:.4f}, Kneser-Ney 5-gram {scores['kneser_ney']:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
