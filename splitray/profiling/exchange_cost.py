"""What an exchange costs inside the engine: tokens of the shipped model on one device, in halves and with one cut.

The model is so small that halves of it take as long as the whole: what a token takes more is the exchanges'.
"""

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable

from splitray.profiling.calibration import Model, token_s
from splitray.profiling.named_placements import placements
from splitray.runtime.fleet import ProcessFleet
from splitray.runtime.launch import model_path
from splitray.topology import Topology

_PLACEMENTS = ("split_half", "layer_cut")
_ROUNDS, _NEW_TOKENS = 7, 128


def exchange_cost(*, say: Callable[[str], None]) -> dict[str, float]:
    """Microseconds of an exchange by placement: what a token takes more than on one device, over its exchanges."""
    model = Model(model_path("tiny"), Topology.uniform(2), weights="float32")
    chosen = placements(model.arch, model.topology)
    times = defaultdict[str, list[float]](list)
    with contextlib.ExitStack() as stack:
        say("tiny: an exchange inside the engine")
        engines = {n: stack.enter_context(model.start(chosen[n], ProcessFleet())) for n in ("one_device", *_PLACEMENTS)}
        for _ in range(_ROUNDS):
            for name, engine in engines.items():
                times[name].append(token_s(engine, _NEW_TOKENS))
        alone = statistics.median(times["one_device"])
        return {
            n: (statistics.median(times[n]) - alone) / engines[n].route.exchanges_per_token * 1e6 for n in _PLACEMENTS
        }
