"""What the machine is, for the record beside a measurement."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """This machine for a report: cores, load, processor, and versions of Python and torch."""
    import torch

    return {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "processor": _processor(),
            "python": platform.python_version(), "torch": str(torch.__version__)}  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def cache_bytes() -> int:
    """The largest cache of the first core (32 MiB where the system does not tell)."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            largest = max(largest, int(file.read_text().strip().removesuffix("K")) << 10)
    return largest or 32 << 20
