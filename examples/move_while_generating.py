"""Move half of a model to another device in the middle of a sentence; the sentence stays the same.

Run: python examples/move_while_generating.py
"""

import time

from splitray.planners import ClusterState, make_planner
from splitray.runtime.engine.engine import Engine
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling

PROMPT = "Return a list of"
SAMPLING = Sampling(max_new_tokens=120)


def generate(engine: Engine, *, move: bool) -> list[int]:
    """The tokens of one run; with `move`, the placement changes after a few of them."""
    tokens: list[int] = []
    coming = None
    for token in engine.stream(engine.tokenizer(PROMPT)["input_ids"], SAMPLING):
        tokens.append(token)
        time.sleep(0.002)  # a model of use takes longer; this one would be done before the move
        if move and len(tokens) == 8:
            state = ClusterState(arch=engine.arch, topology=engine.topology, context_tokens=256)
            coming = engine.migrate(make_planner("even").propose(state))  # returns at once
        if coming is not None and coming.done.is_set():
            print(f"moved by token {len(tokens)}; {coming.staged_bytes} B of KV were copied while tokens came")
            coming = None
    return tokens


def main() -> None:
    """Run once on one device, then once more with a move in the middle."""
    with launch_engine(model="tiny", devices=2, planner="edge_only", runtime="local") as engine:
        still = generate(engine, move=False)
        moved = generate(engine, move=True)
        print(engine.tokenizer.decode(moved))
        print(f"epoch {engine.epoch}, equal to the run that stayed: {moved == still}")
        assert moved == still and engine.epoch == 1


if __name__ == "__main__":
    main()
