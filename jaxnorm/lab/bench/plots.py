"""The picture of `jaxnorm bench`, in colours that the colour-blind can tell apart (Okabe and Ito)."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jaxnorm.lab.bench.report import TITLES
from jaxnorm.lab.bench.timing import WAYS

COLOURS = {
    "jaxnorm": "#000000",
    "flax.linen": "#0072B2",
    "flax.nnx": "#56B4E9",
    "haiku": "#009E73",
    "equinox": "#F0E442",
    "keras": "#D55E00",
    "torch": "#CC79A7",
}


def draw(path: Path, results: dict[str, Any]) -> None:
    """Bars by norm and framework, a panel for each way and dtype, and a line at the limit."""
    rows = results["times_limit"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(12, 1.5 + 3.2 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(WAYS), sharey=True, squeeze=False)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, way in zip(line, WAYS, strict=True):
            bars(axes, [row for row in rows if (row["dtype"], row["way"]) == (dtype, way)])
            axes.set_title(f"{TITLES[way]}, {dtype}")
        line[0].set_ylabel("times the limit")
    machine = results["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores" if machine["platform"] == "cpu" else machine["chip"]
    figure.suptitle(f"Geometric mean over the shapes; the line is the limit of memory traffic. {where}", fontsize=11)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    names = [name for name in COLOURS if any(row["peer"] == name for row in rows)]
    width = 0.85 / max(1, len(names))
    for i, name in enumerate(names):
        height = {row["norm"]: row["times_limit"] for row in rows if row["peer"] == name}
        at = {norm: norms.index(norm) + (i - (len(names) - 1) / 2) * width for norm in height}
        axes.bar(list(at.values()), list(height.values()), width, label=name, color=COLOURS[name])
    axes.axhline(1, color="#444444", linewidth=1.2, linestyle="--")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(range(len(norms)), norms)
    axes.spines[["top", "right"]].set_visible(False)
