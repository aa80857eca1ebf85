"""Which device holds which piece: a frozen total map, and its form in YAML. Knows no cost or wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from splitray.arch import ModelArch, Range
from splitray.errors import PlacementError, did_you_mean
from splitray.topology import DeviceId


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
        """Write the placement as YAML to `path`."""
        Path(path).write_text(yaml.safe_dump(self.to_document(), sort_keys=False, default_flow_style=None))

    @staticmethod
    def from_document(document: Any) -> Placement:
        """Build from a parsed document; every wrong key or shape is refused with its path."""
        _keys(document, ("layers", "embedding", "head"), "placement")
        layers = document["layers"]
        if not isinstance(layers, list):
            raise PlacementError(
                "layers", expected="a list", actual=type(layers).__name__, remedy="give one entry a layer"
            )
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
        if not isinstance(embedding, list) or not embedding:
            raise PlacementError(
                "embedding",
                expected="a list of devices",
                actual=embedding,
                remedy="write `embedding: [device]`",
            )
        return Placement(tuple(parsed), tuple(DeviceId(str(d)) for d in embedding), _shares(document["head"], "head"))

    @staticmethod
    def load(path: str | Path) -> Placement:
        """Read a placement file (YAML or JSON)."""
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlacementError(
                f"placement {path}",
                expected="a readable YAML file",
                actual=error,
                remedy="give the path of a placement file",
            ) from error
        return Placement.from_document(document)


def weight_bytes(placement: Placement, arch: ModelArch) -> dict[DeviceId, int]:
    """Weight bytes a device holds, norms and biases left out; a tied table is shared where rows coincide."""
    params = dict.fromkeys(placement.devices, 0)
    for layer, count in placement.runs():
        for device, ranges in layer.attention.by_device:
            params[device] += count * sum(r.count for r in ranges) * arch.group_params
        for device, ranges in layer.ffn.by_device:
            params[device] += count * sum(r.count for r in ranges) * arch.ffn_unit_params
    for device in placement.embedding:
        params[device] += arch.vocab * arch.vocab_row_params + arch.embedding_params
    for device, _ in placement.head.by_device:
        if not (arch.tied_embeddings and device in placement.embedding):
            params[device] += placement.head.count(device) * arch.vocab_row_params
    return {d: arch.weight_bytes(n) for d, n in params.items()}


def _keys(entry: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != set(keys):
        actual = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
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
            actual=type(entry).__name__,
            remedy="write {device: [[start, stop], ...]}",
        )
    for device, ranges in entry.items():
        whole = isinstance(ranges, list) and all(
            isinstance(r, list) and len(r) == 2 and all(type(i) is int for i in r) and 0 <= r[0] <= r[1] for r in ranges
        )
        if not whole:
            raise PlacementError(
                f"{where}.{device}",
                expected="a list of [start, stop] with start <= stop",
                actual=ranges,
                remedy="write half-open ranges of whole numbers",
            )
    return Shares.of({str(d): [(r[0], r[1]) for r in ranges] for d, ranges in entry.items()})
