"""`splitray profile`: measures this machine for the cost model, and writes a topology."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from splitray.commands import options
from splitray.errors import InputError
from splitray.report.progress import progress
from splitray.report.stdout import print_json, stdout_kept
from splitray.results import try_file

if TYPE_CHECKING:
    from splitray.profile import Profile


def profile(
    out: Annotated[Path | None, typer.Option(help="Write it as a topology file (YAML).", metavar="FILE")] = None,
    devices: Annotated[int, typer.Option(help="So many device processes on this machine.", metavar="N")] = 2,
    as_json: options.Json = False,
) -> None:
    """Measure this machine for the cost model; the result is a topology that plan and generate take."""
    from splitray.report.profile import profile_table

    with stdout_kept(as_json), progress(Console(stderr=True), "Starting the devices") as spin:
        document = measure(devices=devices, out=out, progress=spin).document()
    if as_json:
        print_json(document)
        return
    Console(highlight=False).print(profile_table(document))


def measure(*, devices: int = 2, out: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> Profile:
    """Measure this machine as so many devices, and write the profile to `out` if given.

    Raises:
        InputError: `out` cannot be a file, or the number of devices is out of range; nothing is measured then.
        DeviceLost: a device did not come up or died.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError("out", expected="a file in a folder that exists", actual=out,
                         remedy="create the folder, or name a file in it")  # fmt: skip
    if out is not None:
        try_file(out, "out")
    from splitray.profiling.calibration import FORMATS_PROFILED, calibrate

    profile = calibrate(devices, formats=FORMATS_PROFILED, progress=progress)
    if out is not None:
        profile.save(out)
    return profile
