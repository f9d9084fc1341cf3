"""Running statistics taken anew from data: exact where training left an average of the last steps.

What a norm sees is a Moments for each batch; those of all batches, merged, are those of all the data. In evaluation a
norm's inputs depend on the statistics of the norms before it, and on nothing else that a batch decides. So once those
are exact, what it sees is what one batch of all the data would show it: pass k settles the norms at depth k.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.moments import Moments, merge
from jaxnorm.tools.find import NormTable, Where, choose, find_norms, get, place, put
from jaxnorm.tools.report import Report

Seen = dict[str, Moments]  # by the path of the norm
COLUMNS = ["norm", "count", "mean moved", "var times", "note"]


class Recalibrated(NamedTuple):
    """The variables with new statistics, and what changed: `mean moved` is the largest change of a mean, in standard
    deviations before or after, the larger, `var times` the new variance by the old one where it is farthest from 1."""

    variables: Any
    report: Report


@named
def recalibrate(
    collect: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    where: Where = None,
    passes: int | None = None,
    unbiased: bool = False,
    progress: bool = True,
) -> Recalibrated:
    """Statistics of every batch norm from a pass over data, in the place of the running average that training left.

        mean, var of merge(m_1, ..., m_N),   m_i = collect(variables, batch_i)

    Batches, masks and devices are merged by count, in float64: an uneven last batch weighs what it has. Of averaged
    weights (EMA, SWA), whose statistics nobody has ever seen, give {**variables, "params": averaged}.

    There are two answers, and `collect` chooses:

        layer by layer   It runs the model in evaluation. Pass k settles the norms at depth k, whose inputs come through
                         norms that are exact by then. The result is that of all the data as one batch, in training,
                         whatever the batch size: what evaluation should use. One pass of many would leave them far off.
        all at once      It runs the model in training, each batch normalized by itself. One pass is all. The deeper
                         statistics are those of inputs that training showed, which depend on the batch size: "precise
                         BN". Noisier batches spread the inputs of the next norm, so they differ from the above.

    After each pass one batch is seen once more: where its moments change, a norm behind another is not settled. Then
    there is a further pass, or, where `passes` does not allow it, the report says so.

    Args:
        collect: (variables, batch) -> Moments by norm, a tree or a flat dict whose paths are those of `find_norms`.
            Pure; jit it. Of linen (evaluation, training), of nnx (`model.eval()` or `model.train()`, then `graphdef,
            variables = nnx.split(model)`) and of your own functions:
                lambda v, x: model.apply(v, x, train=False, mutable=["moments"])[1]["moments"]
                lambda v, x: model.apply(v, x, train=True, mutable=["moments", "batch_stats"])[1]["moments"]
                lambda v, x: nnx.capture(nnx.merge(graphdef, v), jaxnorm.nnx.BatchMoments)(x)[1]
                lambda v, x: {"bn": jn.moments(x @ v["w"], "n c", "n")}
            A mask and mapped axes in `over` count as in training. Under shard_map what it returns must be merged over
            all devices; then several processes (jax.distributed), each with its part of every batch, end with the
            same statistics.
        variables: any tree that `find_norms` reads.
        batches: a list or another collection that can be read again, or a function that gives an iterator. A plain
            iterator can be read once, for one pass.
        where: which norms are given new statistics: a pattern, several, or a function of NormLayer.
        passes: over all batches, at most; None until all norms are settled, which takes no more than there are norms.
        unbiased: write Bessel's variance, m2 / (count - 1), as torch trains with.
        progress: show a bar on a terminal or in a notebook, where rich is installed.

    Returns:
        (variables, report): the same tree with new `mean` and `var`, and with `num_updates`, where there is one, the
        number of batches: with `momentum=None` or `debias` training goes on from there as from that many updates.
        Haiku's counters stay, and what its averages are debiased from is scaled instead. Norms and channels in which
        nothing was counted, and norms that collect gave nothing of, stay as they are, and the report says so.

    Raises:
        ArgumentError: when collect gives what is no Moments, of no norm, of another shape or not finite; when there is
            no batch, or an iterator for a second pass.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> variables = {"w": jnp.array([[2.0]]), "bn": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
        >>> collect = jax.jit(lambda v, x: {"bn": jn.moments(x @ v["w"], "n c", "n")})
        >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])]  # an uneven last batch
        >>> variables, report = jn.tools.recalibrate(collect, variables, batches)
        >>> variables["bn"]["mean"].tolist(), variables["bn"]["var"].tolist()
        ([6.0], [14.0])
        >>> print(report)
        1 of 1 batch norms recalibrated, 2 batches, 1 pass
        norm  count  mean moved  var times  note
        ----  -----  ----------  ---------  ----
        bn    4      1.604       14

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (precise BN, which is all at once); Chan,
        Golub, LeVeque 1983 (merging).

    Differs from: torch's `update_bn` and timm, which average the variances of batches, without the term between them,
        and count an uneven last batch as a whole one.
    """
    if passes is not None and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise ArgumentError(f"passes is a number from 1, or None for until all norms are settled, got {passes!r}.")
    one = isinstance(batches, jax.Array | np.ndarray | Mapping | str)
    if one or not (callable(batches) or hasattr(batches, "__iter__")):
        raise ArgumentError(
            f"batches must be a list of them, or a function that gives an iterator, got {type(batches).__name__}. "
            "Put one batch into a list."
        )
    if isinstance(batches, Iterator) and passes not in (None, 1):
        raise ArgumentError(
            f"passes={passes} reads the batches again, and an iterator can be read once. Give a list, or a function "
            "that returns a new iterator."
        )
    if not callable(collect):
        raise ArgumentError(f"collect is a function of (variables, batch), got {type(collect).__name__}.")
    norms = NormTable(layer for layer in find_norms(variables) if layer.kind == "batch")
    chosen = choose(norms, where)
    if not chosen:
        none = "there is no batch norm among the variables: no `mean` beside a `var`"
        raise ArgumentError(f"{f'where chose none of {len(norms)} batch norms' if norms else none}. See find_norms.")
    before = variables
    limit = passes or (1 if isinstance(batches, Iterator) else len(norms))
    with _bar(batches, progress) as tick:
        for k in range(1, limit + 1):
            seen, count, probe, was = _pass(collect, variables, batches, norms, k, k == limit, tick)
            variables = written(variables, chosen, seen, count, unbiased)
            now = by_norm(collect(variables, probe), norms)
            moving = {path for path in set(was).intersection(chosen.paths) if not _same(was[path], now[path])}
            if not moving:
                break
    return Recalibrated(variables, _report(before, variables, norms, chosen, seen, count, k, moving))


def _pass(collect, variables, batches, norms: NormTable, k: int, final: bool, tick) -> tuple[Seen, int, Any, Seen]:
    """The moments of all batches, how many there were, and one of them, the fullest, with its own moments."""
    total: Moments | None = None
    shapes: dict[str, Any] = {}
    count, fullest, probe, was = 0, -1.0, None, {}
    source: Any = batches() if callable(batches) else batches
    for batch in source:
        seen = by_norm(collect(variables, batch), norms)
        now = {path: (m.mean.shape, m.axes) for path, m in seen.items()}
        if count and now != shapes:
            raise ArgumentError(f"batch {count} of pass {k} gave moments of other norms or shapes than those before.")
        shapes, count = now, count + 1
        wrong = [path for path, m in seen.items() if not _finite(m)]
        if wrong and (final or len(wrong) == len(seen)):  # else it is behind a norm that is not settled, and may be so
            raise ArgumentError(
                f"what the norm {wrong[0]!r} sees in batch {count - 1} of pass {k} is not finite. Mask such elements, "
                "leave the batch out, or take more passes if the statistics of the norms before it are far off."
            )
        least = min(float(m.count.max(initial=0)) for m in seen.values())
        if least > fullest:
            fullest, probe, was = least, batch, seen
        flat = _flat(seen)
        total = flat if total is None else _merged(total, flat)
        tick(k)
    if total is None:
        again = "" if k == 1 else " A function must return a new iterator each time."
        raise ArgumentError(f"there was no batch in pass {k}.{again}")
    return _unflat(total, was), count, probe, was


def by_norm(tree: Any, norms: NormTable) -> Seen:
    """Moments as collect gives them, on the host, by the norm they are of."""
    seen = {}
    for path, m in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda z: isinstance(z, Moments))[0]:
        if not isinstance(m, Moments):
            raise ArgumentError(
                f"collect must give a tree of Moments, and there is a {type(m).__name__} at "
                f"{jax.tree_util.keystr(path) or 'its root'}."
            )
        layer, last = place(path) if path else ((), "moments")
        inner = layer if last == "moments" else (*layer, last)
        names = ["/".join(words) for words in (inner, (*layer, last), inner[inner[:1] == ("moments",) :])]
        found = next((name for name in names if name in norms.paths), None)
        if found is None or found in seen:
            wrong = "twice." if found else f"and there is no such batch norm.{nearest(names[0], norms.paths)}"
            raise ArgumentError(
                f"collect gives moments of {found or names[0]!r}, {wrong} "
                f"There are: {', '.join(norms.paths[:8])}{', ...' if len(norms) > 8 else ''}."
            )
        seen[found] = Moments(_host(m.count, found), _host(m.mean, found), _host(m.m2, found), m.axes)
    if not seen:
        raise ArgumentError(
            "collect gave no moments at all. The norms must be those of jaxnorm.linen or jaxnorm.nnx and be asked for "
            "them, or collect takes them itself, with jaxnorm.moments."
        )
    return seen


def _host(z: Any, path: str) -> Any:
    """As NumPy's, in double precision."""
    if isinstance(z, jax.Array) and not (z.is_fully_addressable or z.is_fully_replicated):
        raise ArgumentError(
            f"the moments of {path!r} differ from process to process. Name the mapped axes in the norm's `over`."
        )
    z = np.asarray(z)
    return z.astype(np.promote_types(z.dtype, np.float64))


def _flat(seen: Seen) -> Moments:
    """All channels of all norms in a row: one merge for all of them."""
    parts = [(np.broadcast_to(m.count, m.mean.shape), m.mean, m.m2) for m in seen.values()]
    count, mean, m2 = (np.concatenate([z.ravel() for z in row]) for row in zip(*parts, strict=True))
    return Moments(count, mean, m2, ("c",))  # type: ignore[arg-type]


def _unflat(total: Moments, like: Seen) -> Seen:
    ends = np.cumsum([m.mean.size for m in like.values()])[:-1]
    parts = zip(*(np.split(z, ends) for z in (total.count, total.mean, total.m2)), strict=True)
    rows = zip(like.items(), parts, strict=True)
    return {path: Moments(*(z.reshape(m.mean.shape) for z in part), axes=m.axes) for (path, m), part in rows}


def _merged(a: Moments, b: Moments) -> Moments:
    """In float64: a float32 count loses elements from 2^24 on, which is a few hundred pictures."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, merge(*(jax.tree.map(jnp.asarray, m) for m in (a, b))))


def _finite(m: Moments) -> bool:
    return bool(np.isfinite(m.mean).all() and np.isfinite(m.m2).all())


def _same(a: Moments, b: Moments) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def written(variables: Any, chosen: NormTable, seen: Seen, batches: int, unbiased: bool) -> Any:
    """The variables with these statistics."""
    new = {}
    for layer in chosen:
        if layer.path not in seen or not _finite(seen[layer.path]):
            continue
        m, leaves = seen[layer.path], dict(zip(layer.leaves, get(variables, *layer.leaves.values()), strict=True))
        some = m.count > 0
        if unbiased and (m.count[some] <= 1).any():
            raise ArgumentError(f"unbiased divides by count - 1, and the count of {layer.path!r} is not above 1.")
        var = m.m2 / np.where(some, m.count - unbiased, 1)
        for name, value in (("mean", m.mean), ("var", var)):
            old = leaves[name]
            if _long(old) != _long(value) and old.shape != (value.size,):  # nnx keeps statistics flat
                raise ArgumentError(
                    f"the moments of {layer.path!r} lie along {m.axes}, shape {value.shape}, and its {name} has shape "
                    f"{old.shape}. Under shard_map they must be merged over the devices: name these in `over`."
                )
            kept = np.asarray(old)
            value = np.where(some.reshape(kept.shape), value.reshape(kept.shape), kept)
            new[layer.leaves[name]] = _like(old, value)
            if f"{name}_hidden" in leaves:
                hidden = leaves[f"{name}_hidden"]
                new[layer.leaves[f"{name}_hidden"]] = _like(hidden, value * bias_of(hidden, kept))
        if "num_updates" in leaves and "mean_hidden" not in leaves and some.any():
            old = leaves["num_updates"]
            new[layer.leaves["num_updates"]] = _like(old, np.full(old.shape, batches))
    return put(variables, new)


def bias_of(hidden: Any, average: Any) -> float:
    """Haiku's moving average before it is debiased, by what it is then: 1 - decay^counter. 0 before any update."""
    hidden, average = (np.asarray(z).astype(np.float64) for z in (hidden, average))
    return float(np.divide(hidden, average, out=np.zeros_like(hidden), where=average != 0).max(initial=0))


def _long(z: Any) -> list[int]:
    return [size for size in z.shape if size != 1]  # Haiku keeps the dimensions that it averages


def _like(old: Any, value: np.ndarray) -> Any:
    """The value in the dtype of the old one (the mean of complex x is complex), of its kind, and where it lay."""
    value = value.astype(np.promote_types(old.dtype, np.complex64) if np.iscomplexobj(value) else old.dtype)
    if not isinstance(old, jax.Array):
        return value
    return jax.device_put(value, old.sharding) if old.committed else jnp.asarray(value)


def _report(before, after, norms, chosen, seen: Seen, batches: int, passes: int, moving: set[str]) -> Report:
    rows = []
    for layer in chosen:
        row: dict[str, Any] = {"norm": layer.path}
        rows.append(row)
        if layer.path not in seen:
            row["note"] = "left as it was: collect gave no moments of it"
            continue
        count = seen[layer.path].count
        least = float(count.min(initial=np.inf))
        row["count"] = int(least) if least.is_integer() else least
        empty = int((count <= 0).sum())
        if empty:
            row["note"] = f"nothing counted in {empty} of {count.size} channels: left as they were"
        elif layer.path in moving:
            row["note"] = "not settled: by the new statistics it sees other inputs. Take more passes"
        where = (layer.leaves["mean"], layer.leaves["var"])
        (mean, var), (new_mean, new_var) = (
            [_host(z, layer.path) for z in get(tree, *where)] for tree in (before, after)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            row["mean moved"] = float(np.nanmax(np.abs(new_mean - mean) / np.sqrt(np.fmax(var, new_var)), initial=0))
            times = np.nan_to_num(new_var / var, nan=1.0, posinf=np.inf).ravel()
            row["var times"] = float(times[np.abs(np.log(times)).argmax()])
    done = sum(path in seen and bool((seen[path].count > 0).any()) for path in chosen.paths)
    title = f"{done} of {len(norms)} batch norms recalibrated, {batches} batches, {passes} pass" + "es" * (passes > 1)
    title += f", {len(moving)} not settled" if moving else ""
    return Report(title, COLUMNS, rows)


@contextlib.contextmanager
def _bar(batches: Any, show: bool) -> Iterator[Callable[[int], None]]:
    """Called with the pass after each batch. Silent without rich, and where nobody looks: in a pipe, in a log."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        show = False
    if not show:
        yield lambda k: None
        return
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
    length = len(batches) if hasattr(batches, "__len__") else None
    with Progress(*columns, console=console, disable=not (console.is_terminal or console.is_jupyter)) as bar:
        task = bar.add_task("recalibrate", total=length)

        def tick(k: int) -> None:
            total = None if length is None else length * k
            bar.update(task, advance=1, total=total, description=f"recalibrate, pass {k}")

        yield tick
