"""From one framework's tree to another's: parameters, statistics, and what the norms were told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.tools import files, layouts
from jaxnorm.tools import settings as words
from jaxnorm.tools.find import Where, chosen
from jaxnorm.tools.models import MANY, Layer, Model, dtype_of, take_apart
from jaxnorm.tools.pairs import Names, paired
from jaxnorm.tools.report import Report

COLUMNS = ["target", "source", "kind", "variables", "changes", *words.WORDS, "settings", "problem"]
COUNTERS = {"num_updates", "var_counter", "mean_hidden", "var_hidden"}  # what an average needs beside its value


@dataclass(frozen=True)
class ConvertReport(Report):
    """What was converted, a row a layer of the target.

    layers: the settings of every norm, by its path in the target, in our words.
    source, target: the frameworks.
    """

    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = ""
    target: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all batch norms share, as arguments of the target's batch norm.

        For Flax they are those of jaxnorm.linen.BatchNorm and jaxnorm.nnx.BatchNorm: momentum, epsilon, unbiased,
        debias.

        Raises:
            ArgumentError: when two of them differ.
        """
        groups: dict[str, list[str]] = {}
        of: dict[str, Mapping[str, Any]] = {}
        for row in self.rows:
            if row["kind"] == "batch" and row["target"] in self.layers:
                layer = self.layers[row["target"]]
                text = ", ".join(f"{name}={value}" for name, value in layer.items())
                groups.setdefault(text, []).append(row["target"])
                of[text] = layer
        if len(groups) > 1:
            lines = "\n".join(f"  {text}: {', '.join(paths)}" for text, paths in groups.items())
            raise ArgumentError(f"the batch norms have different settings, see report.layers:\n{lines}")
        return words.in_words_of(self.target, next(iter(of.values()))) if of else {}


class Converted(NamedTuple):
    """The new tree, and the table of what was done."""

    variables: Any
    report: ConvertReport


@named
def convert(
    source: Any,
    target: Any,
    *,
    names: Names = None,
    where: Where = None,
    framework: str | None = None,
    target_framework: str | None = None,
    settings: Mapping[str, Any] | None = None,
    transposed: str | Sequence[str] = (),
    scale_offset: float = 0.0,
    strict: bool = True,
) -> Converted:
    """The target's tree with the source's values, and the settings that its norms need to go on as before.

        target[layer][variable] = source[names(layer)][variable], in the target's layout and dtype

    | | said by the source | where it says nothing |
    |---|---|---|
    | momentum | the part kept: 1 - torch's, Haiku's decay_rate | the framework's default; Haiku has none |
    | epsilon | | the framework's default |
    | unbiased | | torch True, all others False |
    | debias | Equinox's mode "batch" | Haiku True, all others False |

    An nnx module says all four of its norms. The row of a norm says in `changes` where the target goes on otherwise:
    where its framework has no choice, and where the target is a model whose norm says something else.

    Args:
        source: a file (see `read`), a tree (state_dict, linen variables, nnx.State, Haiku's (params, state), a dict of
            Keras's names), or a model: torch's, Keras's, nnx's, or Equinox's (model, state). Of a training checkpoint
            what lies in `state_dict`, `model_state_dict` or `model`, without the optimizer's (see `find_norms`).
        target: the tree that is wanted, filled with anything: what init returned or `jax.eval_shape` of it, nnx.State,
            a state_dict, and all that a source can be in memory. Its leaves may be ShapeDtypeStructs.
        names: the source's layer for one of the target's: a mapping as {"block_{}/bn": "blocks.{}.1"}, of layers or of
            all that lies below ("" is the root; {} stands for a part of a name; the longest match wins), or a function
            of the path, or "in order": the k-th batch norm is the k-th, the k-th kernel of one rank the k-th. Left
            out, and where no pattern fits, names are equal; `.` and `/` are one.
        where: the layers of the target that are converted: a pattern on the path, several, or a function of a layer.
        framework, target_framework: "flax", "torch", "keras", "haiku", "equinox" or "onnx", where names do not tell.
        settings: momentum, unbiased or debias of all batch norms and epsilon of all norms, whatever the source says.
        transposed: patterns on the target's path, as for `where`: kernels of transposed convolutions, where no model or
            file says it.
        scale_offset: added to the scale of norms that have only one, when the source stores scale - 1.
        strict: False lists what does not fit in the report, and leaves the target's own value there.

    Returns:
        Converted: `variables`, as target, and `report`, which prints as a table and has `settings`: the arguments for
        the target's batch norms.

    Raises:
        ArgumentError: lists by name what is missing, left over or of another shape; when it cannot be told whose a
            tree is; when Haiku's decay_rate is needed and not in `settings`.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> names = ("weight", "bias", "running_mean", "running_var")
        >>> state_dict = {f"bn.{name}": np.full(2, i) for i, name in enumerate(names)}
        >>> blank = {"bn": {"scale": np.ones(2), "bias": np.ones(2)}}, {"bn": {"mean": np.ones(2), "var": np.ones(2)}}
        >>> variables, report = jn.tools.convert(state_dict, dict(zip(("params", "batch_stats"), blank)))
        >>> variables["batch_stats"]["bn"]["var"].tolist(), report.settings["momentum"], report.settings["unbiased"]
        ([3.0, 3.0], 0.9, True)

    Source: Flax 0.12, torch 2.13, Keras 3.15, Haiku 0.0.17, Equinox 0.13, ONNX 1.23.

    Differs from: the frameworks' own loaders, which know one framework. Kernels behind a flattened picture are not
        reordered: torch flattens channels first.
    """
    given = words.check(settings)
    src = take_apart(source, framework)
    tgt = take_apart(target, target_framework, role="target")
    pairs = paired(tgt, src, names)
    wanted = [layer.path for layer in chosen_of(tgt, where)]
    flipped = matching("transposed", transposed, tgt)
    values: dict[tuple[str, str], np.ndarray] = {}
    rows, known, used = [], {}, set()
    for path in wanted:
        layer, other = tgt.layers[path], src.layers.get(pairs[path] or "")
        row: dict[str, Any] = {"target": path, "source": pairs[path], "kind": layer.kind}
        rows.append(row)
        if other is None:
            row["problem"] = _no_layer(layer, pairs[path], src)
            continue
        job = _Job(src, tgt, layer, other, given, scale_offset, path in flipped)
        if layer.norm:
            known[path] = job.settings
            row |= job.settings
            row["settings"] = job.whence
        values |= {(path, name): value for name, value in job.run().items()}
        row["variables"] = " ".join(name for name in layer.leaves if (path, name) in values)
        row["changes"] = ", ".join(dict.fromkeys(job.changes)) or None
        row["problem"] = "; ".join(job.problems) or None
        used.add(other.path)
    if where is None:
        rows += [
            {"source": path, "kind": layer.kind, "problem": f"not in the target: {_shapes(layer)}"}
            for path, layer in src.layers.items() if path not in used
        ]  # fmt: skip
    bad = [row for row in rows if row.get("problem")]
    if bad and strict:
        raise ArgumentError(_listed(bad, src, tgt))
    counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(rows), "layer"), (len(known), "norm"))]
    title = f"{counts[0]} of {src.framework} into {tgt.framework}, {counts[1]}"
    title += src.note + (f", {len(bad)} with a problem" if bad else "")
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    return Converted(tgt.rebuild(values), ConvertReport(title, columns, rows, known, src.framework, tgt.framework))


class _Job:
    """One layer of the target, out of one of the source."""

    def __init__(self, src: Model, tgt: Model, layer: Layer, other: Layer, given: dict, offset: float, flip: bool):
        self.src, self.tgt, self.layer, self.other, self.offset = src, tgt, layer, other, offset
        said, told = src.settings.get(other.path, {}), tgt.settings.get(layer.path, {})
        self.flip = flip or "transposed" in said or "transposed" in told
        self.settings, self.whence = words.settled(src.framework, other.kind, said, given)
        self.known = "momentum" in {**said, **given}  # and not only the default
        self.changes = words.lost(tgt.framework, self.settings, told) if layer.norm else []
        self.problems: list[str] = []
        self.instance = layer.kind == "batch" and src.framework != tgt.framework and "instance" in {**said, **told}
        if src.framework == "haiku" != tgt.framework and other.kind == "batch" and "momentum" not in self.settings:
            raise ArgumentError(
                f"{other.path!r} is a Haiku batch norm, whose decay_rate is not in its state: give "
                'settings={"momentum": decay_rate}.'
            )

    def run(self) -> dict[str, np.ndarray]:
        """The values that fit, by variable."""
        if self.instance:
            self.problems.append(
                "torch's InstanceNorm with running statistics trains on each example's own, and a batch norm does not. "
                "Give its state_dict() where it is for evaluation alone"
            )
            return {}
        out = {}
        for name, leaf in self.layer.leaves.items():
            found = self._averages(name, leaf) if name in COUNTERS else self._found(name)
            if found is None:
                continue
            value = self._cast(*found, name, leaf)
            if value is not None:
                out[name] = value
        self._need_count()
        left = self.other.leaves.keys() - self.layer.leaves.keys() - COUNTERS - self._twins()
        self.problems += [f"not in the target: {_shape(self.other, name)}" for name in sorted(left)]
        return out

    def _need_count(self) -> None:
        """An average whose weights depend on the number of updates, going where that is not kept."""
        said = [f"{name}={self.settings.get(name)}" for name, value in (("momentum", None), ("debias", True))
                if name in self.settings and self.settings[name] is value]  # fmt: skip
        if said and "num_updates" in self.other.leaves.keys() - self.layer.leaves.keys():
            if self.tgt.framework == "flax":
                count = int(files.array(self.other.leaves["num_updates"]))
                self.problems.append(
                    f"num_updates is {count}, and the target keeps none: give its norm {' and '.join(said)}"
                )
            else:
                self.changes.append("no count of updates")

    def _twins(self) -> set[str]:
        """torch calls kernels and embeddings weight: either may be the other."""
        mine, theirs = ({"kernel", "embedding"} & layer.leaves.keys() for layer in (self.layer, self.other))
        weight = "weight" in (self.other.own.get("kernel"), self.layer.own.get("kernel"))
        return {"kernel", "embedding"} if mine and theirs and weight else set()

    def _found(self, name: str) -> tuple[np.ndarray, str] | None:
        """The source's value, in the target's layout, and what it is called there."""
        mine = name
        if name in self._twins() and name not in self.other.leaves:
            mine = "kernel" if name == "embedding" else "embedding"
        if mine not in self.other.leaves:
            self.problems.append(f"missing in the source: {_shape(self.layer, name)}")
            return None
        value = files.array(self.other.leaves[mine])
        if mine == name == "kernel":
            value, change = layouts.relaid(value, self.src.framework, self.tgt.framework, self.flip)
            self.changes += [change] if change else []
            shape = tuple(self.layer.leaves[name].shape)
            value, change = layouts.depthwise(value, shape, self.src.framework, self.tgt.framework)
            self.changes += [change] if change else []
        if name == "scale" and self.layer.kind == "scale" and self.offset:
            value = value.astype(np.promote_types(value.dtype, np.float32)) + np.float32(self.offset)
            self.changes.append(f"scale + {self.offset:g}")
        return value, mine

    def _averages(self, name: str, leaf: Any) -> tuple[np.ndarray, str] | None:
        """How many updates, and Haiku's and Equinox's averages before they are debiased."""
        theirs = self.other.leaves
        if self.src.framework == self.tgt.framework and name in theirs:
            return files.array(theirs[name]), name
        count = files.array(theirs["num_updates"]) if "num_updates" in theirs else None
        if self.tgt.framework not in ("haiku", "equinox"):
            if count is None and self.tgt.framework == "flax":
                self.problems.append("missing in the source: num_updates, which momentum=None and debias=True need")
            if count is None and isinstance(leaf, jax.ShapeDtypeStruct):
                return np.zeros((), np.int64), name
            return None if count is None else (count, name)  # torch's own stays: its default has no use for it
        if count is None or not self.settings["debias"]:
            count = np.asarray(MANY)
            self.changes.append("no longer debiased")
        if name in ("num_updates", "var_counter"):
            return count, name
        if int(count) != MANY and not self.known:
            raise ArgumentError(
                f"{self.layer.path!r} goes into Haiku's average before debiasing, which depends on the decay_rate: "
                'give settings={"momentum": decay_rate, "debias": True}.'
            )
        average = files.array(theirs[name.removesuffix("_hidden")])
        kept = 0.0 if int(count) == MANY else self.settings["momentum"] ** int(count)
        return average * np.asarray(1 - kept, average.dtype), name

    def _cast(self, value: np.ndarray, mine: str, name: str, leaf: Any) -> np.ndarray | None:
        shape, dtype = tuple(leaf.shape), dtype_of(leaf)
        value, change = layouts.fitted(value, name, shape, self.layer.norm)
        self.changes += [change] if change else []
        if value.shape != shape:
            self.problems.append(
                f"other shape: {_shape(self.layer, name)} wanted, {_shape(self.other, mine)} is there"
                + (f", {value.shape} in the target's layout" if "->" in " ".join(self.changes) else "")
            )
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            cast = value.astype(dtype)
        if jnp.issubdtype(dtype, jnp.inexact):
            lost = bool(np.any(np.isfinite(value) & ~np.isfinite(cast)))
            lost |= np.iscomplexobj(value) and not np.iscomplexobj(cast)
        else:
            lost = bool(np.any(cast != value))
        if lost:
            self.problems.append(f"{name}: {value.dtype} numbers that {dtype} cannot hold")
            return None
        for count, what in (
            (np.count_nonzero(~np.isfinite(cast)), "not finite"),
            (np.count_nonzero(cast < 0) if name == "var" else 0, "negative"),
            (np.count_nonzero((cast == 0) & (value != 0)), f"too small for {dtype} and now 0"),
        ):
            self.changes += [f"{name}: {count} of {value.size} {what}"] if count else []
        return cast


def chosen_of(model: Model, where: Where) -> list[Layer]:
    """The layers that `where` asks for."""
    return chosen(model.layers.values(), where, what="layer")


def matching(argument: str, patterns: str | Sequence[str], model: Model) -> set[str]:
    """The layers that the patterns name: each must name one."""
    found = chosen(model.layers.values(), patterns or (), argument=argument, what="layer")
    return {layer.path for layer in found}


def _shape(layer: Layer, name: str) -> str:
    return f"{layer.own[name]} {tuple(layer.leaves[name].shape)}"


def _shapes(layer: Layer) -> str:
    return ", ".join(_shape(layer, name) for name in layer.leaves)


def _no_layer(layer: Layer, path: str | None, src: Model) -> str:
    where = "" if path in (None, layer.path) else f" {path!r},"
    return f"missing in the source:{where} {_shapes(layer)}{nearest(path or '', src.layers)}"


def _listed(bad: list[dict[str, Any]], src: Model, tgt: Model) -> str:
    lines = [f"  {row.get('target') or row['source']}: {row['problem']}" for row in bad]
    firsts = {path.partition("/")[0] for path in src.layers}
    hint = ""
    if len(firsts) == 1 and all(path.partition("/")[0] not in firsts for path in tgt.layers):
        hint = f'\n  All names of the source begin with {min(firsts)!r}: names={{"": {min(firsts)!r}}}?'
    what = f"{len(bad)} layer{'s do' if len(bad) > 1 else ' does'} not fit, {src.framework} into {tgt.framework}."
    return f"{what} Give names=, or strict=False to leave them.{hint}\n" + "\n".join(lines)
