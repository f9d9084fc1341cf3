"""A file of one framework into a file of another, without the model: the layers keep their names."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxnorm.errors import ArgumentError, named
from jaxnorm.tools import files, layouts
from jaxnorm.tools import settings as words
from jaxnorm.tools.convert import COUNTERS, ConvertReport, chosen_of, convert, matching
from jaxnorm.tools.find import Where
from jaxnorm.tools.models import Layer, Model, dtype_of, take_apart

TORCH = {"scale": "weight", "kernel": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}


@named
def import_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    to: str = "flax",
    where: Where = None,
    framework: str | None = None,
    embedding: str | Sequence[str] = (),
    transposed: str | Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> ConvertReport:
    """Convert a file without the model: every layer under its own name, in the other framework's layouts.

        out["params"]["features"]["0"]["kernel"] = source["features.0.weight"], transposed       to="flax"
        out["features.0.weight"] = source["params"]["features"]["0"]["kernel"], transposed       to="torch"

    Args:
        source, out: the files: see `read` and `write`.
        to: "flax" (params and batch_stats, nested) or "torch" (a state_dict).
        where: the layers that are converted: a pattern on the path, several, or a function of a layer.
        framework: of the source, where its names do not tell.
        embedding: patterns as for `where`: weights of two axes that are tables and stay as they are. A file does not
            tell them from kernels, and all others are transposed.
        transposed, settings: see `convert`. momentum=None or debias=True keeps the count of updates.

    Returns:
        ConvertReport: a row a layer, with its shapes' changes and the settings that its norm needs.

    Raises:
        ArgumentError: as `read`, `write` and `convert`.

    Example:
        >>> import os, tempfile, numpy as np, jaxnorm as jn
        >>> source, out = (os.path.join(tempfile.mkdtemp(), name) for name in ("a.npz", "b.msgpack"))
        >>> jn.tools.write(source, {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)})
        >>> jn.tools.import_file(source, out).rows[0]["changes"]
        'oi* -> *io'
        >>> jn.tools.read(out)["params"]["fc"]["kernel"].shape
        (3, 2)

    Source: as `convert`.

    Differs from: `convert`, which has a template and so checks every name and shape.
    """
    if to not in ("flax", "torch"):
        raise ArgumentError(f'to is "flax" or "torch", got {to!r}.')
    given = words.check(settings)
    model = take_apart(source, framework)
    chosen = chosen_of(model, where)
    tables, flipped = matching("embedding", embedding, model), matching("transposed", transposed, model)
    blank: dict[str, Any] = {}
    for layer in chosen:
        said, _ = words.settled(model.framework, layer.kind, model.settings.get(layer.path, {}), given)
        counts = layer.kind == "batch" and (to == "torch" or said["debias"] or said.get("momentum", 0) is None)
        leaves = _leaves(layer, model, to, layer.path in tables, layer.path in flipped)
        if counts:
            leaves["num_updates"] = jax.ShapeDtypeStruct((), np.int64 if to == "torch" else np.int32)
        for name, leaf in leaves.items():
            _set(blank, to, layer.path, name, leaf)
    paths = {layer.path for layer in chosen}
    tree, report = convert(
        model, blank, target_framework=to, where=lambda layer: layer.path in paths, settings=given,
        transposed=sorted(flipped & paths),
    )  # fmt: skip
    files.write(out, tree)
    return report


def _leaves(layer: Layer, model: Model, to: str, table: bool, flip: bool) -> dict[str, Any]:
    """What the layer holds in the other framework."""
    out: dict[str, Any] = {}
    for name, leaf in layer.leaves.items():
        if name in COUNTERS:
            continue
        shape = tuple(leaf.shape)
        if name == "kernel" and not table:
            bare = np.broadcast_to(np.zeros(()), shape)  # takes no memory
            shape = layouts.relaid(bare, model.framework, to, flip)[0].shape
        elif (layer.norm or name == "bias") and model.framework in ("haiku", "equinox"):
            shape = tuple(n for n in shape if n != 1) or (1,)  # they keep axes of length 1
        out["embedding" if table and name == "kernel" else name] = jax.ShapeDtypeStruct(shape, dtype_of(leaf))
    return out


def _set(tree: dict[str, Any], to: str, path: str, name: str, leaf: Any) -> None:
    if to == "torch":
        name = "num_batches_tracked" if name == "num_updates" else TORCH.get(name, name)
        tree[".".join([*path.split("/"), name] if path else [name])] = leaf
        return
    collection = "batch_stats" if name in ("mean", "var", "num_updates") else "params"
    for word in (collection, *path.split("/")) if path else (collection,):
        tree = tree.setdefault(word, {})
    tree[name] = leaf
