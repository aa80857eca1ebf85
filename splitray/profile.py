"""Measured numbers of a machine with their time, and the topology that they make. Measures nothing itself.

Nothing guessed is called measured: watts come from the catalogue and are marked so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from splitray.catalog import DEVICES
from splitray.results import write_whole
from splitray.topology import FormatSpeed, Topology, parse_topology

CATALOG = "x86-core"
_GROUP = "host"
_WATTS = ("idle_w", "active_w")
# Each value of a device and of a link, and how it was measured.
MEASURED = {
    "memory_bandwidth_bytes_per_s": "weights read while two devices decode in turn: a wide and a narrow llama, solved "
    "for a rate and a fixed cost",
    "shared_bandwidth_bytes_per_s": "the same while another device decodes at the same time",
    "launch_s": "the fixed cost of a sub-block, from the same two runs",
    "formats": "tokens of the same llamas with weights in each format, and a prompt of 256 tokens",
    "compute_flops": "a GEMM of 512 rows, float32",
    "bandwidth_bytes_per_s": "1 MiB frames through the wire code",
    "rtt_s": "frames of 3 KB through the wire code between devices that are awake",
    "exchange_s": "the way of 3 KB to a device that has slept while the sender read weights, less rtt_s / 2 and bytes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSpeed:
    """What one core does; gemv and copy are for the reader, the cost model uses what the engine reaches."""

    gemv_bytes_per_s: float
    gemm_flops_per_s: float
    copy_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """Between two devices: a ping of 3 KB there and back, and the way of 1 MiB."""

    ping_s: float
    mebibyte_s: float

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Byte/s of a frame so large that its fixed cost does not count."""
        return (1 << 20) / max(self.mebibyte_s - self.ping_s / 2, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Equal device processes of one machine.

    `read_bytes_per_s` is of weights, by one device alone, `shared_bytes_per_s` while one other reads too (None for a
    single device); `hop_s` is all that a message of 3 KB between two sub-blocks costs. `cores` and `links` are
    by device and by pair of devices, in order.
    """

    measured_at: str
    machine: Mapping[str, Any]
    memory_bytes: float
    read_bytes_per_s: float
    shared_bytes_per_s: float | None
    launch_s: float
    hop_s: float
    hop_bytes: int
    cores: Sequence[CoreSpeed]
    links: Mapping[tuple[int, int], LinkSpeed]
    formats: Sequence[FormatSpeed] = ()

    def document(self) -> dict[str, Any]:
        """A topology file: `splitray generate` and `splitray plan` take it, and `profile:` says where it is from."""
        ids = Topology.uniform(len(self.cores)).ids
        shared: dict[str, Any] = {}
        speeds = {f.name: {k: v for k, v in asdict(f).items() if k != "name" and v is not None} for f in self.formats}
        if self.shared_bytes_per_s is not None:
            shared = {"memory_group": _GROUP, "shared_bandwidth_bytes_per_s": self.shared_bytes_per_s}
        devices = [
            {
                "id": str(name), "tier": "cloud" if name.startswith("cloud") else "edge", "catalog": CATALOG,
                "memory_bytes": self.memory_bytes, "compute_flops": core.gemm_flops_per_s, "compute_efficiency": 1.0,
                "memory_bandwidth_bytes_per_s": self.read_bytes_per_s, "memory_efficiency": 1.0,
                "launch_s": self.launch_s, **shared, **({"formats": speeds} if speeds else {}),
            }
            for name, core in zip(ids, self.cores, strict=True)
        ]  # fmt: skip
        links = [
            {
                "between": [str(ids[a]), str(ids[b])],
                "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s,
                "rtt_s": link.ping_s,
                "exchange_s": self._exchange_s(link),
            }
            for (a, b), link in self.links.items()
        ]
        used = {*devices[0], *(links[0] if links else ())}
        return {
            "profile": {
                "measured_at": self.measured_at,
                "machine": dict(self.machine),
                "measured": {key: how for key, how in MEASURED.items() if key in used},
                "from_system": {"memory_bytes": "the machine's memory in equal parts"},
                "from_catalog": {key: f"{CATALOG}, {DEVICES[CATALOG][key].mark}, not measured" for key in _WATTS},
                "cores": {str(name): asdict(core) for name, core in zip(ids, self.cores, strict=True)},
                "pings": {f"{ids[a]} {ids[b]}": asdict(link) for (a, b), link in self.links.items()},
                "hop_s": self.hop_s,
            },
            "origin": str(ids[0]),
            "devices": devices,
            "links": links,
        }

    def _exchange_s(self, link: LinkSpeed) -> float:
        """What a hop in the engine costs over a ping: waking up, and the code around it."""
        return max(0.0, self.hop_s - link.ping_s / 2 - self.hop_bytes / link.bandwidth_bytes_per_s)

    def topology(self) -> Topology:
        """The topology that these measurements make: the one written in `document`."""
        return parse_topology(self.document())

    def save(self, path: Path) -> None:
        """Write the topology file.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(path, yaml.safe_dump(self.document(), sort_keys=False, width=120))
