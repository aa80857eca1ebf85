"""Backlog and virtual queues of one slot, the Lyapunov function and its drift (SPEC 2.11 to 2.17). Knows no planner.

Work is counted in output tokens, since requests differ in length (SPEC 2.11 leaves the unit open). The equations are
INFERRED from Neely, Stochastic Network Optimization (2010), chapters 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """The queues at the beginning of a slot.

    `backlog_tokens` is Q(t), output tokens asked for and not yet generated; `arrived_tokens` is A(t) of the last
    slot; `energy_debt_j` is Z(t), energy spent above the budget; `accuracy_debt` is Y(t), loss above the budget.
    """

    backlog_tokens: float = 0.0
    arrived_tokens: float = 0.0
    energy_debt_j: float = 0.0
    accuracy_debt: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What the virtual queues hold the means to: mean power, and mean accuracy loss of a slot; infinite: no limit."""

    power_w: float = float("inf")
    accuracy_loss: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotOutcome:
    """What happened in one slot: tokens asked for and served, joule spent, mean accuracy loss."""

    arrived_tokens: float
    served_tokens: float
    energy_j: float = 0.0
    accuracy_loss: float = 0.0


def advance(queues: QueueState, outcome: SlotOutcome, budgets: Budgets, *, slot_s: float) -> QueueState:
    """The queues of the next slot: (2.11), (2.13), (2.14)."""
    return QueueState(
        backlog_tokens=max(queues.backlog_tokens - outcome.served_tokens, 0.0) + outcome.arrived_tokens,
        arrived_tokens=outcome.arrived_tokens,
        energy_debt_j=max(queues.energy_debt_j + outcome.energy_j - budgets.power_w * slot_s, 0.0),
        accuracy_debt=max(queues.accuracy_debt + outcome.accuracy_loss - budgets.accuracy_loss, 0.0),
    )


def lyapunov(queues: QueueState, *, energy_weight: float = 1.0, accuracy_weight: float = 1.0) -> float:
    """Half the weighted sum of squares of the queues (2.15)."""
    return 0.5 * (
        queues.backlog_tokens**2 + energy_weight * queues.energy_debt_j**2 + accuracy_weight * queues.accuracy_debt**2
    )


def drift_bound(
    queues: QueueState,
    outcome: SlotOutcome,
    budgets: Budgets,
    *,
    slot_s: float,
    energy_weight: float = 1.0,
    accuracy_weight: float = 1.0,
) -> float:
    """What the Lyapunov function can rise by in a slot with this outcome, at most (2.17).

    `max(q - s, 0) + a` squared is at most `q^2 + s^2 + a^2 + 2 q (a - s)`; the virtual queues likewise, where there is
    a budget. With the extremes of outcomes in place of the squares this is the constant B0 of (2.17).
    """
    a, s = outcome.arrived_tokens, outcome.served_tokens
    bound = 0.5 * (a * a + s * s) + queues.backlog_tokens * (a - s)
    for weight, debt, spent, allowed in (
        (energy_weight, queues.energy_debt_j, outcome.energy_j, budgets.power_w * slot_s),
        (accuracy_weight, queues.accuracy_debt, outcome.accuracy_loss, budgets.accuracy_loss),
    ):
        if allowed < float("inf"):
            over = spent - allowed
            bound += weight * (0.5 * over * over + debt * over)
    return bound
