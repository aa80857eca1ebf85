"""`splitray perplexity`: how well a model predicts a text, whole or split, exact, through a codec or over a channel.

A window slides over the text by a stride; each token is scored once, with all of the window before it as context. Every
token weighs the same, wherever the windows end, and nothing that is not finite is left out (docs/equations.md E3.8).
Under a channel the text is read several times, each time with other losses ("masks"), which follow from the seed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitray.channel import NoisyChannel, as_channel
from splitray.codecs import Codec, as_codec
from splitray.errors import InputError, ModelError
from splitray.model.opened import is_plain
from splitray.model.reading import read_config
from splitray.placement import Placement
from splitray.runtime.engine.session import check_ids
from splitray.runtime.hf import SplitModel
from splitray.runtime.launch import model_path, needed_tokenizer
from splitray.text.ids import text_ids
from splitray.topology import Link, Topology
from splitray.user_file import UserFile
from splitray.weight_formats import AUTO_WEIGHTS, BEST_WEIGHTS

WINDOW_TOKENS, STRIDE_TOKENS = 2048, 512
MASKS = 5
_MOST_TEXT = 40_000_000  # bytes; a model reads a few thousand of them a second
Forward = Callable[[Tensor, int], Tensor]
"""Ids [1, T] and how many last positions are wanted, to their logits [1, positions, vocab]."""
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Which text is scored with which model, and how.

    `window` is at most the model's context (default: that, or 2048), `stride` less than it (512, or half the window).
    `tokens` takes the beginning of the text only; `masks` is how often it is read under a channel.
    """

    model: str
    text: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    window: int | None = None
    stride: int | None = None
    tokens: int | None = None
    masks: int = MASKS


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityRequest(Scoring):
    """One measurement, as the command line asks for it. At most one of `cut` and `placement`; neither is one device.

    `weights` is the format in which devices hold them; None: float32, and one device is then transformers itself, or
    as they are stored, where that is in few bits.
    """

    cut: int | None = None
    placement: str | Path | Placement | None = None
    codec: str = "none"
    channel: str = "none"
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [begin, stop) are read, those of [first, stop) are scored."""

    begin: int
    first: int
    stop: int


def run(request: PerplexityRequest, *, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Score a text file.

    A codec or a channel without a cut is tried at the middle one: on one device nothing would cross.

    Returns:
        `perplexity` (of the mean likelihood over all masks), `tokens` (how many were scored), `channel`, `codec`,
        `weights` (the format they are held in), `cut`, `placement` (its document, null for transformers' own model),
        `seed`, `mask_perplexities` (one without a channel).

    Raises:
        InputError: the text, the cut, the placement, the codec or the channel cannot be used.
        ModelError: no such model, or it gave something that is not finite.
        DeviceLost: a device died.
    """
    codec = as_codec(request.codec)
    channel = as_channel(request.channel, seed=request.seed)
    at_least("masks", request.masks)
    if request.cut is not None and request.placement is not None:
        raise InputError("placement", expected="either --cut or --placement", actual="both", remedy="leave one out")
    if request.weights == BEST_WEIGHTS:
        raise InputError("weights best", expected="one format to measure", actual="a choice of a planner",
                         remedy="give the format that `splitray plan --weights best` finds")  # fmt: skip
    config = read_config(model_path(request.model))
    num_layers = config.num_hidden_layers
    cut = request.cut
    if cut is None and request.placement is None and (codec != "none" or channel is not None):
        cut = num_layers // 2
    if cut is not None:
        within_layers(cut, num_layers, request.model)
    if request.weights is None and not is_plain(model_path(request.model)):
        request = replace(request, weights=AUTO_WEIGHTS)
    window, stride = window_and_stride(config, request.window, request.stride)
    ids_T = read_ids(request.model, read_text(request.text), window=window, most=request.tokens)
    with ExitStack() as stack:
        placement: Placement | None = None
        progress("Reading the model")
        held = "float32"
        if cut is None and request.placement is None and request.weights is None:
            forward = whole(request.model, request.dtype)
        else:
            model = stack.enter_context(split(request, cut, codec, channel))
            held, placement = model.engine.arch.weights, model.engine.placement
            forward = of_split(model)
        masks = 1 if channel is None else request.masks
        nll_MT = np.stack([losses(ids_T, forward, window, stride, progress=progress) for _ in range(masks)])
    return {
        "perplexity": math.exp(float(nll_MT.mean())),
        "tokens": nll_MT.shape[1],
        "channel": "none" if channel is None else str(channel),
        "codec": codec,
        "weights": held,
        "cut": cut,
        "placement": None if placement is None else placement.to_document(),
        "seed": request.seed,
        "mask_perplexities": [math.exp(float(nll_T.mean())) for nll_T in nll_MT],
    }


def single(what: str, given: str | Sequence[str] | None) -> str | None:
    """The one value of an option that a sweep may have several of.

    Raises:
        InputError: there are several.
    """
    values = [given] if isinstance(given, str) else list(given or ())
    if len(values) > 1 or any("/" in v for v in values if what == "channel"):
        raise InputError(
            what, expected="one, or --out FILE for a sweep over several", actual=values, remedy="give --out FILE"
        )
    return values[0] if values else None


def single_cut(text: str | None) -> int | None:
    """The one cut of a run that is no sweep.

    Raises:
        InputError: it is no whole number, or several.
    """
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        remedy = "write for example --cut 6, or give --out FILE"
        raise InputError(
            "cut", expected="a whole number, or --out FILE for a sweep over several", actual=repr(text), remedy=remedy
        ) from error


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a text; the first scores all but its first token, each later one its new tokens."""
    first = 1
    for begin in range(0, num_tokens, stride):
        stop = min(begin + window, num_tokens)
        if stop > first:
            yield Window(begin, first, stop)
        first = stop
        if stop == num_tokens:
            return


def losses(
    ids_T: Sequence[int], forward: Forward, window: int, stride: int, *, progress: Progress = lambda _: None
) -> NDArray[np.float64]:
    """Negative log-likelihood of every token but the first, in nats.

    Raises:
        ModelError: one of them is not finite.
    """
    parts = []
    todo = list(windows(len(ids_T), window, stride))
    for i, w in enumerate(todo):
        progress(f"Window {i + 1} of {len(todo)}")
        ids = torch.tensor([list(ids_T[w.begin : w.stop])])
        keep = w.stop - w.first + 1  # the last position before the first scored token predicts it
        with torch.inference_mode():
            log_p_KV = forward(ids, keep)[0, -keep:-1].float().log_softmax(-1)
            nll_K = -log_p_KV.gather(-1, ids[0, 1 - keep :, None]).squeeze(-1).double().numpy()
        wrong = np.flatnonzero(~np.isfinite(nll_K))
        if len(wrong):
            raise ModelError(
                f"perplexity at token {w.first + int(wrong[0])}",
                expected="a finite likelihood for every token",
                actual=f"{nll_K[wrong[0]]} there and {len(wrong)} such tokens in window {i + 1} of {len(todo)}",
                remedy="use --dtype float32 and --codec none, and check the weights",
            )
        parts.append(nll_K)
    return np.concatenate(parts)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: it is none, or longer than `_MOST_TEXT` bytes.
    """
    return UserFile(path, "text", "give the path of a plain text file").text(_MOST_TEXT)


def read_ids(model: str, text: str, *, window: int = 2, most: int | None = None) -> list[int]:
    """The text's tokens, with whatever the tokenizer puts before them; the first `most` of them.

    Raises:
        InputError: the model has no tokenizer, or no row for a token, or the text is shorter than a window.
    """
    if most is not None:
        at_least("tokens", most, 2)
    ids = text_ids(text, needed_tokenizer(model), what="text", verbose=False)[:most]
    if len(ids) < 2:
        raise InputError("text", expected="at least two tokens", actual=len(ids), remedy="give a longer text")
    if len(ids) < window:
        expected, remedy = f"at least a window of {window} tokens", f"give a longer text, or --window {len(ids)}"
        raise InputError("text", expected=expected, actual=f"{len(ids)} tokens", remedy=remedy)
    check_ids(ids, read_config(model_path(model)).vocab_size)
    return ids


def at_least(what: str, value: int, least: int = 1) -> None:
    """Refuse a number below `least`."""
    if value < least:
        raise InputError(what, expected=f"at least {least}", actual=value, remedy="give a larger number")


def within_layers(cut: int, num_layers: int, model: str) -> None:
    """Refuse a cut beyond the model."""
    if not 0 <= cut <= num_layers:
        raise InputError(
            "cut", expected=f"0 to {num_layers}, the layers of {model}", actual=cut, remedy="cut within the model"
        )


def window_and_stride(config: Any, window: int | None, stride: int | None) -> tuple[int, int]:
    """What was asked for, or the defaults of `Scoring`, within the model's context."""
    context = getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS
    size = min(WINDOW_TOKENS, context) if window is None else window
    if not 2 <= size <= context:
        remedy = "choose a window within it"
        raise InputError("window", expected=f"2 to {context} tokens, the model's context", actual=size, remedy=remedy)
    step = min(STRIDE_TOKENS, size // 2) if stride is None else stride
    if not 1 <= step < size:
        raise InputError(
            "stride", expected=f"1 to {size - 1}, less than the window", actual=step, remedy="choose a smaller stride"
        )
    return size, step


def whole(model: str, dtype: str) -> Forward:
    """A function from token ids to logits: the unsplit model in transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=getattr(torch, dtype)).eval()
    return lambda ids, keep: loaded(input_ids=ids, use_cache=False, logits_to_keep=keep).logits


def split(request: PerplexityRequest, cut: int | None, codec: Codec, channel: NoisyChannel | None = None) -> SplitModel:
    """The model over threads: two devices for a cut, those that it names for a placement, else one."""
    options: dict[str, Any] = {
        "runtime": "local", "dtype": request.dtype, "seed": request.seed, "codec": codec, "channel": channel,
        "weights": request.weights or "float32",
    }  # fmt: skip
    if cut is not None:
        return SplitModel.from_pretrained(request.model, devices=2, planner=f"fixed_cut:{cut}", **options)
    placement = request.placement
    if placement is None:
        return SplitModel.from_pretrained(request.model, devices=1, **options)
    chosen = placement if isinstance(placement, Placement) else Placement.load(placement)
    return SplitModel.from_pretrained(request.model, topology=_devices_of(chosen), placement=chosen, **options)


def of_split(model: SplitModel) -> Forward:
    """A function from token ids to logits: the split model."""
    return lambda ids, keep: model(ids, use_cache=False, logits_to_keep=keep).logits  # type: ignore[no-any-return]


def _devices_of(placement: Placement) -> Topology:
    """Equal devices with the names in the placement, all linked."""
    like = Topology.uniform(1).devices[0]
    devices = tuple(replace(like, id=d) for d in placement.devices)
    ids = [d.id for d in devices]
    links = (Link(source=a, target=b, bandwidth_bytes_per_s=1e9, rtt_s=0) for a in ids for b in ids if a != b)
    return Topology(devices=devices, links=tuple(links), origin=ids[0])
