"""The KV of a running session outside its devices: files by device and range of positions, each with its checksum.

A store is a directory or any URL that fsspec knows. Files are written whole under another name and then renamed, and
none is ever changed: what a manifest names is there, or its checksum says that it is not.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import fsspec
import msgspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from splitray.arch import Range
from splitray.errors import InputError
from splitray.model.kv_cache import KvPiece

StoreError = (OSError, ValueError, ImportError)  # what fsspec's file systems raise


@dataclass(frozen=True, slots=True)
class Saved:
    """One file: the KV that a device held, of the positions [start, stop)."""

    path: str
    sha256: str
    num_bytes: int
    start: int
    stop: int
    pieces: tuple[tuple[int, int, int], ...]
    """Layer and range of groups of each."""


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What one checkpoint added."""

    session: int
    start: int
    ids: list[list[int]]
    files: list[Saved]


class HoldsKv(Protocol):
    """What a checkpoint needs of what a device holds: the KV of a session by layer, groups and position."""

    @property
    def num_layers(self) -> int:
        """Of the whole model."""

    def groups(self, layer: int) -> tuple[Range, ...]:
        """The KV head groups that are held of a layer."""

    def read(self, session: int, piece: KvPiece, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the positions [start, stop); None if there are none."""

    def write(self, session: int, piece: KvPiece, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values from a position on into a session's cache."""


class Store:
    """Where the checkpoints of one session go. Every process of a cluster has to reach the same one."""

    def __init__(self, url: str) -> None:
        """`url`: a directory, or what fsspec knows (s3://, memory://).

        Raises:
            InputError: no file system for such a URL.
        """
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except StoreError as error:
            raise InputError("checkpoint store", expected="a directory or an fsspec URL", actual=f"{url} ({error})",
                             remedy="give a directory that all devices share") from error  # fmt: skip
        self.url = url

    def save(self, holding: HoldsKv, session: int, device: str, start: int, stop: int) -> Saved | None:
        """Write what a device holds of a session; None if it holds no KV.

        Raises:
            OSError: the store is full or gone.
            DeviceLost: the device is behind.
        """
        tensors, held = {}, []
        for layer in range(holding.num_layers):
            for r in holding.groups(layer):
                kv = holding.read(session, KvPiece(layer, r), start, stop)
                if kv is not None:
                    held.append((layer, r.start, r.stop))
                    tensors[_name("k", layer, r)], tensors[_name("v", layer, r)] = kv
        if not held:
            return None
        raw = save(tensors)
        path = f"{self.root}/{device}-{start}-{stop}-{uuid.uuid4().hex[:8]}.safetensors"
        self._write(path, raw)
        return Saved(path, hashlib.sha256(raw).hexdigest(), len(raw), start, stop, tuple(held))

    def read(self, saved: Saved) -> dict[str, Tensor] | None:
        """The tensors of a file, or None if it is gone or damaged."""
        try:
            with self.fs.open(saved.path, "rb") as file:
                raw = file.read()
            if len(raw) != saved.num_bytes or hashlib.sha256(raw).hexdigest() != saved.sha256:
                return None
            return load(raw)
        except (*StoreError, SafetensorError):
            return None

    def restore(self, holding: HoldsKv, session: int, wanted: Iterable[KvPiece], files: Sequence[Saved]) -> int:
        """Put what the files have of the wanted pieces into a session's cache.

        Returns:
            The position below which all of them are there.
        """
        reached = dict.fromkeys(wanted, 0)
        for start, stop in sorted({(f.start, f.stop) for f in files}):
            covered = dict.fromkeys((p for p, at in reached.items() if at == start), 0)
            for saved in (f for f in files if (f.start, f.stop) == (start, stop)):
                for piece, groups in self._restored(holding, session, covered, saved):
                    covered[piece] += groups
            reached |= {p: stop for p, groups in covered.items() if groups == p.groups.count}
        return min(reached.values(), default=0)

    def _restored(
        self, holding: HoldsKv, session: int, wanted: Iterable[KvPiece], saved: Saved
    ) -> Iterator[tuple[KvPiece, int]]:
        """Write what one file has of the wanted pieces; gives how many groups of which."""
        overlaps = [
            (p, held, Range(max(p.groups.start, held.start), min(p.groups.stop, held.stop)))
            for p in wanted for layer, *ends in saved.pieces if layer == p.layer for held in [Range(*ends)]
        ]  # fmt: skip
        overlaps = [(p, held, both) for p, held, both in overlaps if both.start < both.stop]
        tensors = self.read(saved) if overlaps else None
        if tensors is None:
            return
        for piece, held, both in overlaps:
            at = both.start - held.start
            stored = [tensors[_name(kind, piece.layer, held)] for kind in "kv"]
            each = stored[0].shape[1] // held.count  # heads of a group
            k, v = (t[:, at * each : (at + both.count) * each] for t in stored)
            holding.write(session, KvPiece(piece.layer, both), saved.start, k, v)
            yield piece, both.count

    def write_manifest(self, session: int, start: int, files: Sequence[Saved], ids: Sequence[Sequence[int]]) -> None:
        """What one checkpoint adds: its files, and the token ids from position `start` on.

        A file of its own each time, so that a checkpoint costs the same early and late in a run.
        """
        document = {"session": session, "start": start, "ids": [list(i[start:]) for i in ids],
                    "files": [asdict(f) for f in files]}  # fmt: skip
        self._write(f"{self.root}/manifest-{start:09d}.json", json.dumps(document).encode())

    def manifest(self) -> tuple[list[Saved], list[list[int]]]:
        """All files of a session without a gap from position 0, and its token ids, for whoever comes after the engine.

        Parts that a later checkpoint has overtaken are left out.

        Raises:
            InputError: a manifest is damaged.
        """
        files: list[Saved] = []
        ids: list[list[int]] = []
        for path in sorted(self.fs.glob(f"{self.root}/manifest-*.json")):
            with self.fs.open(path, "rb") as file:
                raw = file.read()
            try:
                part = msgspec.json.decode(raw, type=_Manifest)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"checkpoint manifest {path}", expected="one as it was written", actual=error,
                                 remedy="delete it, and those after it") from error  # fmt: skip
            start = files[-1].stop if files else 0
            if part.start == start and part.files and len(part.ids) == len(ids or part.ids):
                files += part.files
                ids = [row[:start] + new for row, new in zip(ids or [[] for _ in part.ids], part.ids, strict=True)]
        return files, ids

    def check(self) -> None:
        """See that something can be written, read and deleted.

        Raises:
            InputError: it cannot.
        """
        path = f"{self.root}/check-{uuid.uuid4().hex[:8]}"
        try:
            self._write(path, b"splitray")
            with self.fs.open(path, "rb") as file:
                found = file.read()
            self.fs.rm(path)
        except StoreError as error:
            raise InputError("checkpoint store", expected="a place to write to",
                             actual=f"{self.url} ({type(error).__name__}: {error})",
                             remedy="make it, or give another one") from error  # fmt: skip
        if found != b"splitray":
            raise InputError("checkpoint store", expected="what was written", actual=f"{self.url}: {found!r}",
                             remedy="give another one")  # fmt: skip

    def forget(self) -> None:
        """Delete the session's files; what cannot be deleted stays."""
        try:
            self.fs.rm(self.root, recursive=True)
        except StoreError:
            return

    def _write(self, path: str, raw: bytes) -> None:
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        half = f"{path}.{uuid.uuid4().hex[:8]}"
        with self.fs.open(half, "wb") as file:
            file.write(raw)
        self.fs.mv(half, path)


def best_period_tokens(cost_s: float, failures_per_s: float, tpot_s: float) -> int:
    """Tokens between checkpoints that lose the least time: sqrt(2 C M) of Young (1974), C the cost, M the mean life."""
    return max(1, round((2 * cost_s / failures_per_s) ** 0.5 / tpot_s))


def _name(kind: str, layer: int, groups: Range) -> str:
    return f"{kind}.{layer}.{groups.start}-{groups.stop}"
