"""`splitray plan`: where a planner would put a model, and what that is predicted to cost."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from splitray.commands import options
from splitray.report.stdout import print_json, stdout_kept
from splitray.results import try_file


def plan(
    model: options.PlanModel,
    topology: options.NeededTopology,
    planner: options.NeededPlanner,
    context: Annotated[int, typer.Option(help="Tokens of KV cache to plan for.", min=1, metavar="N")] = 512,
    codec: options.ChosenCodec = "none",
    channel: options.Channel = "none",
    dtype: options.PlanDtype = None,
    weights: options.PlanWeights = None,
    sums: options.Sums = "fixed",
    seed: options.Seed = 0,
    limit_s: Annotated[
        float,
        typer.Option(help="Seconds to look for the optimum that the gap is to; then the best so far.", metavar="S"),
    ] = 30.0,
    out: Annotated[Path | None, typer.Option(help="Write the placement file.", metavar="FILE")] = None,
    as_json: options.Json = False,
) -> None:
    """Say where a planner would put a model, and what that is predicted to cost."""
    from splitray.planners.priced import priced
    from splitray.report.picture import placement_picture
    from splitray.report.plan import plan_table
    from splitray.runtime.model_arch import read_model_arch
    from splitray.topology import Topology

    if out is not None:
        try_file(out)
    with stdout_kept(as_json):
        where = Topology.load(topology)
        arch = read_model_arch(model, dtype=dtype, weights=weights, sums=sums, topology=where)
        found = priced(
            arch,
            where,
            planner,
            context_tokens=context,
            seed=seed,
            codec=codec,
            channel=channel,
            limit_s=limit_s,
            weights=weights,
            sums=sums,
        )
    if out is not None:
        found.placement.save(out)
    if as_json:
        print_json(found.document())
        return
    console = Console(highlight=False)
    console.print(placement_picture(found.placement, found.arch, where))
    console.print()
    console.print(plan_table(found.document(), where))
