"""One segment of a run: devices generate among themselves until the end, or until another placement may take over."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator

from splitray.errors import DeviceLost
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.run_report import Meter
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.succession import Succession
from splitray.runtime.wire import Kind, header
from splitray.runtime.wire.answers import Counts
from splitray.runtime.wire.tensors import tensor_of


def segment(
    members: Members, succession: Succession, session: Session, attempt: int, meter: Meter, came: Callable[[], None]
) -> Generator[list[int], None, bool]:
    """Yields the new ids of each step, [batch], as they come; closing it ends the run.

    `came` is called once a step, when the session has its ids.

    Returns:
        Whether the run is at its end.

    Raises:
        DeviceLost: the run is where `session` says, and some device is not.
    """
    now = succession.now
    order = session.order(attempt, now.number)
    waiting = {str(d) for d in now.route.devices}
    for member in now.route.devices:
        members.order(member, order)
    replies: dict[str, Counts] = {}
    paused = finished = False

    def pause() -> None:
        members.send(now.route.sampler, header(Kind.CANCEL, epoch=now.number, attempt=attempt))

    try:
        while waiting:
            device, frame = members.next_frame(waiting)
            if frame.kind != Kind.TOKEN:
                replies[device] = members.reply(device, frame)
                waiting.discard(device)
            elif frame.attempt == attempt:
                ids = tensor_of(frame).tolist()
                session.steps.append(ids)
                meter.arrivals.append(time.perf_counter())
                came()
                yield ids
                if not paused and succession.staged is not None:
                    paused = True
                    pause()
        finished = True
    finally:
        if not finished and members.lost is None and sys.exc_info()[0] is GeneratorExit:
            with contextlib.suppress(DeviceLost):  # the next run mends it
                pause()
                members.drain(waiting)
    session.valid = session.positions
    meter.add(replies)
    return not paused or session.ended
