"""Every order that a device takes, packed and checked here; what it answers stands in `answers`.

Each order is frozen, its name on the wire is its class's in small letters without `Order`, and the class in its
brackets is the answer. Knows no sockets: `calls` sends.
"""

from typing import Any, Generic, TypeVar

from splitray.arch import ModelArch, Range
from splitray.model.kv_cache import KvPiece
from splitray.model.layout import Layouts
from splitray.model.surgery import ShardSpec
from splitray.route import Route
from splitray.runtime.checkpoint import Saved
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire import answers
from splitray.runtime.wire.endpoint import Endpoint
from splitray.runtime.wire.packing import Packable, Vocabulary

A_co = TypeVar("A_co", covariant=True)


class Order(Packable, Generic[A_co], tag_field="order", tag=lambda name: name.removesuffix("Order").lower()):
    """What an engine, or another device, wants of a device."""


class Assignment(Packable):
    """All that a device needs to become a shard: the model, its wiring, what it holds of it, and the route."""

    model_path: str
    arch: ModelArch
    layout: Layouts
    spec: ShardSpec | None
    """None for an origin that only gets tokens."""
    route: Route
    head_rows: dict[str, tuple[Range, ...]]
    """Vocabulary rows of each holder of the head."""
    torch_device: str = "cpu"
    lean: bool = True
    epoch: int = 0


class Lender(Packable):
    """A device that may have the model on its disk."""

    device: str
    endpoint: Endpoint
    model_path: str
    """There."""


class KvSource(Packable):
    """A device that has KV which another one is to get."""

    device: str
    endpoint: Endpoint
    epoch: int
    """The one in which it holds them."""
    pieces: tuple[KvPiece, ...]


class Succeeding(Packable):
    """A session whose KV, of the positions [start, stop), is to be there in the next epoch too."""

    id: int
    capacity: int
    start: int
    stop: int
    sources: tuple[KvSource, ...] = ()
    lost: tuple[KvPiece, ...] = ()
    """Pieces that no living device holds: they come from `files` in `store`, or not at all."""
    files: tuple[Saved, ...] = ()
    store: str | None = None


# Orders of a run, over the caller's one connection, one after another.


class HelloOrder(Order[answers.Done]):
    """Forget what an engine before has left behind."""


class SwitchOrder(Order[answers.Switched]):
    """Let the staged epoch run, between two tokens; copy first what was written since it was staged."""

    epoch: int
    dial: dict[str, Endpoint]
    """Peers to connect to."""
    expect: tuple[str, ...]
    """Peers that connect to this device."""
    spin_s: float
    sessions: tuple[Succeeding, ...]


class DecodeOrder(Order[answers.Counts]):
    """Generate up to `max_new_tokens` for a batch, the devices among themselves.

    A run may go on after a pause: then the prompt ends with the `done` tokens of each sequence that are generated
    already, and the caches hold the positions below `start`.
    """

    session: int
    attempt: int
    epoch: int
    prompt: list[list[int]]
    attention_mask: list[list[int]] | None
    sampling: Sampling
    capacity: int
    start: int = 0
    done: int = 0


class StepOrder(Order[None]):
    """One forward for a caller that samples itself; logits of the last `keep` positions come back as a tensor."""

    session: int
    attempt: int
    epoch: int
    batch: int
    new_tokens: int
    position: int
    keep: int
    capacity: int
    ids: bytes
    """Int64 [batch, new_tokens], as the next two."""
    attention_mask: bytes | None
    position_ids: bytes | None
    reorder: list[int] | None


class EndOrder(Order[None]):
    """Free a session's KV; nobody waits for an answer."""

    session: int


class StatsOrder(Order[answers.Stats]):
    """Tell memory, bytes and CPU seconds."""


class EchoOrder(Order[answers.RoundTrips]):
    """Send frames of `size` bytes to and fro with a peer, as decoding does: what the bench calls an exchange.

    With `cold_bytes` each side reads weights before it sends, so that the other one falls asleep, as it decodes.
    """

    peer: str
    attempt: int
    size: int
    rounds: int
    first: bool
    """Whether this device begins."""
    cold_bytes: int


class SpeedsOrder(Order[answers.Speeds]):
    """Measure how fast one core multiplies and copies; see `probes.speeds`."""

    cold_bytes: int


class LeaveOrder(Order[None]):
    """Forget everything; the caller goes."""


# Orders beside a run, each connection in a thread of its own.


class PingOrder(Order[answers.Alive]):
    """Give a sign of life."""


class PaceOrder(Order[answers.Done]):
    """Send to peers as slowly as a link of that rate would take it; 0: as fast as it goes."""

    bytes_per_s: float


class BusyOrder(Order[answers.MachineLoad]):
    """Tell how busy the machine is."""


class ReachOrder(Order[answers.Unreached]):
    """Dial peers anew: do they answer?"""

    peers: dict[str, Endpoint]
    within_s: float


class ProbeOrder(Order[answers.LinkRates]):
    """Time a round trip to a peer, and `num_bytes` each way."""

    peer: str
    endpoint: Endpoint
    num_bytes: int
    within_s: float


class BounceOrder(Order[answers.Done]):
    """Send `num_bytes` back as a tensor; of a probe."""

    num_bytes: int
    filling: bytes


class AbortOrder(Order[answers.Stopped]):
    """Stop whatever runs, and take back a switch to an epoch after `epoch`, which others have not made."""

    epoch: int


class StageOrder(Order[answers.Staged]):
    """Read what the next placement gives this device, and copy KV; what runs goes on."""

    assignment: Assignment
    lenders: tuple[Lender, ...]
    sessions: tuple[Succeeding, ...]


class ReadyOrder(Order[answers.Done]):
    """Hold slices in case another device is lost."""

    assignment: Assignment
    lenders: tuple[Lender, ...]


class KvOrder(Order[answers.Done]):
    """Send keys and values of a session's positions [start, stop): two tensors a piece."""

    session: int
    epoch: int
    pieces: tuple[KvPiece, ...]
    start: int
    stop: int


class CheckpointOrder(Order[answers.Written]):
    """Write the KV of a session's positions [start, stop) to a store."""

    session: int
    epoch: int
    start: int
    stop: int
    store: str


# Orders of a device without the model to one that has it on its disk, at `path`.


class ConfigOrder(Order[answers.ConfigText]):
    """Tell the model's config.json."""

    path: str


class KeyOrder(Order[answers.CheckpointKey]):
    """Tell under which key the checkpoint has a parameter."""

    path: str
    name: str


class SliceOrder(Order[answers.Done]):
    """Send ranges of a tensor, joined along `axis`; None: all of it."""

    path: str
    name: str
    axis: int
    ranges: tuple[Range, ...] | None


class ExpertsOrder(Order[answers.Done]):
    """Send some experts of a stacked weight: of gate and up together, or of down."""

    path: str
    name: str
    experts: tuple[int, ...]


class NumbersOrder(Order[answers.Numbers]):
    """Send what is stored of a matrix in whole numbers: some outputs, or a block of its inputs, or one expert."""

    path: str
    name: str
    outputs: tuple[Range, ...] | None
    block: Range | None
    expert: int | None = None


class FingerprintOrder(Order[answers.Fingerprint]):
    """Tell which checkpoint it is."""

    path: str


ORDERS: Vocabulary[Order[Any]] = Vocabulary(Order)
