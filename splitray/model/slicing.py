"""Which weights of a layer follow the head groups and which the FFN columns, and where each one is cut.

Read from transformers' own `base_model_tp_plan`, and from the names of projections where a family has none. What
the plan does not say is added here: packed layouts, Conv1D's transposed weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from splitray.arch import ModelArch, Range
from splitray.errors import unsplittable
from splitray.model.layout import LayerLayout

_BY_NAME = {  # what linears of these names are in families that do not say it; whether it is so is tried
    "heads": {
        "colwise": "q_proj k_proj v_proj g_proj qkv_proj c_attn query_key_value query key value wq wk wv",
        "rowwise": "o_proj out_proj c_proj dense wo",
    },
    "columns": {
        "colwise": "gate_proj up_proj gate_up_proj c_fc fc1 fc_in dense_h_to_4h w1 w3",
        "rowwise": "down_proj c_proj fc2 fc_out dense_4h_to_h w2",
    },
}
By = Literal["heads", "columns"]
_COLWISE = {"colwise", "colwise_gather_output", "colwise_rep", "local_colwise"}
_ROWWISE = {"rowwise", "rowwise_split_input", "rowwise_rep", "local_rowwise"}
_EXPERT_STYLES = {"packed_colwise", "moe_tp_experts", "grouped_gemm", "packed_rowwise"}
_WHOLE = {"replicated_with_grad_allreduce", "sequence_parallel", "replicated"}


@dataclass(frozen=True, slots=True)
class Cut:
    """How one projection is cut: by heads or by FFN columns, along its output or its input features.

    `sections` are the feature counts of the parts packed behind each other (q, k, v or gate, up); each part is
    cut in the same proportion. Beside experts that share scales, columns are cut at some `borders` only.
    """

    by: By
    side: Literal["out", "in"]
    sections: tuple[int, ...]
    borders: tuple[int, ...] = ()

    def ranges(self, held: Sequence[Range], total: int) -> list[Range]:
        """Feature ranges that belong to the held units out of `total` groups or columns."""
        taken = []
        start = 0
        for features in self.sections:
            taken += [Range(*(start + self._border(i, features, total) for i in r)) for r in held]
            start += features
        return taken

    def _border(self, i: int, features: int, total: int) -> int:
        if self.borders:
            return self.borders[i * (len(self.borders) - 1) // total]
        return i * features // total

    def blocks(self, ranges: Sequence[Range], total: int, columns: Sequence[int]) -> list[Range]:
        """The blocks in which sums are made, as ranges of all input features; those of a device are in `ranges`.

        One for each head group; of FFN columns those between the borders `columns`, or between its own.
        """
        (inputs,) = self.sections
        given = (self.borders or columns) if self.by == "columns" else ()
        borders = list(given) or [i * inputs // total for i in range(total + 1)]
        inside = ([b for b in borders if r.start <= b <= r.stop] for r in ranges)
        return [Range(a, b) for some in inside for a, b in pairwise(some)]


def read_cuts(layer: nn.Module, layout: LayerLayout, config: PretrainedConfig, arch: ModelArch) -> dict[str, Cut]:
    """The cut of every projection of a layer, by its path inside the layer; none of what is held whole.

    Raises:
        ModelError: the family has no plan, or the plan does something that is not known here.
    """
    if layout.whole:
        return {}
    modules, cuts = dict(layer.named_modules()), dict[str, Cut]()
    for path, (by, style) in plan_of(layer, layout, config).items():
        if (arch.num_kv_heads if by == "heads" else arch.ffn_dim) == 1:
            continue
        module = modules[path]
        if style not in _COLWISE | _ROWWISE or not isinstance(module, nn.Linear | Conv1D):
            found = f"{path}: {style} ({type(module).__name__})"
            what = f"architecture {config.model_type}"
            raise unsplittable(what, "column- and row-parallel linears in its plan", found)
        side: Literal["out", "in"] = "out" if style in _COLWISE else "in"
        sections = _sections(path, module, side, by, arch, config.model_type)
        beside = by == "columns" and arch.num_experts > 0
        cuts[path] = Cut(by, side, sections, arch.column_cuts(sections[0]) if beside else ())
    return cuts


def plan_of(layer: nn.Module, layout: LayerLayout, config: PretrainedConfig) -> dict[str, tuple[By, str]]:
    """By what, and along which side, the projections of a layer may be cut, by their paths inside it.

    The family's own plan holds where it names them, else their names say it. Experts are cut as wholes.
    """
    own = {k.split(".*.", 1)[1]: v for k, v in (config.base_model_tp_plan or {}).items() if ".*." in k}
    found: dict[str, tuple[By, str]] = {}
    for path, module in layer.named_modules():
        steps = path.split(".")
        by: By = "heads" if steps[0] == layout.attention else "columns"
        if "experts" in steps or (by == "columns" and steps[0] not in layout.ffn):
            continue
        style = own.get(path)
        if style is None and isinstance(module, nn.Linear | Conv1D):
            style = next((s for s, names in _BY_NAME[by].items() if steps[-1] in names.split()), None)
        if style is not None and style not in _EXPERT_STYLES | _WHOLE:
            found[path] = by, style
    return found


def is_experts(path: str, module: nn.Module, experts: int) -> bool:
    """Whether a module holds the weights of so many experts, stacked."""
    stacked = [p.ndim > 1 and p.shape[0] == experts for p in module.parameters(recurse=False)]
    return path.split(".")[-1] == "experts" and bool(experts and stacked) and all(stacked)


def features(module: nn.Module, side: Literal["out", "in"]) -> int:
    """Output or input features of a Linear or of GPT-2's transposed Conv1D."""
    if isinstance(module, Conv1D):
        return int(module.nf if side == "out" else module.nx)
    assert isinstance(module, nn.Linear), type(module)
    return module.out_features if side == "out" else module.in_features


def _sections(
    path: str,
    module: nn.Module,
    side: Literal["out", "in"],
    by: By,
    arch: ModelArch,
    family: str,
) -> tuple[int, ...]:
    size = features(module, side)
    name = path.rsplit(".", 1)[-1]
    if side == "out" and name in ("qkv_proj", "c_attn"):
        q = arch.num_heads * arch.head_dim
        parts: tuple[int, ...] = (q, (size - q) // 2, (size - q) // 2)
    elif side == "out" and name in ("gate_up_proj", "gate_and_up_proj"):
        parts = (size // 2, size // 2)
    else:
        parts = (size,)
    units = arch.num_kv_heads if by == "heads" else arch.ffn_dim
    even = by == "heads" or not arch.num_experts  # else columns among experts, cut as nearly evenly as it goes
    if sum(parts) != size or (even and any(p % units for p in parts)):
        raise unsplittable(f"architecture {family}: {path}", f"features in {units} equal units", f"{size} features")
    return parts
