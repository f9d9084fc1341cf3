"""What every device kept for itself: made one, given back to each, compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxnorm.errors import ArgumentError, named
from jaxnorm.running import RunningStats
from jaxnorm.sync import sync_state
from jaxnorm.tools.find import NormTable, Where, choose, find_norms, get, put
from jaxnorm.tools.recalibrate import bias_of
from jaxnorm.tools.report import Report


class Merged(NamedTuple):
    """variables: those of one model. report: a row for each norm, how far apart its replicas were."""

    variables: Any
    report: Report


@named
def merge_replicas(
    variables: Any, axis: int = 0, *, counts: Sequence[float] | None = None, where: Where = None, tolerance: float = 0.0
) -> Merged:
    """Variables with a dimension of replicas, as pmap or an unsynced run leaves them, as those of one model.

        mean = sum(t mean_i) / T,   var = sum(t (var_i + |mean_i - mean|^2)) / T,   T = sum(t)

    Statistics of batch norms, which every replica took of its own data, are pooled with the term between the replicas.
    All else must be the same on all of them, and loses the dimension.

    Args:
        variables: a tree all of whose arrays have the dimension. Where only the statistics have it, give these:
            {**variables, "batch_stats": merge_replicas(variables["batch_stats"]).variables}
        axis: where the dimension is.
        counts: t, how much each replica has seen; by default its `num_updates`, where there is one, else all the same.
        where: which norms are pooled: a pattern, several, or a function of NormLayer. Others must agree.
        tolerance: the largest difference that counts as agreement; the first replica's value is taken.

    Returns:
        Merged: (variables, report), the tree without the dimension, and for each norm how far its replicas were: the
        largest distance of a mean from the pooled one, in pooled standard deviations. `num_updates` is the largest.

    Raises:
        ArgumentError: when an array lacks the dimension, or replicas differ in what they share. The message says where.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> saved = {"bn": {"mean": jnp.array([[1.0], [5.0]]), "var": jnp.array([[1.0], [1.0]])}}  # two devices
        >>> variables, report = jn.tools.merge_replicas(saved)
        >>> variables["bn"]["mean"].tolist(), variables["bn"]["var"].tolist()
        ([3.0], [5.0])

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983, equation 2.1b.

    Differs from: `flax.jax_utils.unreplicate`, which keeps the statistics of device 0, and a `pmean` of them, which
        averages the variances alone. `jaxnorm.sync_state` is the same pooling inside of a map.
    """
    leaves = _with_dimension(variables, axis)
    replicas = next(iter(leaves.values())).shape[0]
    rows = np.ones(replicas) if counts is None else np.asarray(counts)
    numbers = rows.dtype.kind in "fiu" and rows.shape == (replicas,)
    if not numbers or not (rows >= 0).all() or not 0 < rows.sum() < np.inf:
        raise ArgumentError(f"counts must be {replicas} numbers from 0, one a replica, got {counts!r}.")
    if not isinstance(tolerance, Real) or not tolerance >= 0:
        raise ArgumentError(f"tolerance is a number from 0, got {tolerance!r}.")
    norms = choose(NormTable(n for n in find_norms(variables) if n.kind == "batch"), where)
    new: dict[Any, np.ndarray] = {}
    report = []
    for norm in norms:
        own = {name: leaves[path] for name, path in norm.leaves.items()}
        t = own["num_updates"].reshape(replicas, -1).max(1) if counts is None and "num_updates" in own else rows
        mean, var = _pooled(own["mean"], own["var"], t)
        made = {"mean": mean, "var": var}
        for name in made.keys() & {n.removesuffix("_hidden") for n in own if n.endswith("_hidden")}:
            made[f"{name}_hidden"] = made[name] * bias_of(own[f"{name}_hidden"], own[name])
        made |= {name: own[name].max(0) for name in own.keys() & {"num_updates", "var_counter"}}
        new |= {norm.leaves[name]: value.astype(own[name].dtype) for name, value in made.items()}
        apart = np.abs(own["mean"] - mean) / np.sqrt(np.where(var > 0, var, 1))
        report.append({"norm": norm.path, "replicas": replicas, "apart": float(apart.max(initial=0))})
    shared = {path: rows for path, rows in leaves.items() if path not in new}
    differ = {path: d for path, rows in shared.items() if (d := _difference(rows)) is not None and d > tolerance}
    if differ:
        worst = [f"{keystr(path)} by {d:.3g}" for path, d in list(differ.items())[:8]]
        raise ArgumentError(
            f"replicas differ in {len(differ)} of the {len(shared)} arrays that they share: {', '.join(worst)}"
            f"{', ...' if len(differ) > 8 else ''}. tolerance= is the difference to be passed over."
        )
    new |= {path: rows[0] for path, rows in shared.items()}
    title = f"{len(norms)} batch norms of {replicas} replicas pooled"
    return Merged(_put(variables, new), Report(title, ["norm", "replicas", "apart"], report))


@named
def replicate(variables: Any, devices: int, axis: int = 0) -> Any:
    """Variables of one model as those of many replicas, each with the same: the way back from `merge_replicas`.

        new[i] = old,   i = 0 ... devices - 1

    Args:
        variables: any tree. What is no array stays as it is.
        devices: how many replicas.
        axis: where the new dimension is.

    Returns:
        The tree, every array with a dimension of that size more.

    Raises:
        ArgumentError: when devices is no number from 1, or an array has no such axis.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> jn.tools.replicate({"mean": jnp.array([3.0])}, 2)["mean"].tolist()
        [[3.0], [3.0]]

    Source: the first dimension that `jax.pmap` maps over.

    Differs from: `flax.jax_utils.replicate`, which has axis 0 alone and puts each part on its device.
    """
    if isinstance(devices, bool) or not isinstance(devices, Integral) or devices < 1:
        raise ArgumentError(f"devices is how many replicas there are to be, a number from 1, got {devices!r}.")

    def repeated(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            return leaf
        if not isinstance(axis, Integral) or not -leaf.ndim - 1 <= axis <= leaf.ndim:
            raise ArgumentError(f"{keystr(path)} of shape {leaf.shape} cannot have replicas along axis {axis!r}.")
        stack: Any = jnp.stack if isinstance(leaf, jax.Array) else np.stack
        return stack([leaf] * devices, axis)

    return jax.tree_util.tree_map_with_path(repeated, variables)


@dataclass(frozen=True)
class ReplicaReport(Report):
    """The arrays in which replicas differ, none if they agree. `ok` says so."""

    @property
    def ok(self) -> bool:
        """Whether all replicas agree, bit for bit."""
        return not self.rows


@named
def check_replicas(tree: Any, axis: int | None = None) -> ReplicaReport:
    """Whether replicas hold the same bits: a table of the arrays in which they do not.

        difference = max |replica_i - replica_0|

    Without `axis` it looks at where arrays lie. One that is replicated over a mesh has a copy on every device, and
    nothing makes JAX check that these are the same: an unsynced batch norm that leaves shard_map (check_vma=False) with
    `out_specs=P()` is such an array, and reads as the first device's.

    Args:
        tree: any tree of arrays.
        axis: the dimension of the replicas, where the arrays have one; None to compare the copies on the devices of
            this process. (Of several processes each sees its own.)

    Returns:
        A Report with `ok`, whether they agree. It raises nothing where they differ: `assert report.ok, report`.

    Raises:
        ArgumentError: when there is nothing to compare: no array lies on two devices, or one lacks the dimension.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> report = jn.tools.check_replicas({"bn": {"mean": jnp.array([[1.0], [5.0]])}}, axis=0)
        >>> report.ok
        False
        >>> print(report)
        1 of 1 arrays differ between replicas
        array           replicas  difference
        --------------  --------  ----------
        ['bn']['mean']  1         4

    Source: seen with jax 0.10.2: with check_vma=False `out_specs=P()` is believed, and the first device's value read.

    Differs from: JAX, whose only check is static, at the end of shard_map; torch, which broadcasts buffers from rank 0.
    """
    if axis is not None:
        copies = {path: [rows] for path, rows in _with_dimension(tree, axis).items()}
    else:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        copies = {path: groups for path, leaf in leaves if (groups := _on_devices(leaf))}
        if not copies:
            raise ArgumentError(
                "no array here has two copies on the devices of this process. axis= says that replicas lie along a "
                "dimension."
            )
    rows = []
    for path, groups in copies.items():
        found = {i for group in groups for i in _differing(group)}
        if found:
            largest = max(d for group in groups if (d := _difference(group)) is not None)
            which = " ".join(map(str, sorted(found)))
            rows.append({"array": keystr(path), "replicas": which, "difference": largest})
    title = f"{len(rows)} of {len(copies)} arrays differ between replicas"
    return ReplicaReport(title, ["array", "replicas", "difference"], rows)


def _with_dimension(tree: Any, axis: int) -> dict[Any, np.ndarray]:
    """The arrays, on the host, with the replicas along the first dimension."""
    if isinstance(axis, bool) or not isinstance(axis, Integral):
        raise ArgumentError(f"axis is the number of a dimension, got {axis!r}.")
    found: dict[Any, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "shape"):
            continue
        rows = _host(leaf, path)
        size = next(iter(found.values())).shape[0] if found else None
        if not -leaf.ndim <= axis < leaf.ndim or size not in (None, leaf.shape[axis]):
            raise ArgumentError(
                f"{keystr(path)} of shape {tuple(leaf.shape)} has no dimension {axis} of {size or 'all'} replicas. "
                "Give the part of the tree whose arrays have it."
            )
        found[path] = np.moveaxis(rows, axis, 0)
    if not found or not next(iter(found.values())).shape[0]:
        raise ArgumentError("there is no array with replicas in this tree.")
    return found


def _host(leaf: Any, path: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            raise ArgumentError(
                f"{keystr(path)} lies on several processes. Gather it first: "
                "jax.experimental.multihost_utils.process_allgather(tree, tiled=True)."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ArgumentError(f"{keystr(path)} holds random keys, which replicas need not share. Leave them out.")
    return np.asarray(leaf)


def _on_devices(leaf: Any) -> list[np.ndarray]:
    """The copies of each part of an array that several devices hold."""
    parts: dict[str, list[np.ndarray]] = {}
    for shard in leaf.addressable_shards if isinstance(leaf, jax.Array) else ():
        data = jax.random.key_data(shard.data) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else shard.data
        parts.setdefault(str(shard.index), []).append(np.asarray(data))
    return [np.stack(copies) for copies in parts.values() if len(copies) > 1]


def _differing(rows: np.ndarray) -> list[int]:
    """Which rows are not the bits of the first."""
    return [i for i, row in enumerate(rows) if row.tobytes() != rows[0].tobytes()]


def _difference(rows: np.ndarray) -> float | None:
    """The largest difference from the first row; None where all are its bits."""
    if not _differing(rows):
        return None
    wide = rows.astype(np.complex128 if np.iscomplexobj(rows) else np.float64)
    same = (wide == wide[:1]) | (np.isnan(wide) & np.isnan(wide[:1]))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(wide - wide[:1]))
    return float(np.nan_to_num(apart, nan=np.inf).max())


def _pooled(mean: np.ndarray, var: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By `sync_state`, to which a replica is a device."""
    names = tuple(f"d{i}" for i in range(mean.ndim - 1))

    def pooled(mean: Any, var: Any, t: Any) -> RunningStats:
        return sync_state(RunningStats(mean, var, t, names), "replicas")

    wide = [z.astype(np.promote_types(z.dtype, np.float64)) for z in (mean, var, t)]
    with jax.enable_x64(True):
        stats = jax.vmap(pooled, axis_name="replicas")(*wide)
        return np.asarray(stats.mean[0]), np.asarray(stats.var[0])


def _put(tree: Any, new: dict[Any, np.ndarray]) -> Any:
    """The tree with these arrays, as NumPy's where those were, else as JAX's."""
    olds = zip(new.items(), get(tree, *new), strict=True)
    return put(tree, {path: z if isinstance(old, np.ndarray) else jnp.asarray(z) for (path, z), old in olds})
