"""Every rule over every norm of `jn.norms()` beyond the first five, whose table is table.py: against papers.py.

Compiling is what these tests cost: each puts what it asks of a norm into one jitted function.
"""


import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
import reference
from family import CASES, C, H, N, arrays
from table import NORMS

import jaxnorm as jn

ROUNDING = {"rtol": 2e-6, "atol": 2e-6}  # a handful of float32 operations on numbers of size 1 to 5

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
masked_cases = pytest.mark.parametrize("case", [case for case in CASES if case.masks], ids=lambda case: case.name)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
@masked_cases
def test_everything_masked(case, dtype):
    """Finite, also where x / sqrt(epsilon) passes the largest float16."""
    x, p, _, cotangent = case.sample()
    if dtype == jnp.float16:
        x = jnp.asarray(500 * x, dtype)
    nothing = np.zeros(case.shape, bool)

    @jax.jit
    def everything(x, p):
        (y, state), back = jax.vjp(lambda x, p: case.ours(x, p, case.state, nothing, alone), x, p)
        zeros = jax.tree.map(lambda z: jnp.zeros_like(z) if jnp.issubdtype(z.dtype, jnp.floating)
                             else np.zeros(z.shape, jax.dtypes.float0), state)  # fmt: skip
        return y, back((cotangent.astype(y.dtype), zeros)), state

    y, gradients, state = everything(x, p)
    assert np.isfinite(y).all()
    if dtype == jnp.float32:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    same(state, case.state)


# --- types


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@every_case
def test_half_precision(case, dtype):
    x, p, mask, _ = case.sample()
    x = jnp.asarray(x, dtype)
    y, state = jax.jit(lambda x: case.ours(x, p, case.state, mask, alone))(x)
    expected, _ = case.paper(np.asarray(x, np.float32), p, arrays(case.state), mask)
    total_of_residual = case.name in ("add and norm", "QK", "cross-iteration batch")  # float32 of the size of x
    assert total_of_residual or y.dtype == dtype
    if case.name != "cross-iteration batch":  # whose layer makes z in float32 and bfloat16 as it likes
        unit = float(jnp.finfo(dtype).eps) / 2
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


# --- what is kept for the backward pass


FREE = {"add and norm": 1, "adaptive instance": 1, "gated RMS": 1, "QK": 1}  # arrays of the size of x beside x
WIDE = 64  # times as many channels: then what is small is small


def wider(z, last=C):
    """A parameter or a state of WIDE times as many channels; covariances of as many more groups."""
    along = 0 if jnp.ndim(z) == 3 and z.shape == (2, 2, 2) else -1
    return z if not jnp.ndim(z) or z.shape[-1] not in (2, last) else jnp.concatenate([z] * WIDE, along)


def kept_bytes(function, *given):
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *given))
    return sum(z.size * z.dtype.itemsize for z in kept)


LARGE = "cross-iteration batch", "SPADE", "virtual batch"


# Without those that keep what they are given as large as x: a layer's input, a scale for every place.
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in LARGE],
                         ids=lambda case: case.name)  # fmt: skip
def test_only_x_is_kept(case):
    shape = (N, 16 * H, C * WIDE) if case.shape == (N, H, C) else (*case.shape[:2], C * WIDE)
    big, size = jax.ShapeDtypeStruct(shape, jnp.bfloat16), 2 * np.prod(shape)
    _, p, _, _ = case.sample()
    logits = {name: p[name] for name in p if name.endswith("logits")}
    p = {name: np.zeros(shape, jnp.bfloat16) if z.shape == (N, H, C) else wider(z) for name, z in p.items()} | logits
    state = jax.tree.map(wider, case.state)
    kept = kept_bytes(lambda x, p: case.ours(x, p, state, None, alone)[0], big, p)
    given = sum(z.size * z.dtype.itemsize for z in p.values())
    statistics = 8 * 4 * max(N * 16 * H, N * C * WIDE)  # eight float32 for each row, or channel of an example
    channels = 8 * 4 * C * WIDE
    assert kept <= (1 + FREE.get(case.name, 0)) * size + given + statistics + channels


def test_plain_autodiff_keeps_more():
    """What the bound above is worth: the formula as it stands is over it."""
    x = jax.ShapeDtypeStruct((N, 16 * H, C * WIDE), jnp.bfloat16)

    def plain(x):
        z = x.astype(jnp.float32)
        c = z - z.mean((0, 1), keepdims=True)
        return (c / jnp.sqrt((c**2).mean((0, 1), keepdims=True) + 1e-5)).astype(x.dtype)

    assert kept_bytes(plain, x) > 2 * 2 * x.size
