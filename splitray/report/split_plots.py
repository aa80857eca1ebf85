"""Plots of where to cut: curves with bands, distributions, and clouds of decisions. Knows no policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from splitray.arrays import Floats

_COLOURS = [*mpl.colormaps["tab10"].colors, *mpl.colormaps["Dark2"].colors]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line over x [X] with half of its confidence interval, where there is one."""

    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | None = None


def curves_plot(
    panels: Mapping[str, Mapping[str, Curve]], x: str, y: str, levels: Mapping[str, Mapping[str, float]] | None = None
) -> Figure:
    """A panel each with its curves; `levels` are dotted lines by panel and name."""
    figure, axes = _panels(list(panels), x, y)
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
            ax.plot(curve.x, curve.y, color=colour, label=name, linewidth=1.3)
            if curve.half is not None:
                low, high = np.subtract(curve.y, curve.half), np.add(curve.y, curve.half)
                ax.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
        for style, (name, level) in zip((":", "--", "-."), (levels or {}).get(title, {}).items(), strict=False):
            ax.axhline(level, color="0.4", linestyle=style, linewidth=1, label=name)
        ax.legend(fontsize=7, frameon=False)
    return figure


def violins_plot(panels: Mapping[str, Mapping[str, Floats]], y: str) -> Figure:
    """Distributions side by side, with their means and quartiles."""
    figure, axes = _panels(list(panels), "", y)
    for ax, samples in zip(axes, panels.values(), strict=True):
        places = np.arange(1, len(samples) + 1)
        ax.violinplot(list(samples.values()), places, showextrema=False, widths=0.8)
        for place, values in zip(places, samples.values(), strict=True):
            low, high = np.quantile(values, [0.25, 0.75])
            ax.plot([place, place], [low, high], color="0.2", linewidth=3)
            ax.plot(place, values.mean(), "o", color="white", markeredgecolor="0.2", markersize=5)
        ax.set_xticks(places, list(samples), rotation=30, ha="right", fontsize=8)
    return figure


def decisions_plot(panels: Mapping[str, tuple[str, Floats, Floats]]) -> Figure:
    """Cuts against the strength of the channel, each panel (name of the strength, strengths, cuts), with a LOESS."""
    figure, axes = _panels(list(panels), "", "cut p, layers on the device")
    rng = np.random.default_rng(0)
    for ax, (x_name, noise, cut) in zip(axes, panels.values(), strict=True):
        ax.plot(noise, cut + rng.uniform(-0.25, 0.25, len(cut)), ".", color=_COLOURS[0], alpha=0.35, markersize=4)
        at = np.linspace(noise.min(), noise.max(), 50)
        ax.plot(at, loess(noise, cut.astype(float), at), color=_COLOURS[3], linewidth=2)
        ax.set_xlabel(x_name)
    return figure


def loess(x: Floats, y: Floats, at: Floats, *, span: float = 0.6) -> Floats:
    """Locally weighted lines (Cleveland 1979, tricube weights, no robustness), at some places."""
    count = max(3, round(span * len(x)))
    found = np.empty(len(at))
    for i, place in enumerate(at):
        distance = np.abs(x - place)
        width = max(np.partition(distance, count - 1)[count - 1], 1e-12)
        weight = np.clip(1 - (distance / width) ** 3, 0, None) ** 3
        mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
        spread = (weight * (x - mean_x) ** 2).sum()
        slope = (weight * (x - mean_x) * (y - mean_y)).sum() / spread if spread > 1e-12 else 0.0
        found[i] = mean_y + slope * (place - mean_x)
    return found


def _panels(titles: Sequence[str], x: str, y: str) -> tuple[Figure, list[Any]]:
    columns = 2 if len(titles) in (2, 4) else min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1 + 3.8 * columns, 0.4 + 3.4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in grid[len(titles) :]:
        ax.set_visible(False)
    for ax, title in zip(grid, titles, strict=False):
        ax.set_title(title, loc="left", fontsize=10)
        ax.set(xlabel=x, ylabel=y)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, grid[: len(titles)]
