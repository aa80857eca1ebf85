from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import RayNodes

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HEAD = {"cloud": 4}
EDGES = {"edge": 2}
OWN = {"edge1": 1}  # a resource with a device's id: only that device sits there


@pytest.fixture(scope="session")
def nodes() -> Iterator[RayNodes]:
    """Three node processes: clouds, edges, and one that only edge1 may use. This process is in their cluster."""
    from actors.cluster import Membership

    with pytest.MonkeyPatch.context() as patch:
        if "RAY_AUTH_MODE" not in os.environ:
            patch.setenv("RAY_AUTH_MODE", "disabled")  # the same for the nodes, this process and the commands it runs
        nodes = RayNodes([HEAD, EDGES, OWN])
        try:
            membership = Membership(address=nodes.address)
            yield nodes
            membership.leave()
        finally:
            nodes.close()
