"""Devices, the links between them, and the YAML that describes them. Knows no model and no placement."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import permutations
from math import inf
from pathlib import Path
from typing import Any, Literal, NewType

from splitray.catalog import DEVICES, LINKS, device_values, format_values, link_values
from splitray.errors import TopologyError, did_you_mean, listed
from splitray.user_file import UserFile
from splitray.weight_formats import FORMATS, WEIGHTS, as_format
from splitray.yaml_document import COMMA, kind_of, number, read_yaml

DeviceId = NewType("DeviceId", str)
_RATES = ("memory_bytes", "compute_flops", "memory_bandwidth_bytes_per_s")
_COSTS = ("idle_w", "active_w", "radio_w", "price_per_s", "launch_s")
_CORRECT = "correct it, or run `splitray profile`"
_ADD_SPEED = "add the missing key, or run `splitray profile`"
_ADD = "add the missing keys or a `catalog:` name"
_ID = re.compile(r"(?! )[^/\\,\[\]]{1,100}(?<! )")  # it is part of file names, lists and tables
_TORCH_DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")
_LIMITS: tuple[tuple[tuple[str, ...], Callable[[Any], object], str, str], ...] = (
    (
        ("id",),
        lambda v: _ID.fullmatch(v) and v.isprintable(),
        "1 to 100 characters on a line, none of / \\ , [ ]",
        "rename the device",
    ),
    (("torch_device",), _TORCH_DEVICE.fullmatch, "a device of torch, such as cpu or cuda:1", "correct the name"),
    (("tier",), lambda v: v in ("edge", "cloud"), "edge or cloud", "set tier to edge or cloud"),
    (_RATES, lambda v: 0 < v < inf, "a number above 0", "give the device's {}"),
    (("compute_efficiency", "memory_efficiency"), lambda v: 0 < v <= 1, "a share of the peak: above 0 to 1", _CORRECT),
    (
        ("weights",),
        lambda v: v is None or v in WEIGHTS,
        f"one of {', '.join(WEIGHTS)}",
        "use one of them, or leave `weights:` out to have what --weights says",
    ),
    (_COSTS, lambda v: 0 <= v < inf, "0 or more", "give the device's {}"),
)
"""What the fields of a device must be: their names, the check, what is expected and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpeed:
    """How fast a device multiplies by weights of a format (weight_formats.py), all that goes with it included.

    Args:
        name: of the format.
        weights_per_s: of one row, as in decoding.
        shared_weights_per_s: the same while another device of its memory does so too; None: as fast.
        prompt_weights_per_s: of many rows, times their number; None: as its operations a second allow.
        launch_s: the fixed cost of a sub-block; None: the device's.
    """

    name: str
    weights_per_s: float
    shared_weights_per_s: float | None = None
    prompt_weights_per_s: float | None = None
    launch_s: float | None = None

    def __post_init__(self) -> None:
        what = f"speed in {self.name}"
        if self.name not in FORMATS:
            raise _wrong(
                what, f"one of {', '.join(FORMATS)}", self.name, f"correct it{did_you_mean(self.name, FORMATS)}"
            )
        shared, prompt = self.shared_weights_per_s, self.prompt_weights_per_s
        if not all(v is None or 0 < v < inf for v in (self.weights_per_s, shared, prompt)):
            found = f"{self.weights_per_s}, {shared}, {prompt}"
            raise _wrong(f"{what}: weights_per_s", "numbers above 0", found, _CORRECT)
        if shared is not None and shared > self.weights_per_s:
            expected = f"at most what it multiplies alone ({self.weights_per_s:g})"
            raise _wrong(f"{what}: shared_weights_per_s", expected, shared, _CORRECT)
        if self.launch_s is not None and not 0 <= self.launch_s < inf:
            raise _wrong(f"{what}: launch_s", "0 or more", self.launch_s, _CORRECT)

    def times(self, share: float) -> FormatSpeed:
        """That of a share of the device."""
        rates = {n: getattr(self, n) for n in ("weights_per_s", "shared_weights_per_s", "prompt_weights_per_s")}
        slower: dict[str, Any] = {n: None if v is None else v * share for n, v in rates.items()}
        return replace(self, **slower)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One node that can hold pieces of a model. Rates are SI; `torch_device` names where its tensors live.

    Devices of one `memory_group` read one memory: while another of them reads too, each reads only
    `shared_bandwidth_bytes_per_s`, and so much longer again for every further one. `formats` are speeds where weights
    in some formats take another time than that of reading them: those of few bits are bound by arithmetic.
    """

    id: DeviceId
    tier: Literal["edge", "cloud"]
    memory_bytes: float
    compute_flops: float
    memory_bandwidth_bytes_per_s: float
    idle_w: float = 0.0
    active_w: float = 0.0
    radio_w: float = 0.0
    price_per_s: float = 0.0
    compute_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    launch_s: float = 0.0
    memory_group: str | None = None
    shared_bandwidth_bytes_per_s: float | None = None
    torch_device: str = "cpu"
    model_path: str | None = None
    weights: str | None = None
    """The format in which it holds weights (weight_formats.py), `auto` as they are stored; None: what the run says."""
    formats: tuple[FormatSpeed, ...] = ()

    def __post_init__(self) -> None:
        for names, fits, expected, remedy in _LIMITS:
            for name in names:
                if not fits(value := getattr(self, name)):
                    what = f"device {self.id}: {name}"
                    raise _wrong(what, expected, value, remedy.format(name))
        self._check_sharing()

    def slowed(self, share: float) -> Device:
        """The device with a share of its computing and reading left."""
        return replace(
            self,
            compute_flops=self.compute_flops * share,
            memory_bandwidth_bytes_per_s=self.memory_bandwidth_bytes_per_s * share,
            formats=tuple(f.times(share) for f in self.formats),
        )

    def holding(self, weights: str) -> Device:
        """The device as one that reads plain weights as fast as this one multiplies by those of a format.

        KV is then read at the same rate, too, which makes a long context dearer than it is.
        """
        speed = next((f for f in self.formats if f.name == weights), None)
        if speed is None:
            return self
        each = as_format(weights).resident_bits / 8
        shared = None
        if self.memory_group is not None:
            shared = each * (speed.shared_weights_per_s or speed.weights_per_s)
        prompt = speed.prompt_weights_per_s
        return replace(
            self,
            memory_bandwidth_bytes_per_s=each * speed.weights_per_s,
            memory_efficiency=1.0,
            shared_bandwidth_bytes_per_s=shared,
            compute_flops=self.compute_flops if prompt is None else 2 * prompt,
            compute_efficiency=self.compute_efficiency if prompt is None else 1.0,
            launch_s=self.launch_s if speed.launch_s is None else speed.launch_s,
            formats=(),
        )

    def _check_sharing(self) -> None:
        shared, own = self.shared_bandwidth_bytes_per_s, self.memory_bandwidth_bytes_per_s * self.memory_efficiency
        if (self.memory_group is None) != (shared is None):
            expected = "memory_group and shared_bandwidth_bytes_per_s together"
            remedy = "give both, or run `splitray profile`"
            raise _wrong(f"device {self.id}: memory_group", expected, "only one of them", remedy)
        if shared is not None and not 0 < shared <= own:
            expected = f"above 0 and at most what it reads alone ({own:g})"
            raise _wrong(f"device {self.id}: shared_bandwidth_bytes_per_s", expected, shared, _CORRECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A directed pair: rate, round-trip time and the fixed cost of one exchange."""

    source: DeviceId
    target: DeviceId
    bandwidth_bytes_per_s: float
    rtt_s: float
    exchange_s: float = 0.0
    medium: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_bytes_per_s < inf or not 0 <= self.rtt_s < inf or not 0 <= self.exchange_s < inf:
            found = f"{self.bandwidth_bytes_per_s}, {self.rtt_s}, {self.exchange_s}"
            expected = "bandwidth above 0, rtt_s and exchange_s of 0 or more"
            raise _wrong(f"link {self.source} -> {self.target}", expected, found, "correct the link")

    def transfer_s(self, num_bytes: float) -> float:
        """One-way time of a message: half the RTT, the fixed cost, and bytes over rate (docs/equations.md E1.15)."""
        return self.rtt_s / 2 + self.exchange_s + num_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Devices in their fixed order and the directed links between them; one device is the origin."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    origin: DeviceId
    origin_holds: Literal["none", "embedding", "embedding_and_head"] = "none"
    ids: tuple[DeviceId, ...] = field(init=False, repr=False, compare=False)
    """Device ids in order; this order breaks every tie and names the lead of a sub-block."""
    index: Mapping[DeviceId, int] = field(init=False, repr=False, compare=False)
    """Where each device stands in `ids`."""
    _by_pair: Mapping[tuple[DeviceId, DeviceId], Link] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = tuple(d.id for d in self.devices)
        object.__setattr__(self, "ids", ids)
        if not ids:
            raise _wrong("devices", "at least one device", "none", "list a device under `devices:`")
        object.__setattr__(self, "index", {d: i for i, d in reversed(list(enumerate(ids)))})
        twice = [i for i, d in enumerate(ids) if self.index[d] < i]
        if twice:
            found = f"{sorted({str(ids[i]) for i in twice})} more than once"
            raise _at(f"devices[{twice[0]}]", _wrong("devices", "distinct ids", found, "rename one of them"))
        self._known(self.origin, "origin")
        if self.origin_holds not in ("none", "embedding", "embedding_and_head"):
            expected = "none, embedding or embedding_and_head"
            raise _wrong("origin_holds", expected, self.origin_holds, "use one of the three")
        pairs: dict[tuple[DeviceId, DeviceId], Link] = {}
        for i, link in enumerate(self.links):
            where = f"links[{i // 2}]"  # of a file, which gives both ways of a pair at once
            pair = (link.source, link.target)
            with _under(where):
                self._known(link.source, "link")
                self._known(link.target, "link")
            if pair[0] == pair[1] or pair in pairs:
                found = f"{pair[0]} -> {pair[1]} again" if pair in pairs else f"{pair[0]} to itself"
                wrong = _wrong("links", "one link between two different devices", found, "remove it")
                raise _at(where, wrong)
            pairs[pair] = link
        object.__setattr__(self, "_by_pair", pairs)

    def _known(self, device: DeviceId, where: str) -> None:
        if device not in self.index:
            remedy = f"correct the name{did_you_mean(device, self.ids)}"
            raise _wrong(where, f"one of {listed(self.ids)}", device, remedy)

    def device(self, device: DeviceId) -> Device:
        """The device with this id."""
        self._known(device, "device")
        return self.devices[self.index[device]]

    def link(self, source: DeviceId, target: DeviceId) -> Link | None:
        """The directed link, or None if the two cannot exchange."""
        return self._by_pair.get((source, target))

    def serves(self, device: DeviceId) -> bool:
        """Whether prompts get from the origin to a device and tokens back: it is the origin, or linked both ways."""
        pair = (self.origin, device)
        return device == self.origin or (self.link(*pair) is not None and self.link(*pair[::-1]) is not None)

    def require_connected(self) -> None:
        """Refuse a topology with devices that no chain of links joins with the origin, there and back.

        Raises:
            TopologyError: there are such devices; names them.
        """
        there = self._reached([(k.source, k.target) for k in self.links])
        back = self._reached([(k.target, k.source) for k in self.links])
        apart = [str(i) for i in self.ids if i not in there or i not in back]
        if apart:
            expected = f"every device linked with the origin {self.origin}, through others if need be"
            remedy = "add the missing links under `links:`, or remove the devices"
            raise _wrong("links", expected, f"no links that join it with {listed(apart)}", remedy)

    def _reached(self, pairs: list[tuple[DeviceId, DeviceId]]) -> set[DeviceId]:
        leads: dict[DeviceId, list[DeviceId]] = {}
        for a, b in pairs:
            leads.setdefault(a, []).append(b)
        found, new = {self.origin}, [self.origin]
        while new:
            more = set(leads.get(new.pop(), ())) - found
            found |= more
            new += more
        return found

    def among(self, devices: Collection[str]) -> Topology:
        """Some of the devices, the origin one of them, and the links among these; in the same order."""
        if len(devices) == len(self.ids):
            return self
        kept = set(devices)
        links = tuple(x for x in self.links if x.source in kept and x.target in kept)
        return replace(self, devices=tuple(d for d in self.devices if d.id in kept), links=links)

    def tier(self, tier: str) -> tuple[DeviceId, ...]:
        """Ids of one tier, in order."""
        return tuple(d.id for d in self.devices if d.tier == tier)

    @staticmethod
    def uniform(num_devices: int, *, num_edges: int = 1, memory_bytes: float = 1e12) -> Topology:
        """Equal devices `edge0..`, `cloud0..` on this machine, all linked: what `--devices N` means."""
        names = [f"edge{i}" for i in range(min(num_edges, num_devices))]
        names += [f"cloud{i}" for i in range(num_devices - len(names))]
        devices = tuple(
            Device(
                id=DeviceId(n),
                tier="edge" if n.startswith("edge") else "cloud",
                memory_bytes=memory_bytes,
                compute_flops=5e10,
                memory_bandwidth_bytes_per_s=1.2e10,
            )
            for n in names
        )
        pairs = permutations((d.id for d in devices), 2)
        links = tuple(Link(source=a, target=b, bandwidth_bytes_per_s=1e9, rtt_s=1e-4) for a, b in pairs)
        return Topology(devices=devices, links=links, origin=devices[0].id)

    @staticmethod
    def pair(edge: str, cloud: str = "a100-80gb", *, link: str = "lte", origin_holds: str = "none") -> Topology:
        """One edge device and one cloud device of the catalogue, `edge` and `cloud`, over one of its links."""
        devices = [{"id": "edge", "tier": "edge", "catalog": edge}, {"id": "cloud", "tier": "cloud", "catalog": cloud}]
        links = [{"between": ["edge", "cloud"], "catalog": link}]
        return parse_topology({"origin_holds": origin_holds, "devices": devices, "links": links})

    @staticmethod
    def load(path: str | Path) -> Topology:
        """Read a topology file (YAML or JSON).

        Raises:
            TopologyError: the file cannot be read, a key is unknown or missing, or a value is out of range.
        """
        document = read_yaml(UserFile(path, "topology", "give a topology file, as in clusters/", TopologyError))
        with document.located():
            return parse_topology(document.value)


_SPEED_KEYS = tuple(f.name for f in fields(FormatSpeed) if f.name != "name")
_DEVICE_KEYS = tuple(f.name for f in fields(Device))
_TEXTS = ("id", "tier", "memory_group", "torch_device", "model_path", "weights")
_OPTIONAL = ("catalog", "memory_group", "shared_bandwidth_bytes_per_s", "model_path", "weights", "formats")
_TIMES = ("rtt_s", "exchange_s", "launch_s")
_LEAST, _MOST, _MOST_S = 1e-9, 1e24, 1e5  # beyond these it is a slip, and what is computed of it may be no number
_UNITS = {
    "bytes_per_s": "bytes per second: 100 Mbit/s are 1.25e7",
    "bytes": "bytes: 8 GB are 8e9, 8 GiB are 8589934592",
    "flops": "operations per second: 2 TFLOP/s are 2e12",
    "weights_per_s": "weights per second: 10 billion are 1e10",
    "price_per_s": "any currency",
    "_s": "seconds: 10 ms are 0.01",
    "_w": "watts",
}
_LINK_NUMBERS = ("bandwidth_bytes_per_s", "rtt_s", "uplink_bytes_per_s", "downlink_bytes_per_s", "exchange_s")
_LINK_KEYS = ("between", "catalog", *_LINK_NUMBERS, "medium")


def parse_topology(document: Any) -> Topology:
    """Build a Topology from the parsed document; what is refused is named by its key's path."""
    _keys(document, ("origin", "origin_holds", "devices", "links", "profile"), "topology")
    if document.get("profile") is not None and not isinstance(document["profile"], dict):
        expected, actual = "a mapping: where the numbers come from", kind_of(document["profile"])
        raise _wrong("topology.profile", expected, actual, "remove it")
    devices = tuple(_device(d, f"devices[{i}]") for i, d in enumerate(_list(document, "devices")))
    links = [link for i, d in enumerate(_list(document, "links")) for link in _links(d, f"links[{i}]")]
    edges = [d.id for d in devices if d.tier == "edge"]
    origin = edges[0] if edges else devices[0].id if devices else DeviceId("")
    if "origin" in document:
        origin = DeviceId(_text(document["origin"], "origin"))
    holds: Any = "none" if document.get("origin_holds") is None else _text(document["origin_holds"], "origin_holds")
    return Topology(devices=devices, links=tuple(links), origin=origin, origin_holds=holds)


def _device(entry: Any, where: str) -> Device:
    _keys(entry, (*_DEVICE_KEYS, "catalog"), where)
    values = {k: v for k, v in entry.items() if v is not None or k not in _OPTIONAL}
    if "catalog" in values:
        name = _known_name(values.pop("catalog"), DEVICES, where)
        values = {**device_values(name), "formats": format_values(name), **values}
    speeds = _speeds(values.pop("formats", {}), f"{where}.formats")
    missing = [k for k in ("id", "tier", *_RATES) if k not in values]
    if missing:
        raise _wrong(where, f"{missing}", f"only {sorted(values)}", _ADD)
    checked: dict[str, Any] = {
        k: _text(v, f"{where}.{k}") if k in _TEXTS else _number(v, f"{where}.{k}") for k, v in values.items()
    }
    with _under(where):
        return Device(formats=speeds, **checked)


def _speeds(entries: Any, where: str) -> tuple[FormatSpeed, ...]:
    _keys(entries, FORMATS, where)
    return tuple(_speed(name, entry, f"{where}.{name}") for name, entry in entries.items())


def _speed(name: str, entry: Any, where: str) -> FormatSpeed:
    _keys(entry, _SPEED_KEYS, where)
    if "weights_per_s" not in entry:
        raise _wrong(where, "weights_per_s", f"only {sorted(entry)}", _ADD_SPEED)
    with _under(where):
        return FormatSpeed(name=name, **{k: _number(v, f"{where}.{k}") for k, v in entry.items()})


def _known_name(value: Any, known: Mapping[str, Any], where: str) -> str:
    name = _text(value, f"{where}.catalog")
    if name not in known:
        remedy = f"use a catalogue name{did_you_mean(name, known)}, or give explicit values"
        raise _wrong(f"{where}.catalog", f"one of {sorted(known)}", name, remedy)
    return name


def _links(entry: Any, where: str) -> list[Link]:
    _keys(entry, _LINK_KEYS, where)
    between = entry.get("between")
    if not isinstance(between, list) or len(between) != 2:
        raise _wrong(f"{where}.between", "two device ids", between, "write [a, b]")
    numbers = {k: _number(entry[k], f"{where}.{k}") for k in _LINK_NUMBERS if k in entry}
    if entry.get("catalog") is not None:
        listed = link_values(_known_name(entry["catalog"], LINKS, where))
        rates = ("uplink_bytes_per_s", "downlink_bytes_per_s") if "bandwidth_bytes_per_s" in numbers else ()
        numbers = {**{k: v for k, v in listed.items() if k not in rates}, **numbers}
    rate = numbers.get("bandwidth_bytes_per_s")
    up, down = numbers.get("uplink_bytes_per_s", rate), numbers.get("downlink_bytes_per_s", rate)
    if up is None or down is None or "rtt_s" not in numbers:
        expected = "rtt_s and bandwidth_bytes_per_s (or uplink and downlink)"
        raise _wrong(where, expected, f"only {sorted(entry)}", _ADD)
    a, b = (DeviceId(_text(d, f"{where}.between")) for d in between)
    medium = None if entry.get("medium") is None else _text(entry["medium"], f"{where}.medium")
    fixed = {"rtt_s": numbers["rtt_s"], "exchange_s": numbers.get("exchange_s", 0.0)}
    with _under(where):
        return [
            Link(source=a, target=b, bandwidth_bytes_per_s=up, medium=medium, **fixed),
            Link(source=b, target=a, bandwidth_bytes_per_s=down, medium=medium, **fixed),
        ]


def _keys(entry: Any, allowed: Iterable[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise _wrong(where, "a mapping", kind_of(entry), "see clusters/ for examples")
    allowed = list(allowed)
    for key in entry:
        if key not in allowed:
            remedy = COMMA if str(key).isdigit() else f"remove the key{did_you_mean(str(key), allowed)}"
            raise _wrong(f"{where}.{key}", f"one of {allowed}", key, remedy)


def _list(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if value is not None and not isinstance(value, list):
        raise _wrong(key, "a list", kind_of(value), f"write `{key}:` as a list")
    return value or []


def _text(value: Any, where: str) -> str:
    """A name as it is written; a number is one, too. What is no single line of characters is refused."""
    name = str(value) if isinstance(value, str) or type(value) is int else ""
    if not name or not name.isprintable():
        raise _wrong(where, "a text on one line", "nothing" if value is None else repr(value), "write a name there")
    return name


def _number(value: Any, where: str) -> float:
    key, found = where.rpartition(".")[2], number(value)
    if found is None:
        unit = next((f" ({u})" for ending, u in _UNITS.items() if key.endswith(ending)), "")
        remedy = f"write a number in SI units, such as 1.5e9, without a unit, quotes or leading zeros{unit}"
        raise _wrong(where, "a number", "nothing" if value is None else repr(value), remedy)
    least, most = (0.0, _MOST_S) if key in _TIMES else (_LEAST, _MOST)
    if abs(found) > most or 0 < abs(found) < least:
        expected = f"0, or a number from {least:g} to {most:g}" if least else f"a number from 0 to {most:g}"
        raise _wrong(where, expected, value, _CORRECT)
    return float(found)


@contextmanager
def _under(where: str) -> Iterator[None]:
    """What a device or link says of one of its fields is said of that key of a document."""
    try:
        yield
    except TopologyError as error:
        raise _at(f"{where}.{error.what.rpartition(' ')[2]}", error) from error.__cause__


def _at(where: str, error: TopologyError) -> TopologyError:
    error.where = where
    return error


def _wrong(what: str, expected: str, actual: object, remedy: str) -> TopologyError:
    return TopologyError(what, expected=expected, actual=actual, remedy=remedy)
