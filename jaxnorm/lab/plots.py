"""The three pictures of `jaxnorm compare`, in colours that the colour-blind can tell apart (Okabe and Ito)."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from jaxnorm.inspect.figure import COLOURS, fan, legend_below, log_scale, whole_numbers
from jaxnorm.lab.report import Run, by_norm

STYLES = {  # colour and marker: told apart in grey as well
    "batch": (COLOURS["batch"], "o"),
    "layer": (COLOURS["layer"], "s"),
    "instance": (COLOURS["instance"], "^"),
    "group": (COLOURS["group"], "D"),
    "rms": (COLOURS["RMS"], "v"),
    "none": ("#000000", "x"),
}
OTHERS = ("#56B4E9", "#F0E442", "#999999", "#332288", "#117733", "#882255")  # for any norm beyond these
BY_DEPTH = "convolution, counted from the picture"
OVER_SEEDS = "mean over the seeds; shaded: from the lowest to the highest"


def styles(norms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and marker for each norm: its own, or the next of the others."""
    others = itertools.cycle(zip(OTHERS, "Pp*hX<", strict=True))
    return {norm: STYLES.get(norm) or next(others) for norm in norms}


def draw(folder: Path, runs: list[Run]) -> list[Path]:
    """Writes the pictures for which there is something to show, and returns their paths."""
    pictures = {}
    if any(run.curve for run in runs):
        pictures["curves.png"] = curves(runs)
    if runs:
        pictures["activations.png"] = activations(runs)
        pictures["gradients.png"] = gradients(runs)
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in pictures]


def curves(runs: list[Run]) -> Figure:
    """Training loss and test accuracy by epoch: the mean over the seeds, and the range in the background."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines_by_norm(left, runs, lambda run: [point.loss for point in run.curve])
    lines_by_norm(right, runs, lambda run: [point.test_accuracy for point in run.curve])
    log_scale(left)
    left.set(title="training", xlabel="epoch", ylabel="cross-entropy loss (nats)")
    right.set(title="test, with the running statistics", xlabel="epoch", ylabel="accuracy", ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    legend_below(figure, left.get_legend_handles_labels()[0], OVER_SEEDS)
    return figure


def gradients(runs: list[Run]) -> Figure:
    """Norm of the gradient of each convolution's weights by depth, before and after training."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines_by_norm(left, runs, lambda run: run.before.gradient_norms)
    lines_by_norm(right, runs, lambda run: run.after.gradient_norms if run.after else [])
    log_scale(left)
    left.set(title="before training", xlabel=BY_DEPTH, ylabel="norm of ∂ loss / ∂ weights (nats)")
    right.set(title="after training", xlabel=BY_DEPTH)
    legend_below(figure, left.get_legend_handles_labels()[0], OVER_SEEDS)
    return figure


def activations(runs: list[Run]) -> Figure:
    """Quantiles of what goes into the activations by depth, first seed, a column for each norm."""
    first = {norm: of_norm[0] for norm, of_norm in by_norm(runs).items()}
    figure = Figure(figsize=(max(6, 1 + 2.1 * len(first)), 5.8), layout="constrained")
    grid = figure.subplots(2, len(first), sharex=True, sharey="row", squeeze=False)
    style = styles(first)
    for column, (norm, run) in zip(grid.T, first.items(), strict=True):
        for axes, look in zip(column, (run.before, run.after), strict=True):
            if look:
                fan(axes, np.array(look.quantiles), style[norm][0])
            else:
                axes.text(0.5, 0.5, "not finished", ha="center", transform=axes.transAxes)
        column[0].set_title(norm)
        column[1].set_xlabel("convolution")
    grid[0, 0].set_ylabel("before training\npre-activation (no unit)")
    grid[1, 0].set_ylabel("after training\npre-activation (no unit)")
    key = [
        Line2D([], [], color="0.2", marker=".", label="median"),
        Patch(color="0.6", label="middle half"),
        Patch(color="0.85", label="5 % to 95 %"),
    ]
    legend_below(figure, key, "all values on one batch, first seed")
    return figure


def lines_by_norm(axes: Axes, runs: list[Run], values: Callable[[Run], list[float]]) -> None:
    """A line for each norm, the mean over its seeds, and the range from seed to seed behind it."""
    style = styles(by_norm(runs))
    for norm, of_norm in by_norm(runs).items():
        rows = [values(run) for run in of_norm]
        rows = np.array([row for row in rows if len(row) == len(rows[0])])
        x = np.arange(1, rows.shape[1] + 1)
        colour, marker = style[norm]
        axes.plot(x, rows.mean(axis=0), color=colour, marker=marker, markersize=4, label=norm)
        axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    whole_numbers(axes, max(len(values(run)) for run in runs))
