"""`splitray profile`: refuses early, measures, writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from splitray.errors import InputError
from splitray.profile import Profile
from splitray.profiling.calibration import calibrate


def run(*, devices: int = 2, out: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> Profile:
    """Measure this machine as so many devices, and write the profile to `out` if given.

    Raises:
        InputError: `out` cannot be a file, or the number of devices is out of range; nothing is measured then.
        DeviceLost: a device did not come up or died.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError("out", expected="a file in a folder that exists", actual=out,
                         remedy="create the folder, or name a file in it")  # fmt: skip
    profile = calibrate(devices, progress=progress)
    if out is not None:
        profile.save(out)
    return profile
