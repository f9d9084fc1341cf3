"""jaxnorm.tools.fold on chains of operations drawn at random around a layer and its norm: it refuses, or is right.

All axes are of one length, so that nothing but the numbers tells a fold along the wrong one. The same function is the
model before and after: it leaves out the norms that its variables lack, and adds the biases that they have.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxnorm.tools.fold import fold

N = 4
PERMUTED = np.array([2, 0, 3, 1])
WNC = lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1))  # of [n, w, c] with a kernel [w, i, o]


def there_and_back(dtype):
    return lambda z: z.astype(dtype).astype(z.dtype)


# What may happen to an array of any rank, along its last two axes
MOVES = {
    "nothing": lambda z: z,
    "flip last": lambda z: z[..., ::-1],
    "flip second last": lambda z: jnp.flip(z, -2),
    "flip first": lambda z: jnp.flip(z, 0),
    "swap": lambda z: z.swapaxes(-1, -2),
    "swap by reshape": lambda z: lax.reshape(z, z.shape, (*range(z.ndim - 2), z.ndim - 1, z.ndim - 2)),
    "reshape and back": lambda z: z.reshape(-1, z.shape[-1]).reshape(z.shape),
    "mix": lambda z: z.reshape(*z.shape[:-2], 2, -1).swapaxes(-1, -2).reshape(z.shape),
    "ones": lambda z: z[:, None].swapaxes(0, 1)[0],
    "roll": lambda z: jnp.roll(z, 1, -1),
    "permute": lambda z: z[..., PERMUTED],
    "concatenate": lambda z: jnp.concatenate([z[..., 1:], z[..., :1]], -1),
    "sort": lambda z: jnp.sort(z, -1),
    "cumsum": lambda z: jnp.cumsum(z, -1),
    "slice": lambda z: lax.dynamic_slice_in_dim(z, 1, z.shape[0] - 1) if z.shape[0] > 1 else z,
    "where": lambda z: jnp.where(z > 0, z, 0.5 * z),
    "double": lambda z: 2.0 * z,
    "self": lambda z: z + z,
    "negative": lambda z: -z,
    "shift": lambda z: z + jnp.arange(z.shape[-1], dtype=z.dtype).reshape((1,) * (z.ndim - 1) + (-1,)),
    "barrier": lambda z: lax.optimization_barrier((z, z[..., :1]))[0],
    "name": lambda z: checkpoint_name(lax.stop_gradient(z), "z"),
    "remat": jax.checkpoint(lambda z: z),
    "no precision lost": lambda z: lax.reduce_precision(z, 8, 23),
}
STEPS = {
    "int": lambda z: (8 * z).astype(jnp.int32).astype(jnp.float32) / 8,
    "int8": there_and_back(jnp.int8),
    "bool": there_and_back(bool),
    "float8": there_and_back(jnp.float8_e4m3fn),
    "reduce precision": lambda z: lax.reduce_precision(z, 5, 2),
}
ROUNDED = {"bfloat16": there_and_back(jnp.bfloat16), "float16": there_and_back(jnp.float16)}
OPS = MOVES | STEPS | ROUNDED
MORE = {
    "relu": jax.nn.relu,
    "pad": lambda z: jnp.pad(z, ((0, 0), (1, 0), (0, 0))),
    "circular": lambda z: jnp.concatenate([z, z[:, :1]], 1),
    "repeat": lambda z: jnp.broadcast_to(z[None], (2, *z.shape)).reshape(-1, *z.shape[1:]),
    "spread": lambda z: jnp.broadcast_to(z[:, :1], z.shape),
}
KERNEL_OPS = OPS | {"box": lambda k: jnp.broadcast_to(k[:1], k.shape) if k.ndim == 3 and k.shape[0] == 1 else k}
BIAS_OPS = {
    "plain": lambda b: b.reshape(1, 1, -1),
    "spread": lambda b: jnp.broadcast_to(b.reshape(1, 1, -1), (1, 1, N)),
    "along w": lambda b: b.reshape(1, -1, 1),
    "first": lambda b: jnp.broadcast_to(b[:1], (N,)).reshape(1, 1, -1),
} | {name: (lambda b, op=OPS[name]: op(b.reshape(1, 1, -1))) for name in ("flip last", "permute", "int", "self")}


def conv(padding: str | list[tuple[int, int]] = "VALID", **more):
    def layer(k, x):
        return lax.conv_general_dilated(x, k, (1,), padding, dimension_numbers=WNC, **more)

    return layer


LAYERS = {  # and the shape of the kernel
    "dense": (lambda k, x: x @ k, (N, N)),
    "kernel first": (lambda k, x: jnp.einsum("oi,nwi->nwo", k, x), (N, N)),
    "over two": (lambda k, x: jnp.einsum("nwi,wio->no", x, k)[:, None], (N, N, N)),
    "flattened": (lambda k, x: (x.reshape(x.shape[0], -1) @ k.reshape(-1, N))[:, None], (N, N, N)),
    "conv": (conv(), (2, N, N)),
    "pointwise": (conv(), (1, N, N)),
    "box": (lambda k, x: conv()(jnp.broadcast_to(k, (2, N, N)), x), (1, N, N)),
    "padded": (conv("SAME"), (2, N, N)),
    "cropped": (conv([(-1, 0)]), (2, N, N)),
    "grouped": (conv(feature_group_count=2), (2, N // 2, N)),
    "depthwise": (conv(feature_group_count=N), (2, 1, N)),
    "transposed": (conv([(1, 1)], lhs_dilation=(2,)), (2, N, N)),
    "batch groups": (conv(batch_group_count=2), (2, N, N)),
    "channels first": (
        lambda k, x: lax.conv_general_dilated(
            x.swapaxes(1, 2), k, (1,), "VALID", dimension_numbers=("NCW", "WIO", "NWC")
        ),
        (2, N, N),
    ),
}  # fmt: skip


def drawn(rng):
    """A chain: names of operations, with one layer and one or two norms in it, and variables for it."""
    name = str(rng.choice(list(LAYERS)))

    def some(ops, most):
        return [str(z) for z in rng.choice(list(ops), rng.integers(most + 1))]

    between = OPS | MORE
    core = ["norm", *some(between, 2), "layer"]
    core = core[::-1] if rng.random() < 0.6 else core
    chain = [*some(between, 1), *core, *some(between, 1), *(["other norm"] if rng.random() < 0.3 else []), "sin"]
    kernel = str(rng.choice(list(KERNEL_OPS))) if rng.random() < 0.4 else "nothing"
    has_bias = rng.random() < 0.6  # one that fold adds is added as a layer does
    bias = str(rng.choice(list(BIAS_OPS))) if has_bias and rng.random() < 0.5 else "plain"
    late = bool(has_bias and rng.random() < 0.1)  # added at the end

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    p = {"layer": {"kernel": normal(*LAYERS[name][1])}}
    p["layer"] |= {"bias": normal(N)} if has_bias else {}
    p["layer"] |= {"offset": normal(N)} if rng.random() < 0.2 else {}
    for norm in {"norm", "other norm"} & set(chain):
        p[norm] = {"mean": normal(N), "var": jnp.abs(normal(N)) + 0.1, "scale": normal(N), "bias": normal(N)}
    return (name, kernel, bias, late, chain), p, normal(N, N, N)


def model(drawing, p, x):
    name, kernel, bias, late, chain = drawing
    own = p["layer"]

    def biased(x):
        for b, op in (("offset", "plain"), ("bias", bias)):
            x = x + BIAS_OPS[op](own[b]) if b in own else x
        return x

    for step in chain:
        if step == "layer":
            x = LAYERS[name][0](KERNEL_OPS[kernel](own["kernel"]), x)
            x = x if late else biased(x)
        elif step in ("norm", "other norm"):
            if step in p:
                z = {k: v.reshape(1, 1, -1) for k, v in p[step].items()}
                x = (x - z["mean"]) * lax.rsqrt(z["var"] + 1e-3) * z["scale"] + z["bias"]
        elif step == "sin":
            x = jnp.sin(x / 8)  # that of large numbers is noise
        else:
            x = (OPS | MORE)[step](x)
    return biased(x) if late else x


def off(drawing, p, x):
    """By how much the folded model is off, beside its largest output; None where nothing is folded."""
    folded, report = fold(lambda p, x: model(drawing, p, x), p, x)
    gone = p.keys() - folded.keys()
    assert report.title.startswith(f"{len(gone)} of ")
    if not gone:
        jax.tree.map(np.testing.assert_array_equal, folded, p)
        return None
    expected, got = (np.asarray(model(drawing, z, x), np.float64) for z in (p, folded))
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("seed", range(4))
def test_it_refuses_or_is_right(seed):
    rng = np.random.default_rng(seed)
    folded = 0
    for _ in range(60):
        drawing, p, x = drawn(rng)
        used = {drawing[1], drawing[2], *drawing[4]}
        if used & ROUNDED.keys() and used & STEPS.keys():
            continue  # a rounding shows in a step as much as a wrong fold
        try:
            jax.eval_shape(lambda p, x, drawing=drawing: model(drawing, p, x), p, x)
        except (TypeError, ValueError):
            continue  # the shapes do not fit
        error = off(drawing, p, x)
        folded += error is not None
        assert error is None or error < (0.05 if used & ROUNDED.keys() else 1e-4), (drawing, error)
    assert folded >= 5
