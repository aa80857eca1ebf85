"""One cell of a comparison: an edge device, a model, a link, what the origin holds, and what never changes in it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from splitray.arch import ModelArch
from splitray.catalog import architecture
from splitray.cost import CostModel, Rates, load_of, prompt_s, step_cost
from splitray.planners.protocol import ClusterState, RequestShape
from splitray.planners.whole import whole_on
from splitray.topology import DeviceId, Topology

EDGE_DEVICE, CLOUD_DEVICE = 0, 1  # in the topology's order
USUAL = RequestShape(128.0, 64.0)


@dataclass(frozen=True)
class Cell:
    """Names: `edge` and `link` of the catalogue, `model` of an architecture; `holds` is the topology's origin_holds."""

    edge: str
    model: str
    holds: Literal["none", "embedding", "embedding_and_head"] = "none"
    link: str = "lte"

    @property
    def name(self) -> str:
        """Edge, model, pinned ends and link: the cell in one line."""
        return f"{self.edge} {self.model} {self.holds} {self.link}"

    @cached_property
    def arch(self) -> ModelArch:
        """The decoder's counts, by the model's name in the catalogue."""
        return architecture(self.model)

    @cached_property
    def topology(self) -> Topology:
        """One of the edge devices, and the A100 that they share."""
        return Topology.pair(self.edge, link=self.link, origin_holds=self.holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The whole model on one device of an idle topology, but for what is pinned: seconds of a token and of a prompt."""

    token_s: float
    prompt_s: float
    token_j: float
    kv_bytes_per_token: float
    device_token_s: float
    """Seconds that a token keeps the device itself busy."""
    device_prompt_s: float
    weight_share: float
    """Share of the device's memory that weights and KV take; above 1 they do not fit."""

    def service_s(self, request: RequestShape) -> float:
        """Seconds that one request takes where nobody else is served."""
        return self.prompt_s + (request.output_tokens - 1) * self.token_s

    def device_s(self, request: RequestShape) -> float:
        """Seconds that one request keeps the device itself busy."""
        return self.device_prompt_s + (request.output_tokens - 1) * self.device_token_s


@dataclass(frozen=True)
class References:
    """What an observation and a reward are normalised by: both extremes of a topology without load."""

    edge: Whole
    cloud: Whole
    request: RequestShape

    @property
    def service_s(self) -> float:
        """Seconds of one request under cloud_only on an idle cloud: the unit of latency."""
        return self.cloud.service_s(self.request)

    @property
    def request_j(self) -> float:
        """Energy of one request under cloud_only on an idle cloud: the unit of energy."""
        return max(self.cloud.token_j * self.request.output_tokens, 1e-9)  # devices may state no power


def references(arch: ModelArch, topology: Topology, request: RequestShape = USUAL) -> References:
    """Price the whole model on either device of a topology of two."""
    found = [_whole(arch, topology, device.id, request) for device in topology.devices]
    return References(edge=found[EDGE_DEVICE], cloud=found[CLOUD_DEVICE], request=request)


def _whole(arch: ModelArch, topology: Topology, device: DeviceId, request: RequestShape) -> Whole:
    placement = whole_on(device, ClusterState(arch=arch, topology=topology))
    load, rates = load_of(placement, arch, topology), Rates.of(topology, arch)
    context = request.prompt_tokens + request.output_tokens / 2
    step = step_cost(load, rates, context_tokens=context)
    fill = step_cost(load, rates, context_tokens=request.prompt_tokens, new_tokens=request.prompt_tokens)
    held = CostModel(arch, topology).predict(placement, prompt_tokens=1, context_tokens=round(context)).memory_bytes
    at = topology.ids.index(device)
    room = topology.devices[at].memory_bytes
    return Whole(
        token_s=float(step.cycle_s[0]),
        prompt_s=float((fill.origin_s + prompt_s(load, rates, request.prompt_tokens))[0]),
        token_j=float(step.energy_j(topology).sum()),
        kv_bytes_per_token=float(load.kv_bytes.sum()),
        device_token_s=float(step.busy_s[0, at]),
        device_prompt_s=float(fill.busy_s[0, at]),
        weight_share=held[device] / room,
    )
