"""Backlog and virtual queues from slot to slot (docs/equations.md E2.11 to E2.14). Knows no planner.

Work is counted in output tokens, since requests differ in length. The equations are those of Neely, Stochastic Network
Optimization (2010), chapters 3 and 4: Q(t+1) = max(Q(t) - served, 0) + arrived, and likewise for a mean with a budget.
"""

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
    """The queues of the next slot, which lasts `slot_s`."""
    return QueueState(
        backlog_tokens=max(queues.backlog_tokens - outcome.served_tokens, 0.0) + outcome.arrived_tokens,
        arrived_tokens=outcome.arrived_tokens,
        energy_debt_j=max(queues.energy_debt_j + outcome.energy_j - budgets.power_w * slot_s, 0.0),
        accuracy_debt=max(queues.accuracy_debt + outcome.accuracy_loss - budgets.accuracy_loss, 0.0),
    )
