"""A planner that knows the future: it tries every candidate on what is going to happen, and takes the best.

Every few slots all edges of a cloud try each candidate for some slots ahead, under the bandwidth and the requests that
will really come, and go on with the one under which requests wait least. No online planner can do so; what is left
between it and one of them is what foresight and agreement among the edges would be worth. It is no bound: better
sequences may exist than those of one candidate at a time.
"""

from collections.abc import Sequence

import numpy as np

from splitray.arrays import Floats, Ints
from splitray.rl.training.holdout import Decide
from splitray.rl.world.action import FREE, MOVE_WEIGHTS, PRICES, ActionSpec
from splitray.rl.world.cell import Cell
from splitray.rl.world.vector_env import SLOT_S, StepResult, VectorEnv
from splitray.rl.world.weather import Climate

CANDIDATES = tuple((0, stay, price) for price in range(len(PRICES)) for stay in (2, len(MOVE_WEIGHTS) - 1))
"""Indices of V, weight of moves and price."""
AHEAD, EVERY = 24, 4  # slots


def foreseen(
    online: Sequence[Decide],
    cell: Cell,
    climate: Climate,
    *,
    spec: ActionSpec,
    seed: int,
    num_edges: int,
    num_slots: int,
) -> Floats:
    """Mean latency of the requests of each edge, [num_edges]; the same weather as `holdout.score` with the same seed.

    The policies `online` are candidates too, so that it is not behind them but for where the search is cut off. The
    edges are those of whole clouds; no more requests come after `num_slots`.
    """
    many = len(CANDIDATES) + len(online)
    drawn = VectorEnv(
        cell, climate, spec=spec, num_instances=num_edges, num_slots=num_slots, rng=np.random.default_rng([seed, 1])
    )
    env = drawn.times(many)
    fixed = np.array([[FREE] * spec.num_groups + list(c) for c in CANDIDATES])
    candidate = np.repeat(np.arange(many), num_edges)
    pools = int(drawn.weather.pool.max()) + 1
    while env.slot < num_slots or (env.simulator.backlog_requests.any() and env.slot < 2 * num_slots):
        waited, kept = np.zeros(env.num_instances), None
        for ahead in range(AHEAD):
            _slot(env, online, fixed, candidate)
            waited += env.simulator.backlog_requests * SLOT_S
            if ahead == EVERY - 1:
                kept = env.state()
        assert kept is not None
        waited += env.simulator.backlog_requests * env.known.service_s  # what is still there has this before it
        cost = np.zeros((many, pools))
        np.add.at(cost, (candidate, np.tile(drawn.weather.pool, many)), waited)
        best = cost.argmin(0)[np.tile(drawn.weather.pool, many)]
        env.restore(kept, best * num_edges + np.tile(np.arange(num_edges), many))
    return env.simulator.mean_latency_s[:num_edges]


def ahead(env: VectorEnv, slots: int) -> Floats:
    """What each of CANDIDATES would cost each cloud of an environment from now on, [candidates, P]; env stays as it is.

    The sum over edges of all terms of the reward but congestion (which others' waiting says itself), and at the end a
    service for each request that is left.
    """
    many, n = len(CANDIDATES), env.num_instances
    branches = env.times(many)
    branches.restore(env.state(), np.tile(np.arange(n), many))
    fixed = np.array([[FREE] * env.spec.num_groups + list(c) for c in CANDIDATES])
    candidate, cost = np.repeat(np.arange(many), n), np.zeros(many * n)
    for _ in range(slots):
        terms = _slot(branches, (), fixed, candidate).terms
        cost -= sum(value for name, value in terms.items() if name != "congestion")
    cost += env.weights.latency * branches.simulator.backlog_requests
    found = np.zeros((many, int(env.weather.pool.max()) + 1))
    np.add.at(found, (candidate, np.tile(env.weather.pool, many)), cost)
    return found


def _slot(env: VectorEnv, online: Sequence[Decide], fixed: Ints, candidate: Ints) -> StepResult:
    for rows in env.turns:
        mine = candidate[rows]
        high = fixed[np.minimum(mine, len(fixed) - 1)]
        for k, decide in enumerate(online):
            theirs = mine == len(fixed) + k
            if theirs.any():
                high[theirs] = decide(env, rows[theirs])[0]
        env.act(high, None, rows)
    return env.serve()
