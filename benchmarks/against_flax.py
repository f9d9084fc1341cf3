"""Digits and memory of jaxnorm beside those of the installed flax.linen: the README's table. No timing.

    python benchmarks/against_flax.py

Errors are against float64 NumPy. Memory is what `jax.vjp` keeps for the backward pass, in bytes an element of x.
"""

import importlib.metadata

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn

MEANS = (0, 1e2, 1e3, 1e4, 1e6)
NORMS = {
    "batch": (
        flax.linen.BatchNorm(use_running_average=False),
        lambda x, s, b: jn.batch_norm(x, jn.running_stats(c=64), scale=s, bias=b)[0],
    ),
    "layer": (flax.linen.LayerNorm(), lambda x, s, b: jn.layer_norm(x, scale=s, bias=b)),
    "RMS": (flax.linen.RMSNorm(), lambda x, s, b: jn.rms_norm(x, scale=s)),
    "instance": (flax.linen.InstanceNorm(), lambda x, s, b: jn.instance_norm(x, scale=s, bias=b)),
    "group(32)": (flax.linen.GroupNorm(), lambda x, s, b: jn.group_norm(x, 32, scale=s, bias=b)),
}


def variance_error(mean: float) -> tuple[float, float]:
    """The worst relative error of the variance of N(mean, 1) in float32, 64 channels of 4096."""
    x = np.random.default_rng(0).normal(mean, 1, (4096, 64)).astype(np.float32)
    true = x.astype(np.float64).var(0)
    model = flax.linen.BatchNorm(use_running_average=False, momentum=0.0)
    _, state = model.apply(model.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    theirs, ours = state["batch_stats"]["var"], jn.moments(x, "n c", "n").var
    return tuple(float(np.abs(np.asarray(v, np.float64) / true - 1).max()) for v in (theirs, ours))


def output_error(mean: float) -> tuple[float, float]:
    """The worst error of the layer norm of N(mean, 1) in float32."""
    x = np.random.default_rng(0).normal(mean, 1, (4096, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    true = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    theirs = flax.linen.LayerNorm(use_bias=False, use_scale=False).apply({}, x)
    return tuple(float(np.abs(y - true).max()) for y in (theirs, jn.layer_norm(x)))


def gradient_error(mean: float) -> tuple[float, float]:
    """The worst error of the gradient by x of a loss of that y, in units of the largest gradient."""
    x, w = np.random.default_rng(0).normal([[[mean]], [[0]]], 1, (2, 4096, 64)).astype(np.float32)
    model = flax.linen.LayerNorm(use_bias=False, use_scale=False)

    def exact(x):
        c = x - x.mean(1, keepdims=True)
        return c / jnp.sqrt((c**2).mean(1, keepdims=True) + 1e-6)

    def gradient(norm):
        return jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)) * w))

    theirs, ours = gradient(lambda x: model.apply({}, x))(x), gradient(jn.layer_norm)(x)
    with jax.enable_x64(True):
        true = np.asarray(gradient(exact)(jnp.asarray(x, jnp.float64)))
    return tuple(float(np.abs(g - true).max() / np.abs(true).max()) for g in (theirs, ours))


def kept(f, x, *params) -> float:
    leaves = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], x, *params))
    return sum(a.size * a.dtype.itemsize for a in leaves) / x.size


def main() -> None:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "numpy"))
    print(f"{versions}, {jax.devices()[0].device_kind}\n")
    print("| N(mean, 1), float32: flax.linen / jaxnorm | " + " | ".join(f"{mean:.0e}" for mean in MEANS) + " |")
    print("|---" * (len(MEANS) + 1) + "|")
    errors = {
        "relative error of the variance": variance_error,
        "error of layer norm's y": output_error,
        "error of its gradient": gradient_error,
    }
    for name, error in errors.items():
        print(f"| {name} | " + " | ".join("{:.0e} / {:.0e}".format(*error(mean)) for mean in MEANS) + " |")
    print("\n| | flax.linen | jaxnorm |\n|---|---|---|")
    for name, (model, norm) in NORMS.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jnp.zeros((64, 32, 32, 64), dtype)
            params = model.init(jax.random.key(0), x[:1])
            theirs = kept(lambda x, p, m=model: m.apply(p, x, mutable=["batch_stats"])[0].astype(x.dtype), x, params)
            ours = kept(norm, x, jnp.ones(64), jnp.zeros(64))
            print(f"| bytes an element kept for backward, {name}, {dtype.__name__} | {theirs:.1f} | {ours:.1f} |")


if __name__ == "__main__":
    main()
