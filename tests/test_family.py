"""Every rule over every norm of `jn.norms()` beyond the first five, whose table is table.py: against papers.py.

Compiling is what these tests cost: each puts what it asks of a norm into one jitted function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
import reference
from family import CASES, C, H, N, arrays
from jax.sharding import PartitionSpec as P
from table import NORMS

import jaxnorm as jn

ROUNDING = {"rtol": 2e-6, "atol": 2e-6}  # a handful of float32 operations on numbers of size 1 to 5

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
masked_cases = pytest.mark.parametrize("case", [case for case in CASES if case.masks], ids=lambda case: case.name)
sharded_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.sharded is not None], ids=lambda case: case.name
)


def alone(names):
    return names


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, **(tolerance or ROUNDING))


def same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


def test_no_norm_is_missing():
    """Of the table, of the tests, of the public names, of the modules."""
    rows = jn.norms()
    assert len(set(rows.names)) == len(rows)
    assert {row.name for row in rows[:5]} <= {norm.name for norm in NORMS}
    assert [case.name for case in CASES] == [row.name for row in rows[5:]]
    ends = ("_norm", "_renorm", "_tanh", "_erf", "_standardization", "_b0", "_s0", "film", "spade")
    norms = {name for name in jn.__all__ if name.endswith(ends)}
    assert {row.function.__name__ for row in rows} == norms
    assert all(getattr(jn, row.function.__name__) is row.function for row in rows)


# --- values and derivatives


@every_case
def test_values_and_state(case):
    x, p, mask, _ = case.sample()
    masks = [None] if mask is None else [None, mask]
    results = jax.jit(lambda x, p: [case.ours(x, p, case.state, mask, alone) for mask in masks])(x, p)
    for mask, (y, state) in zip(masks, results, strict=True):
        expected, carried = case.paper(x, p, arrays(case.state), mask)
        assert y.dtype == x.dtype
        close(y, expected, **case.close)
        for found, wanted in zip(arrays(state), carried or (), strict=True):
            close(found, wanted)


def number_of(case, x, p, mask, cotangent):
    """The paper's loss as a function of x and the parameters, with what is a constant to the gradient fixed."""
    state = arrays(case.state)
    fixed = None if case.constants is None else case.constants(papers.wide(x), p, state, mask)

    def number(x, *values):
        now = dict(zip(p, values, strict=True))
        return np.sum((case.paper(x, now, state, mask)[0] if fixed is None else fixed(x, now)) * cotangent)

    return number


@every_case
def test_gradients(case):
    """By central differences of the paper's formula, what is a constant to the gradient held fixed."""
    x, p, mask, cotangent = case.sample()
    masks = [None] if mask is None else [None, mask]

    def loss(x, p, mask):
        return jnp.sum(case.ours(x, p, case.state, mask, alone)[0] * cotangent)

    everything = jax.jit(lambda x, p: [jax.grad(loss, (0, 1))(x, p, mask) for mask in masks])(x, p)
    names = list(p)
    for mask, (dx, dp) in zip(masks, everything, strict=True):
        expected = reference.gradients(number_of(case, x, p, mask, cotangent), (x, *p.values()))
        for actual, wanted in zip((dx, *(dp[name] for name in names)), expected, strict=True):
            close(actual, wanted, rtol=5e-6, atol=5e-6 * max(1, np.abs(wanted).max()))


@every_case
def test_second_derivatives_in_both_modes(case):
    """Forward over reverse and reverse over reverse agree with differences of the first, in float64."""
    with jax.enable_x64(True):
        x, p, mask, cotangent = jax.tree.map(
            lambda z: jnp.asarray(z, jnp.float64) if z.dtype == np.float32 else z, case.sample()
        )
        state = jax.tree.map(
            lambda z: jnp.asarray(z, jnp.float64) if jnp.issubdtype(z.dtype, jnp.floating) else z, case.state
        )
        t = jnp.asarray(np.random.default_rng(5).normal(size=x.shape))

        def gradient(x):
            return jax.grad(lambda x: jnp.sum(jnp.sin(case.ours(x, p, state, mask, alone)[0]) * cotangent))(x)

        @jax.jit
        def everything(x):
            forward = jax.jvp(gradient, (x,), (t,))[1]
            reverse = jax.grad(lambda x: jnp.vdot(gradient(x), t))(x)
            step = 1e-6
            return forward, reverse, (gradient(x + step * t) - gradient(x - step * t)) / (2 * step)

        forward, reverse, differences = everything(x)
        assert all(np.isfinite(z).all() for z in (forward, reverse))
        if case.constants is None:  # differences move what is a constant to the gradient
            close(forward, differences, rtol=1e-6, atol=1e-6 * np.abs(differences).max())
            close(reverse, forward, rtol=1e-8, atol=1e-8 * np.abs(differences).max())


@every_case
def test_vmap_is_a_loop(case):
    samples = case.sample(0), case.sample(1)
    x, p, mask, _ = jax.tree.map(lambda *z: np.stack(z), *samples)
    both = jax.jit(jax.vmap(lambda x, p, mask: case.ours(x, p, case.state, mask, alone)[0]))(x, p, mask)
    for y, (x, p, mask, _) in zip(both, samples, strict=True):
        close(y, case.paper(x, p, arrays(case.state), mask)[0], **case.close)


# --- masks


@masked_cases
def test_masked_slots_reach_nothing(case):
    x, p, mask, cotangent = case.sample()
    counted = cotangent * mask.astype(np.float32)

    @jax.jit
    def everything(x):
        def loss(x, p):
            y, state = case.ours(x, p, case.state, mask, alone)
            return jnp.sum(y * counted), (jnp.where(mask, y, 0), state)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, p)

    clean = everything(np.where(mask, x, np.float32(0)))
    assert not np.asarray(clean[1][0])[~mask].any() or case.name == "cross-iteration batch"  # there z is masked, not x
    assert np.asarray(clean[1][0]).any()
    if case.name != "cross-iteration batch":
        for poison in np.nan, np.inf, -np.inf, 1e15:
            same(everything(np.where(mask, x, np.float32(poison))), clean)


@masked_cases
def test_everything_masked(case):
    x, p, _, cotangent = case.sample()
    nothing = np.zeros(case.shape, bool)

    @jax.jit
    def everything(x, p):
        (y, state), back = jax.vjp(lambda x, p: case.ours(x, p, case.state, nothing, alone), x, p)
        zeros = jax.tree.map(lambda z: jnp.zeros_like(z) if jnp.issubdtype(z.dtype, jnp.floating)
                             else np.zeros(z.shape, jax.dtypes.float0), state)  # fmt: skip
        return y, back((cotangent, zeros)), state

    y, gradients, state = everything(x, p)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))
    same(state, case.state)


# --- types


@every_case
def test_half_precision(case):
    x, p, mask, _ = case.sample()
    x = jnp.asarray(x, jnp.bfloat16)
    y, state = jax.jit(lambda x: case.ours(x, p, case.state, mask, alone))(x)
    expected, _ = case.paper(np.asarray(x, np.float32), p, arrays(case.state), mask)
    total_of_residual = case.name in ("add and norm", "QK", "cross-iteration batch")  # float32 of the size of x
    assert total_of_residual or y.dtype == jnp.bfloat16
    if case.name != "cross-iteration batch":  # whose layer makes z in float32 and bfloat16 as it likes
        unit = float(jnp.finfo(jnp.bfloat16).eps) / 2
        bound = case.rounded * unit * np.abs(expected).max() if case.rounded > 1 else 1e-5
        close(np.asarray(y, np.float32), expected, rtol=1.02 * unit, atol=bound)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (np.float32, np.int32)


@pytest.mark.parametrize("case", [case for case in CASES if case.state is not None], ids=lambda case: case.name)
def test_state_goes_round_a_scan(case):
    x, p, mask, _ = case.sample()
    twice = jnp.stack([jnp.asarray(x, jnp.bfloat16)] * 2)
    first = jax.jit(lambda state: jax.lax.scan(
        lambda state, x: case.ours(x, p, state, mask, alone)[::-1], state, twice)[0])(case.state)  # fmt: skip
    kinds = jax.tree.map(lambda z: (z.shape, z.dtype), case.state)
    assert jax.tree.map(lambda z: (z.shape, z.dtype), first) == kinds


# Without those whose other arguments have a length along n.
ALONG_N = {"rows_scale", "map_scale", "style", "gate", "residual", "key"}


@pytest.mark.parametrize(
    "case", [case for case in CASES if not ALONG_N & set(case.parameters) and case.name != "conditional batch"],
    ids=lambda case: case.name,
)  # fmt: skip
def test_no_examples(case):
    x, p, mask, _ = case.sample()
    mask = None if mask is None else mask[:0]

    @jax.jit
    def everything(x, p):
        (y, state), back = jax.vjp(lambda x, p: case.ours(x, p, case.state, mask, alone), x, p)
        zeros = jax.tree.map(lambda z: jnp.zeros_like(z) if jnp.issubdtype(z.dtype, jnp.floating)
                             else np.zeros(z.shape, jax.dtypes.float0), state)  # fmt: skip
        return y, back((jnp.ones_like(y), zeros)), state

    y, gradients, state = everything(x[:0], p)
    assert y.shape == (0, *case.shape[1:])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    if case.masks:
        same(state, case.state)


# --- devices


def cut(z, dim):
    """A leading axis of two devices out of dimension `dim`: uneven parts are what the mask makes of it."""
    return np.stack(np.split(z, 2, dim))


@sharded_cases
def test_devices(case):
    """Two devices under vmap, the second with a few entries that count or none: numbers, state and gradients of one."""
    x, p, mask, cotangent = case.sample()
    size = x.shape[case.sharded]
    if size % 2:  # H is odd
        x, mask, cotangent = (None if z is None else np.concatenate([z, z], case.sharded) for z in (x, mask, cotangent))
        size *= 2
    masks = [None]
    if case.masks:
        second = np.arange(size).reshape([-1 if d == case.sharded else 1 for d in range(3)]) >= size // 2
        masks += [mask & ~second | (mask & (np.arange(C) == 0)), mask & ~second]
    along = 0 if case.sharded == 2 else None

    def loss(x, p, mask, w):
        y, state = case.ours(x, p, case.state, mask, lambda names: f"{names} devices")
        return jax.lax.psum(jnp.sum(y * w), "devices"), (y, state)

    def step(x, p, mask, w):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, p, mask, w)

    cut_p = {name: cut(z, 0) if along == 0 and z.ndim else z for name, z in p.items()}
    axes = {name: 0 if along == 0 and z.ndim else None for name, z in p.items()}

    @jax.jit
    def everything(x, p, w):
        run = jax.vmap(step, (0, axes, 0, 0), axis_name="devices")
        return [run(x, p, mask if mask is None else cut(mask, case.sharded), w) for mask in masks]

    @jax.jit
    def whole(x, p):
        def one(x, p, mask):
            y, state = case.ours(x, p, case.state, mask, alone)
            return jnp.sum(y * cotangent), (y, state)

        return [jax.value_and_grad(one, (0, 1), has_aux=True)(x, p, mask) for mask in masks]

    def joined(z):
        return np.concatenate(list(np.asarray(z)), case.sharded)

    results = everything(cut(x, case.sharded), cut_p, cut(cotangent, case.sharded))
    for mask, result, wanted in zip(masks, results, whole(x, p), strict=True):
        ((_, (y, state)), (dx, dp)), ((_, (one, kept)), (dx1, dp1)) = result, wanted
        if case.name != "ghost batch":  # its ghosts are each device's own
            close(joined(y), case.paper(x, p, arrays(case.state), mask)[0], **case.close)
        close(joined(y), one)
        for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
            for device in found:
                close(device, wanted, rtol=1e-5, atol=1e-5 * max(1, np.abs(wanted).max(initial=0)))
        # vmap gives each device's own gradient of the summed loss, n times over: psum's transpose is a psum
        close(joined(dx) / 2, dx1, rtol=1e-5, atol=1e-5)
        for name in p:
            total = np.concatenate(list(dp[name])) if axes[name] == 0 else np.sum(dp[name], 0)
            close(total / 2, dp1[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["batch renorm", "streaming", "EvoNorm B0", "switchable", "batch-channel",
                                  "decorrelated batch", "iterative", "cross-iteration batch"])  # fmt: skip
def test_shard_map(name):
    """Under check_vma=True: state leaves replicated, and numbers are those of one device."""
    case = next(case for case in CASES if case.name == name)
    x, p, mask, _ = case.sample()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("devices"), P(), P("devices")), out_specs=(P("devices"), P())
    )
    def step(x, p, mask):
        return case.ours(x, p, case.state, mask, lambda names: f"{names} devices")

    y, state = step(x, p, mask)
    expected, carried = case.paper(x, p, arrays(case.state), mask)
    close(y, expected, **case.close)
    for found, wanted in zip(arrays(state), carried, strict=True):
        close(found, wanted)


# --- what is kept for the backward pass


FREE = {"add and norm": 1, "adaptive instance": 1, "gated RMS": 1, "QK": 1}  # arrays of the size of x beside x


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("cross-iteration batch", "SPADE")],
                         ids=lambda case: case.name)  # fmt: skip
def test_only_x_is_kept(case):
    big = jax.ShapeDtypeStruct((N, 256 * H, C) if case.shape == (N, H, C) else case.shape, jnp.bfloat16)
    _, p, _, _ = case.sample()
    p = {name: np.zeros((N, 256 * H, C), jnp.bfloat16) if z.shape == (N, H, C) else z for name, z in p.items()}

    def back(x, p):
        return jax.vjp(lambda x, p: case.ours(x, p, case.state, None, alone)[0], x, p)[1]

    kept = jax.tree.leaves(jax.eval_shape(back, big, p))
    given = sum(z.size * z.dtype.itemsize for z in p.values())
    rows = N * 256 * H * 4 * 8  # up to eight float32 statistics for each row of the layer family's
    size = big.size * 2
    assert sum(z.size * z.dtype.itemsize for z in kept) <= (1 + FREE.get(case.name, 0)) * size + given + rows + 4096


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["Auto", "Explicit"])
@every_case
def test_jit_over_sharded_examples(case, kind):
    """No name in `over`: the numbers are those of the whole batch."""
    x, p, mask, cotangent = case.sample()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(kind,), devices=jax.devices()[:2])
    rows, whole = jax.NamedSharding(mesh, P("devices")), jax.NamedSharding(mesh, P())
    if case.shape[0] != N:  # a kernel
        rows = jax.NamedSharding(mesh, P(None, None, "devices"))

    def step(x, p, w, mask):
        def loss(x, p):
            y, state = case.ours(x, p, case.state, mask, alone)
            return jnp.sum(y * w), (y, state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, p)

    with jax.set_mesh(mesh):
        placed = jax.device_put((x, cotangent, mask), rows)
        (dx, dp), (y, state) = jax.jit(step)(placed[0], jax.device_put(p, whole), *placed[1:])
    expected, carried = case.paper(x, p, arrays(case.state), mask)
    close(y, expected, **case.close)
    for found, wanted in zip(arrays(state), carried or (), strict=True):
        close(found, wanted)
    (dx1, dp1), _ = jax.jit(step)(x, p, cotangent, mask)
    for found, wanted in zip(jax.tree.leaves((dx, dp)), jax.tree.leaves((dx1, dp1)), strict=True):
        close(found, wanted, rtol=1e-5, atol=1e-5 * max(1, np.abs(wanted).max()))
