"""Kill a device process in mid-sentence; the rest of the sentence comes from those that are left.

Run: python examples/lose_a_device.py
"""

import os
import signal

from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import ProcessFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling

PROMPT = "The list of"
SAMPLING = Sampling(max_new_tokens=40)


def main() -> None:
    """Run once undisturbed, once with a fault."""
    fleet = ProcessFleet()
    # `replan` says who holds what without the lost device; without it the device would be started anew
    recovery = Recovery(replan="even", fail_back=False)
    with launch_engine(model="tiny", devices=3, planner="even", fleet=fleet, recovery=recovery) as engine:
        ids = engine.tokenizer(PROMPT)["input_ids"]
        undisturbed = list(engine.stream(ids, SAMPLING))

        tokens: list[int] = []
        victim = engine.topology.ids[1]
        for token in engine.stream(ids, SAMPLING):
            tokens.append(token)
            if len(tokens) == 10:
                os.kill(fleet.pid(victim), signal.SIGKILL)
                print(f"killed {victim} after {len(tokens)} tokens")

        print(f"left: {', '.join(engine.placement.devices)}; epoch {engine.epoch}")
        print(engine.tokenizer.decode(tokens))
        print(f"equal to the undisturbed run: {tokens == undisturbed}")
        assert tokens == undisturbed and victim not in engine.placement.devices


if __name__ == "__main__":
    main()
