"""Pictures of a sweep. One colour scale in all of them: dark is good, and a value the same colour everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogLocator, MaxNLocator

from depthkit.sweeps.results import Sweep, Trial, is_number

COLORS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, 256)))
GREY, RED = "0.72", "tab:red"
DPI = 150
MAX_VALUES = 7
"""A parameter of at most so many values has a tick at each of them."""


@dataclass
class Axis:
    """Values of a parameter on [0, 1]."""

    name: str
    values: list[Any]
    log: bool = False

    def __post_init__(self) -> None:
        self.is_numeric = all(map(is_number, self.values))
        self.distinct: list[Any] = (
            sorted(set(self.values)) if self.is_numeric else sorted({str(value) for value in self.values})
        )

    def position(self, value: Any) -> float:
        if not self.is_numeric:
            return (self.distinct.index(str(value)) + 0.5) / len(self.distinct)
        low, high, here = (float(np.log(x) if self.log else x) for x in (self.distinct[0], self.distinct[-1], value))
        return 0.5 if low == high else (here - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        if not self.is_numeric or len(self.distinct) <= MAX_VALUES:
            shown = self.distinct
        else:
            low, high = self.distinct[0], self.distinct[-1]
            locator: Any = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1, 3)) if self.log else MaxNLocator(6)
            shown = [x for x in locator.tick_values(low, high) if low <= x <= high]
        return [(self.position(x), f"{x:.4g}" if self.is_numeric else str(x)) for x in shown]


@dataclass
class Scale:
    """Values from the best to one as far above the median as the best is below: a trial that diverged would otherwise
    leave one colour to all others. Those beyond are drawn at the end."""

    best: float
    end: float
    is_cut: bool

    @classmethod
    def of(cls, sweep: Sweep) -> "Scale":
        values = [trial.value or 0.0 for trial in sweep.complete]
        end = min(max(values), 2 * float(np.median(values)) - min(values)) if len(values) > 2 else max(values)
        return cls(min(values), end, end < max(values))

    def cut(self, value: float) -> float:
        return min(value, self.end)

    def color(self, value: float) -> Any:
        return COLORS(0.0 if self.end == self.best else (self.cut(value) - self.best) / (self.end - self.best))


def draw(sweep: Sweep, importance: Mapping[str, float], out: Path) -> None:
    """Write those pictures that there is something to show on."""
    if sweep.complete:
        save(draw_parallel(sweep), out / "parallel_coordinates.png")
        save(draw_history(sweep), out / "history.png")
    if importance:
        save(draw_importance(sweep, importance), out / "importance.png")


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and may ask for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def counts(sweep: Sweep) -> str:
    states = [trial.state for trial in sweep.trials]
    parts = [
        f"{states.count(name)} {name}" for name in ("complete", "pruned", "failed", "unfinished") if name in states
    ]
    return f"{sweep.folder.name}: " + ", ".join(parts)


# --- parallel coordinates --------------------------------------------------------------------------------------------


def draw_parallel(sweep: Sweep) -> Any:
    """A line for each trial through its settings; of complete ones on to the value, in its colour."""
    scale = Scale.of(sweep)
    axes = []
    for name in sweep.params:
        values = [trial.params[name] for trial in sweep.trials if name in trial.params]
        axes.append(Axis(name, values, log=name in sweep.log_params))
    axes.append(Axis(sweep.metric, sorted({scale.cut(trial.value or 0.0) for trial in sweep.complete})))
    figure, plot = new_figure(1.5 + 2.0 * len(axes), 5.0)
    for trial in [each for each in sweep.trials if each.state != "complete"] + sweep.complete[::-1]:
        draw_line(plot, trial, axes, scale, is_best=trial is sweep.complete[0])
    for x, axis in enumerate(axes):
        draw_axis(plot, x, axis, side=1 if axis is axes[-1] else -1)
    if scale.is_cut:
        plot.text(len(axes) - 0.965, 1.0, f"{scale.end:.3g} or more", va="center", fontsize=8)
    plot.set_xlim(-0.5, len(axes) - 0.5)
    plot.set_ylim(-0.05, 1.05)
    plot.set_axis_off()
    figure.suptitle(f"{counts(sweep)}  (grey: pruned or unfinished, red: failed, thick: the best)", fontsize=10)
    return figure


def draw_line(plot: Any, trial: Trial, axes: list[Axis], scale: Scale, *, is_best: bool) -> None:
    points = [
        (x, axis.position(trial.params[axis.name])) for x, axis in enumerate(axes[:-1]) if axis.name in trial.params
    ]
    if trial.state == "complete":
        points.append((len(axes) - 1, axes[-1].position(scale.cut(trial.value or 0.0))))
        style: dict[str, Any] = {"color": scale.color(trial.value or 0.0), "linewidth": 3.0 if is_best else 1.2}
    else:
        style = {"color": RED if trial.state == "failed" else GREY, "linewidth": 1.0, "linestyle": "--"}
    plot.plot(*zip(*points, strict=True), alpha=0.9, solid_capstyle="round", **style)


def draw_axis(plot: Any, x: int, axis: Axis, *, side: int) -> None:
    """`side`: of the labels, -1 left or 1 right."""
    plot.plot([x, x], [0, 1], color="0.2", linewidth=1.0, zorder=3)
    for position, text in axis.ticks():
        plot.plot([x + 0.02 * side, x], [position, position], color="0.2", linewidth=1.0, zorder=3)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        plot.text(
            x + 0.035 * side,
            position,
            text,
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=8,
            zorder=4,
            bbox=box,
        )
    label = axis.name.replace("/", "\n") if "/" in axis.name else axis.name.replace(".", ".\n")
    plot.text(x, 1.04, label, ha="center", va="bottom", fontsize=9)


# --- history and importance ------------------------------------------------------------------------------------------


def draw_history(sweep: Sweep) -> Any:
    """Values in the order of the trials, and the best so far."""
    scale = Scale.of(sweep)
    figure, plot = new_figure(8.0, 4.5)
    in_order = [trial for trial in sweep.trials if trial.state == "complete"]
    numbers = [trial.number for trial in in_order]
    values = [trial.value or 0.0 for trial in in_order]
    cut = [scale.cut(value) for value in values]
    plot.step(numbers, np.minimum.accumulate(cut), where="post", color="0.2", linewidth=1.0, label="best so far")
    plot.scatter(numbers, cut, c=[scale.color(value) for value in values], s=40, zorder=3, label="complete")
    pruned = [
        (trial.number, scale.cut(trial.value)) for trial in sweep.trials if trial.state == "pruned" and trial.value
    ]
    if pruned:
        plot.scatter(*zip(*pruned, strict=True), marker="v", color=GREY, s=36, label="pruned, last value")
    failed = [(trial.number, scale.end) for trial in sweep.trials if trial.state == "failed"]
    if failed:
        plot.scatter(*zip(*failed, strict=True), marker="x", color=RED, s=36, label="failed")
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.set_xlabel("trial")
    plot.set_ylabel(
        sweep.metric.replace("/", "\n") + (f"\n(above {scale.end:.3g}: drawn there)" if scale.is_cut else "")
    )
    plot.grid(axis="y", color="0.92")
    plot.set_axisbelow(True)
    plot.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.suptitle(counts(sweep), fontsize=10)
    return figure


def draw_importance(sweep: Sweep, importance: Mapping[str, float]) -> Any:
    """Share of each parameter in what makes the best trials."""
    names = sorted(importance, key=lambda name: importance[name])
    figure, plot = new_figure(8.0, 1.5 + 0.4 * len(names))
    bars = plot.barh(names, [importance[name] for name in names], color=COLORS(0.3))
    plot.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    plot.set_xlim(0, 1.1)
    plot.set_xlabel("share in what the best tenth of the trials have in common (PED-ANOVA)")
    plot.spines[["top", "right"]].set_visible(False)
    figure.suptitle(counts(sweep), fontsize=10)
    return figure
