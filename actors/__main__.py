"""`python -m actors`: spread a model over a Ray cluster, say who holds what, and generate or stay until Ctrl-C.

Exit codes: 0 ok, 1 a device was lost, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from splitray.errors import DeviceLost, InputError

if TYPE_CHECKING:
    from splitray.runtime.fleet import Fleet

_LOOK_S = 1.0  # how often an idle command looks whether its devices live


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    interrupt = Interrupt()
    signal.signal(signal.SIGINT, interrupt)
    try:
        # Ray's threads report on stdout, which with --json is for the document alone.
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            _run(options, interrupt, document_to=sys.__stdout__ or sys.stdout)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"a device was lost: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the devices have been stopped", file=sys.stderr)
        return 130
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

    def __call__(self, *_: object) -> NoReturn:
        """Be the handler of SIGINT."""
        self._came.set()
        raise KeyboardInterrupt

    def wait(self, timeout_s: float = 0.0) -> None:
        """Let time pass.

        Raises:
            KeyboardInterrupt: Ctrl-C came, now or before.
        """
        if self._came.wait(timeout_s):
            raise KeyboardInterrupt


def _run(options: argparse.Namespace, interrupt: Interrupt, *, document_to: TextIO) -> None:
    # Imported here, so that --help and a wrong option answer at once.
    from actors.fleet import RayFleet
    from actors.roster import pieces, roster
    from splitray.report.run import run_document
    from splitray.runtime.engine.recovery import Recovery
    from splitray.runtime.launch import launch_engine
    from splitray.runtime.sampling import Sampling

    sampling = Sampling(max_new_tokens=options.max_new_tokens, stop_ids=_stop_ids(options.model))
    prompt_ids = _prompt_ids(options)
    fleet = RayFleet(address=options.address)
    with launch_engine(
        model=options.model,
        topology=options.topology,
        planner=options.planner,
        placement=options.placement,
        fleet=fleet,
        recovery=Recovery(replan="drift_plus_penalty"),
        progress=lambda what: print(f"{what} ...", file=sys.stderr),
    ) as engine:
        interrupt.wait()
        stats = engine.stats()
        print(roster(engine.placement, fleet.seats, stats), flush=True)
        document: dict[str, Any] = {"devices": {d: {"weight_bytes": s["weight_bytes"]} for d, s in stats.items()}}
        if prompt_ids is not None:
            token_ids = []
            for token_id in engine.stream(prompt_ids, sampling):
                token_ids.append(token_id)
                print(token_id, end=" ", flush=True)
                interrupt.wait()
            assert engine.report is not None, "a finished run has a report"
            text = engine.tokenizer.decode(token_ids, skip_special_tokens=True) if engine.tokenizer else None
            print("" if text is None else f"\n{text}")
            document = run_document(
                token_ids=token_ids,
                text=text,
                run=asdict(engine.report),
                exchanges_per_token=engine.route.exchanges_per_token,
                epoch=engine.epoch,
                devices=engine.stats(),
            )
        for device, seat in fleet.seats.items():
            document["devices"][device] |= asdict(seat) | {"pieces": pieces(engine.placement, device)}
        if options.json:
            print(json.dumps(document), file=document_to, flush=True)
        if prompt_ids is None:
            print("the devices are loaded and stay until Ctrl-C; `ray list actors` shows them", flush=True)
            _stay(fleet, interrupt)


def _stay(fleet: Fleet, interrupt: Interrupt) -> None:
    while not (dead := fleet.dead()):
        interrupt.wait(_LOOK_S)
    raise DeviceLost("; ".join(f"{device}: {why}" for device, why in dead.items()))


def _prompt_ids(options: argparse.Namespace) -> list[int] | None:
    from splitray.runtime.launch import read_tokenizer

    if options.prompt_ids is not None:
        try:
            return [int(part) for part in options.prompt_ids.split(",") if part.strip()]
        except ValueError as error:
            raise InputError(
                "--prompt-ids",
                expected="whole numbers with commas between them",
                actual=repr(options.prompt_ids),
                remedy="write for example --prompt-ids 1,2,3",
            ) from error
    if options.prompt is None:
        return None
    tokenizer = read_tokenizer(options.model)
    if tokenizer is None:
        raise InputError(
            "--prompt",
            expected="a model with a tokenizer",
            actual=f"none in {options.model}",
            remedy="use --prompt-ids, or put the tokenizer's files beside the weights",
        )
    return list(tokenizer(options.prompt)["input_ids"])


def _stop_ids(model: str) -> tuple[int, ...]:
    """The ids at which transformers' generate would stop."""
    from transformers import GenerationConfig

    from splitray.model.reading import read_config
    from splitray.runtime.launch import model_path

    folder = model_path(model)
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    else:
        named = read_config(folder).eos_token_id
    return tuple(named) if isinstance(named, list) else () if named is None else (named,)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
