"""Lines that share a device: how fast it is for each while the others are there.

A shared device serves whoever is there in turns too short to see (processor sharing): a line that is there while n
others are gets 1 / (1 + n) of it. n is taken as their mean number over the slot, as mean value analysis of closed
queueing networks does (Bard 1979, Schweitzer 1979), and solved for, as who is slowed down is there longer. So no slot
gives out more than there is of a device. By the book (M/G/1) a request stays 1 / (1 - load) times as long as alone;
here it is up to 1.4 times that, as means over a slot know no gaps (`pytest -s tests/unit/test_crowd.py`).

Shapes: N lines, D devices.
"""

from dataclasses import replace

import numpy as np

from splitray.arrays import Bools, Floats, Ints
from splitray.cost import Load, Rates
from splitray.sim.simulator import Simulator

_MOST_ROUNDS, _CLOSE = 60, 1e-3


def slowed(rates: Rates, share: Floats) -> Rates:
    """Rates of devices of which each line has a share only, [N, D]."""
    return replace(
        rates,
        flops_per_s=rates.flops_per_s * share,
        bytes_per_s=rates.bytes_per_s * share,
        launch_s=rates.launch_s / share,
    )


class Crowd:
    """Who is at which shared device in a slot, as far as it is decided.

    The device knows its sessions, so whoever decides sees what those before it in the same slot have chosen.
    """

    def __init__(self, pool: Ints, shared: Bools) -> None:
        """Nobody is anywhere.

        Lines of one number in `pool` [N] share the devices that are `shared`, [D].
        """
        self.pool, self.shared = pool, shared
        self._work, self._think = np.zeros((2, len(pool), len(shared)))
        self._window = np.zeros((len(pool), 1))
        self.members = [np.flatnonzero(pool == p) for p in range(int(pool.max()) + 1)]
        self.share: Floats = np.ones((len(pool), len(shared)))

    def look(self, simulator: Simulator, load: Load, rates: Rates, rows: Ints | None = None) -> None:
        """Take in what lines are about to do, all by default.

        `rates` are of devices that each has to itself; `rows` are lines whose placement is new.
        """
        looked = np.arange(len(self.pool)) if rows is None else rows
        wanted, slot_s = simulator.wanted(looked, load, rates), simulator.slot_s
        self._work[looked] = wanted.busy_s / slot_s * self.shared
        self._think[looked] = np.maximum(0.0, wanted.all_s[:, None] / slot_s - self._work[looked])
        self._window[looked, 0] = wanted.window_s / slot_s
        if rows is not None and len(rows) == 1:
            looked = self.members[self.pool[rows[0]]]
        else:
            looked = np.flatnonzero(np.isin(self.pool, self.pool[looked]))
        pool = self.pool[looked]
        there = longer(self._work[looked], self._think[looked], self._window[looked], pool)
        self.share[looked] = 1 / (1 + others_there(there, pool))


def longer(work: Floats, think: Floats, window: Floats, pool: Ints) -> Floats:
    """How long lines are at devices that others are at too, as a share of a slot, [N, D].

    `work` is what each does there in a slot that it has the device to itself, [N, D], `think` its time elsewhere
    meanwhile, [N, D], and `window` the time that it has something to do, [N, 1]; no line is there for longer. Lines of
    one number in `pool` [N] share their devices.
    """
    there = work
    for _ in range(_MOST_ROUNDS):
        needed = work * (1 + others_there(there, pool))
        fits = np.minimum(1.0, window / np.maximum(needed + think, 1e-12))
        before, there = there, needed * fits
        if np.abs(there - before).max(initial=0.0) < _CLOSE:
            break
    return there


def others_there(there: Floats, pool: Ints) -> Floats:
    """The mean number of other lines of the same pool at each device, [N, D].

    `there` is the share of the time that each line was at each device, [N, D].
    """
    total = np.zeros((int(pool.max(initial=0)) + 1, there.shape[1]))
    np.add.at(total, pool, there)
    return np.maximum(0.0, total[pool] - there)


def delay_to_others(there: Floats, requests: Floats, pool: Ints) -> Floats:
    """What each line's being at a shared device costs all others in the end, in slots that requests wait, [N, D].

    A second there takes a share 1 / (1 + n) of a second from each other line that is there, and everyone in that line
    waits for it. Who comes later in the same busy period waits as well, 1 + n times as long in all in a queue that is
    steady: for M/G/1 with processor sharing the sum is what one more request adds to the waiting of the others,
    load / (1 - load)^2 services. So the charge is the number of requests whose line is there.

    `there` is the share of the slot that each line was at each device, [N, D], `requests` are in each line, [N].
    """
    waiting = np.maximum(1.0, requests)[:, None] * there
    return there * others_there(waiting, pool)
