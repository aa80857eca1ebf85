"""Whether a family asks of its cache what ours can answer, by a run of its probe with ours. Starts no devices."""

from __future__ import annotations

import traceback

import torch
from torch import nn

from splitray.errors import unsplittable
from splitray.model.kv_cache import KvCache, sliding_windows
from splitray.model.layer_kinds import FAILURES
from splitray.model.probe import Probe


def check_cache_calls(probe: Probe) -> None:
    """Refuse a family whose layers keep more than keys and values.

    Raises:
        ModelError: names the module, and what it asks the cache for.
    """
    layers, ids = probe.model.config.num_hidden_layers, torch.arange(3, 7)[None]
    windows = sliding_windows(probe.model.config, layers)
    cache = KvCache(num_layers=layers, windows=windows, capacity=ids.numel())
    cache.begin(0, ids.numel())
    try:
        with torch.inference_mode():
            probe.model(input_ids=ids, past_key_values=cache, use_cache=True)
    except AttributeError as error:
        where = _module_of(error, probe)
        if error.obj is cache and where is not None:
            what = f"architecture {probe.model.config.model_type}"
            raise unsplittable(what, "layers that keep keys and values", f"{where}: {error.name}") from error
    except FAILURES:
        pass  # what surrounds the layers may want another cache: devices run without it


def _module_of(error: BaseException, probe: Probe) -> str | None:
    """The innermost module of a layer in whose code an error came up; None if it was none of a layer."""
    inside = {m for layer in probe.layers for m in layer.modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = next((m for m in reversed(frames) if isinstance(m, nn.Module) and m in inside), None)
    name = next((n for n, m in probe.model.named_modules() if m is found), None)
    return None if name is None else f"{name} ({type(found).__name__})"
