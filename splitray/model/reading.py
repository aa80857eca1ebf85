"""What a checkpoint's config says about the model: its ModelArch and its layer's wiring, by a small probe.

The probe is a random model of the same config with one layer of each kind, with fewer heads and rows and shorter
windows where the config allows it; the self-test (runtime/selftest.py) splits the same model. Reads no weights.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from splitray.arch import ModelArch
from splitray.errors import InputError, ModelError, unsplittable
from splitray.model.cache_calls import check_cache_calls
from splitray.model.config import text_part, whole_config
from splitray.model.counts import Dtype, count, sized
from splitray.model.folder import has_weights
from splitray.model.grain import tried
from splitray.model.layout import Layouts, is_norm
from splitray.model.opened import open_checkpoint
from splitray.model.probe import make_probe, observe, reads_tokens, true_scales
from splitray.model.recurrent import RECURRENT
from splitray.model.surgery import layers_of, meta_model
from splitray.model.token_ids import check_token_ids

NOT_UNDERSTOOD = (AttributeError, LookupError, TypeError, RuntimeError, ValueError, AssertionError, ArithmeticError,
                   ImportError, MemoryError)  # fmt: skip


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of the text decoder in a model's folder; it is tied if its weights are, too.

    Raises:
        ModelError: there is no readable config of a decoder there, or one that names tokens which it does not have.
    """
    config = text_part(whole_config(folder))
    check_token_ids(folder, config)
    if getattr(config, "tie_word_embeddings", False) and has_weights(folder):
        config.tie_word_embeddings = not _has_own_head(folder, config)
    return config


def _has_own_head(folder: str | Path, config: PretrainedConfig) -> bool:
    """Whether a head is stored beside the embedding with other values: then transformers does not tie them."""
    with contextlib.suppress(ModelError), understood(config):  # what is wrong is told where it is read
        checkpoint = open_checkpoint(folder)
        tables = [k for k, shape in checkpoint.shapes.items() if shape[:1] == (config.vocab_size,) and len(shape) == 2]
        if len(tables) < 2:
            return False
        model = meta_model(config, torch.float32)
        keys = checkpoint.names.keys
        return any(
            keys[a] != keys[b] and not checkpoint.equal(keys[a], keys[b])
            for a, b in model.all_tied_weights_keys.items()
            if a in keys and b in keys
        )
    return False


def read_arch(config: PretrainedConfig, *, dtype: Dtype = "float32") -> tuple[ModelArch, Layouts]:
    """Counts from the meta model, wiring and grain from a probe run.

    Raises:
        ModelError: the architecture cannot be split, with the reason.
    """
    with understood(config):
        return _read_arch(config, dtype)


@contextlib.contextmanager
def understood(config: PretrainedConfig) -> Iterator[None]:
    """Refuse an architecture on whose code or config ours fails: what is not understood cannot be split.

    Raises:
        ModelError: says how it fails.
    """
    try:
        yield
    except InputError:
        raise
    except NOT_UNDERSTOOD as error:
        expected = "a decoder of attention and FFN layers as they are known here"
        said = f"{type(error).__name__}: {error}"
        raise unsplittable(f"architecture {config.model_type}", expected, said) from error


def _read_arch(config: PretrainedConfig, dtype: Dtype) -> tuple[ModelArch, Layouts]:
    meta = meta_model(config, torch.float32)
    _refuse_mixers(meta, config)
    probe = make_probe(config)
    check_cache_calls(probe)
    layout = true_scales(observe(probe), probe, layers_of(meta))
    arch, layout = tried(count(meta, layout, dtype), probe, layout, meta)
    arch = replace(arch, tokens_everywhere=reads_tokens(probe))
    return sized(arch, meta, layout), layout


def _refuse_mixers(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Refuse layers that mix positions by something else than attention, by the module's name, or that choose keys."""
    what, expected = f"architecture {config.model_type}", "attention in every layer"
    for name in ("index_topk", "keep_window_size"):
        most = getattr(config, name, None)
        if most is not None and (name == "index_topk" or most < config.max_position_embeddings):
            actual = f"{name}: the {most} best by a score, so that a prompt in chunks gives other tokens"
            raise unsplittable(what, "attention to all keys, or to those of a window", actual)
    for name, module in model.named_modules():
        if not is_norm(module) and RECURRENT.search(type(module).__name__) and re.search(r"\.\d+\.", name):
            raise unsplittable(what, expected, f"{name} ({type(module).__name__})")
