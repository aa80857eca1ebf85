"""How a checkpoint says that its weights are quantised: the `quantization_config` of its config.json.

Knows no arrays. Which module is quantised shows in the tensors that are stored of it: what a config lists as
`modules_to_not_convert` or `ignore` has a plain weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitray.errors import ModelError

PLAIN = "use the model's version that is not quantised (bfloat16 or float32)"
KNOWN = ("awq", "gptq", "compressed-tensors", "fp8", "mxfp4")
_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class StoredMethod:
    """What the whole checkpoint shares.

    Args:
        name: one of `KNOWN`.
        version: of AWQ: `gemm` or `gemv`; of GPTQ: `gptq`, which stores zeros less one, or `gptq_v2`; of
            compressed-tensors its format.
        group: inputs that share a scale; -1: all of a row; 0: as the stored shapes say.
        block: outputs and inputs that share a scale of fp8.
    """

    name: str
    version: str = ""
    group: int = 0
    block: tuple[int, int] | None = None


def method_of(values: Mapping[str, Any]) -> StoredMethod | None:
    """What a config.json, or its text part, says of quantised weights; None: they are plain.

    Raises:
        ModelError: a method or variant that is not read here.
    """
    for part in (values, *(v for v in values.values() if isinstance(v, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return stored_method(found if isinstance(found, dict) else {"quant_method": found})
    return None


def stored_method(given: Mapping[str, Any]) -> StoredMethod:
    """The method of a `quantization_config` (or a `compression_config`).

    Raises:
        ModelError: there is no name, or a method or variant that is not read here.
    """
    name = given.get("quant_method") or ("compressed-tensors" if {"config_groups", "format"} & given.keys() else None)
    if name not in KNOWN:
        raise _refused("quant_method", " or ".join(KNOWN), name or "no name")
    return {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _fp8, "mxfp4": _mxfp4}[name](given)


def _awq(given: Mapping[str, Any]) -> StoredMethod:
    version = str(given.get("version") or given.get("checkpoint_format") or "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise _refused("version", "gemm or gemv of AWQ", version)
    bits = given.get("bits", given.get("w_bit", 4))
    if bits != 4:
        raise _refused("bits", "4 bits of AWQ", bits)
    return StoredMethod("awq", version, _group(given.get("group_size", given.get("q_group_size", 0))))


def _gptq(given: Mapping[str, Any]) -> StoredMethod:
    version = str(given.get("checkpoint_format") or "gptq").lower()
    if given.get("is_marlin_format"):
        version = "marlin"
    if version not in ("gptq", "gptq_v2"):
        raise _refused("checkpoint_format", "gptq or gptq_v2", version)
    bits = given.get("bits", 4)
    if bits not in _BITS:
        raise _refused("bits", "4 or 8 bits of GPTQ", bits)
    return StoredMethod("gptq", version, _group(given.get("group_size", 0)))


def _compressed(given: Mapping[str, Any]) -> StoredMethod:
    groups = given.get("config_groups") or {}
    schemes = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    version = str(given.get("format") or "dense")
    formats = [str(s.get("format") or version) for s in schemes] if version == "mixed-precision" else [version]
    for form in formats:
        if form not in _COMPRESSED:
            raise _refused("format", f"one of {', '.join(_COMPRESSED)}", form)
    for key in ("transform_config", "sparsity_config"):
        more = given.get(key)
        if more and not (isinstance(more, Mapping) and more.get("format") == "dense"):
            raise _refused(key, "quantised weights and no more", more)
    for scheme in schemes:
        weights = scheme.get("weights") or {}
        bits = weights.get("num_bits", 8)
        if bits not in _BITS or (weights.get("type") == "float" and bits != 8):
            raise _refused("config_groups", "weights of 4 or 8 bits, floats of 8", weights)
    return StoredMethod("compressed-tensors", version)


def _fp8(given: Mapping[str, Any]) -> StoredMethod:
    if given.get("expert_dtype", "fp8") != "fp8":
        raise _refused("expert_dtype", "fp8", given["expert_dtype"])
    if given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refused("fmt", "e4m3", given["fmt"])
    block = given.get("weight_block_size")
    if block is None:
        return StoredMethod("fp8")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise _refused("weight_block_size", "two positive whole numbers", block)
    return StoredMethod("fp8", block=(block[0], block[1]))


def _mxfp4(_: Mapping[str, Any]) -> StoredMethod:
    return StoredMethod("mxfp4", group=32)


def _group(size: object) -> int:
    if type(size) is not int or size < -1:
        raise _refused("group_size", "-1 or a positive whole number", size)
    return size


def _refused(key: str, expected: str, actual: object) -> ModelError:
    return ModelError(f"quantization_config: {key}", expected=expected, actual=actual, remedy=PLAIN)
