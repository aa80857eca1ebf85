"""What a noisy link does to the values that cross it: loss, fading, noise. Arithmetic in numpy; knows no wire.

The channel of Chen et al. (arXiv 2406.02616): a value is lost where the link's gain is below a threshold, eqs. (4) and
(5), or arrives as h y + n, eq. (3). Beside it what networks do: packets, whole tokens and bursts are lost together. The
defaults are the paper's: each element is a packet of its own, what is lost becomes 0, nothing is rescaled.

Written as text, `KIND:VALUES` and options behind commas:

- `loss:P`: each unit is lost with probability P in [0, 1).
- `awgn:DB`: white noise at that ratio of signal to noise: a token's noise has the token's own mean power over the
  ratio, so that a prompt and single tokens suffer alike, and each layer too.
- `sigma:S`: white noise of that standard deviation, in units of the values, whatever the signal: eq. (3) as printed,
  which ties sigma to no ratio. A residual that grows from layer to layer then drowns it.
- `nakagami:M,OMEGA,HTH`: each unit has a gain of its own, and is lost below HTH. What arrives is intact (digital), or
  with `snr=DB` or `sigma=S` h y + n as in eq. (3), divided by h with `equalise`.
- `unit=element`, `unit=packet:BYTES` (consecutive values of one token) or `unit=token`; `burst=UNITS`: losses come in
  runs of that mean length (Gilbert 1960) and as often as before; `fill=zero`, `last` (the element's value in the token
  before) or `mean` (of what arrived of the token); `rescale`: what arrives is divided by 1 - P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from splitray.errors import InputError, did_you_mean

Unit = Literal["element", "packet", "token"]
Fill = Literal["zero", "last", "mean"]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

KINDS = {"none": "none", "loss": "loss:P", "awgn": "awgn:DB", "sigma": "sigma:S", "nakagami": "nakagami:M,OMEGA,HTH"}
OPTIONS = ("unit", "burst", "fill", "rescale", "snr", "sigma", "equalise")
MOST_DB, MOST_SIGMA = 200, 1e20  # noise beyond is no float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Nakagami:
    """A gain h with the density 2 m^m h^(2m-1) / (Gamma(m) omega^m) exp(-m h^2 / omega), eq. (4).

    `omega` is E[h^2]; m = 1 is Rayleigh; below `threshold` a unit is lost.

    Raises:
        InputError: m below 0.5, omega not above 0, or a negative threshold.
    """

    m: float
    omega: float
    threshold: float

    def __post_init__(self) -> None:
        _within(0.5 <= self.m < math.inf, "m of nakagami", "at least 0.5", self.m)
        _within(0 < self.omega < math.inf, "omega of nakagami", "above 0", self.omega)
        _within(0 <= self.threshold < math.inf, "threshold of nakagami", "0 or more", self.threshold)
        _within(self.loss < 1, "threshold of nakagami", "one that some gains exceed", self.threshold)

    @property
    def loss(self) -> float:
        """P(h < threshold), the regularised lower gamma function at m threshold^2 / omega: eq. (5), corrected (E1)."""
        from scipy.special import gammainc

        return float(gammainc(self.m, self.m * self.threshold**2 / self.omega))

    def gains(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Independent draws of the gain h, float32 of this shape."""
        return np.sqrt(rng.gamma(self.m, self.omega / self.m, shape)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyChannel:
    """What every message between two devices suffers; see above. `seed` makes it come again.

    Raises:
        InputError: a value out of its range, or options that exclude each other.
    """

    loss: float = 0.0
    fading: Nakagami | None = None
    snr_db: float | None = None
    sigma: float | None = None
    unit: Unit = "element"
    packet_bytes: int | None = None
    burst_units: float | None = None
    fill: Fill = "zero"
    rescale: bool = False
    equalise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _within(self.seed >= 0, "seed of the channel", "0 or more", self.seed)
        _within(0 <= self.loss < 1, "loss of the channel", "a probability in [0, 1)", self.loss)
        if self.snr_db is not None:
            _within(abs(self.snr_db) <= MOST_DB, "snr of the channel", f"-{MOST_DB} to {MOST_DB} dB", self.snr_db)
        if self.sigma is not None:
            _within(0 < self.sigma <= MOST_SIGMA, "sigma of the channel", f"above 0 to {MOST_SIGMA:g}", self.sigma)
            _within(self.snr_db is None, "noise of the channel", "a ratio or a sigma", "both")
        _within(not (self.loss and self.fading), "channel", "one source of loss", "loss and nakagami")
        packets = self.unit == "packet"
        _within(packets == (self.packet_bytes is not None), "unit of the channel", "packet:BYTES", self.unit)
        if self.packet_bytes is not None:
            _within(self.packet_bytes >= 1, "unit of the channel", "packets of at least 1 byte", self.packet_bytes)
        if self.burst_units is not None:
            _within(1 <= self.burst_units < math.inf, "burst of the channel", "1 unit or more", self.burst_units)
            _within(self.fading is None, "burst of the channel", "loss:P, gains are independent", "nakagami")
            longest = self.burst_units / (self.burst_units + 1)
            _within(self.loss <= longest, "burst of the channel",
                    f"a loss of at most {longest:.3g} (one unit between two bursts)", self.loss)  # fmt: skip
        if self.rescale:
            _within(self.fill == "zero", "rescale of the channel", "fill=zero", f"fill={self.fill}")
        if self.equalise:
            both = self.fading is not None and self.is_analogue
            _within(both, "equalise of the channel", "nakagami with snr=DB or sigma=S: gains to divide by", str(self))

    @property
    def is_analogue(self) -> bool:
        """Whether values arrive with noise on them."""
        return self.snr_db is not None or self.sigma is not None

    @property
    def loss_probability(self) -> float:
        """Share of the units that are lost."""
        return self.loss if self.fading is None else self.fading.loss

    def __str__(self) -> str:
        """The text that `as_channel` reads."""
        parts = []
        if self.fading is not None:
            parts.append(f"nakagami:{self.fading.m:g},{self.fading.omega:g},{self.fading.threshold:g}")
        elif self.loss or not self.is_analogue:
            parts.append(f"loss:{self.loss:g}")
        if self.snr_db is not None:
            parts.append(f"snr={self.snr_db:g}" if parts else f"awgn:{self.snr_db:g}")
        if self.sigma is not None:
            parts.append(f"sigma={self.sigma:g}" if parts else f"sigma:{self.sigma:g}")
        if self.unit != "element":
            parts.append(f"unit={self.unit}" + (f":{self.packet_bytes}" if self.packet_bytes else ""))
        if self.burst_units is not None:
            parts.append(f"burst={self.burst_units:g}")
        if self.fill != "zero":
            parts.append(f"fill={self.fill}")
        return ",".join([*parts, *(name for name in ("rescale", "equalise") if getattr(self, name))])


class Receiver:
    """What arrives at one device from another, message after message; bursts go on from one to the next."""

    def __init__(self, channel: NoisyChannel, *stream: int) -> None:
        """`stream` tells this pair of devices from others under the same seed."""
        self.channel = channel
        self._rng = np.random.default_rng([channel.seed, *stream])
        self._in_burst: bool | None = None
        self._last: dict[int, Floats] = {}

    def receive(self, x_BTD: Floats, *, boundary: int = 0, value_bytes: float = 4.0, fresh: bool = True) -> Floats:
        """A message as it arrives.

        Args:
            x_BTD: what was sent, float32 [sequences, positions, values].
            boundary: whose values these are; `fill=last` repeats those of the same boundary.
            value_bytes: of one value on the wire: how many make a packet.
            fresh: whether sequences begin here, so that no token came before.
        """
        channel = self.channel
        batch, positions, hidden = x_BTD.shape
        together = {"element": 1, "token": hidden}.get(channel.unit) or max(
            1, int((channel.packet_bytes or 0) / value_bytes)
        )
        units = (batch, positions, -(-hidden // together))

        def spread(of_units: NDArray) -> NDArray:
            return of_units if together == 1 else np.repeat(of_units, together, axis=-1)[..., :hidden]

        y_BTD: Floats = x_BTD
        lost_BTD: Bools | None = None
        if channel.fading is not None:
            h_BTU = channel.fading.gains(self._rng, units)
            lost_BTD = spread(h_BTU < channel.fading.threshold)
            if channel.is_analogue:
                h_BTD = spread(h_BTU)
                y_BTD = h_BTD * x_BTD + self._noise(x_BTD)
                if channel.equalise:
                    y_BTD = np.divide(y_BTD, h_BTD, where=~lost_BTD, out=y_BTD)
        else:
            if channel.loss:
                lost_BTD = spread(self._lost(units))
            if channel.is_analogue:
                y_BTD = x_BTD + self._noise(x_BTD)
        if lost_BTD is not None:
            y_BTD = self._filled(y_BTD, lost_BTD, boundary, fresh)
        if channel.rescale:
            y_BTD = y_BTD / np.float32(1 - channel.loss_probability)
        return y_BTD

    def _noise(self, x_BTD: Floats) -> Floats:
        """White noise of the channel's sigma, or of each token's mean power over the ratio."""
        white_BTD = self._rng.standard_normal(x_BTD.shape, np.float32)
        if self.channel.sigma is not None:
            return white_BTD * np.float32(self.channel.sigma)
        assert self.channel.snr_db is not None, "noise has a ratio or a sigma"
        power_BT1 = np.square(x_BTD).mean(-1, keepdims=True) * np.float32(10 ** (-self.channel.snr_db / 10))
        return white_BTD * np.sqrt(power_BT1)

    def _lost(self, units: tuple[int, ...]) -> Bools:
        if self.channel.burst_units is None:
            return self._rng.random(units, np.float32) < self.channel.loss  # the same draws at any loss
        return self._bursts(math.prod(units)).reshape(units)

    def _bursts(self, count: int) -> Bools:
        """Gilbert's chain: bad units end with 1 / burst, good ones so that `loss` is the share of bad ones."""
        loss, burst = self.channel.loss, self.channel.burst_units
        assert burst is not None, "bursts have a length"
        ends = {True: 1 / burst, False: loss / (burst * (1 - loss))}
        bad = self._in_burst
        if bad is None:
            bad, first = bool(self._rng.random() < loss), 0
        else:
            first = 1  # geometric runs have no memory: the one that goes on has a whole run behind its last unit
        found: list[Bools] = []
        left = count + first
        while left > 0:
            length = min(left, int(self._rng.geometric(ends[bad])))
            found.append(np.full(length, bad))
            left -= length
            bad = not bad
        lost = np.concatenate(found)[first:]
        self._in_burst = bool(lost[-1])
        return lost

    def _filled(self, y_BTD: Floats, lost_BTD: Bools, boundary: int, fresh: bool) -> Floats:
        match self.channel.fill:
            case "zero":
                return np.where(lost_BTD, np.float32(0), y_BTD)
            case "mean":
                kept_BT1 = np.maximum(1, (~lost_BTD).sum(-1, keepdims=True))
                mean_BT1 = np.where(lost_BTD, np.float32(0), y_BTD).sum(-1, keepdims=True) / kept_BT1
                return np.where(lost_BTD, mean_BT1.astype(np.float32), y_BTD)
            case "last":
                before_BD = self._last.get(boundary)
                if fresh or before_BD is None or len(before_BD) != len(y_BTD):
                    before_BD = np.zeros_like(y_BTD[:, 0])
                known_BTD = np.concatenate([before_BD[:, None], y_BTD], axis=1)
                steps_T1 = np.arange(1, known_BTD.shape[1])[:, None]
                at_BTD = np.maximum.accumulate(np.where(lost_BTD, 0, steps_T1), axis=1)
                filled_BTD: Floats = np.take_along_axis(known_BTD, at_BTD, axis=1)
                self._last[boundary] = filled_BTD[:, -1]
                return filled_BTD


def as_channel(text: str, *, seed: int = 0) -> NoisyChannel | None:
    """The channel that a text means, None for `none`.

    Raises:
        InputError: no such channel or option, or a value that it cannot have.
    """
    kind, _, values = text.strip().partition(":")
    if kind not in KINDS:
        raise _unknown("channel", text, tuple(KINDS))
    numbers: list[float] = []
    options: dict[str, str] = {}
    for part in values.split(",") if values else []:
        name, given, value = part.partition("=")
        if name in OPTIONS:
            options[name] = value if given else "yes"
        elif options or given or len(numbers) == (3 if kind == "nakagami" else 1):
            raise _unknown("option of the channel", part, OPTIONS)
        else:
            numbers.append(_number(text, part))
    if kind == "none" and not numbers and not options:
        return None
    if len(numbers) != {"none": 0, "nakagami": 3}.get(kind, 1) or kind == "none":
        raise InputError(
            "channel", expected=KINDS[kind], actual=text, remedy=f"write one of {', '.join(KINDS.values())}"
        )
    match kind:
        case "loss":
            channel = NoisyChannel(loss=numbers[0], seed=seed)
        case "awgn":
            channel = NoisyChannel(snr_db=numbers[0], seed=seed)
        case "sigma":
            channel = NoisyChannel(sigma=numbers[0], seed=seed)
        case _:
            m, omega, threshold = numbers
            channel = NoisyChannel(fading=Nakagami(m=m, omega=omega, threshold=threshold), seed=seed)
    unit, _, size = options.get("unit", "element").partition(":")
    if unit not in get_args(Unit):
        raise _unknown("unit of the channel", unit, get_args(Unit))
    if options.get("fill", "zero") not in get_args(Fill):
        raise _unknown("fill of the channel", options["fill"], get_args(Fill))
    return replace(
        channel,
        snr_db=_number(text, options["snr"]) if "snr" in options else channel.snr_db,
        sigma=_number(text, options["sigma"]) if "sigma" in options else channel.sigma,
        unit=unit,  # type: ignore[arg-type]
        packet_bytes=_whole(text, size) if size else None,
        burst_units=_number(text, options["burst"]) if "burst" in options else None,
        fill=options.get("fill", "zero"),  # type: ignore[arg-type]
        rescale="rescale" in options,
        equalise="equalise" in options,
    )


def _number(text: str, part: str) -> float:
    try:
        return float(part)
    except ValueError as error:
        remedy = f"write a number instead of {part!r}"
        raise InputError(
            "channel", expected=f"numbers, as in {', '.join(list(KINDS.values())[1:])}", actual=text, remedy=remedy
        ) from error


def _whole(text: str, part: str) -> int:
    number = _number(text, part)
    _within(number.is_integer(), "unit of the channel", "packets of whole bytes", part)
    return int(number)


def _unknown(what: str, actual: str, known: tuple[str, ...]) -> InputError:
    remedy = f"use one of them{did_you_mean(actual.partition(':')[0], known)}"
    return InputError(what, expected=f"one of {list(known)}", actual=actual, remedy=remedy)


def _within(holds: bool, what: str, expected: str, actual: object) -> None:
    if not holds:
        raise InputError(what, expected=expected, actual=actual, remedy="choose a value in that range")
