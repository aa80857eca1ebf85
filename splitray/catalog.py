"""Devices, links and decoders by name, every number with its source; `splitray profile` replaces them by measurements.

Marks: STATED read at the source, 2ND told by a third party, DERIVED computed from stated numbers, RECALLED from general
knowledge (verify before relying on it), FITTED to public measurements, INFERRED our choice. None was measured by us.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

from splitray.arch import ModelArch
from splitray.errors import ModelError, did_you_mean

Mark = Literal["STATED", "2ND", "DERIVED", "RECALLED", "FITTED", "INFERRED"]


@dataclass(frozen=True, slots=True)
class Value:
    """One number in SI units, how far to trust it, and where it comes from."""

    value: float
    mark: Mark
    source: str


_ORIN = "decode rates that public reports give for Orin NX at Q4 spread 2 to 4 times; fitted inside their band"
_NVIDIA = "recalled from NVIDIA's specification table"
_GUESS = "docs/equations.md E6.1: efficiency 0.3-0.6 of compute, 0.6-0.8 of memory until profiled"
_GEERLING = "Ollama Q4_K_M rates and wall power of geerlingguy/ai-benchmarks @ bdf9441"
_DLLAMA = "Llama 2 7B Q40 on 1 to 8 nodes, README of b4rtaz/distributed-llama @ dddeb12"
_LLAMA_RN = "llama.rn, a 1.7B model at Q4_0 on Snapdragon 8 Gen 2: 110-460 prefill, 16.6-20.9 decode tokens/s"
_LPDDR4 = "LPDDR4-3200 on 32 bits: 3,200 MT/s x 4 B"

DEVICES: dict[str, dict[str, Value]] = {
    "jetson-orin-nx-16gb": {
        "memory_bytes": Value(16e9, "2ND", "16 GB LPDDR5, user gist of the specification"),
        "compute_flops": Value(15e12, "DERIVED", "32 tensor cores x 512 FLOP/clock x 0.918 GHz, dense fp16"),
        "memory_bandwidth_bytes_per_s": Value(102.4e9, "RECALLED", _NVIDIA),
        "idle_w": Value(5.0, "RECALLED", "idle power of the module"),
        "active_w": Value(25.0, "STATED", "10-25 W modes, NVIDIA datasheet"),
        "compute_efficiency": Value(0.3, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.4, "FITTED", _ORIN),
        "launch_s": Value(2e-4, "FITTED", _ORIN),
    },
    "jetson-orin-nx-8gb": {
        "memory_bytes": Value(8e9, "STATED", "8 GB LPDDR5, Yahboom README"),
        "compute_flops": Value(10.5e12, "DERIVED", "70 of the 16 GB module's 100 TOPS (STATED) times its 15 TFLOPS"),
        "memory_bandwidth_bytes_per_s": Value(102.4e9, "RECALLED", _NVIDIA),
        "idle_w": Value(5.0, "RECALLED", "idle power of the module"),
        "active_w": Value(20.0, "RECALLED", "10-20 W modes"),
        "compute_efficiency": Value(0.3, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.22, "FITTED", _ORIN),
        "launch_s": Value(2e-4, "FITTED", _ORIN),
    },
    "galaxy-s23": {
        "memory_bytes": Value(8e9, "2ND", "8 GB LPDDR5X, helpmax and others"),
        "compute_flops": Value(2.0e12, "RECALLED", "Adreno 740 at 719 MHz: 2.0-3.5 TFLOPS fp32, sources disagree"),
        "memory_bandwidth_bytes_per_s": Value(67.2e9, "DERIVED", "8,400 MT/s x 8 B"),
        "idle_w": Value(0.8, "RECALLED", "screen off 0.5-1 W"),
        "active_w": Value(5.0, "RECALLED", "sustained 4-6 W"),
        "radio_w": Value(1.0, "RECALLED", "WiFi of Huang et al., MobiSys 2012, at some Mbit/s"),
        "compute_efficiency": Value(0.3, "FITTED", _LLAMA_RN),
        "memory_efficiency": Value(0.27, "FITTED", _LLAMA_RN),
        "launch_s": Value(5e-5, "INFERRED", "a kernel launch"),
    },
    "raspberry-pi-4": {
        "memory_bytes": Value(8e9, "RECALLED", "8 GB model"),
        "compute_flops": Value(48e9, "DERIVED", "4 x A72 x 1.5 GHz x 1 pipe x 4 lanes x 2, fp32"),
        "memory_bandwidth_bytes_per_s": Value(12.8e9, "DERIVED", _LPDDR4),
        "idle_w": Value(2.7, "RECALLED", "idle at the wall"),
        "active_w": Value(6.4, "RECALLED", "all cores busy, at the wall"),
        "compute_efficiency": Value(0.3, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.25, "FITTED", f"compute times: {_DLLAMA}"),
        "launch_s": Value(2.3e-3, "FITTED", f"compute that does not divide: {_DLLAMA}"),
    },
    "raspberry-pi-5": {
        "memory_bytes": Value(8e9, "2ND", "8 GB LPDDR4X-4267 on 32 bits, svethardware.cz from Phoronix"),
        "compute_flops": Value(153.6e9, "DERIVED", "4 x A76 x 2.4 GHz x 2 pipes x 4 lanes x 2, fp32"),
        "memory_bandwidth_bytes_per_s": Value(17.07e9, "DERIVED", "4,267 MT/s x 4 B"),
        "idle_w": Value(3.0, "2ND", "public Pi 5 test repository"),
        "active_w": Value(12.0, "STATED", f"10.9-13.9 W while generating: {_GEERLING}"),
        "compute_efficiency": Value(0.3, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.6, "FITTED", _GEERLING),
        "launch_s": Value(5e-5, "INFERRED", "waking four threads"),
    },
    "a100-80gb": {
        "memory_bytes": Value(80e9, "2ND", "80 GB HBM2e, thundercompute.com of the datasheet"),
        "compute_flops": Value(312e12, "2ND", "bf16 dense, glennklockwood.com of the datasheet"),
        "memory_bandwidth_bytes_per_s": Value(2039e9, "2ND", "thundercompute.com of the datasheet"),
        "idle_w": Value(55.0, "RECALLED", "idle power"),
        "active_w": Value(400.0, "2ND", "thermal design power, SXM"),
        "compute_efficiency": Value(0.5, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.7, "INFERRED", _GUESS),
        "launch_s": Value(1e-5, "INFERRED", "a few kernel launches"),
    },
    "h100-80gb": {
        "memory_bytes": Value(80e9, "2ND", "80 GB HBM3, SXM, from the datasheet"),
        "compute_flops": Value(990e12, "2ND", "bf16 dense, SXM"),
        "memory_bandwidth_bytes_per_s": Value(3350e9, "2ND", "HBM3 of the SXM module, from the datasheet"),
        "idle_w": Value(70.0, "RECALLED", "idle power"),
        "active_w": Value(700.0, "RECALLED", "thermal design power, SXM"),
        "compute_efficiency": Value(0.5, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.7, "INFERRED", _GUESS),
        "launch_s": Value(1e-5, "INFERRED", "a few kernel launches"),
    },
    "x86-core": {
        "memory_bytes": Value(8e9, "INFERRED", "a share of a small server"),
        "compute_flops": Value(120e9, "INFERRED", "one core with AVX-512 or AVX2 at about 3 GHz, fp32"),
        "memory_bandwidth_bytes_per_s": Value(20e9, "INFERRED", "what one core reads; run `splitray profile`"),
        "idle_w": Value(2.0, "INFERRED", "a core's share of a server"),
        "active_w": Value(10.0, "INFERRED", "a core's share of a server"),
        "compute_efficiency": Value(0.6, "INFERRED", _GUESS),
        "memory_efficiency": Value(0.8, "INFERRED", _GUESS),
        "launch_s": Value(5e-5, "INFERRED", "a sub-block of the engine in Python"),
    },
}

_MEASURED = "docs/equations.md E6.3: a model of 1.04 billion weights on single x86 cores, with and without VNNI"
_RATIO = "docs/equations.md E6.3: 0.8 of the rate of int4, as on x86 cores with and without VNNI"
_ARM = "docs/equations.md E6.3: the 4-bit decode rate to which memory_efficiency is fitted, in weights"


def _fitted(weights_per_s: float) -> dict[str, Value]:
    """Rates of a device whose decode rate at 4 bits is public."""
    return {
        "int4": Value(weights_per_s, "FITTED", _ARM),
        "int4/128": Value(weights_per_s, "DERIVED", f"at least that of int4; {_ARM}"),
        "int8": Value(0.8 * weights_per_s, "DERIVED", _RATIO),
    }


FORMAT_RATES: dict[str, dict[str, Value]] = {
    "galaxy-s23": _fitted(67.2e9 * 0.27 * 8 / 4.5),
    "raspberry-pi-4": _fitted(12.8e9 * 0.25 * 8 / 4.5),
    "raspberry-pi-5": _fitted(17.07e9 * 0.6 * 8 / 4.85),
    "x86-core": {
        "int4": Value(10e9, "INFERRED", _MEASURED),
        "int4/128": Value(12e9, "INFERRED", _MEASURED),
        "int8": Value(8e9, "INFERRED", _MEASURED),
        "bfloat16": Value(4.5e9, "INFERRED", _MEASURED),
    },
}
"""Weights that a processor multiplies by in a second for one row, by format; run `splitray profile` for your own.

A GPU has none: that these kernels would run on it is not known, and bytes over bandwidth stays the rule there.
"""

_OPENSIGNAL = "Opensignal, measured by users"
_MECPERF = "MECPerf measurement set, median without cross traffic"
_ETHERNET = f"per message, transfer times: {_DLLAMA}"

LINKS: dict[str, dict[str, Value]] = {
    "wifi5": {
        "uplink_bytes_per_s": Value(200e6 / 8, "RECALLED", "realistic 100-400 Mbit/s"),
        "downlink_bytes_per_s": Value(200e6 / 8, "RECALLED", "realistic 100-400 Mbit/s"),
        "rtt_s": Value(5e-3, "RECALLED", "2-10 ms on an idle LAN"),
    },
    "wifi6": {
        "uplink_bytes_per_s": Value(800e6 / 8, "RECALLED", "realistic 600-1,200 Mbit/s"),
        "downlink_bytes_per_s": Value(800e6 / 8, "RECALLED", "realistic 600-1,200 Mbit/s"),
        "rtt_s": Value(4e-3, "2ND", "2-10 ms, itfix.org.uk"),
    },
    "lte": {
        "uplink_bytes_per_s": Value(7.9e6 / 8, "2ND", _OPENSIGNAL),
        "downlink_bytes_per_s": Value(30e6 / 8, "RECALLED", "10-50 Mbit/s"),
        "rtt_s": Value(74e-3, "STATED", f"LTE to a cloud: {_MECPERF}"),
    },
    "5g": {
        "uplink_bytes_per_s": Value(15.6e6 / 8, "2ND", _OPENSIGNAL),
        "downlink_bytes_per_s": Value(112.9e6 / 8, "2ND", _OPENSIGNAL),
        "rtt_s": Value(30e-3, "RECALLED", "10-50 ms"),
    },
    "gigabit-lan": {
        "uplink_bytes_per_s": Value(940e6 / 8, "RECALLED", "gigabit Ethernet less its headers"),
        "downlink_bytes_per_s": Value(940e6 / 8, "RECALLED", "gigabit Ethernet less its headers"),
        "rtt_s": Value(4e-4, "RECALLED", "0.2-1 ms"),
        "exchange_s": Value(6e-4, "FITTED", f"slow boards; {_ETHERNET}"),
    },
    "wan": {
        "uplink_bytes_per_s": Value(100e6 / 8, "INFERRED", "a fair site-to-cloud line"),
        "downlink_bytes_per_s": Value(100e6 / 8, "INFERRED", "a fair site-to-cloud line"),
        "rtt_s": Value(39e-3, "STATED", f"WiFi to a cloud: {_MECPERF}"),
    },
}

# Counts of the published config.json of each model.
_DECODERS: dict[str, dict[str, Any]] = {
    "gpt2-xl": dict(
        num_layers=48, num_heads=25, num_kv_heads=25, head_dim=64, hidden_dim=1600, ffn_dim=6400, vocab=50257,
        context_tokens=1024, ffn_matrices=2, tied_embeddings=True,
    ),
    "llama-7b": dict(
        num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, hidden_dim=4096, ffn_dim=11008, vocab=32000,
        context_tokens=2048,
    ),
    "llama-13b": dict(
        num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128, hidden_dim=5120, ffn_dim=13824, vocab=32000,
        context_tokens=2048,
    ),
    "llama-3-8b": dict(
        num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, hidden_dim=4096, ffn_dim=14336, vocab=128256,
        context_tokens=8192,
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_DECODERS)


def architecture(name: str, *, dtype: str = "bfloat16") -> ModelArch:
    """The counts of a well-known decoder, for planning without its weights.

    Raises:
        ModelError: the name is not in `ARCHITECTURES`.
    """
    if name not in _DECODERS:
        raise ModelError(
            "model",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            actual=name,
            remedy=f"use one of the names{did_you_mean(name, ARCHITECTURES)}, or a model's folder",
        )
    return ModelArch(name=name, dtype=cast(Any, dtype), **_DECODERS[name])


def device_values(name: str) -> dict[str, float]:
    """The numbers of a catalogue device by the keys of a topology file."""
    return {key: entry.value for key, entry in DEVICES[name].items()}


def format_values(name: str) -> dict[str, dict[str, float]]:
    """Speeds of a catalogue device by format, by the keys of a topology file."""
    return {weights: {"weights_per_s": rate.value} for weights, rate in FORMAT_RATES.get(name, {}).items()}


def link_values(name: str) -> dict[str, float]:
    """The numbers of a catalogue link by the keys of a topology file."""
    return {key: entry.value for key, entry in LINKS[name].items()}
