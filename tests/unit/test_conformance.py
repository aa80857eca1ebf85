"""The suite of all fleets, over threads and over processes; tests/ray runs it over actors."""

from __future__ import annotations

import pytest
from conformance import FEW, Conformance, Lab, ProcessLab, ThreadLab


class TestThreads(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def lab(cls) -> Lab:
        return ThreadLab()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_devices")
@pytest.mark.thin(3, whole="engine")
class TestProcesses(Conformance):
    placements = FEW

    @pytest.fixture(scope="class")
    @classmethod
    def lab(cls) -> Lab:
        return ProcessLab()
