"""The OpenAI API over a split model: `serve run serve_apps.generate:build model=... topology=...`."""

# No `from __future__ import annotations` here: Serve validates what `build` gets by its annotation, which
# must be the class Args and not its name.
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from serve_apps.api_error import as_api_error
from serve_apps.app import make_app
from serve_apps.engine_queue import EngineQueue, ServedEngine
from serve_apps.service import TextService
from splitray.text.template_processes import template_processes


class Args(BaseModel):
    """What `serve run` takes as key=value and a Serve config as `args:`; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="tiny", description="path of a checkpoint, or `tiny`, the shipped model")
    topology: str | None = Field(default=None, description="topology file")
    devices: int | None = Field(default=None, ge=1, description="N equal devices instead of a topology; default 2")
    planner: str | None = Field(default=None, description="NAME[:ARG] or module:Class[:ARG], decides where what runs")
    placement: str | None = Field(default=None, description="placement file instead of a planner")
    runtime: Literal["local", "process", "ray"] = Field(default="ray", description="devices as threads, ... or actors")
    model_name: str | None = Field(default=None, description="the name clients ask for, else the path's last part")
    checkpoints: str | None = Field(
        default=None, description="folder or URL that all devices reach, for KV of running requests"
    )
    replan: str | None = Field(default=None, description="planner, likewise, that moves the placement as links change")
    weights: str = Field(default="auto", description="format of the weights, as `splitray plan --help` lists them")
    sums: Literal["fixed", "fast"] = Field(
        default="fixed", description="fixed: with quantised weights too, no token depends on the placement"
    )
    context: int | None = Field(
        default=None, ge=2, description="longest request in tokens, for which room is kept; longer ones are refused"
    )
    start_s: float | None = Field(default=None, gt=0, description="seconds that a device may take to start")
    trust_request_chat_template: bool = Field(
        default=False, description="requests may bring a chat_template and chat_template_kwargs"
    )
    seed: int = Field(default=0, description="seeds the planner, and sampling where a request names no seed")

    @model_validator(mode="after")
    def _one_of_each_pair(self) -> "Args":
        for one, other in (("topology", "devices"), ("planner", "placement")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"expected {one} or {other}, got both; leave one out")
        return self

    @model_validator(mode="after")
    def _a_store_that_is_there(self) -> "Args":
        if self.checkpoints is not None:
            from splitray.runtime.checkpoint import Store

            Store(self.checkpoints).check()
        return self


class Replica:
    """One engine and its routes. When the engine is lost, Serve starts the replica anew."""

    def __init__(self, args: Args) -> None:
        """Launch the engine; a launch that fails shows its reason in `serve status`."""
        template_processes()  # ready by the time that the engine is
        self._service = TextService(
            EngineQueue(partial(_launch, args)),
            model_name=args.model_name or Path(args.model).name,
            seed=args.seed,
            trust_request_chat_template=args.trust_request_chat_template,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the routes once the engine is there."""
        app, queue = make_app(self._service), self._service.queue

        @app.get("/v1/stats")
        async def stats() -> Response:
            try:
                return JSONResponse(await queue.call(partial(_stats, queue.engine)))
            except Exception as error:
                raise as_api_error(error) from error

        return app

    def check_health(self) -> None:
        """Serve restarts a replica that raises here a few times in a row."""
        if self._service.queue.lost:
            raise RuntimeError(f"the engine is lost: {self._service.queue.lost}")


def _launch(args: Args) -> ServedEngine:
    from splitray.runtime.engine.policy import Recovery
    from splitray.runtime.launch import launch_engine

    return launch_engine(
        recovery=Recovery(store=args.checkpoints, replan="drift_plus_penalty"),
        model=args.model,
        needs_text=True,
        topology=args.topology,
        devices=args.devices,
        planner=args.planner,
        placement=args.placement,
        runtime=args.runtime,
        seed=args.seed,
        replan=args.replan,
        weights=args.weights,
        sums=args.sums,
        context=args.context,
        start_s=args.start_s,
    )


def _stats(engine: ServedEngine) -> dict[str, Any]:
    """What the last run cost (null before the first), what each device holds, and where what runs."""
    from splitray.runtime.engine.engine import Engine

    split = cast(Engine, engine)
    return {
        "epoch": split.epoch,
        "exchanges_per_token": split.route.exchanges_per_token,
        "run": None if split.report is None else asdict(split.report),
        "devices": split.stats(),
        "placement": split.placement.to_document(),
    }


def _from_here(path: str | None) -> str | None:
    """Make an existing path absolute: the replica may run in another directory than the caller."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def build(args: Args) -> serve.Application:
    """The application that `serve run` and a Serve config name."""
    here = args.model_copy(
        update={
            "model_name": args.model_name or Path(args.model).name,
            "model": args.model if args.model == "tiny" else _from_here(args.model),
            "topology": _from_here(args.topology),
            "placement": _from_here(args.placement),
        }
    )
    deploy = serve.deployment(
        name="Generate",
        num_replicas=1,  # an engine owns its devices; a second replica would load the model a second time
        max_ongoing_requests=64,  # callers wait in the replica, in order, and /health gets past them
        health_check_period_s=2,
        # Actor devices ask for CPUs of their own and then the replica only waits for them.
        ray_actor_options={"num_cpus": 0 if args.runtime == "ray" else 1},
    )
    return deploy(serve.ingress()(Replica)).bind(here)
