"""What a slot costs, term by term.

r = -(w_T * latency + w_C * congestion + w_E * energy + w_A * accuracy + w_M * migration)
    - w_Q * (queue + w_Z * virtual queues)

Latency is the real waiting: seconds that requests spend in the system during the slot. Summed over slots this is the
latency of all requests (Little's law), whatever the slots' length, so nothing of it cancels.

Congestion is the waiting that this line's use of a shared cloud causes to others (`sim/crowd.py`): without it each
learns what is best for itself, which is not what is best for all.

The Lyapunov part charges the level of the Lyapunov function, (Q^2 + w_Z Z^2 + w_Y Y^2) / 2, and not its difference:
differences telescope to the last slot's level, while the discounted sum of levels is, up to a constant and a factor
1 / (1 - gamma), the discounted sum of drifts.
"""

from dataclasses import dataclass

import numpy as np

from splitray.arrays import Floats
from splitray.rl.world.cell import References

PERFORMANCE = ("latency", "congestion", "energy", "accuracy", "migration")
LYAPUNOV = ("queue", "energy_queue", "accuracy_queue")
TERMS = (*PERFORMANCE, *LYAPUNOV)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each term counts, all in units of one mean request served by an idle cloud.

    `energy` is the latency, in mean requests, that the energy of one request is worth.
    """

    latency: float = 1.0
    congestion: float = 1.0
    energy: float = 0.05
    accuracy: float = 1.0
    migration: float = 0.05
    queue: float = 0.05
    energy_queue: float = 1.0
    accuracy_queue: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one slot cost N instances, [N] each, and the queues after it."""

    waiting_s: Floats
    """Seconds that requests were in the system, summed over requests."""
    congestion_s: Floats
    """Seconds that other lines' requests wait for it."""
    energy_j: Floats
    accuracy_loss: Floats
    moving_s: Floats
    backlog_tokens: Floats
    energy_debt_j: Floats
    accuracy_debt: Floats


def terms_of(spent: Spent, weights: Weights, known: References) -> dict[str, Floats]:
    """Every term by name, 0 or below, [N] each; queues are capped at 100 requests, far beyond use."""
    queue = np.minimum(spent.backlog_tokens / known.request.output_tokens, 100.0)
    energy = np.minimum(spent.energy_debt_j / known.request_j, 100.0)
    accuracy = np.minimum(spent.accuracy_debt, 100.0)
    w = weights
    return {
        "latency": -w.latency * spent.waiting_s / known.service_s,
        "congestion": -w.congestion * spent.congestion_s / known.service_s,
        "energy": -w.energy * spent.energy_j / known.request_j,
        "accuracy": -w.accuracy * spent.accuracy_loss,
        "migration": -w.migration * spent.moving_s / known.service_s,
        "queue": -w.queue * queue**2 / 2,
        "energy_queue": -w.queue * w.energy_queue * energy**2 / 2,
        "accuracy_queue": -w.queue * w.accuracy_queue * accuracy**2 / 2,
    }


def rewards_of(terms: dict[str, Floats]) -> Floats:
    """The performance and the Lyapunov part, [N, 2]; their sum is the reward."""
    return np.stack([sum((terms[k] for k in names), start=np.zeros(1)) for names in (PERFORMANCE, LYAPUNOV)], axis=1)


def price_per_joule(weights: Weights, known: References) -> float:
    """What a joule costs where a second that one token waits costs 1, as drift_plus_penalty counts: the reward's rate.

    A second of waiting of one request costs w_T / T_ref; the program counts a request as its tokens.
    """
    if weights.latency <= 0:
        return 0.0
    second = weights.latency / known.service_s / known.request.output_tokens
    return weights.energy / known.request_j / second
