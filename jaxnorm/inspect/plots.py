"""Pictures of what norms hold, how it drifts in training, and of what a network computes by depth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxnorm.errors import ArgumentError, named
from jaxnorm.inspect.figure import (
    COLOURS,
    DARK,
    cross_key,
    crosses,
    fan,
    fan_key,
    figure,
    legend_below,
    log_scale,
    named_layers,
    short,
    to_rgb,
)
from jaxnorm.inspect.layers import Layer, host, layers_of
from jaxnorm.tools.find import NormTable, Where, choose, natural

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WHOLE = (0.0, 0.25, 0.5, 0.75, 1.0)
FORWARD, BACKWARD = COLOURS["batch"], COLOURS["layer"]
FIRST, LAST = "#56B4E9", "#882255"  # of lines by depth


@named
def plot_statistics(variables: Any, *, where: Where = None, epsilon: float = 1e-5) -> Any:
    """A picture of the numbers in the norms of a model, layer by layer: running means, variances, scales.

        over the channels of each norm: minimum, quartiles, maximum

    Variances are drawn in decades, with epsilon as a line: below it a channel's gain is set by epsilon. A red cross
    marks a norm of which some numbers cannot be drawn: NaN, infinity, a variance that is not above 0.

    Args:
        variables: any tree that `find_norms` reads.
        where: which norms: a pattern, several, or a function of NormLayer.
        epsilon: where the line is.

    Returns:
        A matplotlib Figure: a panel for each of mean, variance and scale that there is.

    Raises:
        ArgumentError: when there is no norm, or matplotlib is missing.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> variables = {"bn": {"mean": np.array([0.0, 1.0]), "var": np.array([0.5, 2.0])}}
        >>> len(jn.inspect.plot_statistics(variables).axes)
        2

    Source: the five numbers are those of Tukey 1977, "Exploratory Data Analysis".

    Differs from: `report`, which has the same numbers as a table.
    """
    layers = _chosen(variables, where)
    panels = {
        name: title for name, title in (("mean", "running mean"), ("var", "running variance"), ("scale", "scale"))
        if any(name in layer.values or (name, layer.norm.kind) == ("var", "whitening") for layer in layers)
    }  # fmt: skip
    if not panels:
        raise ArgumentError("the norms hold no mean, no variance and no scale.")
    picture = figure(max(6.5, min(14.0, 2 + 0.33 * len(layers))), 0.9 + 2.3 * len(panels))
    rows = picture.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    marked = False
    for axes, (name, title) in zip(rows, panels.items(), strict=True):
        values = [layer.wide(name) for layer in layers]
        if name == "var":
            values = [None if z is None else np.where(z > 0, z, np.nan) for z in values]
        fan(axes, np.array([_quantiles(z, WHOLE) for z in values]), FORWARD)
        axes.set_ylabel(title)
        if name == "var" and epsilon > 0:
            axes.axhline(epsilon, color=DARK, linewidth=1, linestyle="--")
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "fontsize": 8}
            axes.annotate("epsilon", (0.995, epsilon), **place)
            log_scale(axes)
            lowest = np.nanmin([np.inf, *(z for values in axes.lines[:-1] for z in values.get_ydata())])
            axes.set_ylim(bottom=min(lowest, epsilon) / 100)
        lost = [i for i, z in enumerate(values, 1) if z is not None and not np.isfinite(z).all()]
        if lost:
            crosses(axes, lost)
            marked = True
    named_layers(rows[-1], [layer.path for layer in layers], "norm, in the order of the report")
    key = fan_key(FORWARD, "least to largest") + marked * [cross_key("not finite, or var \u2264 0")]
    legend_below(picture, key, "over the channels of each norm")
    return picture


@named
def plot_drift(states: Sequence[Any], steps: Sequence[float] | None = None, *, where: Where = None) -> Any:
    """A picture of running statistics over training: how far each norm's were from where they ended.

        means      rms_c (mean_t - mean_T) / sqrt(var_T)
        variances  rms_c log(var_t / var_T)

    A line that has not come down at the end is a norm whose statistics are still on their way. A gap in one is a state
    of which nothing is finite, and of variances none above 0; the title counts such norms.

    Args:
        states: the variables, or the statistics alone, at several steps, in order. All have the same norms.
        steps: at which; 0, 1, 2, ... by default.
        where: which norms: a pattern, several, or a function of NormLayer.

    Returns:
        A matplotlib Figure of two panels, a line for each norm, from the first (light) to the last (dark).

    Raises:
        ArgumentError: when there are fewer than two states, none has a batch norm, they differ in their norms, steps
            are not as many, or matplotlib is missing.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> states = [{"bn": {"mean": np.array([m]), "var": np.array([4.0])}} for m in (0.0, 3.0, 4.0)]
        >>> figure = jn.inspect.plot_drift(states, [0, 100, 200])
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0, 0.5, 0.0]

    Source: the distances are those of `watch`.

    Differs from: `watch`, which compares with batches: this compares statistics with themselves, later.
    """
    states = list(states)
    at = list(range(len(states))) if steps is None else list(steps)
    if len(states) < 2 or len(at) != len(states):
        raise ArgumentError(f"needs two states or more, and a step for each, got {len(states)} and {len(at)} steps.")
    by_state = [{z.path: z for z in _chosen(s, where) if {"mean", "var"} <= z.values.keys()} for s in states]
    paths = list(by_state[-1])
    if not paths:
        raise ArgumentError("there is no batch norm among the states: no `mean` beside a `var`.")
    for i, found in enumerate(by_state):
        shapes = [{path: z.values["mean"].shape for path, z in one.items()} for one in (found, by_state[-1])]
        if shapes[0] != shapes[1]:
            raise ArgumentError(f"state {i} has other norms, or of other shapes, than the last one.")
    picture = figure(10, 4.2)
    left, right = picture.subplots(1, 2)
    for i, (path, label) in enumerate(zip(paths, short(paths), strict=True)):
        means, variances = (np.stack([one[path].wide(name) for one in by_state]) for name in ("mean", "var"))
        colour = _between(i / max(1, len(paths) - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            for axes, apart in (
                (left, (means - means[-1]) / np.sqrt(variances[-1])), (right, np.log(variances) - np.log(variances[-1]))
            ):  # fmt: skip
                axes.plot(at, _rms(apart), color=colour, marker=".", label=label)
    left.set(xlabel="step", ylabel="distance from the last (standard deviations)")
    right.set(xlabel="step", ylabel="|log ratio| to the last (nats)")
    for axes, title in ((left, "means"), (right, "variances")):
        gaps = sum(bool(np.isnan(line.get_ydata()).any()) for line in axes.lines)
        axes.set_title(title + f", with gaps in {gaps} of {len(paths)}: not finite" * (gaps > 0))
        axes.grid(alpha=0.3)
    lines = left.get_lines()
    ends = lines if len(lines) <= 5 else [lines[0], lines[-1]]
    legend_below(picture, ends, "norms" if len(lines) <= 5 else f"the first and the last of {len(lines)} norms")
    for text in picture.legends[0].get_texts():
        text.set_parse_math(False)
    return picture


@named
def plot_depth(activations: Any, gradients: Any = None) -> Any:
    """A picture of how activations, and gradients, are distributed in each layer, by depth.

        5 %, 25 %, 50 %, 75 % and 95 % of the values of each array; of gradients, of their absolute values

    A net whose bands narrow, widen or leave zero with depth does not train: which norm prevents it is seen at sight.

    Args:
        activations: arrays, one a layer, front to back: a list, a dict, or a tree such as sown `intermediates` or
            gradients of params, whose leaves are taken in the order of their paths (layer 10 after layer 2).
        gradients: likewise; a second panel, in decades.

    Returns:
        A matplotlib Figure.

    Raises:
        ArgumentError: when there is no array in a tree, or matplotlib is missing.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> figure = jn.inspect.plot_depth({"a": np.arange(5.0), "b": np.arange(5.0) * 10})
        >>> figure.axes[0].lines[0].get_ydata().tolist()  # the medians
        [2.0, 20.0]

    Source: Glorot and Bengio 2010, figures 2 and 6, which show layers so.

    Differs from: `jaxnorm compare`, which draws these for its own nets.
    """
    trees = {"activation": activations} | ({} if gradients is None else {"|gradient|": gradients})
    picture = figure(5.5 * len(trees) + 1, 4.4)
    panels = picture.subplots(1, len(trees), squeeze=False)[0]
    for axes, (title, tree), colour in zip(panels, trees.items(), (FORWARD, BACKWARD), strict=False):
        arrays = _in_order(tree)
        change: Callable = np.abs if title == "|gradient|" else np.asarray
        fan(axes, np.array([_quantiles(change(z), QUANTILES) for z in arrays.values()]), colour)
        axes.set_ylabel(title)
        if title == "|gradient|":
            log_scale(axes)
        else:
            axes.axhline(0, color=DARK, linewidth=0.8)
        named_layers(axes, list(arrays), "layer, front to back")
    legend_below(picture, fan_key(DARK), "all values of each layer")
    return picture


def _chosen(variables: Any, where: Where) -> list[Layer]:
    layers = {layer.path: layer for layer in layers_of(variables)}
    chosen = choose(NormTable(sorted((z.norm for z in layers.values()), key=lambda norm: natural(norm.path))), where)
    if not chosen:
        raise ArgumentError("there is no norm among the variables. See find_norms.")
    return [layers[norm.path] for norm in chosen]


def _in_order(tree: Any) -> Mapping[str, np.ndarray]:
    """The arrays of a dict in its own order, of any other tree by their paths."""
    if isinstance(tree, Mapping) and all(hasattr(z, "shape") for z in tree.values()):
        arrays = {str(key): host(z, (jax.tree_util.DictKey(key),)) for key, z in tree.items()}
    else:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        found = {jax.tree_util.keystr(at, simple=True, separator="/"): host(leaf, at) for at, leaf in leaves}
        arrays = {name: found[name] for name in sorted(found, key=natural)}
    if not arrays:
        raise ArgumentError("there is no array to draw.")
    return arrays


def _quantiles(z: np.ndarray | None, at: Sequence[float]) -> list[float]:
    """Of what is finite; NaN, which is not drawn, where nothing is."""
    if z is None:
        return [np.nan] * len(at)
    z = np.abs(z) if np.iscomplexobj(z) else z.astype(np.float64)
    z = z[np.isfinite(z)]
    return np.quantile(z, at).tolist() if z.size else [np.nan] * len(at)


def _rms(z: np.ndarray) -> np.ndarray:
    """Along the first dimension, of what is finite; NaN where nothing is."""
    flat = np.abs(z.reshape(len(z), -1))
    some = np.isfinite(flat)
    with np.errstate(invalid="ignore"):
        return np.sqrt((np.where(some, flat, 0) ** 2).sum(1) / some.sum(1))


def _between(part: float) -> tuple[float, ...]:
    return tuple(a + part * (b - a) for a, b in zip(to_rgb(FIRST), to_rgb(LAST), strict=True))
