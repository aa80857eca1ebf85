"""Which weights of a layer follow the head groups and which the FFN columns, and where each one is cut.

Read from transformers' own `base_model_tp_plan`, with a small table for families without one. What the plan does
not say is added here: packed layouts, Conv1D's transposed weights, per-head norms, norms over all heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from splitray.arch import ModelArch, Range
from splitray.errors import unsplittable

_LLAMA_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
}
PLANS: dict[str, dict[str, str]] = {  # families without a tp_plan of their own
    "gpt2": {
        "attn.c_attn": "colwise",
        "attn.c_proj": "rowwise",
        "mlp.c_fc": "colwise",
        "mlp.c_proj": "rowwise",
    },
    "gptj": {
        "attn.q_proj": "colwise",
        "attn.k_proj": "colwise",
        "attn.v_proj": "colwise",
        "attn.out_proj": "rowwise",
        "mlp.fc_in": "colwise",
        "mlp.fc_out": "rowwise",
    },
    "gpt_neo": {
        "attn.attention.q_proj": "colwise",
        "attn.attention.k_proj": "colwise",
        "attn.attention.v_proj": "colwise",
        "attn.attention.out_proj": "rowwise",
        "mlp.c_fc": "colwise",
        "mlp.c_proj": "rowwise",
    },
    "opt": {**_LLAMA_ATTENTION, "self_attn.out_proj": "rowwise", "fc1": "colwise", "fc2": "rowwise"},
    "biogpt": {**_LLAMA_ATTENTION, "self_attn.out_proj": "rowwise", "fc1": "colwise", "fc2": "rowwise"},
    "stablelm": {
        **_LLAMA_ATTENTION,
        "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    },
}
_COLWISE = {"colwise", "colwise_gather_output", "colwise_rep", "local_colwise"}
_ROWWISE = {"rowwise", "rowwise_split_input", "rowwise_rep", "local_rowwise"}
_EXPERT_STYLES = {"packed_colwise", "moe_tp_experts", "grouped_gemm", "packed_rowwise"}
_WHOLE = {"replicated_with_grad_allreduce", "sequence_parallel", "replicated"}


@dataclass(frozen=True, slots=True)
class Cut:
    """How one projection is cut: by heads or by FFN columns, along its output or its input features.

    `sections` are the feature counts of the parts packed behind each other (q, k, v or gate, up); each part is
    cut in the same proportion.
    """

    by: Literal["heads", "columns"]
    side: Literal["out", "in"]
    sections: tuple[int, ...]

    def ranges(self, held: Sequence[Range], total: int) -> list[Range]:
        """Feature ranges that belong to the held units out of `total` groups or columns."""
        taken = []
        start = 0
        for features in self.sections:
            taken += [Range(start + r.start * features // total, start + r.stop * features // total) for r in held]
            start += features
        return taken


def read_cuts(layer: nn.Module, config: PretrainedConfig, arch: ModelArch) -> dict[str, Cut]:
    """The cut of every projection of a layer, by its path inside the layer.

    Raises:
        ModelError: the family has no plan, or the plan does something that is not known here.
    """
    family = config.model_type
    plan = PLANS.get(family) or {
        key.split(".*.", 1)[1]: style for key, style in (config.base_model_tp_plan or {}).items() if ".*." in key
    }
    if not plan:
        raise unsplittable(f"architecture {family}", "a base_model_tp_plan or an entry in slicing.PLANS", "neither")
    modules = dict(layer.named_modules())
    cuts = {}
    for path, style in plan.items():
        module = modules.get(path)
        if module is None or style in _EXPERT_STYLES or style in _WHOLE or "experts" in path.split("."):
            continue
        if style not in _COLWISE | _ROWWISE or not isinstance(module, nn.Linear | Conv1D):
            found = f"{path}: {style} ({type(module).__name__})"
            raise unsplittable(f"architecture {family}", "column- and row-parallel linears in its plan", found)
        by: Literal["heads", "columns"] = "heads" if "att" in path.split(".")[0] else "columns"
        side: Literal["out", "in"] = "out" if style in _COLWISE else "in"
        cuts[path] = Cut(by, side, _sections(path, module, side, arch, family))
    _complete(layer, cuts, family)
    return cuts


def features(module: nn.Module, side: Literal["out", "in"]) -> int:
    """Output or input features of a Linear or of GPT-2's transposed Conv1D."""
    if isinstance(module, Conv1D):
        return int(module.nf if side == "out" else module.nx)
    assert isinstance(module, nn.Linear), type(module)
    return module.out_features if side == "out" else module.in_features


def _sections(
    path: str, module: nn.Module, side: Literal["out", "in"], arch: ModelArch, family: str
) -> tuple[int, ...]:
    size = features(module, side)
    name = path.rsplit(".", 1)[-1]
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    if side == "out" and name in ("qkv_proj", "c_attn"):
        parts: tuple[int, ...] = (q, kv, kv)
    elif side == "out" and name in ("gate_up_proj", "gate_and_up_proj"):
        parts = (size // 2, size // 2)
    else:
        parts = (size,)
    by_heads = "att" in path.split(".")[0]
    units = arch.num_kv_heads if by_heads else arch.ffn_dim
    even = by_heads or not arch.num_experts  # else columns among experts, cut as nearly evenly as it goes
    if sum(parts) != size or (even and any(p % units for p in parts)):
        raise unsplittable(f"architecture {family}: {path}", f"features in {units} equal units", f"{size} features")
    return parts


def _complete(layer: nn.Module, cuts: dict[str, Cut], family: str) -> None:
    for path, module in layer.named_modules():
        inside_experts = "experts" in path.split(".")
        if isinstance(module, nn.Linear | Conv1D) and path not in cuts and not inside_experts:
            raise unsplittable(f"architecture {family}", "every linear of a layer in its plan", f"{path} is not")
