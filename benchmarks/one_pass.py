"""Does a variance in one pass pay, where sums of one loop read x once? Forward of batch and layer norm, float32 and
bfloat16, with the statistics in four ways: E[x^2] - E[x]^2 (Flax's default), a pass for the mean and one for the sums
about it, sums about a shift that the first 8 elements or the first sixteenth gives (one pass), and jaxnorm's own.

    python benchmarks/one_pass.py [--mb 256]

Printed: milliseconds, times the limit of memory traffic, the worst relative error of the variance of N(mean, 1) in
float32, and the same where the first 8 elements are 0, as the border of a padded picture is: there a shift that they
give is no use, while one of a sixteenth costs at most 15 roundings whatever stands there (stats.py).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn
from jaxnorm.lab.bench import timing


def fast(x, axis):
    x = x.astype(jnp.float32)
    mean = x.mean(axis, keepdims=True)
    return mean, jnp.maximum((x * x).mean(axis, keepdims=True) - mean**2, 0)


def shifted(x, axis, count=8):
    x = x.astype(jnp.float32)
    shift = jax.lax.slice_in_dim(x, 0, count, axis=axis).mean(axis, keepdims=True)
    c = x - shift
    offset = c.mean(axis, keepdims=True)
    return shift + offset, jnp.maximum((c * c).mean(axis, keepdims=True) - offset**2, 0)


def part(x, axis):
    return shifted(x, axis, x.shape[axis] // 16)


def two_passes(x, axis):
    return shifted(x, axis, x.shape[axis])


WAYS = {"fast": fast, "two passes": two_passes, "8 elements": shifted, "a sixteenth": part}


def applied(statistics, axis):
    def norm(x):
        mean, var = statistics(x, axis)
        return ((x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + 1e-5)).astype(x.dtype)

    return norm


def ours(axis):
    over = "nc"[axis]
    return lambda x: jn.standardize(x, "n c", over, epsilon=1e-5)[0]


def error(statistics, axis, mean, border=0):
    x = np.random.default_rng(0).normal(mean, 1, (4096, 64) if axis == 0 else (64, 4096)).astype(np.float32)
    x[(slice(0, border), slice(None))[:: 1 if axis == 0 else -1]] = 0
    true = x.astype(np.float64).var(axis)
    got = statistics(jnp.asarray(x), axis)[1].reshape(-1)
    return float(np.abs(np.asarray(got, np.float64) / true - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=16, help="megabytes of x in float32 (default: 16)")
    args = parser.parse_args()
    elements = round(args.mb * 2**18)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    calls = 1 if jax.default_backend() == "cpu" else 10
    for norm, axis, shape in (("batch", 0, (elements // 1024, 1024)), ("layer", 1, (elements // 1024, 1024))):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
            forms = {name: applied(way, axis) for name, way in WAYS.items()} | {"jaxnorm": ours(axis)}
            timed = {"copy": timing.copy(x)}
            for name, form in forms.items():
                jitted = jax.jit(form)
                timed[name] = (lambda jitted=jitted, x=x: jitted(x)), jax.block_until_ready
            times = timing.interleaved(timed, 12, calls)
            for name, of in times.items():
                limit = timing.times_limit(of.minimum, times["copy"].minimum, norm, "forward")
                shown = f"{limit:6.2f} of the limit" if name != "copy" else ""
                print(f"{norm:7}{jnp.dtype(dtype).name:10}{name:12}{1e3 * of.minimum:9.3f} ms {shown}")
    ways: dict = WAYS | {"jaxnorm": lambda x, a: (None, jn.moments(x, "n c", "nc"[a]).var)}
    for norm, axis in (("batch", 0), ("layer", 1)):
        for name, way in ways.items():
            errors = [f"{error(way, axis, mean):.0e}" for mean in (0, 1e2, 1e4, 1e6)]
            print(f"{norm:7}{name:12} mean 0, 1e2, 1e4, 1e6:", *errors, f"| border: {error(way, axis, 1e4, 8):.0e}")


if __name__ == "__main__":
    main()
