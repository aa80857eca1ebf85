"""Faults on purpose: a device dies at a random moment of a run, and the tokens must be those of a run without a fault.

In-process devices (threads) die as processes do: their sockets close and what they held is gone. Moments: before or
after any of the messages that they send, while a placement is being staged, before and after they switch to it.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import psutil

from splitray.errors import DeviceLost
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.device.shard_host import ShardHost
from splitray.runtime.engine.engine import Engine
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire.answers import Answer
from splitray.runtime.wire.messages import SwitchOrder

Moment = Literal["before_send", "after_send", "staging", "before_switch", "after_switch"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fault: who, when, and what became of it. `recovery_s` is from the detection to the next segment."""

    device: str
    moment: Moment
    message: int
    struck: bool
    identical: bool
    recovery_s: float
    replayed: int
    error: str = ""


@dataclass(slots=True)
class FaultRun:
    """All trials, and what was left behind."""

    trials: list[Trial] = field(default_factory=list)
    hangs: int = 0
    leaks: int = 0

    @property
    def struck(self) -> list[Trial]:
        """Those in which the device really died."""
        return [t for t in self.trials if t.struck]

    @property
    def identical(self) -> int:
        """Number of trials whose tokens equal those of the run without faults."""
        return sum(t.identical for t in self.trials)


def trials(
    engine: Engine,
    fleet: ThreadFleet,
    *,
    prompt: Sequence[int],
    sampling: Sampling,
    count: int,
    seed: int = 0,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> FaultRun:
    """Run `count` times with one fault each; the engine needs a `Recovery`.

    A run counts as a hang if it takes longer than a minute.
    """
    rng, run = random.Random(seed), FaultRun()
    wanted = list(engine.stream(prompt, sampling))
    at_start = _open_files()
    for done in range(count):
        engine.members.restarted.clear()
        moment = rng.choice(MOMENTS)
        device = rng.choice([str(d) for d in engine.route.devices])
        trial, seconds = _trial(engine, fleet, prompt, sampling, wanted, moment, device, rng)
        run.trials.append(trial)
        run.hangs += seconds > 60
        told(done + 1, count)
        if engine.lost is not None:
            break
    run.leaks = max(0, _open_files() - at_start - 8 * len(engine.members.endpoints))
    return run


def _trial(
    engine: Engine, fleet: ThreadFleet, prompt: Sequence[int], sampling: Sampling, wanted: list[int],
    moment: Moment, device: str, rng: random.Random,
) -> tuple[Trial, float]:  # fmt: skip
    message, seed, faults = rng.randrange(1, 60), rng.randrange(1 << 30), len(engine.faults)
    moves, error = moment in ("staging", "before_switch", "after_switch"), ""
    began, tokens = time.monotonic(), []
    with _armed(fleet, device, moment, message) as struck:
        try:
            for n, token in enumerate(engine.stream(prompt, sampling)):
                tokens.append(token)
                if moves and n == 1:
                    state = ClusterState(arch=engine.arch, topology=engine.topology)
                    move = engine.migrate(make_planner("random", seed=seed).propose(state))
                    while not (move.staged.is_set() or move.done.is_set()):
                        time.sleep(0.001)
        except DeviceLost as lost:
            error = str(lost)
    found = engine.faults[faults:]
    return Trial(
        device=device, moment=moment, message=message, struck=struck.is_set(), identical=tokens == wanted,
        recovery_s=sum(f.recovery_s for f in found), replayed=sum(f.replayed for f in found), error=error,
    ), time.monotonic() - began  # fmt: skip


@contextmanager
def _armed(fleet: ThreadFleet, device: str, moment: Moment, message: int) -> Iterator[threading.Event]:
    """Let a device die at a moment; the event says that it has."""
    host, struck = fleet.hosts[device], threading.Event()

    def strike() -> None:
        if not struck.is_set():
            struck.set()
            fleet.kill(device)
            raise DeviceLost(f"{device} was killed")

    wire: Any = host.wire
    put, sent = wire.put, 0

    def counted(peer: str, start: bytes, payload: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == message and moment == "before_send":
            strike()
        put(peer, start, payload)
        if sent == message and moment == "after_send":
            strike()

    changed: Any = host
    epochs: Any = host.epochs
    switch, copy = host.TAKES[SwitchOrder], epochs.copy

    def switched(self: ShardHost, order: SwitchOrder) -> Answer | None:
        if moment == "before_switch":
            strike()
        answer = switch(self, order)
        if moment == "after_switch":
            strike()
        return answer

    def copied(*args: Any) -> int:
        if moment == "staging":
            strike()
        return copy(*args)

    wire.put, changed.TAKES, epochs.copy = counted, {**host.TAKES, SwitchOrder: switched}, copied
    try:
        yield struck
    finally:
        for thing, name in ((wire, "put"), (changed, "TAKES"), (epochs, "copy")):
            thing.__dict__.pop(name, None)


def _open_files() -> int:
    return psutil.Process().num_fds()
