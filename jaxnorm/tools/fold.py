"""Batch norm taken into the layer before it or after it, for inference: the same function with fewer operations."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.moments import Moments
from jaxnorm.operands import as_array, check_epsilon
from jaxnorm.running import RunningStats
from jaxnorm.tools.adjacent import NOT_FINITE, Norm, norm_of, own_bias, place_after, place_before, uses
from jaxnorm.tools.edit import BIAS, Edit
from jaxnorm.tools.find import NormLayer, NormTable, Where, find_norms
from jaxnorm.tools.models import take_apart
from jaxnorm.tools.report import Report
from jaxnorm.tools.settings import DEFAULTS
from jaxnorm.tools.trace import Node, NotFolded, trace

COLUMNS = ["norm", "into", "the layer stands", "why not"]
PAIR_COLUMNS = [*COLUMNS[:3], "epsilon", "why not", "note"]
WILD = r"\*|\{\w+\}"
LINE = ("scale", "bias", "mean", "var")
OUT_AXIS = {"kernel": -1, "weight": 0, "w": -1}  # Flax, torch, Haiku


class Folded(NamedTuple):
    """variables: the tree without the norms that were folded. report: a row for each norm, into what or why not."""

    variables: Any
    report: Report


@named
def fold(
    apply: Callable,
    variables: Any,
    *inputs: Any,
    where: Where = None,
    rest: Literal["keep", "scale and shift"] = "keep",
) -> Folded:
    """The variables of a model without its batch norms: each is taken into the Dense or Conv before it or after it.

        before it:  (kernel x + bias) scale + shift = (kernel scale) x + (bias scale + shift)
        after it:   kernel (scale x + shift) + bias = (kernel scale) x + (bias + kernel shift)

    with scale and shift of the norm in evaluation. The model is traced once and read operation by operation: what is a
    norm's neighbour, which axis its channels are in the kernel, and what epsilon is, are seen, not guessed. Where both
    layers could take a norm, the one before it does. What is not certain is not done, and the report says why. A norm
    is all that stands between the first and the last operation that its variables enter, constants included.

    The result is for the same model built without these norms and with a bias in the layers that took one up (in Flax
    `norm=None, use_bias=True`). All other variables are as they were, bit for bit.

    Args:
        apply: the model in evaluation, `apply(variables, *inputs)`, in any framework.
        variables: its parameters and statistics: linen variables, nnx.State, Haiku's (params, state), nested dicts.
        *inputs: arrays or jax.ShapeDtypeStruct, of any batch size.
        where: which norms: see `find_norms`.
        rest: what becomes of a norm that no layer takes: "keep", or "scale and shift": its parameters become
            scale / sqrt(var + epsilon) and bias - mean * that, its statistics go, and the model has
            `x * scale + bias` in its place.

    Returns:
        Folded: (variables, report).

    Raises:
        ArgumentError: when there is no batch norm, the variables have no values, or an input is no array.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> def model(variables, x, norm=True):
        ...     x = x @ variables["dense"]["kernel"] + variables["dense"]["bias"]
        ...     if norm:
        ...         v = variables["bn"]
        ...         x = (x - v["mean"]) * jax.lax.rsqrt(v["var"] + 1.0) * v["scale"] + v["bias"]
        ...     return x
        >>> one = jnp.ones(2)
        >>> variables = {
        ...     "dense": {"kernel": jnp.array([[1.0, 2.0]]), "bias": one},
        ...     "bn": {"scale": 4 * one, "bias": 0 * one, "mean": one, "var": 3 * one},
        ... }
        >>> folded, report = jn.tools.fold(model, variables, jnp.ones(1))
        >>> print(report)
        1 of 1 norms folded
        norm  into   the layer stands  why not
        ----  -----  ----------------  -------
        bn    dense  before
        >>> folded["dense"]["kernel"].tolist(), model(folded, jnp.ones(1), norm=False).tolist()
        ([[2.0, 4.0]], [2.0, 4.0])

    Source: Jacob et al. 2018, section 3.2 (folding before); the equations above.

    Differs from: `torch.nn.utils.fusion`, which takes the pair of modules from the caller; Flax has nothing.
    """
    if not callable(apply):
        raise ArgumentError(f"apply must be a function of the variables and the inputs, got {apply!r}.")
    if rest not in ("keep", "scale and shift"):
        raise ArgumentError(f'rest must be "keep" or "scale and shift", got {rest!r}.')
    chosen = _chosen(variables, where)
    nodes = trace(apply, variables, *inputs)
    used, edit = uses(nodes), Edit(variables)
    rows: dict[str, dict[str, Any]] = {}
    norms: list[Norm] = []
    for layer in chosen:
        try:
            if layer.kind != "batch":
                raise NotFolded("it has no running mean and variance")
            norms.append(norm_of(layer, used))
        except NotFolded as reason:
            rows[layer.path] = {"why not": str(reason)}
    into_before: dict[Node, Node] = {}  # a step of a norm -> the layer before it that it has gone into
    for norm in sorted(norms, key=lambda norm: norm.output.order):  # of two in a row the first first
        rows[norm.layer.path] = _folded(edit, norm, into_before, rest)
    return Folded(edit.result(), _report(chosen, rows))


def _chosen(tree: Any, where: Where) -> NormTable:
    """The norms to fold: those asked for, or all that have running statistics."""
    norms = find_norms(tree)
    batch = NormTable(norm for norm in norms if norm.kind == "batch")
    if not batch:
        raise ArgumentError("there is no batch norm in the variables: no layer has a mean and a var (batch_stats).")
    chosen = batch if where is None else find_norms(tree, where)
    if not chosen:
        raise ArgumentError(f"where chose none of the {len(norms)} norms, of which {len(batch)} are batch norms.")
    return chosen


def _folded(edit: Edit, norm: Norm, into_before: dict[Node, Node], rest: str) -> dict[str, Any]:
    """Fold one norm, if a layer takes it. Returns its row of the report."""
    reasons = []
    for stands in ("before", "after"):
        try:
            layer, axis, line = place_before(norm, into_before) if stands == "before" else place_after(norm)
            _, bias = own_bias(layer)
            where = layer.kernel, bias, tuple(layer.outs.values()), axis, line
            edit.after(*where) if stands == "before" else edit.before(*where, layer.groups)
        except NotFolded as reason:
            reasons.append(str(reason))
            continue
        edit.remove(norm.layer)
        if stands == "before":
            into_before |= dict.fromkeys(norm.steps, layer.node)
        return {"into": layer.name, "the layer stands": stands}
    row: dict[str, Any] = {}
    if rest == "scale and shift":
        try:
            edit.scale_and_shift(norm.layer, norm.own_line())
            row["into"] = rest
        except NotFolded as reason:
            reasons.append(str(reason))
    return row | {"why not": "; ".join(dict.fromkeys(reasons))}


def _report(chosen: NormTable, rows: Mapping[str, Mapping[str, Any]], columns: list[str] = COLUMNS) -> Report:
    done = sum("the layer stands" in row for row in rows.values())
    title = f"{done} of {len(chosen)} norms folded"
    shifts = sum("into" in row for row in rows.values()) - done
    if shifts:
        title += f", {shifts} made scale and shift"
    return Report(title, columns, [{"norm": norm.path, **rows[norm.path]} for norm in chosen])


@named
def fold_pairs(
    tree: Any,
    pairs: Mapping[str, str],
    *,
    epsilon: float | Mapping[str, float] | None = None,
    out_axis: int | Mapping[str, int] | None = None,
) -> Folded:
    """Fold norms into the layers before them, as the caller pairs them: for a checkpoint without its model's code.

        kernel scale,   bias scale + shift,   with   scale = norm's / sqrt(var + epsilon),   shift = bias - mean scale

    Nothing but names and shapes is seen here. That the norm follows the layer at once, that no activation stands
    between, that the layer is used for nothing else, and epsilon, are on the caller's word: see `fold`.

    Args:
        tree: variables, as for `find_norms`; a flat torch state_dict too.
        pairs: path of the norm -> path of the layer before it. `*` or `{name}` in a norm's path stands for a word
            between slashes (or dots), and in the layer's for the same one.
        epsilon: of all these norms, or by the path of each. By default that of the framework whose names the tree has:
            1e-3 in Keras, 1e-5 in all others.
        out_axis: the axis of the kernels along which outputs lie, of all, or by the path of the layer. By default the
            last of a `kernel` (Flax) or `w` (Haiku), the first of a `weight` (torch, Equinox). A transposed convolution
            needs it: 1 in torch, -2 in Keras, in Haiku, and in Flax with transpose_kernel=True. The report notes a
            convolution of as many inputs as outputs, whose shape does not tell.

    Returns:
        Folded: (variables, report). Norms without a pair stay.

    Raises:
        ArgumentError: when a pattern matches no norm, a layer is not there, or their shapes do not fit; when a paired
            norm has no epsilon, and the names do not tell whose the tree is.

    Example:
        >>> import numpy as np, jaxnorm as jn
        >>> one = np.ones(2, np.float32)
        >>> norm = {"weight": 2 * one, "bias": one, "running_mean": 0 * one, "running_var": 3 * one}
        >>> tree = {"blocks.0.conv.weight": np.ones((2, 1), np.float32), **{f"blocks.0.bn.{k}": norm[k] for k in norm}}
        >>> folded, report = jn.tools.fold_pairs(tree, {"blocks/{i}/bn": "blocks/{i}/conv"}, epsilon=1.0)
        >>> {name: array.tolist() for name, array in folded.items()}
        {'blocks.0.conv.weight': [[1.0], [1.0]], 'blocks.0.conv.bias': [1.0, 1.0]}

    Source: Jacob et al. 2018, section 3.2.

    Differs from: `torch.nn.utils.fusion.fuse_conv_bn_eval`, which takes modules, one pair a call.
    """
    if not (isinstance(pairs, Mapping) and all(isinstance(z, str) for pair in pairs.items() for z in pair)):
        raise ArgumentError(f"pairs must be a mapping, path of the norm -> path of the layer, got {pairs!r}.")
    norms, edit = _chosen(tree, None), Edit(tree)
    epsilon = default_epsilon(tree)[0] if epsilon is None else epsilon
    epsilons = _by_path("epsilon", epsilon, norms.paths)
    axes = _by_path("out_axis", out_axis, edit.layers)
    for value in epsilons.values():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise ArgumentError(f"epsilon must be a number, not negative, got {value!r}.")
    for value in axes.values():
        if isinstance(value, bool) or not isinstance(value, Integral | None):
            raise ArgumentError(f"out_axis must be an integer, got {value!r}.")
    rows: dict[str, dict[str, Any]] = {norm.path: {"why not": "it has no pair"} for norm in norms}
    for norm, layer in _paired(norms, pairs):
        if norm.path not in epsilons:
            raise ArgumentError(f"epsilon says none for {norm.path!r}.")
        own = float(epsilons[norm.path])
        try:
            note = _take_up(edit, norm, layer, own, axes.get(layer))
        except NotFolded as reason:
            raise ArgumentError(f"{norm.path!r} into {layer!r}: {reason}.") from None
        edit.remove(norm)
        rows[norm.path] = {"into": layer, "the layer stands": "before", "epsilon": own, "note": note}
    return Folded(edit.result(), _report(norms, rows, PAIR_COLUMNS))


def default_epsilon(tree: Any, framework: str | None = None) -> tuple[float, str]:
    """Epsilon of a framework's batch norm, and the framework: by default that whose names the tree has."""
    try:
        framework = framework or take_apart(tree).framework
    except ArgumentError:
        raise ArgumentError("the names do not tell whose the norms are, and so what epsilon is: say epsilon.") from None
    return DEFAULTS[framework]["batch"]["epsilon"], framework


def _by_path(name: str, given: Any, paths: Collection[str]) -> dict[str, Any]:
    """What is given for all, or by path, as a dict by path."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(paths, given)
    found = {str(path).replace(".", "/"): value for path, value in given.items()}
    for path in found:
        if path not in paths:
            raise ArgumentError(f"{name} is given for {path!r}, which is not there.{nearest(path, paths)}")
    return found


def _paired(norms: NormTable, pairs: Mapping[str, str]) -> Iterator[tuple[NormLayer, str]]:
    """Each norm with the path of its layer. Patterns are read with dots as slashes."""
    seen: dict[str, str] = {}  # norm or layer -> what it is paired with
    for pattern, target in pairs.items():
        names = re.findall(WILD, pattern.replace(".", "/"))
        regex = re.compile("([^/]+)".join(map(re.escape, re.split(WILD, pattern.replace(".", "/")))))
        matches = [(norm, match) for norm in norms if (match := regex.fullmatch(norm.path))]
        if not matches:
            raise ArgumentError(f"{pattern!r} matches no batch norm.{nearest(pattern, norms.paths)}")
        for norm, match in matches:
            words = list(zip(names, match.groups(), strict=True))

            def word(wild: re.Match, words=words, pattern=pattern, target=target) -> str:
                found = next((pair for pair in words if pair[0] == wild[0]), None)
                if found is None:
                    raise ArgumentError(f"{wild[0]!r} in {target!r} stands for nothing in {pattern!r}.")
                if wild[0] == "*":
                    words.remove(found)
                return found[1]

            layer = re.sub(WILD, word, target.replace(".", "/"))
            for one, other in ((f"norm {norm.path!r}", layer), (f"layer {layer!r}", norm.path)):
                if one in seen:
                    raise ArgumentError(f"the {one} has two pairs, {seen[one]!r} and {other!r}.")
                seen[one] = other
            yield norm, layer


def _take_up(edit: Edit, norm: NormLayer, layer: str, epsilon: float, out_axis: int | None) -> str | None:
    """Fold a norm into the layer before it. Returns what is to be noted."""
    variables = edit.layers.get(layer, {})
    name = next((name for name in OUT_AXIS if name in variables), None)
    if name is None:
        known = [path for path, names in edit.layers.items() if OUT_AXIS.keys() & names.keys() and path != norm.path]
        raise NotFolded(f"that has no {', '.join(OUT_AXIS)}.{nearest(layer, known)}".rstrip("."))
    shape, axis = edit.leaves[variables[name]].shape, OUT_AXIS[name] if out_axis is None else out_axis
    if len(shape) < 2:
        raise NotFolded(f"its {name} has shape {tuple(shape)}, and is no kernel")
    if not -len(shape) <= axis < len(shape) or norm.shape != shape[axis:][:1]:
        raise NotFolded(
            f"the norm has shape {norm.shape}, the {name} {shape}, with its outputs along axis {axis}. "
            "Where they lie elsewhere, as in transposed convolutions, say out_axis"
        )
    own = {name: edit.value(path).reshape(-1) for name, path in norm.leaves.items() if name in LINE}
    with np.errstate(all="ignore"):
        scale = own.get("scale", 1.0) / np.sqrt(own["var"] + epsilon)
        shift = own.get("bias", 0.0) - own["mean"] * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise NotFolded(NOT_FINITE)
    axis %= len(shape)
    edit.after(variables[name], variables.get(BIAS[name]), (axis,), axis, (scale, shift))
    inputs, outputs = shape[:2] if name == "weight" else shape[-2:]
    if out_axis is None and len(shape) > 2 and inputs == outputs:
        return "as many inputs as outputs: a transposed convolution would need out_axis"
    return None


@named
def scale_and_shift(
    stats: RunningStats | Moments, scale: ArrayLike | None = None, bias: ArrayLike | None = None, *,
    epsilon: ArrayLike = 1e-5,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A norm with given statistics as one scale and one shift.

        scale' = scale / sqrt(var + epsilon),   bias' = bias - mean * scale',   y = x * scale' + bias'

    Args:
        stats: RunningStats, or Moments.
        scale, bias: of the norm, along the axes of `stats`; none means 1 and 0.
        epsilon: added to the variance, as by the norm.

    Returns:
        (scale', bias') along the axes of `stats`, float32 or wider.

    Raises:
        ArgumentError: when stats are no statistics, or their shapes differ.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> stats = jn.RunningStats(jnp.array([1.0]), jnp.array([3.0]), jnp.array(7), ("c",))
        >>> scale, bias = jn.tools.scale_and_shift(stats, jnp.array([4.0]), epsilon=1.0)
        >>> scale.tolist(), bias.tolist()
        ([2.0], [-2.0])

    Source: Ioffe and Szegedy 2015, algorithm 2, step 11.

    Differs from: Flax and torch have none. `y` differs from that of `normalize` by rounding: where the mean is large
        beside the standard deviation, x * scale' and bias' cancel.
    """
    if not isinstance(stats, RunningStats | Moments):
        raise ArgumentError(f"stats must be RunningStats or Moments, got {type(stats).__name__}.")
    dtype = jnp.promote_types(jnp.asarray(stats.var).dtype, jnp.float32)
    mean, var = jnp.asarray(stats.mean).real.astype(dtype), jnp.asarray(stats.var, dtype)
    factor = jax.lax.rsqrt(var + check_epsilon(epsilon, dtype))
    scale, bias = (
        as_array(z if z is not None else default, name) for z, default, name in ((scale, 1, "scale"), (bias, 0, "bias"))
    )
    for name, z in {"mean": stats.mean, "scale": scale, "bias": bias}.items():
        if jnp.iscomplexobj(z):
            raise ArgumentError(f"{name} is complex, and scale and shift are real here.")
        if jnp.shape(z) not in ((), var.shape):
            raise ArgumentError(f"{name} has shape {jnp.shape(z)}, the statistics {var.shape}.")
    factor = factor * scale.astype(dtype)
    return factor, bias.astype(dtype) - mean * factor
