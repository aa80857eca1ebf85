"""Where weights come from: safetensors checkpoints, one file or indexed, read slice by slice and counted.

Knows names, shapes and bytes; not which device wants what, nor what the tensors mean.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitray.arch import Range
from splitray.errors import ModelError

_SAMPLE_BYTES = 64  # of every tensor, for the fingerprint: a changed fine-tune shows, a big file is not read
_RENAMED = (  # names of the model -> names in checkpoints, where transformers 5 converts on load
    ("lm_head.", "embed_out."),
    (".mlp.gate.", ".block_sparse_moe.gate."),
)
_EXPERTS = (  # (container, gate, up, down) of one expert in checkpoints that do not fuse them
    ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ("block_sparse_moe.experts", "w1", "w3", "w2"),
)


class Checkpoint:
    """A model folder opened for lazy reading; `bytes_read` counts what was really taken from it."""

    def __init__(self, folder: str | Path) -> None:
        """Open the folder's safetensors headers.

        Raises:
            ModelError: no config or weights there, or a file is missing, truncated or no safetensors file.
        """
        self.folder = Path(folder)
        self.bytes_read = 0
        if not (self.folder / "config.json").is_file():
            remedy = "give the path of a saved transformers model"
            raise ModelError(
                f"model {folder}", expected="a folder with config.json", actual="none there", remedy=remedy
            )
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._shard_names():
            path = self.folder / name
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _damaged(f"weights {name}", "a complete safetensors file", error) from error
            self._files[name] = opened
            for key in opened.keys():  # noqa: SIM118 - safe_open is no dict
                self._file_of[key] = name

    def _shard_names(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise _damaged(f"weights {index.name}", "a JSON weight_map", error) from error
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        found = sorted(p.name for p in self.folder.glob("*.bin")) or "none"
        expected, remedy = "model.safetensors or its index", "save the model with save_pretrained (safetensors)"
        raise ModelError(f"weights in {self.folder}", expected=expected, actual=found, remedy=remedy)

    def key(self, name: str) -> str | None:
        """The checkpoint's key for a parameter of the model, or None."""
        bare = name.split(".", 1)[1] if "." in name else name
        names = [name, bare]
        for ours, theirs in _RENAMED:
            names += [n.replace(ours, theirs) for n in (name, bare) if ours in n]
        return next((n for n in names if n in self._file_of), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of a parameter."""
        return tuple(self._slice(self._required(name)).get_shape())

    def read(self, name: str, *, axis: int = 0, ranges: Sequence[Range] | None = None) -> Tensor:
        """Read a tensor, or ranges of it along one axis (0 or 1), joined in order.

        Returns:
            A tensor that owns its memory, in the checkpoint's dtype.
        """
        view = self._slice(self._required(name))
        if ranges is None:
            parts = [view[:]]
        elif axis == 0:
            parts = [view[r.start : r.stop] for r in ranges]
        else:
            parts = [view[:, r.start : r.stop] for r in ranges]
        self.bytes_read += sum(p.numel() * p.element_size() for p in parts)
        if len(parts) > 1:
            return torch.cat(parts, dim=axis)
        # a slice may be a view of the mapped file, strided along axis 1: own it, or every token pays for that
        return parts[0].clone(memory_format=torch.contiguous_format)

    def read_experts(self, module: str, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fused (gate_up [E, 2f, d], down [E, d, f]) of some experts, from a fused or an unfused checkpoint."""
        if self.key(f"{module}.gate_up_proj") is not None:
            ranges = [Range(e, e + 1) for e in experts]
            return (
                self.read(f"{module}.gate_up_proj", ranges=ranges),
                self.read(f"{module}.down_proj", ranges=ranges),
            )
        layer = module.removesuffix("mlp.experts")
        for container, gate, up, down in _EXPERTS:
            if self.key(f"{layer}{container}.0.{gate}.weight") is None:
                continue
            prefix = [f"{layer}{container}.{e}." for e in experts]
            gate_up = [torch.cat([self.read(f"{p}{gate}.weight"), self.read(f"{p}{up}.weight")]) for p in prefix]
            return torch.stack(gate_up), torch.stack([self.read(f"{p}{down}.weight") for p in prefix])
        raise self._missing(f"{module}.gate_up_proj")

    def fingerprint(self) -> str:
        """Hash of config, names, shapes, dtypes and a sample of every tensor: equal on all copies of a model."""
        digest = hashlib.sha256()
        for key in sorted(self._file_of):
            view = self._slice(key)
            digest.update(f"{key} {view.get_dtype()} {view.get_shape()}".encode())
        for name in sorted(self._files):
            with open(self.folder / name, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                for key in sorted(k for k in header if k != "__metadata__"):
                    start, stop = header[key]["data_offsets"]
                    file.seek(8 + size + start + max(0, (stop - start) // 2 - _SAMPLE_BYTES // 2))
                    digest.update(key.encode() + file.read(min(_SAMPLE_BYTES, stop - start)))
        return digest.hexdigest()[:16]

    def _slice(self, key: str) -> Any:
        return self._files[self._file_of[key]].get_slice(key)

    def _required(self, name: str) -> str:
        key = self.key(name)
        if key is None:
            raise self._missing(name)
        return key

    def _missing(self, name: str) -> ModelError:
        return _damaged(f"weights in {self.folder}", f"a tensor {name}", f"{len(self._file_of)} others")


def _damaged(what: str, expected: str, actual: object) -> ModelError:
    return ModelError(what, expected=expected, actual=actual, remedy="copy the checkpoint again")
