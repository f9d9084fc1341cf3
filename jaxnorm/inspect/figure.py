"""What the pictures share. A figure belongs to nobody but its caller: no pyplot, nothing is shown, nothing leaks."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxnorm.errors import ArgumentError

# Okabe and Ito's, which the colour-blind can tell apart. A norm has the same one in every picture.
COLOURS = {
    "batch": "#0072B2", "layer": "#D55E00", "instance": "#009E73", "group": "#CC79A7", "RMS": "#E69F00",
}  # fmt: skip
OTHER = "#56B4E9"
DARK = "#222222"
CROSS: dict[str, Any] = {"color": "#CC0000", "marker": "x", "markeredgewidth": 2.5, "markersize": 8, "linestyle": ""}
LONG = 28  # characters


def figure(width: float, height: float) -> Any:
    """An empty figure, of these inches, that shows itself in a notebook."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError('pictures need matplotlib: pip install "jaxnorm[lab]"') from None

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=120)
            return out.getvalue()

    return Picture(figsize=(width, height), layout="constrained")


def fan(axes: Any, quantiles: np.ndarray, colour: str) -> None:
    """Quantiles (depth, 5) as two bands and the median."""
    depth = np.arange(1, len(quantiles) + 1)
    low, lower, median, upper, high = quantiles.T
    axes.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.fill_between(depth, lower, upper, color=colour, alpha=0.4, linewidth=0)
    axes.plot(depth, median, color=colour, marker=".")
    drawn = np.pad(np.isfinite(median), 1)
    alone = drawn[1:-1] & ~drawn[:-2] & ~drawn[2:]  # without a neighbour a band has no width
    if alone.any():
        axes.vlines(depth[alone], low[alone], high[alone], color=colour, alpha=0.3, linewidth=2)
        axes.vlines(depth[alone], lower[alone], upper[alone], color=colour, alpha=0.5, linewidth=5)
    whole_numbers(axes, len(depth))


def fan_key(colour: str, ends: str = "5 % to 95 %") -> list[Any]:
    """What the bands of `fan` are, for a legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=colour, marker=".", label="median"),
        Patch(color=colour, alpha=0.55, label="middle half"),
        Patch(color=colour, alpha=0.2, label=ends),
    ]


def crosses(axes: Any, at: Sequence[int]) -> None:
    """Marks at the bottom edge, of what cannot be drawn. Call it last."""
    axes.plot(at, np.zeros(len(at)), transform=axes.get_xaxis_transform(), clip_on=False, zorder=9, **CROSS)


def cross_key(label: str) -> Any:
    """What the crosses are, for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **CROSS)


def log_scale(axes: Any) -> None:
    """A logarithmic y axis, where there is a value to show: nets may have diverged to NaN."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log")


def whole_numbers(axes: Any, last: int) -> None:
    """An x axis from 1 to last, with ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.7, max(last, 1) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def named_layers(axes: Any, names: Sequence[str], label: str) -> None:
    """The names of the layers under an x axis, where there is room for them, else numbers."""
    if len(names) <= 24:
        style = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
        axes.set_xticks(range(1, len(names) + 1), short(names), **style)
        for text in axes.get_xticklabels():
            text.set_parse_math(False)
    else:
        axes.set_xlabel(label)


def short(names: Sequence[str]) -> list[str]:
    """Names as they can be drawn: where one is long, all without the path that they share, and without their middle
    unless two would be alike."""
    names = ["".join(c if c.isprintable() else "?" for c in name) for name in names]
    if all(len(name) <= LONG for name in names):
        return names
    paths = [name.split("/") for name in names]
    while len(paths) > 1 and all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    names = ["/".join(path) for path in paths]
    cut = [name if len(name) <= LONG else f"{name[: LONG // 2 - 2]}...{name[1 - LONG // 2 :]}" for name in names]
    return [name if cut.count(less) > 1 else less for name, less in zip(names, cut, strict=True)]


def legend_below(figure: Any, handles: list, title: str) -> None:
    """A legend below all panels, of one line where its names are short."""
    columns = len(handles) if sum(len(handle.get_label()) for handle in handles) <= 90 else 1
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=max(1, columns), frameon=False)


def to_rgb(colour: str) -> tuple[float, float, float]:
    """Of "#0072B2"."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
