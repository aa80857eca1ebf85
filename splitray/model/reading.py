"""What a checkpoint's config says about the model: its ModelArch and its layer's wiring, by a small probe.

The probe is a random model of the same config with one layer of each kind, with fewer heads and rows and shorter
windows where the config allows it; the self-test (runtime/selftest.py) splits the same model. Reads no weights.
"""

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from splitray.arch import ModelArch, Range
from splitray.errors import InputError, ModelError, unsplittable
from splitray.model.config import text_part, whole_config
from splitray.model.folder import has_weights
from splitray.model.layer_kinds import one_of_each, with_short_lengths
from splitray.model.layout import LayerLayout, is_norm, observe_layer
from splitray.model.slicing import PLANS, features
from splitray.model.source import Checkpoint
from splitray.model.surgery import decoder_of, meta_model

_PROBE_VOCAB = 64
_RECURRENT = re.compile(
    "mamba|rwkv|recurrent|rglru|gateddelta|deltanet|shortconv|lstm|lightning|linearattention|retention", re.IGNORECASE
)
_NOT_UNDERSTOOD = (AttributeError, LookupError, TypeError, RuntimeError, ValueError, AssertionError, ArithmeticError,
                   ImportError, MemoryError)  # fmt: skip


class StateDictSource:
    """Slices out of a model in memory, for probes and tests; the same calls as Checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Refer to the model's tensors; nothing is copied until a slice is read."""
        self.config = model.config
        self._tensors = model.state_dict()
        self.bytes_read = 0

    def key(self, name: str) -> str | None:
        """The name itself if the model has it."""
        return name if name in self._tensors else None

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """A copy of a tensor, or of ranges of it along one axis."""
        tensor = self._tensors[name]
        if ranges is None:
            return tensor.clone()
        return torch.cat([tensor.narrow(axis, r.start, r.count) for r in ranges], dim=axis)

    def read_experts(self, module: str, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of some experts' fused weights."""
        index = torch.tensor(experts)
        return self._tensors[f"{module}.gate_up_proj"][index], self._tensors[f"{module}.down_proj"][index]

    def fingerprint(self) -> str:
        """Models in memory are told apart by identity only."""
        return f"memory-{id(self._tensors):x}"


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of the text decoder in a model's folder; it is tied if its weights are, too.

    Raises:
        ModelError: there is no readable config of a decoder there.
    """
    config = text_part(whole_config(folder))
    if config.tie_word_embeddings and has_weights(folder):
        config.tie_word_embeddings = not _has_own_head(folder, config)
    return config


def _has_own_head(folder: str | Path, config: PretrainedConfig) -> bool:
    """Whether a head is stored beside the embedding with other values: then transformers does not tie them."""
    with contextlib.suppress(ModelError), understood(config):  # what is wrong is told where it is read
        checkpoint = Checkpoint(folder)
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


def read_arch(
    config: PretrainedConfig, *, dtype: Literal["float32", "bfloat16", "float16"] = "float32"
) -> tuple[ModelArch, LayerLayout]:
    """Counts from the meta model, wiring from a probe run.

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
    except _NOT_UNDERSTOOD as error:
        expected = "a decoder of attention and FFN layers as they are known here"
        said = f"{type(error).__name__}: {error}"
        raise unsplittable(f"architecture {config.model_type}", expected, said) from error


def _read_arch(config: PretrainedConfig, dtype: str) -> tuple[ModelArch, LayerLayout]:
    meta = meta_model(config, torch.float32)
    _refuse_mixers(meta, config)
    counts = _counts(meta, config, dtype)
    probe = probe_model(config)
    layout = observe(probe)
    decoder, layers = decoder_of(meta, counts["num_layers"])
    attention = getattr(getattr(decoder, layers)[0], layout.attention)
    over_heads = _norms_over_heads(attention, counts)
    return ModelArch(
        **counts, parallel_block=layout.parallel, post_norm=layout.has_post_norm, qk_norm_over_heads=over_heads
    ), layout


def probe_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random model of the same kinds of layers, float32, deterministic, small where that is allowed."""
    small = with_short_lengths(one_of_each(config, _PROBE_VOCAB))
    shrunk = _fewer_heads(small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = None
        for candidate in (shrunk, small):
            try:
                model = AutoModelForCausalLM.from_config(candidate, dtype=torch.float32)
                break
            except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
                failure = error
        if model is None:
            raise unsplittable(f"architecture {config.model_type}", "a small model of the same config", failure)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name.rsplit(".", 2)[-2]:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.data.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5))
        kept = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model.eval()


def observe(probe: PreTrainedModel) -> LayerLayout:
    """The wiring of a probe's layers."""
    decoder, layers = decoder_of(probe, probe.config.num_hidden_layers)
    ids = torch.arange(3, 11).reshape(2, 4)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0

    @torch.inference_mode()
    def run() -> object:
        return probe(input_ids=ids, attention_mask=mask, use_cache=True)

    family = probe.config.model_type
    first, *others = [observe_layer(layer, run, family=family) for layer in getattr(decoder, layers)]
    for other in others:
        if other != first:
            found = {n: v for n, v in asdict(other).items() if v != getattr(first, n)}
            raise unsplittable(
                f"the decoder layers of {family}", "layers that are wired alike", f"another with {found}"
            )
    return first


def _refuse_mixers(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Refuse layers that mix positions by something else than attention, by the module's name."""
    what, expected = f"architecture {config.model_type}", "attention in every layer"
    for name, module in model.named_modules():
        if not is_norm(module) and _RECURRENT.search(type(module).__name__) and re.search(r"\.\d+\.", name):
            raise unsplittable(what, expected, f"{name} ({type(module).__name__})")
    decoder, layers = decoder_of(model, config.num_hidden_layers)
    for i, layer in enumerate(getattr(decoder, layers)):
        if not any("att" in n.lower() for n, _ in layer.named_children()):
            found = ", ".join(f"{n} ({type(m).__name__})" for n, m in layer.named_children())
            raise unsplittable(what, expected, f"layer {i} of {found}")


def _counts(model: PreTrainedModel, config: PretrainedConfig, dtype: str) -> dict[str, Any]:
    heads = config.num_attention_heads
    decoder, layers = decoder_of(model, config.num_hidden_layers)
    ffn = _ffn_counts(getattr(decoder, layers), config)
    head = model.get_output_embeddings()
    return {
        "name": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_dim": config.hidden_size,
        "vocab": head.weight.shape[0],
        "context_tokens": getattr(config, "max_position_embeddings", None) or 2**20,
        "tied_embeddings": bool(model.all_tied_weights_keys),
        "dtype": dtype,
        **ffn,
    }


def _ffn_counts(layers: nn.ModuleList, config: PretrainedConfig) -> dict[str, int]:
    for path, module in layers.named_modules():
        if path.endswith("experts") and hasattr(module, "gate_up_proj"):
            experts, width, _ = module.gate_up_proj.shape
            return {"ffn_dim": experts, "num_experts": experts, "expert_columns": width // 2, "ffn_matrices": 3}
    plan = PLANS.get(config.model_type) or {
        k.split(".*.", 1)[1]: v for k, v in (config.base_model_tp_plan or {}).items() if ".*." in k
    }
    paths = {p: m for p, m in layers[0].named_modules() if p in plan and "att" not in p.split(".")[0]}
    rows = [m for p, m in paths.items() if plan[p].startswith("rowwise")]
    if len(rows) != 1:
        expected = "a tensor-parallel plan with one row-parallel linear in the FFN"
        raise unsplittable(
            f"architecture {config.model_type}", expected, f"{len(rows)} of them in {sorted(plan) or 'no plan'}"
        )
    columns = features(rows[0], "in")
    wide = sum(features(m, "out") for p, m in paths.items() if not plan[p].startswith("rowwise"))
    return {"ffn_dim": columns, "ffn_matrices": 1 + wide // columns}


def _norms_over_heads(attention: nn.Module, counts: dict[str, Any]) -> bool:
    norm = getattr(attention, "q_norm", None)
    weight = getattr(norm, "weight", None)
    if weight is None or weight.ndim != 1:
        return False
    return int(weight.shape[0]) == counts["num_heads"] * counts["head_dim"] and counts["num_heads"] > 1


def _fewer_heads(config: PretrainedConfig) -> PretrainedConfig:
    values = copy.deepcopy(config)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    fewer = min(groups, 4)
    if config.hidden_size <= 256 or groups % fewer:
        return values
    scale = groups // fewer
    values.hidden_size = config.hidden_size // scale
    values.num_attention_heads = heads // scale
    if getattr(config, "num_key_value_heads", None):
        values.num_key_value_heads = fewer
    if getattr(config, "intermediate_size", None):
        values.intermediate_size = 96
    return values
