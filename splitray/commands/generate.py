"""`splitray generate`: one prompt through a split model. Prints nothing itself: it hands text over as it comes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from splitray.errors import InputError
from splitray.report.run import run_document

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line; either a prompt or its ids."""

    model: str
    prompt: str | None
    prompt_ids: str | None
    topology: str | None
    devices: int | None
    planner: str | None
    placement: str | None
    replan: str | None
    runtime: str
    dtype: Literal["float32", "bfloat16"]
    codec: str
    channel: str
    seed: int
    sampling: dict[str, Any]


def run(request: Request, *, text: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Split the model, generate, and stop the devices again.

    Args:
        request: what to run.
        text: gets the new text in pieces as they become certain (ids where there is no tokenizer).
        progress: told what is being done, and once an empty text when the first token is there.

    Raises:
        InputError: something asked for cannot be.
        DeviceLost: a device died.
        StartFailed: Ray did not come up.
    """
    if (request.prompt is None) == (request.prompt_ids is None):
        raise InputError(
            "prompt",
            expected="either --prompt or --prompt-ids",
            actual="neither" if request.prompt is None else "both",
            remedy='give one of them, for example --prompt "The list of"',
        )
    from splitray.channel import as_channel
    from splitray.model.reading import read_config
    from splitray.runtime.engine.recovery import Recovery
    from splitray.runtime.launch import launch_engine, model_path, read_tokenizer, read_topology
    from splitray.runtime.sampling import Sampling
    from splitray.text import Detokenizer, end_ids

    topology = read_topology(request.topology, request.devices)
    read_config(model_path(request.model))  # a wrong path must not look like a missing tokenizer
    tokenizer = read_tokenizer(request.model)
    prompt_ids = _ids(request, tokenizer)
    ends = end_ids(str(model_path(request.model)), tokenizer or SimpleNamespace(eos_token_id=None))
    sampling = Sampling(**request.sampling, seed=request.seed, stop_ids=tuple(sorted(set(ends))))
    with ExitStack() as stack:
        if request.runtime == "ray":
            from splitray.local_ray import some_ray

            progress("Starting Ray")
            stack.enter_context(some_ray(topology))
        engine = stack.enter_context(
            launch_engine(
                model=request.model,
                topology=topology,
                planner=request.planner,
                placement=request.placement,
                runtime=request.runtime,
                seed=request.seed,
                dtype=request.dtype,
                codec=request.codec,
                channel=as_channel(request.channel, seed=request.seed),
                recovery=Recovery(replan="drift_plus_penalty"),
                replan=request.replan,
                progress=lambda what: progress(what.capitalize()),
            )
        )
        progress("Reading the prompt")
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        decode = partial(tokenizer.decode, **options) if tokenizer else None
        stream = Detokenizer(decode or (lambda ids: "".join(f"{i} " for i in ids)))
        token_ids: list[int] = []
        for token_id in engine.stream(prompt_ids, sampling):
            if not token_ids:
                progress("")
            token_ids.append(token_id)
            text(stream.push(token_id))
        text(stream.flush())
        assert engine.report is not None, "a finished run has a report"
        stats = engine.stats()
        return run_document(
            token_ids=token_ids,
            text=decode(token_ids) if decode else None,
            run=asdict(engine.report),
            exchanges_per_token=engine.route.exchanges_per_token,
            epoch=engine.epoch,
            devices={d: stats[d] for d in topology.ids if d in stats},
            shared_process=request.runtime == "local",
        )


def _ids(request: Request, tokenizer: Any) -> list[int]:
    if request.prompt_ids is not None:
        try:
            return [int(part) for part in request.prompt_ids.split(",") if part.strip()]
        except ValueError as error:
            raise InputError(
                "--prompt-ids",
                expected="whole numbers with commas between them",
                actual=repr(request.prompt_ids),
                remedy="write for example --prompt-ids 1,2,3",
            ) from error
    if tokenizer is None:
        raise InputError(
            "--prompt",
            expected="a model with a tokenizer",
            actual=f"none in {request.model}",
            remedy="use --prompt-ids, or put the tokenizer's files beside the weights",
        )
    # A tokenizer may add a first token of its own, which alone is no prompt.
    ids: list[int] = tokenizer(request.prompt)["input_ids"] if request.prompt else []
    return ids
