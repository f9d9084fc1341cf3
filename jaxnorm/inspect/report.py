"""Every norm of a model in a table, with what is wrong and what is worth knowing."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxnorm.errors import ArgumentError, named
from jaxnorm.inspect.findings import NOTE, WRONG, Settings, count_of, not_finite, of_layer
from jaxnorm.inspect.layers import Layer, layers_of, steps_of
from jaxnorm.inspect.whole import copies, of_model
from jaxnorm.tools.find import NormTable, Where, choose, natural
from jaxnorm.tools.report import Report

COLUMNS = ["norm", "kind", "shape", "updates", "mean max", "var min", "var max", "scale min", "grade", "finding"]


@dataclass(frozen=True)
class Health(Report):
    """What `report` finds: a row for every norm, "wrong", "note" or nothing in its column `grade`.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> health = jn.inspect.report({"bn": {"mean": np.zeros(2), "var": np.array([4.0, -1.0])}})
        >>> health.ok, health.wrong[0]["norm"], health.wrong[0]["finding"]
        (False, 'bn', '1 of 2 variances are negative')
    """

    @property
    def wrong(self) -> tuple[dict[str, Any], ...]:
        """The rows in which something is wrong."""
        return tuple(row for row in self.rows if row["grade"] == WRONG)

    @property
    def notes(self) -> tuple[dict[str, Any], ...]:
        """The rows in which nothing is wrong and something worth knowing."""
        return tuple(row for row in self.rows if row["grade"] == NOTE)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong


@named
def report(
    variables: Any,
    *,
    where: Where = None,
    momentum: float | None = None,
    epsilon: float = 1e-5,
    debias: bool = False,
    updates: int | None = None,
) -> Health:
    """Every norm of a model, and what is wrong with it, by its numbers alone.

        wrong   NaN or infinity; a negative variance; integers as statistics; shapes that do not fit; a mean without var
                statistics lost, or under another name than the parameters
                never updated, where other norms or the parameters have moved
                replicas that differ
                half of the variances below 1e-12; half of the scales 0 where the bias is trained
                a variance above 1e12 or a mean beyond 1e8
                more than half of the initial 0 and 1 left:  momentum^updates > 1/2
        note    variances below epsilon, scales below 1/1000 of the largest, all of them 0
                a model that is not trained; statistics of half precision; 1/20 of the initial 0 and 1 left

    A note is no fault: networks that work well have dead channels and tiny variances. Copies of a model's parameters
    that have no statistics of their own (gradients, an optimizer's moments, averages) are of kind "copy", and searched
    for NaN alone.

    Args:
        variables: any tree that `find_norms` reads: linen variables, nnx.State, a torch state_dict, a checkpoint.
        where: which norms are shown: a pattern, several, or a function of NormLayer. All of them are compared.
        momentum: the part of the old value that was kept in training; None if it is not known, or for a cumulative
            average.
        epsilon: what was added to the variances.
        debias: whether the averages were bias-corrected.
        updates: how many steps the model was trained, for norms that do not count them, as Flax's. None: the `step` of
            a training state or its optimizer's `count`, where the tree has one.

    Returns:
        Health: a Report that prints, shows itself in a notebook, has `to_dict()`, and `ok`, `wrong` and `notes`. `mean
        max` is of absolute values, `scale min` too.

    Raises:
        ArgumentError: when a number is out of range, an array is traced or on another process, or as `find_norms`.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> one, stats = np.array([0.5, 0.8]), {"mean": np.array([0.1, 0.3]), "var": np.array([2.0, 9.0])}
        >>> variables = {
        ...     "params": {"bn1": {"scale": one, "bias": one}, "bn2": {"scale": one, "bias": one}},
        ...     "batch_stats": {"bn1": stats, "bn2": {"mean": np.zeros(2), "var": np.ones(2)}},
        ... }
        >>> health = jn.inspect.report(variables)
        >>> print(health.title)
        2 norms: 1 wrong, 0 with notes
        >>> print(health.wrong[0]["norm"], "|", health.wrong[0]["finding"])
        bn2 | never updated (mean 0, var 1), where bn1 was

    Source: what was seen in issues and in checkpoints; MobileNetV2's (torchvision) set what is no more than a note.

    Differs from: Flax and torch, which load whatever fits in shape. Two sets of statistics under one scale look like
        two replicas: those of SplitBatchNorm are told by "split" in their path, and `where` leaves out others. A norm
        without bias may store its scale minus 1: of those no scale is called dead.
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ArgumentError(f"momentum is the part of the old value that is kept, 0 to 1, got {momentum!r}.")
    if not 0 <= epsilon < np.inf:
        raise ArgumentError(f"epsilon is a number from 0, got {epsilon!r}.")
    steps = steps_of(variables) if updates is None else _whole(updates)
    layers = {layer.path: layer for layer in layers_of(variables)}
    chosen = choose(NormTable(sorted((z.norm for z in layers.values()), key=lambda norm: natural(norm.path))), where)
    copied, settings = copies(list(layers.values())), Settings(momentum, epsilon, debias, steps)
    said = {path: list(not_finite(z) if path in copied else of_layer(z, settings)) for path, z in layers.items()}
    for path, *finding in of_model([z for path, z in layers.items() if path not in copied], steps):
        said[path].append((finding[0], finding[1]))
    rows = [_row(layers[norm.path], said[norm.path]) for norm in chosen]
    for row in rows:
        if row["norm"] in copied:
            row["kind"] = "copy"
    wrong, notes = (sum(row["grade"] == grade for row in rows) for grade in (WRONG, NOTE))
    title = f"{len(rows)} norm{'s' * (len(rows) != 1)}: {wrong} wrong, {notes} with notes"
    averaged = [layers[norm.path] for norm in chosen if layers[norm.path].averaged]
    if momentum and not debias and averaged and steps is None and not any(count_of(layer) for layer in averaged):
        title += "; momentum needs the number of updates, which nothing here counts: give `updates`"
    return Health(title, COLUMNS, rows)


def _whole(updates: Any) -> int:
    try:
        if not isinstance(updates, bool) and operator.index(updates) >= 0:
            return operator.index(updates)  # of NumPy's and JAX's numbers too
    except TypeError:
        pass
    raise ArgumentError(f"updates is a whole number from 0, got {updates!r}.")


def _row(layer: Layer, said: list[tuple[str, str]]) -> dict[str, Any]:
    said = sorted(said, key=lambda one: one[0] != WRONG)
    row: dict[str, Any] = {"norm": layer.path, "kind": layer.norm.kind, "shape": layer.norm.shape}
    row |= {"updates": count_of(layer), "grade": said[0][0] if said else ""}
    row["finding"] = "; ".join(text for _, text in said)
    for column, name, of in (
        ("mean max", "mean", np.max), ("var min", "var", np.min), ("var max", "var", np.max),
        ("scale min", "scale", np.min),
    ):  # fmt: skip
        z = layer.wide(name)
        if z is not None and z.size:
            row[column] = float(of(z if name == "var" else np.abs(z)))
    return row
