"""An engine over the laboratory's cluster, run on its head: takes orders and tells what comes of them, line by line.

An order is `[op, values]`, the first one `start`; each answer is one JSON value. A run gives `[token, time]` for each
token and null behind the last one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from actors.fleet import RayFleet
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.runtime.timing import echo

PROMPT = list(range(5, 25))
DEVICES = ("edge0", "cloud0")


def answers(engine: Engine, fleet: RayFleet, op: str, values: dict[str, Any]) -> Iterator[Any]:
    """What an order comes to."""
    if op == "run":
        for token in engine.stream(PROMPT, Sampling(**values)):
            yield token, time.monotonic()
        yield None
    elif op == "faults":
        yield [asdict(fault) for fault in engine.faults]
        engine.faults.clear()
    elif op == "pids":
        yield {device: fleet.pid(device) for device in engine.route.devices}
    elif op == "echo":
        yield echo(engine, *DEVICES, **values)


def main() -> None:
    """Serve orders until there are no more."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints beside it

    def tell(answer: Any) -> None:
        print(json.dumps(answer), file=told, flush=True)

    _, values = json.loads(sys.stdin.readline())
    fleet = RayFleet(address=values["address"])
    recovery = Recovery(replan="best_device", restarts=99)
    with launch_engine(model="tiny", devices=len(DEVICES), fleet=fleet, recovery=recovery) as engine:
        tell(None)
        for line in sys.stdin:
            for answer in answers(engine, fleet, *json.loads(line)):
                tell(answer)


if __name__ == "__main__":
    main()
