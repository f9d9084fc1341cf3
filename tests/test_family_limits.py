"""What the papers say of their own norms' limits, the normalizer, the tree of kernels, and PEERS.md row 11."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
import reference
from family import CASES, RUNNING, C, H
from test_family import close, same

import jaxnorm as jn


def test_the_limits_of_the_papers():
    x, p, mask, _ = CASES[0].sample()
    scale, bias = p["scale"], p["bias"]
    options = {"scale": scale, "bias": bias, "mask": mask}

    @jax.jit
    def everything(x):
        batch, running = jn.batch_norm(x, RUNNING, "n h c", "n h", **options)
        switch = [jn.switchable_norm(x, RUNNING, hot, hot, "n h c", "n h", **options)[0] for hot in 200 * jnp.eye(3)]
        whitened = [f(x, jn.running_covariance(2, c=C), "n h c", "n h", epsilon=1e-6)[0] for f in
                    (jn.decorrelated_batch_norm, functools.partial(jn.iterative_norm, num_iterations=15))]  # fmt: skip
        return {
            "one ghost": jn.ghost_batch_norm(x, RUNNING, 1, "n h c", "n h", **options), "batch": (batch, running),
            "renorm": jn.batch_renorm(x, RUNNING, "n h c", "n h", r_max=1.0, d_max=0.0, **options),
            "switch": switch, "whitened": whitened,
            "instance": jn.instance_norm(x, "n h c", "h", epsilon=1e-5, **options),
            "layer": jn.standardize(x, "n h c", "h c", features="c", **options)[0],
            "unlimited": jn.batch_renorm(x, RUNNING, "n h c", "n h", r_max=1e9, d_max=1e9, **options)[0],
            "evaluation": jn.normalize(x, RUNNING, "n h c", scale=scale, bias=bias),
            "partial": jn.partial_rms_norm(x, 1.0, "n h c"), "rms": jn.rms_norm(x, "n h c"),
            "virtual": jn.virtual_batch_norm(x, jn.empty_moments("c", c=C), "n h c", "h", **options),
        }  # fmt: skip

    got = everything(x)
    for name in "one ghost", "renorm":
        jax.tree.map(close, got[name], got["batch"])
    for found, wanted in zip(got["switch"], (got["instance"], got["layer"], got["batch"][0]), strict=True):
        close(found, wanted)
    close(got["unlimited"], got["evaluation"], rtol=1e-5, atol=1e-5)
    close(got["partial"], got["rms"])
    close(got["virtual"], got["instance"])
    for y in got["whitened"]:
        z = np.asarray(y, np.float64).reshape(-1, C // 2, 2)
        covariance = np.einsum("ngi,ngj->gij", z, z) / len(z)
        close(covariance, np.broadcast_to(np.eye(2), covariance.shape), atol=2e-5)


def test_whitening_where_eigenvalues_meet():
    """Two channels of one variance and no covariance: eigenvectors have no derivative there, the whitening has."""
    with jax.enable_x64(True):
        x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -2.0], [-1.0, 2.0]])
        w = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))

        def loss(x):
            y, _ = jn.decorrelated_batch_norm(x, jn.running_covariance(2, c=2), "n c", "n")
            return jnp.sum(y * w)

        def paper(x):
            return np.sum(papers.decorrelated_batch_norm(x, np.zeros(2), np.eye(2)[None])[0] * np.asarray(w))

        close(jax.grad(loss)(x), reference.gradients(paper, (x,))[0], rtol=1e-6, atol=1e-6)


def test_weight_norm_starts_as_the_identity():
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    close(jn.weight_norm(kernel, scale=np.sqrt((kernel**2).sum((0, 1)))), kernel)


def test_spectral_norm_finds_the_largest_singular_value():
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    start = jn.spectral_state(jax.random.key(0), o=4)
    found, state = jax.jit(functools.partial(jn.spectral_norm, num_steps=100))(kernel, start)
    sigma = np.linalg.svd(kernel.reshape(-1, 4).astype(np.float64))[1][0]
    close(state.sigma, sigma)
    close(found, kernel / sigma)
    unchanged, still = jn.spectral_norm(kernel, state, num_steps=0)
    close(unchanged, found)
    same(still.u, state.u)


def test_cross_iteration_over_steps():
    """Steps of one layer whose kernel moves: what is past is moved to the kernel of now. One step lacks a channel."""
    rng = np.random.default_rng(0)
    history, past = jn.cross_iteration_history(jnp.zeros((C, C)), window=3), []
    step = jax.jit(functools.partial(jn.cross_iteration_batch_norm, lambda k, x: x @ k, layout="n c", over="n"))
    kernel = rng.normal(size=(C, C)).astype(np.float32)
    for i in range(5):
        x = rng.normal(1.0, 2.0, (6, C)).astype(np.float32)
        mask = np.ones((6, C), bool)
        mask[:, 1] = i != 2
        y, history = step(kernel, x, history, mask=mask)
        expected, past = papers.cross_iteration_batch_norm(
            lambda k, x: x @ k, kernel, x.astype(float), past, window=3, mask=mask
        )
        close(y, expected, rtol=1e-5, atol=1e-5)
        kernel = kernel + 0.05 * rng.normal(size=(C, C)).astype(np.float32)


def test_the_normalizer():
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e3, 2.0, (size, C)).astype(np.float32) for size in (1, 7, 0, 30)]
    fresh = normalizer = jn.normalizer(c=C)
    observe = jax.jit(lambda normalizer, x: normalizer.observe(x))
    for part in parts:
        normalizer = observe(normalizer, part)
    x = np.concatenate(parts).astype(float)
    close(normalizer.moments.mean, x.mean(0), rtol=1e-6)
    close(normalizer.moments.var, x.var(0), rtol=1e-4)
    y = normalizer.normalize(parts[-1])
    close(y, (parts[-1] - x.mean(0)) / x.std(0), atol=2e-4)  # the mean is a float32: to 1e3 * 6e-8 of it
    close(normalizer.denormalize(y), parts[-1], rtol=1e-6)
    close(normalizer.normalize(parts[-1], clip=0.5), np.clip(y, -0.5, 0.5))
    same(fresh.normalize(parts[-1]), parts[-1])
    with pytest.raises(ValueError, match="clip must be positive"):
        fresh.normalize(parts[-1], clip=-1.0)


def test_peers_11_group_norm_with_axes_left_out():
    """nnx GroupNorm is wrong where reduction_axes leaves axis 1: the row by name is right, frame by frame."""
    x = np.random.default_rng(0).normal(size=(2, 3, H, C)).astype(np.float32)
    y, _ = jn.standardize(x, "n t h (g k)", "h k", sizes={"g": 2}, epsilon=1e-6)
    frames = [[reference.standardize(x[n, t], "h (g k)", "h k", sizes={"g": 2}, epsilon=1e-6)[0] for t in range(3)]
              for n in range(2)]  # fmt: skip
    close(y, np.array(frames))


def test_map_kernels():
    params = {"a": {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2)}, "b": {"kernel": np.eye(2)}}
    states = {"a": {"kernel": jn.spectral_state(jax.random.key(0), o=2)},
              "b": {"kernel": jn.spectral_state(jax.random.key(1), o=2)}}  # fmt: skip
    new, after = jn.map_kernels(functools.partial(jn.spectral_norm, num_steps=30), params, states)
    close(new["a"]["kernel"], np.ones((3, 2)) / np.sqrt(6))
    close(after["a"]["kernel"].sigma, np.sqrt(6))
    assert new["a"]["bias"] is params["a"]["bias"]
    only_b = jn.map_kernels(lambda k: 2 * k, params, where=lambda path, leaf: path[0] == "b")
    close(only_b["b"]["kernel"], 2 * np.eye(2))
    assert only_b["a"]["kernel"] is params["a"]["kernel"]
    with pytest.raises(ValueError, match="no leaf of params"):
        jn.map_kernels(lambda k: k, params, where="weight")


def test_the_table_prints():
    rows = jn.norms()
    text, page, readme = str(rows), rows._repr_html_(), rows.markdown()
    for row in rows:
        for shown in text, page, readme:
            assert row.name in shown
            assert row.paper in shown
    assert rows["FiLM"].function is jn.film
    with pytest.raises(KeyError, match="no norm 'laier'"):
        rows["laier"]


def test_whitening_of_channels_that_repeat():
    """Duplicated channels, and fewer examples than channels: eigenvalues of 0, which eigh finds below it."""
    rng = np.random.default_rng(0)
    half = rng.normal(0.0, 100.0, (256, 8)).astype(np.float32)
    few = np.maximum(rng.normal(0.0, 30.0, (6, 16)), 0).astype(np.float32)
    for x in np.concatenate([half, half], 1), few:
        loss = lambda x: jnp.sum(jn.decorrelated_batch_norm(x, jn.running_covariance(16, c=16), "n c", "n")[0])  # noqa: E731
        y, _ = jax.jit(lambda x: jn.decorrelated_batch_norm(x, jn.running_covariance(16, c=16), "n c", "n"))(x)
        assert np.isfinite(y).all()
        assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


def test_spectral_norm_of_zeros_keeps_its_direction():
    start = jn.spectral_state(jax.random.key(0), o=3)
    zeros, state = jn.spectral_norm(jnp.zeros((4, 3)), start)
    same((zeros, state.u), (np.zeros((4, 3)), start.u))
    kernel, _ = jn.spectral_norm(10 * jnp.eye(4, 3), state, num_steps=3)
    close(kernel, np.eye(4, 3))


def test_channels_first():
    """The channels are the axis that is left, wherever it stands."""
    x, p, _, _ = CASES[0].sample()
    scale, bias = p["scale"], p["bias"]
    swapped = np.moveaxis(x, -1, 1)
    for norm, given, options in (
        (jn.batch_channel_norm, (2,), {"channel_scale": scale, "channel_bias": bias}),
        (jn.conditional_batch_norm, (np.array([0, 1, 1, 0]),), {"bias": np.stack([bias, scale])}),
    ):
        last, _ = norm(x, RUNNING, *given, "n h c", "n h", **options)
        first, _ = norm(swapped, RUNNING, *given, "n c h", "n h", **options)
        close(np.moveaxis(np.asarray(first), 1, -1), last)
    whitened = [jn.decorrelated_batch_norm(z, jn.running_covariance(2, c=C), layout, "n h")[0] for z, layout in
                ((x, "n h c"), (swapped, "n c h"))]  # fmt: skip
    close(np.moveaxis(np.asarray(whitened[1]), 1, -1), whitened[0])


X, RUNNING2 = np.ones((4, 2), np.float32), jn.running_stats(c=2)
WRONG = {
    "no such set": (lambda: jn.split_batch_norm(X, jn.running_stats("set c", set=2, c=2), np.int64(7)), "no set 7"),
    "no set axis": (lambda: jn.split_batch_norm(X, jn.running_stats(c=2), 1), "the first axis of stacked statistics"),
    "label": (lambda: jn.conditional_batch_norm(X, RUNNING2, np.array([0, 1, 2, 3]), scale=np.ones((3, 2))),
              "there are 3 classes"),
    "two tables": (lambda: jn.conditional_batch_norm(X, RUNNING2, np.zeros(4, int), scale=np.ones((3, 2)),
                                                     bias=np.ones((2, 2))), "one and the same"),
    "state": (lambda: jn.batch_renorm(X, {}), "must be RunningStats"),
    "limit": (lambda: jn.batch_renorm(X, jn.running_stats(c=2), r_max=0.5), "r_max is 1 or more"),
    "epsilon": (lambda: jn.evo_norm_b0(X, jn.running_stats(c=2), epsilon=-1.0), "epsilon must not be negative"),
    "complex": (lambda: jn.dynamic_tanh(X + 1j, 0.5), "of real numbers"),
    "which array": (lambda: jn.film(X, np.ones((4, 3)), np.ones((4, 2))), "scale has shape"),
    "float mask": (lambda: jn.partial_rms_norm(X, 0.5, mask=X), "weights="),
    "mapped": (lambda: jax.vmap(lambda k: jn.spectral_norm(k, jn.spectral_state(jax.random.key(0), o=2), "i o", "i d"),
                                axis_name="d")(X[None]), "gather the kernel first"),
    "kernel state": (lambda: jn.map_kernels(jn.weight_norm, {"kernel": X}, {}), "has nothing for the kernel"),
    "history": (lambda: jn.cross_iteration_batch_norm(lambda k, x: x @ k, X.T, X, None), "CrossIterationHistory"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert str(error.value).startswith("jaxnorm.")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_array_is_named(case):
    """One line of ours that names the call, and nothing from inside jax, for every norm."""
    x, p, _, _ = case.sample()
    wrong = {"text": ("abc", None)}
    if case.name != "cross-iteration batch":  # what its layer takes is the layer's to say
        wrong |= {"integers": (x.astype(np.int32), None), "a dimension too few": (x[0], None)}
    if case.name == "add and norm":  # the sum of integers and floats is one of floats
        del wrong["integers"]
    if case.masks:
        wrong |= {"mask": (x, np.ones(7, bool)), "float mask": (x, np.ones(x.shape, np.float32))}
    for what, (array, mask) in wrong.items():
        with pytest.raises(ValueError, match=r"^jaxnorm\.") as error:
            case.ours(array, p, case.state, mask, lambda names: names)
        assert type(error.value).__module__ == "jaxnorm.errors", what
    if case.state is not None:
        with pytest.raises(ValueError, match=r"^jaxnorm\..*must be"):
            case.ours(x, p, "no state", None, lambda names: names)
