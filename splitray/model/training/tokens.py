"""The tokenizer of the small model, and documents and chats as its token ids."""

import random
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from splitray.model.training.corpus import Document
from splitray.model.training.settings import TinySettings

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
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You know the Python standard library.")
GREETINGS = (
    ("Hello!", "Hello! Ask me about a module, a function or a class of the Python standard library."),
    ("Hi", "Hello! What would you like to know about Python?"),
    ("Who are you?", "I am a small language model trained on the documentation that comes with Python."),
    ("What can you do?", "I can answer in the style of the Python documentation. I am small and often wrong."),
    ("Thank you!", "You are welcome."),
    ("What is Python?", "Python is an interpreted, interactive, object-oriented programming language."),
)


def train_tokenizer(documents: Sequence[Document], settings: TinySettings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts bos before text and knows the chat format."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
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
        model_max_length=settings.context,
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
