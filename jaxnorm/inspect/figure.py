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
        names = ["".join(c if c.isprintable() else "?" for c in name) for name in names]
        axes.set_xticks(range(1, len(names) + 1), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        for text in axes.get_xticklabels():
            text.set_parse_math(False)
    else:
        axes.set_xlabel(label)


def legend_below(figure: Any, handles: list, title: str) -> None:
    """A legend of one line below all panels."""
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)


def to_rgb(colour: str) -> tuple[float, float, float]:
    """Of "#0072B2"."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
