"""A process whose clocks are wrong: `python wrong_clock.py SECONDS FILE ... MODULE` runs a module of the command.

What its clock says is written to FILE.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path


def main() -> None:
    """Before anything else is imported: `from time import monotonic` gets the wrong one too."""
    wrong_by_s, told, module = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[-1]
    for name in ("time", "monotonic", "perf_counter"):
        right = getattr(time, name)
        setattr(time, name, lambda right=right: right() + wrong_by_s)
        in_ns = getattr(time, f"{name}_ns")
        setattr(time, f"{name}_ns", lambda in_ns=in_ns: in_ns() + int(1e9 * wrong_by_s))
    told.write_text(f"{time.time()} {time.monotonic()}")
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
