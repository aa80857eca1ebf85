"""Lines that share a device: how fast it is for each while the others are there.

A shared device serves whoever is there in turns too short to see (processor sharing). A line that is there while n others
are gets 1 / (1 + n) of it; n is their mean number over the slot before, which is what a monitor would tell. Averages in
place of the others' exact times are what mean value analysis of closed queueing networks uses (Bard 1979, Schweitzer
1979), and for cloud_only they give the textbook's 1 / (1 - load), see `tests/unit/test_crowd.py`.

Shapes: N lines, D devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def others_there(there: Floats, pool: Ints) -> Floats:
    """The mean number of other lines of the same pool at each device, [N, D].

    Args:
        there: share of the time that each line was at each device, [N, D].
        pool: lines of one number share their devices, [N].
    """
    total = np.zeros((int(pool.max(initial=0)) + 1, there.shape[1]))
    np.add.at(total, pool, there)
    others: Floats = np.maximum(0.0, total[pool] - there)
    return others


def delay_to_others(there: Floats, requests: Floats, pool: Ints) -> Floats:
    """What each line's being at a shared device costs all others in the end, in slots that requests wait, [N, D].

    A second there takes a share 1 / (1 + n) of a second from each other line that is there, and everyone in that line
    waits for it. Who comes later in the same busy period waits as well, 1 + n times as long in all in a queue that is
    steady: for M/G/1 with processor sharing the sum is what one more request adds to the waiting of the others,
    load / (1 - load)^2 services. So the charge is the number of requests whose line is there.

    Args:
        there: share of the slot that each line was at each device, [N, D].
        requests: in each line, [N].
        pool: lines of one number share their devices, [N].
    """
    waiting = np.maximum(1.0, requests)[:, None] * there
    return there * others_there(waiting, pool)
