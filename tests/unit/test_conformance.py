"""The suite of all fleets, over threads and over processes; tests/ray runs it over actors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "ray"))

from conformance import FEW, Conformance, Lab, ProcessLab, ThreadLab


class TestThreads(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def lab(cls) -> Lab:
        return ThreadLab()


@pytest.mark.slow
class TestProcesses(Conformance):
    placements = FEW

    @pytest.fixture(scope="class")
    @classmethod
    def lab(cls) -> Lab:
        return ProcessLab()
