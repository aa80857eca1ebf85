"""A soak: devices are killed at random for minutes while prompts are answered; then the engine has to be whole again.

`python tests/soak.py --runtime local|process|ray --seconds 120 --seed 1 --start-s 3` prints a line every tenth of
the time and one JSON document at the end. The exit code is 0 if no token was wrong, the engine never ended, the route
was whole within a start and 5 s of the last kill, and no gap was longer than a start and 2 s while another device
lived.
`--start-s` delays each start; threads start at once, processes and actors take their own time, which is measured.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from splitray.errors import DeviceLost
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import Fleet, ProcessFleet, ThreadFleet
from splitray.runtime.launch import launch_engine, ray_fleet
from splitray.runtime.sampling import Sampling
from splitray.topology import Device

DEVICES = ("edge0", "cloud0", "cloud1")
SAMPLING = Sampling(max_new_tokens=60)


class Killed:
    """A fleet whose devices can be killed, whose starts can be delayed, and are timed."""

    def __init__(self, runtime: str, start_s: float) -> None:
        makes: dict[str, Callable[[], Any]] = {"local": ThreadFleet, "process": ProcessFleet, "ray": ray_fleet}
        self.fleet = makes[runtime]()
        self.start_s, self.longest_start_s, self.on = start_s, start_s, False
        self._restart = self.fleet.restart
        self.fleet.restart = self._slow

    def _slow(self, device: Device) -> Any:
        began = time.monotonic()
        if self.on:
            time.sleep(self.start_s)
        found = self._restart(device)
        if self.on:
            self.longest_start_s = max(self.longest_start_s, time.monotonic() - began)
        return found

    def kill(self, device: str) -> None:
        if isinstance(self.fleet, ThreadFleet):
            self.fleet.kill(device)
        else:
            os.kill(self.fleet.pid(device), signal.SIGKILL)


def resources(fleet: Fleet) -> dict[str, float]:
    me = psutil.Process()
    return {
        "rss_mb": round(me.memory_info().rss / 2**20, 1),
        "threads": threading.active_count(),
        "descriptors": me.num_fds(),
    }


def soak(runtime: str, seconds: float, seed: int, start_s: float, between_s: tuple[float, float]) -> dict[str, Any]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 2000) for _ in range(rng.randrange(3, 60))] for _ in range(8)]
    with launch_engine(model="tiny", devices=1, runtime="local") as one:
        wanted = [list(one.stream(p, SAMPLING)) for p in prompts]
    killed = Killed(runtime, start_s)
    found: dict[str, Any] = {"runtime": runtime, "seconds": seconds, "seed": seed, "start_s": start_s, "runs": 0}
    found |= {"wrong": 0, "kills": 0, "gap_s": 0.0, "ended": None, "used": []}
    recovery = Recovery(replan="even", restarts=1_000_000)
    long_s = list[float]()
    stop, alone_s = threading.Event(), [0.0]  # when the last device was left without another one

    with launch_engine(model="tiny", devices=3, planner="even", fleet=killed.fleet, recovery=recovery) as engine:
        killed.on = True

        def living() -> set[str]:
            return set(engine.members.endpoints) - set(killed.fleet.dead())

        def kills() -> None:
            while not stop.wait(rng.uniform(*between_s)):
                device = rng.choice(DEVICES)
                if device in living():
                    killed.kill(device)
                    found["kills"] += 1
                if not living():
                    alone_s[0] = time.monotonic()

        def answer() -> None:
            i = rng.randrange(len(prompts))
            tokens, last = [], time.monotonic()
            for token in engine.stream(prompts[i], SAMPLING):
                now = time.monotonic()
                found["gap_s"] = max(found["gap_s"], now - last)
                if now - last > 2.0 and alone_s[0] < last:
                    long_s.append(round(now - last, 2))
                tokens.append(token)
                last = now
            found["runs"] += 1
            found["wrong"] += tokens != wanted[i]

        killer = threading.Thread(target=kills)
        began = time.monotonic()
        said = 0
        killer.start()
        try:
            while (at := time.monotonic() - began) < seconds:
                answer()
                if at * 10 / seconds >= said:
                    said += 1
                    found["used"].append(resources(killed.fleet))
                    route = [str(d) for d in engine.route.devices]
                    counts = {k: found[k] for k in ("runs", "wrong", "kills")}
                    print(f"{at:.0f} s: {counts} {route} {found['used'][-1]}", file=sys.stderr, flush=True)
            stop.set()
            killer.join()
            ended = time.monotonic()
            while (killed.fleet.dead() or len(engine.route.devices) < 3) and time.monotonic() - ended < 60:
                answer()
            found["whole_after_s"] = round(time.monotonic() - ended, 2)
            for _ in range(5):
                answer()
        except DeviceLost as error:
            found["ended"] = str(error)
        finally:
            stop.set()
            killer.join()
        found["faults"], found["epoch"] = len(engine.faults), engine.epoch
        found["recovery_s"] = max((f.recovery_s for f in engine.faults), default=0.0)
    found["longest_start_s"] = killed.longest_start_s
    found["over"] = [gap_s for gap_s in long_s if gap_s > killed.longest_start_s + 2.0]
    whole_s = found.get("whole_after_s", 60.0)
    found["right"] = bool(
        not found["wrong"] and not found["ended"] and not found["over"] and whole_s <= killed.longest_start_s + 5.0
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--runtime", choices=["local", "process", "ray"], default="local")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument(
        "--between-s", type=float, nargs=2, default=(1.0, 4.0), help="seconds from one kill to the next"
    )
    args = parser.parse_args()
    found = soak(args.runtime, args.seconds, args.seed, args.start_s, tuple(args.between_s))
    print(json.dumps(found))
    return 0 if found["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
