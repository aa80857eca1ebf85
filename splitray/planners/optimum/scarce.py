"""What scarce memory is worth: prices of a byte at which the additive program chooses what fits."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from splitray.arrays import Floats
from splitray.planners.optimum.additive import Additive, Chosen, Prices
from splitray.planners.optimum.space import Space
from splitray.planners.protocol import RequestShape


def priced(
    space: Space, chosen: Chosen, prices: Prices, request: RequestShape | None = None, *, rounds: int = 40
) -> Iterator[tuple[Additive, Chosen, Floats]]:
    """Raise the price of memory where too much is held, and lower it where there is room (a subgradient method).

    `chosen` is what fits no memory without a price; yields the program of each round, its choice and the price, [D].
    """
    price = np.zeros(space.num_devices)
    capacity = space.memory_bytes
    for turn in range(rounds):
        over = chosen.held_bytes - capacity
        step = 0.5 * chosen.cost / (1 + turn) ** 0.7 / max(float(over @ over), 1.0)
        price = np.maximum(0.0, price + step * over)
        program = Additive(space, replace(prices, per_byte=price), request)
        chosen = program.best()
        if not np.isfinite(chosen.cost):
            return
        yield program, chosen, price
