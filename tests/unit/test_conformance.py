"""The suite of all fleets, over threads and over processes; tests/ray runs it over actors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "ray"))

from conformance import Conformance, Lab, ProcessLab, ThreadLab


class TestThreads(Conformance):
    @pytest.fixture(scope="class")
    def lab(self) -> Lab:
        return ThreadLab()


class TestProcesses(Conformance):
    @pytest.fixture(scope="class")
    def lab(self) -> Lab:
        return ProcessLab()
