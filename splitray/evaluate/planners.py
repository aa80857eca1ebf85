"""The suite `planners`: every planner but the learned ones, over traces, on clusters, and against the optimum."""

from collections.abc import Sequence

from splitray.evaluate.clusters import boards, gaps_to_optimum, many_devices
from splitray.evaluate.options import Options, Tell
from splitray.evaluate.traces import (
    EDGES,
    EVERY,
    HOLDS,
    LOAD,
    MODELS,
    ONLINE,
    REQUESTS,
    latencies,
    pairwise,
    summary,
    trace_cells,
)
from splitray.evaluate.trade import trade_of_v
from splitray.report.document import Cell, Number, Report, Table
from splitray.report.plots import ratio_plot
from splitray.report.simulation import plots_of


def run(options: Options, tell: Tell) -> Report:
    """The whole suite; about three minutes on one core with the defaults.

    Raises:
        InputError: a trace or the arrivals cannot be used.
    """
    cells = list(trace_cells(options, tell))
    tell("a cluster on one network")
    tables = [summary(cells, h) for h in HOLDS] + [latencies(cells, h) for h in HOLDS] + [pairwise(cells)]
    tables.append(options.done.of("boards", boards))
    tell("small instances against the optimum")
    tables += [options.done.of(of.__name__, of) for of in (gaps_to_optimum, many_devices)]
    tell("a sweep of V")
    sweep, figures = options.done.of("trade of V", lambda: trade_of_v(options.seed))
    tables += [sweep, _claims(tables)]
    shown = next(c for c in cells if (c.edge, c.model, c.holds) == (EDGES[0], MODELS[0], HOLDS[1]))
    trace = next(iter(shown.outcomes))[0]
    plots = plots_of([o for (t, _), o in shown.outcomes.items() if t == trace])
    rows = [f"{c.name}{' *' if c.holds != 'none' else ''}" for c in cells]
    ratios = [[c.ratio(p, "cloud_only") for p in ONLINE] for c in cells]
    title = "mean latency over cloud_only's (* the origin holds embedding and head)"
    plots = {"ratios": ratio_plot(title, rows, ONLINE, ratios), **plots, "trade": figures}
    caption = f"{shown.name}, origin holds embedding and head, trace {trace}; simulated."
    return Report(
        title="Planners side by side",
        facts={
            "traces": ", ".join(dict.fromkeys(t for c in cells for t, _ in c.outcomes)),
            "arrivals": options.arrivals or f"Poisson, {LOAD} of what a static cut serves, 128 + 64 tokens on average",
            "slots": f"{options.slots}, every {EVERY}th decides; of 1 s, or longer for {REQUESTS} requests a run",
            "seed": options.seed,
            "link": "rates of the trace, both ways; round trip of LTE to a cloud, 74 ms",
            "cloud": "one A100 80 GB, used by this one line of requests; bf16 weights, staged on both sides",
        },
        tables=tuple(tables),
        plots=plots,
        captions={n: caption for n in plots}
        | {"ratios": f"{title}; simulated.", "trade": "A phone and a small Jetson, simulated."},
    )


def _claims(tables: Sequence[Table]) -> Table:
    """What the papers say, as far as it is known, beside ours."""
    gaps = next(t for t in tables if t.title.startswith("Gap to the optimum"))
    myopic = next(r for r in gaps.rows if r[0] == "myopic:paper")
    large = {str(r[0]): r for r in next(t for t in tables if "25 random" in t.title).rows}
    rows: tuple[tuple[Cell, ...], ...] = (
        ("head-level heuristic against the exact optimum, 3-5 devices (arXiv 2505.02533)",
         Number(None, "", "paper", "within 15-20 %"), myopic[1]),
        ("Greedy and Round-Robin above the optimum (the same)", Number(None, "", "second-hand", "40-60 %"),
         next(r for r in gaps.rows if r[0] == "greedy")[1]),
        ("head-level over layer-wise (EdgeShard) at 25 devices (the same)",
         Number(None, "", "second-hand", "9-10x faster"), large["layer_dp:paper"][2]),
        ("decision every token: its share of a token's time (the same)",
         Number(None, "", "second-hand", "supported"), large["myopic:paper"][5]),
    )  # fmt: skip
    note = (
        "Ours: myopic:paper in its own space of heads, and layer_dp:paper. The 9-10x cannot come from the code that "
        "its author released, whose layer-wise baselines place nothing."
    )
    return Table("Claims of the papers beside ours", ("claim", "theirs", "ours"), rows, note)
