"""`python -m actors`: spread a model over a Ray cluster, say who holds what, and generate or stay until Ctrl-C.

Exit codes: 0 ok, 1 a device was lost, 2 bad input, 130 Ctrl-C, 141 the reader of standard output left, 143 SIGTERM.
"""

from __future__ import annotations

if __name__ == "__main__":
    from splitray.signals import heed_signals

    heed_signals()

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from splitray.errors import DeviceLost, InputError, StartFailed
from splitray.ray_address import running_cluster
from splitray.report.stdout import reader_may_leave
from splitray.signals import INTERRUPTED, TERMINATED, Terminated, cleaned_up, leave

if TYPE_CHECKING:
    from splitray.runtime.fleet import Fleet

_LOOK_S = 1.0  # how often an idle command looks whether its devices live


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    interrupt = Interrupt()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        document_to = sys.stdout
        # Ray's threads report on stdout, which with --json is for the document alone.
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext(), cleaned_up():
            _run(options, interrupt, document_to=document_to)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"a device was lost: {error}", file=sys.stderr)
        return 1
    except StartFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the devices have been stopped", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("terminated; the devices have been stopped", file=sys.stderr)
        return TERMINATED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m actors", description="Spread a model over a running Ray cluster.")
    parser.add_argument("--topology", required=True, metavar="FILE", help="the devices and their links")
    parser.add_argument("--model", required=True, help="a checkpoint's path, the same on every node, or `tiny`")
    parser.add_argument("--planner", metavar="NAME", help="NAME, NAME:ARG or module:Class[:ARG] (default: even)")
    parser.add_argument("--placement", metavar="FILE", help="a placement instead of a planner")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the cluster's head; `local` starts a Ray of one's "
                        "own (default: RAY_ADDRESS, else a cluster found on this machine, else `local`)")  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="generate once; without a prompt the devices stay until Ctrl-C"
    )
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="the same for a model without a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    return parser


class Interrupt:
    """Ctrl-C, remembered: where Python runs a callback of a library, the exception alone would be lost."""

    def __init__(self) -> None:
        self._came = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Be the handler of SIGINT."""
        self._came.set()
        leave(number, frame)

    def wait(self, timeout_s: float = 0.0) -> None:
        """Let time pass.

        Raises:
            KeyboardInterrupt: Ctrl-C came, now or before.
        """
        if self._came.wait(timeout_s):
            raise KeyboardInterrupt


def _run(options: argparse.Namespace, interrupt: Interrupt, *, document_to: TextIO) -> None:
    running_cluster(options.address)  # one that cannot be joined is told before the model is read
    # Imported here, so that --help and a wrong option answer at once.
    from actors.fleet import RayFleet
    from actors.roster import pieces, roster
    from splitray.runtime.engine.policy import Recovery
    from splitray.runtime.generation import continue_prompt, read_prompt
    from splitray.runtime.launch import launch_engine
    from splitray.runtime.sampling import Sampling

    stays = options.prompt is None and options.prompt_ids is None
    prompt = None if stays else read_prompt(options.model, text=options.prompt, ids=options.prompt_ids)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, stop_ids=prompt.stop_ids if prompt else ())
    fleet = RayFleet(address=options.address)
    with launch_engine(
        model=options.model,
        topology=options.topology,
        planner=options.planner,
        placement=options.placement,
        fleet=fleet,
        recovery=Recovery(replan="drift_plus_penalty"),
        context=None if prompt is None else len(prompt.ids) + options.max_new_tokens,
        progress=lambda what: print(f"{what} ...", file=sys.stderr),
    ) as engine:
        interrupt.wait()
        stats = engine.stats()
        print(roster(engine.placement, fleet.seats, stats), flush=True)
        document: dict[str, Any] = {"devices": {d: {"weight_bytes": s["weight_bytes"]} for d, s in stats.items()}}
        if prompt is not None:

            def tell(piece: str) -> None:
                print(piece, end="", flush=True)
                interrupt.wait()

            document = continue_prompt(engine, prompt.ids, sampling, tell=tell)
            print()
        for device, seat in fleet.seats.items():
            document["devices"][device] |= asdict(seat) | {"pieces": pieces(engine.placement, device)}
        if options.json:
            print(json.dumps(document), file=document_to, flush=True)
        if prompt is None:
            print("the devices are loaded and stay until Ctrl-C; `ray list actors` shows them", flush=True)
            _stay(fleet, interrupt)


def _stay(fleet: Fleet, interrupt: Interrupt) -> None:
    while not (dead := fleet.dead()):
        interrupt.wait(_LOOK_S)
    raise DeviceLost("; ".join(f"{device}: {why}" for device, why in dead.items()))


if __name__ == "__main__":
    with reader_may_leave():
        code = main()
    if code in (INTERRUPTED, TERMINATED):
        os._exit(code)  # all is cleaned up; a thread that some library left must not keep the program
    sys.exit(code)
