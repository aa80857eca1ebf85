"""A reference latency for the two sides of Splitwise-DRL (Younesi et al., arXiv 2512.23310).

STATED is the abstract alone: heads and FFN sub-blocks go to edge or cloud. Head bits and the three FFN modes are 2ND,
every equation here is INFERRED (docs/equations.md, section 2) and none is the paper's. The engine executes
`splitray.route` instead, whose exchange rule has no mode `split` and never sends the residual back first; tests compare
the two where they agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitray.arch import ModelArch
from splitray.cost import TimeModel
from splitray.errors import ModelError, TopologyError
from splitray.route import TOKEN_BYTES
from splitray.topology import Device, Topology

FfnMode = Literal["edge", "cloud", "split"]  # 0, 1, 2 of pi_FFN: W1 on the edge and W2 on the cloud
Reply = Literal["smaller", "partial"]


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """One layer of pi: how many head groups the cloud has (equal heads differ in number only), and the FFN mode."""

    cloud_groups: int
    ffn: FfnMode


@dataclass(frozen=True, slots=True)
class Sides:
    """The edge, where the user is, and the cloud; latencies of one model between them.

    Args:
        arch: a decoder whose attention and FFN follow each other.
        topology: one device of either tier, linked both ways, the edge as origin.
        time_model: see `cost.step_cost`.
        reply: what remote heads return: their raw outputs where those are narrower than the partial sum (E2.2), or
            always the partial sum, as our engine does.

    Raises:
        ModelError: attention and FFN run side by side.
        TopologyError: other devices, or no link.
    """

    arch: ModelArch
    topology: Topology
    time_model: TimeModel = "roofline"
    reply: Reply = "smaller"

    def __post_init__(self) -> None:
        where = self.topology
        if self.arch.parallel_block:
            raise ModelError(
                f"{self.arch.name} in the two-sided reference",
                expected="attention before the FFN",
                actual="both from one input",
                remedy="price it with splitray.cost",
            )
        if [len(where.tier("edge")), len(where.tier("cloud")), len(where.links)] != [1, 1, 2]:
            raise TopologyError(
                "the two-sided reference",
                expected="one edge, one cloud and a link each way",
                actual=f"{list(where.ids)} and {len(where.links)} links",
                remedy="leave out the other devices",
            )

    def token_s(self, layers: Sequence[LayerSplit], *, context_tokens: int, new_tokens: int = 1) -> float:
        """T_tok (E2.6) of one forward pass over `new_tokens`: the residual starts and the token ends at the edge.

        The head runs where the residual is then; the embedding, a row lookup, takes no time.
        """
        at_cloud, total = False, 0.0
        for layer in layers:
            seconds, at_cloud = self._attention(layer, at_cloud, context_tokens, new_tokens)
            total += seconds
            seconds, at_cloud = self._ffn(layer, at_cloud, new_tokens)
            total += seconds
        rows = self.arch.vocab * self.arch.vocab_row_params
        total += self._work_s(at_cloud, rows, positions=1)
        return total + (self._send_s(True, TOKEN_BYTES) if at_cloud else 0.0)

    def request_s(
        self, layers: Sequence[LayerSplit], *, prompt_tokens: int, output_tokens: int, queue_s: float = 0.0
    ) -> float:
        """T_req (E2.7): the wait, the prompt at once, which yields the first token, and a step for each further one."""
        total = queue_s + self.token_s(layers, context_tokens=prompt_tokens, new_tokens=prompt_tokens)
        steps = range(prompt_tokens + 1, prompt_tokens + output_tokens)
        return total + sum(self.token_s(layers, context_tokens=c) for c in steps)

    def _attention(self, layer: LayerSplit, at_cloud: bool, context: int, new: int) -> tuple[float, bool]:
        """T_MHA and where the residual is then (E2.1 to E2.3)."""
        arch = self.arch
        other = arch.num_kv_heads - layer.cloud_groups if at_cloud else layer.cloud_groups
        same = arch.num_kv_heads - other
        same_s = self._heads_s(at_cloud, same, context, new)
        if not other:
            return same_s, at_cloud
        there_s = self._send_s(at_cloud, self._state_bytes(new)) + self._heads_s(not at_cloud, other, context, new)
        if not same:
            return there_s, not at_cloud
        raw = other * arch.heads_per_group * arch.head_dim
        wide = min(raw, arch.hidden_dim) if self.reply == "smaller" else arch.hidden_dim
        there_s += self._send_s(not at_cloud, new * wide * arch.dtype_bytes)
        return max(same_s, there_s), at_cloud

    def _ffn(self, layer: LayerSplit, at_cloud: bool, new: int) -> tuple[float, bool]:
        """T_FFN and where the residual is then (E2.4, E2.5)."""
        arch = self.arch
        params = arch.ffn_dim * arch.ffn_unit_params
        if layer.ffn != "split":
            target = layer.ffn == "cloud"
            moved = self._send_s(at_cloud, self._state_bytes(new)) if at_cloud != target else 0.0
            return moved + self._work_s(target, params, positions=new), target
        if arch.num_experts:
            raise ModelError(
                f"{arch.name} with W1 and W2 apart",
                expected="one FFN a layer",
                actual=f"{arch.num_experts} experts",
                remedy="use FFN mode edge or cloud",
            )
        last = params // arch.ffn_matrices  # W2; with SwiGLU, gate and up are W1
        first_s = self._send_s(True, self._state_bytes(new)) if at_cloud else 0.0
        carried = new * arch.ffn_dim * arch.dtype_bytes + (0 if at_cloud else self._state_bytes(new))
        first_s += self._work_s(False, params - last, positions=new) + self._send_s(False, carried)
        return first_s + self._work_s(True, last, positions=new), True

    def _heads_s(self, cloud: bool, groups: int, context: int, new: int) -> float:
        arch = self.arch
        if not groups:
            return 0.0
        flops = 4 * new * context * groups * arch.heads_per_group * arch.head_dim
        read = groups * arch.kv_bytes_per_token * context
        return self._work_s(cloud, groups * arch.group_params, positions=new, more_flops=flops, more_bytes=read)

    def _work_s(
        self, cloud: bool, params: int, *, positions: int, more_flops: float = 0, more_bytes: float = 0
    ) -> float:
        """The roofline (E1.14) of one device: its weights once, a multiply-add for each and position."""
        device = self._device(cloud)
        seconds = (2 * params * positions + more_flops) / (device.compute_flops * device.compute_efficiency)
        if self.time_model == "flops":
            return seconds
        read = self.arch.weight_bytes(params) + more_bytes
        rate = device.memory_bandwidth_bytes_per_s * device.memory_efficiency
        return max(seconds, read / rate) + device.launch_s

    def _device(self, cloud: bool) -> Device:
        return self.topology.device(self.topology.tier("cloud" if cloud else "edge")[0])

    def _state_bytes(self, new: int) -> int:
        return new * self.arch.hidden_dim * self.arch.dtype_bytes

    def _send_s(self, from_cloud: bool, num_bytes: float) -> float:
        link = self.topology.link(self._device(from_cloud).id, self._device(not from_cloud).id)
        assert link is not None, "two links between two devices are one each way"
        return link.transfer_s(num_bytes)
