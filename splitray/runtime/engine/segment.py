"""One segment of a run: devices generate among themselves until the end, or until another placement may take over."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from splitray.errors import DeviceLost
from splitray.runtime.engine.protection import Protection
from splitray.runtime.engine.run_report import Meter
from splitray.runtime.engine.session import Session
from splitray.runtime.wire import Kind
from splitray.runtime.wire.tensors import tensor_of

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine


def segment(
    engine: Engine, session: Session, meter: Meter, protection: Protection | None
) -> Generator[list[int], None, bool]:
    """Yields new ids as they come; closing it ends the run.

    Returns:
        Whether the run is at its end.

    Raises:
        DeviceLost: the run is where `session` says, and some device is not.
    """
    members, attempt = engine.members, engine.attempt()
    order = session.order(attempt, engine.epoch)
    waiting = {str(d) for d in engine.route.devices}
    for member in engine.route.devices:
        members.order(member, "decode", order)
    replies: dict[str, dict[str, Any]] = {}
    paused = finished = False

    def pause() -> None:
        members.send(engine.route.sampler, (int(Kind.CANCEL), 0, engine.epoch, 0, 0, attempt, "", ()))

    try:
        while waiting:
            device, frame = members.next_frame(waiting)
            if frame.kind != Kind.TOKEN:
                replies[device] = members.reply(device, frame)
                waiting.discard(device)
            elif frame.attempt == attempt:
                ids = tensor_of(frame).tolist()
                session.steps.append(ids)
                engine.tokens += 1
                meter.arrivals.append(time.perf_counter())
                if protection is not None:
                    protection.token()
                yield ids
                if not paused and engine.succession.staged is not None:
                    paused = True
                    pause()
        finished = True
    finally:
        if not finished and engine.lost is None and sys.exc_info()[0] is GeneratorExit:
            with contextlib.suppress(DeviceLost):  # the next run mends it
                pause()
                members.drain(waiting)
    session.valid = session.positions
    meter.add(replies)
    return not paused or session.ended
