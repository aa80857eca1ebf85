"""Devices whose clocks disagree by weeks: no time of one is ever compared with a time of another."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from families import family_model
from splits import greedy, link_of

from splitray.runtime.engine.monitor import Monitor
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.fleet import ProcessFleet
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
NEW_TOKENS = 80
WRONG_BY_S = {"edge0": 2e6, "cloud0": 9e6}
LINK_BYTES_PER_S = 200e3


class WrongClocks(ProcessFleet):
    """Each device's process has clocks of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.told = {device: folder / f"{device}.clock" for device in WRONG_BY_S}

    def prefix_of(self, device: str) -> list[str]:
        wrong_clock = str(Path(__file__).with_name("wrong_clock.py"))
        return [sys.executable, wrong_clock, str(WRONG_BY_S[device]), str(self.told[device])]


@pytest.mark.slow
def test_clocks_that_disagree_change_no_token_no_estimate_and_no_recovery(tmp_path) -> None:
    model, fleet = family_model("llama"), WrongClocks(tmp_path)
    recovery = Recovery(store=f"{tmp_path}/kv", every_tokens=8)
    model.save_pretrained(tmp_path / "model")
    with launch_engine(model=tmp_path / "model", devices=2, planner="even", fleet=fleet, recovery=recovery) as engine:
        for device, file in fleet.told.items():
            for said, right in zip(file.read_text().split(), (time.time(), time.monotonic()), strict=True):
                assert float(said) - right == pytest.approx(WRONG_BY_S[device], abs=600), "the clocks are wrong"
        engine.slow_links(LINK_BYTES_PER_S)
        monitor = Monitor(engine)
        monitor.look(engine.now.dials())
        monitor.look(engine.now.dials())
        monitor.look_at_devices()
        seen = monitor.topology()
        for pair in (("edge0", "cloud0"), ("cloud0", "edge0")):
            assert link_of(seen, *pair).bandwidth_bytes_per_s == pytest.approx(LINK_BYTES_PER_S, rel=0.5)
            assert 0 < link_of(seen, *pair).rtt_s < 1.0
        for known in engine.topology.devices:
            assert 0.1 <= seen.device(known.id).compute_flops / known.compute_flops <= 1.0
        tokens = []
        for token in engine.stream(PROMPT, Sampling(max_new_tokens=NEW_TOKENS)):
            tokens.append(token)
            if len(tokens) == 40:
                os.kill(fleet.pid("cloud0"), signal.SIGKILL)
        assert tokens == greedy(model, PROMPT, NEW_TOKENS)
        (fault,) = engine.faults
        assert fault.restarted == ("cloud0",) and fault.recovery_s < 60
        assert fault.replayed <= 24 < 40 + len(PROMPT), "from the newest checkpoint"
        turned = engine.migrate(engine.placement)
        assert turned.done.wait(20) and turned.error is None and turned.copy_s < 20
