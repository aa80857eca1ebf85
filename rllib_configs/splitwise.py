"""The policy that ships: one for all devices, models and loads of the catalogue, conditioned on their features."""

from typing import Literal

from splitray.planners.protocol import RequestShape
from splitray.rl.training.recipe import Recipe
from splitray.rl.world.cell import Cell
from splitray.rl.world.weather import Climate

EDGES = ("jetson-orin-nx-16gb", "jetson-orin-nx-8gb", "galaxy-s23", "raspberry-pi-5")
MODELS = ("gpt2-xl", "llama-7b", "llama-13b")
HOLDS: tuple[Literal["none", "embedding_and_head"], ...] = ("none", "embedding_and_head")
LINKS = ("lte", "5g", "wifi5")
CELLS = tuple(Cell(edge, model, holds, link) for model in MODELS for edge in EDGES for holds in HOLDS for link in LINKS)
LONG, SHORT = RequestShape(512.0, 128.0), RequestShape(64.0, 32.0)

# From easy to hard; what a policy is compared on (HELD_OUT) is not among them.
CLIMATES = (
    Climate(cloud_load=0.5, bandwidth_sigma=0.2),
    Climate(cloud_load=0.5, bandwidth_sigma=0.4),
    Climate(cloud_load=0.8, bandwidth_sigma=0.4),
    Climate(cloud_load=0.8, bandwidth_sigma=0.4, arrivals="bursty"),
    Climate(cloud_load=0.8, bandwidth_sigma=0.6),
    Climate(cloud_load=0.95, bandwidth_sigma=0.4),
    Climate(cloud_load=0.95, bandwidth_sigma=0.6, request=LONG),
    Climate(cloud_load=0.8, bandwidth_sigma=0.4, outages=True),
    Climate(cloud_load=0.8, bandwidth_sigma=0.4, rtt_sigma=0.3, request=SHORT),
    Climate(cloud_load=0.95, bandwidth_sigma=0.6, outages=True, arrivals="bursty"),
)
HELD_OUT = (
    Climate(cloud_load=0.8, bandwidth_sigma=0.8),
    Climate(cloud_load=0.95, bandwidth_sigma=0.8, outages=True, rtt_sigma=0.2),
    Climate(cloud_load=0.8, bandwidth_sigma=0.7, arrivals="bursty", request=RequestShape(256.0, 96.0)),
)
COMPARED = (
    Cell("jetson-orin-nx-16gb", "llama-7b", "none", "lte"),
    Cell("galaxy-s23", "gpt2-xl", "none", "5g"),
    Cell("jetson-orin-nx-16gb", "gpt2-xl", "embedding_and_head", "wifi5"),
    Cell("raspberry-pi-5", "llama-13b", "embedding_and_head", "lte"),
)


def splitwise(seed: int = 0) -> Recipe:
    """About twenty minutes on one core, most of it foresight."""
    return Recipe(
        name="splitwise", seed=seed, cells=CELLS, climates=CLIMATES, judged_on=COMPARED, foresight_steps=450,
        iterations=120, learning_rate=5e-4,
    )  # fmt: skip
