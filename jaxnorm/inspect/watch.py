"""Batches against running statistics: where training and evaluation differ, and which norms are to blame."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.errors import ArgumentError, named
from jaxnorm.inspect.layers import host
from jaxnorm.moments import Moments, merge_along
from jaxnorm.tools.find import KeyPath, NormLayer, NormTable, Where, choose, find_norms, get
from jaxnorm.tools.recalibrate import by_norm, written
from jaxnorm.tools.report import Report

COLUMNS = ["norm", "count", "mean gap", "mean noise", "var gap", "var noise", "skew", "skew noise", "share", "finding"]
SIGNIFICANT = 3  # times the noise
GAP = "recalibrate"
SKEW = "devices differ"
ONE = "one batch: noise unknown"


@dataclass(frozen=True)
class Watched(Report):
    """What `watch` sees: a row for every batch norm.

    losses: mean over the batches: "training", "evaluation", and "recalibrated", evaluation with the statistics of these
        batches in all norms. Empty without `loss`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> collect = lambda v, x: {"bn": jn.moments(x, "n c", "n")}
        >>> variables = {"bn": {"mean": jnp.array([9.0]), "var": jnp.array([1.0])}}
        >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [4.0]])]
        >>> seen = jn.inspect.watch(collect, variables, batches, epsilon=0.0)
        >>> seen.recalibrate, seen.rows[0]["mean gap"]
        (('bn',), 6.5)
    """

    losses: Mapping[str, float]

    @property
    def recalibrate(self) -> tuple[str, ...]:
        """The norms whose statistics do not fit: `where` of `jaxnorm.tools.recalibrate`."""
        return tuple(row["norm"] for row in self.rows if GAP in row["finding"])

    @property
    def skewed(self) -> tuple[str, ...]:
        """The norms that see other inputs on some devices than on the others."""
        return tuple(row["norm"] for row in self.rows if SKEW in row["finding"])


@named
def watch(
    collect: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any, bool], Any] | None = None,
    where: Where = None,
    epsilon: float = 1e-5,
    tolerance: float = 0.1,
) -> Watched:
    """How far the running statistics of every batch norm are from what batches show, and what that costs.

        mean gap = rms_c (mean - running mean) / s,   s = sqrt(running var + epsilon)
        var gap  = rms_c log((var + epsilon) / (running var + epsilon))
        skew     = rms_c,d (mean_d - mean) / std,     d: devices or other parts of a batch
        share    = (L(running) - L(this norm's statistics replaced)) / (L(running) - L(batch))

    mean and var are those of all batches merged, and L(batch) is the loss in training mode. To replace the statistics
    of one norm alone is what recalibrating it alone would win. The shares need not add up to 1: norms compensate one
    another, and what is left with all replaced ("recalibrated") is not the statistics' fault but the noise of batches.

    A gap or a skew counts when it is above `tolerance` and above three times its noise: its spread between the batches
    by the root of their number. Of a single batch the noise is not known (the pixels of a picture are not independent),
    and nothing counts but statistics that are no numbers.

    Args:
        collect: (variables, batch) -> Moments by norm, as `jaxnorm.tools.recalibrate` takes it. In training mode it
            sees what the running statistics were averaged from; in evaluation mode, what they are used on. Moments with
            dimensions in front of those of the running statistics (of vmap, pmap or shard_map) are those of devices.
        variables: any tree that `find_norms` reads.
        batches: two or more; a few will do. They are kept if there is a loss.
        loss: (variables, batch, train) -> the mean loss of a batch, a number. It is called on every batch once for each
            norm and three times more: jit it, and choose norms with `where`.
        where: which norms: a pattern, several, or a function of NormLayer.
        epsilon: that of the norms.
        tolerance: the smallest gap or skew that counts.

    Returns:
        Watched: a Report with `recalibrate`, `skewed` and `losses`.

    Raises:
        ArgumentError: when there is no batch or no batch norm, or batches are one array; when collect gives what is no
            Moments, or moments of no norm, of another shape or not finite; when loss is no number.

    Example:
        >>> # of a linen model: collect = lambda v, x: net.apply(v, x, mutable=["moments"])[1]["moments"]
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> collect = jax.jit(lambda v, x: {"bn": jn.moments(x, "n c", "n")})
        >>> variables = {"bn": {"mean": jnp.array([2.0]), "var": jnp.array([5.0])}}  # the mean fits, the variance not
        >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[0.9], [3.1]])]
        >>> seen = jn.inspect.watch(collect, variables, batches)
        >>> print(f"{seen.rows[0]['mean gap']:.2f} {seen.rows[0]['var gap']:.2f} {seen.rows[0]['finding']}")
        0.00 1.51 recalibrate

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (what stale statistics cost).

    Differs from: nothing in Flax or torch; `recalibrate` is the cure. A running variance is an average of variances
        within batches, which small batches make smaller than that of all data: that is a gap too.
    """
    if not tolerance >= 0 or not 0 <= epsilon < np.inf:
        raise ArgumentError(f"tolerance and epsilon are numbers from 0, got {tolerance!r} and {epsilon!r}.")
    if hasattr(batches, "shape") or isinstance(batches, Mapping | str) or not hasattr(batches, "__iter__"):
        raise ArgumentError(f"batches must be a list of them, got {type(batches).__name__}. Put one batch into a list.")
    if not callable(collect):
        raise ArgumentError(f"collect is a function of (variables, batch), got {type(collect).__name__}.")
    norms = NormTable(norm for norm in find_norms(variables) if norm.kind == "batch")
    chosen = choose(norms, where)
    if not chosen:
        raise ArgumentError("there is no batch norm among the variables: no `mean` beside a `var`. See find_norms.")
    kept, seen = [], []
    for batch in batches:
        kept += [batch] if loss is not None else []
        moments = collect(variables, batch)
        if not any(isinstance(z, Moments) for z in jax.tree.leaves(moments, is_leaf=lambda z: isinstance(z, Moments))):
            raise ArgumentError(
                f"collect must give a tree of Moments, and {type(moments).__name__} holds none. Of a linen model: "
                'lambda v, x: net.apply(v, x, mutable=["moments"])[1]["moments"].'
            )
        seen.append(by_norm(moments, norms))
    if not seen:
        raise ArgumentError("there was no batch.")
    running = {norm.path: [host(z, at).ravel() for z, at in _statistics(variables, norm)] for norm in chosen}
    parts = {
        path: _parts([one[path] for one in seen], mean.size, path) for path, (mean, _) in running.items()
        if all(path in one for one in seen)
    }  # fmt: skip
    merged = _merged(parts)
    rows: list[dict[str, Any]] = [
        {"norm": path, **_row(parts[path], merged[path], running[path], epsilon, tolerance)} if path in merged
        else {"norm": path, "finding": "collect gave no moments of it"}
        for path in chosen.paths
    ]  # fmt: skip
    whole = {path: m[-1] for path, m in merged.items() if (m[-1].count > 0).any()}
    losses = {}
    if loss is not None:
        measured = NormTable(norm for norm in chosen if norm.path in whole)
        losses, shares = _shares(loss, variables, kept, measured, whole)
        for row in rows:
            row["share"] = shares.get(row["norm"])
    watched = Watched("", COLUMNS, rows, losses)
    many = len(watched.recalibrate)
    title = f"{many} of {len(chosen)} batch norms to recalibrate"
    if losses:
        title += ", loss: " + ", ".join(f"{value:.4g} {name}" for name, value in losses.items())
        title += ", evaluation is no worse: no share" * (losses["evaluation"] <= losses["training"])
    return Watched(title, COLUMNS, rows, losses)


def _statistics(variables: Any, norm: NormLayer) -> list[tuple[Any, KeyPath]]:
    paths = norm.leaves["mean"], norm.leaves["var"]
    return list(zip(get(variables, *paths), paths, strict=True))


def _parts(seen: list[Moments], features: int, path: str) -> Moments:
    """All batches of a norm: moments along batch, device, channel."""
    for m in seen:
        if not m.mean.size or m.mean.size % features or m.mean.size != seen[0].mean.size:
            raise ArgumentError(
                f"collect gives moments of {path!r} of shape {m.mean.shape}, and its running statistics are "
                f"{features} numbers: it must be those or, of devices, several times as many, alike for all batches."
            )
        if not (np.isfinite(m.mean).all() and np.isfinite(m.m2).all()):
            raise ArgumentError(f"what the norm {path!r} sees is not finite. Mask it, or leave the batch out.")
    rows = [[np.broadcast_to(z, m.mean.shape).reshape(-1, features) for z in (m.count, m.mean, m.m2)] for m in seen]
    count, mean, m2 = (np.stack(z) for z in zip(*rows, strict=True))
    return Moments(count, mean, m2, ("batch", "device", "c"))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=1)
def _without(m: Moments, names: tuple[str, ...]) -> Moments:
    return merge_along(m, names)


def _merged(parts: dict[str, Moments]) -> dict[str, list[Moments]]:
    """Of each norm the moments of the batches, of the devices, and of all; merged with all norms side by side.

    Those of fewer devices than others are filled up with moments of nothing, which change nothing."""
    if not parts:
        return {}
    devices = max(m.mean.shape[1] for m in parts.values())

    def filled(z: Any) -> np.ndarray:
        return np.pad(z, ((0, 0), (0, devices - z.shape[1]), (0, 0)))

    rows = zip(*((m.count, m.mean, m.m2) for m in parts.values()), strict=True)
    flat = [np.concatenate([filled(z) for z in row], axis=-1) for row in rows]
    ends = np.cumsum([m.mean.shape[-1] for m in parts.values()])[:-1]
    out: dict[str, list[Moments]] = {path: [] for path in parts}
    with jax.enable_x64(True):
        m = Moments(*map(jnp.asarray, flat), axes=("batch", "device", "c"))
        for gone in (("device",), ("batch",), ("batch", "device")):
            less = _without(m, gone)
            split = [np.split(np.asarray(z), ends, axis=-1) for z in (less.count, less.mean, less.m2)]
            for path, *own in zip(parts, *split, strict=True):
                out[path].append(Moments(*own, axes=less.axes))
    return out


def _var(m: Moments) -> np.ndarray:
    return np.asarray(m.m2) / np.maximum(m.count, np.finfo(np.float64).tiny)


def _rms(z: Any) -> float:
    return float(np.sqrt(np.mean(np.abs(z) ** 2))) if z.size else 0.0


def _row(
    parts: Moments, merged: list[Moments], running: list[np.ndarray], epsilon: float, tolerance: float
) -> dict[str, Any]:
    """What is said of one norm."""
    by_batch, by_device, whole = merged
    n = np.asarray(whole.count)
    seen = n > 0  # channels in which something was counted
    row: dict[str, Any] = {"count": float(n.min())}
    if not seen.any():
        return row | {"finding": "nothing was counted"}
    mean, var = (z.astype(np.promote_types(z.dtype, np.float64)) for z in running)
    findings = []
    with np.errstate(all="ignore"):
        scale = np.sqrt(var + epsilon)
        apart = (whole.mean - mean) / scale, np.log((_var(whole) + epsilon) / (var + epsilon))
        sound = np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()
        for name, z in zip(("mean", "var"), apart, strict=True):
            row[f"{name} gap"] = _rms(np.nan_to_num(z[seen], nan=0.0, posinf=np.inf)) if sound else np.inf
        own, std = np.asarray(by_device.count) > 0, np.sqrt(_var(whole) + epsilon)
        if own.any(-1).sum() > 1:
            row["skew"] = _rms(((by_device.mean - whole.mean) / std)[own])
        some = np.asarray(parts.count) > 0
        if len(some) == 1:
            return row | {"finding": ONE if sound else GAP}
        batch = np.asarray(by_batch.count) > 0
        row["mean noise"], row["var noise"] = (
            _noise(z, batch) for z in (by_batch.mean / scale, np.log(_var(by_batch) + epsilon))
        )
        if any(row[f"{z} gap"] > max(tolerance, SIGNIFICANT * row[f"{z} noise"]) for z in ("mean", "var")):
            findings.append(GAP)
        if "skew" in row:
            row["skew noise"] = _noise((parts.mean - np.asarray(by_batch.mean)[:, None]) / std, some)
            if row["skew"] > max(tolerance, SIGNIFICANT * row["skew noise"]):
                findings.append(SKEW)
    return row | {"finding": ", ".join(findings)}


def _noise(z: Any, counted: np.ndarray) -> float:
    """How far the mean of z over batches, its first dimension, may be from that over all data. Infinite: not known."""
    spread = np.asarray(z).std(0, ddof=1)[counted.all(0)]
    spread = spread[np.isfinite(spread)]
    return _rms(spread) / np.sqrt(len(counted)) if spread.size else np.inf


def _shares(loss, variables, batches, norms: NormTable, whole) -> tuple[dict[str, float], dict[str, float | None]]:
    def mean_loss(v: Any, train: bool) -> float:
        values = [np.asarray(loss(v, batch, train)) for batch in batches]
        if any(z.size != 1 or (z.dtype.kind not in "fiu" and z.dtype.name != "bfloat16") for z in values):
            raise ArgumentError(f"loss must be one number a batch, got shape {values[0].shape}, {values[0].dtype}.")
        return float(np.mean([z.astype(np.float64) for z in values]))

    def replaced(some: NormTable) -> Any:
        shapes = {n.path: get(variables, n.leaves["mean"])[0].shape for n in some}
        seen = {
            path: Moments(*(z.reshape(shape) for z in (m.count, m.mean, m.m2)), axes=m.axes)
            for path, shape in shapes.items() for m in [whole[path]]
        }  # fmt: skip
        return written(variables, some, seen, len(batches), False)

    training, evaluation = mean_loss(variables, True), mean_loss(variables, False)
    losses = {"training": training, "evaluation": evaluation, "recalibrated": mean_loss(replaced(norms), False)}
    gap = evaluation - training
    if not gap > 0:  # nothing to explain
        return losses, {}
    return losses, {n.path: (evaluation - mean_loss(replaced(NormTable([n])), False)) / gap for n in norms}
