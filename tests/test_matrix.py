"""The same numbers in every context: norms x mappings x masks x everything that can be asked of a derivative.

`python tests/test_matrix.py` prints the table, with the worst error of each row. The reference is plain autodiff of the
formula, in float64, on one device, on the whole batch: nothing of jaxnorm is in it.

A context says how a step is moved onto devices, and nothing else: it takes a function of a device's own part, cuts the
arrays along the norm's sharded dimension, and puts the results together again. The step names the axes in `over` and
leaves parameter gradients to `jn.reduce_gradients`; no context changes a line of it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

DEVICES, EPSILON, MOMENTUM = 8, 0.1, 0.9  # an epsilon of 0.1 keeps y and all derivatives of order 1 under empty masks


@dataclasses.dataclass(frozen=True)
class Row:
    """A norm whose statistics cross devices, because `sharded`, a dimension it averages, is cut between them."""

    layout: str
    over: str
    features: str
    sharded: str
    shape: tuple[int, ...]
    center: bool = True
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    state: bool = False

    @property
    def dim(self) -> int:
        return self.layout.split().index(self.sharded)

    @property
    def feature_dim(self) -> int | None:
        """Where scale and bias are cut too."""
        names = self.features.split()
        return names.index(self.sharded) if self.sharded in names else None

    def __call__(self, mapped, x, scale, bias, mask):
        """y and its statistics: the new running ones where the norm has them, mean and variance otherwise."""
        over = f"{self.over} {mapped}"
        options: dict[str, Any] = {"scale": scale, "bias": bias, "features": self.features, "epsilon": EPSILON}
        options |= {"mask": mask, "sizes": self.sizes}
        if self.state:
            running = jn.running_stats(c=x.shape[-1])
            y, running = jn.batch_norm(x, running, self.layout, over, momentum=MOMENTUM, **options)
            return y, (running.mean, running.var)
        y, stats = jn.standardize(x, self.layout, over, center=self.center, **options)
        return y, (stats.mean, stats.var)

    def plain(self, x, scale, bias, mask):
        """The same as a formula. Group norm is written with its groups as a dimension."""
        names, shape = self.layout.split(), x.shape
        if self.sizes:
            names, x = ["n", "h", "g", "k"], x.reshape(*x.shape[:2], self.sizes["g"], -1)
        m = jnp.ones(x.shape) if mask is None else jnp.asarray(mask, x.dtype).reshape(x.shape)
        dims = tuple(names.index(name) for name in self.over.split())
        n = m.sum(dims, keepdims=True)
        some = jnp.maximum(n, 1)
        mean = (m * x).sum(dims, keepdims=True) / some if self.center else jnp.zeros_like(n)
        var = (m * (x - mean) ** 2).sum(dims, keepdims=True) / some
        y = ((x - mean) / jnp.sqrt(var + EPSILON)).reshape(shape)
        lengths = [size if name in self.features else 1 for name, size in zip(self.layout.split(), shape, strict=False)]
        lengths = [1] * (len(shape) - 1) + [shape[-1]] if self.sizes else lengths
        y = y * scale.reshape(lengths) + bias.reshape(lengths)
        mean, var, n = (jnp.squeeze(z, dims) for z in (mean, var, n))
        if not self.state:
            return y, (mean, var)
        mean, var = lax.stop_gradient((mean, var))  # no gradient flows into running state
        if n.ndim == 2:  # ghosts are merged before the running statistics see them
            whole = n.sum(0)
            pooled = (n * mean).sum(0) / jnp.maximum(whole, 1)
            var = (n * (var + (mean - pooled[None]) ** 2)).sum(0) / jnp.maximum(whole, 1)
            mean, n = pooled, whole
        keep = jnp.where(n > 0, MOMENTUM, 1.0)
        return y, ((1 - keep) * mean, keep + (1 - keep) * var)


ROWS = {
    "batch": Row("n c", "n", "c", "n", (256, 3), state=True),  # cut under jit: see sharded.py
    "ghost batch": Row("m n c", "n", "c", "n", (2, 16, 3), state=True),
    "SPADE": Row("n h c", "n h", "n h c", "n", (128, 2, 3), state=True),
    "layer, c sharded": Row("n c", "c", "c", "c", (3, 24)),
    "RMS, c sharded": Row("n c", "c", "c", "c", (3, 24), center=False),
    "instance, h sharded": Row("n h c", "h", "c", "h", (2, 24, 2)),
    "group, h sharded": Row("n h (g k)", "h k", "(g k)", "h", (2, 16, 4), sizes={"g": 2}),
}


def masks(row: Row) -> dict[str, np.ndarray | None]:
    along = [1] * len(row.shape)
    along[row.dim] = -1
    device = (np.arange(row.shape[row.dim]) * DEVICES // row.shape[row.dim]).reshape(along)
    uneven = np.arange(np.prod(row.shape)).reshape(row.shape) * 7 % 10 < 6
    return {
        "none": None,
        "uneven": uneven,
        "one device empty": uneven & (device != 2),
        "all empty": np.zeros_like(uneven),
    }


def data(row: Row) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """x, a cotangent and a tangent; scale, bias and their tangents."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, row.shape)
    features = [size for name, size in zip(row.layout.split(), row.shape, strict=False) if name in row.features.split()]
    features = features or [row.shape[-1]]
    scale = rng.uniform(0.5, 1.5, features)
    rest = [rng.normal(size=features) for _ in range(3)]
    arrays = [x, rng.normal(size=row.shape), rng.normal(size=row.shape)], [scale, *rest]
    return tuple([a.astype(np.float32) for a in part] for part in arrays)  # type: ignore[return-value]


PARTS = ("value", "state", "d x", "d scale", "d bias", "jvp", "penalty", "penalty d scale", "hvp", "hvp d scale")


def everything(f: Callable, reduce: Callable, x, w, tx, mask, scale, bias, ts, tb) -> dict[str, Any]:
    """Of f(x, scale, bias, mask) -> (y, statistics) all that the issue asks; `reduce` adds up partial sums."""

    def loss(x, scale, bias):
        y, stats = f(x, scale, bias, mask)
        return jnp.sum(jnp.sin(y) * w), stats

    def penalty(x, scale):
        return jnp.sum(jax.grad(loss, has_aux=True)(x, scale, bias)[0] ** 2)

    at, along = (x, scale, bias), (tx, ts, tb)
    gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    ((value, state), (dx, ds, db)), ((_, dstate), (hx, hs, _)) = jax.jvp(gradient, at, along)
    dy = jax.jvp(lambda *at: f(*at, mask)[0], at, along)[1]
    px, ps = jax.grad(penalty, (0, 1))(x, scale)
    ds, db, ps, hs = reduce((ds, db, ps, hs), "parameters")
    return {
        "value": reduce(value, "numbers"), "state": state, "d x": dx, "d scale": ds, "d bias": db, "jvp": (dy, dstate),
        "penalty": px, "penalty d scale": ps, "hvp": hx, "hvp d scale": hs,
    }  # fmt: skip


def kinds(row: Row) -> dict[str, Any]:
    """Which results are cut like x, which like the parameters, and which are the same on every device."""
    parameter = "parameter" if row.feature_dim is not None else "same"
    result = dict.fromkeys(PARTS, "same") | dict.fromkeys(("d x", "penalty", "hvp"), "x")
    result |= dict.fromkeys(("d scale", "d bias", "penalty d scale", "hvp d scale"), parameter)
    return result | {"state": ("same", "same"), "jvp": ("x", ("same", "same"))}


def ours(row: Row, mapped: str):
    """What one device does, in any context."""
    names = " ".join(f"{name.rstrip('?')}?" for name in mapped.split())

    def reduce(tree, what):
        return tree if what == "parameters" and row.feature_dim is not None else jn.reduce_gradients(tree, names)

    return functools.partial(everything, functools.partial(row, mapped), reduce)


@functools.cache
def reference(name: str, mask: str) -> dict[str, Any]:
    row = ROWS[name]
    with jax.enable_x64(True):
        (x, w, tx), parameters = jax.tree.map(lambda a: a.astype(np.float64), data(row))
        step = functools.partial(everything, row.plain, lambda tree, what: tree)
        return jax.tree.map(np.asarray, jax.jit(step)(x, w, tx, masks(row)[mask], *parameters))


# How arrays are cut: by kind, along which dimension, or None for what is the same everywhere.
def dim_of(row: Row, kind: str) -> int | None:
    return {"x": row.dim, "parameter": row.feature_dim, "same": None}[kind]


def arguments(row: Row, mask: str) -> tuple[list, list[str]]:
    (x, w, tx), parameters = data(row)
    kind = "same" if row.feature_dim is None else "parameter"
    return [x, w, tx, masks(row)[mask], *parameters], ["x"] * 4 + [kind] * 4


def rows_of(z, dim: int, grid: tuple[int, ...]):
    """One leading axis, or one of each of the grid, for the devices; the rest is a device's own part."""
    shape = (*z.shape[:dim], DEVICES, z.shape[dim] // DEVICES, *z.shape[dim + 1 :])
    return np.moveaxis(z.reshape(shape), dim, 0).reshape(*grid, *shape[:dim], *shape[dim + 1 :])


def whole_of(z, dim: int | None, grid: tuple[int, ...]):
    """The inverse; what should be the same on every device must be, to the bit."""
    z = np.asarray(z).reshape(DEVICES, *np.shape(z)[len(grid) :])
    if dim is None:
        np.testing.assert_array_equal(z, np.broadcast_to(z[:1], z.shape))
        return z[0]
    z = np.moveaxis(z, 0, dim)
    return z.reshape(*z.shape[:dim], -1, *z.shape[dim + 2 :])


def stacked(mapping: Callable, mapped: str = "devices", grid: tuple[int, ...] = (DEVICES,)) -> Callable:
    """Contexts that give every device a row: `mapping(f, in_axes)`."""

    def build(row: Row):
        _, sorts = arguments(row, "none")
        axes = tuple(None if dim_of(row, kind) is None else 0 for kind in sorts)
        run = jax.jit(mapping(ours(row, mapped), axes)) if grid == (DEVICES,) else mapping(ours(row, mapped), axes)

        def call(args):
            args = [z if z is None or dim_of(row, k) is None else rows_of(z, dim_of(row, k), grid)
                    for z, k in zip(args, sorts, strict=True)]  # fmt: skip
            return jax.tree.map(lambda k, z: whole_of(z, dim_of(row, k), grid), kinds(row), run(*args))

        return call

    return build


def vmap(f, axes):
    return jax.vmap(f, axes, axis_name="devices")


def pmap(f, axes):
    return jax.pmap(f, "devices", in_axes=axes)


def pmap_of_vmap(f, axes):
    return jax.pmap(jax.vmap(f, axes, axis_name="b"), "a", in_axes=axes)


def make_mesh(kind=AxisType.Auto, shape=(DEVICES,), names=("devices",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def spec_of(row: Row, kind: str, names) -> P:
    dim = dim_of(row, kind)
    return P() if dim is None else P(*[None] * dim, names)


def mapped_by_mesh(names: str = "devices", wrap: Callable = lambda f: f, inner: Callable | None = None, **options):
    """shard_map over a mesh of all devices, along one axis or several together."""

    def build(row: Row):
        axes = tuple(names.split())
        shape = (DEVICES,) if names == "devices" else (4, 2)
        mesh = make_mesh(shape=shape, names=("devices",) if names == "devices" else ("a", "b"))
        split = functools.partial(spec_of, row, names=axes)
        _, sorts = arguments(row, "none")
        specs: Any = tuple(split(kind) for kind in sorts)
        f = wrap(ours(row, names))
        run = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=jax.tree.map(split, kinds(row)), **options)
        run = jax.jit(run)
        return lambda args: jax.tree.map(np.asarray, run(*args))

    return build


def in_scan(f):
    """The second of two steps of a scan."""
    return lambda *args: jax.tree.map(lambda z: z[1], lax.scan(lambda c, _: (c, f(*args)), 0, length=2)[1])


def sharded(kind: AxisType, context: Callable = lambda mesh: contextlib.nullcontext()) -> Callable:
    """jit over sharded arrays: no axis is bound, and the step is the same: its names are marked `?`."""

    def build(row: Row):
        mesh = make_mesh(kind)
        run = jax.jit(ours(row, "devices?"))

        def call(args):
            _, sorts = arguments(row, "none")
            put = [z if z is None else jax.device_put(z, NamedSharding(mesh, spec_of(row, k, "devices")))
                   for z, k in zip(args, sorts, strict=True)]  # fmt: skip
            with context(mesh):
                return jax.tree.map(np.asarray, run(*put))

        return call

    return build


def one_device(row: Row) -> Callable:
    """Inside scan and remat too: tests/test_derivatives.py."""
    run = jax.jit(ours(row, "devices?"))
    return lambda args: jax.tree.map(np.asarray, run(*args))


CONTEXTS: dict[str, Callable] = {
    "one device": one_device,
    "vmap(axis_name)": stacked(vmap),
    "pmap": stacked(pmap),
    "pmap of vmap": stacked(pmap_of_vmap, "a b", (4, 2)),
    "shard_map": mapped_by_mesh(),
    "shard_map, check_vma=False": mapped_by_mesh(check_vma=False),
    "shard_map, two mesh axes": mapped_by_mesh("a b"),
    "shard_map, one axis to the compiler": mapped_by_mesh("a", axis_names={"a"}),
    "shard_map, inside scan": mapped_by_mesh(wrap=in_scan),
    "shard_map, inside remat": mapped_by_mesh(wrap=jax.checkpoint),
    "jit, Auto": sharded(AxisType.Auto),
    "jit, Auto, under jax.set_mesh": sharded(AxisType.Auto, jax.set_mesh),
    "jit, Explicit": sharded(AxisType.Explicit),
}


@functools.cache
def built(context: str, name: str) -> Callable:
    return CONTEXTS[context](ROWS[name])


def errors(context: str, name: str, mask: str) -> dict[str, float]:
    """The worst error of every part, in units of the largest number of that part (or 1)."""
    got, want = built(context, name)(arguments(ROWS[name], mask)[0]), reference(name, mask)

    def worst(a, b):
        assert np.shape(a) == np.shape(b)
        return np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b)))

    return {part: max(jax.tree.leaves(jax.tree.map(worst, got[part], want[part]))) for part in PARTS}


# float32 has 6e-8. A value sums up to 72 terms of order 1; a second derivative some hundred products of such sums that
# cancel, on one device as on many (the worst of all cells, 8e-6, is "hvp d scale" of ghost batch norm on one device).
TOLERANCE = dict.fromkeys(PARTS, 2e-6) | dict.fromkeys(("penalty", "penalty d scale", "hvp", "hvp d scale"), 1e-5)


def cells():
    """Norm by norm. A mesh in context changes the program only where the first dimension is averaged (sharded.py)."""
    for name, row in ROWS.items():
        first = row.layout.split()[0] in row.over.split()
        yield from ((name, context) for context in CONTEXTS if first or "set_mesh" not in context)


PRINTED_ONLY = ("ghost batch", "RMS, c sharded", "instance, h sharded")  # batch, layer and group norm go the same way


@pytest.mark.parametrize("mask", masks(ROWS["batch"]))
@pytest.mark.parametrize(("name", "context"), [cell for cell in cells() if cell[0] not in PRINTED_ONLY])
def test_every_context_gives_the_numbers_of_one_device_in_float64(name, context, mask):
    for part, error in errors(context, name, mask).items():
        assert error <= TOLERANCE[part], f"{part}: {error:.1e}"


def main() -> None:
    """The table, as Markdown: the worst error over all norms."""
    names = tuple(masks(ROWS["batch"]))
    print("| context | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for context in CONTEXTS:
        rows = [name for name, other in cells() if other == context]
        worst = [max(max(errors(context, name, mask).values()) for name in rows) for mask in names]
        print(f"| {context} | " + " | ".join(f"{error:.0e}" for error in worst) + " |", flush=True)
    print("| vmap(axis_name) inside shard_map |" + " AxisError, with advice |" * len(names))  # tests/test_mapped.py


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
