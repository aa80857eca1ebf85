"""What a surrogate sees of a channel and of a placement: a few numbers each, none of which is a name.

Knows routes, not models. A cut at p of L layers is one state that crosses at the depth p / L.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.errors import InputError
from splitray.route import Route
from splitray.topology import DeviceId

_STEP: dict[Codec, float] = {"none": 0.0, "bf16": 2.0**-8, "int8": 1 / 127, "int4": 1 / 7}
"""Distance of two neighbouring values of a codec over the largest one that it scales by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceFeatures:
    """What the residual that arrives at the head has been through. Depths are shares of the model before a crossing.

    A device that gets a state, computes a partial from it and sends that back leaves the residual of the others clean:
    such states count as `side_states` only.
    """

    states: float
    """Whole residuals that cross, one after the other."""
    state_depth: float
    """Mean depth of them."""
    first_state: float
    """Depth of the first; 1 if there is none."""
    partials: float
    """Share of all boundaries at which partial sums are added that came over the wire."""
    partial_depth: float
    first_partial: float
    remote_share: float
    """Mean share of the partial sums added there that came over the wire."""
    attention_share: float
    """Share of those boundaries that lie behind attention."""
    side_states: float
    """Other residuals that cross."""

    @staticmethod
    def of_cut(cut: int, num_layers: int) -> PlaceFeatures:
        """One cut behind `cut` layers.

        Raises:
            InputError: not within 0 and the number of layers.
        """
        if not 0 <= cut <= num_layers:
            raise InputError("cut", expected=f"0 to {num_layers}", actual=cut, remedy="cut within the model")
        return PlaceFeatures(
            states=1.0, state_depth=cut / num_layers, first_state=cut / num_layers, partials=0.0, partial_depth=0.0,
            first_partial=1.0, remote_share=0.0, attention_share=0.0, side_states=0.0,
        )  # fmt: skip

    @staticmethod
    def of_route(route: Route) -> PlaceFeatures:
        """The features of any placement, by what its route sends."""
        blocks = route.sub_blocks
        last = len(blocks) - 2  # the block before the head
        pasts = {device: _Past() for device in blocks[0].devices}
        crossed = 0
        for here, there in itertools.pairwise(blocks):
            messages = route.boundary(here.index).messages
            whole_from = {m.target: m.source for m in messages if m.content != "partial"}
            crossed += len(whole_from)
            depth = here.index / last
            after: dict[DeviceId, _Past] = {}
            for device in there.devices:
                source = whole_from.get(device)
                past = pasts[device] if source is None else pasts[source].with_state(depth)
                if here.mode == "partitioned":
                    remote = 1 - (device in here.devices) / len(here.devices)
                    past = past.with_partials(depth, remote, here.kind == "attention")
                after[device] = past
            pasts = after
        past = pasts[blocks[-1].lead]
        return PlaceFeatures(
            states=float(len(past.states)),
            state_depth=_mean(past.states),
            first_state=min(past.states, default=1.0),
            partials=len(past.partials) / max(1, last),
            partial_depth=_mean(past.partials),
            first_partial=min(past.partials, default=1.0),
            remote_share=_mean(past.remote_shares),
            attention_share=past.behind_attention / max(1, len(past.partials)),
            side_states=float(crossed - len(past.states)),
        )

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> PlaceFeatures:
        """The inverse of `dataclasses.asdict`.

        Raises:
            InputError: other keys, or values that are no numbers.
        """
        names = {f.name for f in fields(PlaceFeatures)}
        if set(plain) != names or not all(isinstance(v, int | float) for v in plain.values()):
            expected, remedy = f"numbers for {sorted(names)}", "measure the table with `splitray perplexity --out FILE`"
            raise InputError("features of a placement", expected=expected, actual=dict(plain), remedy=remedy)
        return PlaceFeatures(**plain)


@dataclass(frozen=True, slots=True)
class _Past:
    """What one device's residual has been through."""

    states: tuple[float, ...] = ()
    partials: tuple[float, ...] = ()
    remote_shares: tuple[float, ...] = ()
    behind_attention: int = 0

    def with_state(self, depth: float) -> _Past:
        return replace(self, states=(*self.states, depth))

    def with_partials(self, depth: float, remote_share: float, behind_attention: bool) -> _Past:
        return _Past(
            self.states,
            (*self.partials, depth),
            (*self.remote_shares, remote_share),
            self.behind_attention + behind_attention,
        )


CHANNEL_FEATURES = (
    "loss", "loss_of_tokens", "loss_in_bursts", "noise", "sigma", "fading", "equalised", "fill_last", "fill_mean",
    "rescaled", "codec_step",
)  # fmt: skip
PLACE_FEATURES = tuple(f.name for f in fields(PlaceFeatures))


def channel_features(channel: NoisyChannel | None, codec: Codec) -> list[float]:
    """The numbers of `CHANNEL_FEATURES`.

    `loss` is a probability, the next two are it again where whole tokens (or packets, by the logarithm of their bytes)
    or runs of units are lost; `noise` is the amplitude over the signal's, 10^(-dB / 20), `sigma` the other noise's in
    units of the values; `fading` is the standard deviation of the gain's square over its mean where values arrive with
    it.
    """
    if channel is None:
        return [0.0] * (len(CHANNEL_FEATURES) - 1) + [_STEP[codec]]
    loss = channel.loss_probability
    share = {"element": 0.0, "token": 1.0}.get(channel.unit)
    if share is None:
        share = min(1.0, math.log2(max(4, channel.packet_bytes or 4) / 4) / 10)
    burst = 0.0 if channel.burst_units is None else math.log2(channel.burst_units) / 4
    noise = 0.0 if channel.snr_db is None else 10 ** (-channel.snr_db / 20)
    fading = 0.0
    if channel.fading is not None and channel.is_analogue:
        fading = channel.fading.m**-0.5
    return [
        loss, loss * share, loss * burst, noise, channel.sigma or 0.0, fading, float(channel.equalise),
        float(channel.fill == "last"), float(channel.fill == "mean"), float(channel.rescale), _STEP[codec],
    ]  # fmt: skip


def place_features(place: PlaceFeatures) -> list[float]:
    """The features of a place in the order of `PLACE_FEATURES`."""
    return list(asdict(place).values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
