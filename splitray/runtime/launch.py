"""From what a user writes (a model, devices, a planner or a file, a runtime) to a running engine."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModelForCausalLM

from splitray.arch import ModelArch, held_as
from splitray.channel import NoisyChannel, as_channel
from splitray.codecs import Codec, as_codec
from splitray.errors import InputError, ModelError, TokenizerError
from splitray.model.checked import check_weights
from splitray.model.config import text_part, whole_config
from splitray.model.folder import check_folder, has_weights
from splitray.model.layout import Layouts
from splitray.model.lengths import check_generation
from splitray.model.opened import open_checkpoint
from splitray.model.reading import read_arch, read_config
from splitray.model.slice_reader import rounding_error
from splitray.model.token_ids import check_tokenizer
from splitray.model.tokenizer import has_tokenizer, load_tokenizer
from splitray.placement import Placement, validate
from splitray.planners import make_planner
from splitray.planners.best_weights import best_weights
from splitray.planners.coded import AUTO, best_codec
from splitray.planners.memory import check
from splitray.planners.protocol import ClusterState, Planner
from splitray.quality.surrogate_accuracy import accuracy_of
from splitray.runtime.checkpoint import Store
from splitray.runtime.device_formats import on_devices
from splitray.runtime.engine.controller import attend
from splitray.runtime.engine.engine import Engine
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import Fleet, ProcessFleet, ThreadFleet
from splitray.runtime.remembered import lean_is_exact
from splitray.topology import Topology
from splitray.weight_formats import AUTO_WEIGHTS, BEST_WEIGHTS

logger = logging.getLogger(__name__)

RUNTIMES = ("local", "process", "ray")
SHIPPED = Path(__file__).parent.parent / "model" / "shipped"
Dtype = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[str], None]


def model_path(model: str | Path) -> Path:
    """The folder of a model: a path, or `tiny` for the one that ships with the package."""
    return SHIPPED if str(model) == "tiny" else Path(model).expanduser()


def read_model(
    model: str | Path,
    *,
    dtype: Dtype = "float32",
    weights: str = AUTO_WEIGHTS,
    sums: str = "fixed",
    topology: Topology | None = None,
) -> tuple[ModelArch, Layouts, bool]:
    """Counts and wiring of a model, and whether the lean loop is exact for it, after the self-test.

    Its weights are checked if they lie here: the devices of a `topology` may have them in folders of their own, and
    hold them in formats of their own.

    Raises:
        ModelError: the folder holds no usable model, or its architecture cannot be split exactly.
    """
    folder = model_path(model)
    if has_weights(folder) or topology is None or not any(d.model_path for d in topology.devices):
        check_weights(folder)
    else:
        check_folder(folder)
    config = read_config(folder)
    check_generation(AutoModelForCausalLM._model_mapping[type(config)], config)  # before a probe is made
    arch, layout = read_arch(config, dtype=dtype)
    lean = lean_is_exact(config)
    if has_weights(folder):
        arch = replace(arch, stored=open_checkpoint(folder).stored())
    if weights == BEST_WEIGHTS:  # `settled` says which
        weights = "float32"
    if topology is not None:
        arch = on_devices(arch, topology, weights, lambda: _as_stored(arch, folder).weights, sums=sums, lean=lean)
    elif weights == AUTO_WEIGHTS:
        arch = _as_stored(arch, folder)
    else:
        arch = held_as(arch, weights, sums=sums, lean=lean)
    return arch, layout, lean


def _as_stored(arch: ModelArch, folder: Path) -> ModelArch:
    """The weights as the checkpoint has them, where they can be held so; else float32."""
    stored = arch.auto_weights
    if arch.dtype != "float32":
        return arch
    try:
        held = held_as(arch, stored)
    except ModelError as error:
        _tell(f"{folder}: stored in {stored}, held in float32: {error}")
        return arch
    source = open_checkpoint(folder)
    if held.is_quantised and (changed := source.inexact()):
        count, error_of_one = len(changed), rounding_error(source, changed[0])
        _tell(
            f"{folder}: {count} {'matrix' if count == 1 else 'matrices'} that no kernel reads as stored "
            f"will be rounded to 8 bits: by {error_of_one:.2%} in {changed[0]}"
        )
    return held


@cache
def _tell(said: str) -> None:
    """Warn once: a command may open its model several times."""
    logger.warning(said)


def read_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer, or None if its folder has none that can be used here: then ids still can.

    Raises:
        ModelError: it is that of a model with more tokens.
    """
    try:
        return needed_tokenizer(model) if has_tokenizer(model_path(model)) else None
    except TokenizerError as error:
        logger.warning("%s: its tokenizer cannot be used: %s", model, error)
        return None


def needed_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: its folder has none that can be used, or that of a model with more tokens.
    """
    folder = model_path(model)
    if not has_tokenizer(folder):
        remedy = "put the tokenizer's files beside the weights, or use --prompt-ids with `splitray generate`"
        raise TokenizerError("model", expected="a model with a tokenizer", actual=f"none in {model}", remedy=remedy)
    vocab = text_part(whole_config(folder)).vocab_size  # a wrong config must not look like a wrong tokenizer
    tokenizer = load_tokenizer(folder)
    check_tokenizer(model, tokenizer, vocab)
    return tokenizer


def read_topology(topology: str | Path | Topology | None, devices: int | None) -> Topology:
    """A topology file, or `devices` equal ones on this machine (two by default)."""
    if isinstance(topology, Topology):
        return topology
    if topology is not None:
        if devices is not None:
            raise InputError("devices", expected="either a topology or a number of devices", actual="both",
                             remedy="leave one out")  # fmt: skip
        return Topology.load(topology)
    count = 2 if devices is None else devices
    if count < 1:
        raise InputError("devices", expected="at least 1", actual=count, remedy="give a number of devices")
    return Topology.uniform(count)


def settled(
    arch: ModelArch,
    topology: Topology,
    weights: str,
    *,
    planner: str | Planner | None,
    placement: str | Path | Placement | None,
    seed: int = 0,
    context_tokens: int = 0,
    sums: str = "fixed",
    lean: bool = True,
) -> tuple[ModelArch, Topology]:
    """Model and devices with the formats that a planner finds best, where that is asked for.

    Raises:
        InputError: the planner cannot choose them, or there is none.
    """
    if weights != BEST_WEIGHTS:
        return arch, topology
    if placement is not None:
        raise InputError("weights best", expected="a planner, which chooses them", actual="a placement",
                         remedy="name a format, or use --planner exact")  # fmt: skip
    state = ClusterState(arch=arch, topology=topology, context_tokens=context_tokens)
    found = best_weights(make_planner(planner, seed=seed), state, sums=sums, lean=lean)
    logger.info("weights: %s", ", ".join(f"{d} {w}" for d, w in found.tried[0].weights.items()))
    return found.state.arch, found.state.topology


def decide(
    arch: ModelArch,
    topology: Topology,
    *,
    planner: str | Planner | None,
    placement: str | Path | Placement | None,
    seed: int = 0,
    context_tokens: int = 0,
    codec: str = "none",
    channel: NoisyChannel | None = None,
) -> tuple[Placement, Codec]:
    """The placement of a file or of a planner (`even` if neither is given), validated, and the codec.

    Raises:
        InputError: both are given, the planner is unknown, or the placement does not fit model and topology, or has no
            room for the KV of `context_tokens`.
    """
    if planner is not None and placement is not None:
        raise InputError("placement", expected="either a planner or a placement", actual="both",
                         remedy="leave one out")  # fmt: skip
    state = ClusterState(arch=arch, topology=topology, context_tokens=context_tokens)
    if placement is not None:
        chosen = placement if isinstance(placement, Placement) else Placement.load(placement)
        if context_tokens:
            check(chosen, state)
        else:
            validate(chosen, arch, topology)
        return chosen, as_codec(codec)
    chooses = make_planner(planner, seed=seed)
    if codec == AUTO:
        state, found = best_codec(chooses, state, lambda each: accuracy_of(each, channel))
        return found, state.codec
    coded = as_codec(codec)
    return chooses.propose(replace(state, codec=coded, accuracy=accuracy_of(coded, channel))), coded


def make_fleet(runtime: str, *, threads: int = 1, start_s: float | None = None) -> Fleet:
    """The fleet of a runtime: threads, processes of this machine, or Ray actors.

    `start_s` is how long processes and actors may take until they listen; None: what the fleet thinks.
    """
    deadline = {} if start_s is None else {"start_s": start_s}
    if runtime == "local":
        return ThreadFleet()
    if runtime == "process":
        return ProcessFleet(threads=threads, **deadline)
    if runtime == "ray":
        return ray_fleet(threads=threads, **deadline)
    raise InputError("runtime", expected=f"one of {list(RUNTIMES)}", actual=runtime, remedy="use one of the three")


def ray_fleet(**options: Any) -> Fleet:
    """The Ray fleet, which lives a floor above, in `actors`: found by the name of its entry point."""
    from importlib import import_module

    return import_module("actors.fleet").RayFleet(**options)


def launch_engine(
    *,
    model: str | Path,
    topology: str | Path | Topology | None = None,
    devices: int | None = None,
    planner: str | Planner | None = None,
    placement: str | Path | Placement | None = None,
    runtime: str = "process",
    seed: int = 0,
    dtype: Dtype = "float32",
    weights: str = AUTO_WEIGHTS,
    sums: str = "fixed",
    fleet: Fleet | None = None,
    spin_s: float = 0.0,
    codec: str = "none",
    channel: str | NoisyChannel | None = None,
    recovery: Recovery | None = None,
    replan: str | Planner | None = None,
    context: int | None = None,
    start_s: float | None = None,
    needs_text: bool = False,
    progress: Progress = lambda _: None,
) -> Engine:
    """Check everything, then start the devices and load the shards.

    Args:
        model: a folder, or `tiny`.
        topology: a file; or give `devices`, a number of equal ones on this machine.
        devices: see topology.
        planner: `NAME`, `NAME:ARG` or `module:Class[:ARG]` (default `even`), or an object; or give `placement`.
        placement: a placement file.
        runtime: `local` (threads), `process` or `ray`.
        seed: seeds the planner.
        dtype: of weights and activations; token identity is promised in float32.
        weights: the format in which devices hold them (weight_formats.py), but for those that name their own; `auto`:
            as they are stored; `best`: as the planner finds best. Rows and sums stay float32.
        sums: `fixed` makes the sums of quantised weights the same bits wherever the pieces are, `fast` does not
            (nor does a channel: its noise differs).
        fleet: use this one and not the runtime's.
        spin_s: how long every receive polls before it sleeps (only where devices <= cores); 0 leaves it to the devices,
            which poll when a frame is due and a core is free.
        codec: how partials and states travel between devices; `none` is exact, `auto` as a planner with V finds best.
        channel: what happens to them on the way (channel.py), a text under the seed 0, or None for nothing.
        recovery: what may be done about lost devices; without one they end the run.
        replan: planner, likewise, that moves the placement as links and devices change, as long as the engine lives.
        context: tokens of the longest request, prompt and answer together: room for its KV is planned, and longer
            ones are refused. None: as long as the model's, and no room is planned.
        start_s: how long a device may take to start; None: 60 s for processes, 120 s for actors.
        needs_text: refuse a model whose tokenizer cannot be used.
        progress: told what is being done.

    Raises:
        InputError: something asked for cannot be; says what.
        DeviceLost: a device did not come up.
    """
    if codec != AUTO:
        as_codec(codec)  # a wrong name is refused before anything starts
    if replan is not None:
        make_planner(replan)  # likewise
    if recovery is not None and recovery.store is not None:
        Store(recovery.store).check()
    way = as_channel(channel) if isinstance(channel, str) else channel
    if way is not None:
        sums = "fast"  # what noise changes is not the same bits anywhere, and it changes float32
    # Starts nothing yet, and refuses an unknown runtime before any work.
    fleet = fleet or make_fleet(runtime, start_s=start_s)
    where = read_topology(topology, devices)
    progress("reading and testing the model")
    tokenizer = needed_tokenizer(model) if needs_text else read_tokenizer(model)
    arch, layout, lean = read_model(model, dtype=dtype, weights=weights, sums=sums, topology=where)
    if context is not None:
        arch = replace(arch, context_tokens=min(context, arch.context_tokens))
    progress("planning")
    tokens = 0 if context is None else arch.context_tokens
    arch, where = settled(arch, where, weights, planner=planner, placement=placement, seed=seed, context_tokens=tokens,
                          sums=sums, lean=lean)  # fmt: skip
    chosen, coded = decide(arch, where, planner=planner, placement=placement, seed=seed, codec=codec, channel=way,
                           context_tokens=tokens)  # fmt: skip
    progress("starting the devices and loading their slices")
    engine = Engine(
        fleet=fleet,
        model_path=model_path(model).resolve(),
        arch=arch,
        layout=layout,
        topology=where,
        placement=chosen,
        tokenizer=tokenizer,
        lean=lean,
        spin_s=spin_s,
        codec=coded,
        channel=way,
        recovery=recovery,
    )
    if replan is not None:
        attend(engine, replan)
    return engine
