"""Every answer that a device gives to an order, and the error that it reports instead of one."""

from __future__ import annotations

from typing import Any

from splitray.errors import (
    DeviceFailed,
    DeviceLost,
    InputError,
    ModelError,
    PlacementError,
    TopologyError,
    Unsampled,
)
from splitray.runtime.checkpoint import Saved
from splitray.runtime.wire.packing import Packable, Packed, Vocabulary

_ERRORS = {e.__name__: e for e in (InputError, ModelError, PlacementError, TopologyError)}


class Answer(Packable, tag_field="answer", tag=str.lower):
    """What a device says to an order; tensors, where an order asks for them, come before it."""


class Done(Answer):
    """Nothing but that the order is carried out."""


class Refused(Answer):
    """The error that an order ended with; the last three are those of an `InputError`."""

    type: str
    what: str
    expected: str = ""
    actual: str = ""
    remedy: str = ""

    @staticmethod
    def of(error: BaseException) -> Refused:
        """For the wire."""
        name = type(error).__name__
        if isinstance(error, InputError):
            return Refused(type=name, what=error.what, expected=error.expected, actual=error.actual,
                           remedy=error.remedy)  # fmt: skip
        return Refused(type=name, what=str(error))

    def error(self, device: str) -> Exception:
        """What the caller raises: an error of the same type that names the device."""
        kind = _ERRORS.get(self.type)
        if kind is not None:
            found = kind(f"{device}: {self.what}", expected=self.expected, actual=self.actual, remedy=self.remedy)
            found.devices = (device,)
            return found
        if self.type == Unsampled.__name__:
            return Unsampled(self.what)
        if self.type == DeviceLost.__name__:
            return DeviceLost(f"{device}: {self.what}")
        return DeviceFailed(f"{device} failed: {self.type}: {self.what}", (device,))


class Switched(Answer):
    """The staged epoch runs."""

    copied_bytes: int
    """Of KV, over the wire."""


class Counts(Answer):
    """What a device counted in the decode steps of one segment of a run; its prompt is left out."""

    steps: int
    messages: int
    payload_bytes: int
    wire_bytes: int
    decode_s: float
    decode_cpu_s: float
    kv_bytes: int


class NotSampled(Answer):
    """What the sampler says in place of `Counts` where no token can be chosen: the error of this one request.

    It is no `Refused`, which is raised as it comes: it is raised where counts are added up, when every device has
    answered, so that none is still at work on this request when the next one begins.
    """

    why: Refused

    @property
    def steps(self) -> int:
        """Raises the error: there is nothing to add up."""
        error = self.why.error("")
        if isinstance(error, InputError):  # of the request and not of the device
            error = type(error)(self.why.what, expected=self.why.expected, actual=self.why.actual,
                                remedy=self.why.remedy)  # fmt: skip
        raise error


class Stats(Answer):
    """Memory now; CPU seconds and what was sent to peers since the process began."""

    weight_bytes: int
    kv_bytes: int
    checkpoint_bytes_read: int
    rss_anon_bytes: int
    cpu_s: float
    pid: int
    messages: int
    payload_bytes: int
    wire_bytes: int
    dropped: int
    """Frames that came late or twice."""
    lean: bool


class RoundTrips(Answer):
    """Seconds of each round trip, and those that this device read weights in between."""

    round_trip_s: list[float]
    worked_s: list[float]


class Speeds(Answer):
    """Rates of one core."""

    gemv_bytes_per_s: float
    gemm_flops_per_s: float
    copy_bytes_per_s: float


class Alive(Answer):
    """A sign of life, and the epoch that runs if any does."""

    epoch: int | None


class MachineLoad(Answer):
    """A device's machine: its cores, how many are busy (with whatever, and with the device's process), free bytes."""

    machine: str
    cores: int
    busy_cores: float
    own_cores: float
    free_bytes: float


class Unreached(Answer):
    """Peers that do not answer a new connection."""

    peers: list[str]


class LinkRates(Answer):
    """A link as a probe found it."""

    rtt_s: float
    there_bytes_per_s: float
    back_bytes_per_s: float


class Stopped(Answer):
    """Nothing runs any more. Of each session, the positions whose KV is certain to be here."""

    epoch: int | None
    positions: dict[int, int]


class Staged(Answer):
    """The next placement is ready. `valid`: of each session, the position below which all its KV is here."""

    fingerprint: str
    """Of the checkpoint that was read."""
    copied_bytes: int
    copy_s: float
    valid: dict[int, int]


class Written(Answer):
    """A checkpoint's file, None where the device holds no KV."""

    file: Saved | None
    cpu_s: float


class ConfigText(Answer):
    """A model's config.json."""

    text: str


class CheckpointKey(Answer):
    """A parameter's key in a checkpoint, None if it has none."""

    key: str | None


class Numbers(Answer):
    """How a matrix is quantised, and what the tensors are that go before, by their names in `Quantised`: none are."""

    bits: int = 0
    group: int = 0
    inputs: int = 0
    parts: tuple[str, ...] = ()


class Fingerprint(Answer):
    """Tells one checkpoint from another."""

    fingerprint: str


ANSWERS = Vocabulary(Answer)


def answer_of(raw: Packed, device: str) -> Any:
    """The answer that a device gave.

    Raises:
        InputError: the device refused the order, or its answer is none.
        DeviceLost: it lost another device.
        RuntimeError: the order failed there.
    """
    answer = ANSWERS.unpack(raw)
    if isinstance(answer, Refused):
        raise answer.error(device)
    return answer
