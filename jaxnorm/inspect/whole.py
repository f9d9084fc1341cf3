"""What is wrong with a norm, told by the others: statistics lost, renamed, never updated, of devices apart."""

import difflib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from jaxnorm.inspect.findings import NOTE, WRONG, count_of, initial
from jaxnorm.inspect.layers import Layer
from jaxnorm.tools.find import STATE

CALLED_BATCH = re.compile(r"(?<!virtual)(?<!virtual_)batch\w*norm|(?<![a-z])bn|bn(?![a-z])", re.IGNORECASE)
COPY = re.compile(r"ema|av(era)?g|swa|polyak|shadow|target|teacher", re.IGNORECASE)
ALIKE = 0.6  # of difflib, for one name to be another, misspelled

Placed = tuple[str, str, str]  # path, grade, text


def of_model(layers: Sequence[Layer], steps: int | None = None) -> Iterator[Placed]:
    """Path, grade and text of each finding."""
    yield from _never_updated(layers, steps)
    yield from _replicas(layers)
    yield from _apart(layers)


def _never_updated(layers: Sequence[Layer], steps: int | None) -> Iterator[Placed]:
    averaged = [layer for layer in layers if layer.averaged]
    fresh = [layer for layer in averaged if initial(layer)]
    others = [layer.path for layer in averaged if not initial(layer)]
    trained = [layer.path for layer in layers if _moved(layer)]
    for layer in fresh:
        if others:
            more = f" and {len(others) - 1} more were" if len(others) > 1 else " was"
            yield layer.path, WRONG, f"never updated (mean 0, var 1), where {others[0]}{more}"
        elif trained:
            yield (
                layer.path,
                WRONG,
                f"never updated (mean 0, var 1), though {trained[0]} is trained: was the new state thrown away?",
            )
        elif count_of(layer):
            yield layer.path, WRONG, f"never updated (mean 0, var 1), though it counts {count_of(layer)} updates"
        elif steps:
            yield layer.path, WRONG, f"never updated (mean 0, var 1), after {steps} steps"
        else:
            yield layer.path, NOTE, "never updated (mean 0, var 1), like a model that is not trained yet"


def _moved(layer: Layer) -> bool:
    """Whether its parameters are other than what they start from, which is one number for all channels."""
    own = [z for z in map(layer.wide, ("scale", "bias")) if z is not None and z.size]
    return any(bool((z != z.flat[0]).any()) for z in own)


def _replicas(layers: Sequence[Layer]) -> Iterator[Placed]:
    """A dimension more than scale has, the same in every norm; or scales that are the same along the first."""
    sizes, found = set(), []
    for layer in layers:
        if layer.norm.kind != "batch" or re.search("split", layer.path, re.IGNORECASE):
            continue
        mean, var = layer.values["mean"], layer.values["var"]
        scale = layer.values.get("scale", layer.values.get("bias"))
        if scale is None or mean.ndim < 2 or mean.shape != var.shape or not mean.size:
            continue
        if mean.shape[1:] == scale.shape or (mean.shape == scale.shape and _rows_same(scale) and _moved(layer)):
            sizes.add(len(mean))
            found.append(layer)
    if len(sizes) != 1 or sizes == {1}:
        return
    for layer in found:
        if _rows_same(layer.values["mean"]) and _rows_same(layer.values["var"]):
            yield layer.path, NOTE, f"statistics of {sizes.copy().pop()} replicas, all the same"
            continue
        mean, var = layer.wide("mean"), layer.wide("var")
        with np.errstate(all="ignore"):
            apart = np.nanmax(np.abs(mean - mean.mean(0)) / np.sqrt(var.mean(0)))
        yield (
            layer.path,
            WRONG,
            f"statistics of {len(layer.values['mean'])} replicas, up to {apart:.2g} standard deviations apart: "
            "merge_replicas makes them one, unless these are layers or sets of one model",
        )


def _rows_same(z: np.ndarray) -> bool:
    return bool((z == z[:1]).all())


def _apart(layers: Sequence[Layer]) -> Iterator[Placed]:
    """Parameters without statistics, and statistics without parameters: lost, or under another name."""
    whole = [layer for layer in layers if layer.averaged]
    without = [layer for layer in layers if not layer.values.keys() & STATE]
    suspects = {layer.path: said for layer in without if (said := _missing(layer, layers, whole)) is not None}
    orphans = [layer for layer in whole if not layer.norm.parameters]
    pairs: dict[str, str] = {}
    for orphan in orphans:
        near = [
            layer for layer in without
            if layer.values[next(iter(layer.values))].size == orphan.values["mean"].size
            and (layer.path in suspects or (len(orphans) < len(whole) and _likeness(layer, orphan) >= ALIKE))
        ]  # fmt: skip
        if near:
            best = max(near, key=lambda layer: _likeness(layer, orphan))
            pairs[best.path] = orphan.path
            text = f"statistics without parameters, and {best.path} has parameters without statistics: renamed?"
            yield orphan.path, WRONG, text
    for layer in without:
        if layer.path in pairs:
            text = f"parameters without statistics, and {pairs[layer.path]} has statistics without parameters: renamed?"
            yield layer.path, WRONG, text
        elif layer.path in suspects:
            yield layer.path, *suspects[layer.path]


def _missing(layer: Layer, layers: Sequence[Layer], whole: Sequence[Layer]) -> tuple[str, str] | None:
    """Why a norm without statistics should have some: it is called so, or it is the only one of its kind without."""
    last = layer.path.split("/")[-1]
    if CALLED_BATCH.search(last):
        if whole:
            return WRONG, f"no statistics, though it is called {last}"
        if layer.own.get("scale") == "weight":  # torch's may be told to have none
            return NOTE, f"no statistics, though it is called {last}: track_running_stats=False?"
        return WRONG, f"no statistics, though it is called {last}: were only the parameters saved?"
    kind = [other for other in layers if _like(other, layer) and other is not layer]
    if len(kind) >= 2 and all(other in whole for other in kind) and not last.isdigit():
        return NOTE, f"no statistics, where {kind[0].path} and all like it have them"
    return None


def _like(one: Layer, other: Layer) -> bool:
    """Whether their paths are the same but for numbers, and so are their parameters."""
    paths = [re.sub(r"\d+", "#", layer.path) for layer in (one, other)]
    return paths[0] == paths[1] and one.values.keys() - STATE == other.values.keys() - STATE


def copies(layers: Sequence[Layer]) -> set[str]:
    """The paths of what are copies of a model's parameters, which need no statistics: gradients, an optimizer's
    moments, averages. They lie under a prefix that holds a namesake of every averaged norm of one model, no statistics,
    and no collection, which would make it a model that has lost them."""
    whole = [layer for layer in layers if layer.averaged]
    models: dict[str, set[Placement]] = {}
    for layer in whole:
        if layer.norm.parameters:
            models.setdefault(layer.root, set()).add(_placement(layer, layer.root))
    first = {layer.path.partition("/")[0] for layer in whole}
    if len(whole) > 1 and len(first) == 1 and models.keys() == {""}:  # no collection tells where the model begins
        root = first.pop()
        models[root] = {_placement(layer, root) for layer in whole}
    under: dict[str, list[Layer]] = {}
    for layer in layers:
        for end in re.finditer("/", layer.path):
            under.setdefault(layer.path[: end.start()], []).append(layer)
    out = set()
    for prefix, own in under.items():
        if not any(layer.root or layer.values.keys() & STATE for layer in own):
            names = {_placement(layer, prefix) for layer in own}
            if any(model <= names for model in models.values()):
                out |= {layer.path for layer in own}
    for layer in layers:  # and what is called so, of whatever part of the model
        prefix, _, rest = layer.path.partition("/")
        if COPY.search(prefix) and not layer.values.keys() & STATE:
            out |= {layer.path for o in whole if rest in (o.path, o.path.partition("/")[2])}
    return out


Placement = tuple[str, frozenset[str]]  # of a norm in its model, and its parameters


def _placement(layer: Layer, root: str) -> Placement:
    return layer.path[len(root) :].lstrip("/"), frozenset(layer.values.keys() - STATE)


def _likeness(one: Layer, other: Layer) -> float:
    """Of two paths, without what they begin with."""
    a, b = one.path.split("/"), other.path.split("/")
    while len(a) > 1 and len(b) > 1 and a[0] == b[0]:
        a, b = a[1:], b[1:]
    return difflib.SequenceMatcher(None, "/".join(a), "/".join(b)).ratio()
