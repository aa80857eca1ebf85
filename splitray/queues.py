"""Backlog and virtual queues of one slot, the Lyapunov function and its drift (SPEC 2.11 to 2.17). Knows no planner.

Work is counted in output tokens, since requests differ in length (SPEC 2.11 leaves the unit open).
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
