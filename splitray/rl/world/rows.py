"""How an observation stands in one flat row, for both agents: [whole | groups | mask of the actions].

The second agent's groups also carry what the first one chose for them, one of five. Shapes: N instances, G groups.
"""

from dataclasses import dataclass

import numpy as np

from splitray.arrays import Bools, Floats32, Ints
from splitray.rl.grid.choice import MODES
from splitray.rl.world.action import ActionSpec, Block, num_choices, num_logits
from splitray.rl.world.observation import GROUP_FEATURES, NUM_GLOBAL, NUM_GROUP, kept

LAYER_AGENT, HEAD_FFN_AGENT = "layer_agent", "head_ffn_agent"
AGENTS = (LAYER_AGENT, HEAD_FFN_AGENT)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand in one agent's row, and what it chooses."""

    num_groups: int
    group_width: int
    blocks: tuple[Block, ...]
    num_global: int = NUM_GLOBAL

    @property
    def mask_at(self) -> int:
        """Index of the first column of the mask in a row."""
        return self.num_global + self.num_groups * self.group_width

    @property
    def num_logits(self) -> int:
        """Length of the mask, which is that of the logits."""
        return num_logits(self.blocks)

    @property
    def num_choices(self) -> int:
        """Length of an action: choices of all blocks."""
        return num_choices(self.blocks)

    @property
    def width(self) -> int:
        """Length of a row: features, then the mask."""
        return self.mask_at + self.num_logits


def layouts(spec: ActionSpec) -> dict[str, Layout]:
    """The layouts of both agents' rows, by agent."""
    return {
        LAYER_AGENT: Layout(spec.num_groups, NUM_GROUP, spec.high),
        HEAD_FFN_AGENT: Layout(spec.num_groups, NUM_GROUP + 1 + MODES, spec.low),
    }


def is_per_group(block: Block, layout: Layout) -> bool:
    """Whether every group chooses for itself."""
    return block.count % layout.num_groups == 0 and block.name in ("mode", "heads", "bits", "ffn")


class Rows:
    """Puts features together, without those that an ablation leaves out."""

    def __init__(self, spec: ActionSpec, leave_out: frozenset[str] = frozenset()) -> None:
        """Rows of this shape; `leave_out` names the groups of features that are set to 0."""
        self.spec, self.layouts = spec, layouts(spec)
        self._global, self._group = kept(leave_out), kept(leave_out, GROUP_FEATURES)

    def high(self, whole: Floats32, groups: Floats32, mask: Bools) -> Floats32:
        """The layer agent's rows, [N, width]; groups that a small model lacks are zeros."""
        return np.concatenate(
            [whole * self._global, self._padded(groups).reshape(len(whole), -1), mask.astype(np.float32)], axis=1
        )

    def low(self, whole: Floats32, groups: Floats32, modes: Ints, mask: Bools) -> Floats32:
        """The second agent's rows, [N, width], after the first one's modes [N, G]."""
        chosen = (modes[:, :, None] == np.arange(1 + MODES)).astype(np.float32)
        both = np.concatenate([self._padded(groups), chosen], axis=2)
        return np.concatenate([whole * self._global, both.reshape(len(whole), -1), mask.astype(np.float32)], axis=1)

    def _padded(self, groups: Floats32) -> Floats32:
        missing = self.spec.num_groups - groups.shape[1]
        return np.pad(groups * self._group, ((0, 0), (0, missing), (0, 0)))
