"""Plots of a simulation that a person can read. Knows the document of `splitray simulate`, and no planner."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from splitray.results import write_whole

Samples = Mapping[str, Sequence[float]]
_COLOURS = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
_GREY = "0.4"
_MARKERS = "osD^vP*X<>hd"


def latency_plot(latency_s: Samples) -> Figure:
    """The share of requests answered within a time, a line a planner; a long range of times is logarithmic."""
    figure, axes = _figure("Latency of requests", "seconds from arrival to the last token", "share of requests")
    for colour, (name, values) in zip(_colours(), _merged(latency_s).items(), strict=False):
        if not len(ordered := np.sort(np.asarray(values, float))):
            continue
        share = np.arange(len(ordered) + 1) / len(ordered)
        axes.step([ordered[0], *ordered], share, where="post", color=colour, label=name)
    _scale(axes, "x", [t for values in latency_s.values() for t in values])
    axes.set_ylim(0, 1.01)
    _legend(axes)
    return figure


def backlog_plot(time_s: Sequence[float], backlog_tokens: Samples) -> Figure:
    """Output tokens waited for over time, a line a planner."""
    figure, axes = _figure("Backlog", "time, s", "output tokens waited for")
    for colour, (name, values) in zip(_colours(), _merged(backlog_tokens).items(), strict=False):
        axes.plot(time_s, values, color=colour, label=name, linewidth=1.2)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def placement_plot(
    name: str,
    time_s: Sequence[float],
    share_LT: Sequence[Sequence[float]],
    bandwidth_bytes_per_s: Sequence[float],
    device: str,
) -> Figure:
    """What share of each layer a device holds over time, below the bandwidth that the planner saw.

    Times are the beginnings of the slots, [T], the bandwidth is the link's, [T], and shares are of each layer's
    weights, [L, T].
    """
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, map_axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    top.plot(time_s, np.asarray(bandwidth_bytes_per_s) * 8e-6, color=_GREY, linewidth=1)
    top.set(ylabel="Mbit/s", ylim=(0, None))
    top.set_title(f"{name}: share of each layer on {device}", loc="left")
    step = time_s[1] - time_s[0] if len(time_s) > 1 else 1.0
    layers = len(share_LT)
    image = map_axes.imshow(
        np.asarray(share_LT, float), aspect="auto", origin="lower", interpolation="nearest", cmap="cividis",
        vmin=0, vmax=1, extent=(time_s[0], time_s[-1] + step, 0, layers),
    )  # fmt: skip
    map_axes.set(xlabel="time, s", ylabel="layer")
    figure.colorbar(image, ax=map_axes, label=f"share on {device}", fraction=0.04, pad=0.01)
    _plain(top)
    return figure


def energy_plot(energy_j: Mapping[str, float]) -> Figure:
    """Energy of a request, a bar a planner, least first."""
    ordered = sorted(((n, e) for n, e in energy_j.items() if np.isfinite(e)), key=lambda item: item[1])
    figure, axes = _figure("Energy of a request", "joule", "")
    bars = axes.barh([n for n, _ in ordered], [e for _, e in ordered], color=_COLOURS[0])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return figure


def front_plot(latency_s: Mapping[str, float], energy_j: Mapping[str, float]) -> Figure:
    """Mean latency against energy; planners that none beats in both are joined by a line."""
    figure, axes = _figure("Latency against energy", "mean seconds of a request", "joule of a request")
    names = [n for n in latency_s if np.isfinite(latency_s[n]) and np.isfinite(energy_j[n])]
    front = pareto_front([(latency_s[n], energy_j[n]) for n in names])
    axes.plot([p[0] for p in front], [p[1] for p in front], color=_GREY, linewidth=1, linestyle="--", zorder=1)
    points = _merged({n: [latency_s[n], energy_j[n]] for n in names})
    for i, (colour, (name, (x, y))) in enumerate(zip(_colours(), points.items(), strict=False)):
        axes.scatter(x, y, color=colour, marker=_MARKERS[i % len(_MARKERS)], label=name, zorder=2)
    _scale(axes, "x", [latency_s[n] for n in names])
    _scale(axes, "y", [energy_j[n] for n in names])
    axes.margins(0.15)
    _legend(axes)
    return figure


def ratio_plot(title: str, rows: Sequence[str], columns: Sequence[str], ratios: Sequence[Sequence[float]]) -> Figure:
    """Ratios as a map with their numbers, blue below 1 and red above; NaN is a hatched cell, as white means near 1."""
    values = np.asarray(ratios, float)
    figure = Figure(figsize=(2.8 + 0.75 * len(columns), 1.6 + 0.3 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(np.clip(np.log2(values), -3, 3), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            strong = abs(np.log2(value)) > 1.8
            text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if strong else "black")
        elif np.isnan(value):
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="0.93", edgecolor="0.75", hatch="////", lw=0))
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def trade_plot(v: Sequence[float], energy_j: Sequence[float], backlog_tokens: Sequence[float]) -> Figure:
    """What the Lyapunov weight V buys and costs: energy of a request and mean backlog, V on a logarithmic axis."""
    figure, axes = _figure("The trade of V", "V, weight of a joule", "joule of a request")
    axes.plot(v, energy_j, "o-", color=_COLOURS[0])
    axes.set_xscale("log")
    axes.yaxis.label.set_color(_COLOURS[0])
    other = axes.twinx()
    other.plot(v, backlog_tokens, "s--", color=_COLOURS[3])
    other.set_ylim(bottom=0)
    other.set_ylabel("mean backlog, output tokens", color=_COLOURS[3])
    other.spines["top"].set_visible(False)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one coordinate without losing in the other, by the first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def save_plots(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as `NAME.png` into an existing folder."""
    paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_whole(path, picture.getvalue())
    return list(paths)


def _merged(samples: Samples) -> dict[str, Sequence[float]]:
    """Planners that did the very same share one name, as one line would hide the others."""
    found: dict[str, Sequence[float]] = {}
    for name, values in samples.items():
        same = next((n for n, v in found.items() if len(v) == len(values) and np.allclose(v, values)), None)
        found[name if same is None else f"{same},\n{name}"] = values if same is None else found.pop(same)
    return found


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    _plain(axes)
    return figure, axes


def _scale(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Logarithmic over more than a decade, with labels at its powers alone; linear below, and where a value is 0."""
    found = np.asarray(values, float)
    if len(found) and 0 < 10 * found.min() < found.max():
        axes.set(**{f"{which}scale": "log"})
        (axes.xaxis if which == "x" else axes.yaxis).set_minor_formatter(NullFormatter())


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _colours() -> list[Any]:
    """Enough distinct colours for every planner at once."""
    return [*_COLOURS, *mpl.colormaps["Dark2"].colors]  # type: ignore[attr-defined]
