"""Which device holds which piece: a frozen total map, its checks and its YAML form. Knows no cost or wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from splitray.arch import ModelArch, Range
from splitray.errors import PlacementError, did_you_mean, listed
from splitray.results import write_whole
from splitray.topology import DeviceId, Topology
from splitray.user_file import UserFile
from splitray.weight_formats import ROWS
from splitray.yaml_document import kind_of, number, read_yaml


@dataclass(frozen=True, slots=True)
class Shares:
    """The ranges of one sub-block (or of the head's vocabulary rows) that each device holds.

    Devices hold disjoint ranges (partitioned) or each the whole (replicated); `validate` refuses the rest.
    """

    by_device: tuple[tuple[DeviceId, tuple[Range, ...]], ...]

    @staticmethod
    def of(shares: Mapping[str, Iterable[tuple[int, int]]]) -> Shares:
        """Normalise: empty ranges dropped, ranges sorted and neighbours joined, empty devices dropped."""
        kept = []
        for device, ranges in shares.items():
            joined: list[Range] = []
            for start, stop in sorted(ranges):
                if stop == start:
                    continue
                if joined and joined[-1].stop == start:
                    joined[-1] = Range(joined[-1].start, stop)
                else:
                    joined.append(Range(start, stop))
            if joined:
                kept.append((DeviceId(device), tuple(joined)))
        return Shares(tuple(kept))

    @staticmethod
    def whole(total: int, *devices: str) -> Shares:
        """All of it on one device, or a full copy on each of several."""
        return Shares.of({d: [(0, total)] for d in devices})

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """The devices that hold at least one piece."""
        return tuple(d for d, _ in self.by_device)

    def ranges(self, device: str) -> tuple[Range, ...]:
        """The device's ranges; empty if it holds nothing."""
        return next((r for d, r in self.by_device if d == device), ())

    def count(self, device: str) -> int:
        """How many indices the device holds."""
        for holder, ranges in self.by_device:
            if holder == device:
                return sum(r.stop - r.start for r in ranges)
        return 0

    def is_replicated(self, total: int) -> bool:
        """Whether several devices each hold all of it."""
        whole = (Range(0, total),)
        return len(self.by_device) > 1 and all(r == whole for _, r in self.by_device)


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """Who holds the head groups and the FFN columns (or experts) of one layer."""

    attention: Shares
    ffn: Shares


@dataclass(frozen=True, slots=True)
class Placement:
    """A frozen total map of every piece of a model to devices."""

    layers: tuple[LayerPlacement, ...]
    embedding: tuple[DeviceId, ...]
    head: Shares

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """Every device that holds a piece, in order of first mention."""
        named = list(self.embedding)
        for layer, _ in self.runs():
            named += [*layer.attention.devices, *layer.ffn.devices]
        return tuple(dict.fromkeys([*named, *self.head.devices]))

    def runs(self) -> list[tuple[LayerPlacement, int]]:
        """Layers in order, with how many in a row are placed alike: planners ask for sums over layers all the time."""
        found: list[tuple[LayerPlacement, int]] = []
        for layer in self.layers:
            if found and (found[-1][0] is layer or found[-1][0] == layer):
                found[-1] = found[-1][0], found[-1][1] + 1
            else:
                found.append((layer, 1))
        return found

    def to_document(self) -> dict[str, Any]:
        """The YAML document of this placement (an example: clusters/placement-example.yaml)."""

        def plain(shares: Shares) -> dict[str, list[list[int]]]:
            return {str(d): [[r.start, r.stop] for r in ranges] for d, ranges in shares.by_device}

        return {
            "layers": [{"attention": plain(x.attention), "ffn": plain(x.ffn)} for x in self.layers],
            "embedding": [str(d) for d in self.embedding],
            "head": plain(self.head),
        }

    def save(self, path: str | Path) -> None:
        """Write the placement as YAML to `path`.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(path, yaml.safe_dump(self.to_document(), sort_keys=False, default_flow_style=None))

    @staticmethod
    def from_document(document: Any) -> Placement:
        """Build from a parsed document; every wrong key or shape is refused with its path."""
        _keys(document, ("layers", "embedding", "head"), "placement")
        layers = document["layers"]
        if not isinstance(layers, list):
            raise PlacementError("layers", expected="a list", actual=kind_of(layers), remedy="give one entry a layer")
        parsed = []
        for i, layer in enumerate(layers):
            _keys(layer, ("attention", "ffn"), f"layers[{i}]")
            parsed.append(
                LayerPlacement(
                    _shares(layer["attention"], f"layers[{i}].attention"),
                    _shares(layer["ffn"], f"layers[{i}].ffn"),
                )
            )
        embedding = document["embedding"]
        if not isinstance(embedding, list) or not all(isinstance(d, str | int) for d in embedding) or not embedding:
            raise PlacementError(
                "embedding",
                expected="a list of devices",
                actual=embedding,
                remedy="write `embedding: [device]`",
            )
        return Placement(tuple(parsed), tuple(DeviceId(str(d)) for d in embedding), _shares(document["head"], "head"))

    @staticmethod
    def load(path: str | Path) -> Placement:
        """Read a placement file (YAML or JSON).

        Raises:
            PlacementError: the file cannot be read, or is no such document.
        """
        remedy = "give a placement file, as clusters/placement-example.yaml"
        document = read_yaml(UserFile(path, "placement", remedy, PlacementError))
        with document.located():
            return Placement.from_document(document.value)


def validate(placement: Placement, arch: ModelArch, topology: Topology) -> None:
    """Check that the placement covers the model once, names known devices, and fits their memory.

    Raises:
        PlacementError: says which piece, what was expected, what came and what to do.
    """
    if len(placement.layers) != arch.num_layers:
        raise PlacementError(
            "layers",
            expected=f"{arch.num_layers} of {arch.name}",
            actual=len(placement.layers),
            remedy="give one entry a layer",
        )
    for device in placement.devices:
        if device not in topology.index:
            raise PlacementError(
                "placement",
                expected=f"devices among {listed(topology.ids)}",
                actual=device,
                remedy="correct the device's name or add it to the topology",
            )
    if not placement.embedding or len(set(placement.embedding)) != len(placement.embedding):
        raise PlacementError(
            "embedding",
            expected="at least one device, each once",
            actual=list(placement.embedding),
            remedy="name each holder of the embedding once",
        )
    i = 0
    for layer, count in placement.runs():
        _covered(layer.attention, arch.num_kv_heads, f"layer {i} attention", "head groups")
        _covered(layer.ffn, arch.ffn_dim, f"layer {i} ffn", "experts" if arch.num_experts else "columns")
        if arch.parallel_block:
            _one_sub_block(layer, arch, i)
        i += count
    _covered(placement.head, arch.vocab, "head", "vocabulary rows")
    if placement.head.is_replicated(arch.vocab):
        raise PlacementError(
            "head",
            expected="one holder or disjoint rows",
            actual="a full copy on several devices",
            remedy="give each device its own vocabulary rows",
        )
    _within_limits(placement, arch)
    if topology.origin_holds != "none":
        _pinned(placement, topology)
    for device, needed in weight_bytes(placement, arch).items():
        available = topology.device(device).memory_bytes
        if needed > available:
            raise PlacementError(
                f"memory of {device}",
                expected=f"at most {available:,.0f} bytes of weights",
                actual=f"{needed:,.0f} bytes",
                remedy="move pieces to another device",
            )


def weight_bytes(placement: Placement, arch: ModelArch) -> dict[DeviceId, int]:
    """Weight bytes a device holds, norms and biases left out; a tied table is shared where rows coincide."""
    params, tables = dict.fromkeys(placement.devices, 0), dict.fromkeys(placement.devices, 0)
    held = {d: arch.on(d) for d in params}
    for layer, count in placement.runs():
        for device, ranges in layer.attention.by_device:
            params[device] += count * sum(r.count for r in ranges) * arch.group_params
        for device, ranges in layer.ffn.by_device:
            params[device] += count * sum(r.count for r in ranges) * arch.ffn_unit_params
    for device in placement.embedding:
        tables[device] += held[device].embedding_bytes
    for device, _ in placement.head.by_device:
        if not (held[device].shares_table and device in placement.embedding):
            tables[device] += held[device].table_bytes(placement.head.count(device) * arch.vocab_row_params)
    return {d: held[d].weight_bytes(n) + tables[d] for d, n in params.items()}


def _covered(shares: Shares, total: int, where: str, unit: str) -> None:
    for device, ranges in shares.by_device:
        for r in ranges:
            if not 0 <= r.start < r.stop <= total:
                raise PlacementError(
                    f"{where} on {device}",
                    expected=f"ranges within [0, {total}) {unit}",
                    actual=f"[{r.start}, {r.stop})",
                    remedy="correct the range",
                )
    if shares.is_replicated(total):
        return
    taken = sorted((r, d) for d, ranges in shares.by_device for r in ranges)
    end, holder = 0, DeviceId("")
    for r, device in taken:
        if r.start < end:
            raise PlacementError(
                where,
                expected=f"each of {total} {unit} on one device, or all of them on each",
                actual=f"[{r.start}, {min(end, r.stop)}) on {holder} and on {device}",
                remedy="make the ranges disjoint, or replicate the whole sub-block",
            )
        if r.start > end:
            break
        end, holder = r.stop, device
    if end != total:
        gap = next((r.start for r, _ in taken if r.start > end), total)
        raise PlacementError(
            where,
            expected=f"all {total} {unit} placed",
            actual=f"[{end}, {gap}) on no device",
            remedy="add the missing range to a device",
        )


def _one_sub_block(layer: LayerPlacement, arch: ModelArch, index: int) -> None:
    attention, ffn = layer.attention.is_replicated(arch.num_kv_heads), layer.ffn.is_replicated(arch.ffn_dim)
    same = set(layer.attention.devices) == set(layer.ffn.devices)
    if (attention or ffn) and not (attention and ffn and same):
        raise PlacementError(
            f"layer {index}",
            expected=f"attention and FFN replicated together, on the same devices ({arch.name} "
            "computes both from one input)",
            actual="one of them replicated, or on other devices",
            remedy="replicate both on the same devices, or partition both",
        )


def _pinned(placement: Placement, topology: Topology) -> None:
    held = {"embedding": placement.embedding}
    if topology.origin_holds == "embedding_and_head":
        held["head"] = placement.head.devices
    for piece, devices in held.items():
        if devices != (topology.origin,):
            raise PlacementError(
                piece,
                expected=f"on the origin {topology.origin} (origin_holds: {topology.origin_holds})",
                actual=list(devices),
                remedy="place it there, or set origin_holds: none",
            )


def _within_limits(placement: Placement, arch: ModelArch) -> None:
    borders, row = set(arch.ffn_cuts), ROWS if arch.is_quantised else 1
    cuts = {c for _, ranges in placement.head.by_device for r in ranges for c in r if c % row and c != arch.vocab}
    if cuts:
        _refuse("head", f"rows cut at multiples of {row} ({_formats(arch)} weights)", sorted(cuts)[:3])
    if arch.device_weights:
        _alike("embedding", placement.embedding, arch)
    for i, layer in enumerate(placement.layers):
        cuts = {c for _, ranges in layer.ffn.by_device for r in ranges for c in r} - borders if borders else set()
        if cuts:
            expected = f"columns cut at {sorted(borders)} ({_formats(arch)} weights are rounded group by group)"
            _refuse(f"layer {i} ffn", expected, sorted(cuts)[:3])
        if arch.device_weights:
            for what, shares, total in (
                ("attention", layer.attention, arch.num_kv_heads),
                ("ffn", layer.ffn, arch.ffn_dim),
            ):
                if shares.is_replicated(total):
                    _alike(f"layer {i} {what}", shares.devices, arch)
        if arch.whole_layers and set(layer.attention.devices) != set(layer.ffn.devices):
            _refuse(f"layer {i}", f"attention and FFN on the same devices ({arch.name} is cut between layers only)",
                    f"{_named(layer.attention)} and {_named(layer.ffn)}")  # fmt: skip
        owner = arch.kv_layers[i] if arch.kv_layers else i
        if layer.attention != placement.layers[owner].attention:
            _refuse(f"layer {i} attention", f"as in layer {owner}, whose keys and values it reads",
                    f"{_named(layer.attention)} and not {_named(placement.layers[owner].attention)}")  # fmt: skip
    named = [*holders(placement.layers), *placement.head.devices]
    missing = [d for d in dict.fromkeys(named) if d not in placement.embedding]
    if arch.tokens_everywhere and missing:
        _refuse("embedding", f"on every device ({arch.name} embeds tokens for each layer)",
                f"not on {', '.join(missing)}")  # fmt: skip


def _formats(arch: ModelArch) -> str:
    return ", ".join(f.name for f in arch.formats)


def _alike(what: str, devices: Sequence[DeviceId], arch: ModelArch) -> None:
    """Refuse copies of a sub-block that are rounded otherwise: devices would go on with different numbers."""
    found = {d: arch.on(d).format for d in devices}
    if len({f.table if what == "embedding" else f for f in found.values()}) > 1:
        named = ", ".join(f"{d} in {f.name}" for d, f in found.items())
        remedy = "give them the same `weights:` in the topology, or place it on one of them"
        raise PlacementError(what, expected="copies in one format of weights", actual=named, remedy=remedy)


def holders(layers: Sequence[LayerPlacement]) -> list[DeviceId]:
    """The devices that hold a piece of a layer, in order of first mention."""
    return list(dict.fromkeys(d for x in layers for d in (*x.attention.devices, *x.ffn.devices)))


def _named(shares: Shares) -> str:
    return ", ".join(f"{[list(r) for r in ranges]} on {d}" for d, ranges in shares.by_device)


def _refuse(what: str, expected: str, actual: object) -> None:
    raise PlacementError(what, expected=expected, actual=actual, remedy="place it there, or let a planner place it")


def _keys(entry: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != set(keys):
        actual = sorted(map(str, entry)) if isinstance(entry, dict) else kind_of(entry)
        unknown = [k for k in entry if k not in keys] if isinstance(entry, dict) else []
        hint = f"{where}.{unknown[0]} is unknown{did_you_mean(unknown[0], keys)}; " if unknown else ""
        raise PlacementError(
            where,
            expected=f"a mapping with {list(keys)}",
            actual=actual,
            remedy=f"{hint}see clusters/placement-example.yaml",
        )


def _shares(entry: Any, where: str) -> Shares:
    if not isinstance(entry, dict):
        raise PlacementError(
            where,
            expected="a mapping device -> ranges",
            actual=kind_of(entry),
            remedy="write {device: [[start, stop], ...]}",
        )
    shares: dict[str, list[tuple[int, int]]] = {}
    for device, ranges in entry.items():
        found = [_range(r) for r in ranges] if isinstance(ranges, list) else [None]
        shares[str(device)] = [r for r in found if r is not None]
        if None in found:
            raise PlacementError(
                f"{where}.{device}",
                expected="a list of [start, stop] with start <= stop",
                actual=ranges,
                remedy="write half-open ranges of whole numbers",
            )
    return Shares.of(shares)


def _range(entry: Any) -> tuple[int, int] | None:
    match [number(end) for end in entry] if isinstance(entry, list) else []:
        case [int(start), int(stop)] if 0 <= start <= stop:
            return start, stop
    return None
