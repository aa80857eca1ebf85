"""Devices that were left out: looked for as long as the engine lives, and given back what they held."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from splitray.errors import DeviceLost, InputError, ModelError
from splitray.runtime.engine.epoch import Epoch, Next
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.succession import Succession

logger = logging.getLogger(__name__)
_TICK_S = 0.1


class Returns:
    """The devices that an engine misses; one thread looks for them while there are any."""

    def __init__(self, members: Members, succession: Succession, move: Callable[[Epoch], Next]) -> None:
        """Nobody is missing. `move` lets the placement of an epoch take over from the one that runs."""
        self._members, self._succession, self._move = members, succession, move
        self._missing: set[str] = set()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def wait_for(self, devices: Sequence[str]) -> None:
        """Start lost devices anew in the background, and give them back what they held."""
        self._missing.update(devices)
        if self._thread is None or not self._thread.is_alive():
            whole = self._succession.whole
            self._thread = threading.Thread(target=self._run, args=(whole,), name="splitray-return", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, whole: Epoch) -> None:
        members, succession = self._members, self._succession
        assert members.recovery is not None, "asked for"
        why: Exception | None
        said = ""
        for wait_s in replace(members.recovery.backoff, budget_s=math.inf).waits():  # a board may come back in an hour
            try:
                with succession.starting:
                    for device in sorted(self._missing):
                        if device not in members.endpoints:
                            members.restart(device)
                        members.reach(device)
                        self._missing.discard(device)
                if members.lost is not None:
                    return
                back = self._move(whole)
                while not back.done.wait(_TICK_S):
                    if members.lost is not None:
                        return
                if back.error is None and not self._missing:
                    return
                why = back.error
            except (DeviceLost, InputError) as refused:
                why = refused
            away = ", ".join(d for d in whole.route.devices if d not in succession.now.route.devices)
            if isinstance(why, ModelError) and str(why) != said:
                said = str(why)
                logger.warning("%s: back with what cannot be used: %s", away, said)
            else:
                logger.info("%s: not back yet: %s", away, why)
            if self._closed.wait(wait_s):
                return
