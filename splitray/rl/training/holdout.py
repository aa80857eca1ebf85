"""Policies against each other under the same weather: mean latency of all requests, weather by weather.

A policy acts as it would serve, by its likeliest choices. Every run goes on after its last arrival until the lines
are empty, at most as long again; who has not finished by then counts with its age.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.rl.policy_planner import relieves
from splitray.rl.training.rollout import Act
from splitray.rl.world.action import DEFAULT_KNOBS, FREE, ActionSpec
from splitray.rl.world.cell import Cell
from splitray.rl.world.choosing import greedy
from splitray.rl.world.policy import Policy
from splitray.rl.world.rows import HEAD_FFN_AGENT, LAYER_AGENT, layouts
from splitray.rl.world.vector_env import VectorEnv
from splitray.rl.world.weather import Climate

Decide = Callable[[VectorEnv, Ints], tuple[Ints, Ints | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One policy in one cell, an entry a weather, [N]."""

    latency_s: Floats
    energy_j: Floats
    """Joule of a request, all devices together."""
    moves: Floats
    reward: Floats
    """Mean reward of a slot, both parts together."""


@dataclass(frozen=True, slots=True)
class LatencyRatio:
    """The mean of ln(a / b) over weathers as a ratio, with a 95 % interval (normal)."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.4f} [{self.low:.4f}, {self.high:.4f}]"


def paired(a: Floats, b: Floats) -> LatencyRatio:
    """Compare two policies' latencies on the same weathers."""
    logs = np.log(a / b)
    logs = logs[np.isfinite(logs)]
    error = 1.96 * logs.std(ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else float("inf")
    return LatencyRatio(*(float(np.exp(x)) for x in (logs.mean(), logs.mean() - error, logs.mean() + error)))


def program(stay: int = DEFAULT_KNOBS[1], v: int = DEFAULT_KNOBS[0], price: int = DEFAULT_KNOBS[2]) -> Decide:
    """The exact program alone, at fixed knobs (indices into `action.MOVE_WEIGHTS` and so on)."""

    def decide(env: VectorEnv, rows: Ints) -> tuple[Ints, None]:
        row = [FREE] * env.spec.num_groups + [v, stay, price]
        return np.tile(row, (len(rows), 1)), None

    return decide


def learned(act: Act, spec: ActionSpec) -> Decide:
    """Trained agents as a policy that takes its likeliest choices."""
    both = layouts(spec)

    def decide(env: VectorEnv, rows: Ints) -> tuple[Ints, Ints | None]:
        high = greedy(both[LAYER_AGENT].blocks, act(LAYER_AGENT, env.high_rows(rows))[0])
        if not spec.low_decides:
            return high, None
        return high, greedy(both[HEAD_FFN_AGENT].blocks, act(HEAD_FFN_AGENT, env.low_rows(high, rows))[0])

    return decide


def served(policy: Policy) -> Decide:
    """A policy as the planner `splitwise` uses it, without a deep-learning library."""

    def decide(env: VectorEnv, rows: Ints) -> tuple[Ints, None]:
        knobs = np.tile(DEFAULT_KNOBS, (len(rows), 1))
        if relieves(env.static):
            knobs = policy.knobs(*env.features(rows))
        return np.concatenate([np.full((len(rows), env.spec.num_groups), FREE), knobs], axis=1), None

    return decide


def score(
    decide: Decide,
    cell: Cell,
    climate: Climate,
    *,
    spec: ActionSpec,
    seed: int,
    num_instances: int = 64,
    num_slots: int = 256,
    leave_out: frozenset[str] = frozenset(),
) -> Score:
    """Serve one set of weathers; a seed makes them the same for every policy."""
    env = VectorEnv(
        cell, climate, spec=spec, num_instances=num_instances, num_slots=num_slots, leave_out=leave_out,
        rng=np.random.default_rng([seed, 1]),
    )  # fmt: skip
    energy, moves, reward = np.zeros((3, num_instances))
    for t in range(2 * num_slots):
        if t >= num_slots and not env.simulator.backlog_requests.any():
            break
        for rows in env.turns:
            env.act(*decide(env, rows), rows)
        outcome = env.serve()
        energy += -outcome.terms["energy"]
        moves += outcome.moved
        reward += outcome.rewards.sum(1)
    latency_s, count = env.simulator.mean_latency_s, np.isfinite(env.simulator.arrival_s).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        joule = energy / max(env.weights.energy, 1e-12) * env.known.request_j / count
    return Score(latency_s=latency_s, energy_j=joule, moves=moves / num_slots, reward=reward / num_slots)
